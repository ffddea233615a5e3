//! What the crate reports: `tracing` spans and events, and metrics. Never a secret.
//!
//! # Events (feature `tracing`, default)
//!
//! The target of all events is `tower_bearer`. Durations are in whole milliseconds, and their fields end in `_ms`.
//! `generation` counts the access tokens of one provider from 1. An `error` is the whole chain, outermost first.
//!
//! A level says what callers notice: at ERROR requests fail for lack of a token, at WARN they still have one. Of a
//! failure that repeats, only the first since the newest token, for what callers have and each reason, is logged at the
//! level in the table; the others are DEBUG, and the count is in the next line. An outage of the auth endpoint thus takes a few
//! lines, however long it lasts.
//!
//! Each refresh has its own span, `token_refresh` at INFO, with the fields `provider` (the name that
//! [`TokenProviderBuilder::name`](crate::TokenProviderBuilder::name) gave), `refresh` (counted from 1), `reason` (`missing`,
//! `expired`, `expiring`, `challenged`: [`RefreshReason`](crate::RefreshReason)) and `generation` (of the token to
//! replace, 0 if there is none). The span follows from the span of the request that started the refresh. The token
//! source runs within it.
//!
//! Within a refresh's span:
//!
//! | message | level | fields |
//! |---|---|---|
//! | `asking the token source` | DEBUG | `attempt`, from 1 |
//! | `refresh failed (attempt {} of {}), next try in {} ms` | WARN, repeated DEBUG | `attempt`, `attempts`, `delay_ms`, `kind`, `error` |
//! | `refresh token not accepted; using the credential` | INFO | `error` |
//! | `using a login` | INFO | `login` (the fingerprint of its first refresh token, shortened), `reason` |
//! | `expires_in is not a usable lifetime; using the default` | WARN | `lifetime_ms` (absent if there is none) |
//! | `token published` | INFO | `generation`, `expires_in_ms`, `refresh_in_ms` (both absent without a lifetime), `took_ms` |
//! | `source returned the same access token` | DEBUG | `generation` |
//! | `source returned the challenged access token` | WARN, repeated DEBUG | `generation` |
//! | `token file cannot be read; keeping the last good token` | WARN, repeated DEBUG | `error`, `failures` |
//! | `token file can be read again` | INFO | `failures` |
//! | `token refresh failed; the current token still works` | WARN, repeated DEBUG | `error`, `took_ms`, `works_for_ms` (absent without a lifetime), `failed_refreshes` |
//! | `token refresh failed; the API challenges the current token` | WARN, repeated DEBUG | `error`, `took_ms`, `failed_refreshes` |
//! | `token refresh failed; no token is available` | WARN, repeated DEBUG | `error`, `took_ms`, `failed_refreshes` |
//! | `credential rejected; the current token still works` | WARN, repeated DEBUG | `error`, `took_ms`, `works_for_ms` (absent without a lifetime), `failed_refreshes` |
//! | `credential rejected; the API challenges the current token` | ERROR, repeated DEBUG | `error`, `took_ms`, `failed_refreshes` |
//! | `credential rejected; no token is available` | WARN, repeated DEBUG | `error`, `took_ms`, `failed_refreshes` |
//! | `credential rejected; failing requests until the cool-down ends` | ERROR, repeated DEBUG | `error`, `took_ms`, `failed_refreshes` |
//! | `configuration is wrong; the current token still works` | WARN, repeated DEBUG | `error`, `took_ms`, `works_for_ms` (absent without a lifetime), `failed_refreshes` |
//! | `configuration is wrong; the API challenges the current token` | ERROR, repeated DEBUG | `error`, `took_ms`, `failed_refreshes` |
//! | `configuration is wrong; no token is available` | WARN, repeated DEBUG | `error`, `took_ms`, `failed_refreshes` |
//! | `configuration is wrong; failing requests until the cool-down ends` | ERROR, repeated DEBUG | `error`, `took_ms`, `failed_refreshes` |
//! | `login required; the current token still works` | WARN, repeated DEBUG | `error`, `took_ms`, `works_for_ms` (absent without a lifetime), `failed_refreshes` |
//! | `login required; the API challenges the current token` | ERROR, repeated DEBUG | `error`, `took_ms`, `failed_refreshes` |
//! | `login required; no token is available` | WARN, repeated DEBUG | `error`, `took_ms`, `failed_refreshes` |
//! | `login required; failing requests` | ERROR, repeated DEBUG | `error`, `took_ms`, `failed_refreshes` |
//! | `token refresh recovered` | INFO | `failed_refreshes`, `failed_requests`, `lasted_ms` |
//!
//! If processes share a [store](crate::TokenProviderBuilder#method.store), also these; `record` is
//! the version of the store's record:
//!
//! | message | level | fields |
//! |---|---|---|
//! | `token store cannot be used` | WARN | `provider`, `error` |
//! | `token store can be used again` | INFO | `provider`, `failures`, `lasted_ms` |
//! | `adopted the token of another process` | INFO | `record` |
//! | `the stored token belongs to another credential; not using it` | INFO, once in a row | `record` |
//! | `waiting for another process's lease` | TRACE | |
//! | `token stored` | DEBUG | `record` |
//! | `stored that the refresh token is presented` | DEBUG | `record` |
//! | `token not stored; a newer lease exists` | WARN | |
//! | `token not stored; retrying later` | DEBUG | `error` |
//! | `store record is invalid; treating it as absent` | WARN, repeated DEBUG | `error` |
//! | `refreshing without the token store` | DEBUG | `error` |
//!
//! Outside of a refresh's span, with the field `provider`:
//!
//! | message | level | fields |
//! |---|---|---|
//! | `origin is not allowed; sending the request without the token` | WARN, once for each of the first 64 origins | `origin` |
//! | `request waits for a token` | DEBUG | |
//! | `request failed; no token is available` | ERROR, repeated DEBUG | `error`, `reason` (as in the metric below), `failed_requests` |
//! | `request challenged` | DEBUG | `generation`, `status`, `attempt` |
//! | `retrying the request` | DEBUG | `generation` (of the new token), `attempt` (the number of the next one), `delay_ms` |
//! | `not retrying; returning the challenge` | DEBUG | `generation`, `reason` |
//! | `the API challenges new tokens too; not asking the source` | WARN, once a minute, else DEBUG | `generation`, `repeated` (how often at DEBUG since the last WARN; absent at DEBUG) |
//! | `token invalidated` | INFO | `generation` |
//! | `login ignored` | INFO | `login` (the one that is used instead), `reason` |
//! | `provider shut down` | DEBUG | |
//! | `provider evicted` | DEBUG | `reason` (as in the metric below) |
//! | `more providers than max_providers; the others are in use` | WARN, when the bound is exceeded | `providers` (how many) |
//!
//! The `reason` for not retrying is `retries_exhausted`, `body_not_replayable`, `no_token` (there is no other: the
//! refresh's own events say why), `budget_exhausted`, or `no_runtime` (there is no timer for the backoff).
//!
//! A user's [login](crate::TokenProviderBuilder::login) is used because
//!
//! - `a user has logged in`: it is that of [`log_in`](crate::TokenProvider::log_in);
//! - `it is configured, and new`: the store, if there is one, does not know it;
//! - `it is in the store`, or `another process has begun it`: the store has another one than this process;
//! - `it is known already`: the one that was given began the login that is used;
//! - `it has replaced the one that was given`: another login was given later;
//! - `the configured one was rejected`, or `it is configured again, and no token was granted for the one in its place`: it
//!   is the login before.
//!
//! A login is ignored because `it is used already`, because `it was replaced before`, or because `a reader uses the tokens in
//! its store`.
//!
//! # Many tenants
//!
//! With [`TokenProviders`](crate::TokenProviders) (feature `tenants`), the field `provider` has the name that the factory gave
//! the tenant's [builder](crate::TokenProviderBuilder::name), or the group's name. It never has the key, which may be a
//! secret. What repeats is counted for each tenant: an outage of the auth endpoint takes a few lines for each tenant that
//! needs a token.
//!
//! The metrics of all tenants have the label of their group, so that the number of series does not depend on the number of
//! tenants ([`metrics_by_provider`](crate::tenants::TokenProvidersBuilder::metrics_by_provider) changes that). A group has no
//! gauge of an expiry or of a store, which would be that of any of its tenants.
//!
//! A request without a key, or whose factory fails, is reported under the group's name. It is news again after the group has
//! made a provider.
//!
//! # Metrics (feature `metrics`)
//!
//! For the recorder that the program installs ([`metrics`](https://docs.rs/metrics)). All have the label `provider`.
//! [`describe_metrics`] gives the recorder the texts of this table. Install the recorder before the provider is built:
//! the counters then start at 0, so that a query for their increase sees the first count.
//!
//! | name | type, unit | what it is | labels |
//! |---|---|---|---|
//! | `tower_bearer_refreshes_total` | counter | Refreshes that have asked the token source, and have ended. | `reason` as above; `outcome`: `published`, `transient`, `permanent` |
//! | `tower_bearer_refresh_duration_seconds` | histogram, seconds | How long a refresh that has asked the token source took. | `outcome` |
//! | `tower_bearer_source_failures_total` | counter | Attempts of a refresh that failed transiently. | `kind`: `unavailable`, `invalid_response` |
//! | `tower_bearer_token_expiry_timestamp_seconds` | gauge, seconds | When the current token expires, in seconds since 1970; 0 without a token, +Inf without a lifetime. | |
//! | `tower_bearer_waits_total` | counter | Requests that waited for a token. | |
//! | `tower_bearer_failed_requests_total` | counter | Requests that failed because no token was available. | `reason`: `unavailable`, `invalid_response`, `rejected`, `login_required`, `configuration`, `timed_out`, `interrupted`, `no_runtime`, `shut_down`, `challenge_dropped`, or `cancelled`: dropped while it waited, and refreshes fail; of a group also `missing_key`, `factory` |
//! | `tower_bearer_challenges_total` | counter | Responses that challenged a token. | `outcome`: `retried`, or the `reason` for not retrying |
//! | `tower_bearer_store_usable` | gauge | Whether the store can be used (1) or has failed (0). | |
//! | `tower_bearer_providers` | gauge | How many providers a group has. | |
//! | `tower_bearer_evictions_total` | counter | Providers of a group that were evicted. | `reason`: `idle`, `capacity` |
//! | `tower_bearer_store_total` | counter | What happened to the token that processes share: the events of the store's table. | `outcome`: `adopted`, `stored`, `superseded`, `not_stored`, `invalid_record`, `without_store` |
//!
//! In PromQL, the seconds until the expiry are `tower_bearer_token_expiry_timestamp_seconds - time()`. As a point in
//! time, the gauge is right even while no request is sent. How a histogram is shown is up to the recorder:
//! `metrics-exporter-prometheus` makes it a summary unless it is given buckets.
//!
//! A request with a token that works, whose response is no challenge, costs no event and no metric.
// Each feature leaves some of these functions without a caller, or their parameters without a use.
#![cfg_attr(
    not(all(feature = "tracing", feature = "metrics", feature = "tenants")),
    allow(dead_code, unused_variables, clippy::if_same_then_else)
)]

