//! [`RetryPolicy`]: how often, how soon and how much is tried again, on tower's backoff and budget.

use std::{fmt, sync::Arc, time::Duration};

use tokio::time::Instant;
use tower::{
    retry::{
        backoff::{Backoff as _, ExponentialBackoff, ExponentialBackoffMaker, MakeBackoff},
        budget::{Budget, TpsBudget},
    },
    util::rng::{HasherRng, Rng},
};

use crate::error::Error;

/// How often, how soon and how much is tried again.
///
/// The layer uses one for requests that were challenged, the provider one for a token source that fails. A policy is
/// checked as it is made:
///
/// ```
/// use std::time::Duration;
/// use tower_bearer::RetryPolicy;
///
/// let policy = RetryPolicy::new()
///     .max_retries(3)
///     .backoff(Duration::from_millis(50), Duration::from_secs(2))?
///     .budget(Duration::from_secs(10), 10, 0.2)?;
/// assert!(policy.backoff(Duration::from_secs(1), Duration::ZERO).is_err());
/// # Ok::<(), tower_bearer::Error>(())
/// ```
///
/// # Backoff
///
/// The *n*th delay is drawn from the whole range between `min` and `min`·2ⁿ, or `max` where that is less (full jitter, over
/// [`tower::retry::backoff`]): however many clients failed at once, they do not come back at once.
///
/// # Budget
///
/// A request that is refused is sent again with a newer token, at no charge: each token is refused at most once per
/// request, and tokens are renewed at most once per cool-down. What is charged is every further retry, and a retry
/// with a token that was refused already. So requests that the API refuses for good cannot multiply its load. The
/// budget is shared by all clones of the policy ([`tower::retry::budget`]).
#[derive(Clone)]
pub struct RetryPolicy {
    max_retries: u32,
    min_delay: Duration,
    backoff: ExponentialBackoffMaker,
    budget: Option<Arc<TpsBudget>>,
}

impl RetryPolicy {
    /// The policy for requests: 2 retries, 100 ms to 5 s of backoff, a budget of 10 retries a second and 20 % of the
    /// challenged requests, counted over 10 s.
    pub fn new() -> Self {
        let min_delay = Duration::from_millis(100);
        Self {
            max_retries: 2,
            min_delay,
            backoff: backoff_maker(min_delay, Duration::from_secs(5)).unwrap_or_default(),
            budget: Some(Arc::new(TpsBudget::new(Duration::from_secs(10), 10, 0.2))),
        }
    }

    /// Sets how often one request, or one refresh, is tried again at most. Default: 2; 0 turns retries off.
    pub fn max_retries(mut self, max_retries: u32) -> Self {
        self.max_retries = max_retries;
        self
    }

    /// Sets the least and the most delay before a retry. Default: 100 ms and 5 s.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if `max` is zero, less than `min`, or more than an hour.
    pub fn backoff(mut self, min: Duration, max: Duration) -> Result<Self, Error> {
        self.backoff = backoff_maker(min, max)?;
        self.min_delay = min;
        Ok(self)
    }

    /// Sets the budget: `min_per_sec` retries a second, and `ratio` of the requests challenged within `ttl`.
    ///
    /// Default: 10 s, 10 a second, 0.2. A provider's refreshes take nothing from it: there is one at a time.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if `ttl` is not between 1 and 60 seconds, `min_per_sec` is over a million, or `ratio` is
    /// not between 0 and 0.5 (a greater one is rounded up by tower: [tower#857]).
    ///
    /// [tower#857]: https://github.com/tower-rs/tower/issues/857
    pub fn budget(mut self, ttl: Duration, min_per_sec: u32, ratio: f32) -> Result<Self, Error> {
        if !(Duration::from_secs(1)..=Duration::from_secs(60)).contains(&ttl) {
            return Err(Error::InvalidOption("a retry budget's ttl is between 1 and 60 seconds".into()));
        }
        if min_per_sec > 1_000_000 {
            return Err(Error::InvalidOption(
                "a retry budget allows at most a million retries a second".into(),
            ));
        }
        // NaN is in no range. A ratio this side of 10⁻⁶ would overflow tower's integers; it allows nothing.
        if !(0.0..=0.5).contains(&ratio) {
            return Err(Error::InvalidOption("a retry budget's ratio is between 0 and 0.5".into()));
        }
        let ratio = if ratio < 1e-6 { 0.0 } else { ratio };
        self.budget = Some(Arc::new(TpsBudget::new(ttl, min_per_sec, ratio)));
        Ok(self)
    }

