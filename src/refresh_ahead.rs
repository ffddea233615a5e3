//! [`RefreshAhead`]: from when on a token is expiring, decided once as it is published.

use std::time::Duration;

use tokio::time::Instant;
use tower::util::rng::{HasherRng, Rng};

use crate::error::{Error, Seconds};

/// How long before its expiry a token is replaced in the background.
///
/// Default: in the last tenth of its life, give or take a tenth of that, so that many processes whose tokens were
/// issued at one moment do not refresh them at one moment. For a token that lives an hour that is 324 to 396 s before
/// its expiry.
///
/// ```
/// use std::time::Duration;
/// use tower_bearer::RefreshAhead;
///
/// // A fifth of the life, but at least one minute and at most ten minutes before the expiry.
/// let ahead = RefreshAhead::new().share(0.2).between(Duration::from_secs(60), Duration::from_secs(600));
/// ```
///
/// # Errors
///
/// The setters accept any value. [`TokenProviderBuilder::build`](crate::TokenProviderBuilder::build) returns
/// [`Error::InvalidOption`] if one is out of its range.
///
/// # Slow sources
///
/// The time ahead is at least twice the time that the source took for the token, and by the jitter more, so that the
/// next one is there in time.
///
/// # Short lives
///
/// The time ahead shrinks with the life: the minimum of [`between`](Self::between), and what a slow source needs, count
/// for at most half of it. At most nine tenths of a life are ahead of the expiry, so that a token of a few seconds is
/// not replaced as soon as it arrives.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RefreshAhead {
    share: f64,
    min: Duration,
    max: Duration,
    jitter: f64,
}

/// The largest part of a token's life that may be ahead of its expiry, jitter included.
const MAX_SHARE: f64 = 0.9;

const MAX_JITTER: f64 = 0.5;

impl RefreshAhead {
    /// The last tenth of the life, give or take a tenth of that.
    pub fn new() -> Self {
        Self { share: 0.1, min: Duration::ZERO, max: Duration::MAX, jitter: 0.1 }
    }

    /// Sets the share of the life, from 0 to 0.9. Default: 0.1.
    pub fn share(mut self, share: f64) -> Self {
        self.share = share;
        self
    }

    /// Sets the minimum and the maximum time before the expiry. Default: zero, and no maximum. `min` must not be more
    /// than `max`.
    pub fn between(mut self, min: Duration, max: Duration) -> Self {
        (self.min, self.max) = (min, max);
        self
    }

    /// Sets by which part of itself the time ahead varies at random, either way, from 0 to 0.5. Default: 0.1.
    pub fn jitter(mut self, jitter: f64) -> Self {
        self.jitter = jitter;
        self
    }

    pub(crate) fn validate(&self) -> Result<(), Error> {
        let Self { share, min, max, jitter } = self;
        let text = format_args!("refresh_ahead: share must be >= 0 and <= 0.9, got {share}");
        Error::check((0.0..=MAX_SHARE).contains(share), text)?;
        let (least, most) = (Seconds(*min), Seconds(*max));
        let text = format_args!("refresh_ahead: need min <= max, got {least} and {most}");
        Error::check(min <= max, text)?;
        let text = format_args!("refresh_ahead: jitter must be >= 0 and <= 0.5, got {jitter}");
        Error::check((0.0..=MAX_JITTER).contains(jitter), text)
    }

    /// Half as long before the expiry.
    pub(crate) fn halved(self) -> Self {
        Self { share: self.share / 2.0, min: self.min / 2, max: self.max / 2, ..self }
    }

    /// When a token that lives for `life` from `now` on begins to be expiring, if the source `took` this long for it.
    pub(crate) fn refresh_at(&self, now: Instant, life: Duration, took: Duration) -> Instant {
        let half = life / 2;
        let ahead = life.mul_f64(self.share).max(self.min.min(half)).min(self.max);
        let spread = 1.0 + self.jitter * (2.0 * HasherRng::new().next_f64() - 1.0);
        // Shares of a life, which has been clamped: nothing here overflows.
        // What a slow source needs is only ever exceeded.
        let needed =
            took.saturating_mul(2).min(half).mul_f64(1.0 + self.jitter * HasherRng::new().next_f64());
        let ahead = ahead.mul_f64(spread).max(needed).min(life.mul_f64(MAX_SHARE));
        now + (life - ahead)
    }
}

