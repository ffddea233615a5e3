//! [`Failure`]: what failed since the newest token, and when the source may be asked again.

use std::mem;
use std::time::Duration;

use tokio::time::Instant;

use super::options::ProviderOptions;
use super::pace::CoolDown;
use crate::error::{Error, SourceError};
use crate::retry::Backoff;

/// The longest `Retry-After` of a source that is followed.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);

/// The shortest time between two decisions of the background task, and between two attempts of `ready`.
pub(super) const PAUSE: Duration = Duration::from_millis(100);

/// The pause between two attempts of [`ready`](crate::TokenProvider::ready) after a permanent failure, min and max. It doubles.
const FORGIVING: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// The failure of the newest attempt since the newest token, and when the source may be asked again.
pub(super) struct Failure {
    pub(super) error: Error,
    /// Until then, callers get a permanent error at once. The next attempt after a transient one waits until then.
    pub(super) not_before: Instant,
    /// The revision of the source that a permanent error holds for.
    revision: u64,
    /// Spaces the attempts of [`ready`](crate::TokenProvider::ready).
    forgiving: CoolDown,
    backoff: Backoff,
    cool_down: CoolDown,
}

impl Failure {
    pub(super) fn new(error: &Error, config: &ProviderOptions, now: Instant) -> Self {
        Self {
            error: error.clone(),
            not_before: now,
            revision: 0,
            forgiving: CoolDown::new(FORGIVING),
            backoff: config.retry.make_backoff(),
            cool_down: CoolDown::new(config.cool_down),
        }
    }

    /// Whether callers get the error at once.
    pub(super) fn is_final(&self, now: Instant, revision: u64) -> bool {
        !self.error.is_transient() && self.revision == revision && now < self.not_before
    }

    /// Records that an attempt has failed: the next one waits for the backoff, and for the source's `Retry-After`. Returns
    /// the delay, and the error before.
    pub(super) fn back_off(&mut self, error: &SourceError, now: Instant) -> (Duration, Error) {
        let asked = error.retry_after().unwrap_or_default().min(MAX_RETRY_AFTER);
        let delay = asked + self.backoff.next_delay();
        self.not_before = now + delay;
        (delay, mem::replace(&mut self.error, error.clone().into()))
    }

    /// Records that a refresh has failed. Returns the error before.
    pub(super) fn end(
        &mut self,
        error: &Error,
        revision: u64,
        config: &ProviderOptions,
        now: Instant,
    ) -> Error {
        if !error.is_transient() {
            let ends_at = self.cool_down.begin(now);
            let asked_for = if let Error::Source(error) = error { error.retry_after() } else { None };
            let asked_for = asked_for.map_or(ends_at, |delay| now + delay.max(config.cool_down.0));
            self.not_before = asked_for.min(ends_at);
            self.revision = revision;
        } else if !matches!(error, Error::Source(_)) {
            // An attempt that has failed has begun its backoff itself. A short refresh could not wait for a long one.
            let delay = self.backoff.next_delay().min(config.refresh_timeout / 2).max(PAUSE);
            self.not_before = self.not_before.max(now + delay);
        }
        mem::replace(&mut self.error, error.clone())
    }

    /// Ends the cool-down of a permanent failure, but only after a pause that doubles. Returns when it ends; `None` if the
    /// failure is transient.
    pub(super) fn forgive(&mut self, now: Instant) -> Option<Instant> {
        if self.error.is_transient() {
            return None;
        }
        let at = self.forgiving.until().map_or(now, |until| until.max(now));
        if at < self.not_before {
            self.not_before = at;
            self.forgiving.begin(at);
        }
        Some(self.not_before)
    }
}
