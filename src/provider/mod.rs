//! [`TokenProvider`]: the handle that everyone shares, and the rules by which it gets the next token.
//!
//! A need goes from the handle (this file) to [`refresh`], which asks [`core`] under its lock. [`decide`] has the rules,
//! [`state`] what they are about and [`pace`] how often challenges count. A refresh runs in its own task. At its end, the
//! token is published before the waiters wake: a caller that wakes, or comes later, finds it.

mod background;
mod builder;
mod core;
mod decide;
mod failure;
mod keep_fresh;
mod options;
mod pace;
mod ready;
mod refresh;
mod state;
mod status;
mod status_changes;
mod with_token;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

pub use self::builder::TokenProviderBuilder;
pub use self::status::{Freshness, Status};
pub use self::status_changes::StatusChanges;
pub(crate) use self::{decide::Need, options::Group, refresh::Waiting};
use http::HeaderValue;

use self::core::Core;
use self::options::{ProviderOptions, ProviderParts};
use self::refresh::obtain;
use crate::challenge::Challenge;
use crate::debug::debug_fields;
use crate::error::{Error, SourceError};
use crate::login::Login;
use crate::observability::Reporter;
use crate::origins::AllowedOrigins;
use crate::source::{Credential, TokenRequest, TokenSource};
use crate::store::StoreAccess;
use crate::sync::Cache;
use crate::token::{Token, TokenId};

/// Holds one credential's current token and refreshes it, once for all callers.
///
/// A provider is a cheap handle: clones share everything, and any number of layers and tasks may use one. One provider
/// has one credential. Two providers share a token only by a [store](TokenProviderBuilder#method.store).
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
#[doc = include_str!("../guide/rules.md")]
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

/// Shuts the provider down when the last handle is dropped. Refreshes hold [`Core`], not this.
struct Handle {
    core: Arc<Core>,
    /// When a member of a group was used last, in milliseconds of the group.
    used_at: AtomicU64,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.core.shut_down();
    }
}

impl TokenProvider {
    /// Makes a provider with the default options. Nothing is fetched before the first request.
    ///
    /// A source that is set up wrongly is an error of the first request.
    pub fn new(source: impl TokenSource) -> Self {
        Self::made_of(source, ProviderParts::default(), ProviderOptions::default())
    }

    fn made_of(source: impl TokenSource, parts: ProviderParts, config: ProviderOptions) -> Self {
        let reporter = || parts.reporter(&config);
        let store = |store| Box::new(StoreAccess::new(store, parts.role, parts.lease, reporter()));
        let store = parts.store.clone().map(store);
        let login = Login::new(Box::new(source), store, parts.login.clone(), reporter());
        let core = Arc::new(Core::new(login, config));
        core.reporter().register();
        parts.initial.into_iter().for_each(|token| core.set(token));
        keep_fresh::start(&core);
        Self { handle: Arc::new(Handle { core, used_at: AtomicU64::new(0) }) }
    }

    #[inline]
    pub(crate) fn core(&self) -> &Arc<Core> {
        &self.handle.core
    }

    /// Returns the current token. Waits if there is none, or if it has expired, and in the other cases of the
    /// [rules](Self#rules).
    ///
    /// # Errors
    ///
    /// [`Error`] with the reason why the refresh brought no token. During the cool-down after a permanent failure it comes
    /// at once. After a transient failure, the caller waits for the rest of the backoff or of the source's `Retry-After`
    /// ([`Status::retry_in`]), and then the source is asked again; if a refresh could not wait for so long, the error comes
    /// at once. Outside of a tokio runtime, [`Error::NoRuntime`], unless the provider has a
    /// [runtime](TokenProviderBuilder::runtime).
    ///
    /// # Cancel safety
    ///
    /// Dropping the future does not stop the refresh: the next caller gets its token.
    pub async fn token(&self) -> Result<Token, Error> {
        match self.fresh() {
            Some(token) => Ok(token),
            None => self.obtain(Need::Any).await,
        }
    }

    /// Returns the current token unless it has expired. Never waits, and starts no refresh.
    pub fn current(&self) -> Option<Token> {
        self.core().current()
    }

