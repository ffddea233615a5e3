//! The requests of [`ApiVideo`]: by refresh token if there is one, else by API key.

use std::time::Duration;

use http::{HeaderName, Request, StatusCode, header::CONTENT_TYPE};
use serde_json::Value;

use super::super::client::TokenResponse;
use super::super::{Credential, TokenRequest, TokenSource};
use super::ApiVideo;
use crate::error::{SourceError, SourceErrorKind};
use crate::origins::AllowedOrigins;
use crate::retry_after::header_seconds;
use crate::token::Token;

/// The option that sets the URL.
pub(crate) const OPTION: &str = "base_url";

/// The name of the client, in the form that api.video's own clients use.
const ORIGIN_CLIENT: HeaderName = HeaderName::from_static("av-origin-client");
const ORIGIN_APP: HeaderName = HeaderName::from_static("av-origin-app");

/// The delay that a 429 of api.video asks for, in seconds.
const RATE_LIMIT_RETRY_AFTER: &str = "x-ratelimit-retry-after";

/// The lifetime of a token whose response has no `expires_in`. It is the one in api.video's documents.
const DEFAULT_LIFETIME: Duration = Duration::from_secs(3600);

impl ApiVideo {
    /// Builds a `POST` request to the API, with the headers that all requests have. `path` is relative to
    /// [`api_base`](Self::api_base).
    ///
    /// # Errors
    ///
    /// [`SourceError::configuration`] if an option other than the key is not valid.
    pub(crate) fn request(&self, path: &str, body: String) -> Result<Request<String>, SourceError> {
        self.client.check()?;
        if self.base_url.query().is_some() {
            return Err(SourceError::configuration("base_url must not have a query"));
        }
        self.client.check_url(&self.base_url, OPTION)?;
        let mut request = Request::post(format!("{}{path}", self.api_base()))
            .header(CONTENT_TYPE, "application/json")
            .header(ORIGIN_CLIENT, concat!("tower-bearer:", env!("CARGO_PKG_VERSION")));
        if let Some(app) = self.origin_app.clone().transpose()? {
            request = request.header(ORIGIN_APP, app);
        }
        // Without the parser's error: the path may be a secret.
        request.body(body).map_err(|_| SourceError::configuration("base_url must have a valid path"))
    }
}

impl TokenSource for ApiVideo {
    async fn fetch(&self, request: &TokenRequest<'_>) -> Result<Token, SourceError> {
        let key = self.key().clone();
        let refresh_token = request.refresh_token().filter(|_| !self.key_only);
        let (path, field, secret) = match refresh_token {
            Some(refresh_token) => ("auth/refresh", "refreshToken", refresh_token),
            None => ("auth/api-key", "apiKey", key.checked()?),
        };
        let response =
            self.client.exchange(self.request(path, json(field, secret))?, OPTION, &request.sent).await?;
        if response.status().is_success() {
            return response.granted(Some(DEFAULT_LIFETIME));
        }
        let error = failure(&response);
        Err(match error.kind() {
            SourceErrorKind::Rejected if refresh_token.is_none() => SourceError::rejected(format!(
                "{}{path} rejected the API key (HTTP {}): check that it belongs to this environment and is not revoked",
                self.api_base(),
                response.status().as_u16()
            )),
            _ => error,
        })
    }

    fn validate(&self) -> Result<(), SourceError> {
        self.key().checked()?;
        // Checks the other options.
        self.request("", String::new()).map(drop)
    }

    /// All tokens are those of the key and its environment.
    fn credential(&self) -> Credential {
        let key = self.key();
        let credential = Credential::new([self.api_base().to_string().as_str(), key.unchecked()]);
        let credential = if self.key_only { credential.without_logins() } else { credential };
        credential.with_revision(key.revision)
    }

    /// The origin of the base URL, which the API shares.
    fn allowed_origins(&self) -> AllowedOrigins {
        AllowedOrigins::origin_of(&self.base_url)
    }
}

/// Returns a JSON object with one field.
fn json(field: &str, secret: &str) -> String {
    format!("{{\"{field}\":{}}}", Value::from(secret))
}

/// Returns the error for a response whose status is not a success.
///
/// A 429 of api.video may have its delay in `X-RateLimit-Retry-After`, which counts if there is no `Retry-After`.
pub(crate) fn failure(response: &TokenResponse) -> SourceError {
    // Its errors have no code: 400, 401 and 403 reject the grant.
    let error = response.failure_of(None);
    match header_seconds(response.headers(), RATE_LIMIT_RETRY_AFTER) {
        Some(delay)
            if response.status() == StatusCode::TOO_MANY_REQUESTS && error.retry_after().is_none() =>
        {
            error.with_retry_after(delay)
        }
        _ => error,
    }
}

#[cfg(all(test, feature = "default-client"))]
mod tests {
    use http::Uri;

    use super::*;
    use crate::source::TokenClient;

    fn url(base_url: &'static str) -> Result<String, String> {
        let request =
            ApiVideo::new("key").base_url(Uri::from_static(base_url)).request("auth/refresh", String::new());
        request.map(|request| request.uri().to_string()).map_err(|error| {
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
            assert_eq!(
                ApiVideo::new("key").base_url(Uri::from_static(base_url)).api_base().to_string(),
                expected
            );
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
        let sidecar = ApiVideo::new("key").base_url(Uri::from_static("http://sidecar"));
        assert!(
            sidecar.with_client(TokenClient::new().allow_plaintext()).request("x", String::new()).is_ok()
        );
    }

    /// A secret contains characters that JSON escapes.
    #[test]
    fn a_secret_is_escaped_in_json() {
        assert_eq!(json("apiKey", "a\"b"), r#"{"apiKey":"a\"b"}"#);
        assert_eq!(json("refreshToken", "r"), r#"{"refreshToken":"r"}"#);
    }

    /// A 429 says in api.video's own header when to ask again.
    #[test]
    fn rate_limit_header_counts_for_429() {
        let delay = |status: StatusCode, headers: &[(&'static str, &str)]| {
            let builder = http::Response::builder().status(status);
            let builder =
                headers.iter().fold(builder, |builder, (name, value)| builder.header(*name, *value));
            let head = builder.body(()).unwrap().into_parts().0;
            let (url, option, requested_at) = (String::new(), "base_url".into(), std::time::Instant::now());
            let response = TokenResponse { url, option, requested_at, head, body: None, fields: None };
            failure(&response).retry_after().map(|delay| delay.as_secs())
        };
        let (limited, rate_limit) = (StatusCode::TOO_MANY_REQUESTS, (RATE_LIMIT_RETRY_AFTER, "7"));
        assert_eq!(delay(limited, &[rate_limit]), Some(7));
        assert_eq!(delay(limited, &[rate_limit, ("retry-after", "3")]), Some(3));
        assert_eq!(delay(limited, &[rate_limit, ("retry-after", "soon")]), Some(7));
        assert_eq!(delay(StatusCode::SERVICE_UNAVAILABLE, &[rate_limit]), None);
    }
}