impl Default for RefreshAhead {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// How long before its expiry a token of this life is expiring, at least and at most.
    fn ahead(options: RefreshAhead, life: Duration) -> (f64, f64) {
        ahead_if_it_took(options, life, Duration::ZERO)
    }

    fn ahead_if_it_took(options: RefreshAhead, life: Duration, took: Duration) -> (f64, f64) {
        let now = Instant::now();
        let ahead =
            || (now + life).saturating_duration_since(options.refresh_at(now, life, took)).as_secs_f64();
        (0..1000)
            .map(|_| ahead())
            .fold((f64::MAX, 0.0), |(least, most), ahead| (ahead.min(least), ahead.max(most)))
    }

    fn assert_near(found: (f64, f64), least: f64, most: f64) {
        let (width, slack) = (most - least, 0.05 * (most - least) + 1e-6);
        assert!(found.0 >= least - 1e-6 && found.0 <= least + slack, "{found:?}, not from {least}");
        assert!(found.1 <= most + 1e-6 && found.1 >= most - slack, "{found:?}, not to {most} ({width})");
    }

    /// A token expires after seconds, hours or days: it is expiring in the last tenth of its life.
    #[test]
    fn token_is_expiring_in_last_tenth() {
        for life in [3600, 60, 2, 1] {
            let tenth = f64::from(life) / 10.0;
            assert_near(ahead(RefreshAhead::new(), SECOND * life), tenth * 0.9, tenth * 1.1);
        }
    }

    /// Tokens expire after a few seconds, or after months.
    #[test]
    fn max_caps_and_short_life_shrinks_min() {
        let exact = RefreshAhead::new().jitter(0.0);
        let options = exact.between(SECOND * 60, SECOND * 100);
        for (life, expected) in [(3600, 100), (800, 80), (300, 60), (100, 50), (2, 1)] {
            assert_near(ahead(options, SECOND * life), f64::from(expected), f64::from(expected));
        }
        let widest = RefreshAhead::new().share(0.9).jitter(0.5);
        assert_near(ahead(widest, SECOND * 10), 4.5, 9.0);
        let none = exact.share(0.0);
        assert_near(ahead(none, SECOND * 10), 0.0, 0.0);
    }

    /// The source takes so long that the last tenth of a token's life is too short.
    #[test]
    fn a_slow_source_is_asked_in_time() {
        let took = |took| ahead_if_it_took(RefreshAhead::new(), SECOND * 100, took);
        assert_near(took(SECOND * 2), 9.0, 11.0);
        assert_near(took(SECOND * 20), 40.0, 44.0);
        assert_near(took(Duration::MAX), 50.0, 55.0);
    }

    /// A lifetime or a bound is huge, and must not overflow.
    #[test]
    fn huge_life_or_bound_does_not_overflow() {
        let century = SECOND * (100 * 365 * 24 * 3600);
        for options in [RefreshAhead::new(), RefreshAhead::new().between(Duration::MAX, Duration::MAX)] {
            assert!(ahead(options, century).1 > 0.0);
        }
    }

    /// An option of the refresh-ahead time is out of its range.
    #[test]
    fn out_of_range_options_are_errors() {
        for share in [-0.1, 0.91, f64::NAN, f64::INFINITY] {
            assert!(RefreshAhead::new().share(share).validate().is_err(), "{share}");
        }
        for jitter in [-0.1, 0.51, f64::NAN] {
            assert!(RefreshAhead::new().jitter(jitter).validate().is_err(), "{jitter}");
        }
        assert!(RefreshAhead::new().between(SECOND, Duration::ZERO).validate().is_err());
        assert!(RefreshAhead::new().share(0.9).jitter(0.5).validate().is_ok());
    }
}
