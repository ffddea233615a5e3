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
//! `expired`, `expiring`, `challenged`: [`RefreshReason`](crate::RefreshReason); `set` for a token of
//! [`TokenProvider::set`](crate::TokenProvider::set), with the number of the refresh before) and `generation` (of the token to
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
//! | `token published` | INFO, of a tenant DEBUG | `generation`, `expires_in_ms`, `refresh_in_ms` (both absent without a lifetime), `took_ms` |
//! | `tokens of the group published` | INFO | `group`, `tokens` (how many tokens tenants have had since the last such event, which is at least a minute ago) |
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
//! | `adopted the token of another process` | INFO, of a tenant DEBUG | `record` |
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
//! | `request has its own Authorization header; sending it unchanged` | DEBUG | |
//! | `request waits for a token` | DEBUG | |
//! | `request failed; no token is available` | ERROR, repeated DEBUG | `error`, `reason` (as in the metric below), `failed_requests` |
//! | `request challenged` | DEBUG | `generation`, `status`, `attempt` |
//! | `retrying the request` | DEBUG | `generation` (of the new token), `attempt` (the number of the next one), `delay_ms` |
//! | `not retrying; returning the challenge` | DEBUG | `generation`, `reason` |
//! | `the request body cannot be sent again; returning the challenge` | WARN, once a minute for each service, else DEBUG | `generation`, `reason`, `limit` (in bytes; a body is longer, or was not read to its end) |
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
//! With `TokenProviders` (feature `tenants`), the field `provider` has the name that the factory gave the tenant's
//! [builder](crate::TokenProviderBuilder::name), or the group's name. It never has the key, which may be a secret. A tenant's
//! new token is a DEBUG event. An INFO event of the group has their number: with the first one, and then with the first one
//! after each minute. What repeats is counted for each tenant: an outage of the auth endpoint takes a few lines for each
//! tenant that needs a token.
//!
//! The metrics of all tenants have the label of their group, so that the number of series does not depend on the number of
//! tenants (`TokenProvidersBuilder::metrics_by_provider` changes that). A group has no
//! gauge of an expiry or of a store, which would be that of any of its tenants.
//!
//! A request without a key, or whose factory fails, is reported under the group's name. It is news again after the group has
//! made a provider.
//!
//! # Metrics (feature `metrics`)
//!
//! For the recorder that the program installs ([`metrics`](https://docs.rs/metrics)). All have the label `provider`.
//! `describe_metrics` gives the recorder the texts of this table. Install the recorder before the provider is built:
//! the counters then start at 0, so that a query for their increase sees the first count.
//!
//! | name | type, unit | what it is | labels |
//! |---|---|---|---|
//! | `tower_bearer_refreshes_total` | counter | Refreshes that have asked the token source, and have ended. | `reason` as above; `outcome`: `published`, `transient`, `permanent`, or `superseded` by a token that the program has set |
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
    allow(dead_code, unused_imports, unused_variables, clippy::if_same_then_else)
)]

mod events;
mod metrics;
mod reporter;

use std::{future::Future, time::Duration};

pub(crate) use self::events::{
    credential_used, lifetime_ignored, token_file_readable, token_file_unreadable,
};
#[cfg(feature = "metrics")]
#[cfg_attr(docsrs, doc(cfg(feature = "metrics")))]
pub use self::metrics::describe_metrics;
pub(crate) use self::reporter::{GroupReport, NEWS_INTERVAL, Reporter, TokenLeft};

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

/// Calls a function within a span.
pub(crate) fn in_span<R>(span: &Span, function: impl FnOnce() -> R) -> R {
    #[cfg(feature = "tracing")]
    return span.in_scope(function);
    #[cfg(not(feature = "tracing"))]
    function()
}

/// A duration as events show it, and records keep it.
pub(crate) fn millis(duration: Duration) -> u64 {
    duration.as_millis().try_into().unwrap_or(u64::MAX)
}
