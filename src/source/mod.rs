//! [`TokenSource`]: where tokens come from, and the sources that the crate has.
//!
//! A source makes one attempt per call and returns its result. The provider decides when to call it, and how often.

#[cfg(feature = "api-video")]
pub(crate) mod api_video;
pub(crate) mod client;
#[cfg(feature = "oauth2")]
pub mod oauth2;
#[cfg(any(feature = "api-video", feature = "oauth2"))]
mod presented;
mod request;
mod source_fn;
mod static_token;
mod token_file;

use std::{future::Future, pin::Pin, sync::Arc};

pub(crate) use self::request::CurrentReason;
pub use self::{
    client::{TokenClient, TokenResponse},
    request::{RefreshReason, TokenRequest},
    source_fn::{SourceFn, source_fn},
    static_token::StaticToken,
    token_file::TokenFile,
};

#[cfg(feature = "store")]
use crate::error::StoreError;
use crate::{error::SourceError, origins::AllowedOrigins, token::Token};

/// Where a [`TokenProvider`](crate::TokenProvider) gets its tokens.
///
/// Implement it for another token service. If that needs no state, [`source_fn`] is shorter.
///
/// ```
/// use std::time::Duration;
/// use tower_bearer::{SourceError, Token, TokenRequest, TokenSource};
///
/// /// Reads the token of an agent on the same host.
/// struct Agent;
///
/// impl TokenSource for Agent {
///     async fn fetch(&self, _request: &TokenRequest<'_>) -> Result<Token, SourceError> {
///         let text = std::fs::read_to_string("/run/agent/token")
///             .map_err(|error| SourceError::unavailable("the agent has no token yet").with_cause(error))?;
///         Ok(Token::builder(text.trim()).expires_in(Duration::from_secs(300)).build()?)
///     }
/// }
/// ```
pub trait TokenSource: Send + Sync + 'static {
    /// Obtains one token, in one attempt.
    ///
    /// [`request`](TokenRequest) has the token that the provider published last. This call may spend its refresh token.
    /// The provider calls this from its own task, and does the retries. It does not make a second call before the
    /// first ends, unless the runtime of the first is not driven any more
    /// ([`TokenProvider`](crate::TokenProvider#rules)). A source that waits for a peer should limit that wait.
    ///
    /// # Errors
    ///
    /// A [`SourceError`] whose kind says whether to try again. [`SourceError::from_status`] makes it for an HTTP
    /// response. The message must not contain a secret.
    ///
    /// # Cancel safety
    ///
    /// The future is dropped when the refresh times out
    /// ([`refresh_timeout`](crate::TokenProviderBuilder::refresh_timeout)). A source that spends a credential must
    /// record that before it sends the request, because the drop may lose the result.
    fn fetch(&self, request: &TokenRequest<'_>) -> impl Future<Output = Result<Token, SourceError>> + Send;

    /// Renews the previous token with what came with it, such as its refresh token, and with nothing else. Default:
    /// [`fetch`](Self::fetch).
    ///
    /// `request` has a previous token. Returns `None` if that token has nothing to renew it by, or if the service
    /// rejected it; the provider then calls `fetch` without a previous token, which uses the credential. Returns an
    /// error if the service did not answer. Override the default if the source has both a refresh token and a
    /// credential.
    ///
    /// The provider calls this instead of `fetch` if processes share a token. The use of the credential may end the
    /// refresh token of the other processes. Before it, the provider therefore checks once more whether one of them has
    /// renewed the token.
    ///
    /// # Errors
    ///
    /// Those of [`fetch`](Self::fetch).
    ///
    /// # Cancel safety
    ///
    /// The same as for [`fetch`](Self::fetch).
    fn renew(
        &self,
        request: &TokenRequest<'_>,
    ) -> impl Future<Output = Result<Option<Token>, SourceError>> + Send {
        async { self.fetch(request).await.map(Some) }
    }

    /// Checks the source's options and credential, without any I/O. Default: they are valid.
    ///
    /// [`TokenProviderBuilder::build`](crate::TokenProviderBuilder::build) calls this. [`TokenProvider::new`] cannot
    /// fail: there, the first [`fetch`](Self::fetch) has to report the same error.
    ///
    /// [`TokenProvider::new`]: crate::TokenProvider::new
    ///
    /// # Errors
    ///
    /// [`SourceError::configuration`], which names the option, the accepted values, and the value unless it is a
    /// secret.
    fn validate(&self) -> Result<(), SourceError> {
        Ok(())
    }

    /// Returns a number that changes whenever the credential does. Default: it never changes.
    ///
    /// A change ends the cool-down after the rejection of the old credential.
    fn revision(&self) -> u64 {
        0
    }

    /// Returns the refresh token to present if the previous token has none that works, such as the one of a user's login
    /// ([`Token::from_refresh_token`]). Default: none.
    ///
    /// Only called if processes share a [store](crate::TokenProviderBuilder#method.store). The provider stores the refresh
    /// token, and then calls [`renew`](Self::renew) with it as the previous token: if this process ends, another one
    /// continues with it. If `renew` returns `None`, the provider calls this again, until it returns none or the same one.
    /// Without a store, [`fetch`](Self::fetch) has to present it.
    ///
    /// `renew` may get a refresh token that was rejected before, from the store. A source that must not present it again
    /// has to remember it.
    ///
    /// ```
    /// use std::sync::Mutex;
    /// use tower_bearer::{SourceError, Token, TokenRequest, TokenSource};
    ///
    /// struct Login {
    ///     /// The refresh token of the login, until it is presented.
    ///     seed: Mutex<Option<Token>>,
    /// }
    ///
    /// /// Asks the token service. `None` if it rejects the refresh token.
    /// async fn exchange(refresh_token: &str) -> Result<Option<Token>, SourceError> {
    ///     # if refresh_token == "spent" { return Ok(None); }
    ///     Ok(Some(Token::builder("eyJ0eXAi").refresh_token("next").build()?))
    /// }
    ///
    /// impl TokenSource for Login {
    ///     async fn fetch(&self, request: &TokenRequest<'_>) -> Result<Token, SourceError> {
    ///         let seed = self.seed();
    ///         for token in request.previous().into_iter().chain(&seed) {
    ///             if let Some(token) = self.renew(&request.clone().with_previous(token.clone())).await? {
    ///                 return Ok(token);
    ///             }
    ///         }
    ///         Err(SourceError::login_required("the login has ended"))
    ///     }
    ///
    ///     async fn renew(&self, request: &TokenRequest<'_>) -> Result<Option<Token>, SourceError> {
    ///         let Some(refresh_token) = request.previous().and_then(Token::refresh_token) else { return Ok(None) };
    ///         // Before it is sent: the response may be lost.
    ///         let is_seed = |seed: &mut Token| seed.refresh_token() == Some(refresh_token);
    ///         self.seed.lock().unwrap().take_if(is_seed);
    ///         exchange(refresh_token).await
    ///     }
    ///
    ///     fn seed(&self) -> Option<Token> {
    ///         self.seed.lock().unwrap().clone()
    ///     }
    ///
    ///     fn needs_store(&self) -> bool {
    ///         true
    ///     }
    /// }
    /// # async fn run() -> Result<(), tower_bearer::Error> {
    /// # let seed = Mutex::new(Some(Token::from_refresh_token("seed").unwrap()));
    /// # let provider = tower_bearer::TokenProvider::new(Login { seed });
    /// # assert_eq!(provider.token().await?.access_token(), "eyJ0eXAi");
    /// # Ok(())
    /// # }
    /// # tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(run()).unwrap();
    /// ```
    fn seed(&self) -> Option<Token> {
        None
    }

    /// Whether a user's login is lost with its refresh token, so that the source must not be asked while the
    /// [store](crate::TokenProviderBuilder#method.store) that processes share fails. Default: no.
    ///
    /// Return true if a refresh token that is presented twice ends a whole login, and nothing else gives a token. The
    /// provider asks once, when it is made. Then:
    ///
    /// - A caller that starts a refresh on a runtime which may end with its call waits for it
    ///   ([`TokenProvider`](crate::TokenProvider#rules)).
    /// - In a group of providers ([`TokenProviders`](crate::TokenProviders)), it needs a store.
    /// - A record that cannot be read is a failure of the store, and is not replaced.
    /// - A call of the source is not dropped when the refresh times out. It must end by itself.
    /// - A new token is stored before it is used, if the store works again within one
    ///   [lease](crate::TokenProviderBuilder#method.lease).
    fn needs_store(&self) -> bool {
        false
    }

    /// Returns the origins that the tokens are meant for. Default: [`AllowedOrigins::https`], every `https` origin and
    /// loopback.
    ///
    /// The provider calls this once. [`BearerAuthLayer::allowed_origins`](crate::BearerAuthLayer::allowed_origins)
    /// overrides it.
    fn allowed_origins(&self) -> AllowedOrigins {
        AllowedOrigins::https()
    }
}

