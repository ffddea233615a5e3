//! [`RetryPolicy`]: the number of retries, their backoff and their budget, on tower's backoff and budget.

use std::{
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use tokio::time::Instant;
use tower::{
    retry::{
        backoff::{Backoff as _, ExponentialBackoff, ExponentialBackoffMaker, MakeBackoff},
        budget::{Budget as _, TpsBudget},
    },
    util::rng::{HasherRng, Rng},
};

use crate::error::{Error, seconds};

const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
const BUDGET: (Duration, u32, f32) = (Duration::from_secs(10), 10, 0.2);

/// The number of retries, the backoff between them, and the retry budget.
///
/// The layer uses one for challenged requests, and the provider one for a token source that fails.
///
/// ```
/// use std::time::Duration;
/// use tower_bearer::RetryPolicy;
///
/// let policy = RetryPolicy::new()
///     .max_retries(3)
///     .backoff(Duration::from_millis(50), Duration::from_secs(2))
///     .budget(Duration::from_secs(10), 10, 0.2);
/// ```
///
/// # Errors
///
/// An option out of its range is [`Error::InvalidOption`]. A provider's policy is checked by
/// [`TokenProviderBuilder::build`](crate::TokenProviderBuilder::build), a layer's by the first request.
///
/// # Backoff
///
/// The *n*th delay is random between `min` and `min`·2ⁿ, or `max` if that is less (full jitter, with
/// [`tower::retry::backoff`]). Clients that failed at the same time therefore do not retry at the same time.
///
/// # Budget
///
/// The first retry of a request is free if it has a newer token that the API has not challenged: each token is
/// challenged at most once per request, and tokens are renewed at most once per cool-down. Every further retry is
/// charged, and so is a retry with a token that was challenged already. The budget therefore bounds what requests that
/// the API always challenges add to its load: by default, 10 retries per second and a fifth of the challenged requests.
/// All clones of the policy share the budget ([`tower::retry::budget`]). With
/// `BearerAuthLayer::by_key`, each tenant has a budget of its own.
#[derive(Clone, Debug)]
pub struct RetryPolicy {
    max_retries: u32,
    backoff: (Duration, Duration),
    budget: Option<Arc<Budget>>,
}

impl RetryPolicy {
    /// Makes the default policy: 2 retries, 100 ms to 5 s of backoff, and a budget of 10 retries per second and 20 % of
    /// the challenged requests, counted over 10 s.
    pub fn new() -> Self {
        let (ttl, min_per_sec, ratio) = BUDGET;
        Self {
            max_retries: 2,
            backoff: BACKOFF,
            budget: Some(Arc::new(Budget::new(ttl, min_per_sec, ratio))),
        }
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

    /// Sets the budget: `min_per_sec` retries per second, and `ratio` of the requests challenged within `ttl`.
    ///
    /// Default: 10 s, 10 per second, 0.2. A provider's refreshes do not use the budget, because only one runs at a
    /// time.
    ///
    /// `ttl` must be 1 to 60 seconds, `min_per_sec` at most a million, and `ratio` 0 to 0.5 (tower rounds a greater one
    /// up: [tower#857]).
    ///
    /// [tower#857]: https://github.com/tower-rs/tower/issues/857
    pub fn budget(mut self, ttl: Duration, min_per_sec: u32, ratio: f32) -> Self {
        self.budget = Some(Arc::new(Budget::new(ttl, min_per_sec, ratio)));
        self
    }

    /// Removes the budget. [`max_retries`](Self::max_retries) is then the only limit.
    pub fn without_budget(mut self) -> Self {
        self.budget = None;
        self
    }

    /// Checks the options.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if one is out of its range.
    pub(crate) fn validate(&self) -> Result<(), Error> {
        let (min, max) = self.backoff;
        if backoff_maker(min, max).is_none() {
            let (min, max) = (seconds(min), seconds(max));
            return Err(Error::InvalidOption(
                format!("backoff must have min <= max and 0 < max <= 1h, got {min} and {max}").into(),
            ));
        }
        self.budget.as_deref().map_or(Ok(()), Budget::validate)
    }

    pub(crate) fn retries(&self) -> u32 {
        self.max_retries
    }

    /// Makes the backoff of one request or one refresh. A policy that is not valid gets the default backoff.
    pub(crate) fn make_backoff(&self) -> Backoff {
        Backoff::between(self.backoff)
    }

    /// Counts a challenged request. The budget's ratio is a ratio of these.
    ///
    /// tower's own `Retry` counts all requests. The budget takes a lock, which a request that succeeds must not take.
    /// `budgets`: those of the request's tenant, if each has its own.
    pub(crate) fn deposit(&self, budgets: Option<&Budgets>) {
        if let Some(budget) = self.budget_of(budgets) {
            budget.tps.deposit();
        }
    }

    /// Takes one retry from the budget. Returns false if none is left.
    pub(crate) fn withdraw(&self, budgets: Option<&Budgets>) -> bool {
        self.budget_of(budgets).is_none_or(|budget| budget.tps.withdraw())
    }

    fn budget_of(&self, budgets: Option<&Budgets>) -> Option<Arc<Budget>> {
        let budget = self.budget.as_ref()?;
        Some(budgets.map_or_else(|| Arc::clone(budget), |budgets| budgets.of(budget)))
    }
}

/// The retry budgets of one tenant: one for each policy, made at the tenant's first challenge.
#[derive(Debug, Default)]
pub struct Budgets(Mutex<Vec<(Weak<Budget>, Arc<Budget>)>>);

impl Budgets {
    /// Returns the tenant's budget for requests of this policy.
    fn of(&self, policy: &Arc<Budget>) -> Arc<Budget> {
        let mut budgets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, own)) = budgets.iter().find(|(of, _)| std::ptr::eq(of.as_ptr(), Arc::as_ptr(policy)))
        {
            return Arc::clone(own);
        }
        // A program may make layers for as long as the tenant lives.
        budgets.retain(|(of, _)| of.strong_count() > 0);
        let own = Arc::new(Budget::new(policy.ttl, policy.min_per_sec, policy.ratio));
        budgets.push((Arc::downgrade(policy), Arc::clone(&own)));
        own
    }
}

