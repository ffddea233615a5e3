//! [`TokenProvider`]: the handle that everyone shares, and the rules by which it gets the next token.
//!
//! handle → `core` → `shared_state` (the current token, and one lock) → `state` (every decision); `refresh` is the task that
//! asks the source, `landing` what callers wait for, `keeper` the background task; `challenge_pause` weighs the evidence for
//! a token; `refresh_ahead` and `cool_down` are arithmetic. This file is the public face.

mod builder;
mod challenge_pause;
mod cool_down;
mod core;
mod current;
mod keeper;
mod landing;
mod refresh;
mod refresh_ahead;
mod settings;
mod shared_state;
mod state;
mod status;

use std::{fmt, sync::Arc};

use http::HeaderValue;
use tokio::time::Instant;

pub use self::{
    builder::TokenProviderBuilder,
    refresh_ahead::RefreshAhead,
    status::{Freshness, Status, StatusChanges},
};
pub(crate) use self::{challenge_pause::Part, core::Waiting, current::Current, state::Challenged};

use self::{
    core::Core,
    settings::Settings,
    state::{AFTER_INTERRUPTION, Need},
};
#[cfg(feature = "store")]
use crate::store::{NoSource, Role, TokenStore};
use crate::{
    error::Error,
    observability::Reporter,
    origins::AllowedOrigins,
    source::{DynTokenSource, TokenSource},
    token::{Token, TokenId},
};

/// Holds one credential's current token and renews it, once for everybody.
///
/// A provider is a cheap handle: clones share everything, and any number of layers and tasks may use one. One provider
/// is one credential; two never share a token.
///
/// ```
/// # async fn run() -> Result<(), tower_bearer::Error> {
/// use tower_bearer::{SourceError, Token, TokenProvider, TokenRequest, TokenSource};
///
/// struct Vault;
///
/// impl TokenSource for Vault {
///     async fn fetch(&self, request: &TokenRequest<'_>) -> Result<Token, SourceError> {
///         Ok(Token::builder("eyJ0eXAi").build()?)
///     }
/// }
///
/// let provider = TokenProvider::new(Vault);
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
/// Obtaining a token is called a refresh. There is at most one at a time, in a task of its own on the tokio runtime of
/// the caller that started it, so that no caller's end can lose a refresh token that is being spent. Everyone who waits
/// gets its one outcome. If the refresh panics or its runtime shuts down, all waiters get [`Error::Interrupted`], and the
/// next caller starts another. Where processes share a [store](TokenProviderBuilder#method.store), a refresh asks that
/// first.
///
/// A runtime that nobody drives, such as one for the current thread after `block_on` has returned, does not run its tasks.
/// A caller on another runtime waits for a refresh on it at most for the
/// [refresh timeout](TokenProviderBuilder::refresh_timeout). Then the refresh is abandoned: its waiters get
/// [`Error::TimedOut`], or the failure of its newest attempt, and the next caller starts another on its own runtime. If the
/// abandoned one ends later, its token is used, unless the source was asked for the current one after it. A caller outside of
/// any tokio runtime has no such bound.
///
/// # When a token is renewed
///
/// A token is **fresh** at first: it is used. In the last tenth of its life ([`RefreshAhead`]) it is **ageing**: it is
/// still used, and the first request starts a refresh that nobody waits for. Only when there is no token, or it has
/// **expired**, do callers wait. A token without a lifetime is used until the API refuses it. A provider that is to
/// [keep fresh](TokenProviderBuilder::keep_fresh) does all this while nobody asks, too.
///
/// Time is the monotonic clock's. A token that has less than a tenth of a second left when it arrives is used until a second
/// after its end, and the source is asked for the next one by the backoff. After that, callers wait, or get the error. A
/// token that ended more than a second before it arrived is not used at all; its refresh token is. A lifetime of zero ends
/// on arrival.
///
/// # What a failure does
///
/// It takes no token away: whoever asks gets the current token as long as it lives. A transient failure is tried again, by
/// the [backoff](TokenProviderBuilder::retry); a permanent one is told to all who wait, and again, without asking the
/// source, until its [cool-down](TokenProviderBuilder::cool_down) is over. Then one refresh tries whether it still holds.
///
/// # The end
///
/// When the last handle is dropped, layers and services that were made of it included, the background task ends, and so
/// does a refresh that waits for its next attempt. An exchange with the source that is under way is brought to its end.
/// [`shutdown`](Self::shutdown) does the same, and waits for it.
#[derive(Clone)]
pub struct TokenProvider {
    handle: Arc<Handle>,
}

