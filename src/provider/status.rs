//! [`Status`]: what a provider can say of itself, and [`StatusChanges`], which says when that changes.

use std::{fmt, sync::Arc, time::Duration};

use tokio::sync::watch;

use super::core::Core;
use crate::error::Error;

/// What a [`TokenProvider`](crate::TokenProvider) can say of itself at one moment; it holds no secret.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Status {
    /// Which access token is the current one, counted from 1; 0 before the first.
    pub generation: u64,
    /// Whether there is a token, and how it is used.
    pub freshness: Freshness,
    /// How long the current token still lives: zero when it has expired, `None` when there is none or it has no end.
    pub remaining: Option<Duration>,
    /// Whether a refresh is under way.
    pub refreshing: bool,
    /// How long the source is still left alone after a failure; `None` when it is not.
    pub retry_in: Option<Duration>,
    /// How many refreshes have been started.
    pub refreshes: u64,
    /// How many refreshes have failed.
    pub failed_refreshes: u64,
    /// Why the newest attempt failed; `None` since the last one that succeeded.
    pub last_error: Option<Error>,
    /// Whether the provider was shut down.
    pub shut_down: bool,
}

/// How the current token is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Freshness {
    /// There is no token: callers wait for one.
    Missing,
    /// It is used as it is.
    Fresh,
    /// It is used, and renewed behind the callers' backs.
    Expiring,
    /// It is not used any more: callers wait for another.
    Expired,
}

/// Says when a provider's status changes; see [`TokenProvider::subscribe`](crate::TokenProvider::subscribe).
///
/// It does not keep the provider's background task alive, nor count as one of its handles.
pub struct StatusChanges {
    core: Arc<Core>,
    changes: watch::Receiver<bool>,
    ended: bool,
}

impl StatusChanges {
    pub(super) fn of(core: &Arc<Core>) -> Self {
        let changes = core.changes();
        Self { ended: has_ended(&core.status()), core: Arc::clone(core), changes }
    }

    /// Waits for the next change, and tells the status then. Changes that follow each other closely are told as one.
    ///
    /// A change is: a refresh that starts, fails an attempt, or ends; a token invalidated or shortened; the provider shut
    /// down. That a token has begun to age, or has expired, is none by itself.
    ///
    /// `None` when there will be none any more: the provider was shut down, or its last handle dropped, and a refresh that
    /// was under way has ended.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses no change.
    pub async fn next(&mut self) -> Option<Status> {
        if self.ended {
            return None;
        }
        self.changes.changed().await.ok()?;
        let status = self.core.status();
        self.ended = has_ended(&status);
        Some(status)
    }
}

fn has_ended(status: &Status) -> bool {
    status.shut_down && !status.refreshing
}

impl fmt::Debug for StatusChanges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StatusChanges").field("status", &self.core.status()).finish_non_exhaustive()
    }
}