    /// Returns a token other than `challenged`, which the API has just challenged.
    ///
    /// If the provider has another token already, that is the result; else this joins the running refresh, or starts
    /// one. If the bucket of [challenges](Self#rules) is empty, the result is `challenged` itself, with its generation. The cool-down
    /// does not count here: a program that calls this has seen the challenge.
    ///
    /// # Errors
    ///
    /// As for [`token`](Self::token). The current token stays what it was.
    ///
    /// # Cancel safety
    ///
    /// As for [`token`](Self::token).
    pub async fn refresh(&self, challenged: &Token) -> Result<Token, Error> {
        self.obtain(Need::Other { than: challenged.id(), challenge: None, by_program: true }).await
    }

    /// Returns a token that is valid for at least `min_remaining`, such as for a long upload. A token without a lifetime is
    /// one.
    ///
    /// If the current one is not valid for so long, this waits for another one. The result is the current token if the
    /// newest one of the source has never been valid for so long, if the bucket of [challenges](Self#rules), from which each such
    /// refresh takes one, is empty, or of a [reader](Self::reader), which does not refresh.
    ///
    /// # Errors
    ///
    /// As for [`token`](Self::token), also if the current token works, but not for so long.
    ///
    /// # Cancel safety
    ///
    /// As for [`token`](Self::token).
    pub async fn token_for(&self, min_remaining: Duration) -> Result<Token, Error> {
        // A reader can only wait for its publisher, which refreshes when the token is expiring.
        let need = if self.core().login.is_reader() { Need::Any } else { Need::Lasting(min_remaining) };
        self.obtain(need.clone()).await?;
        // That of a store, or one that was set, may not be valid for long enough.
        self.obtain(need).await
    }

    /// Uses `token` from now on, which the program got in another way, until it is expiring or is challenged. A token that
    /// has expired, or expires within 100 ms, is ignored, and so is the current one.
    ///
    /// Callers that wait for a refresh get it. A refresh that is running goes on to its end, and changes nothing, unless
    /// callers wait for another token by then: for these the source is asked once more. What a user's login was granted
    /// meanwhile is kept for the next refresh. An event reports the token as a published one, in a span with the reason
    /// `set` ([`observability`](crate::observability)).
    ///
    /// It is the token of this process only: a [store](TokenProviderBuilder::store) does not get it, and the token in the
    /// store counts as one of the source. Its refresh token is not used: [`log_in`](Self::log_in) takes one.
    pub fn set(&self, token: Token) {
        self.core().set(token);
    }

    /// Gives the provider the refresh token of a new login, such as that of another user.
    ///
    /// If the login is new, the current token is not used any more, and neither is that of a refresh that is running: callers
    /// wait for a token of the new login, and never get one of the login before again. A login that the provider, or its
    /// [store](TokenProviderBuilder::store), knows is ignored: it is used already, or the one that is used has replaced it.
    /// An INFO event says which ([`observability`](crate::observability)). An empty refresh token is none, and a
    /// [reader](Self::reader) ignores each.
    ///
    /// The refresh token is in memory only until the next exchange, which stores it first: call [`ready`](Self::ready) to
    /// bring that about. Before that it is lost if the program ends, with or without a [`shutdown`](Self::shutdown). If it is
    /// not valid, or the source takes none, each exchange fails until another login is given. In other processes with the same
    /// store, the login counts from their next refresh on.
    ///
    /// The rules for a login are those of [`TokenProviderBuilder::login`].
    pub fn log_in(&self, refresh_token: impl Into<String>) {
        self.core().log_in(refresh_token.into());
    }

    /// Removes the current token, because it is known not to work any more: the next caller waits for another.
    ///
    /// For a 401 of an API there is [`refresh`](Self::refresh), which loses nothing if it fails. The refresh token is
    /// kept for the next refresh. A running refresh continues, and callers get its token.
    pub fn invalidate(&self) {
        self.core().invalidate();
    }

    /// Shuts the provider down: no refresh starts any more, the background task ends, and this waits for a running
    /// refresh, so that its refresh token is not lost. A refresh that waits for its next attempt ends at once.
    ///
    /// The current token is still given until it expires; after that, callers get [`Error::ShutDown`]. This takes as
    /// long as the source's running exchange, and at most the [refresh timeout](TokenProviderBuilder::refresh_timeout). A
    /// token that the store has not taken yet is not waited for. A [login](Self::log_in) that no exchange has presented yet is
    /// lost.
    ///
    /// # Cancel safety
    ///
    /// If the future was polled once, the provider is shut down.
    pub async fn shutdown(&self) {
        self.core().shut_down();
        self.core().at_rest().await;
    }

