//! [`Status`]: what a provider can say of itself.

use std::time::Duration;

use crate::error::Error;

/// What a [`TokenProvider`](crate::TokenProvider) can say of itself at one moment; it holds no secret.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Status {
    /// Which token is the current one, counted from 1; 0 before the first.
    pub generation: u64,
    /// How long the current token still lives: zero when it has expired, `None` when there is none or it has no end.
    pub remaining: Option<Duration>,
    /// Whether a flight is under way.
    pub refreshing: bool,
    /// How many flights have been started.
    pub flights: u64,
    /// How many flights have failed.
    pub failed_flights: u64,
    /// Why the newest flight failed; `None` since the last one that succeeded.
    pub last_error: Option<Error>,
}
