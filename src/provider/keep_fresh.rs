//! The background task that keeps the token of an idle provider fresh.

use std::sync::{Arc, Weak};

use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

use super::{core::Core, decide::Need, refresh::obtain};
use crate::sync::{Sender, channel};

/// Starts the background task, if the provider is to have one and none runs.
pub(super) fn start(core: &Arc<Core>) {
    if !core.config.keep_fresh {
        return;
    }
    let Some(runtime) = core.config.runtime() else { return };
    let (end, ended) = channel();
    let started = core.state().start_background(ended, Instant::now());
    if let Some(number) = started {
        // Without the state's lock: a runtime may have hooks for new tasks, which are foreign code.
        runtime.spawn(keep_fresh(number, Arc::downgrade(core), core.changes(), end));
    }
}

/// Refreshes the token whenever that is due, until the last handle is dropped or the provider is shut down.
///
/// The drop of `_end` tells those who wait that the task has ended, also if its runtime shuts down.
async fn keep_fresh(number: u64, core: Weak<Core>, mut changes: watch::Receiver<bool>, _end: Sender) {
    while !*changes.borrow_and_update() {
        let Some(core) = core.upgrade() else { return };
        if let Some(group) = &core.config.group {
            // This may be the only one of its providers that runs.
            (group.evict_idle)();
        }
        drop(obtain(&core, Need::Background));
        let next = core.state().background_runs_at(number, core.published().as_ref(), Instant::now());
        let Some(next) = next else { return };
        // Held no longer: the drop of the last handle has to end this task.
        drop(core);
        // A change is a reason to decide again before that.
        if let Ok(Err(_)) = timeout_at(next, changes.changed()).await {
            return;
        }
    }
}
