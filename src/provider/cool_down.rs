//! [`CoolDown`]: a pause that doubles each time it begins again, until it is reset.

use std::time::Duration;

use tokio::time::Instant;

/// A pause after a failure. Its length doubles from `min` to `max`.
#[derive(Debug, Default)]
pub(super) struct CoolDown {
    min: Duration,
    max: Duration,
    /// The length of the next pause.
    next: Duration,
    until: Option<Instant>,
}

impl CoolDown {
    pub(super) fn new(min: Duration, max: Duration) -> Self {
        Self { min, max, next: min, until: None }
    }

    /// Begins a pause and returns its length.
    ///
    /// Starts at `min` again if the last pause ended longer ago than the next one would last.
    pub(super) fn begin(&mut self, now: Instant) -> Duration {
        if self.until.is_some_and(|until| now.saturating_duration_since(until) > self.next) {
            self.reset();
        }
        let length = self.next;
        self.until = now.checked_add(length);
        self.next = length.saturating_mul(2).min(self.max);
        length
    }

    pub(super) fn is_active(&self, now: Instant) -> bool {
        self.until.is_some_and(|until| now < until)
    }

    /// When the last pause ends or ended.
    pub(super) fn until(&self) -> Option<Instant> {
        self.until
    }

    fn reset(&mut self) {
        self.next = self.min;
        self.until = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_then_forgets_old_failures() {
        let second = Duration::from_secs(1);
        let mut cool_down = CoolDown::new(second, second * 60);
        let mut now = Instant::now();
        for length in [1, 2, 4, 8, 16, 32, 60, 60] {
            cool_down.begin(now);
            assert!(cool_down.is_active(now + second * length - Duration::from_nanos(1)), "{length}");
            now += second * length;
            assert!(!cool_down.is_active(now), "{length}");
        }
        now += second * 61;
        cool_down.begin(now);
        assert!(!cool_down.is_active(now + second));
    }
}
