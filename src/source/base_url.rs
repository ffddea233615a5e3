//! [`BaseUrl`]: where an auth endpoint is, checked before a credential is sent there.

use http::{Uri, uri::Scheme};

use crate::{
    error::SourceError,
    origins::{AllowedOrigins, is_loopback},
};

#[derive(Clone)]
pub(super) struct BaseUrl {
    url: Uri,
    /// Whether plaintext `http` may go to other hosts than loopback.
    plaintext_anywhere: bool,
}

impl BaseUrl {
    pub(super) fn new(url: Uri) -> Self {
        Self { url, plaintext_anywhere: false }
    }

    /// Plaintext `http` may go to any host.
    pub(super) fn insecure(url: Uri) -> Self {
        Self { url, plaintext_anywhere: true }
    }

    /// The host, if the URL has one; it may be shown.
    pub(super) fn host(&self) -> Option<&str> {
        self.url.host()
    }

    /// Its origin, and no other.
    pub(super) fn allowed_origins(&self) -> AllowedOrigins {
        AllowedOrigins::origin_of(&self.url)
    }

    /// The URL with `path` added. It has no secret in it, and may be shown.
    pub(super) fn join(&self, path: &str) -> Result<Uri, SourceError> {
        let wrong = |what: &'static str| Err(SourceError::configuration(what));
        let (Some(scheme), Some(authority)) = (self.url.scheme(), self.url.authority()) else {
            return wrong("the base URL has no scheme or no host: give one such as https://ws.api.video");
        };
        if authority.as_str().contains('@') {
            return wrong("the base URL has a user name or password: remove it");
        }
        if authority.host().is_empty() {
            return wrong("the base URL has no host: give one such as https://ws.api.video");
        }
        if self.url.query().is_some() {
            return wrong("the base URL has a query: remove it");
        }
        if *scheme == Scheme::HTTP {
            if !self.plaintext_anywhere && !is_loopback(authority.host()) {
                return wrong(
                    "the base URL is plaintext http to another host: use https, or insecure_base_url if you must",
                );
            }
        } else if *scheme != Scheme::HTTPS {
            return wrong("the base URL is neither https nor http");
        }
        let prefix = self.url.path().trim_end_matches('/');
        Uri::builder()
            .scheme(scheme.clone())
            .authority(authority.clone())
            .path_and_query(format!("{prefix}{path}"))
            .build()
            .or_else(|_| wrong("the base URL has no valid path"))
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
    fn unusable_base_url_error_has_hint() {
        for (base_url, hint) in [
            ("/auth", "no host"),
            ("ws.api.video:443", "no scheme"),
            ("https://user:canary@ws.api.video", "user name"),
            ("https://ws.api.video/?key=canary", "query"),
            ("http://ws.api.video", "use https"),
            ("http://127.0.0.1.example.com", "use https"),
            ("ftp://ws.api.video", "neither"),
        ] {
            let error = url(base_url).unwrap_err();
            assert!(error.contains(hint) && !error.contains("canary"), "{base_url}: {error}");
        }
        assert!(BaseUrl::insecure(Uri::from_static("http://sidecar")).join("/x").is_ok());
    }
}
