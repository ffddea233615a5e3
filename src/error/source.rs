//! [`SourceError`]: why a token source returned no token. [`TokenError`]: why a text is no token.

use std::{borrow::Cow, error::Error as StdError, fmt, sync::Arc, time::Duration};

use secrecy::SecretString;

use crate::debug::debug_fields;

/// The boxed error of [`BearerAuth`](crate::BearerAuth), as tower's own middleware has it.
pub type BoxError = Box<dyn StdError + Send + Sync>;

/// The maximum length of a token in bytes.
pub(crate) const MAX_TOKEN_LEN: usize = 16 * 1024;

/// Why a [`TokenSource`](crate::TokenSource) could not return a token.
///
/// The [kind](Self::kind) decides what the provider does. It retries after a transient error, with backoff. After a
/// permanent one ([`Rejected`](SourceErrorKind::Rejected), [`LoginRequired`](SourceErrorKind::LoginRequired),
/// [`Configuration`](SourceErrorKind::Configuration)), callers without a token get the error at once, until the cool-down
/// ends or the credential is replaced.
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
    pub(crate) facts: Facts,
    message: Cow<'static, str>,
    retry_after: Option<Duration>,
    /// What the endpoint has granted in place of the refresh token.
    next_refresh_token: Option<SecretString>,
    pub(super) cause: Option<Arc<dyn StdError + Send + Sync>>,
}

/// What is known of the exchange with a token endpoint that has failed.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Facts {
    pub(crate) is_unsent: bool,
    pub(crate) is_connect: bool,
    pub(crate) is_timeout: bool,
    /// Whether the status of a response is the reason, and is one that says what became of the request.
    pub(crate) is_answer: bool,
    /// What became of a refresh token in the request. `None` if only the kind says it.
    pub(crate) fate: Option<Fate>,
}

/// What became of the refresh token in the request of a failed exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It may be spent: the endpoint may have processed the request.
    Unclear,
    /// It is not spent: the request was not sent, or not processed, or its client is rejected.
    Unspent,
    /// It is rejected, for a reason that is not known. It may work later.
    Doubtful,
    /// It does not work any more.
    Rejected,
}

/// The kind of a [`SourceError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SourceErrorKind {
    /// The credential was rejected (RFC 6749 §5.2 `invalid_grant`, `invalid_client`). Permanent until it is replaced.
    Rejected,
    /// The refresh token of a user's login was rejected: a user has to log in. Permanent until the provider gets the refresh
    /// token of the login ([`TokenProvider::log_in`](crate::TokenProvider::log_in)), or until a refresh token whose
    /// rejection is [doubtful](crate::TokenSource::fetch) works again.
    ///
    /// ```
    /// use tower_bearer::{BoxError, Error, SourceErrorKind};
    ///
    /// /// Whether a request failed because the user has to log in.
    /// fn needs_login(error: &BoxError) -> bool {
    ///     matches!(error.downcast_ref(), Some(Error::Source(error)) if error.kind() == SourceErrorKind::LoginRequired)
    /// }
    /// ```
    LoginRequired,
    /// The source's configuration is wrong, such as a URL without a token endpoint. Permanent until it is corrected.
    Configuration,
    /// The source could not be reached, timed out, or asked for a delay. Transient.
    Unavailable,
    /// The source responded with something that is not a valid token. Transient.
    InvalidResponse,
}

impl SourceErrorKind {
    /// Returns the name in events and metrics.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Rejected => "rejected",
            Self::LoginRequired => "login_required",
            Self::Configuration => "configuration",
            Self::Unavailable => "unavailable",
            Self::InvalidResponse => "invalid_response",
        }
    }
}

debug_fields!(SourceError |it| { kind: it.kind, message: it.message, cause: it.cause });

impl fmt::Display for SourceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl StdError for SourceError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        // The error itself, and not the pointer to it, which is an error of another type.
        Some(&**self.cause.as_ref()?)
    }
}

impl SourceError {
    /// Makes a permanent error: the credential was rejected.
    pub fn rejected(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(SourceErrorKind::Rejected, message)
    }

    /// Makes a permanent error: a user has to log in, because the source has no refresh token that works.
    pub fn login_required(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(SourceErrorKind::LoginRequired, message)
    }

    /// Makes a permanent error: the source's configuration is wrong. The message should say how to correct it.
    pub fn configuration(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(SourceErrorKind::Configuration, message)
    }

    /// Makes a transient error: the source cannot respond now.
    pub fn unavailable(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(SourceErrorKind::Unavailable, message)
    }

    /// Makes a transient error: the source's response has no valid token.
    ///
    /// The message must not quote the response, because it may contain a token.
    pub fn invalid_response(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(SourceErrorKind::InvalidResponse, message)
    }

    pub(crate) fn with_facts(self, facts: Facts) -> Self {
        Self { facts, ..self }
    }

    /// Puts `what` before the message.
    pub(crate) fn within(self, what: &str) -> Self {
        Self { message: format!("{what}: {}", self.message).into(), ..self }
    }

