//! [`Token`]: an access token, its expiry, and the refresh token that renews it.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::HeaderValue;
use secrecy::{ExposeSecret, SecretString};
use tokio::time::Instant;

use crate::debug::debug_fields;
use crate::error::MAX_TOKEN_LEN;
use crate::refresh_ahead::RefreshAhead;

pub(crate) const SCHEME: &str = "Bearer ";

/// A token of a store that lives for less than this counts as expired. A lifetime that is less on arrival is unknown.
pub(crate) const LEAST_LIFE: Duration = Duration::from_millis(100);

/// An access token, its expiry, and the refresh token that renews it.
///
/// A token is an immutable handle that is cheap to clone. `Debug` shows neither the access token nor the refresh token.
///
/// ```
/// use std::time::Duration;
/// use tower_bearer::Token;
///
/// let token = Token::builder("eyJ0eXAi").refresh_token("def502").expires_in(Duration::from_secs(3600)).build()?;
/// assert_eq!(token.access_token(), "eyJ0eXAi");
/// assert!(!format!("{token:?}").contains("eyJ0eXAi"));
/// # Ok::<(), tower_bearer::TokenError>(())
/// ```
///
/// # Secrets in memory
///
/// The refresh token is overwritten when its last handle is dropped. The access token is not, because it is in an
/// [`http::HeaderValue`], which the HTTP stack copies.
#[derive(Clone)]
pub struct Token(pub(crate) Arc<Inner>);

#[derive(Clone)]
pub(crate) struct Inner {
    /// `Bearer <access token>`, marked sensitive. It is formatted once per token, not once per request.
    pub(crate) header: HeaderValue,
    pub(crate) refresh_token: Option<SecretString>,
    pub(crate) expires_at: Option<Instant>,
    /// When the refresh token expires, if it does. Known until the publication.
    pub(crate) refresh_token_expires_at: Option<Instant>,
    /// When the provider starts to fetch the next token in the background. It is never after `expires_at`. `None` until the
    /// publication.
    pub(crate) refresh_at: Option<Instant>,
    pub(crate) id: TokenId,
}

/// Identifies a published access token within the process. All zero before publication.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct TokenId {
    /// The number of the provider within the process.
    pub(crate) provider: u32,
    /// The number of the access token within its provider. At one token per second, it overflows after a century.
    pub(crate) generation: u32,
}

impl Inner {
    /// Whether the token is neither expiring nor expired. The clock is not read for a token without a lifetime.
    #[inline]
    pub(crate) fn is_fresh_now(&self) -> bool {
        self.refresh_at.is_none_or(|at| Instant::now() < at)
    }
}

impl Token {
    /// The maximum length of a token in bytes.
    pub const MAX_LEN: usize = MAX_TOKEN_LEN;

    /// Returns the access token (RFC 6749 §1.4), which is a secret.
    pub fn access_token(&self) -> &str {
        // The header was built from visible ASCII.
        self.0.header.to_str().ok().and_then(|value| value.strip_prefix(SCHEME)).unwrap_or_default()
    }

    /// Returns the refresh token (RFC 6749 §1.5), which is a secret, if the source returned one.
    pub fn refresh_token(&self) -> Option<&str> {
        self.0.refresh_token.as_ref().map(|token| token.expose_secret())
    }

    /// Returns the value for an `Authorization` header: `Bearer <access token>`, marked sensitive (RFC 6750 §2.1).
    pub fn header_value(&self) -> HeaderValue {
        self.0.header.clone()
    }

    /// Returns the remaining lifetime: zero if the token has expired, `None` if the source stated no lifetime.
    pub fn remaining(&self) -> Option<Duration> {
        self.0.expires_at.map(|at| at.saturating_duration_since(Instant::now()))
    }

