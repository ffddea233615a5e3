//! The background task that keeps the token of an idle provider fresh.

use std::sync::{Arc, Weak};

use tokio::{
    runtime::Handle,
    sync::watch,
    time::{Instant, timeout_at},
};

use super::{
    refresh::obtain,
    shared::Shared,
    state::Need,
    sync::{Sender, channel},
};

/// Starts the background task, if the provider is to have one and none runs.
pub(super) fn start(shared: &Arc<Shared>) {
    if !shared.config.keep_fresh {
        return;
    }
    let Ok(runtime) = Handle::try_current() else { return };
    let (end, ended) = channel();
    let started = shared.state().start_background(ended, Instant::now());
    if let Some(number) = started {
        // Without the state's lock: a runtime may have hooks for new tasks, which are foreign code.
        runtime.spawn(keep_fresh(number, Arc::downgrade(shared), shared.changes(), end));
    }
}

/// Refreshes the token whenever that is due, until the last handle is dropped or the provider is shut down.
///
/// The drop of `_end` tells those who wait that the task has ended, also if its runtime shuts down.
async fn keep_fresh(number: u64, shared: Weak<Shared>, mut changes: watch::Receiver<bool>, _end: Sender) {
    while !*changes.borrow_and_update() {
        let Some(shared) = shared.upgrade() else { return };
        shared.compare_clocks();
        obtain(&shared, Need::Ahead);
        let next = shared.state().background_runs_at(number, shared.published().as_ref(), Instant::now());
        let Some(next) = next else { return };
        // Held no longer: the drop of the last handle has to end this task.
        drop(shared);
        // A change is a reason to decide again before that.
        if let Ok(Err(_)) = timeout_at(next, changes.changed()).await {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        cell::Cell,
        time::{Duration, SystemTime},
    };

    use tokio::time::sleep;

    use super::*;
    use crate::{
        error::SourceError,
        provider::config::Config,
        source::{TokenRequest, TokenSource},
        token::Token,
    };

    const HOUR: Duration = Duration::from_secs(3600);

    struct Hourly;

    impl TokenSource for Hourly {
        async fn fetch(&self, _: &TokenRequest<'_>) -> Result<Token, SourceError> {
            Ok(Token::builder("abc").expires_in(HOUR).build()?)
        }
    }

    thread_local! {
        static WALL: Cell<SystemTime> = const { Cell::new(SystemTime::UNIX_EPOCH) };
    }

    fn remaining(shared: &Shared) -> Duration {
        shared.status().remaining.unwrap()
    }

    /// Row 17.
    #[tokio::test(start_paused = true)]
    async fn wall_clock_only_shortens_life() {
        let config = Config { keep_fresh: true, ..Config::default() };
        let shared = Arc::new(Shared::new(Box::new(Hourly), config, || WALL.get()));
        start(&shared);
        sleep(Duration::from_secs(1)).await;

        // It stands still, and is then set back: nothing.
        sleep(Duration::from_secs(600)).await;
        WALL.set(SystemTime::UNIX_EPOCH - HOUR);
        sleep(Duration::from_secs(600)).await;
        assert_eq!(remaining(&shared), HOUR - Duration::from_secs(1201));

        // Half an hour's suspension: seen within a minute, and counted once.
        WALL.set(SystemTime::UNIX_EPOCH + Duration::from_secs(1201) + HOUR / 2);
        sleep(Duration::from_secs(120)).await;
        let left = remaining(&shared);
        assert!(left <= HOUR / 2 - Duration::from_secs(1321 - 60), "{left:?}");
        assert!(left >= HOUR / 2 - Duration::from_secs(1321 + 60), "{left:?}");
        assert_eq!(shared.status().generation, 1);

        // One that outlasts the token: another, without a request.
        WALL.set(SystemTime::UNIX_EPOCH + 10 * HOUR);
        sleep(Duration::from_secs(61)).await;
        assert_eq!(shared.status().refreshes, 2);
        assert!(remaining(&shared) > HOUR - Duration::from_secs(62));
    }
}
