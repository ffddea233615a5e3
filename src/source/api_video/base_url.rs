//! [`BaseUrl`]: the URL of a source's endpoints, checked before a credential is sent there.

use http::Uri;

use super::super::TokenClient;
use crate::{error::SourceError, origins::AllowedOrigins};

/// The option that sets the URL.
pub(crate) const OPTION: &str = "base_url";

/// The URL that the paths of a source's endpoints are appended to.
#[derive(Clone)]
pub(crate) struct BaseUrl(Uri);

impl BaseUrl {
    pub(crate) fn new(url: Uri) -> Self {
        Self(url)
    }

    /// Returns the URL with a path that ends with `/`, so that the path of an endpoint can be appended. A URL without
    /// an origin is returned as it was set.
    pub(crate) fn with_slash(&self) -> Uri {
        let mut parts = self.0.clone().into_parts();
        parts.path_and_query = format!("{}/", self.0.path().trim_end_matches('/')).parse().ok();
        Uri::from_parts(parts).unwrap_or_else(|_| self.0.clone())
    }

    /// Returns the URL's origin as the only allowed one.
    pub(crate) fn allowed_origins(&self) -> AllowedOrigins {
        AllowedOrigins::origin_of(&self.0)
    }

    /// Returns the URL with `path` appended, if `client` may send a credential there. It contains no secret.
    ///
    /// # Errors
    ///
    /// [`SourceError::configuration`] if the URL cannot be used. The message shows at most the origin, because a user
    /// name or a query may be a secret.
    pub(crate) fn join(&self, path: &str, client: &TokenClient) -> Result<Uri, SourceError> {
        if self.0.query().is_some() {
            return Err(SourceError::configuration("base_url must not have a query"));
        }
        client.check_url(&self.0, OPTION)?;
        let url = format!("{}{}", self.with_slash(), path.trim_start_matches('/'));
        url.parse().map_err(|_| SourceError::configuration("base_url must have a valid path"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(base_url: &'static str) -> Result<String, String> {
        let joined = BaseUrl::new(Uri::from_static(base_url)).join("/auth/refresh", &TokenClient::new());
        joined.map(|url| url.to_string()).map_err(|error| {
            assert!(!error.is_transient());
            error.to_string()
        })
    }

    /// A base URL has a path.
    #[test]
    fn a_base_url_keeps_its_path_as_a_prefix() {
        for (base_url, expected) in [
            ("https://ws.api.video", "https://ws.api.video/auth/refresh"),
            ("https://gateway.example:8443/video/", "https://gateway.example:8443/video/auth/refresh"),
            ("http://127.0.0.1:3000", "http://127.0.0.1:3000/auth/refresh"),
            ("http://[::1]:3000", "http://[::1]:3000/auth/refresh"),
            ("http://LOCALHOST", "http://localhost/auth/refresh"),
        ] {
            assert!(url(base_url).unwrap().eq_ignore_ascii_case(expected), "{base_url}");
        }
    }

    /// A path is appended to a base URL, with or without a slash.
    #[test]
    fn a_path_can_be_appended() {
        for (base_url, expected) in [
            ("https://ws.api.video", "https://ws.api.video/"),
            ("https://gateway.example:8443/video", "https://gateway.example:8443/video/"),
            ("https://gateway.example/video//", "https://gateway.example/video/"),
            ("ws.api.video:443", "ws.api.video:443"),
        ] {
            assert_eq!(BaseUrl::new(Uri::from_static(base_url)).with_slash().to_string(), expected);
        }
    }

    /// A base URL cannot be used: the error has a hint.
    #[test]
    fn unusable_base_url_error_has_hint() {
        for (base_url, hint) in [
            ("/auth", "a scheme and a host"),
            ("ws.api.video:443", "a scheme and a host"),
            ("https://user:canary@ws.api.video", "user name"),
            ("https://ws.api.video/?key=canary", "query"),
            ("http://ws.api.video", "use https"),
            ("http://127.0.0.1.example.com", "use https"),
            ("ftp://ws.api.video", "https or http, got ftp://ws.api.video"),
            ("https://ws.api.video:99999", "a port of at most 65535"),
        ] {
            let error = url(base_url).unwrap_err();
            assert!(error.contains(hint) && !error.contains("canary"), "{base_url}: {error}");
        }
        let client = TokenClient::new().allow_plaintext();
        assert!(BaseUrl::new(Uri::from_static("http://sidecar")).join("/x", &client).is_ok());
    }
}
