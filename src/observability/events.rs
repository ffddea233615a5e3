//! The events: the level, the fields and the message of each, in one table.

use std::time::Duration;

use http::StatusCode;
use tokio::time::Instant;

use super::{Reporter, millis};
use crate::error::{Error, ErrorChain, SourceError, StoreError};
use crate::token::Token;

/// Emits an event; with `if`, at its level if it is news, else at DEBUG.
macro_rules! event {
    ($level:ident if $is_news:expr, $($rest:tt)*) => {
        if $is_news { event!($level, $($rest)*) } else { event!(DEBUG, $($rest)*) }
    };
    ($level:ident, $($rest:tt)*) => {{
        #[cfg(feature = "tracing")]
        tracing::event!(target: "tower_bearer", tracing::Level::$level, $($rest)*);
    }};
}

/// Makes a function of each row: its parameters, its level (that of news, if `if` follows), its fields, its message, and
/// what is counted.
macro_rules! events {
    (of $scope:ident $(
        $name:ident($($arg:ident: $type:ty),*) $level:ident $(if $is_news:ident)?
            { $($field:ident $(= $value:expr)?),* } $message:literal $(counts $metric:literal $($label:literal = $count:expr)?)?;
    )*) => {
        impl Reporter {$(
            pub(crate) fn $name(&self $(, $arg: $type)*) {
                events!(@ $scope self $level $(if $is_news)? [$($field $(= $value)?,)*] $message);
                $(self.count($metric, &[$(($label, $count))?]);)?
            }
        )*}
    };
    // The span of the refresh names the provider.
    (@ refresh $self:ident $level:ident $(if $is_news:ident)? [$($fields:tt)*] $message:literal) => {
        event!($level $(if $is_news)?, $($fields)* $message)
    };
    (@ provider $self:ident $level:ident $(if $is_news:ident)? [$($fields:tt)*] $message:literal) => {
        event!($level $(if $is_news)?, provider = %$self.provider, $($fields)* $message)
    };
}

