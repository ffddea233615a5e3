//! [`TokenRequest`]: what the provider passes to a source when it asks for a token.

use std::{
    borrow::Cow,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
};

use crate::{challenge::Challenge, token::Token};

/// Why a [`TokenProvider`](crate::TokenProvider) asks its source for a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[repr(u8)]
pub enum RefreshReason {
    /// There is no token.
    Missing,
    /// The current token has expired.
    Expired,
    /// The current token is about to expire ([`RefreshAhead`](crate::RefreshAhead)). No request waits.
    Expiring,
    /// The API has challenged the current token.
    Challenged,
}

impl RefreshReason {
    /// Returns the name in events and metrics.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Expired => "expired",
            Self::Expiring => "expiring",
            Self::Challenged => "challenged",
        }
    }
}

/// What the provider passes to a [`TokenSource`](crate::TokenSource): the token to replace, and the reason.
///
/// The provider makes one for each refresh. Tests of a source can make one with [`new`](Self::new):
///
/// ```
/// use tower_bearer::{RefreshReason, SourceError, StaticToken, TokenRequest, TokenSource};
///
/// # async fn run() -> Result<(), SourceError> {
/// let source = StaticToken::new("eyJ0eXAi");
/// let token = source.fetch(&TokenRequest::new(RefreshReason::Missing)).await?;
/// assert_eq!(token.access_token(), "eyJ0eXAi");
/// # Ok(())
/// # }
/// # tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(run()).unwrap();
/// ```
#[derive(Clone)]
pub struct TokenRequest<'a> {
    previous: Option<Cow<'a, Token>>,
    reason: CurrentReason,
    challenge: Option<Cow<'a, Challenge>>,
}

impl<'a> TokenRequest<'a> {
    /// Makes a request without a previous token and without a challenge.
    pub fn new(reason: RefreshReason) -> Self {
        Self { previous: None, reason: CurrentReason::new(reason), challenge: None }
    }

    /// Sets the token that the provider published last. Default: none.
    pub fn with_previous(mut self, previous: Token) -> Self {
        self.previous = Some(Cow::Owned(previous));
        self
    }

    /// Sets the challenge that started the refresh. Default: none.
    pub fn with_challenge(mut self, challenge: Challenge) -> Self {
        self.challenge = Some(Cow::Owned(challenge));
        self
    }

    /// Makes the request of a refresh, whose reason may change while it runs.
    pub(crate) fn of(
        previous: Option<&'a Token>,
        reason: &CurrentReason,
        challenge: Option<&'a Challenge>,
    ) -> Self {
        Self {
            previous: previous.map(Cow::Borrowed),
            reason: reason.clone(),
            challenge: challenge.map(Cow::Borrowed),
        }
    }

    /// Returns the same request with another previous token.
    #[cfg(feature = "store")]
    pub(crate) fn replacing<'b>(&'b self, previous: Option<&'b Token>) -> TokenRequest<'b> {
        TokenRequest::of(previous, &self.reason, self.challenge())
    }

    /// Returns the token that the provider published last, which may be expired, challenged or still valid. `None`
    /// before the first token.
    ///
    /// The call that gets this request may spend its [refresh token](Token::refresh_token), if it has one.
    pub fn previous(&self) -> Option<&Token> {
        self.previous.as_deref()
    }

    /// Returns why the token is needed.
    ///
    /// [`Expiring`](RefreshReason::Expiring) becomes another reason if a caller that cannot use the current token joins
    /// the refresh while the source works.
    pub fn reason(&self) -> RefreshReason {
        self.reason.get()
    }

    /// Returns the parameters of the `WWW-Authenticate` header that started the refresh (RFC 6750 §3, RFC 9470).
    ///
    /// `None` if no challenge started the refresh, or if the challenge had no Bearer parameters. A caller that joins
    /// the refresh does not change them.
    pub fn challenge(&self) -> Option<&Challenge> {
        self.challenge.as_deref()
    }

    /// Returns the same request without a borrow.
    pub fn into_owned(self) -> TokenRequest<'static> {
        TokenRequest {
            previous: self.previous.map(|token| Cow::Owned(token.into_owned())),
            reason: self.reason,
            challenge: self.challenge.map(|challenge| Cow::Owned(challenge.into_owned())),
        }
    }
}

impl fmt::Debug for TokenRequest<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenRequest")
            .field("previous", &self.previous())
            .field("reason", &self.reason())
            .field("challenge", &self.challenge())
            .finish()
    }
}

/// The reason for a refresh that is running. Clones share it.
#[derive(Clone)]
pub(crate) struct CurrentReason(Arc<AtomicU8>);

impl CurrentReason {
    pub(crate) fn new(reason: RefreshReason) -> Self {
        Self(Arc::new(AtomicU8::new(reason as u8)))
    }

    pub(crate) fn get(&self) -> RefreshReason {
        match self.0.load(Ordering::Relaxed) {
            0 => RefreshReason::Missing,
            1 => RefreshReason::Expired,
            2 => RefreshReason::Expiring,
            _ => RefreshReason::Challenged,
        }
    }

    /// Records that a caller with this reason joined the refresh. It replaces [`RefreshReason::Expiring`] only.
    ///
    /// Relaxed ordering is enough, because no other memory is published through the flag.
    pub(crate) fn raise(&self, reason: RefreshReason) {
        let expiring = RefreshReason::Expiring as u8;
        let _ = self.0.compare_exchange(expiring, reason as u8, Ordering::Relaxed, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_expiring_reason_is_raised() {
        use RefreshReason::{Challenged, Expired, Expiring, Missing};

        for reason in [Missing, Expired, Expiring, Challenged] {
            assert_eq!(CurrentReason::new(reason).get(), reason);
        }
        let request = TokenRequest::new(Expiring);
        request.reason.raise(Challenged);
        request.reason.raise(Missing);
        assert_eq!(request.clone().into_owned().reason(), Challenged);
    }
}
