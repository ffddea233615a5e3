//! [`Reporter`]: decides which failures are news, and reports them.

use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

use tokio::time::Instant;

use super::metrics::{Label, Registered, counters};
use super::millis;
use crate::error::{Error, SourceErrorKind};
use crate::token::Token;

/// A challenge that starts no refresh is news once in this time.
pub(crate) const NEWS_INTERVAL: Duration = Duration::from_secs(60);

/// What callers have while refreshes fail.
#[derive(Clone, Copy, Debug)]
pub(crate) enum TokenLeft {
    /// The current token, for this long; `None` if it has no lifetime.
    Works(Option<Duration>),
    /// A token that the API challenges.
    Challenged,
    /// None that is valid.
    None,
}

/// Reports the events and metrics of one provider and the layers that share it, and decides which of them is news.
pub(crate) struct Reporter {
    /// The name in events.
    pub(super) provider: Arc<str>,
    group: Option<Arc<GroupReport>>,
    /// `None` until something fails. No foreign code runs under the lock.
    reported: Mutex<Option<Box<Reported>>>,
}

/// What was reported.
#[derive(Default)]
struct Reported {
    /// When the outage began: the first failure since the newest token.
    since: Option<Instant>,
    failed_refreshes: u64,
    failed_requests: u64,
    /// What callers had and the reasons of its failures so far, of which there are few.
    seen: Vec<(&'static str, &'static str)>,
    /// Whether the newest access token was returned again after a challenge.
    has_same: bool,
    /// When a challenge that started no refresh was news last, and how many there were since then.
    left_alone: Option<(Instant, u64)>,
}

impl Reported {
    /// Records a failure. Returns whether it is news: there was none of its kind and for its reason before.
    fn is_news(&mut self, kind: &'static str, reason: &'static str) -> bool {
        self.since.get_or_insert_with(Instant::now);
        let is_news = !self.seen.contains(&(kind, reason));
        self.seen.extend(is_news.then_some((kind, reason)));
        is_news
    }
}

impl Clone for Reporter {
    fn clone(&self) -> Self {
        Self::new(Arc::clone(&self.provider), self.group.clone())
    }
}

/// What is reported of the providers of one group.
pub(crate) struct GroupReport {
    pub(crate) name: Arc<str>,
    /// Whether its name is the label of the metrics. The gauges of one token have no meaning for a group.
    pub(crate) is_label: bool,
    /// When an event said last how many tokens were published or adopted, and how many there were since then.
    tokens: Mutex<(Option<Instant>, u64)>,
}

impl GroupReport {
    pub(crate) fn new(name: Arc<str>, is_label: bool) -> Self {
        Self { name, is_label, tokens: Mutex::default() }
    }

    /// Counts a token. Returns how many there were if that is news.
    fn count_token(&self) -> Option<u64> {
        let mut tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        tokens.1 += 1;
        let is_news = tokens.0.is_none_or(|at| at.elapsed() >= NEWS_INTERVAL);
        is_news.then(|| mem::replace(&mut *tokens, (Some(Instant::now()), 0)).1)
    }
}

impl Reporter {
    pub(crate) fn new(provider: Arc<str>, group: Option<Arc<GroupReport>>) -> Self {
        Self { provider, group, reported: Mutex::default() }
    }

    /// The name of the group, if the metrics have that as their label.
    fn label(&self) -> Option<&Arc<str>> {
        self.group.as_ref().filter(|group| group.is_label).map(|group| &group.name)
    }

    /// Whether a new token is news: those of a group are counted.
    fn token_is_news(&self) -> bool {
        let Some(group) = &self.group else { return true };
        if let Some(tokens) = group.count_token() {
            self.tokens_of_group(&group.name, tokens);
        }
        false
    }

    /// Records that the token of another process is used.
    pub(crate) fn adopted(&self, record: u64) {
        self.token_adopted(record, self.token_is_news());
    }

    fn reported(&self) -> MutexGuard<'_, Option<Box<Reported>>> {
        self.reported.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts one.
    pub(crate) fn count(&self, name: &'static str, labels: &[Label]) {
        self.add(name, labels, 1);
    }

    fn add(&self, name: &'static str, labels: &[Label], number: u64) {
        #[cfg(feature = "metrics")]
        metrics::counter!(name, self.labels(labels)).increment(number);
    }

