//! What the crate tells of itself: `tracing` spans and events, and metrics. Never a secret.
//!
//! # Events (feature `tracing`, default)
//!
//! The target of all is `tower_bearer`. Durations are in whole milliseconds, and their fields end in `_ms`. `generation`
//! counts the access tokens of one provider from 1; an `error` is the whole chain, outermost first.
//!
//! Each refresh has a span of its own, `token_refresh` at INFO, with the fields `provider` (the name that
//! [`TokenProviderBuilder::name`](crate::TokenProviderBuilder::name) gave), `refresh` (counted from 1), `reason` (`missing`,
//! `expired`, `ageing`, `refused`) and `generation` (of the token that it is to replace, 0 if there is none). It follows from
//! the span of the request that started it, and what the token source does happens within it.
//!
//! Within a refresh's span:
//!
//! | message | level | fields |
//! |---|---|---|
//! | `asking the token source` | DEBUG | `attempt`, from 1 |
//! | `the token source failed: it is left alone for a while` | WARN | `attempt`, `delay_ms`, `kind`, `error` |
//! | `the refresh token was refused: the API key is tried` | INFO | `status` |
//! | `the refresh token counts as spent: the API key is tried` | WARN | |
//! | `expires_in is no number: the default lifetime is taken` | WARN | `lifetime_ms` |
//! | `a token was published` | INFO | `generation`, `expires_in_ms`, `refresh_in_ms` (both absent without a lifetime), `took_ms` |
//! | `the source gave the same access token again` | DEBUG | `generation` |
//! | `the source gave the refused access token again` | WARN | `generation` |
//! | `the token file cannot be read: the last good token is used on` | WARN | `error` |
//! | `the token is as good as expired: the source is left alone for a while` | WARN | `generation`, `delay_ms` |
//! | `the refresh failed` | WARN | `error`, `took_ms` |
//! | `the credential is of no use: callers are told so until the cool-down is over` | ERROR | `error`, `took_ms`, `cool_down_ms` |
//!
//! Where processes share a [store](crate::TokenProviderBuilder#method.store) (feature `store`), also these; `record` is the
//! generation of the store's record:
//!
//! | message | level | fields |
//! |---|---|---|
//! | `the store's token is adopted` | INFO | `record` |
//! | `another process has the lease: it is waited for` | TRACE | |
//! | `the token was stored` | DEBUG | `record` |
//! | `a newer lease has been given out: the token was not stored` | WARN | |
//! | `the token could not be stored: it will be tried again` | WARN | `error` |
//! | `the store's record counts as absent` | WARN | `error` |
//! | `the store cannot be used: this process goes on alone` | WARN | `error` |
//!
//! Outside of it, with the field `provider`:
//!
//! | message | level | fields |
//! |---|---|---|
//! | `the request is outside of the scope: it goes without the token` | WARN, once for each of the first 64 origins | `origin` |
//! | `the request waits for a token` | DEBUG | |
//! | `the request was challenged` | DEBUG | `generation`, `status`, `attempt` |
//! | `the request is sent again` | DEBUG | `generation` (of the new token), `attempt` (of the one to come), `delay_ms` |
//! | `the challenge is the answer` | DEBUG | `generation`, `reason` |
//! | `the refresh under way is joined` | TRACE | `refresh` |
//! | `the refused token has been replaced already` | DEBUG | `generation` (of the new token), `refused` (the other's) |
//! | `the newest token is refused too: the source is left alone` | WARN | `generation` |
//! | `the ageing token is used: the source is left alone for a while` | TRACE | `generation` |
//! | `the source is not asked: the failure still holds` | DEBUG | `error` |
//! | `the token was invalidated` | INFO | `generation` |
//! | `the wall clock has passed the monotonic one: the token's life is shorter` | INFO | `generation`, `jump_ms` |
//! | `the provider is shut down` | DEBUG | |
//!
//! The last table's `reason` is one of `retries` (all were used), `body` (it cannot be sent again), `token` (there is none: the
//! refresh's own events say why) and `budget` (the retry budget is spent).
//!
//! # Metrics (feature `metrics`)
//!
//! For whatever recorder the program has installed ([`metrics`](https://docs.rs/metrics)). All have the label `provider`.
//!
//! | name | type | unit | labels |
//! |---|---|---|---|
//! | `tower_bearer_refreshes_total` | counter | refreshes | `reason` as above; `outcome`: `published`, `transient`, `permanent` |
//! | `tower_bearer_refresh_duration_seconds` | histogram | seconds | `outcome` |
//! | `tower_bearer_source_failures_total` | counter | attempts that are followed by another, or could be | `kind`: `unavailable`, `invalid_response` |
//! | `tower_bearer_waits_total` | counter | requests that had to wait for their first token | |
//! | `tower_bearer_store_total` | counter | events of the table above | `outcome`: `adopted`, `stored`, `superseded`, `not_stored`, `invalid_record`, `alone` |
//! | `tower_bearer_challenges_total` | counter | challenged attempts | `outcome`: `sent_again`, or the `reason` why not |
//!
//! A request with a good token, which is answered, costs no event and no metric.
#![cfg_attr(not(all(feature = "tracing", feature = "metrics")), allow(dead_code, unused_variables))]

