//! The parser of a token endpoint's successful response (RFC 6749 §5.1).

use std::time::{Duration, Instant};

use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde_json::Value;

use crate::{
    error::SourceError,
    observability,
    token::{Token, TokenBuilder},
};

/// A token response. Its fields are checked when the token is built.
#[derive(Deserialize)]
pub(crate) struct TokenResponse {
    access_token: Option<SecretString>,
    refresh_token: Option<SecretString>,
    token_type: Option<String>,
    expires_in: Option<Value>,
    error: Option<Value>,
}

impl TokenResponse {
    /// Parses a response in JSON.
    ///
    /// # Errors
    ///
    /// [`SourceError::invalid_response`]. It quotes nothing of the response and omits serde's message, which would.
    pub(crate) fn from_json(body: &[u8]) -> Result<Self, SourceError> {
        serde_json::from_slice(without_byte_order_mark(body))
            .map_err(|_| invalid("the response of the token endpoint is not a token response in JSON"))
    }

    /// Parses a response that is form-encoded, as some authorization servers send it. `None` if it has no token.
    #[cfg(feature = "oauth2")]
    pub(crate) fn from_form(body: &[u8]) -> Option<Self> {
        let field = |name| form_field(body, name);
        Some(Self {
            access_token: Some(field("access_token")?.into()),
            refresh_token: field("refresh_token").map(Into::into),
            token_type: field("token_type"),
            expires_in: field("expires_in").map(Value::String),
            error: field("error").map(Value::String),
        })
    }

    #[cfg(feature = "oauth2")]
    pub(crate) fn has_access_token(&self) -> bool {
        self.access_token.is_some()
    }

    /// Returns the refresh token. An empty one counts as missing.
    #[cfg(feature = "oauth2")]
    pub(crate) fn refresh_token(&self) -> Option<&str> {
        self.refresh_token.as_ref().map(|token| token.expose_secret()).filter(|token| !token.is_empty())
    }

    /// Builds the token of the response to a request that was sent at `requested_at`.
    ///
    /// `default_lifetime` counts if the response states no lifetime, and `kept_refresh_token` if it has no refresh token
    /// (RFC 6749 §6).
    ///
    /// # Errors
    ///
    /// [`SourceError::invalid_response`], which quotes nothing of the response.
    pub(crate) fn token(
        self,
        requested_at: Instant,
        default_lifetime: Option<Duration>,
        kept_refresh_token: Option<&str>,
    ) -> Result<Token, SourceError> {
        // Some servers send an empty one with each token.
        if self.error.is_some_and(|error| error != "" && error != false) {
            return Err(invalid("the response of the token endpoint has a success status and an error"));
        }
        // RFC 6749 §7.1: a client must not use a token of an unknown type. The name of the type is case-insensitive.
        if self.token_type.is_some_and(|kind| !kind.eq_ignore_ascii_case("bearer")) {
            return Err(invalid("the response of the token endpoint has a token_type other than Bearer"));
        }
        let access_token = self
            .access_token
            .ok_or_else(|| invalid("the response of the token endpoint has no access_token"))?;
        let mut token = Token::builder(access_token.expose_secret()).requested_at(requested_at);
        let stated = self.expires_in.as_ref();
        if let Some(lifetime) = stated.and_then(lifetime) {
            token = token.expires_in(lifetime);
        } else {
            if stated.is_some() {
                observability::lifetime_ignored(default_lifetime);
            }
            token = default_lifetime.into_iter().fold(token, TokenBuilder::expires_in);
        }
        let refresh_token = self.refresh_token.as_ref().map(|token| token.expose_secret());
        if let Some(refresh_token) = refresh_token.filter(|token| !token.is_empty()).or(kept_refresh_token) {
            token = token.refresh_token(refresh_token);
        }
        Ok(token.build()?)
    }
}

/// Returns a field of a form-encoded body. `None` if the body is something else, such as HTML, whose text could have the
/// form of a field.
#[cfg(feature = "oauth2")]
pub(crate) fn form_field(body: &[u8], name: &str) -> Option<String> {
    let body = without_byte_order_mark(body).trim_ascii();
    let is_form = body.iter().all(|byte| byte.is_ascii_graphic() && !b"<>\"{}".contains(byte));
    let mut fields = form_urlencoded::parse(body).filter(|_| is_form);
    fields.find(|(key, _)| key == name).map(|(_, value)| value.into_owned())
}

/// Some servers start their JSON with a byte order mark, which RFC 8259 §8.1 lets a parser ignore.
pub(crate) fn without_byte_order_mark(body: &[u8]) -> &[u8] {
    body.strip_prefix("\u{feff}".as_bytes()).unwrap_or(body)
}

