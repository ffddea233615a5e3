//! [`Pace`]: how often challenges may start a refresh. [`CoolDown`]: a pause that doubles.
//!
//! A 401 has one of two reasons: the token was revoked, or the endpoint rejects every token. Another token heals the
//! first, and is wasted on the second. Two limits bound both:
//!
//! - Each refresh that a challenge starts takes one from a bucket of ten, which gets one back per period (5 s).
//! - A token that the API has not accepted yet is replaced only after a cool-down (2 s, which doubles to 60 s). The
//!   cool-down begins with each such refresh. One that replaces an accepted token resets it first.
//!
//! Both are checked when a refresh would start, and charged when its token is published. A program that reports a challenge
//! itself knows what it does: for that, only the bucket counts.

use std::time::Duration;

use tokio::time::Instant;

/// How many refreshes the bucket holds.
const BURST: u32 = 10;

/// In this time the bucket gets one back, within the bounds of the cool-down.
const PERIOD: Duration = Duration::from_secs(5);

/// The shortest cool-down, within its bounds. The last retry of a request comes when a new token is a second old: it should
/// not replace a token that the API is about to know.
const LEAST_COOL_DOWN: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub(super) struct Pace {
    period: Duration,
    /// When the bucket is full again.
    full_at: Option<Instant>,
    cool_down: CoolDown,
}

impl Pace {
    pub(super) fn new((min, max): (Duration, Duration)) -> Self {
        let cool_down = CoolDown::new((LEAST_COOL_DOWN.clamp(min, max), max));
        Self { period: PERIOD.clamp(min, max), full_at: None, cool_down }
    }

    /// Whether a challenge may start a refresh now. `is_good`: the API has accepted the challenged token, or the program
    /// itself asks.
    pub(super) fn allows(&self, now: Instant, is_good: bool) -> bool {
        let owed = self.full_at.map_or(Duration::ZERO, |at| at.saturating_duration_since(now));
        owed <= self.period.saturating_mul(BURST - 1) && (is_good || !self.cool_down.is_active(now))
    }

    /// Charges a refresh that a challenge has started, at its publication. `by_program`: the program itself has asked.
    pub(super) fn charge(&mut self, now: Instant, was_accepted: bool, by_program: bool) {
        self.full_at = self.full_at.max(Some(now)).and_then(|at| at.checked_add(self.period));
        if was_accepted {
            self.cool_down.reset();
        }
        if !by_program {
            self.cool_down.begin(now);
        }
    }
}

/// A pause whose length doubles from `min` to `max` each time it begins again.
#[derive(Debug)]
pub(super) struct CoolDown {
    min: Duration,
    max: Duration,
    /// The length of the next pause.
    next: Duration,
    until: Option<Instant>,
}

impl CoolDown {
    pub(super) fn new((min, max): (Duration, Duration)) -> Self {
        Self { min, max, next: min, until: None }
    }

    /// Begins a pause and returns its end.
    ///
    /// Starts at `min` again if the last pause ended longer ago than the longest one would last: callers that come less often
    /// than the next one lasts would never let it grow.
    pub(super) fn begin(&mut self, now: Instant) -> Instant {
        if self.until.is_some_and(|until| now.saturating_duration_since(until) > self.max) {
            self.reset();
        }
        // At most an hour: `build` checks it.
        let until = now + self.next;
        self.until = Some(until);
        self.next = self.next.saturating_mul(2).min(self.max);
        until
    }

    /// The end of the pause that began last.
    pub(super) fn until(&self) -> Option<Instant> {
        self.until
    }

    fn is_active(&self, now: Instant) -> bool {
        self.until.is_some_and(|until| now < until)
    }

    fn reset(&mut self) {
        (self.next, self.until) = (self.min, None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn pace() -> Pace {
        Pace::new((SECOND, 60 * SECOND))
    }

    /// How many refreshes start within `seconds`, if the API accepts their tokens or not.
    fn started(pace: &mut Pace, begun: Instant, seconds: u32, is_good: bool) -> u32 {
        let mut started = 0;
        for tenth in 0..seconds * 10 {
            let now = begun + SECOND / 10 * tenth;
            if pace.allows(now, is_good) {
                started += 1;
                pace.charge(now, is_good, false);
            }
        }
        started
    }

    /// Challenges last for hours: the cool-down doubles up to its bound, and is forgotten after a quiet time.
    #[test]
    fn cool_down_doubles_then_forgets() {
        let mut cool_down = CoolDown::new((SECOND, SECOND * 60));
        let mut now = Instant::now();
        for length in [1, 2, 4, 8, 16, 32, 60, 60] {
            assert_eq!(cool_down.begin(now), now + SECOND * length);
            assert!(cool_down.is_active(now + SECOND * length - Duration::from_nanos(1)), "{length}");
            now += SECOND * length;
            assert!(!cool_down.is_active(now), "{length}");
        }
        now += SECOND * 61;
        assert_eq!(cool_down.begin(now), now + SECOND);
    }

    /// The token is revoked again and again, each time after a success: ten refreshes at once, and then one per period.
    #[test]
    fn ten_heal_at_once_then_one_per_period() {
        let (mut pace, now) = (pace(), Instant::now());
        assert_eq!(
            (0..30)
                .filter(|_| pace.allows(now, true).then(|| pace.charge(now, true, false)).is_some())
                .count(),
            10
        );
        assert!(!pace.allows(now + PERIOD - SECOND / 10, true));
        assert!(pace.allows(now + PERIOD, true));
        // A bucket that was never empty holds ten again after as many periods.
        assert_eq!(started(&mut pace, now + 100 * PERIOD, 1, true), 10);
    }

    /// The API never accepts the newest token.
    #[test]
    fn token_never_accepted_waits_for_cool_down() {
        let (mut pace, now) = (pace(), Instant::now());
        // At 0, 2, 6, 14 and 30 s.
        assert_eq!(started(&mut pace, now, 60, false), 5);
        // An accepted token resets the cool-down.
        pace.charge(now + 200 * SECOND, true, false);
        assert!(!pace.allows(now + 201 * SECOND, false));
        assert!(pace.allows(now + 202 * SECOND, false));
    }

    /// One endpoint challenges every token beside one that works, which costs one refresh per period.
    #[test]
    fn endless_challenges_cost_one_per_period() {
        let (mut pace, now) = (pace(), Instant::now());
        assert!((20..=22).contains(&started(&mut pace, now, 60, true)));
        assert!((12..=13).contains(&started(&mut pace, now + 60 * SECOND, 60, true)));
    }

    /// The period of refreshes that heal follows the option `cool_down`.
    #[test]
    fn period_follows_cool_down() {
        for (min, max, seconds) in [(1, 3, 3), (1, 60, 5), (7, 60, 7)] {
            assert_eq!(Pace::new((SECOND * min, SECOND * max)).period, SECOND * seconds);
        }
    }
}