impl<T: TokenSource> TokenSource for Arc<T> {
    fn fetch(&self, request: &TokenRequest<'_>) -> impl Future<Output = Result<Token, SourceError>> + Send {
        T::fetch(self, request)
    }

    fn renew(
        &self,
        request: &TokenRequest<'_>,
    ) -> impl Future<Output = Result<Option<Token>, SourceError>> + Send {
        T::renew(self, request)
    }

    fn validate(&self) -> Result<(), SourceError> {
        T::validate(self)
    }

    fn revision(&self) -> u64 {
        T::revision(self)
    }

    fn seed(&self) -> Option<Token> {
        T::seed(self)
    }

    fn needs_store(&self) -> bool {
        T::needs_store(self)
    }

    fn allowed_origins(&self) -> AllowedOrigins {
        T::allowed_origins(self)
    }
}

/// The future of [`DynTokenSource::fetch`].
pub(crate) type Fetch<'a> = Pin<Box<dyn Future<Output = Result<Token, SourceError>> + Send + 'a>>;

/// How long a store has failed, and its newest failure.
#[cfg(feature = "store")]
pub(crate) type StoreOutage = Option<(std::time::Duration, StoreError)>;

/// The future of [`DynTokenSource::check_store`].
#[cfg(feature = "store")]
pub(crate) type Check = Pin<Box<dyn Future<Output = Result<(), StoreError>> + Send>>;

