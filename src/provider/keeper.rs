//! [`Keeper`]: the background task that renews an idle provider's token.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};

use super::{core::Core, state::Need};

/// How often the clocks are compared.
const CLOCK_TICK: Duration = Duration::from_secs(60);

/// A task that has not run for so long after it was to run is on a runtime that nobody drives.
const STALLED_AFTER: Duration = Duration::from_secs(1);

/// Which of a provider's tasks is the one in charge. There is at most one: where its runtime stalls, the next caller on
/// another runtime that finds no fresh token starts another, and the first ends when it runs again.
#[derive(Debug, Default)]
pub(super) struct InCharge {
    /// Counts the tasks.
    newest: u64,
    /// When the newest one runs again, while there is one.
    due: Option<Instant>,
}

impl InCharge {
    /// The number of the task that is to start now; `None` if one is there that runs.
    pub(super) fn start(&mut self, now: Instant) -> Option<u64> {
        if self.runs(now) {
            return None;
        }
        self.newest += 1;
        self.due = Some(now);
        Some(self.newest)
    }

    /// The task `number` runs, and runs again when it is `due`; false if it is not in charge any more.
    pub(super) fn go_on(&mut self, number: u64, due: Instant) -> bool {
        let is_in_charge = number == self.newest;
        if is_in_charge {
            self.due = Some(due);
        }
        is_in_charge
    }

    pub(super) fn end(&mut self, number: u64) {
        if number == self.newest {
            self.due = None;
        }
    }

    /// Whether there is a task, and its runtime is driven, as far as can be known.
    pub(super) fn runs(&self, now: Instant) -> bool {
        self.due.is_some_and(|due| now <= due + STALLED_AFTER)
    }
}

/// Holds the provider weakly: the last handle's end is the task's.
pub(super) struct Keeper {
    core: Weak<Core>,
    changes: watch::Receiver<bool>,
    number: u64,
}

impl Keeper {
    pub(super) fn of(core: &Arc<Core>, number: u64) -> Self {
        Self { core: Arc::downgrade(core), changes: core.changes(), number }
    }

    pub(super) async fn keep(mut self) {
        while !*self.changes.borrow_and_update() {
            let Some(core) = self.core.upgrade() else { return };
            if !core.goes_on_keeping(self.number, Instant::now()) {
                return;
            }
            core.compare_clocks();
            core.obtain(Need::Ahead);
            let tick = Instant::now() + CLOCK_TICK;
            let next = core.look_again_at().map_or(tick, |at| at.min(tick));
            core.goes_on_keeping(self.number, next);
            drop(core);
            // A change, or the provider's end, is reason enough to look again.
            if let Ok(Err(_)) = timeout_at(next, self.changes.changed()).await {
                return;
            }
        }
    }
}

/// Also when the runtime ends, or the source's own code panics.
impl Drop for Keeper {
    fn drop(&mut self) {
        if let Some(core) = self.core.upgrade() {
            core.kept(self.number);
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
        TokenSource, error::SourceError, provider::settings::Settings, source::TokenRequest, token::Token,
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

    fn remaining(core: &Core) -> Duration {
        core.status().remaining.unwrap()
    }

    /// Row 17.
    #[tokio::test(start_paused = true)]
    async fn wall_clock_only_shortens_life() {
        let settings = Settings { keep_fresh: true, ..Settings::default() };
        let core = Arc::new(Core::with_wall_clock(Box::new(Hourly), settings, || WALL.get()));
        core.keep();
        sleep(Duration::from_secs(1)).await;

        // It stands still, and is then set back: nothing.
        sleep(Duration::from_secs(600)).await;
        WALL.set(SystemTime::UNIX_EPOCH - HOUR);
        sleep(Duration::from_secs(600)).await;
        assert_eq!(remaining(&core), HOUR - Duration::from_secs(1201));

        // Half an hour's suspension: seen within a minute, and counted once.
        WALL.set(SystemTime::UNIX_EPOCH + Duration::from_secs(1201) + HOUR / 2);
        sleep(Duration::from_secs(120)).await;
        let left = remaining(&core);
        assert!(left <= HOUR / 2 - Duration::from_secs(1321 - 60), "{left:?}");
        assert!(left >= HOUR / 2 - Duration::from_secs(1321 + 60), "{left:?}");
        assert_eq!(core.status().generation, 1);

        // One that outlasts the token: another, without a request.
        WALL.set(SystemTime::UNIX_EPOCH + 10 * HOUR);
        sleep(Duration::from_secs(61)).await;
        assert_eq!(core.status().refreshes, 2);
        assert!(remaining(&core) > HOUR - Duration::from_secs(62));
    }
}
