//! The errors of each boundary: [`Error`] for callers, [`SourceError`] for token sources, `StoreError` for stores,
//! [`TokenError`] for tokens.
//!
//! No error contains a token, a key, or a byte of a response body. Every error is `Clone`, because all callers that
//! wait for one refresh get the same one.

mod source;
mod store;

use std::{borrow::Cow, error::Error as StdError, fmt, sync::Arc, time::Duration};

pub use self::source::{BoxError, SourceError, SourceErrorKind, TokenError};
pub(crate) use self::source::{Facts, Fate, MAX_TOKEN_LEN};
pub use self::store::{StoreError, StoreErrorKind};

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

    /// The request's origin is not one that gets the token, and the layer has
    /// [`strict_origins`](crate::BearerAuthLayer::strict_origins). The text has the origin, and those that are allowed.
    OriginNotAllowed(String),

    /// The request has the maximum number of headers, so that the `Authorization` header cannot be added.
    TooManyHeaders,

    /// The request has no key that selects its token provider (`BearerAuthLayer::by_key`).
    MissingKey,

    /// The factory of `TokenProviders` returned this error: there is no token provider for the
    /// request's key.
    ///
    /// The text includes the factory's error, whose cause is the [`source`](StdError::source). Use `downcast_ref` for its
    /// type.
    Factory(Arc<dyn StdError + Send + Sync>),

    /// An option is out of its range. The text has the option, the accepted values, and the value unless it is a
    /// secret.
    InvalidOption(Cow<'static, str>),
}

const DROPPED: &str = "the API challenged the token, and its response could not be kept during the refresh";

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            Self::Source(error) if error.kind() == SourceErrorKind::Configuration => {
                return write!(f, "the token source is set up wrongly: {error}");
            }
            Self::Source(error) => return write!(f, "no access token could be obtained: {error}"),
            Self::Store(error) => return write!(f, "the token store cannot be used: {error}"),
            Self::TimedOut(limit) => return write!(f, "no access token was obtained within {limit:?}"),
            Self::Factory(error) => {
                return write!(f, "no token provider could be made for the request's key: {error}");
            }
            Self::OriginNotAllowed(text) => text,
            Self::InvalidOption(text) => return write!(f, "invalid option: {text}"),
            Self::ChallengeDropped(Some(cause)) => return write!(f, "{DROPPED}: {cause}"),
            Self::ChallengeDropped(None) => DROPPED,
            Self::Interrupted => {
                "the token refresh was interrupted: its source panicked or its runtime was shut down"
            }
            Self::NoRuntime => {
                "a token can only be obtained within a tokio runtime: enter one before the first request"
            }
            Self::ShutDown => "the token provider was shut down",
            Self::TooManyHeaders => "the request has too many headers to add an Authorization header",
            Self::MissingKey => "the request has no key that selects its token provider",
        };
        f.write_str(text)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        // Its message is part of this error's text.
        match self.reason() {
            Self::Source(error) => error.source(),
            Self::Store(error) => error.source(),
            Self::Factory(error) => error.source(),
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
    /// Fails unless the options are valid. The text has the option, the accepted values, and the value unless it is a secret.
    pub(crate) fn check(is_valid: bool, text: fmt::Arguments<'_>) -> Result<(), Self> {
        if is_valid { Ok(()) } else { Err(Self::InvalidOption(text.to_string().into())) }
    }

    /// Why there is no other token, if the response to a challenged request was dropped; else this error.
    fn reason(&self) -> &Self {
        if let Self::ChallengeDropped(Some(reason)) = self { reason.reason() } else { self }
    }

    /// Returns the first error of type `E` in the chain of causes: what a source, a store or a factory returned, or the
    /// client beneath it. `Self` is one, and so are [`SourceError`] and [`StoreError`].
    ///
    /// ```
    /// use tower_bearer::{Error, SourceError};
    ///
    /// let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
    /// let error = Error::from(SourceError::unavailable("the vault is sealed").with_cause(refused));
    /// assert_eq!(error.cause_as::<std::io::Error>().unwrap().kind(), std::io::ErrorKind::ConnectionRefused);
    /// ```
    pub fn cause_as<E: StdError + 'static>(&self) -> Option<&E> {
        let inner: &(dyn StdError + 'static) = match self.reason() {
            Self::Source(error) => error,
            Self::Store(error) => error,
            Self::Factory(error) => &**error,
            other => other,
        };
        if let Some(error) = (self as &dyn StdError).downcast_ref() {
            return Some(error);
        }
        let mut next = Some(inner);
        while let Some(error) = next {
            if let Some(found) = error.downcast_ref() {
                return Some(found);
            }
            next = error.source();
        }
        None
    }

    /// Whether a later retry may succeed without any change.
    pub fn is_transient(&self) -> bool {
        match self.reason() {
            Self::Source(error) => error.is_transient(),
            Self::Store(error) => error.is_transient(),
            Self::TimedOut(_) | Self::Interrupted | Self::ChallengeDropped(_) => true,
            _ => false,
        }
    }

    /// Whether a response is why the configuration counts as wrong. The server may be starting.
    pub(crate) fn is_misplaced(&self) -> bool {
        matches!(self, Self::Source(error) if error.facts.is_answer && error.kind() == SourceErrorKind::Configuration)
    }

    /// Whether the token endpoint did not respond in time ([`SourceError::is_timeout`]), or the refresh timed out before that
    /// was known.
    pub fn is_timeout(&self) -> bool {
        match self.reason() {
            Self::Source(error) => error.is_timeout(),
            error => matches!(error, Self::TimedOut(_)),
        }
    }

    /// Whether no connection to the token endpoint could be made ([`SourceError::is_connect`]).
    pub fn is_connect(&self) -> bool {
        matches!(self.reason(), Self::Source(error) if error.is_connect())
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
            Self::OriginNotAllowed(_) => "origin_not_allowed",
            Self::TooManyHeaders => "too_many_headers",
            Self::MissingKey => "missing_key",
            Self::Factory(_) => "factory",
            Self::InvalidOption(_) => "invalid_option",
        }
    }
}

/// An error and its sources, outermost first.
pub(crate) struct ErrorChain<'a>(pub(crate) &'a dyn StdError);

impl fmt::Display for ErrorChain<'_> {
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
pub(crate) struct Seconds(pub(crate) Duration);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}s", self.0.as_secs_f64())
    }
}
