//! [`RetryPolicy`]: how often and how soon something is tried again. [`Backoff`]: the delays between the attempts.

use std::time::Duration;

use tower::util::rng::{HasherRng, Rng};

use crate::error::{Error, Seconds};

const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// A backoff that starts with less grows from this.
const LEAST_BOUND: Duration = Duration::from_millis(50);

const HOUR: Duration = Duration::from_secs(60 * 60);

/// The number of retries, and the backoff between them.
///
/// The layer uses one for challenged requests, and the provider one for a token source that fails.
///
/// ```
/// use std::time::Duration;
/// use tower_bearer::RetryPolicy;
///
/// let policy = RetryPolicy::new().max_retries(3).backoff(Duration::from_millis(50), Duration::from_secs(2));
/// ```
///
/// # Errors
///
/// An option out of its range is [`Error::InvalidOption`]. A provider's policy is checked by
/// [`TokenProviderBuilder::build`](crate::TokenProviderBuilder::build), a layer's by the first request.
///
/// # Backoff
///
/// The *n*th delay is random between `min` and `min`·2ⁿ (or 50 ms·2ⁿ if `min` is less), and at most `max` (full
/// jitter). Clients that failed at the same time therefore do not retry at the same time.
///
/// The first retry of a challenged request with a newer token is immediate. The last of several also waits until a token
/// that the API has not accepted yet is a second old, whatever `max` is: an API may know it later than its issuer.
///
/// Each request begins with the shortest delay. The delays of a provider continue from one failed refresh to the next.
///
/// # Budget
///
/// What the retries of challenged requests add to the load of an API is also bounded by the provider's
/// [`retry_budget`](crate::TokenProviderBuilder::retry_budget).
#[derive(Clone, Copy, Debug)]
pub struct RetryPolicy {
    max_retries: u32,
    backoff: (Duration, Duration),
}

impl RetryPolicy {
    /// Makes the default policy: 2 retries, 100 ms to 5 s of backoff.
    pub fn new() -> Self {
        Self { max_retries: 2, backoff: BACKOFF }
    }

    /// Sets the maximum number of retries of one request, or of one refresh. Default: 2. 0 turns retries off.
    pub fn max_retries(mut self, max_retries: u32) -> Self {
        self.max_retries = max_retries;
        self
    }

    /// Sets the minimum and the maximum delay before a retry. Default: 100 ms and 5 s.
    ///
    /// `max` must be more than zero, at least `min`, and at most an hour.
    pub fn backoff(mut self, min: Duration, max: Duration) -> Self {
        self.backoff = (min, max);
        self
    }

    pub(crate) fn validate(&self) -> Result<(), Error> {
        let (min, max) = self.backoff;
        let (least, most) = (Seconds(min), Seconds(max));
        let text = format_args!("backoff must have min <= max and 0 < max <= 1h, got {least} and {most}");
        Error::check(min <= max && !max.is_zero() && max <= HOUR, text)
    }

    pub(crate) fn retries(&self) -> u32 {
        self.max_retries
    }

    /// Makes the backoff of one request or one refresh. A policy that is not valid gets the default backoff.
    pub(crate) fn make_backoff(&self) -> Backoff {
        Backoff::between(if self.validate().is_ok() { self.backoff } else { BACKOFF })
    }
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self::new()
    }
}

/// The delays between consecutive attempts.
///
/// tower's backoff needs a runtime, and does not grow from zero.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Backoff {
    min: Duration,
    max: Duration,
    /// The upper bound of the last delay.
    bound: Duration,
}

impl Backoff {
    pub(crate) fn between((min, max): (Duration, Duration)) -> Self {
        Self { min, max, bound: min.max(LEAST_BOUND) }
    }

    /// Returns the delay before the next attempt.
    pub(crate) fn next_delay(&mut self) -> Duration {
        self.bound = self.bound.saturating_mul(2).min(self.max);
        self.min + self.bound.saturating_sub(self.min).mul_f64(HasherRng::new().next_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The backoff overflows after a million failures.
    #[tokio::test(start_paused = true)]
    async fn million_backoffs_stay_in_bounds() {
        let (min, max) = (Duration::from_millis(100), Duration::from_secs(5));
        let mut backoff = RetryPolicy::new().make_backoff();
        for failure in 1..=1_000_000_u32 {
            let bound = min.checked_mul(2_u32.saturating_pow(failure)).unwrap_or(max).min(max);
            let delay = backoff.next_delay();
            assert!(delay >= min && delay <= bound, "failure {failure}: {delay:?}");
        }
    }

    /// An auth endpoint is down: its clients retry at one moment.
    #[tokio::test(start_paused = true)]
    async fn longest_delay_has_full_jitter() {
        let (min, max) = (Duration::from_secs(1), Duration::from_secs(9));
        let mut backoff = RetryPolicy::new().backoff(min, max).make_backoff();
        (0..10).for_each(|_| _ = backoff.next_delay());
        let mut quarters = [0; 4];
        for _ in 0..4000 {
            let share = (backoff.next_delay() - min).as_secs_f64() / (max - min).as_secs_f64();
            quarters[((share * 4.0) as usize).min(3)] += 1;
        }
        assert!(quarters.iter().all(|count| (800..1200).contains(count)), "{quarters:?}");
    }

    /// An option of a retry policy is out of its range.
    #[tokio::test(start_paused = true)]
    async fn out_of_range_options_are_errors() {
        let (policy, second) = (RetryPolicy::new, Duration::from_secs(1));
        let invalid = [
            policy().backoff(second, second / 2),
            policy().backoff(Duration::ZERO, Duration::ZERO),
            policy().backoff(second, second * 3601),
            policy().backoff(second, Duration::MAX),
        ];
        for policy in invalid {
            assert!(matches!(policy.validate(), Err(Error::InvalidOption(_))), "{policy:?}");
            // If it is used without `validate`, it has the default backoff.
            assert!(policy.make_backoff().next_delay() <= second);
        }
    }

    /// A backoff that starts from zero never grows.
    #[test]
    fn backoff_from_zero_backs_off() {
        let second = Duration::from_secs(1);
        let mut backoff = Backoff::between((Duration::ZERO, 5 * second));
        let total: Duration = (0..100).map(|_| backoff.next_delay()).sum();
        assert!(total > 100 * second, "{total:?}");
        for max in [Duration::from_nanos(1), HOUR] {
            let mut backoff = Backoff::between((max, max));
            assert!((0..100).all(|_| backoff.next_delay() == max));
        }
    }
}