    pub(crate) fn new(kind: SourceErrorKind, message: impl Into<Cow<'static, str>>) -> Self {
        Self {
            kind,
            facts: Facts::default(),
            message: message.into(),
            retry_after: None,
            next_refresh_token: None,
            cause: None,
        }
    }

    /// Says that the refresh token in the request was rejected for good: nobody presents it again.
    ///
    /// Without this, the [kind](Self::kind) decides ([`TokenSource::fetch`](crate::TokenSource::fetch)).
    pub fn with_rejected_refresh_token(self) -> Self {
        self.with_fate(Fate::Rejected)
    }

    /// Says that the refresh token in the request is not spent: the request was not sent, or not processed, or its client
    /// was rejected.
    pub fn with_unspent_refresh_token(self) -> Self {
        self.with_fate(Fate::Unspent)
    }

    /// Says that the endpoint has granted this refresh token in place of the one in the request, beside an access token that
    /// cannot be used. The next exchange presents it. One that is not valid is ignored.
    pub fn with_next_refresh_token(mut self, refresh_token: impl Into<String>) -> Self {
        let refresh_token = refresh_token.into();
        let is_valid = (1..=MAX_TOKEN_LEN).contains(&refresh_token.len());
        self.next_refresh_token = is_valid.then(|| refresh_token.into());
        self
    }

    pub(crate) fn with_fate(mut self, fate: Fate) -> Self {
        self.facts.fate = Some(fate);
        self
    }

    /// What became of the refresh token in the request.
    pub(crate) fn fate(&self) -> Fate {
        let by_kind = match self.kind {
            _ if self.facts.is_unsent => Fate::Unspent,
            SourceErrorKind::Rejected => Fate::Doubtful,
            SourceErrorKind::LoginRequired => Fate::Rejected,
            SourceErrorKind::Configuration => Fate::Unspent,
            SourceErrorKind::Unavailable | SourceErrorKind::InvalidResponse => Fate::Unclear,
        };
        self.facts.fate.unwrap_or(by_kind)
    }

    pub(crate) fn take_next_refresh_token(&mut self) -> Option<SecretString> {
        self.next_refresh_token.take()
    }

    /// Returns the same error as one of another kind.
    pub(crate) fn of_kind(self, kind: SourceErrorKind) -> Self {
        Self { kind, ..self }
    }

    /// Sets the cause of the error, which is its [`source`](StdError::source). The message should not repeat the cause.
    pub fn with_cause(mut self, cause: impl Into<BoxError>) -> Self {
        self.cause = Some(Arc::from(cause.into()));
        self
    }

    /// Sets the delay that the source asked for (`Retry-After`, RFC 9110 §10.2.3).
    ///
    /// The provider waits at least this long before the next attempt, but at most a minute. After a permanent failure it
    /// waits at most this long, even if the [cool-down](crate::TokenProviderBuilder::cool_down) is longer, and at least for the
    /// shortest cool-down.
    pub fn with_retry_after(mut self, delay: Duration) -> Self {
        self.retry_after = Some(delay);
        self
    }

    /// Returns the kind of the error.
    pub fn kind(&self) -> SourceErrorKind {
        self.kind
    }

    /// Returns the delay that the source asked for, if any.
    pub fn retry_after(&self) -> Option<Duration> {
        self.retry_after
    }

    /// Whether a later retry may succeed without any change.
    pub fn is_transient(&self) -> bool {
        matches!(self.kind, SourceErrorKind::Unavailable | SourceErrorKind::InvalidResponse)
    }

    /// Whether the token endpoint did not respond in time. Only an exchange by [`TokenClient`](crate::TokenClient) sets
    /// it, as those of [`ApiVideo`](crate::ApiVideo) and [`OAuth2`](crate::OAuth2) are.
    pub fn is_timeout(&self) -> bool {
        self.facts.is_timeout
    }

    /// Whether no connection to the token endpoint could be made: its name, its port or TLS. Set as
    /// [`is_timeout`](Self::is_timeout) is; a connection that is not made in time is both.
    pub fn is_connect(&self) -> bool {
        self.facts.is_connect
    }

    /// Whether the request was certainly not sent, so that a refresh token in it is not spent. Set as
    /// [`is_timeout`](Self::is_timeout) is.
    pub fn is_unsent(&self) -> bool {
        self.facts.is_unsent
    }
}

/// Why a text is not a valid access token or refresh token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TokenError {
    /// The token is empty.
    #[error("the token is empty")]
    Empty,
    /// The token is longer than [`Token::MAX_LEN`](crate::Token::MAX_LEN) bytes.
    #[error("the token is longer than {MAX_TOKEN_LEN} bytes")]
    TooLong,
    /// The access token has a character other than visible ASCII (RFC 6749 appendix A.12).
    #[error("the access token has a character other than visible ASCII")]
    IllegalCharacter,
}

impl From<TokenError> for SourceError {
    fn from(error: TokenError) -> Self {
        Self::invalid_response(format!("the token source returned a token that is not valid: {error}"))
    }
}
