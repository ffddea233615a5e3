//! [`Outage`]: the failures since the newest token, and which of them are news to an operator.

use std::{
    mem::{Discriminant, discriminant},
    time::Duration,
};

use tokio::time::Instant;

use crate::observability::TokenLeft;

/// The failures since the newest token was published.
///
/// A failure is news if there was none of its kind and for its reason before. The others are repetitions: an outage
/// that lasts for hours takes a few lines in the log.
#[derive(Debug, Default)]
pub(super) struct Outage {
    since: Option<Instant>,
    refreshes: u64,
    requests: u64,
    /// The kinds and the reasons of the failures so far. Both are from small fixed sets.
    seen: Vec<(Kind, &'static str)>,
}

/// The reason of a request that was dropped while it waited.
pub(super) const GIVEN_UP: &str = "cancelled";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Attempt,
    /// A refresh, by what callers have meanwhile.
    Refresh(Discriminant<TokenLeft>),
    Request,
}

/// A failure, and what it adds to those before it. By default, it is not part of an outage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counted {
    /// Whether it is news. Otherwise it repeats what was reported.
    pub(crate) is_news: bool,
    /// The number of failed refreshes, or of failed requests, since the newest token, with this one.
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
    fn is_news(&mut self, now: Instant, kind: Kind, reason: &'static str) -> bool {
        self.since.get_or_insert(now);
        let is_news = !self.seen.contains(&(kind, reason));
        self.seen.extend(is_news.then_some((kind, reason)));
        is_news
    }

    /// Records that an attempt of a refresh has failed. Returns whether it is news.
    pub(super) fn attempt_failed(&mut self, now: Instant, reason: &'static str) -> bool {
        self.is_news(now, Kind::Attempt, reason)
    }

    /// Records that a refresh has failed, and what callers have meanwhile.
    pub(super) fn refresh_failed(&mut self, now: Instant, left: TokenLeft, reason: &'static str) -> Counted {
        self.refreshes += 1;
        let is_news = self.is_news(now, Kind::Refresh(discriminant(&left)), reason);
        Counted { is_news, failures: self.refreshes }
    }

    /// Records that a request has failed because there is no token.
    pub(super) fn request_failed(&mut self, now: Instant, reason: &'static str) -> Counted {
        self.requests += 1;
        Counted { is_news: self.is_news(now, Kind::Request, reason), failures: self.requests }
    }

    /// Ends the outage with a token. Returns `None` if no refresh and no request has failed.
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
    fn each_kind_and_reason_is_news_once() {
        let (mut outage, now) = (Outage::default(), Instant::now());
        assert!(outage.attempt_failed(now, "unavailable"));
        assert!(outage.attempt_failed(now, "invalid_response"));
        assert!(!outage.attempt_failed(now, "unavailable"));
        let works = |seconds| TokenLeft::Works(Some(Duration::from_secs(seconds)));
        for (left, reason, is_news) in [
            (works(9), "unavailable", true),
            (works(8), "unavailable", false),
            (TokenLeft::Challenged, "unavailable", true),
            // Requests to one endpoint are challenged, those to another are not.
            (works(7), "unavailable", false),
            (TokenLeft::None, "unavailable", true),
            (TokenLeft::None, "timed_out", true),
            (TokenLeft::None, "unavailable", false),
        ] {
            assert_eq!(outage.refresh_failed(now, left, reason).is_news, is_news, "{left:?} {reason}");
        }
        assert_eq!(outage.request_failed(now, "timed_out"), Counted { is_news: true, failures: 1 });
        assert_eq!(outage.request_failed(now, "timed_out"), Counted { is_news: false, failures: 2 });

        let recovered = outage.end(now + Duration::from_secs(7)).unwrap();
        assert_eq!((recovered.failed_refreshes, recovered.failed_requests), (7, 2));
        assert_eq!(recovered.lasted, Duration::from_secs(7));
        assert!(outage.end(now).is_none());
        assert!(outage.attempt_failed(now, "unavailable"));
        assert!(outage.end(now).is_none(), "a retry has helped: no outage");
    }
}