/// The options of the budget, and the budget itself.
#[derive(Debug)]
struct Budget {
    ttl: Duration,
    min_per_sec: u32,
    ratio: f32,
    tps: TpsBudget,
}

impl Budget {
    /// Makes a budget. If an option is out of its range, which would make tower panic, the budget is the default one.
    fn new(ttl: Duration, min_per_sec: u32, ratio: f32) -> Self {
        let mut budget = Self { ttl, min_per_sec, ratio, tps: TpsBudget::new(BUDGET.0, BUDGET.1, BUDGET.2) };
        if budget.validate().is_ok() {
            // A positive ratio below 10⁻⁶ would overflow tower's integers. It allows no retry.
            let ratio = if ratio < 1e-6 { 0.0 } else { ratio };
            budget.tps = TpsBudget::new(ttl, min_per_sec, ratio);
        }
        budget
    }

    fn validate(&self) -> Result<(), Error> {
        let Self { ttl, min_per_sec, ratio, .. } = self;
        let invalid = |text: String| Err(Error::InvalidOption(text.into()));
        if !(Duration::from_secs(1)..=Duration::from_secs(60)).contains(ttl) {
            return invalid(format!("budget must have 1s <= ttl <= 60s, got {}", seconds(*ttl)));
        }
        if *min_per_sec > 1_000_000 {
            return invalid(format!("budget must have min_per_sec <= 1000000, got {min_per_sec}"));
        }
        // No range contains NaN.
        if !(0.0..=0.5).contains(ratio) {
            return invalid(format!("budget must have 0 <= ratio <= 0.5, got {ratio}"));
        }
        Ok(())
    }
}

/// The delays between consecutive attempts.
#[derive(Debug)]
pub(crate) struct Backoff {
    min: Duration,
    /// The upper bound of the next delay. It grows to `max`, where tower has no jitter left.
    bound: ExponentialBackoff,
    rng: HasherRng,
}

impl Backoff {
    /// Makes a backoff between `min` and `max`. If they are out of range, it is the default one.
    pub(crate) fn between((min, max): (Duration, Duration)) -> Self {
        let (min, mut maker) = match backoff_maker(min, max) {
            Some(maker) => (min, maker),
            None => (BACKOFF.0, backoff_maker(BACKOFF.0, BACKOFF.1).unwrap_or_default()),
        };
        Self { min, bound: maker.make_backoff(), rng: HasherRng::new() }
    }

    /// Returns the delay before the next attempt. Needs a runtime's clock, as tower's backoff does.
    pub(crate) fn next_delay(&mut self) -> Duration {
        let bound = self.bound.next_backoff().deadline().saturating_duration_since(Instant::now());
        self.min + bound.saturating_sub(self.min).mul_f64(self.rng.next_f64())
    }
}

/// Returns tower's backoff between `min` and `max`, or `None` if they are out of range.
fn backoff_maker(min: Duration, max: Duration) -> Option<ExponentialBackoffMaker> {
    if max > Duration::from_secs(60 * 60) {
        return None;
    }
    ExponentialBackoffMaker::new(min, max, 1.0, HasherRng::default()).ok()
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self::new()
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
        let mut backoff = RetryPolicy::new().backoff(min, max).make_backoff();
        (0..10).for_each(|_| _ = backoff.next_delay());
        let mut quarters = [0; 4];
        for _ in 0..4000 {
            let share = (backoff.next_delay() - min).as_secs_f64() / (max - min).as_secs_f64();
            quarters[((share * 4.0) as usize).min(3)] += 1;
        }
        assert!(quarters.iter().all(|count| (800..1200).contains(count)), "{quarters:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn out_of_range_options_are_errors() {
        let (policy, second) = (RetryPolicy::new, Duration::from_secs(1));
        let mut invalid = vec![
            policy().backoff(second, second / 2),
            policy().backoff(Duration::ZERO, Duration::ZERO),
            policy().backoff(second, second * 3601),
            policy().backoff(second, Duration::MAX),
            policy().budget(second / 2, 1, 0.1),
            policy().budget(second * 61, 1, 0.1),
            policy().budget(second, u32::MAX, 0.1),
        ];
        invalid.extend([-0.1, 0.51, f32::NAN, f32::INFINITY].map(|ratio| policy().budget(second, 1, ratio)));
        for policy in invalid {
            assert!(matches!(policy.validate(), Err(Error::InvalidOption(_))), "{policy:?}");
            // If it is used without `validate`, it has the default backoff and budget.
            assert!(policy.make_backoff().next_delay() <= second);
            policy.deposit(None);
            assert!(policy.withdraw(None));
        }
        for ratio in [0.0, f32::MIN_POSITIVE, 1e-6, 0.5] {
            assert!(policy().budget(second, 1_000_000, ratio).validate().is_ok(), "{ratio}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn budget_allows_reserve_and_share() {
        let policy = RetryPolicy::new().budget(Duration::from_secs(1), 3, 0.5);
        let withdrawn = || (0..100).filter(|_| policy.withdraw(None)).count();
        assert_eq!(withdrawn(), 3);
        (0..10).for_each(|_| policy.deposit(None));
        assert_eq!(withdrawn(), 5);
        assert!(policy.clone().without_budget().withdraw(None));
    }
}
