//! [`StatusChanges`]: waits for the status of a provider to change.

use std::sync::Arc;

use tokio::sync::watch;

use super::{core::Core, status::Status};
use crate::debug::debug_fields;

/// Waits for changes of a provider's status; see [`TokenProvider::subscribe`](crate::TokenProvider::subscribe).
///
/// It does not keep the provider's background task alive, and does not count as one of its handles.
pub struct StatusChanges {
    core: Arc<Core>,
    changes: watch::Receiver<bool>,
    has_ended: bool,
}

impl StatusChanges {
    pub(super) fn of(core: &Arc<Core>) -> Self {
        let changes = core.changes();
        Self { has_ended: has_ended(&core.status()), core: Arc::clone(core), changes }
    }

    /// Waits for the next change, and returns the status after it. Changes in quick succession count as one.
    ///
    /// These are changes: a refresh starts, fails an attempt, or ends; the token is set or invalidated; a user logs in; the
    /// provider is shut down. Expiry alone does not send a notification.
    ///
    /// `None` if no change by itself can follow: the provider was shut down or its last handle dropped, and no refresh is
    /// running.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses no change.
    pub async fn next(&mut self) -> Option<Status> {
        if self.has_ended {
            return None;
        }
        self.changes.changed().await.ok()?;
        let status = self.core.status();
        self.has_ended = has_ended(&status);
        Some(status)
    }
}

fn has_ended(status: &Status) -> bool {
    status.shut_down && !status.refreshing
}

debug_fields!(StatusChanges |it| { status: it.core.status() });