use std::{error::Error as StdError, fmt, future::Future, sync::Arc, time::Duration};

use http::StatusCode;
use tokio::time::Instant;

#[cfg(feature = "store")]
use crate::store::StoreError;
use crate::{
    error::{Error, SourceError},
    token::{Token, TokenId},
};

macro_rules! event {
    ($level:ident, $($rest:tt)*) => {
        #[cfg(feature = "tracing")]
        tracing::event!(target: "tower_bearer", tracing::Level::$level, $($rest)*)
    };
}

macro_rules! count {
    ($name:literal $(, $label:literal => $value:expr)*) => {
        #[cfg(feature = "metrics")]
        metrics::counter!($name $(, $label => $value)*).increment(1)
    };
}

/// Tells what one provider, and the layers that share it, do.
#[derive(Clone)]
pub(crate) struct Reporter {
    provider: Arc<str>,
}

/// Why a challenged request is not sent again.
#[derive(Clone, Copy)]
pub(crate) enum NotSentAgain {
    /// All were used.
    Retries,
    /// It cannot be sent again.
    Body,
    /// There is none.
    Token,
    /// It is spent.
    Budget,
}

impl Reporter {
    pub(crate) fn new(provider: &Arc<str>) -> Self {
        Self { provider: Arc::clone(provider) }
    }

    /// The span of a refresh.
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

    pub(crate) fn attempt_failed(&self, attempt: u32, error: &Error, delay: Duration) {
        let kind = match error {
            Error::Source(error) => error.kind().name(),
            _ => "other",
        };
        event!(
            WARN,
            attempt,
            delay_ms = millis(delay),
            kind,
            error = %Chain(error),
            "the token source failed: it is left alone for a while"
        );
        count!("tower_bearer_source_failures_total", "provider" => Arc::clone(&self.provider), "kind" => kind);
    }

    /// `same`: the source gave the access token that it had given before. `postponed`: how long it is left alone, because
    /// the token is hardly of use.
    pub(crate) fn published(
        &self,
        token: &Token,
        reason: &'static str,
        same: bool,
        postponed: Option<Duration>,
        took: Duration,
    ) {
        let generation = token.generation();
        match (same, reason) {
            (false, _) => {
                event!(
                    INFO,
                    generation,
                    expires_in_ms = token.remaining().map(millis),
                    refresh_in_ms = token.refresh_at().map(millis_until),
                    took_ms = millis(took),
                    "a token was published"
                );
            }
            (true, "challenged") => {
                event!(WARN, generation, "the source gave the refused access token again");
            }
            (true, _) => {
                event!(DEBUG, generation, "the source gave the same access token again");
            }
        }
        if let Some(delay) = postponed {
            event!(
                WARN,
                generation,
                delay_ms = millis(delay),
                "the token is as good as expired: the source is left alone for a while"
            );
        }
        self.landed(reason, "published", took);
    }

    pub(crate) fn failed(
        &self,
        error: &Error,
        reason: &'static str,
        cool_down: Option<Duration>,
        took: Duration,
    ) {
        match cool_down {
            None => {
                event!(WARN, error = %Chain(error), took_ms = millis(took), "the refresh failed");
                self.landed(reason, "transient", took);
            }
            Some(cool_down) => {
                event!(
                    ERROR,
                    error = %Chain(error),
                    took_ms = millis(took),
                    cool_down_ms = millis(cool_down),
                    "the credential is of no use: callers are told so until the cool-down is over"
                );
                self.landed(reason, "permanent", took);
            }
        }
    }

