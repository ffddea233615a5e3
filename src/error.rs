//! The errors of each boundary: [`Error`] for callers, [`SourceError`] for token sources, `StoreError` for stores,
//! [`TokenError`] for tokens.
//!
//! No error contains a token, a key, or a byte of a response body. Every error is `Clone`, because all callers that
//! wait for one refresh get the same one.

use std::{borrow::Cow, error::Error as StdError, fmt, sync::Arc, time::Duration};

use http::HeaderMap;
use secrecy::SecretString;

/// The boxed error of [`BearerAuth`](crate::BearerAuth), as tower's own middleware has it.
pub type BoxError = Box<dyn StdError + Send + Sync>;

/// Why a request could not be sent with a token.
///
/// A 401 is not an error. It is a response of the API, and the caller gets it as one.
///
/// [`BearerAuth`](crate::BearerAuth) returns a boxed error, which is this one or the inner service's. To distinguish
/// them, use `downcast_ref::<tower_bearer::Error>()`.
///
/// The text of each variant has the reason, and never a secret: a gateway may show it.
///
/// ```
/// use tower_bearer::{Error, SourceError};
///
/// let error = Error::from(SourceError::unavailable("the vault is sealed").with_cause("HTTP 503"));
/// assert_eq!(error.to_string(), "no access token could be obtained: the vault is sealed");
/// assert_eq!(std::error::Error::source(&error).unwrap().to_string(), "HTTP 503");
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Error {
    /// The token source returned no token, or is set up wrongly. [`SourceError`] has the reason, and whether a retry may
    /// succeed.
    ///
    /// The text includes the message of the [`SourceError`]. The [`source`](StdError::source) is therefore its cause,
    /// so that a chain of sources shows each message once.
    Source(SourceError),

    /// The store that processes share cannot be used. Only [`TokenProvider::ready`](crate::TokenProvider::ready) returns
    /// it: a request needs a token, not the store. If the store fails for a user's
    /// [login](crate::TokenProviderBuilder::login), the error of a request is a [`Source`](Self::Source).
    ///
    /// The text includes the message of the [`StoreError`], whose cause is the [`source`](StdError::source).
    Store(StoreError),

    /// The refresh timed out before any of its attempts had failed. After a failed attempt, the error is that of the
    /// attempt.
    ///
    /// The limit is [`TokenProviderBuilder::refresh_timeout`](crate::TokenProviderBuilder::refresh_timeout).
    TimedOut(Duration),

    /// The refresh ended without a result, because its token source panicked or its runtime was shut down.
    ///
    /// The next caller starts a new refresh. If the provider's
    /// [`runtime`](crate::TokenProviderBuilder::runtime) has ended, that is interrupted as well.
    Interrupted,

    /// No refresh could start, because the caller was outside of a tokio runtime, and the provider has no
    /// [`runtime`](crate::TokenProviderBuilder::runtime) of refreshes.
    NoRuntime,

    /// The provider was shut down ([`TokenProvider::shutdown`](crate::TokenProvider::shutdown)), and has no valid token
    /// left.
    ShutDown,

    /// The API challenged the token, no other could be obtained, and the 401 was dropped meanwhile: one of unknown length,
    /// or a large one, is kept for a second at most ([`BearerAuth`](crate::BearerAuth#permits)), since the token request may
    /// need its connection. With the reason why there is no other token; `None` if there is one, and the body turned out not
    /// to be one that can be sent again.
    ///
    /// The text includes that error's, whose cause is the [`source`](StdError::source).
    ChallengeDropped(Option<Arc<Self>>),

    /// The request has the maximum number of headers, so that the `Authorization` header cannot be added.
    TooManyHeaders,

    /// The request has no key that selects its token provider ([`BearerAuthLayer::by_key`]).
    ///
    /// [`BearerAuthLayer::by_key`]: crate::BearerAuthLayer::by_key
    MissingKey,

    /// The factory of [`TokenProviders`](crate::TokenProviders) returned this error: there is no token provider for the
    /// request's key.
    ///
    /// The text includes the factory's error, whose cause is the [`source`](StdError::source). Use `downcast_ref` for its
    /// type.
    Factory(Arc<dyn StdError + Send + Sync>),

    /// An option is out of its range. The text has the option, the accepted values, and the value unless it is a
    /// secret.
    InvalidOption(Cow<'static, str>),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Source(error) if error.kind() == SourceErrorKind::Configuration => {
                write!(f, "the token source is set up wrongly: {error}")
            }
            Self::Source(error) => write!(f, "no access token could be obtained: {error}"),
            Self::Store(error) => write!(f, "the token store cannot be used: {error}"),
            Self::TimedOut(limit) => write!(f, "no access token was obtained within {limit:?}"),
            Self::Interrupted => f.write_str(
                "the token refresh was interrupted: its source panicked or its runtime was shut down",
            ),
            Self::NoRuntime => f.write_str(
                "a token can only be obtained within a tokio runtime: enter one before the first request",
            ),
            Self::ShutDown => f.write_str("the token provider was shut down"),
            Self::ChallengeDropped(cause) => {
                f.write_str(
                    "the API challenged the token, and its response could not be kept during the refresh",
                )?;
                cause.as_ref().map_or(Ok(()), |cause| write!(f, ": {cause}"))
            }
            Self::TooManyHeaders => {
                f.write_str("the request has too many headers to add an Authorization header")
            }
            Self::MissingKey => f.write_str("the request has no key that selects its token provider"),
            Self::Factory(error) => {
                write!(f, "no token provider could be made for the request's key: {error}")
            }
            Self::InvalidOption(text) => write!(f, "invalid option: {text}"),
        }
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match self {
            // Its message is part of this error's text.
            Self::Source(error) => error.source(),
            Self::Store(error) => error.source(),
            Self::Factory(error) => error.source(),
            Self::ChallengeDropped(Some(error)) => error.source(),
            _ => None,
        }
    }
}

