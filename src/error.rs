//! The errors of each boundary: [`Error`] for callers, [`SourceError`] for token sources,
//! [`TokenError`] for tokens. `StoreError` is in `store/error.rs`.
//!
//! No variant ever holds a token, a key, or a byte of an answer's body. Every error is `Clone`, because everyone who
//! waits for one refresh gets the same one.

use std::{borrow::Cow, error::Error as StdError, fmt, sync::Arc, time::Duration};

/// The boxed error that [`BearerAuth`](crate::BearerAuth) answers with; tower's own convention.
pub type BoxError = Box<dyn StdError + Send + Sync>;

/// Why a request could not be sent with a token.
///
/// A 401 is not among these: it is an answer of the API, and reaches the caller as one.
///
/// [`BearerAuth`](crate::BearerAuth) boxes its errors together with those of the inner service; a
/// `downcast_ref::<tower_bearer::Error>()` tells them apart.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The token source gave no token. [`SourceError`] says why, and whether to try again.
    #[error("no access token could be obtained")]
    Source(#[from] SourceError),

    /// A whole refresh did not end in time, and no attempt of it had failed before: that failure would be told instead.
    ///
    /// The limit is [`TokenProviderBuilder::refresh_timeout`](crate::TokenProviderBuilder::refresh_timeout).
    #[error("no access token was obtained within {0:?}")]
    TimedOut(Duration),

    /// The refresh ended without a result: its token source panicked, or its runtime was shut down.
    ///
    /// The next caller starts a new refresh.
    #[error("the token refresh was interrupted: its source panicked or its runtime was shut down")]
    Interrupted,

    /// A token was asked for outside of a tokio runtime, so that no refresh could start.
    #[error("a token can only be obtained within a tokio runtime: enter one before the first request")]
    NoRuntime,

    /// The provider was shut down ([`TokenProvider::shutdown`](crate::TokenProvider::shutdown)), and has no token left
    /// that works.
    #[error("the token provider was shut down")]
    ShutDown,

    /// The request already has as many headers as fit, so that none is left for the token.
    #[error("the request has too many headers to add an Authorization header")]
    TooManyHeaders,

    /// An option is out of its range. The text says which, and what would be in it.
    #[error("invalid option: {0}")]
    InvalidOption(Cow<'static, str>),
}

impl Error {
    /// Whether trying again later, with nothing changed, may succeed.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Source(error) => error.is_transient(),
            Self::TimedOut(_) | Self::Interrupted => true,
            Self::NoRuntime | Self::ShutDown | Self::TooManyHeaders | Self::InvalidOption(_) => false,
        }
    }
}

/// Why a [`TokenSource`](crate::TokenSource) could not give a token.
///
/// The kind decides what the provider does: a transient error is tried again with backoff; a permanent one
/// ([`Rejected`](SourceErrorKind::Rejected), [`Configuration`](SourceErrorKind::Configuration)) is told to every caller
/// at once until a cool-down has passed.
///
/// ```
/// use std::time::Duration;
/// use tower_bearer::SourceError;
///
/// let error = SourceError::unavailable("the vault is sealed").with_retry_after(Duration::from_secs(5));
/// assert!(error.is_transient());
/// assert_eq!(error.to_string(), "the vault is sealed");
/// ```
#[derive(Clone)]
pub struct SourceError {
    kind: SourceErrorKind,
    message: Cow<'static, str>,
    retry_after: Option<Duration>,
    cause: Option<Arc<dyn StdError + Send + Sync>>,
}

/// What sort of failure a [`SourceError`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SourceErrorKind {
    /// The credential was refused (RFC 6749 §5.2 `invalid_grant`, `invalid_client`): permanent until it is replaced.
    Rejected,
    /// The source is set up wrongly, such as a URL that has no token endpoint: permanent until it is mended.
    Configuration,
    /// The source could not be reached, was too slow, or asked to come back later: transient.
    Unavailable,
    /// The source answered with something that is not a usable token: transient.
    InvalidResponse,
}

impl SourceErrorKind {
    /// As events and metrics show it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Rejected => "rejected",
            Self::Configuration => "configuration",
            Self::Unavailable => "unavailable",
            Self::InvalidResponse => "invalid_response",
        }
    }
}

impl SourceError {
    /// The credential was refused: a permanent error.
    pub fn rejected(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(SourceErrorKind::Rejected, message)
    }

    /// The source is set up wrongly: a permanent error. The message should say what to do about it.
    pub fn configuration(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(SourceErrorKind::Configuration, message)
    }

    /// The source cannot answer now: a transient error.
    pub fn unavailable(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(SourceErrorKind::Unavailable, message)
    }

    /// The source's answer holds no usable token: a transient error.
    ///
    /// The message must not quote the answer: it may hold a token.
    pub fn invalid_response(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(SourceErrorKind::InvalidResponse, message)
    }

    fn new(kind: SourceErrorKind, message: impl Into<Cow<'static, str>>) -> Self {
        Self { kind, message: message.into(), retry_after: None, cause: None }
    }

    /// Adds the error beneath this one, as its [`source`](StdError::source).
    pub fn with_cause(mut self, cause: impl Into<BoxError>) -> Self {
        self.cause = Some(Arc::from(cause.into()));
        self
    }

    /// Adds how long the source asked to be left alone (RFC 9110 §10.2.3).
    ///
    /// The provider waits at least this long before it tries again, up to a minute.
    pub fn with_retry_after(mut self, delay: Duration) -> Self {
        self.retry_after = Some(delay);
        self
    }

    /// What sort of failure this is.
    pub fn kind(&self) -> SourceErrorKind {
        self.kind
    }

    /// How long the source asked to be left alone, if it did.
    pub fn retry_after(&self) -> Option<Duration> {
        self.retry_after
    }

    /// Whether trying again later, with nothing changed, may succeed.
    pub fn is_transient(&self) -> bool {
        matches!(self.kind, SourceErrorKind::Unavailable | SourceErrorKind::InvalidResponse)
    }
}

impl fmt::Debug for SourceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SourceError")
            .field("kind", &self.kind)
            .field("message", &self.message)
            .field("retry_after", &self.retry_after)
            .field("cause", &self.cause)
            .finish()
    }
}

impl fmt::Display for SourceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl StdError for SourceError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.cause.as_deref().map(|cause| cause as &(dyn StdError + 'static))
    }
}

/// Why a text is not an access token or a refresh token that may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TokenError {
    /// The token is empty.
    #[error("the token is empty")]
    Empty,
    /// The token is longer than [`Token::MAX_LEN`](crate::Token::MAX_LEN) bytes.
    #[error("the token is longer than {} bytes", crate::Token::MAX_LEN)]
    TooLong,
    /// The access token has a character outside of RFC 6750 §2.1's `b64token`.
    #[error("the access token has a character that RFC 6750 section 2.1 does not allow")]
    IllegalCharacter,
}

impl From<TokenError> for SourceError {
    fn from(error: TokenError) -> Self {
        Self::invalid_response("the token source gave a token that cannot be used").with_cause(error)
    }
}