    /// Removes the budget: only [`max_retries`](Self::max_retries) bounds what is tried again.
    pub fn without_budget(mut self) -> Self {
        self.budget = None;
        self
    }

    pub(crate) fn retries(&self) -> u32 {
        self.max_retries
    }

    pub(crate) fn make_backoff(&self) -> Backoff {
        Backoff { min: self.min_delay, bound: self.backoff.clone().make_backoff(), rng: HasherRng::new() }
    }

    /// Counts a challenged request: the budget is a share of these.
    ///
    /// Not of all requests, as tower's own `Retry` counts: the budget takes a lock, which the happy path must not.
    pub(crate) fn deposit(&self) {
        if let Some(budget) = &self.budget {
            budget.deposit();
        }
    }

    /// Whether one more retry is within the budget.
    pub(crate) fn withdraw(&self) -> bool {
        self.budget.as_ref().is_none_or(|budget| budget.withdraw())
    }
}

/// The delays between attempts that follow each other.
#[derive(Debug)]
pub(crate) struct Backoff {
    min: Duration,
    /// Grows to `max`, where tower has no jitter left.
    bound: ExponentialBackoff,
    rng: HasherRng,
}

impl Backoff {
    /// How long to wait before the next attempt. Needs a runtime's clock, as tower's backoff does.
    pub(crate) fn next_delay(&mut self) -> Duration {
        let bound = self.bound.next_backoff().deadline().saturating_duration_since(Instant::now());
        self.min + bound.saturating_sub(self.min).mul_f64(self.rng.next_f64())
    }
}

fn backoff_maker(min: Duration, max: Duration) -> Result<ExponentialBackoffMaker, Error> {
    if max > Duration::from_secs(60 * 60) {
        return Err(Error::InvalidOption("a backoff's most delay is at most an hour".into()));
    }
    ExponentialBackoffMaker::new(min, max, 1.0, HasherRng::default())
        .map_err(|error| Error::InvalidOption(error.to_string().into()))
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for RetryPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RetryPolicy")
            .field("max_retries", &self.max_retries)
            .field("backoff", &self.backoff)
            .field("budget", &self.budget)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Row 18.
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

    /// Row 19.
    #[tokio::test(start_paused = true)]
    async fn longest_delay_has_full_jitter() {
        let (min, max) = (Duration::from_secs(1), Duration::from_secs(9));
        let mut backoff = RetryPolicy::new().backoff(min, max).unwrap().make_backoff();
        (0..10).for_each(|_| _ = backoff.next_delay());
        let mut quarters = [0; 4];
        for _ in 0..4000 {
            let share = (backoff.next_delay() - min).as_secs_f64() / (max - min).as_secs_f64();
            quarters[((share * 4.0) as usize).min(3)] += 1;
        }
        assert!(quarters.iter().all(|count| (800..1200).contains(count)), "{quarters:?}");
    }

    #[test]
    fn out_of_range_options_are_errors() {
        let second = Duration::from_secs(1);
        assert!(RetryPolicy::new().backoff(second, second / 2).is_err());
        assert!(RetryPolicy::new().backoff(Duration::ZERO, Duration::ZERO).is_err());
        assert!(RetryPolicy::new().backoff(second, second * 3601).is_err());
        assert!(RetryPolicy::new().budget(second / 2, 1, 0.1).is_err());
        assert!(RetryPolicy::new().budget(second * 61, 1, 0.1).is_err());
        assert!(RetryPolicy::new().budget(second, u32::MAX, 0.1).is_err());
        for ratio in [-0.1, 0.51, f32::NAN, f32::INFINITY] {
            assert!(RetryPolicy::new().budget(second, 1, ratio).is_err(), "{ratio}");
        }
        for ratio in [0.0, f32::MIN_POSITIVE, 1e-6, 0.5] {
            assert!(RetryPolicy::new().budget(second, 1_000_000, ratio).is_ok(), "{ratio}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn budget_allows_reserve_and_share() {
        let policy = RetryPolicy::new().budget(Duration::from_secs(1), 3, 0.5).unwrap();
        let withdrawn = || (0..100).filter(|_| policy.withdraw()).count();
        assert_eq!(withdrawn(), 3);
        (0..10).for_each(|_| policy.deposit());
        assert_eq!(withdrawn(), 5);
        assert!(policy.clone().without_budget().withdraw());
    }
}