impl From<SourceError> for Error {
    fn from(error: SourceError) -> Self {
        Self::Source(error)
    }
}

impl Error {
    /// Says which option is out of its range, what is accepted, and the value.
    pub(crate) fn out_of_range(option: &str, accepted: &str, value: impl fmt::Display) -> Self {
        Self::InvalidOption(format!("{option} must be {accepted}, got {value}").into())
    }

    /// Whether a later retry may succeed without any change.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Source(error) => error.is_transient(),
            Self::Store(error) => error.is_transient(),
            Self::TimedOut(_) | Self::Interrupted | Self::ChallengeDropped(None) => true,
            Self::ChallengeDropped(Some(error)) => error.is_transient(),
            Self::NoRuntime | Self::ShutDown | Self::TooManyHeaders | Self::InvalidOption(_) => false,
            Self::MissingKey | Self::Factory(_) => false,
        }
    }

    /// Whether a response is why the configuration counts as wrong. The server may be starting.
    pub(crate) fn is_misplaced(&self) -> bool {
        matches!(self, Self::Source(error) if error.facts.is_answer && error.kind == SourceErrorKind::Configuration)
    }

    /// Whether the token endpoint did not respond in time ([`SourceError::is_timeout`]), or the refresh timed out before that
    /// was known.
    pub fn is_timeout(&self) -> bool {
        match self {
            Self::Source(error) => error.is_timeout(),
            Self::ChallengeDropped(Some(error)) => error.is_timeout(),
            Self::TimedOut(_) => true,
            _ => false,
        }
    }

    /// Whether no connection to the token endpoint could be made ([`SourceError::is_connect`]).
    pub fn is_connect(&self) -> bool {
        match self {
            Self::Source(error) => error.is_connect(),
            Self::ChallengeDropped(Some(error)) => error.is_connect(),
            _ => false,
        }
    }

    /// Returns the name in events and metrics.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Source(error) => error.kind().name(),
            Self::Store(_) => "store",
            Self::TimedOut(_) => "timed_out",
            Self::Interrupted => "interrupted",
            Self::NoRuntime => "no_runtime",
            Self::ShutDown => "shut_down",
            Self::ChallengeDropped(_) => "challenge_dropped",
            Self::TooManyHeaders => "too_many_headers",
            Self::MissingKey => "missing_key",
            Self::Factory(_) => "factory",
            Self::InvalidOption(_) => "invalid_option",
        }
    }
}

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
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct SourceError {
    kind: SourceErrorKind,
    pub(crate) facts: Facts,
    message: Cow<'static, str>,
    retry_after: Option<Duration>,
    /// What the endpoint has granted in place of the refresh token.
    next_refresh_token: Option<SecretString>,
    #[source]
    cause: Option<Arc<dyn StdError + Send + Sync>>,
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
    pub(crate) presented: Option<Presented>,
}

/// What became of the refresh token in the request of a failed exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Presented {
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
        self.with_presented(Presented::Rejected)
    }

    /// Says that the refresh token in the request is not spent: the request was not sent, or not processed, or its client
    /// was rejected.
    pub fn with_unspent_refresh_token(self) -> Self {
        self.with_presented(Presented::Unspent)
    }

    /// Says that the endpoint has granted this refresh token in place of the one in the request, beside an access token that
    /// cannot be used. The next exchange presents it. One that is not valid is ignored.
    pub fn with_next_refresh_token(mut self, refresh_token: impl Into<String>) -> Self {
        let refresh_token = refresh_token.into();
        let is_valid = (1..=crate::Token::MAX_LEN).contains(&refresh_token.len());
        self.next_refresh_token = is_valid.then(|| refresh_token.into());
        self
    }

    pub(crate) fn with_presented(mut self, presented: Presented) -> Self {
        self.facts.presented = Some(presented);
        self
    }

    /// What became of the refresh token in the request.
    pub(crate) fn presented(&self) -> Presented {
        let by_kind = match self.kind {
            _ if self.facts.is_unsent => Presented::Unspent,
            SourceErrorKind::Rejected => Presented::Doubtful,
            SourceErrorKind::LoginRequired => Presented::Rejected,
            SourceErrorKind::Configuration => Presented::Unspent,
            SourceErrorKind::Unavailable | SourceErrorKind::InvalidResponse => Presented::Unclear,
        };
        self.facts.presented.unwrap_or(by_kind)
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

/// Returns the content type as an error shows it: only one that is known, because the header may quote the request.
pub(crate) fn content_type(headers: &HeaderMap) -> &'static str {
    const KNOWN: [&str; 9] = [
        "application/json",
        "application/problem+json",
        "application/x-www-form-urlencoded",
        "application/xhtml+xml",
        "application/xml",
        "text/html",
        "text/json",
        "text/plain",
        "text/xml",
    ];

    let Some(value) = headers.get(http::header::CONTENT_TYPE) else { return "no content type" };
    let essence = value.to_str().unwrap_or_default().split(';').next().unwrap_or_default().trim();
    let known = KNOWN.into_iter().find(|known| essence.eq_ignore_ascii_case(known));
    known.unwrap_or("another content type")
}