    fn set(&self, name: &'static str, value: f64) {
        #[cfg(feature = "metrics")]
        metrics::gauge!(name, self.labels(&[])).set(value);
    }

    #[cfg(feature = "metrics")]
    fn labels(&self, labels: &[Label]) -> Vec<metrics::Label> {
        let provider = metrics::Label::new("provider", Arc::clone(self.label().unwrap_or(&self.provider)));
        let labels = labels.iter().map(|(label, value)| metrics::Label::from_static_parts(label, value));
        std::iter::once(provider).chain(labels).collect()
    }

    fn register_counters(&self, registered: Registered) {
        // Otherwise the series would be listed for nobody.
        if cfg!(feature = "metrics") {
            counters(registered).for_each(|(name, labels)| self.add(name, &labels, 0));
        }
    }

    /// Sets the counters of a provider to 0. Those of a group are registered once for all its providers.
    pub(crate) fn register(&self) {
        if self.label().is_none() {
            self.register_counters(Registered::Always);
            self.expires(None);
        }
    }

    /// As [`register`](Self::register), for a group of providers.
    pub(crate) fn register_group(&self) {
        self.register_counters(Registered::Always);
        self.register_counters(Registered::WithGroup);
        self.providers(0);
    }

    /// As [`register`](Self::register), for a provider with a store.
    pub(crate) fn register_store(&self) {
        self.store_usable(true);
        self.register_counters(Registered::WithStore);
    }

    /// Makes the span of a refresh.
    pub(crate) fn refresh(&self, number: u64, reason: &'static str, previous: Option<&Token>) -> super::Span {
        #[cfg(feature = "tracing")]
        {
            let span = tracing::info_span!(
                target: "tower_bearer",
                parent: None,
                "token_refresh",
                provider = %self.provider,
                refresh = number,
                reason,
                generation = previous.map_or(0, Token::generation),
            );
            span.follows_from(tracing::Span::current());
            span
        }
        #[cfg(not(feature = "tracing"))]
        super::Span
    }

    /// The source failed once. `attempts`: how often it is asked in this refresh.
    pub(crate) fn attempt_failed(&self, attempt: u32, attempts: u32, error: &Error, delay: Duration) {
        let kind = error.name();
        let is_news = self.reported().get_or_insert_default().is_news("attempt", kind);
        self.retrying_refresh(attempt, attempts, millis(delay), error, is_news);
        self.count("tower_bearer_source_failures_total", &[("kind", kind)]);
    }

    /// A refresh has brought a token, which ends an outage.
    pub(crate) fn published(&self, token: &Token, took: Duration, is_same: bool, is_challenged: bool) {
        let before = {
            let mut reported = self.reported();
            let before = reported.take().unwrap_or_default();
            let (has_same, left_alone) = (is_same && (is_challenged || before.has_same), before.left_alone);
            // Most providers have nothing to remember.
            let remembers = has_same || left_alone.is_some();
            *reported = remembers.then(|| Box::new(Reported { has_same, left_alone, ..Reported::default() }));
            before
        };
        match (is_same, is_challenged) {
            (false, _) => self.token_published(token, took, self.token_is_news()),
            (true, true) => self.challenged_token(token, !before.has_same),
            (true, false) => self.same_token(token),
        }
        let Reported { since, failed_refreshes, failed_requests, .. } = *before;
        if let Some(since) = since.filter(|_| failed_refreshes + failed_requests > 0) {
            self.recovered(failed_refreshes, failed_requests, since.elapsed());
        }
    }

