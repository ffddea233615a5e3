//! [`ChallengePause`]: how long no challenge starts a refresh after one that a challenge started.
//!
//! A 401 has one of two reasons: the token is revoked, or the endpoint rejects every token. Another token heals the
//! first, and is wasted on the second. The responses to the requests that are sent with the new token tell the two
//! apart.

use std::time::Duration;

use tokio::time::Instant;

use super::cool_down::CoolDown;

/// The pause while the API accepts tokens: an endpoint that rejects them all costs at most one refresh in this time.
const SPACING: Duration = Duration::from_secs(5);

/// How many refreshes that heal may follow each other without a pause; after them, one per `min`. An API that
/// challenges good tokens at random, or two providers that revoke each other's tokens, would cause a refresh per
/// request otherwise.
const BURST: u32 = 10;

/// The pause after a refresh that a challenge started.
///
/// - The request that started the refresh has succeeded with the new token: no pause, within [`BURST`].
/// - Another challenged request has, and the starter has no response yet: `min`.
/// - The API has accepted the new token, but no challenged request has succeeded: [`SPACING`].
/// - Otherwise the cool-down, which doubles from one such refresh to the next. It starts at [`SPACING`] once the API
///   has accepted any token.
#[derive(Debug, Default)]
pub(super) struct ChallengePause {
    cool_down: CoolDown,
    min: Duration,
    max: Duration,
    spacing: Duration,
    /// When every refresh so far would have started, at one per `min`.
    paced_until: Option<Instant>,
    /// When the newest refresh that a challenge started published its token; `None` if there was none.
    published_at: Option<Instant>,
    /// The generation of that token.
    generation: u32,
    /// Whether the request that started that refresh waits to be sent again, so that its response will tell.
    starter_waits: bool,
    /// The part of a challenged request that has succeeded with that token.
    healed: Part,
    /// Whether a request was challenged before and after that refresh.
    challenged_again: bool,
    /// When a challenge that started no refresh was reported last.
    reported_at: Option<Instant>,
    /// How many such challenges there were since then.
    unreported: u64,
}

/// The part that a request had in the refresh that brought its token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Part {
    #[default]
    None,
    Joined,
    Started,
}

impl ChallengePause {
    pub(super) fn new((min, max): (Duration, Duration)) -> Self {
        let spacing = SPACING.clamp(min, max);
        Self { cool_down: CoolDown::new(min, max), min, max, spacing, ..Self::default() }
    }

    /// Begins after a refresh that a challenge started, which published the token of `generation`. `accepted`: the API
    /// had accepted the token before it.
    pub(super) fn begin(&mut self, now: Instant, generation: u32, starter_waits: bool, accepted: bool) {
        if accepted {
            self.cool_down = CoolDown::new(self.spacing, self.max);
        }
        self.cool_down.begin(now);
        self.paced_until = self.paced_until.max(Some(now)).and_then(|at| at.checked_add(self.min));
        (self.published_at, self.generation, self.starter_waits) = (Some(now), generation, starter_waits);
        (self.healed, self.challenged_again) = (Part::None, false);
    }

    /// Whether a challenge starts no refresh now. `accepted`: the API has accepted the current token.
    pub(super) fn is_active(&self, now: Instant, accepted: bool) -> bool {
        let Some(published_at) = self.published_at else { return false };
        let age = now.saturating_duration_since(published_at);
        match self.healed {
            Part::Started => {
                let ahead = self.paced_until.map(|until| until.saturating_duration_since(now));
                ahead.is_some_and(|ahead| ahead > self.min.saturating_mul(BURST))
            }
            // The starter's own response is better evidence, and may come a moment later. If none will come, an
            // endpoint that rejects every token could pass for healed.
            Part::Joined if self.starter_waits => age < self.min,
            _ if accepted => age < self.spacing,
            _ => self.cool_down.is_active(now),
        }
    }

    /// Records that a challenge has started no refresh. It is news once in the longest cool-down: then this returns how
    /// many there were since the last that was news.
    pub(super) fn leave_alone(&mut self, now: Instant) -> Option<u64> {
        if self.reported_at.is_some_and(|at| now.saturating_duration_since(at) < self.max) {
            self.unreported += 1;
            return None;
        }
        self.reported_at = Some(now);
        Some(std::mem::take(&mut self.unreported))
    }

