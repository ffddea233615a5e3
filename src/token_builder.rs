//! [`TokenBuilder`]: makes a token of its texts and its lifetime.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use http::HeaderValue;
use secrecy::{ExposeSecret, SecretString, zeroize::Zeroizing};
use serde_json::Value;
use tokio::time::Instant;

use crate::error::TokenError;
use crate::token::{Inner, SCHEME, Token, TokenId};

/// The maximum lifetime. A longer one is clamped, because `Instant` cannot represent every sum.
const MAX_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);

impl Token {
    /// Returns a builder for a token with this access token.
    pub fn builder(access_token: impl Into<String>) -> TokenBuilder {
        TokenBuilder {
            access_token: access_token.into().into(),
            refresh_token: None,
            lifetime: None,
            refresh_token_expires_in: None,
            requested_at: Instant::now(),
        }
    }
}

/// A builder for a [`Token`], made by [`Token::builder`].
#[derive(Debug)]
#[must_use = "a builder does nothing until `build` is called"]
pub struct TokenBuilder {
    access_token: SecretString,
    refresh_token: Option<SecretString>,
    /// The lifetime, and when it began: `None` for the time of the request.
    lifetime: Option<(Option<Instant>, Duration)>,
    refresh_token_expires_in: Option<Duration>,
    requested_at: Instant,
}

impl TokenBuilder {
    /// Sets the refresh token (RFC 6749 §6). Default: none.
    pub fn refresh_token(mut self, refresh_token: impl Into<String>) -> Self {
        self.refresh_token = Some(refresh_token.into().into());
        self
    }

    /// Sets the lifetime of the token (`expires_in` of RFC 6749 §5.1). Default: none, so that it is used until the API
    /// challenges it.
    ///
    /// The maximum is ten years; a longer lifetime is clamped. If less than 100 ms of it are left when the provider gets the
    /// token, it is unknown, as with none.
    pub fn expires_in(mut self, lifetime: Duration) -> Self {
        self.lifetime = Some((None, lifetime));
        self
    }

    /// Sets when the token expires, by the system's clock, in place of its lifetime. A time that has passed is a lifetime of
    /// zero, and one after ten years is clamped.
    pub fn expires_at(self, at: SystemTime) -> Self {
        self.with_left(at.duration_since(SystemTime::now()).unwrap_or_default())
    }

    /// Sets the lifetime that the access token states, if it is a JWT: until its claim `exp`, from now or from its claim
    /// `iat` if that is later (RFC 7519 §4.1). Of any other token, the lifetime stays as it is.
    ///
    /// The token is not verified here: the API does that.
    pub fn expires_by_jwt(self) -> Self {
        match jwt_lifetime(self.access_token.expose_secret()) {
            Some(left) => self.with_left(left),
            None => self,
        }
    }

    /// Sets how much of the lifetime is left now.
    fn with_left(mut self, left: Duration) -> Self {
        self.lifetime = Some((Some(Instant::now()), left));
        self
    }

    /// Sets the lifetime of the refresh token. Default: none, so that it does not matter.
    ///
    /// A refresh token that expires before the access token is presented before it does.
    pub fn refresh_token_expires_in(mut self, lifetime: Duration) -> Self {
        self.refresh_token_expires_in = Some(lifetime);
        self
    }

    /// Sets when the token was requested, which is the start of its lifetime. Default: when the builder was made.
    ///
    /// A source that waits for a response reads tokio's clock before it sends the request
    /// (`tokio::time::Instant::now().into_std()`), because part of the lifetime may have passed when the response
    /// arrives.
    pub fn requested_at(mut self, instant: std::time::Instant) -> Self {
        self.requested_at = instant.into();
        self
    }

    /// Builds the token.
    ///
    /// # Errors
    ///
    /// - [`TokenError`] if the access token is empty, longer than [`Token::MAX_LEN`], or has a character that is not
    ///   allowed in an access token (visible ASCII, RFC 6749 appendix A.12). A line break, for example, could add a header
    ///   to the request.
    /// - [`TokenError`] if the refresh token is empty or longer than [`Token::MAX_LEN`].
    pub fn build(self) -> Result<Token, TokenError> {
        let access_token = self.access_token.expose_secret();
        check_length(access_token)?;
        if !access_token.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(TokenError::IllegalCharacter);
        }
        if let Some(refresh_token) = &self.refresh_token {
            check_length(refresh_token.expose_secret())?;
        }
        let mut header = HeaderValue::from_str(&format!("{SCHEME}{access_token}"))
            .map_err(|_| TokenError::IllegalCharacter)?;
        header.set_sensitive(true);
        // The bytes of a clone are shared from the start. The original would check at each clone whether its bytes are.
        let header = header.clone();
        let end = |(begun, lifetime): (Option<Instant>, Duration)| match (
            begun.unwrap_or(self.requested_at),
            lifetime,
        ) {
            // It begins in the past, and the end must not be there: the token expires now.
            (begun, Duration::ZERO) => Some(Instant::now().max(begun)),
            (begun, lifetime) => begun.checked_add(lifetime.min(MAX_LIFETIME)),
        };
        Ok(Token(Arc::new(Inner {
            header,
            refresh_token_expires_at: self
                .refresh_token_expires_in
                .and_then(|lifetime| end((None, lifetime))),
            expires_at: self.lifetime.and_then(end),
            refresh_at: None,
            id: TokenId::default(),
            refresh_token: self.refresh_token,
        })))
    }
}