    /// Returns when the token expires, by the system's clock. `None` if the source stated no lifetime, or one that was over
    /// when the provider got the token.
    ///
    /// It is computed from the remaining lifetime: two calls differ by as much as the two clocks do.
    pub fn expires_at(&self) -> Option<SystemTime> {
        let (at, now) = (self.0.expires_at?, Instant::now());
        let left = SystemTime::now().checked_add(at.saturating_duration_since(now))?;
        left.checked_sub(now.saturating_duration_since(at))
    }

    /// Returns the number of the token within its provider, counted from 1. It is 0 until a provider has published the
    /// token.
    pub fn generation(&self) -> u64 {
        self.0.id.generation.into()
    }

    pub(crate) fn is_fresh(&self, now: Instant) -> bool {
        self.0.refresh_at.is_none_or(|at| now < at)
    }

    pub(crate) fn is_expired(&self, now: Instant) -> bool {
        self.0.expires_at.is_some_and(|at| at <= now)
    }

    #[inline]
    pub(crate) fn header(&self) -> &HeaderValue {
        &self.0.header
    }

    #[inline]
    pub(crate) fn id(&self) -> TokenId {
        self.0.id
    }

    pub(crate) fn ends_at(&self) -> Option<Instant> {
        self.0.expires_at
    }

    pub(crate) fn refresh_at(&self) -> Option<Instant> {
        self.0.refresh_at
    }

    pub(crate) fn refresh_token_expires_at(&self) -> Option<Instant> {
        self.0.refresh_token_expires_at
    }

    pub(crate) fn without_refresh_token(self) -> Self {
        let inner = Arc::unwrap_or_clone(self.0);
        Self(Arc::new(Inner { refresh_token: None, refresh_token_expires_at: None, ..inner }))
    }

    /// Returns the token with this refresh token, which was kept.
    pub(crate) fn with_refresh_token(self, refresh_token: SecretString) -> Self {
        Self(Arc::new(Inner { refresh_token: Some(refresh_token), ..Arc::unwrap_or_clone(self.0) }))
    }

    /// Returns the token with a refresh token that is not accepted after this.
    pub(crate) fn renewable_until(self, at: Instant) -> Self {
        let inner = Arc::unwrap_or_clone(self.0);
        let at = inner.refresh_token_expires_at.map_or(at, |before| before.min(at));
        Self(Arc::new(Inner { refresh_token_expires_at: Some(at), ..inner }))
    }

    /// Whether both have the same access token. The lifetime and the refresh token may differ.
    pub(crate) fn has_same_access_token(&self, other: &Self) -> bool {
        self.0.header == other.0.header
    }

    /// Returns the token as a provider publishes it, which asked for it at `asked_at`.
    ///
    /// A lifetime is a hint: one that is over on arrival is unknown, and the token is used until it is challenged.
    pub(crate) fn published(
        self,
        id: TokenId,
        asked_at: Instant,
        ahead: &RefreshAhead,
        now: Instant,
    ) -> Self {
        let left = |at: Instant| at.saturating_duration_since(now);
        let known = |at: Option<Instant>| at.filter(|at| left(*at) >= LEAST_LIFE);
        let expires_at = known(self.0.expires_at);
        let ends = [expires_at, known(self.0.refresh_token_expires_at)];
        let took = now.saturating_duration_since(asked_at);
        // At most ten refreshes in a second, however short the lives are.
        let at = |end| ahead.refresh_at(now, left(end), took).max(now + LEAST_LIFE);
        let refresh_at = ends.into_iter().flatten().min().map(at);
        let inner = Arc::unwrap_or_clone(self.0);
        Self(Arc::new(Inner { id, expires_at, refresh_at, refresh_token_expires_at: None, ..inner }))
    }

    /// Returns the token as one that is expiring.
    pub(crate) fn expiring(self, now: Instant) -> Self {
        Self(Arc::new(Inner { refresh_at: Some(now), ..Arc::unwrap_or_clone(self.0) }))
    }
}

debug_fields!(Token |it| {
    generation: it.0.id.generation,
    remaining: it.remaining(),
    has_refresh_token: it.0.refresh_token.is_some()
});
