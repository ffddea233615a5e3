//! [`TokenRequest`]: what the provider passes to a source when it asks for a token.

use std::borrow::Cow;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use secrecy::{ExposeSecret, SecretString};

use super::client::Sent;
use crate::{challenge::Challenge, token::Token};

/// Why a [`TokenProvider`](crate::TokenProvider) asks its source for a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RefreshReason {
    /// There is no token.
    Missing,
    /// The current token has expired, or is not valid for as long as a caller needs
    /// ([`TokenProvider::token_for`](crate::TokenProvider::token_for)).
    Expired,
    /// The current token is about to expire ([`RefreshAhead`](crate::RefreshAhead)), its refresh was interrupted, or
    /// another process has presented the login's refresh token and has stored no answer.
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

/// What the provider passes to a [`TokenSource`](crate::TokenSource): the refresh token to present, the token to replace,
/// and the reason.
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
#[derive(Clone, Debug)]
pub struct TokenRequest<'a> {
    refresh_token: Option<Cow<'a, SecretString>>,
    previous: Option<Cow<'a, Token>>,
    reason: CurrentReason,
    challenge: Option<Cow<'a, Challenge>>,
    /// Whether the refresh token may have been sent.
    pub(super) sent: Sent,
}

impl<'a> TokenRequest<'a> {
    /// Makes a request without a previous token and without a challenge.
    pub fn new(reason: RefreshReason) -> Self {
        Self::of(None, &CurrentReason::new(reason, true), None)
    }

    /// Sets the refresh token to present. Default: none, so that the source uses its credential.
    pub fn with_refresh_token(mut self, refresh_token: impl Into<String>) -> Self {
        self.refresh_token = Some(Cow::Owned(refresh_token.into().into()));
        self
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
            refresh_token: None,
            previous: previous.map(Cow::Borrowed),
            reason: reason.clone(),
            challenge: challenge.map(Cow::Borrowed),
            sent: Sent::default(),
        }
    }

    /// Returns the same request with this refresh token, or without one. `sent` tells whether it may have been sent.
    pub(crate) fn presenting<'b>(
        &'b self,
        refresh_token: Option<&'b SecretString>,
        sent: &Sent,
    ) -> TokenRequest<'b> {
        let request = TokenRequest::of(self.previous(), &self.reason, self.challenge());
        TokenRequest { refresh_token: refresh_token.map(Cow::Borrowed), sent: sent.clone(), ..request }
    }

    /// Returns the refresh token to present, which is a secret: present this and nothing else. `None` if the source has to
    /// use its credential.
    pub fn refresh_token(&self) -> Option<&str> {
        self.refresh_token.as_ref().map(|refresh_token| refresh_token.expose_secret())
    }

    /// Returns the token that the provider published last, which may be expired, challenged or still valid. `None`
    /// before the first token. Its refresh token may be spent: [`refresh_token`](Self::refresh_token) has the one to present.
    pub fn previous(&self) -> Option<&Token> {
        self.previous.as_deref()
    }

    /// Returns why the token is needed.
    ///
    /// The value may change during the call, also in a clone: from [`Expiring`](RefreshReason::Expiring) to another
    /// reason, when a caller that cannot use the current token joins the refresh. Read it where you need it.
    pub fn reason(&self) -> RefreshReason {
        self.reason.get()
    }

    /// Whether a caller needs the token, rather than the background.
    pub(crate) fn is_needed(&self) -> bool {
        self.reason.is_needed()
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
            refresh_token: self.refresh_token.map(|refresh_token| Cow::Owned(refresh_token.into_owned())),
            previous: self.previous.map(|token| Cow::Owned(token.into_owned())),
            reason: self.reason,
            challenge: self.challenge.map(|challenge| Cow::Owned(challenge.into_owned())),
            sent: self.sent,
        }
    }
}

/// Why a running refresh is needed, and whether a caller needs the token, rather than the background. Clones share it.
#[derive(Clone)]
pub(crate) struct CurrentReason(Arc<Mutex<(RefreshReason, bool)>>);

impl fmt::Debug for CurrentReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.get().fmt(f)
    }
}

impl CurrentReason {
    pub(crate) fn new(reason: RefreshReason, is_needed: bool) -> Self {
        Self(Arc::new(Mutex::new((reason, is_needed))))
    }

    fn current(&self) -> MutexGuard<'_, (RefreshReason, bool)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn get(&self) -> RefreshReason {
        self.current().0
    }

    pub(crate) fn is_needed(&self) -> bool {
        self.current().1
    }

    /// A caller that needs the token for this reason joins the refresh. If no caller needed it before, the caller's reason
    /// replaces that of the background.
    pub(crate) fn raise(&self, reason: RefreshReason) {
        let mut current = self.current();
        if !current.1 {
            *current = (reason, true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A caller joins a refresh that had a less urgent reason.
    #[test]
    fn first_caller_raises_reason() {
        use RefreshReason::{Challenged, Expired, Expiring, Missing};

        for (reason, is_needed) in [(Missing, true), (Expired, false), (Expiring, false), (Challenged, true)]
        {
            let current = CurrentReason::new(reason, is_needed);
            assert_eq!((current.get(), current.is_needed()), (reason, is_needed));
        }
        let reason = CurrentReason::new(Expiring, false);
        let request = TokenRequest::of(None, &reason, None);
        assert!(!request.is_needed());
        reason.raise(Challenged);
        reason.raise(Missing);
        assert_eq!((request.clone().into_owned().reason(), request.is_needed()), (Challenged, true));
    }
}
