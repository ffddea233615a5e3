//! [`BaseUrl`]: the URL of a source's endpoints, checked before a credential is sent there.

use http::Uri;

use super::super::http::check_url;
use crate::{error::SourceError, origins::AllowedOrigins};

/// The URL that the paths of a source's endpoints are appended to.
#[derive(Clone)]
pub(crate) struct BaseUrl {
    url: Uri,
    /// Whether plaintext `http` is allowed for hosts other than loopback.
    plaintext_anywhere: bool,
}

impl BaseUrl {
    /// Makes a base URL that allows plaintext `http` on loopback only.
    pub(crate) fn new(url: Uri) -> Self {
        Self { url, plaintext_anywhere: false }
    }

    /// Makes a base URL that allows plaintext `http` for any host.
    pub(crate) fn insecure(url: Uri) -> Self {
        Self { url, plaintext_anywhere: true }
    }

    /// Returns the host, if the URL has one. It is not a secret.
    pub(crate) fn host(&self) -> Option<&str> {
        self.url.host()
    }

    /// Returns the URL with a path that ends with `/`, so that the path of an endpoint can be appended. A URL without
    /// an origin is returned as it was set.
    pub(crate) fn with_slash(&self) -> Uri {
        let mut parts = self.url.clone().into_parts();
        parts.path_and_query = format!("{}/", self.url.path().trim_end_matches('/')).parse().ok();
        Uri::from_parts(parts).unwrap_or_else(|_| self.url.clone())
    }

    /// Returns the URL's origin as the only allowed one.
    pub(crate) fn allowed_origins(&self) -> AllowedOrigins {
        AllowedOrigins::origin_of(&self.url)
    }

    /// Returns the URL with `path` appended. It contains no secret.
    ///
    /// # Errors
    ///
    /// [`SourceError::configuration`] if the URL cannot be used. The message shows at most the origin, because a user
    /// name or a query may be a secret.
    pub(crate) fn join(&self, path: &str) -> Result<Uri, SourceError> {
        let invalid = |what: &str| Err(SourceError::configuration(format!("base_url must {what}")));
        if self.url.query().is_some() {
            return invalid("not have a query");
        }
        let (scheme, authority) =
            check_url(&self.url, "base_url", "insecure_base_url", self.plaintext_anywhere)?;
        let prefix = self.url.path().trim_end_matches('/');
        Uri::builder()
            .scheme(scheme.clone())
            .authority(authority.clone())
            .path_and_query(format!("{prefix}{path}"))
            .build()
            .or_else(|_| invalid("have a valid path"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(base_url: &'static str) -> Result<String, String> {
        BaseUrl::new(Uri::from_static(base_url)).join("/auth/refresh").map(|url| url.to_string()).map_err(
            |error| {
                assert!(!error.is_transient());
                error.to_string()
            },
        )
    }

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
        assert!(BaseUrl::insecure(Uri::from_static("http://sidecar")).join("/x").is_ok());
    }
}