    /// A refresh has failed. `is_needed`: a caller waited for the token.
    pub(crate) fn failed(&self, error: &Error, took: Duration, left: TokenLeft, is_needed: bool) {
        let is_permanent = !error.is_transient();
        let (what, rest) = match error {
            _ if !is_permanent => ("token refresh failed", "no token is available"),
            Error::Source(error) if error.kind() == SourceErrorKind::LoginRequired => {
                ("login required", "failing requests")
            }
            Error::Source(error) if error.kind() == SourceErrorKind::Rejected => {
                ("credential rejected", "failing requests until the cool-down ends")
            }
            _ => ("configuration is wrong", "failing requests until the cool-down ends"),
        };
        let (left, works_for, is_error) = match left {
            TokenLeft::Works(remaining) => ("the current token still works", remaining, false),
            TokenLeft::Challenged => ("the API challenges the current token", None, is_permanent),
            TokenLeft::None if is_needed => (rest, None, is_permanent),
            TokenLeft::None => ("no token is available", None, false),
        };
        let (is_news, failed_refreshes) = {
            let mut reported = self.reported();
            let reported = reported.get_or_insert_default();
            reported.failed_refreshes += 1;
            (reported.is_news(left, error.name()), reported.failed_refreshes)
        };
        let text = format!("{what}; {left}");
        match is_error {
            true => self.callers_fail(&text, error, took, failed_refreshes, is_news),
            false => self.refresh_failed(&text, error, took, works_for, failed_refreshes, is_news),
        }
    }

    /// Counts a refresh that has ended.
    pub(crate) fn refreshed(&self, reason: &'static str, outcome: &'static str, took: Duration) {
        #[cfg(feature = "metrics")]
        metrics::histogram!("tower_bearer_refresh_duration_seconds", self.labels(&[("outcome", outcome)]))
            .record(took);
        self.count("tower_bearer_refreshes_total", &[("reason", reason), ("outcome", outcome)]);
    }

    /// A challenge has started no refresh.
    pub(crate) fn left_alone(&self, token: &Token) {
        let repeated = {
            let mut reported = self.reported();
            let left_alone = &mut reported.get_or_insert_default().left_alone;
            match left_alone {
                Some((at, repeated)) if at.elapsed() < NEWS_INTERVAL => {
                    *repeated += 1;
                    None
                }
                _ => Some(left_alone.replace((Instant::now(), 0)).map_or(0, |(_, repeated)| repeated)),
            }
        };
        self.not_refreshing(token, repeated, repeated.is_some());
    }

    /// A group has made a provider: a request without one is news again.
    pub(crate) fn made(&self) {
        *self.reported() = None;
    }

    pub(crate) fn evicted(&self, reason: &'static str) {
        self.provider_evicted(reason);
        // Of its own, if it is no group's: nothing would set it again.
        self.expires(None);
    }

    /// A request fails because there is no token. It may learn so when the outage is over: then it is no news.
    pub(crate) fn request_failed(&self, error: &Error) {
        let begins_outage = matches!(error.name(), "no_runtime" | "missing_key" | "factory");
        self.count_failed_request(error, error.name(), begins_outage);
    }

    /// A request was dropped while it waited for a token, if refreshes fail.
    pub(crate) fn request_given_up(&self, error: &Error) {
        if self.reported().as_ref().is_some_and(|reported| reported.since.is_some()) {
            self.count_failed_request(error, "cancelled", false);
        }
    }

    fn count_failed_request(&self, error: &Error, reason: &'static str, begins_outage: bool) {
        let (is_news, failed_requests) = {
            let mut reported = self.reported();
            if begins_outage {
                reported.get_or_insert_default();
            }
            let in_outage =
                |reported: &Reported| reported.since.is_some() && !matches!(error, Error::ShutDown);
            match reported.as_deref_mut() {
                Some(reported) if begins_outage || in_outage(reported) => {
                    reported.failed_requests += 1;
                    (reported.is_news("request", reason), reported.failed_requests)
                }
                _ => (false, 0),
            }
        };
        self.request_has_failed(error, reason, failed_requests, is_news);
    }

    /// Sets when the current token expires.
    pub(crate) fn expires(&self, token: Option<&Token>) {
        if cfg!(feature = "metrics") && self.label().is_none() {
            let now = UNIX_EPOCH.elapsed().unwrap_or_default().as_secs_f64();
            let left = |token: &Token| token.remaining().map_or(f64::INFINITY, |left| left.as_secs_f64());
            let at = token.map_or(0.0, |token| now + left(token));
            self.set("tower_bearer_token_expiry_timestamp_seconds", at);
        }
    }

    /// Sets the number of providers of a group.
    pub(crate) fn providers(&self, number: usize) {
        self.set("tower_bearer_providers", number as f64);
    }

    pub(crate) fn store_usable(&self, is_usable: bool) {
        if self.label().is_none() {
            self.set("tower_bearer_store_usable", f64::from(u8::from(is_usable)));
        }
    }
}
