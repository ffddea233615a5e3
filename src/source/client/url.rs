//! Whether a credential may be sent to a URL.

use http::Uri;

use crate::{
    error::SourceError,
    origins::{self, AllowedOrigins, is_loopback},
};

pub(super) const EXPECTED_URL: &str = "have a scheme and a host, such as https://api.example.com";

/// Checks that a credential may be sent to `url`, which the option of this name has set.
///
/// # Errors
///
/// [`SourceError::configuration`] if the URL cannot be used. The message shows at most the origin, because a user name or
/// a query may be a secret.
pub(super) fn check_url(url: &Uri, option: &str, allows_plaintext: bool) -> Result<(), SourceError> {
    let what = match (url.scheme_str(), url.authority()) {
        (None, _) | (_, None) => EXPECTED_URL.to_owned(),
        (_, Some(authority)) if authority.as_str().contains('@') => {
            "not have a user name or password".to_owned()
        }
        (_, Some(authority)) if authority.host().is_empty() => "have a host".to_owned(),
        (Some("http"), Some(authority)) if !allows_plaintext && !is_loopback(authority.host()) => format!(
            "not be plaintext http except on loopback, got {}: use https, or TokenClient::allow_plaintext",
            origins::shown(url)
        ),
        (Some("http" | "https"), _) if AllowedOrigins::origin_of(url).covers(url) => return Ok(()),
        (Some("http" | "https"), _) => "have a port of at most 65535".to_owned(),
        _ => format!("be https or http, got {}", origins::shown(url)),
    };
    Err(SourceError::configuration(format!("{option} must {what}")))
}
