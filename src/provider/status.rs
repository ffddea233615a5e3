//! [`Status`]: a snapshot of a provider.

use std::time::Duration;

use crate::{error::Error, store::StoreStatus};

/// A snapshot of a [`TokenProvider`](crate::TokenProvider). It holds no secret.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Status {
    /// The generation of the current access token, counted from 1; 0 before the first.
    pub generation: u64,
    /// Whether there is a token, and whether it is used.
    pub freshness: Freshness,
    /// How long the current token still lives: zero if it has expired, `None` if there is none or it has no lifetime.
    pub remaining: Option<Duration>,
    /// Whether a refresh is running.
    pub refreshing: bool,
    /// How long the source is not asked because of a failure; `None` if it may be asked now. If a login is
    /// [required](crate::SourceErrorKind::LoginRequired), no time brings a token, but [`log_in`](crate::TokenProvider::log_in).
    pub retry_in: Option<Duration>,
    /// How many refreshes have asked the token source. One that adopts the token of another process is not counted. A
    /// reader's is counted if no process has stored a token in time.
    pub refreshes: u64,
    /// How many of these have failed.
    pub failed_refreshes: u64,
    /// Why the newest attempt failed; `None` if a later one succeeded.
    pub last_error: Option<Error>,
    /// Whether the store that processes share can be used; if not, for how long it has failed, and why. `None` without
    /// a [store](crate::TokenProviderBuilder#method.store).
    ///
    /// It is what the newest operations of the store have shown. A change of this field alone does not notify
    /// [subscribers](crate::TokenProvider::subscribe).
    pub store: Option<StoreStatus>,
    /// Whether the provider was shut down.
    pub shut_down: bool,
}

/// Whether the current token is used, and whether it is about to be replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Freshness {
    /// There is no token: callers wait for one.
    Missing,
    /// The token is used.
    Fresh,
    /// The token is used, and a refresh replaces it in the background.
    Expiring,
    /// The token is not used any more: callers wait for another.
    Expired,
}
