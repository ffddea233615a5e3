//! [`Background`]: the newest task that keeps the token fresh, and whether it runs.

use std::time::Duration;

use futures_util::FutureExt;
use tokio::time::Instant;

use crate::sync::Waiter;

/// How often a background task runs at least.
pub(super) const TICK: Duration = Duration::from_secs(60);

/// How often a background task looks for a changed credential while the one before is rejected.
pub(super) const REVISION_TICK: Duration = Duration::from_secs(1);

/// A background task that is this late is on a runtime that is not driven.
const STALLED_AFTER: Duration = Duration::from_secs(1);

/// The newest task that keeps the token fresh.
pub(super) struct Background {
    pub(super) number: u64,
    /// When it has to run next.
    pub(super) due: Instant,
    /// Resolves at its end.
    pub(super) ended: Waiter,
}

impl Background {
    /// Resolves at the end of the task. `None` if it has ended, or is so late that nobody drives its runtime.
    pub(super) fn end(&self, now: Instant) -> Option<Waiter> {
        let runs = now <= self.due + STALLED_AFTER && self.ended.clone().now_or_never().is_none();
        runs.then(|| self.ended.clone())
    }
}