use std::{
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use http::StatusCode;
use tokio::time::Instant;

use crate::error::StoreError;
use crate::{
    error::{Chain, Error, SourceError, SourceErrorKind},
    token::Token,
};

/// An event. That of a reporter names its provider, for where no span of a refresh does.
macro_rules! event {
    ($reporter:ident: $level:ident, $($rest:tt)*) => {
        event!($level, provider = %$reporter.provider, $($rest)*)
    };
    ($level:ident, $($rest:tt)*) => {
        #[cfg(feature = "tracing")]
        tracing::event!(target: "tower_bearer", tracing::Level::$level, $($rest)*)
    };
}

/// An event at its level if it is news, else at DEBUG.
macro_rules! event_if {
    ($reporter:ident: $is_news:expr, $level:ident, $($rest:tt)*) => {
        event_if!($is_news, $level, provider = %$reporter.provider, $($rest)*)
    };
    ($is_news:expr, $level:ident, $($rest:tt)*) => {
        if $is_news {
            event!($level, $($rest)*);
        } else {
            event!(DEBUG, $($rest)*);
        }
    };
}

/// Counts for the provider, or the group, of a reporter.
macro_rules! count {
    ($reporter:ident, $name:literal $(, $label:literal => $value:expr)*) => {
        #[cfg(feature = "metrics")]
        metrics::counter!($name, "provider" => $reporter.label() $(, $label => $value)*).increment(1)
    };
}

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
    provider: Arc<str>,
    /// The label of the metrics, if it is that of a group. The gauges of one token have no meaning for a group.
    group: Option<Arc<str>>,
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
    /// The kinds and the reasons of its failures so far, of which there are few.
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

/// A challenge that starts no refresh is news once in this time.
const NEWS_INTERVAL: Duration = Duration::from_secs(60);

impl Clone for Reporter {
    fn clone(&self) -> Self {
        Self::new(Arc::clone(&self.provider), self.group.clone())
    }
}

impl Reporter {
    pub(crate) fn new(provider: Arc<str>, group: Option<Arc<str>>) -> Self {
        Self { provider, group, reported: Mutex::default() }
    }

    fn reported(&self) -> MutexGuard<'_, Option<Box<Reported>>> {
        self.reported.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The label of the metrics.
    #[cfg(feature = "metrics")]
    fn label(&self) -> Arc<str> {
        Arc::clone(self.group.as_ref().unwrap_or(&self.provider))
    }

    fn gauge(&self, name: &'static str, value: f64) {
        #[cfg(feature = "metrics")]
        metrics::gauge!(name, "provider" => self.label()).set(value);
    }

    /// Sets all counters to 0. A counter that first appears with its first count would hide that count from a query for
    /// its increase.
    ///
    /// The counters of a group are registered once for all its providers.
    pub(crate) fn register(&self) {
        if self.group.is_none() {
            self.register_counters();
            self.expires(None);
        }
    }

    /// As [`register`](Self::register), for a group of providers.
    pub(crate) fn register_group(&self) {
        self.register_counters();
        #[cfg(feature = "metrics")]
        {
            for reason in ["missing_key", "factory"] {
                self.zero("tower_bearer_failed_requests_total", &[("reason", reason)]);
            }
            for reason in ["idle", "capacity"] {
                self.zero("tower_bearer_evictions_total", &[("reason", reason)]);
            }
        }
        self.providers(0, false);
    }

    fn register_counters(&self) {
        #[cfg(feature = "metrics")]
        {
            for reason in ["missing", "expired", "expiring", "challenged"] {
                for outcome in ["published", "transient", "permanent"] {
                    self.zero("tower_bearer_refreshes_total", &[("reason", reason), ("outcome", outcome)]);
                }
            }
            for kind in ["unavailable", "invalid_response"] {
                self.zero("tower_bearer_source_failures_total", &[("kind", kind)]);
            }
            self.zero("tower_bearer_waits_total", &[]);
            let reasons = "unavailable invalid_response rejected login_required configuration timed_out cancelled \
                           interrupted no_runtime shut_down challenge_dropped";
            for reason in reasons.split(' ') {
                self.zero("tower_bearer_failed_requests_total", &[("reason", reason)]);
            }
            let outcomes =
                "retried retries_exhausted body_not_replayable no_token budget_exhausted no_runtime";
            for outcome in outcomes.split(' ') {
                self.zero("tower_bearer_challenges_total", &[("outcome", outcome)]);
            }
        }
    }

    #[cfg(feature = "metrics")]
    fn zero(&self, name: &'static str, labels: &[(&'static str, &'static str)]) {
        let provider = metrics::Label::new("provider", self.label());
        let others = labels.iter().map(|(label, value)| metrics::Label::from_static_parts(label, value));
        metrics::counter!(name, std::iter::once(provider).chain(others).collect::<Vec<_>>()).increment(0);
    }

    /// Makes the span of a refresh.
    pub(crate) fn refresh(&self, number: u64, reason: &'static str, previous: Option<&Token>) -> Span {
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
        Span
    }

    pub(crate) fn asking(&self, attempt: u32) {
        event!(DEBUG, attempt, "asking the token source");
    }

    /// The source failed once. `attempts`: how often it is asked in this refresh.
    pub(crate) fn attempt_failed(&self, attempt: u32, attempts: u32, error: &Error, delay: Duration) {
        let (kind, delay_ms) = (error.name(), millis(delay));
        let is_news = self.reported().get_or_insert_default().is_news("attempt", kind);
        event_if!(
            is_news,
            WARN,
            attempt,
            attempts,
            delay_ms,
            kind,
            error = %Chain(error),
            "refresh failed (attempt {attempt} of {attempts}), next try in {delay_ms} ms"
        );
        count!(self, "tower_bearer_source_failures_total", "kind" => kind);
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
        let generation = token.generation();
        if !is_same {
            event!(
                INFO,
                generation,
                expires_in_ms = token.remaining().map(millis),
                refresh_in_ms = token.refresh_at().map(millis_until),
                took_ms = millis(took),
                "token published"
            );
        } else if is_challenged {
            event_if!(!before.has_same, WARN, generation, "source returned the challenged access token");
        } else {
            event!(DEBUG, generation, "source returned the same access token");
        }
        let Reported { since, failed_refreshes, failed_requests, .. } = *before;
        if let Some(since) = since.filter(|_| failed_refreshes + failed_requests > 0) {
            let lasted_ms = millis(since.elapsed());
            event!(INFO, failed_refreshes, failed_requests, lasted_ms, "token refresh recovered");
        }
    }

    /// A refresh has failed. `is_needed`: a caller waited for the token.
    pub(crate) fn failed(&self, error: &Error, took: Duration, left: TokenLeft, is_needed: bool) {
        let (what, rest) = match error {
            _ if error.is_transient() => ("token refresh failed", "no token is available"),
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
            TokenLeft::Challenged => ("the API challenges the current token", None, !error.is_transient()),
            TokenLeft::None if is_needed => (rest, None, !error.is_transient()),
            TokenLeft::None => ("no token is available", None, false),
        };
        let (is_news, failed_refreshes) = {
            let mut reported = self.reported();
            let reported = reported.get_or_insert_default();
            reported.failed_refreshes += 1;
            (reported.is_news(left, error.name()), reported.failed_refreshes)
        };
        let (error, took_ms, works_for_ms) = (Chain(error), millis(took), works_for.map(millis));
        if is_error {
            event_if!(is_news, ERROR, %error, took_ms, failed_refreshes, "{what}; {left}");
        } else {
            event_if!(is_news, WARN, %error, took_ms, works_for_ms, failed_refreshes, "{what}; {left}");
        }
    }

    /// Sets when the current token expires.
    pub(crate) fn expires(&self, token: Option<&Token>) {
        if cfg!(feature = "metrics") && self.group.is_none() {
            let now = std::time::UNIX_EPOCH.elapsed().unwrap_or_default().as_secs_f64();
            let left = |token: &Token| token.remaining().map_or(f64::INFINITY, |left| left.as_secs_f64());
            let at = token.map_or(0.0, |token| now + left(token));
            self.gauge("tower_bearer_token_expiry_timestamp_seconds", at);
        }
    }

    /// Counts a refresh that has ended.
    pub(crate) fn refreshed(&self, reason: &'static str, outcome: &'static str, took: Duration) {
        #[cfg(feature = "metrics")]
        metrics::histogram!(
            "tower_bearer_refresh_duration_seconds",
            "provider" => self.label(), "outcome" => outcome
        )
        .record(took);
        count!(self, "tower_bearer_refreshes_total", "reason" => reason, "outcome" => outcome);
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
        event_if!(
            self: repeated.is_some(),
            WARN,
            generation = token.generation(),
            repeated,
            "the API challenges new tokens too; not asking the source"
        );
    }

    pub(crate) fn invalidated(&self, token: &Token) {
        event!(self: INFO, generation = token.generation(), "token invalidated");
    }

    /// Sets the number of providers of a group.
    pub(crate) fn providers(&self, number: usize, exceeds_bound: bool) {
        self.gauge("tower_bearer_providers", number as f64);
        if exceeds_bound {
            event!(
                self: WARN,
                providers = number,
                "more providers than max_providers; the others are in use"
            );
        }
    }

    /// A group has made a provider: a request without one is news again.
    pub(crate) fn made(&self) {
        *self.reported() = None;
    }

    pub(crate) fn evicted(&self, reason: &'static str) {
        event!(self: DEBUG, reason, "provider evicted");
        // Of its own, if it is no group's: nothing would set it again.
        self.expires(None);
    }

    pub(crate) fn count_eviction(&self, reason: &'static str) {
        count!(self, "tower_bearer_evictions_total", "reason" => reason);
    }

    pub(crate) fn shut_down(&self) {
        event!(self: DEBUG, "provider shut down");
    }

    pub(crate) fn origin_not_allowed(&self, origin: &str) {
        event!(self: WARN, origin, "origin is not allowed; sending the request without the token");
    }

    pub(crate) fn waiting(&self) {
        event!(self: DEBUG, "request waits for a token");
        count!(self, "tower_bearer_waits_total");
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
        event_if!(
            self: is_news,
            ERROR,
            error = %Chain(error),
            reason,
            failed_requests,
            "request failed; no token is available"
        );
        count!(self, "tower_bearer_failed_requests_total", "reason" => reason);
    }

    pub(crate) fn challenged(&self, token: u32, status: StatusCode, retries: u32) {
        event!(
            self: DEBUG,
            generation = token,
            status = status.as_u16(),
            attempt = retries + 1,
            "request challenged"
        );
    }

    pub(crate) fn retrying(&self, token: u32, retries: u32, delay: Duration) {
        event!(
            self: DEBUG,
            generation = token,
            attempt = retries + 1,
            delay_ms = millis(delay),
            "retrying the request"
        );
        count!(self, "tower_bearer_challenges_total", "outcome" => "retried");
    }

    pub(crate) fn not_retrying(&self, token: u32, reason: &'static str) {
        event!(self: DEBUG, generation = token, reason, "not retrying; returning the challenge");
        count!(self, "tower_bearer_challenges_total", "outcome" => reason);
    }
}

/// What happens to the token that processes share.
impl Reporter {
    /// As [`register`](Self::register), for a provider with a store.
    pub(crate) fn register_store(&self) {
        self.store_usable(true);
        #[cfg(feature = "metrics")]
        for outcome in ["adopted", "stored", "superseded", "not_stored", "invalid_record", "without_store"] {
            self.zero("tower_bearer_store_total", &[("outcome", outcome)]);
        }
    }

    fn store(&self, outcome: &'static str) {
        count!(self, "tower_bearer_store_total", "outcome" => outcome);
    }

    pub(crate) fn adopted(&self, record: u64) {
        event!(INFO, record, "adopted the token of another process");
        self.store("adopted");
    }

    /// Which login is used, by its id, and why.
    pub(crate) fn using_login(&self, login: &str, reason: &'static str) {
        event!(INFO, login = login.get(..8), reason, "using a login");
    }

    pub(crate) fn login_ignored(&self, login: &str, reason: &'static str) {
        event!(self: INFO, login = login.get(..8), reason, "login ignored");
    }

    pub(crate) fn foreign_record(&self, record: u64) {
        event!(INFO, record, "the stored token belongs to another credential; not using it");
    }

    pub(crate) fn waiting_for_lease(&self) {
        event!(TRACE, "waiting for another process's lease");
    }

    pub(crate) fn stored(&self, record: u64) {
        event!(DEBUG, record, "token stored");
        self.store("stored");
    }

    pub(crate) fn marked(&self, record: u64) {
        event!(DEBUG, record, "stored that the refresh token is presented");
    }

    pub(crate) fn superseded(&self) {
        event!(WARN, "token not stored; a newer lease exists");
        self.store("superseded");
    }

    pub(crate) fn not_stored(&self, error: &StoreError) {
        event!(DEBUG, error = %Chain(error), "token not stored; retrying later");
        self.store("not_stored");
    }

    pub(crate) fn invalid_record(&self, error: &StoreError, is_news: bool) {
        event_if!(is_news, WARN, error = %Chain(error), "store record is invalid; treating it as absent");
        self.store("invalid_record");
    }

    pub(crate) fn without_store(&self, error: &StoreError) {
        event!(DEBUG, error = %Chain(error), "refreshing without the token store");
        self.store("without_store");
    }

    pub(crate) fn store_failing(&self, error: &StoreError) {
        event!(self: WARN, error = %Chain(error), "token store cannot be used");
    }

    pub(crate) fn store_recovered(&self, lasted: Duration, failures: u64) {
        event!(self: INFO, failures, lasted_ms = millis(lasted), "token store can be used again");
    }

    pub(crate) fn store_usable(&self, is_usable: bool) {
        if self.group.is_none() {
            self.gauge("tower_bearer_store_usable", f64::from(u8::from(is_usable)));
        }
    }
}

pub(crate) fn credential_used(error: &SourceError) {
    event!(INFO, error = %Chain(error), "refresh token not accepted; using the credential");
}

pub(crate) fn lifetime_ignored(default: Option<Duration>) {
    event!(WARN, lifetime_ms = default.map(millis), "expires_in is not a usable lifetime; using the default");
}

pub(crate) fn token_file_unreadable(error: &SourceError, failures: u64) {
    event_if!(
        failures == 1,
        WARN,
        error = %Chain(error),
        failures,
        "token file cannot be read; keeping the last good token"
    );
}

pub(crate) fn token_file_readable(failures: u64) {
    event!(INFO, failures, "token file can be read again");
}

#[cfg(feature = "tracing")]
pub(crate) use tracing::Span;
/// Without the feature `tracing` there are no spans.
#[cfg(not(feature = "tracing"))]
#[derive(Clone)]
pub(crate) struct Span;

/// The span that is entered now.
pub(crate) fn current_span() -> Span {
    #[cfg(feature = "tracing")]
    return Span::current();
    #[cfg(not(feature = "tracing"))]
    Span
}

/// Runs `future` within `span`.
pub(crate) fn within<F: Future>(span: Span, future: F) -> impl Future<Output = F::Output> + use<F> {
    #[cfg(feature = "tracing")]
    let future = tracing::Instrument::instrument(future, span);
    future
}

/// A duration as events and stores show it.
pub(crate) fn millis(duration: Duration) -> u64 {
    duration.as_millis().try_into().unwrap_or(u64::MAX)
}

fn millis_until(at: Instant) -> u64 {
    millis(at.saturating_duration_since(Instant::now()))
}

/// Describes the [metrics](self#metrics-feature-metrics) and their units to the installed recorder. Call it once, after
/// installing the recorder.
#[cfg(feature = "metrics")]
#[cfg_attr(docsrs, doc(cfg(feature = "metrics")))]
pub fn describe_metrics() {
    use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};

    let counters = [
        ("tower_bearer_refreshes_total", "Refreshes that have asked the token source, and have ended."),
        ("tower_bearer_source_failures_total", "Attempts of a refresh that failed transiently."),
        ("tower_bearer_waits_total", "Requests that waited for a token."),
        ("tower_bearer_failed_requests_total", "Requests that failed because no token was available."),
        ("tower_bearer_challenges_total", "Responses that challenged a token."),
        ("tower_bearer_evictions_total", "Providers of a group that were evicted."),
        (
            "tower_bearer_store_total",
            "What happened to the token that processes share: the events of the store's table.",
        ),
    ];
    for (name, text) in counters {
        describe_counter!(name, Unit::Count, text);
    }
    describe_histogram!(
        "tower_bearer_refresh_duration_seconds",
        Unit::Seconds,
        "How long a refresh that has asked the token source took."
    );
    let gauges = [
        ("tower_bearer_providers", Unit::Count, "How many providers a group has."),
        ("tower_bearer_store_usable", Unit::Count, "Whether the store can be used (1) or has failed (0)."),
        (
            "tower_bearer_token_expiry_timestamp_seconds",
            Unit::Seconds,
            "When the current token expires, in seconds since 1970; 0 without a token, +Inf without a lifetime.",
        ),
    ];
    for (name, unit, text) in gauges {
        describe_gauge!(name, unit, text);
    }
}