/// Whether the content type is that of a page, such as a firewall's.
pub(crate) fn is_page(headers: &HeaderMap) -> bool {
    let content_type = content_type(headers);
    content_type.ends_with("ml") || content_type == "text/plain"
}

/// Why a [`TokenStore`](crate::store::TokenStore) could not do an operation.
///
/// A member or a publisher refreshes without the store, unless it has a user's
/// [login](crate::TokenProviderBuilder::login), and uses it again at the next refresh. A reader has no other source: its
/// callers get [`Error::Source`](crate::Error::Source) with this error's text. A provider reports the error in
/// [`Status::store`](crate::Status#structfield.store), as an event and by a metric
/// ([`observability`](crate::observability)). [`TokenProvider::ready`](crate::TokenProvider::ready) returns it.
///
/// ```
/// use tower_bearer::store::{StoreError, StoreErrorKind};
///
/// let error = StoreError::unavailable("the database is read-only");
/// assert_eq!(error.kind(), StoreErrorKind::Unavailable);
/// assert_eq!(error.to_string(), "the database is read-only");
/// ```
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct StoreError {
    kind: StoreErrorKind,
    message: Cow<'static, str>,
    #[source]
    cause: Option<Arc<dyn StdError + Send + Sync>>,
}

/// The kind of a [`StoreError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StoreErrorKind {
    /// The store cannot be reached, is too slow, cannot be written, or is not the expected kind of store.
    Unavailable,
    /// The store is set up wrongly: the password is wrong, or a right is missing. Permanent until that is corrected.
    Configuration,
    /// Other users could read or change the stored data, so the store does not use it.
    Insecure,
    /// There is a record, but it cannot be read: it is too long, has an unknown schema, or is encrypted with another
    /// key. The record counts as absent and the next one replaces it, unless the provider has a user's
    /// [login](crate::TokenProviderBuilder::login): then the store fails until somebody corrects or deletes it.
    InvalidRecord,
}

impl StoreError {
    /// Creates an error of kind [`Unavailable`](StoreErrorKind::Unavailable).
    pub fn unavailable(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(StoreErrorKind::Unavailable, message)
    }

    /// Creates an error of kind [`Configuration`](StoreErrorKind::Configuration). The message should say how to correct
    /// it.
    pub fn configuration(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(StoreErrorKind::Configuration, message)
    }

    /// Creates an error of kind [`Insecure`](StoreErrorKind::Insecure). The message should say who else has access.
    pub fn insecure(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(StoreErrorKind::Insecure, message)
    }

    /// Creates an error of kind [`InvalidRecord`](StoreErrorKind::InvalidRecord).
    ///
    /// The message must not quote the record, because the record may hold a token.
    pub fn invalid_record(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(StoreErrorKind::InvalidRecord, message)
    }

    fn new(kind: StoreErrorKind, message: impl Into<Cow<'static, str>>) -> Self {
        Self { kind, message: message.into(), cause: None }
    }

    /// Adds the underlying error, as this error's [`source`](StdError::source). The message should not repeat it.
    pub fn with_cause(mut self, cause: impl Into<BoxError>) -> Self {
        self.cause = Some(Arc::from(cause.into()));
        self
    }

    /// Returns the kind of this error.
    pub fn kind(&self) -> StoreErrorKind {
        self.kind
    }

    /// Whether a later retry may succeed without any change.
    pub fn is_transient(&self) -> bool {
        matches!(self.kind, StoreErrorKind::Unavailable | StoreErrorKind::InvalidRecord)
    }

    /// Converts this error to a source's, whose text begins with `what` and includes this error's. A chain of causes
    /// shows each text once.
    pub(crate) fn into_source_error(self, what: &str) -> SourceError {
        let error = SourceError::unavailable(format!("{what}: {self}"));
        SourceError { cause: self.cause, ..error }
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
    #[error("the token is longer than {} bytes", crate::Token::MAX_LEN)]
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

/// An error and its sources, outermost first.
pub(crate) struct Chain<'a>(pub(crate) &'a dyn StdError);

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}

/// A duration as error messages show it.
pub(crate) fn seconds(duration: Duration) -> String {
    format!("{}s", duration.as_secs_f64())
}