/// What [`DynTokenSource::fetch`] calls before it asks.
pub(crate) type Asking<'a> = &'a (dyn Fn(Asked) + Sync);

/// What is asked for a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    Source,
    /// The store, by a reader, for which nobody has stored a token in time.
    #[cfg(feature = "store")]
    Publisher,
}

/// A [`TokenSource`] that can be a trait object, so that the provider and the layer have no type parameter for it.
pub(crate) trait DynTokenSource: Send + Sync {
    /// Calls `asking` directly before the service that issues the tokens is asked, if it is.
    fn fetch<'a>(&'a self, request: &'a TokenRequest<'_>, asking: Asking<'a>) -> Fetch<'a>;

    /// The outage of the store that processes share, if there is one. `None` without a store.
    #[cfg(feature = "store")]
    fn store_outage(&self) -> Option<StoreOutage> {
        None
    }

    /// Whether it is not known that the store can be used.
    #[cfg(feature = "store")]
    fn store_needs_check(&self) -> bool {
        false
    }

    /// Checks the store, if there is one.
    #[cfg(feature = "store")]
    fn check_store(&self) -> Check {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Whether a refresh that is interrupted may cost a user's login.
    fn is_login(&self) -> bool;

    /// Whether there is a token of a login that the store has not taken yet. Runs no foreign code.
    fn has_unpublished_login(&self) -> bool {
        false
    }

    fn revision(&self) -> u64;

    fn allowed_origins(&self) -> AllowedOrigins;
}

impl<T: TokenSource> DynTokenSource for T {
    fn fetch<'a>(&'a self, request: &'a TokenRequest<'_>, asking: Asking<'a>) -> Fetch<'a> {
        asking(Asked::Source);
        Box::pin(TokenSource::fetch(self, request))
    }

    fn is_login(&self) -> bool {
        self.needs_store()
    }

    fn revision(&self) -> u64 {
        TokenSource::revision(self)
    }

    fn allowed_origins(&self) -> AllowedOrigins {
        TokenSource::allowed_origins(self)
    }
}
