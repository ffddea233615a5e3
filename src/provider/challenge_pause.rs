//! [`ChallengePause`]: how long challenges start no other refresh after one that a challenge started.
//!
//! A 401 has one of two reasons: the token is revoked, or the endpoint refuses every token. Another token heals the first
//! and is wasted on the second. What happens to the requests that are sent with the new token tells the two apart.

use std::time::Duration;

use tokio::time::Instant;

use super::cool_down::CoolDown;

/// The pause while the API accepts tokens: the most often that an endpoint which refuses them all costs a refresh.
const SPACING: Duration = Duration::from_secs(5);

/// So many refreshes in a row may follow each other without a pause where each heals; from then on one per least cool-down.
/// An API that refuses good tokens at random, or two providers whose tokens end each other, would have no bound otherwise.
const BURST: u32 = 10;

/// The pause after a refresh that a challenge started.
///
/// - The request that started the refresh succeeds with the new token: there is no pause, within [`BURST`].
/// - Another that was challenged does, and the starter's answer is still to come: the least cool-down.
/// - The API has accepted the new token, but no such request has succeeded: [`SPACING`].
/// - Otherwise the cool-down, which doubles from one such refresh to the next; it starts at [`SPACING`] once the API has
///   accepted any token.
#[derive(Debug)]
pub(super) struct ChallengePause {
    cool_down: CoolDown,
    min: Duration,
    max: Duration,
    spacing: Duration,
    /// When every refresh so far would have been started, had they come one per least cool-down.
    paced_until: Option<Instant>,
    refresh: Option<Refresh>,
}

/// The newest refresh that a challenge started, and what is known of its token.
#[derive(Debug)]
struct Refresh {
    published_at: Instant,
    generation: u32,
    /// Whether the request that started it waits to be sent again, so that its own answer will tell.
    starter_waits: bool,
    healed: Healed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Healed {
    Unknown,
    /// A request that joined the refresh succeeded. Its challenge may be the refresh's own doing, if a grant revokes the
    /// tokens before it.
    Joined,
    /// The request that started the refresh succeeded.
    Started,
    /// A request was challenged before and after the refresh.
    No,
}

/// What a request had to do with the refresh that gave it its token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Part {
    #[default]
    None,
    Joined,
    Started,
}

impl ChallengePause {
    pub(super) fn new((min, max): (Duration, Duration)) -> Self {
        let (cool_down, spacing) = (CoolDown::new(min, max), SPACING.clamp(min, max));
        Self { cool_down, min, max, spacing, paced_until: None, refresh: None }
    }

    /// A refresh that a challenge started has published the token of `generation`; the API `accepted` the one before.
    pub(super) fn begin(&mut self, now: Instant, generation: u32, starter_waits: bool, accepted: bool) {
        if accepted {
            self.cool_down = CoolDown::new(self.spacing, self.max);
        }
        self.cool_down.begin(now);
        self.paced_until = self.paced_until.max(Some(now)).and_then(|at| at.checked_add(self.min));
        self.refresh =
            Some(Refresh { published_at: now, generation, starter_waits, healed: Healed::Unknown });
    }

    /// Whether a challenge starts no refresh now; the API has `accepted` the current token.
    pub(super) fn is_active(&self, now: Instant, accepted: bool) -> bool {
        let Some(refresh) = &self.refresh else { return false };
        let age = now.saturating_duration_since(refresh.published_at);
        match refresh.healed {
            Healed::Started => {
                let ahead = self.paced_until.map(|until| until.saturating_duration_since(now));
                ahead.is_some_and(|ahead| ahead > self.min.saturating_mul(BURST))
            }
            // The starter's own answer is the better evidence, and may come a moment later. Where none will come, an endpoint
            // that refuses every token could pass for healed.
            Healed::Joined if refresh.starter_waits => age < self.min,
            _ if accepted => age < self.spacing,
            _ => self.cool_down.is_active(now),
        }
    }

    /// A request that was challenged before it took this `part` in the refresh has succeeded with its token.
    pub(super) fn healed(&mut self, generation: u32, part: Part) {
        if let Some(refresh) = self.of(generation) {
            refresh.healed = match (part, refresh.healed) {
                (Part::Started, _) => Healed::Started,
                (Part::Joined, Healed::Unknown) => Healed::Joined,
                (_, healed) => healed,
            };
        }
    }

    /// A request that was challenged before it took this `part` in the refresh was challenged again with its token.
    pub(super) fn challenged_again(&mut self, generation: u32, part: Part) {
        if let Some(refresh) = self.of(generation) {
            // Once the starter has succeeded, a further challenge is a revocation of the new token.
            if part != Part::None && refresh.healed != Healed::Started {
                refresh.healed = Healed::No;
            }
        }
    }

    fn of(&mut self, generation: u32) -> Option<&mut Refresh> {
        self.refresh.as_mut().filter(|refresh| refresh.generation == generation)
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