    /// Returns a snapshot of the provider. Takes a lock for a moment.
    pub fn status(&self) -> Status {
        self.core().status()
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
        StatusChanges::of(self.core())
    }

    pub(crate) fn reporter(&self) -> &Reporter {
        self.core().reporter()
    }

    /// Returns the header for a request and the token in it, if there is one that is fresh.
    #[inline(always)]
    pub(crate) fn header<'a>(&self, cache: &'a mut Cache) -> Option<(&'a HeaderValue, TokenId)> {
        let token = cache.load().as_ref().filter(|token| token.is_fresh_now())?;
        Some((&token.header, token.id))
    }

    /// Returns the current token, if it is fresh.
    #[inline]
    pub(crate) fn fresh(&self) -> Option<Token> {
        self.core().published().filter(|token| token.0.is_fresh_now())
    }

    /// Resolves with another token than that of the generation `than`, which the API has challenged.
    pub(crate) fn challenged(&self, than: u32, challenge: Option<Challenge>) -> Waiting {
        let than = TokenId { provider: self.core().number, generation: than };
        self.obtain(Need::Other { than, challenge, by_program: false })
    }

    /// Resolves with a token that meets the need, as [`refresh::obtain`].
    pub(crate) fn obtain(&self, need: Need) -> Waiting {
        let waiting = obtain(self.core(), need);
        // Afterwards: nobody would wait for a refresh that the background task has started, which may be lost.
        keep_fresh::start(self.core());
        waiting
    }
}

/// For a group of providers.
#[cfg_attr(not(feature = "tenants"), allow(dead_code))]
impl TokenProvider {
    /// Makes a provider that reports what concerns a group. It is not used for requests.
    pub(crate) fn reporting_for(group: &Arc<Group>, source: impl TokenSource) -> Self {
        let config = ProviderOptions { group: Some(Arc::clone(group)), ..ProviderOptions::default() };
        let provider = Self::made_of(source, ProviderParts::default(), config);
        provider.core().reporter().register_group();
        provider
    }

    /// When it was used last, in milliseconds of its group.
    #[inline]
    pub(crate) fn used_at(&self) -> &AtomicU64 {
        &self.handle.used_at
    }

    /// Whether there is a handle besides this one.
    pub(crate) fn has_other_handles(&self) -> bool {
        Arc::strong_count(&self.handle) > 1
    }

    /// Whether something would be lost with this provider: a refresh runs, or a login is not stored yet. Runs no foreign
    /// code.
    pub(crate) fn is_busy(&self) -> bool {
        self.core().is_busy() || self.core().login.has_unstored_login()
    }
}

/// A provider is a source: for the subject of [`OAuth2::token_exchange`](crate::OAuth2::token_exchange), such as a user's login.
///
/// Its tokens are requested as by any other caller, and keep their refresh token here. A token that was exchanged for one of
/// the login before [`log_in`](TokenProvider::log_in) is used until it expires: then
/// [invalidate](TokenProvider::invalidate) it. A stored one is used only once this provider knows its login, so a program that
/// starts exchanges one itself, unless it calls [`ready`](TokenProvider::ready) here first. The refresh token of a login is
/// stored by this provider alone: if the one for the exchange has a store, or is one of a group, this one needs a store, too.
impl TokenSource for TokenProvider {
    async fn fetch(&self, _: &TokenRequest<'_>) -> Result<Token, SourceError> {
        let token = self.token().await.map_err(|error| match error {
            Error::Source(error) => error,
            error if error.is_transient() => SourceError::unavailable(error.to_string()),
            error => SourceError::configuration(error.to_string()),
        })?;
        Ok(token.without_refresh_token())
    }

    fn credential(&self) -> Credential {
        self.core().login.credential()
    }

    fn allowed_origins(&self) -> AllowedOrigins {
        self.core().allowed_origins.clone()
    }
}

debug_fields!(TokenProvider |it| { status: it.status() });