fn invalid(what: &'static str) -> SourceError {
    SourceError::invalid_response(what)
}

/// Reads `expires_in`: seconds as a number or a text, whole or fractional. A negative value is zero, any other value
/// `None`.
fn lifetime(expires_in: &Value) -> Option<Duration> {
    let seconds = match expires_in {
        Value::Number(number) => number.as_f64()?,
        Value::String(text) => text.trim().parse().ok()?,
        _ => return None,
    };
    if seconds.is_nan() {
        return None;
    }
    Some(Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEFAULT: Duration = Duration::from_secs(1234);

    fn parsed(body: &str) -> Result<Token, SourceError> {
        let requested_at = tokio::time::Instant::now().into_std();
        TokenResponse::from_json(body.as_bytes())?.token(requested_at, Some(DEFAULT), None)
    }

    fn remaining(expires_in: &str) -> Duration {
        let body = format!(r#"{{"access_token": "abc", "expires_in": {expires_in}}}"#);
        parsed(&body).unwrap().remaining().unwrap()
    }

    /// Rows 12 to 15.
    #[tokio::test(start_paused = true)]
    async fn reads_every_known_lifetime_form() {
        let secs = Duration::from_secs;
        for (text, expected) in [
            ("3600", secs(3600)),
            ("3599.5", Duration::from_millis(3_599_500)),
            (r#""3600""#, secs(3600)),
            (r#"" 3599.5 ""#, Duration::from_millis(3_599_500)),
            ("0", secs(0)),
            ("-5", secs(0)),
            (r#""-inf""#, secs(0)),
            ("null", DEFAULT),
            (r#""soon""#, DEFAULT),
            (r#""NaN""#, DEFAULT),
            ("[3600]", DEFAULT),
            ("true", DEFAULT),
        ] {
            assert_eq!(remaining(text), expected, "{text}");
        }
        for huge in ["18446744073709551615", "1e300", r#""inf""#] {
            assert!(remaining(huge) > secs(365 * 24 * 60 * 60), "{huge}");
        }
        assert_eq!(parsed(r#"{"access_token": "abc"}"#).unwrap().remaining(), Some(DEFAULT));
    }

    /// Row 17.
    #[tokio::test(start_paused = true)]
    async fn lifetime_starts_at_request() {
        let requested_at = tokio::time::Instant::now().into_std();
        tokio::time::advance(Duration::from_secs(10)).await;
        let response = TokenResponse::from_json(br#"{"access_token": "abc", "expires_in": 60}"#).unwrap();
        let token = response.token(requested_at, Some(DEFAULT), None).unwrap();
        assert_eq!(token.remaining(), Some(Duration::from_secs(50)));
    }

    #[test]
    fn bad_response_error_quotes_nothing() {
        for bad in [
            "",
            "null",
            "{",
            "<html>canary</html>",
            r#"{"access_token": "canary""#,
            r#"{"access_token": null, "x": "canary"}"#,
            r#"{"access_token": 5, "x": "canary"}"#,
            r#"{"access_token": {"canary": 1}}"#,
            r#"{"access_token": ""}"#,
            r#"{"access_token": "canary\r\nX: y"}"#,
            r#"{"access_token": "canary", "token_type": "mac"}"#,
            r#"{"access_token": "canary", "error": "invalid_grant"}"#,
            r#"{"access_token": "canary", "token_type": ["canary"]}"#,
        ] {
            let error = parsed(bad).unwrap_err();
            assert!(error.is_transient(), "{bad}");
            let shown = format!("{error} {error:?} {:?}", std::error::Error::source(&error));
            assert!(!shown.contains("canary"), "{shown}");
        }
    }

    #[test]
    fn token_type_is_bearer_or_missing() {
        for good in ["Bearer", "bearer", "BEARER"] {
            assert!(parsed(&format!(r#"{{"access_token": "a", "token_type": "{good}"}}"#)).is_ok());
        }
        for good in [
            r#"{"access_token": "a"}"#,
            "\u{feff}{\"access_token\": \"a\", \"token_type\": null, \"error\": null}",
        ] {
            assert!(parsed(good).is_ok(), "{good}");
        }
    }

    #[test]
    fn a_refresh_token_is_kept_if_there_is_one() {
        let refresh_token = |body| parsed(body).unwrap().refresh_token().map(str::to_owned);
        assert_eq!(refresh_token(r#"{"access_token": "a", "refresh_token": "def"}"#).as_deref(), Some("def"));
        for none in [r#"{"access_token": "a"}"#, r#"{"access_token": "a", "refresh_token": ""}"#] {
            assert_eq!(refresh_token(none), None, "{none}");
        }
    }
}