// Within the span of a refresh.
events! { of refresh
    asking(attempt: u32) DEBUG { attempt } "asking the token source";
    retrying_refresh(attempt: u32, attempts: u32, delay_ms: u64, error: &Error, is_news: bool) WARN if is_news
        { attempt, attempts, delay_ms, kind = error.name(), error = display(ErrorChain(error)) }
        "refresh failed (attempt {attempt} of {attempts}), next try in {delay_ms} ms";
    using_login(login: &str, reason: &'static str) INFO { login = login.get(..8), reason } "using a login";
    token_published(token: &Token, took: Duration, is_news: bool) INFO if is_news
        { generation = token.generation(), expires_in_ms = token.remaining().map(millis),
          refresh_in_ms = token.refresh_at().map(millis_until), took_ms = millis(took) }
        "token published";
    tokens_of_group(group: &str, tokens: u64) INFO { group, tokens } "tokens of the group published";
    same_token(token: &Token) DEBUG { generation = token.generation() } "source returned the same access token";
    challenged_token(token: &Token, is_news: bool) WARN if is_news
        { generation = token.generation() } "source returned the challenged access token";
    refresh_failed(text: &str, error: &Error, took: Duration, works_for: Option<Duration>, failed_refreshes: u64, is_news: bool)
        WARN if is_news
        { error = display(ErrorChain(error)), took_ms = millis(took), works_for_ms = works_for.map(millis), failed_refreshes }
        "{text}";
    callers_fail(text: &str, error: &Error, took: Duration, failed_refreshes: u64, is_news: bool) ERROR if is_news
        { error = display(ErrorChain(error)), took_ms = millis(took), failed_refreshes } "{text}";
    recovered(failed_refreshes: u64, failed_requests: u64, lasted: Duration) INFO
        { failed_refreshes, failed_requests, lasted_ms = millis(lasted) } "token refresh recovered";

    token_adopted(record: u64, is_news: bool) INFO if is_news { record } "adopted the token of another process"
        counts "tower_bearer_store_total" "outcome" = "adopted";
    foreign_record(record: u64) INFO { record } "the stored token belongs to another credential; not using it";
    waiting_for_lease() TRACE {} "waiting for another process's lease";
    stored(record: u64) DEBUG { record } "token stored" counts "tower_bearer_store_total" "outcome" = "stored";
    marked(record: u64) DEBUG { record } "stored that the refresh token is presented";
    superseded() WARN {} "token not stored; a newer lease exists"
        counts "tower_bearer_store_total" "outcome" = "superseded";
    not_stored(error: &StoreError) DEBUG { error = display(ErrorChain(error)) } "token not stored; retrying later"
        counts "tower_bearer_store_total" "outcome" = "not_stored";
    invalid_record(error: &StoreError, is_news: bool) WARN if is_news
        { error = display(ErrorChain(error)) } "store record is invalid; treating it as absent"
        counts "tower_bearer_store_total" "outcome" = "invalid_record";
    without_store(error: &StoreError) DEBUG { error = display(ErrorChain(error)) } "refreshing without the token store"
        counts "tower_bearer_store_total" "outcome" = "without_store";
}

// Outside of it.
events! { of provider
    store_failing(error: &StoreError) WARN { error = display(ErrorChain(error)) } "token store cannot be used";
    store_recovered(lasted: Duration, failures: u64) INFO
        { failures, lasted_ms = millis(lasted) } "token store can be used again";
    origin_not_allowed(origin: &str) WARN { origin } "origin is not allowed; sending the request without the token";
    authorization_kept() DEBUG {} "request has its own Authorization header; sending it unchanged";
    waiting() DEBUG {} "request waits for a token" counts "tower_bearer_waits_total";
    request_has_failed(error: &Error, reason: &'static str, failed_requests: u64, is_news: bool) ERROR if is_news
        { error = display(ErrorChain(error)), reason, failed_requests } "request failed; no token is available"
        counts "tower_bearer_failed_requests_total" "reason" = reason;
    challenged(token: u32, status: StatusCode, retries: u32) DEBUG
        { generation = token, status = status.as_u16(), attempt = retries + 1 } "request challenged";
    retrying(token: u32, retries: u32, delay: Duration) DEBUG
        { generation = token, attempt = retries + 1, delay_ms = millis(delay) } "retrying the request"
        counts "tower_bearer_challenges_total" "outcome" = "retried";
    not_retrying(token: u32, reason: &'static str) DEBUG
        { generation = token, reason } "not retrying; returning the challenge"
        counts "tower_bearer_challenges_total" "outcome" = reason;
    body_not_replayed(token: u32, reason: &'static str, limit: usize, is_news: bool) WARN if is_news
        { generation = token, reason, limit } "the request body cannot be sent again; returning the challenge"
        counts "tower_bearer_challenges_total" "outcome" = reason;
    not_refreshing(token: &Token, repeated: Option<u64>, is_news: bool) WARN if is_news
        { generation = token.generation(), repeated } "the API challenges new tokens too; not asking the source";
    invalidated(token: &Token) INFO { generation = token.generation() } "token invalidated";
    login_ignored(login: &str, reason: &'static str) INFO { login = login.get(..8), reason } "login ignored";
    shut_down() DEBUG {} "provider shut down";
    provider_evicted(reason: &'static str) DEBUG { reason } "provider evicted";
    exceeds_bound(providers: usize) WARN { providers } "more providers than max_providers; the others are in use";
}

pub(crate) fn credential_used(error: &SourceError) {
    event!(INFO, error = %ErrorChain(error), "refresh token not accepted; using the credential");
}

pub(crate) fn lifetime_ignored(default: Option<Duration>) {
    event!(WARN, lifetime_ms = default.map(millis), "expires_in is not a usable lifetime; using the default");
}

pub(crate) fn token_file_unreadable(error: &SourceError, failures: u64) {
    let text = "token file cannot be read; keeping the last good token";
    event!(WARN if failures == 1, error = %ErrorChain(error), failures, "{text}");
}

pub(crate) fn token_file_readable(failures: u64) {
    event!(INFO, failures, "token file can be read again");
}

fn millis_until(at: Instant) -> u64 {
    millis(at.saturating_duration_since(Instant::now()))
}
