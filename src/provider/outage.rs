//! [`Outage`]: the failures since the newest token, and which of them are news to an operator.

use std::{
    mem::{Discriminant, discriminant},
    time::Duration,
};

use tokio::time::Instant;

use crate::observability::TokenLeft;

/// The failures since the newest token was published.
///
/// The first of each kind is news, and so is the first after the current token was challenged or has expired. The others are repetitions:
/// an outage that lasts for hours takes a few lines in the log.
#[derive(Debug, Default)]
pub(super) struct Outage {
    since: Option<Instant>,
    refreshes: u64,
    requests: u64,
    /// What callers had when the newest refresh failed; `None` before the first.
    left: Option<Discriminant<TokenLeft>>,
}

/// A failure, and what it adds to those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Counted {
    /// Whether it is news. Otherwise it repeats what was reported.
    pub(crate) is_news: bool,
    /// How many failures of this kind there were since the newest token, this one included.
    pub(crate) failures: u64,
}

/// What an outage was, at its end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Recovered {
    pub(crate) failed_refreshes: u64,
    pub(crate) failed_requests: u64,
    pub(crate) lasted: Duration,
}

impl Outage {
    /// Records that an attempt of a refresh has failed. Returns whether it is news.
    pub(super) fn attempt_failed(&mut self, now: Instant) -> bool {
        self.since.replace(self.since.unwrap_or(now)).is_none()
    }

    /// Records that a refresh has failed, and what callers have meanwhile.
    pub(super) fn refresh_failed(&mut self, now: Instant, left: TokenLeft) -> Counted {
        self.since.get_or_insert(now);
        self.refreshes += 1;
        let left = discriminant(&left);
        let is_news = self.left.replace(left) != Some(left);
        Counted { is_news, failures: self.refreshes }
    }

    /// Records that a request has failed because there is no token.
    pub(super) fn request_failed(&mut self, now: Instant) -> Counted {
        self.since.get_or_insert(now);
        self.requests += 1;
        Counted { is_news: self.requests == 1, failures: self.requests }
    }

    /// Ends with a token. `None` if nothing but attempts has failed.
    pub(super) fn end(&mut self, now: Instant) -> Option<Recovered> {
        let Self { since, refreshes, requests, .. } = std::mem::take(self);
        let lasted = now.saturating_duration_since(since?);
        (refreshes + requests > 0).then_some(Recovered {
            failed_refreshes: refreshes,
            failed_requests: requests,
            lasted,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_change_is_news_once() {
        let (mut outage, now) = (Outage::default(), Instant::now());
        assert!(outage.attempt_failed(now));
        assert!(!outage.attempt_failed(now));
        let works = |seconds| TokenLeft::Works(Some(Duration::from_secs(seconds)));
        for (left, is_news) in [
            (works(9), true),
            (works(8), false),
            (TokenLeft::Challenged, true),
            (TokenLeft::None, true),
            (TokenLeft::None, false),
        ] {
            assert_eq!(outage.refresh_failed(now, left).is_news, is_news, "{left:?}");
        }
        assert_eq!(outage.request_failed(now), Counted { is_news: true, failures: 1 });
        assert_eq!(outage.request_failed(now), Counted { is_news: false, failures: 2 });

        let recovered = outage.end(now + Duration::from_secs(7)).unwrap();
        assert_eq!((recovered.failed_refreshes, recovered.failed_requests), (5, 2));
        assert_eq!(recovered.lasted, Duration::from_secs(7));
        assert!(outage.end(now).is_none());
        assert!(outage.attempt_failed(now));
        assert!(outage.end(now).is_none(), "a retry has helped: no outage");
    }
}
