//! [`TokenProvider`]: the handle that everyone shares, and the rules by which it gets the next token.
//!
//! handle (this file) → `refresh`, `background` → `shared` → `state`. Every decision is a function of `state`; `shared`
//! makes it under one lock. `challenge_pause`, `cool_down`, `outage` and `refresh_ahead` are arithmetic.
//!
//! A refresh, from the caller that needs it to the callers that wait for it:
//!
//! ```text
//! caller          shared              state          task            source       waiters
//!   │ obtain(need)   │                   │              │                │            │
//!   ├───────────────▶│ decide, locked    │              │                │            │
//!   │                ├──────────────────▶│ Start        │                │            │
//!   │◀───────────────┴───────────────────┤              │                │            │
//!   │ spawn, unlocked                    │              │                │            │
//!   ├──────────────────────────────────────────────────▶│ fetch(request) │            │
//!   │ wait           │                   │              ├───────────────▶│            │
//!   │                │                   │              │                │   obtain: Join
//!   │                │                   │              │     token      │  ◀─────────┤ wait
//!   │                │ finish, locked    │              │◀───────────────┤            │
//!   │                │◀─────────────────────────────────┤                │            │
//!   │                ├──────────────────▶│ Published    │                │            │
//!   │                │ publish, unlock   │              │                │            │
//!   │                ├─────────────────────────────────▶│ wake, unlocked │            │
//!   │◀──────────────────────────────────────────────────┼────────────────────────────▶│
//! ```
//!
//! The token is published before the waiters wake, and both after the decision of the state: a caller that wakes, or
//! comes later, finds the new token.

mod background;
mod builder;
mod challenge_pause;
mod config;
mod cool_down;
mod outage;
mod refresh;
mod refresh_ahead;
mod shared;
mod state;
mod status;
mod status_changes;
mod sync;

#[cfg(feature = "store")]
use std::time::Duration;
use std::{fmt, sync::Arc, time::SystemTime};

use http::HeaderValue;
use tokio::time::Instant;

#[cfg(feature = "tenants")]
pub(crate) use self::config::Group;
pub use self::{
    builder::TokenProviderBuilder,
    refresh_ahead::RefreshAhead,
    status::{Freshness, Status},
    status_changes::StatusChanges,
};
pub(crate) use self::{challenge_pause::Part, refresh::Waiting, state::Need, sync::Cache};

use self::{config::Config, refresh::obtain, shared::Shared, state::AFTER_INTERRUPTION};
use crate::{
    error::Error,
    observability::Reporter,
    origins::AllowedOrigins,
    source::{DynTokenSource, TokenSource},
    token::{self, Token, TokenId},
};
#[cfg(feature = "store")]
use crate::{
    retry::Backoff,
    store::{NoSource, Role, TokenStore},
};

/// The delay between two checks of a store that fails, min and max.
#[cfg(feature = "store")]
const STORE_BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// Holds one credential's current token and refreshes it, once for all callers.
///
/// A provider is a cheap handle: clones share everything, and any number of layers and tasks may use one. One provider
/// has one credential; two providers never share a token.
///
/// ```
/// # async fn run() -> Result<(), tower_bearer::Error> {
/// use tower_bearer::{Token, TokenProvider, source_fn};
///
/// let provider = TokenProvider::new(source_fn(|_| async { Ok(Token::builder("eyJ0eXAi").build()?) }));
/// assert!(provider.current().is_none());
/// assert_eq!(provider.token().await?.access_token(), "eyJ0eXAi");
/// assert_eq!(provider.status().generation, 1);
/// # Ok(())
/// # }
/// # tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(run()).unwrap();
/// ```
///
/// # Refreshes
///
/// A refresh obtains the next token. At most one runs at a time, in a task of its own on the tokio runtime of the
/// caller that started it, so that a dropped caller cannot lose a refresh token that is being spent. All waiters get
/// the same result. If the refresh panics or its runtime shuts down, all waiters get [`Error::Interrupted`], and the
/// next caller starts another. If processes share a [store](TokenProviderBuilder#method.store), a refresh reads the
/// store first.
///
/// A runtime that nobody drives, such as one for the current thread after `block_on` has returned, does not run its
/// tasks. A caller on another runtime waits for a refresh on it at most for the
/// [refresh timeout](TokenProviderBuilder::refresh_timeout). Then the refresh is abandoned: its waiters get
/// [`Error::TimedOut`], or the failure of its newest attempt, and the next caller starts another on its own runtime. If the
/// abandoned refresh ends later, its token is used only if no later refresh has brought one. A caller outside of any
/// tokio runtime has no such bound.
///
/// # When a token is refreshed
///
/// A token is **fresh** at first: it is used. In the last tenth of its life ([`RefreshAhead`]) it is **expiring**: it
/// is still used, and the first request starts a refresh that no request waits for. Callers wait only if there is no
/// token, or if it has **expired**. A token without a lifetime is used until the API challenges it. A provider that is
/// to
/// [keep fresh](TokenProviderBuilder::keep_fresh) does all this without requests, too.
///
/// Time is the monotonic clock's. A token that has less than 100 ms left when it arrives is used until a second after
/// its end, and the backoff decides when the source is asked for the next one. After that, callers wait, or get the
/// error. A token that expired more than a second before it arrived is not used, but its refresh token is. A lifetime
/// of zero ends on arrival.
///
/// # What a failure does
///
/// A failed refresh never takes a token away: callers get the current token until it expires. A transient failure is
/// retried, with
/// [backoff](TokenProviderBuilder::retry). After a permanent failure all waiters, and all callers until the end of the
/// [cool-down](TokenProviderBuilder::cool_down), get its error, and the source is not asked. Then one refresh checks whether the
/// failure persists.
///
/// # Shutdown
///
/// When the last handle is dropped, those in layers and services included, the background task ends, and so does a
/// refresh that waits for its next attempt. A refresh that waits for its source continues until the source has
/// answered.
/// [`shutdown`](Self::shutdown) does the same, and waits for it.
///
/// # Memory
///
/// An idle provider that has neither a store nor a background task takes at most 640 bytes of heap, its source and its
/// token not counted.
#[derive(Clone)]
pub struct TokenProvider {
    handle: Arc<Handle>,
}