    fn landed(&self, reason: &'static str, outcome: &'static str, took: Duration) {
        #[cfg(feature = "metrics")]
        metrics::histogram!(
            "tower_bearer_refresh_duration_seconds",
            "provider" => Arc::clone(&self.provider), "outcome" => outcome
        )
        .record(took);
        count!(
            "tower_bearer_refreshes_total",
            "provider" => Arc::clone(&self.provider), "reason" => reason, "outcome" => outcome
        );
    }

    #[cfg(feature = "store")]
    fn store(&self, outcome: &'static str) {
        count!("tower_bearer_store_total", "provider" => Arc::clone(&self.provider), "outcome" => outcome);
    }

    #[cfg(feature = "store")]
    pub(crate) fn adopted(&self, record: u64) {
        event!(INFO, record, "the store's token is adopted");
        self.store("adopted");
    }

    #[cfg(feature = "store")]
    pub(crate) fn waiting_for_lease(&self) {
        event!(TRACE, "another process has the lease: it is waited for");
    }

    #[cfg(feature = "store")]
    pub(crate) fn stored(&self, record: u64) {
        event!(DEBUG, record, "the token was stored");
        self.store("stored");
    }

    #[cfg(feature = "store")]
    pub(crate) fn superseded(&self) {
        event!(WARN, "a newer lease has been given out: the token was not stored");
        self.store("superseded");
    }

    #[cfg(feature = "store")]
    pub(crate) fn not_stored(&self, error: &StoreError) {
        event!(WARN, error = %Chain(error), "the token could not be stored: it will be tried again");
        self.store("not_stored");
    }

    #[cfg(feature = "store")]
    pub(crate) fn invalid_record(&self, error: &StoreError) {
        event!(WARN, error = %Chain(error), "the store's record counts as absent");
        self.store("invalid_record");
    }

    #[cfg(feature = "store")]
    pub(crate) fn alone(&self, error: &StoreError) {
        event!(WARN, error = %Chain(error), "the store cannot be used: this process goes on alone");
        self.store("alone");
    }

    pub(crate) fn joined(&self, refresh: u64) {
        event!(TRACE, provider = %self.provider, refresh, "the refresh under way is joined");
    }

    pub(crate) fn replaced_already(&self, refused: TokenId, token: &Token) {
        event!(
            DEBUG,
            provider = %self.provider,
            generation = token.generation(),
            refused = refused.generation,
            "the refused token has been replaced already"
        );
    }

    pub(crate) fn told_again(&self, error: &Error) {
        event!(DEBUG, provider = %self.provider, error = %Chain(error), "the source is not asked: the failure still holds");
    }

    pub(crate) fn used_meanwhile(&self, token: &Token) {
        event!(
            TRACE,
            provider = %self.provider,
            generation = token.generation(),
            "the ageing token is used: the source is left alone for a while"
        );
    }

    pub(crate) fn left_alone(&self, token: &Token) {
        event!(
            WARN,
            provider = %self.provider,
            generation = token.generation(),
            "the newest token is refused too: the source is left alone"
        );
    }

    pub(crate) fn invalidated(&self, token: &Token) {
        event!(INFO, provider = %self.provider, generation = token.generation(), "the token was invalidated");
    }

    pub(crate) fn shortened(&self, token: &Token, jump: Duration) {
        event!(
            INFO,
            provider = %self.provider,
            generation = token.generation(),
            jump_ms = millis(jump),
            "the wall clock has passed the monotonic one: the token's life is shorter"
        );
    }

    pub(crate) fn shut_down(&self) {
        event!(DEBUG, provider = %self.provider, "the provider is shut down");
    }

    pub(crate) fn outside(&self, origin: &str) {
        event!(
            WARN,
            provider = %self.provider,
            origin,
            "the request is outside of the scope: it goes without the token"
        );
    }

    pub(crate) fn waiting(&self) {
        event!(DEBUG, provider = %self.provider, "the request waits for a token");
        count!("tower_bearer_waits_total", "provider" => Arc::clone(&self.provider));
    }

    pub(crate) fn challenged(&self, refused: TokenId, status: StatusCode, retries: u32) {
        event!(
            DEBUG,
            provider = %self.provider,
            generation = refused.generation,
            status = status.as_u16(),
            attempt = retries + 1,
            "the request was challenged"
        );
    }

