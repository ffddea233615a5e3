//! [`check_url`]: whether a credential may be sent to a URL.

use http::{
    Uri,
    uri::{Authority, Scheme},
};

use crate::{
    error::SourceError,
    origins::{AllowedOrigins, is_loopback, shown},
};

/// Checks that a credential may be sent to `url`, which the option of this name has set. Returns its scheme and authority. The option
/// `allow` allows plaintext for any host.
///
/// # Errors
///
/// [`SourceError::configuration`] if the URL cannot be used. The message shows at most the origin, because a user name or
/// a query may be a secret.
pub(crate) fn check_url<'a>(
    url: &'a Uri,
    option: &str,
    allow: &str,
    plaintext_anywhere: bool,
) -> Result<(&'a Scheme, &'a Authority), SourceError> {
    let invalid = |what: &str| Err(SourceError::configuration(format!("{option} must {what}")));
    let (Some(scheme), Some(authority)) = (url.scheme(), url.authority()) else {
        return invalid("have a scheme and a host, such as https://api.example.com");
    };
    if authority.as_str().contains('@') {
        return invalid("not have a user name or password");
    }
    if authority.host().is_empty() {
        return invalid("have a host, such as https://api.example.com");
    }
    if *scheme == Scheme::HTTP {
        if !plaintext_anywhere && !is_loopback(authority.host()) {
            let origin = shown(url);
            return invalid(&format!(
                "not be plaintext http except on loopback, got {origin}: use https, or {allow}"
            ));
        }
    } else if *scheme != Scheme::HTTPS {
        return invalid(&format!("be https or http, got {}", shown(url)));
    }
    // A URL without an origin that can be sent to has no allowed origin either.
    if !AllowedOrigins::origin_of(url).covers(url) {
        return invalid("have a port of at most 65535");
    }
    Ok((scheme, authority))
}