/// Shuts the provider down when the last handle is dropped. Refreshes hold [`Shared`], not this.
struct Handle {
    shared: Arc<Shared>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.shut_down();
    }
}

impl TokenProvider {
    /// Makes a provider with the default options. Nothing is fetched before the first request.
    ///
    /// A source that is set up wrongly is an error of the first request.
    pub fn new(source: impl TokenSource) -> Self {
        Self::with_config(Box::new(source), Config::default())
    }

    /// Starts to build a provider with other options.
    pub fn builder<T: TokenSource>(source: T) -> TokenProviderBuilder<T> {
        TokenProviderBuilder::new(source)
    }

    /// Starts to build a provider without a credential: it uses the tokens that other processes publish in `store`
    /// ([`Role::Reader`]).
    ///
    /// Its source names no origins: name them with
    /// [`BearerAuthLayer::allowed_origins`](crate::BearerAuthLayer::allowed_origins). By default the token goes to every
    /// `https` origin, and to loopback.
    #[cfg(feature = "store")]
    #[cfg_attr(docsrs, doc(cfg(feature = "store")))]
    pub fn reader(store: impl TokenStore) -> TokenProviderBuilder<NoSource> {
        Self::builder(NoSource::new()).store(store).role(Role::Reader)
    }

    fn with_config(source: Box<dyn DynTokenSource>, mut config: Config) -> Self {
        // Only one refresh runs at a time: none uses the budget.
        config.retry = config.retry.without_budget();
        let shared = Arc::new(Shared::new(source, config, SystemTime::now));
        shared.reporter.register();
        background::start(&shared);
        Self { handle: Arc::new(Handle { shared }) }
    }

    /// Makes a provider that reports what concerns a group. It is not used for requests.
    #[cfg(feature = "tenants")]
    pub(crate) fn reporting_for(group: &Group, source: impl TokenSource) -> Self {
        let config = Config { group: Some(group.clone()), ..Config::default() };
        let shared = Arc::new(Shared::new(Box::new(source), config, SystemTime::now));
        shared.reporter.register_group();
        Self { handle: Arc::new(Handle { shared }) }
    }

    #[inline]
    fn shared(&self) -> &Arc<Shared> {
        &self.handle.shared
    }

    /// Returns the current token. Waits only if there is none, or if it has expired.
    ///
    /// # Errors
    ///
    /// [`Error`] with the reason why the refresh brought no token. During the cool-down after a permanent failure it comes
    /// at once. After a transient failure, the caller waits for the rest of the backoff or of the source's `Retry-After`
    /// ([`Status::retry_in`]), and then the source is asked again. Outside of a tokio runtime, [`Error::NoRuntime`].
    ///
    /// # Cancel safety
    ///
    /// Dropping the future does not stop the refresh: the next caller gets its token.
    pub async fn token(&self) -> Result<Token, Error> {
        match self.usable() {
            Some(token) => Ok(token),
            None => self.obtain(Need::Any).await,
        }
    }

    /// Returns the current token unless it has expired. Never waits, and starts no refresh.
    pub fn current(&self) -> Option<Token> {
        self.shared().published().filter(|token| !token.0.is_expired(Instant::now()))
    }