    pub(crate) fn sent_again(&self, token: TokenId, retries: u32, delay: Duration) {
        event!(
            DEBUG,
            provider = %self.provider,
            generation = token.generation,
            attempt = retries + 1,
            delay_ms = millis(delay),
            "the request is sent again"
        );
        count!(
            "tower_bearer_challenges_total", "provider" => Arc::clone(&self.provider), "outcome" => "sent_again"
        );
    }

    pub(crate) fn not_sent_again(&self, refused: TokenId, reason: NotSentAgain) {
        let reason = match reason {
            NotSentAgain::Retries => "retries",
            NotSentAgain::Body => "body",
            NotSentAgain::Token => "token",
            NotSentAgain::Budget => "budget",
        };
        event!(
            DEBUG,
            provider = %self.provider,
            generation = refused.generation,
            reason,
            "the challenge is the answer"
        );
        count!("tower_bearer_challenges_total", "provider" => Arc::clone(&self.provider), "outcome" => reason);
    }
}

#[cfg(feature = "api-video")]
pub(crate) fn refresh_token_rejected(status: StatusCode) {
    event!(INFO, status = status.as_u16(), "the refresh token was refused: the API key is tried");
}

#[cfg(feature = "api-video")]
pub(crate) fn refresh_token_spent() {
    event!(WARN, "the refresh token counts as spent: the API key is tried");
}

#[cfg(feature = "api-video")]
pub(crate) fn lifetime_ignored(default: Duration) {
    event!(WARN, lifetime_ms = millis(default), "expires_in is no number: the default lifetime is taken");
}

pub(crate) fn token_file_unreadable(error: SourceError) {
    event!(WARN, error = %Chain(&Error::from(error)), "the token file cannot be read: the last good token is used on");
}

#[cfg(feature = "tracing")]
pub(crate) use tracing::Span;
/// Without the feature `tracing`: none.
#[cfg(not(feature = "tracing"))]
#[derive(Clone)]
pub(crate) struct Span;

/// Calls `report` within `span`.
pub(crate) fn report_within(span: Option<Span>, report: impl FnOnce()) {
    #[cfg(feature = "tracing")]
    let _entered = span.as_ref().map(Span::enter);
    report();
}

/// That of what runs now.
#[cfg(feature = "store")]
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

/// As events and stores tell a time.
pub(crate) fn millis(duration: Duration) -> u64 {
    duration.as_millis().try_into().unwrap_or(u64::MAX)
}

fn millis_until(at: Instant) -> u64 {
    millis(at.saturating_duration_since(Instant::now()))
}

/// An error and all beneath it, outermost first.
#[cfg(all(test, feature = "api-video"))]
pub(crate) fn chain(error: &dyn StdError) -> String {
    Chain(error).to_string()
}

/// An error and all beneath it, outermost first.
struct Chain<'a>(&'a dyn StdError);

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut beneath = self.0.source();
        while let Some(error) = beneath {
            write!(f, ": {error}")?;
            beneath = error.source();
        }
        Ok(())
    }
}

/// Tells an installed recorder of the [`metrics`](self#metrics-feature-metrics) what they are and in which unit: call it
/// once, after installing the recorder.
#[cfg(feature = "metrics")]
#[cfg_attr(docsrs, doc(cfg(feature = "metrics")))]
pub fn describe_metrics() {
    use metrics::{Unit, describe_counter, describe_histogram};

    describe_counter!(
        "tower_bearer_refreshes_total",
        Unit::Count,
        "Attempts of a provider to obtain a token."
    );
    describe_histogram!(
        "tower_bearer_refresh_duration_seconds",
        Unit::Seconds,
        "How long a provider took to obtain a token, or to fail."
    );
    describe_counter!(
        "tower_bearer_source_failures_total",
        Unit::Count,
        "Transient failures of the token source."
    );
    describe_counter!(
        "tower_bearer_store_total",
        Unit::Count,
        "What became of the token that is shared with other processes."
    );
    describe_counter!("tower_bearer_waits_total", Unit::Count, "Requests that had to wait for a token.");
    describe_counter!("tower_bearer_challenges_total", Unit::Count, "Attempts that the API refused.");
}
