//! [`RetryBudget`]: what retries may add to an API's load.

use std::{sync::OnceLock, time::Duration};

use tower::retry::budget::{Budget as _, TpsBudget};

use crate::error::{Error, Seconds};

/// A budget for the retries of challenged requests: tower's, made for the first of them.
#[derive(Debug)]
pub(crate) struct RetryBudget {
    ttl: Duration,
    min_per_sec: u32,
    ratio: f32,
    made: OnceLock<Box<TpsBudget>>,
}

impl RetryBudget {
    pub(crate) fn new(ttl: Duration, min_per_sec: u32, ratio: f32) -> Self {
        Self { ttl, min_per_sec, ratio, made: OnceLock::new() }
    }

    /// Counts a challenged request, and takes nothing. The ratio is one of these: the budget takes a lock, which a request
    /// that succeeds must not take.
    pub(crate) fn deposit(&self) {
        self.made().deposit();
    }

    /// Takes one retry. Returns false if none is left.
    pub(crate) fn withdraw(&self) -> bool {
        self.made().withdraw()
    }

    fn made(&self) -> &TpsBudget {
        // A positive ratio below 10⁻⁶ would overflow tower's integers. It allows no retry.
        let ratio = if self.ratio < 1e-6 { 0.0 } else { self.ratio };
        self.made.get_or_init(|| Box::new(TpsBudget::new(self.ttl, self.min_per_sec, ratio)))
    }

    pub(crate) fn validate(&self) -> Result<(), Error> {
        let Self { ttl, min_per_sec, ratio, .. } = self;
        let text = format_args!("retry_budget must have 1s <= ttl <= 60s, got {}", Seconds(*ttl));
        Error::check((Duration::from_secs(1)..=Duration::from_secs(60)).contains(ttl), text)?;
        let text = format_args!("retry_budget must have min_per_sec <= 1000000, got {min_per_sec}");
        Error::check(*min_per_sec <= 1_000_000, text)?;
        // No range contains NaN. tower rounds a greater ratio up (tower#857).
        let text = format_args!("retry_budget must have 0 <= ratio <= 0.5, got {ratio}");
        Error::check((0.0..=0.5).contains(ratio), text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An option of a retry budget is out of its range.
    #[tokio::test(start_paused = true)]
    async fn out_of_range_options_are_errors() {
        let second = Duration::from_secs(1);
        let budget = RetryBudget::new;
        let mut invalid =
            vec![budget(second / 2, 1, 0.1), budget(second * 61, 1, 0.1), budget(second, u32::MAX, 0.1)];
        invalid.extend([-0.1, 0.51, f32::NAN, f32::INFINITY].map(|ratio| budget(second, 1, ratio)));
        for budget in invalid {
            assert!(matches!(budget.validate(), Err(Error::InvalidOption(_))), "{budget:?}");
        }
        for ratio in [0.0, f32::MIN_POSITIVE, 1e-6, 0.5] {
            let budget = budget(second, 1_000_000, ratio);
            assert!(budget.validate().is_ok(), "{ratio}");
            budget.deposit();
        }
    }

    /// The retry budget allows a reserve and a share of all challenges.
    #[tokio::test(start_paused = true)]
    async fn budget_allows_reserve_and_share() {
        let budget = RetryBudget::new(Duration::from_secs(1), 3, 0.5);
        let withdrawn = || (0..100).filter(|_| budget.withdraw()).count();
        assert_eq!(withdrawn(), 3);
        (0..10).for_each(|_| budget.deposit());
        assert_eq!(withdrawn(), 5);
    }
}