    /// Returns a token other than `challenged`, which the API has just challenged.
    ///
    /// If the provider has another token already, that is the result; else this joins the running refresh, or starts
    /// one. If a challenge has started a refresh only just now, the result is `challenged` itself: the API challenges
    /// even the newest token, and the source is not asked until the pause ([`TokenProviderBuilder::cool_down`]) is
    /// over.
    ///
    /// # Errors
    ///
    /// As for [`token`](Self::token). The current token stays what it was.
    ///
    /// # Cancel safety
    ///
    /// As for [`token`](Self::token).
    pub async fn refresh(&self, challenged: &Token) -> Result<Token, Error> {
        let token = challenged.id();
        self.obtain(Need::OtherThan { token, part: Part::None, waits: false, challenge: None }).await
    }

    /// Waits for the first token, for a start-up check.
    ///
    /// Unlike [`token`](Self::token), which a failed refresh ends, this continues through transient failures until the
    /// [refresh timeout](TokenProviderBuilder::refresh_timeout) is over, so that this program and the auth endpoint may start in any
    /// order. A permanent failure ends it at once.
    ///
    /// If processes share a [store](TokenProviderBuilder#method.store), this also checks that it can be used: a reader has
    /// to read it, a member and a publisher also to write it. Usually the first token has shown that already. Otherwise
    /// this reads, leases and releases, with backoff until the refresh timeout is over. A program that may start while
    /// its store is down calls [`token`](Self::token) instead, which does not need the store.
    ///
    /// The last refresh that this waits for may take another refresh timeout.
    ///
    /// # Errors
    ///
    /// As for [`token`](Self::token): the newest failure. [`Error::Store`](crate::Error) (feature `store`) if the store
    /// cannot be used, at once if that is permanent.
    ///
    /// # Cancel safety
    ///
    /// As for [`token`](Self::token).
    pub async fn ready(&self) -> Result<Token, Error> {
        let shared = self.shared();
        let deadline = Instant::now() + shared.config.refresh_timeout;
        loop {
            let error = match self.token().await {
                Ok(token) => {
                    #[cfg(feature = "store")]
                    self.store_ready(deadline).await?;
                    return Ok(token);
                }
                Err(error) if error.is_transient() => error,
                Err(error) => return Err(error),
            };
            #[cfg(feature = "store")]
            if let Some(error) = shared.store_error().filter(|error| !error.is_transient()) {
                return Err(error);
            }
            let soonest = Instant::now() + AFTER_INTERRUPTION;
            let not_before = shared.state().not_before();
            let next = not_before.map_or(soonest, |at| at.max(soonest));
            if next >= deadline || shared.is_shut_down_before(next).await {
                return Err(error);
            }
        }
    }