/// Returns the lifetime of a JWT, by its claims. Zero if it has expired, `None` if it is no JWT or does not expire.
pub(crate) fn jwt_lifetime(token: &str) -> Option<Duration> {
    let payload = Zeroizing::new(BASE64_URL_SAFE_NO_PAD.decode(token.split('.').nth(1)?).ok()?);
    let claims: Value = serde_json::from_slice(&payload).ok()?;
    let expires = claims["exp"].as_f64()?;
    let now = UNIX_EPOCH.elapsed().ok()?.as_secs_f64();
    let lifetime = expires - now.max(claims["iat"].as_f64().unwrap_or(now));
    Some(if lifetime > 0.0 {
        Duration::try_from_secs_f64(lifetime).unwrap_or(Duration::MAX)
    } else {
        Duration::ZERO
    })
}

fn check_length(token: &str) -> Result<(), TokenError> {
    match token.len() {
        0 => Err(TokenError::Empty),
        1..=Token::MAX_LEN => Ok(()),
        _ => Err(TokenError::TooLong),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A source knows when its token expires, not for how long it lives.
    #[tokio::test]
    async fn expiry_is_a_point_in_time() {
        let hour = Duration::from_secs(3600);
        let at = SystemTime::now() + hour;
        let requested_at = std::time::Instant::now() - hour / 2;
        let token = Token::builder("abc").expires_at(at).requested_at(requested_at).build().unwrap();
        let differs_by = |token: &Token| match token.expires_at().unwrap().duration_since(at) {
            Ok(later) => later,
            Err(earlier) => earlier.duration(),
        };
        assert!(differs_by(&token) < Duration::from_secs(5), "{token:?}");
        let over = Token::builder("abc").expires_at(SystemTime::now() - hour).build().unwrap();
        assert!(over.is_expired(Instant::now()) && over.expires_at().unwrap() <= SystemTime::now());
        assert_eq!(Token::builder("abc").build().unwrap().expires_at(), None);

        // The claims of a JWT, whose issuer's clock may be ahead.
        let now = UNIX_EPOCH.elapsed().unwrap().as_secs();
        let jwt = |claims: String| format!("eyJhbGci.{}.c2ln", BASE64_URL_SAFE_NO_PAD.encode(claims));
        let ends = now + 3600;
        let of = |text: String| Token::builder(text).expires_by_jwt().build().unwrap();
        assert!(differs_by(&of(jwt(format!(r#"{{"exp":{ends}}}"#)))) < Duration::from_secs(5));
        let ahead = of(jwt(format!(r#"{{"exp":{},"iat":{}}}"#, ends + 1000, now + 1000)));
        assert!(differs_by(&ahead) < Duration::from_secs(5));
        assert!(of(jwt(r#"{"exp":1}"#.to_owned())).is_expired(Instant::now()));
        for none in ["abc", "a.b.c", &jwt(r#"{"exp":"soon"}"#.to_owned())] {
            let token = Token::builder(none).expires_in(hour).expires_by_jwt().build().unwrap();
            assert!(token.remaining().unwrap() > hour / 2, "{none}");
        }
    }

    fn error_of(access_token: &str) -> Option<TokenError> {
        Token::builder(access_token).build().err()
    }

    /// A token has characters that a header cannot have.
    #[test]
    fn token_must_be_visible_ascii() {
        // RFC 6749 appendix A.12, not the narrower b64token of RFC 6750 §2.1: Salesforce's tokens have a `!`.
        for good in [
            "a",
            "abc.DEF-_~+/09",
            "YWI=",
            "YQ==",
            "00Dxx0000001gPL!AR8AQP0j",
            "1|a",
            "a,b",
            "a\"b",
            "!",
            "~",
        ] {
            assert_eq!(error_of(good), None, "{good:?}");
        }
        for bad in ["a b", " a", "a ", "a\tb", "a\rb", "a\nb", "a\0b", "a\u{7f}", "é"] {
            assert_eq!(error_of(bad), Some(TokenError::IllegalCharacter), "{bad:?}");
        }
        assert_eq!(error_of(""), Some(TokenError::Empty));
        assert_eq!(error_of(&"a".repeat(Token::MAX_LEN)), None);
        assert_eq!(error_of(&"a".repeat(Token::MAX_LEN + 1)), Some(TokenError::TooLong));
        assert_eq!(Token::builder("a").refresh_token("").build().err(), Some(TokenError::Empty));
    }

    /// The header of a token is not marked sensitive, or is built for each request.
    #[test]
    fn the_header_is_sensitive_and_built_once() {
        let token = Token::builder("abc").build().unwrap();
        let header = token.header_value();
        assert_eq!(header, "Bearer abc");
        assert!(header.is_sensitive());
        assert_eq!(header.as_bytes().as_ptr(), token.header_value().as_bytes().as_ptr());
    }

    /// `expires_in` is huge.
    #[tokio::test(start_paused = true)]
    async fn an_absurd_lifetime_is_clamped() {
        let token = Token::builder("abc").expires_in(Duration::MAX).build().unwrap();
        assert_eq!(token.remaining(), Some(MAX_LIFETIME));
        tokio::time::advance(MAX_LIFETIME / 2).await;
        assert_eq!(token.remaining(), Some(MAX_LIFETIME / 2));
    }

    /// Tokens stay in memory after they were dropped. Checked by type, because a test cannot read freed memory.
    #[test]
    fn zeroizes_tokens_on_drop() {
        fn overwritten(_: &impl zeroize::ZeroizeOnDrop) {}

        let builder = Token::builder("abc").refresh_token("def");
        overwritten(&builder.access_token);
        overwritten(builder.build().unwrap().0.refresh_token.as_ref().unwrap());
    }

    /// The `Debug` output of a token contains it.
    #[test]
    fn debug_shows_no_secret() {
        let builder = Token::builder("canary-access").refresh_token("canary-refresh");
        let shown = format!("{builder:?}") + &format!("{:?}", builder.build().unwrap());
        assert!(!shown.contains("canary"), "{shown}");
    }
}
