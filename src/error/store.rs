//! [`StoreError`]: why a store could not do an operation.

use std::{borrow::Cow, error::Error as StdError, fmt, sync::Arc};

use super::{BoxError, SourceError};

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
#[derive(Clone, Debug)]
pub struct StoreError {
    kind: StoreErrorKind,
    message: Cow<'static, str>,
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

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl StdError for StoreError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        // The error itself, and not the pointer to it, which is an error of another type.
        Some(&**self.cause.as_ref()?)
    }
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
        let mut error = SourceError::unavailable(format!("{what}: {self}"));
        error.cause = self.cause;
        error
    }
}
