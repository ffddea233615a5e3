//! [`TokenProvider`]: the handle that everyone shares, and the rules by which it gets the next token.
//!
//! `flight` holds the one state machine and its lock; `lifetime` and `cool_down` are its arithmetic; this file is the
//! public face.

mod builder;
mod cool_down;
mod current;
mod flight;
mod lifetime;
mod status;

use std::{fmt, sync::Arc};

use http::HeaderValue;

pub use self::{builder::TokenProviderBuilder, status::Status};
pub(crate) use self::{current::Current, flight::Waiting};

use self::flight::{Core, Need, Settings};
use crate::{
    error::Error,
    source::TokenSource,
    token::{Token, TokenId},
};

/// Holds one credential's current token and renews it, once for everybody.
///
/// A provider is a cheap handle: clones share everything, and any number of layers and tasks may use one. One provider
/// is one credential; two never share a token.
///
/// ```
/// # async fn run() -> Result<(), tower_bearer::Error> {
/// use tower_bearer::{SourceError, Token, TokenProvider, TokenSource};
///
/// struct Vault;
///
/// impl TokenSource for Vault {
///     async fn fetch(&self, _previous: Option<&Token>) -> Result<Token, SourceError> {
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
/// # Flights
///
/// Obtaining a token is called a flight. There is at most one at a time, in a task of its own on the tokio runtime of
/// the caller that started it, so that no caller's end can lose a refresh token that is being spent. Everyone who waits
/// gets its one outcome. A flight that panics, or whose runtime is shut down, is an error for those who wait, and the
/// next caller starts another.
///
/// # When a token is renewed
///
/// In the last tenth of its life (give or take a tenth of that) the current token is still used, and the first request
/// starts a flight that nobody waits for. Only when there is no token, or it has expired, do callers wait. A token
/// without a lifetime is used until the API refuses it. A flight that fails takes no token away.
#[derive(Clone)]
pub struct TokenProvider {
    core: Arc<Core>,
}

impl TokenProvider {
    /// Makes a provider with the default options. Nothing is fetched before the first request.
    pub fn new(source: impl TokenSource) -> Self {
        Self::with_settings(source, Settings::default())
    }

    /// Starts a provider with options of its own.
    pub fn builder<T: TokenSource>(source: T) -> TokenProviderBuilder<T> {
        TokenProviderBuilder::new(source)
    }

    fn with_settings(source: impl TokenSource, settings: Settings) -> Self {
        Self { core: Arc::new(Core::new(source, settings)) }
    }

    /// The current token; waits for one only if there is none, or it has expired.
    ///
    /// # Errors
    ///
    /// [`Error`] with the reason why the flight gave none. During the cool-down after a permanent failure this comes at
    /// once. Outside of a tokio runtime, [`Error::NoRuntime`].
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves the flight to go on: its token is there for the next caller.
    pub async fn token(&self) -> Result<Token, Error> {
        match self.core.usable() {
            Some(token) => Ok(token),
            None => self.obtain().await,
        }
    }

    /// The current token unless it has expired; never waits, and starts nothing.
    pub fn current(&self) -> Option<Token> {
        self.core.working()
    }

    /// A token other than `refused`, which the API has just refused.
    ///
    /// If the provider has another already, that is the answer; else this joins the flight under way, or starts one.
    /// If challenges have caused a flight only just now, the answer is `refused` itself: the API refuses even the newest
    /// token, and the source is left alone until the cool-down
    /// ([`TokenProviderBuilder::cool_down`]) has passed.
    ///
    /// # Errors
    ///
    /// As for [`token`](Self::token). The current token stays what it was.
    ///
    /// # Cancel safety
    ///
    /// As for [`token`](Self::token).
    pub async fn refresh(&self, refused: &Token) -> Result<Token, Error> {
        self.replace(refused.id()).await
    }

    /// What the provider can say of itself; takes a lock for a moment.
    pub fn status(&self) -> Status {
        self.core.status()
    }

    /// The current token for one service's requests.
    pub(crate) fn current_for_service(&self) -> Current {
        Current::of(&self.core)
    }

    /// The header for a request and the token that it is of, if there is one that will do.
    #[inline]
    pub(crate) fn header<'a>(&self, current: &'a mut Current) -> Option<(&'a HeaderValue, TokenId)> {
        current.header(&self.core)
    }

    /// [`token`](Self::token) as a future that can be named, for when there is no current one.
    pub(crate) fn obtain(&self) -> Waiting {
        self.core.obtain(Need::Any)
    }

    /// [`refresh`](Self::refresh) as a future that can be named.
    pub(crate) fn replace(&self, refused: TokenId) -> Waiting {
        self.core.obtain(Need::OtherThan(refused))
    }

    /// [`refresh`](Self::refresh) for the next request: starts what has to be, and does not wait.
    pub(crate) fn replace_behind(&self, refused: TokenId) {
        self.core.request(Need::OtherThan(refused));
    }
}

impl fmt::Debug for TokenProvider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenProvider").field("status", &self.status()).finish_non_exhaustive()
    }
}