/// What all handles share; dropped with the last of them, while refreshes may still hold the core.
struct Handle {
    core: Arc<Core>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.core.shut_down();
    }
}

impl TokenProvider {
    /// Makes a provider with the default options. Nothing is fetched before the first request.
    pub fn new(source: impl TokenSource) -> Self {
        Self::with_settings(Box::new(source), Settings::default())
    }

    /// Starts a provider with options of its own.
    pub fn builder<T: TokenSource>(source: T) -> TokenProviderBuilder<T> {
        TokenProviderBuilder::new(source)
    }

    /// Starts a provider that has no credential: it uses what the others that share `store` publish ([`Role::Reader`]).
    ///
    /// Its source names no origins: name them with [`BearerAuthLayer::scope`](crate::BearerAuthLayer::allowed_origins). By
    /// default the token goes to every `https` origin, and to loopback.
    ///
    /// [`Role::Reader`]: crate::store::Role::Reader
    #[cfg(feature = "store")]
    #[cfg_attr(docsrs, doc(cfg(feature = "store")))]
    pub fn reader(store: impl TokenStore) -> TokenProviderBuilder<impl TokenSource> {
        Self::builder(NoSource).store(store).role(Role::Reader)
    }

    fn with_settings(source: Box<dyn DynTokenSource>, settings: Settings) -> Self {
        let core = Arc::new(Core::new(source, settings));
        core.keep();
        Self { handle: Arc::new(Handle { core }) }
    }

    #[inline]
    fn core(&self) -> &Arc<Core> {
        &self.handle.core
    }

    /// The current token; waits for one only if there is none, or it has expired.
    ///
    /// # Errors
    ///
    /// [`Error`] with the reason why the refresh gave none. During the cool-down after a permanent failure this comes at
    /// once. Outside of a tokio runtime, [`Error::NoRuntime`].
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves the refresh to go on: its token is there for the next caller.
    pub async fn token(&self) -> Result<Token, Error> {
        match self.core().usable() {
            Some(token) => Ok(token),
            None => self.obtain().await,
        }
    }

    /// The current token unless it has expired; never waits, and starts nothing.
    pub fn current(&self) -> Option<Token> {
        self.core().working()
    }

    /// A token other than `refused`, which the API has just refused.
    ///
    /// If the provider has another already, that is the answer; else this joins the refresh under way, or starts one.
    /// If a challenge has started a refresh only just now, the answer is `refused` itself: the API challenges even the newest
    /// token, and the source is left alone until the pause ([`TokenProviderBuilder::cool_down`]) is over.
    ///
    /// # Errors
    ///
    /// As for [`token`](Self::token). The current token stays what it was.
    ///
    /// # Cancel safety
    ///
    /// As for [`token`](Self::token).
    pub async fn refresh(&self, refused: &Token) -> Result<Token, Error> {
        self.replace(Challenged { token: refused.id(), part: Part::None, waits: false }).await
    }

    /// Waits for the first token, for a start-up check: the token, or the reason why there is none.
    ///
    /// Unlike [`token`](Self::token), which a failed refresh ends, this goes on through transient failures until the
    /// [refresh timeout](TokenProviderBuilder::refresh_timeout) is over, so that it does not matter whether this program or
    /// the auth endpoint is up first. A permanent failure is told at once.
    ///
    /// # Errors
    ///
    /// As for [`token`](Self::token): the newest failure.
    ///
    /// # Cancel safety
    ///
    /// As for [`token`](Self::token).
    pub async fn ready(&self) -> Result<Token, Error> {
        let deadline = Instant::now() + self.core().settings.refresh_timeout;
        loop {
            let error = match self.token().await {
                Err(error) if error.is_transient() => error,
                outcome => return outcome,
            };
            let soonest = Instant::now() + AFTER_INTERRUPTION;
            let next = self.core().not_before().0.map_or(soonest, |at| at.max(soonest));
            if next >= deadline || self.core().is_shut_down_before(next).await {
                return Err(error);
            }
        }
    }

