//! [`TokenSource`]: where tokens come from, and the sources that the crate brings.
//!
//! A source makes one attempt per call and says what came of it; when to call it, and how often, is the provider's.

#[cfg(feature = "api-video")]
mod api_video;
#[cfg(feature = "api-video")]
mod base_url;
#[cfg(feature = "api-video")]
mod client;
#[cfg(feature = "api-video")]
mod endpoint;
mod request;
#[cfg(feature = "api-video")]
mod retry_after;
mod source_fn;
mod static_token;
mod token_file;
#[cfg(feature = "api-video")]
mod token_response;

use std::{future::Future, pin::Pin, sync::Arc};

#[cfg(feature = "api-video")]
pub use self::api_video::ApiVideo;
#[cfg(feature = "api-video")]
pub(crate) use self::api_video::failure;
pub(crate) use self::request::CurrentReason;
pub use self::{
    request::{RefreshReason, TokenRequest},
    source_fn::{SourceFn, source_fn},
    static_token::StaticToken,
    token_file::TokenFile,
};

use crate::{error::SourceError, origins::AllowedOrigins, token::Token};

/// Where a [`TokenProvider`](crate::TokenProvider) gets its tokens. Implement it for another token service; for one that needs
/// no state, [`source_fn`] is shorter.
///
/// ```
/// use std::time::Duration;
/// use tower_bearer::{SourceError, Token, TokenRequest, TokenSource};
///
/// /// Asks the agent that runs beside this process.
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
    /// [`request`](TokenRequest) has the token that the provider published last; its refresh token, if any, is for this call
    /// to spend. The provider calls this from a task of its own, and does the retries. It does not make a second call before
    /// the first ends, unless the runtime of the first is not driven any more
    /// ([`TokenProvider`](crate::TokenProvider#refreshes)). A source that waits for a peer should bound that wait.
    ///
    /// # Errors
    ///
    /// A [`SourceError`] whose kind says whether to try again. The message must not contain a secret.
    ///
    /// # Cancel safety
    ///
    /// The future is dropped when the refresh's time is up
    /// ([`refresh_timeout`](crate::TokenProviderBuilder::refresh_timeout)). A source that spends something must record before
    /// it sends that the outcome may never be known.
    fn fetch(&self, request: &TokenRequest<'_>) -> impl Future<Output = Result<Token, SourceError>> + Send;

    /// Renews the previous token by what came with it, such as its refresh token, and by nothing else. Default:
    /// [`fetch`](Self::fetch).
    ///
    /// `None` if that cannot be used, so that the token has to be obtained with the credential: by `fetch` without a previous
    /// token. `request` has a previous token.
    ///
    /// Called instead of `fetch` where processes share a token: before the credential is used, which may end the other
    /// processes' refresh token, the provider checks once more whether one of them has renewed the token.
    ///
    /// # Errors
    ///
    /// As for [`fetch`](Self::fetch).
    ///
    /// # Cancel safety
    ///
    /// As for [`fetch`](Self::fetch).
    fn renew(
        &self,
        request: &TokenRequest<'_>,
    ) -> impl Future<Output = Result<Option<Token>, SourceError>> + Send {
        async { self.fetch(request).await.map(Some) }
    }

    /// Checks the source's options and credential, without any I/O. Default: they are valid.
    ///
    /// [`TokenProviderBuilder::build`](crate::TokenProviderBuilder::build) calls this. [`TokenProvider::new`] cannot fail: there,
    /// the first [`fetch`](Self::fetch) has to report the same error.
    ///
    /// [`TokenProvider::new`]: crate::TokenProvider::new
    ///
    /// # Errors
    ///
    /// [`SourceError::configuration`], which names the option, the accepted values, and the value unless it is a secret.
    fn validate(&self) -> Result<(), SourceError> {
        Ok(())
    }

    /// Returns a number that changes whenever the credential does. Default: it never changes.
    ///
    /// A changed revision ends the cool-down that followed the old credential's rejection.
    fn revision(&self) -> u64 {
        0
    }

    /// The origins that the tokens are meant for. Default: [`AllowedOrigins::https`], every `https` origin, and loopback.
    ///
    /// The provider asks once. [`BearerAuthLayer::allowed_origins`](crate::BearerAuthLayer::allowed_origins) overrides it.
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

    fn allowed_origins(&self) -> AllowedOrigins {
        T::allowed_origins(self)
    }
}

/// Boxed, so that it needs no name.
pub(crate) type Fetch<'a> = Pin<Box<dyn Future<Output = Result<Token, SourceError>> + Send + 'a>>;

/// [`TokenSource`] behind a pointer, so that the provider, and with it the layer, has no type parameter for it.
pub(crate) trait DynTokenSource: Send + Sync {
    fn fetch<'a>(&'a self, request: &'a TokenRequest<'_>) -> Fetch<'a>;

    fn revision(&self) -> u64;

    fn allowed_origins(&self) -> AllowedOrigins;
}

impl<T: TokenSource> DynTokenSource for T {
    fn fetch<'a>(&'a self, request: &'a TokenRequest<'_>) -> Fetch<'a> {
        Box::pin(TokenSource::fetch(self, request))
    }

    fn revision(&self) -> u64 {
        TokenSource::revision(self)
    }

    fn allowed_origins(&self) -> AllowedOrigins {
        TokenSource::allowed_origins(self)
    }
}