    /// Checks the store until it can be used, if that is not known.
    #[cfg(feature = "store")]
    async fn store_ready(&self, deadline: Instant) -> Result<(), Error> {
        let shared = self.shared();
        let mut delays = Backoff::between(STORE_BACKOFF);
        while shared.source.store_needs_check() {
            tokio::runtime::Handle::try_current().map_err(|_| Error::NoRuntime)?;
            let error = match tokio::time::timeout_at(deadline, shared.source.check_store()).await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(error)) => Error::Store(error),
                Err(_) => shared.store_error().unwrap_or(Error::TimedOut(shared.config.refresh_timeout)),
            };
            let next = Instant::now() + delays.next_delay();
            if !error.is_transient() || next >= deadline || shared.is_shut_down_before(next).await {
                return Err(error);
            }
        }
        Ok(())
    }

    /// Removes the current token, because it is known not to work any more: the next caller waits for another.
    ///
    /// For a 401 of an API there is [`refresh`](Self::refresh), which loses nothing if it fails. The refresh token is
    /// kept for the next refresh. A running refresh continues, and its token will be used.
    pub fn invalidate(&self) {
        self.shared().invalidate();
    }

    /// Shuts the provider down: no refresh starts any more, the background task ends, and this waits for a running
    /// refresh, so that its refresh token is not lost. A refresh that waits for its next attempt ends at once.
    ///
    /// The current token is still given until it expires; after that, callers get [`Error::ShutDown`]. This takes as
    /// long as the source's running exchange, and at most the [refresh timeout](TokenProviderBuilder::refresh_timeout). An
    /// exchange of [`OAuth2`](crate::OAuth2#refresh-tokens) that has outlived its refresh, and a token that the store has
    /// not taken yet, are not waited for.
    ///
    /// # Cancel safety
    ///
    /// If the future was polled once, the provider is shut down.
    pub async fn shutdown(&self) {
        self.shared().shut_down();
        self.shared().at_rest().await;
    }

    /// Returns a snapshot of the provider. Takes a lock for a moment.
    pub fn status(&self) -> Status {
        self.shared().status()
    }

    /// Returns a watcher of the status, which reports changes from now on.
    ///
    /// ```
    /// # async fn run() -> Result<(), tower_bearer::Error> {
    /// # use tower_bearer::{Token, TokenProvider, source_fn};
    /// let provider = TokenProvider::new(source_fn(|_| async { Ok(Token::builder("eyJ0eXAi").build()?) }));
    /// let mut changes = provider.subscribe();
    /// let watcher = tokio::spawn(async move {
    ///     while let Some(status) = changes.next().await {
    ///         println!("token {} is {:?}", status.generation, status.freshness);
    ///     }
    /// });
    /// provider.ready().await?;
    /// provider.shutdown().await;
    /// watcher.await.unwrap();
    /// # Ok(())
    /// # }
    /// # tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(run()).unwrap();
    /// ```
    pub fn subscribe(&self) -> StatusChanges {
        StatusChanges::of(self.shared())
    }

    pub(crate) fn reporter(&self) -> &Reporter {
        &self.shared().reporter
    }

    /// The origins that the source's tokens are meant for.
    pub(crate) fn allowed_origins(&self) -> &AllowedOrigins {
        &self.shared().allowed_origins
    }

    /// A cache of the current token, for one service.
    ///
    /// A service that sends nothing keeps an old token in it, whose refresh token has been spent.
    pub(crate) fn cache(&self) -> Cache {
        self.shared().cache()
    }

    /// Returns the header for a request and the token in it, if there is one that works. Starts a refresh if it is
    /// expiring.
    #[inline]
    pub(crate) fn header<'a>(&self, cache: &'a mut Cache) -> Option<(&'a HeaderValue, TokenId)> {
        match cache.load() {
            Some(token) if token.is_fresh_now() || self.renew_ahead(token) => {
                Some((token.header(), token.id()))
            }
            _ => None,
        }
    }

    /// As [`token`](Self::token), without waiting.
    pub(crate) fn usable(&self) -> Option<Token> {
        self.shared().published().filter(|token| token.0.is_fresh_now() || self.renew_ahead(&token.0))
    }

    /// Whether a token that is not fresh works; if so, starts a refresh in the background.
    ///
    /// Decides about this very token: another may have been published since it was read.
    #[cold]
    fn renew_ahead(&self, token: &token::Inner) -> bool {
        let works = !token.is_expired(Instant::now());
        if works {
            self.obtain(Need::Ahead);
        }
        works
    }

    /// Resolves with a token that meets the need.
    ///
    /// The refresh, if one has to start, has started when this returns: a caller that does not wait drops the future.
    pub(crate) fn obtain(&self, need: Need) -> Waiting {
        background::start(self.shared());
        obtain(self.shared(), need)
    }

    /// Whether the API is known to accept this token, the newest one.
    #[inline]
    pub(crate) fn is_accepted(&self, token: TokenId) -> bool {
        self.shared().accepted() == token.generation
    }

    /// Records that the API has accepted this token.
    pub(crate) fn accept(&self, token: TokenId) {
        self.shared().accept(token);
    }

    /// Counts and reports a request that fails because there is no token.
    pub(crate) fn request_failed(&self, error: &Error) {
        self.shared().request_failed(error);
    }

    /// Counts and reports a request that is dropped while it waits for a token, if refreshes fail.
    pub(crate) fn request_given_up(&self) {
        self.shared().request_given_up();
    }

    /// Whether there is a handle besides this one.
    #[cfg(feature = "tenants")]
    pub(crate) fn has_other_handles(&self) -> bool {
        Arc::strong_count(&self.handle) > 1
    }

    #[cfg(feature = "tenants")]
    pub(crate) fn is_refreshing(&self) -> bool {
        self.shared().is_refreshing()
    }

    /// Whether only this process has the refresh token of a login. Runs no foreign code.
    #[cfg(feature = "tenants")]
    pub(crate) fn holds_only_copy(&self) -> bool {
        self.shared().holds_only_copy()
    }

    /// As [`shutdown`](Self::shutdown), without waiting.
    #[cfg(feature = "tenants")]
    pub(crate) fn begin_shutdown(&self) {
        self.shared().shut_down();
    }

    /// Makes the next failed request news again.
    #[cfg(feature = "tenants")]
    pub(crate) fn end_failures(&self) {
        self.shared().state().end_failures(Instant::now());
    }

    /// Records that a request that was challenged has succeeded with this token, in whose refresh it had this part.
    pub(crate) fn healed(&self, token: TokenId, part: Part) {
        self.shared().state().healed(token, part);
    }
}

impl fmt::Debug for TokenProvider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenProvider").field("status", &self.status()).finish_non_exhaustive()
    }
}