    /// Records that a challenged request, which had this `part` in the refresh, has succeeded with its token.
    pub(super) fn healed(&mut self, generation: u32, part: Part) {
        let is_first_joiner = part == Part::Joined && self.healed == Part::None && !self.challenged_again;
        let counts = part == Part::Started || is_first_joiner;
        if counts && self.generation == generation {
            self.healed = part;
        }
    }

    /// Records that a challenged request, which had this `part` in the refresh, was challenged again with its token.
    pub(super) fn challenged_again(&mut self, generation: u32, part: Part) {
        // After the starter has succeeded, a further challenge is a revocation of the new token.
        if self.generation == generation && part != Part::None && self.healed != Part::Started {
            (self.healed, self.challenged_again) = (Part::None, true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn pause() -> ChallengePause {
        ChallengePause::new((SECOND, 60 * SECOND))
    }

    /// How long a challenge starts no refresh.
    fn length(pause: &ChallengePause, begun: Instant, accepted: bool) -> u32 {
        (0..=60).find(|seconds| !pause.is_active(begun + SECOND * *seconds, accepted)).unwrap()
    }

    #[test]
    fn pause_doubles_until_acceptance() {
        let (mut pause, mut now) = (pause(), Instant::now());
        for seconds in [1, 2, 4, 8, 16, 32, 60, 60] {
            pause.begin(now, 1, true, false);
            assert_eq!(length(&pause, now, false), seconds);
            now += SECOND * seconds;
        }
        // The newest token is accepted: the pause is over, though the cool-down is at its longest.
        assert_eq!(length(&pause, now - 60 * SECOND, true), 5);
        // From then on it starts at five seconds.
        for (accepted, seconds) in [(true, 5), (false, 10), (false, 20)] {
            pause.begin(now, 1, true, accepted);
            assert_eq!(length(&pause, now, false), seconds);
            now += SECOND * seconds;
        }
    }

    #[test]
    fn healing_ends_or_shortens_pause() {
        for (part, seconds) in [(Part::Started, 0), (Part::Joined, 1)] {
            let (mut pause, now) = (pause(), Instant::now());
            pause.begin(now, 2, true, true);
            pause.healed(1, part);
            assert_eq!(length(&pause, now, true), 5, "another token's success");
            pause.healed(2, part);
            assert_eq!(length(&pause, now, true), seconds, "{part:?}");
        }
    }

    #[test]
    fn repeat_challenge_outweighs_joiner() {
        let (mut pause, now) = (pause(), Instant::now());
        pause.begin(now, 2, true, true);
        pause.healed(2, Part::Joined);
        pause.challenged_again(2, Part::Started);
        pause.healed(2, Part::Joined);
        assert_eq!(length(&pause, now, true), 5);
        // But not the starter's own success.
        pause.healed(2, Part::Started);
        pause.challenged_again(2, Part::Joined);
        assert_eq!(length(&pause, now, true), 0);
    }

    #[test]
    fn joiner_needs_waiting_starter() {
        let (mut pause, now) = (pause(), Instant::now());
        pause.begin(now, 2, false, true);
        pause.healed(2, Part::Joined);
        assert_eq!(length(&pause, now, true), 5);
    }

    #[test]
    fn refreshes_that_heal_are_bounded_too() {
        let (mut pause, begun) = (pause(), Instant::now());
        let mut started = 0;
        for tenth in 0..600 {
            let now = begun + SECOND / 10 * tenth;
            if !pause.is_active(now, true) {
                started += 1;
                pause.begin(now, started, true, true);
                pause.healed(started, Part::Started);
            }
        }
        assert!((60..=60 + BURST + 1).contains(&started), "{started} in a minute");
    }

    #[test]
    fn cool_down_bounds_pause() {
        let now = Instant::now();
        for (min, max, seconds) in [(1, 3, 3), (1, 60, 5), (7, 60, 7)] {
            let mut pause = ChallengePause::new((SECOND * min, SECOND * max));
            pause.begin(now, 2, true, true);
            assert_eq!(length(&pause, now, true), seconds);
        }
    }
}