    /// Drops the current token, because it is known to be of no use any more: the next caller waits for another.
    ///
    /// For an API's refusal there is [`refresh`](Self::refresh), which loses nothing if it fails. The refresh token is kept
    /// for the next refresh. A refresh that is under way is not touched, and its token will be used.
    pub fn invalidate(&self) {
        self.core().invalidate();
    }

    /// Ends the provider in good order: no refresh starts any more, the background task ends, and a refresh that is under
    /// way is waited for, so that its refresh token is not lost. A refresh that waits for its next attempt ends at once.
    ///
    /// The current token is still given as long as it lives; after that, [`Error::ShutDown`]. This takes as long as the
    /// source's exchange that is under way, and at most the
    /// [refresh timeout](TokenProviderBuilder::refresh_timeout).
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves the provider shut down, or about to be.
    pub async fn shutdown(&self) {
        self.core().shut_down();
        self.core().at_rest().await;
    }

    /// What the provider can say of itself; takes a lock for a moment.
    pub fn status(&self) -> Status {
        self.core().status()
    }

    /// Says when the status changes, from now on.
    ///
    /// ```
    /// # async fn run() -> Result<(), tower_bearer::Error> {
    /// # use tower_bearer::{SourceError, Token, TokenProvider, TokenRequest, TokenSource};
    /// # struct Vault;
    /// # impl TokenSource for Vault {
    /// #     async fn fetch(&self, _: &TokenRequest<'_>) -> Result<Token, SourceError> { Ok(Token::builder("a").build()?) }
    /// # }
    /// let provider = TokenProvider::new(Vault);
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

    /// What tells the world of this provider.
    pub(crate) fn reporter(&self) -> &Reporter {
        &self.core().reporter
    }

    /// Which origins the source's tokens are meant for.
    pub(crate) fn allowed_origins(&self) -> &AllowedOrigins {
        &self.core().scope
    }

    /// The current token for one service's requests.
    pub(crate) fn current_for_service(&self) -> Current {
        Current::of(self.core())
    }

    /// The header for a request and the token that it is of, if there is one that will do.
    #[inline]
    pub(crate) fn header<'a>(&self, current: &'a mut Current) -> Option<(&'a HeaderValue, TokenId)> {
        current.header(self.core())
    }

    /// [`token`](Self::token) as a future that can be named, for when there is no current one.
    pub(crate) fn obtain(&self) -> Waiting {
        self.core().obtain(Need::Any)
    }

    /// [`refresh`](Self::refresh) as a future that can be named. A caller that does not wait drops it: what has to start
    /// has started.
    pub(crate) fn replace(&self, challenged: Challenged) -> Waiting {
        self.core().obtain(Need::OtherThan(challenged))
    }

    /// [`token`](Self::token) without waiting: the current token, which is renewed in the background if it is ageing.
    pub(crate) fn usable(&self) -> Option<Token> {
        self.core().usable()
    }

    /// Whether it is known that the API accepts this token, the newest one.
    #[inline]
    pub(crate) fn is_accepted(&self, token: TokenId) -> bool {
        self.core().accepted() == token.generation
    }

    /// The API has accepted this token.
    pub(crate) fn accept(&self, token: TokenId) {
        self.core().accept(token);
    }

    /// A request that was challenged has succeeded with this token, in whose refresh it had this part.
    pub(crate) fn healed(&self, token: TokenId, part: Part) {
        self.core().healed(token, part);
    }
}

impl fmt::Debug for TokenProvider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenProvider").field("status", &self.status()).finish_non_exhaustive()
    }
}
