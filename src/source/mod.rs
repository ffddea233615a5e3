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
#[cfg(feature = "api-video")]
mod retry_after;
mod static_token;
mod token_file;
#[cfg(feature = "api-video")]
mod token_response;

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, atomic::AtomicBool},
};

#[cfg(feature = "api-video")]
pub use self::api_video::ApiVideo;
#[cfg(feature = "api-video")]
pub(crate) use self::api_video::failure;
pub use self::{static_token::StaticToken, token_file::TokenFile};

use crate::{error::SourceError, scope::Scope, token::Token};

/// Where a [`TokenProvider`](crate::TokenProvider) gets its tokens: what you implement for another token service.
///
/// ```
/// use std::time::Duration;
/// use tower_bearer::{SourceError, Token, TokenSource};
///
/// /// Asks the agent that runs beside this process.
/// struct Agent;
///
/// impl TokenSource for Agent {
///     async fn fetch(&self, _previous: Option<&Token>) -> Result<Token, SourceError> {
///         let text = std::fs::read_to_string("/run/agent/token")
///             .map_err(|error| SourceError::unavailable("the agent has no token yet").with_cause(error))?;
///         Ok(Token::builder(text.trim()).expires_in(Duration::from_secs(300)).build()?)
///     }
/// }
/// ```
pub trait TokenSource: Send + Sync + 'static {
    /// Obtains one token, in one attempt.
    ///
    /// `previous` is the token that the provider published last, expired or refused or not; its refresh token, if any,
    /// is for this call to spend. The provider calls this from a task of its own, and does the retries. It does not call it
    /// twice at a time, unless the runtime of the first call is not driven any more
    /// ([`TokenProvider`](crate::TokenProvider#flights)). A source that waits for a peer should bound that wait.
    ///
    /// # Errors
    ///
    /// A [`SourceError`] whose kind says whether to try again. No message may hold a secret.
    ///
    /// # Cancel safety
    ///
    /// The future is dropped when the flight's time is up
    /// ([`refresh_timeout`](crate::TokenProviderBuilder::refresh_timeout)). A source that spends something has to
    /// remember before it sends that the outcome may never be known.
    fn fetch(&self, previous: Option<&Token>) -> impl Future<Output = Result<Token, SourceError>> + Send;

    /// Renews `previous` by what it brought with it, such as its refresh token, and by nothing else; `None` if that is of no
    /// use, so that the token has to be obtained anew, by `fetch(None)`. Default: [`fetch`](Self::fetch).
    ///
    /// Called in the place of `fetch` where processes share a token: before the credential is used, which may be the end
    /// of the others' refresh token, the provider looks once more whether one of them has renewed it meanwhile.
    ///
    /// # Errors
    ///
    /// As for [`fetch`](Self::fetch).
    ///
    /// # Cancel safety
    ///
    /// As for [`fetch`](Self::fetch).
    fn renew(&self, previous: &Token) -> impl Future<Output = Result<Option<Token>, SourceError>> + Send {
        async { self.fetch(Some(previous)).await.map(Some) }
    }

    /// Changes whenever the credential does. Default: never.
    ///
    /// A changed revision ends the cool-down that followed the old credential's refusal.
    fn revision(&self) -> u64 {
        0
    }

    /// Which origins the tokens are meant for. Default: [`Scope::https`], every `https` origin, and loopback.
    ///
    /// Asked once, by the provider; a layer may be told otherwise
    /// ([`BearerAuthLayer::scope`](crate::BearerAuthLayer::scope)).
    fn scope(&self) -> Scope {
        Scope::https()
    }
}

impl<T: TokenSource> TokenSource for Arc<T> {
    fn fetch(&self, previous: Option<&Token>) -> impl Future<Output = Result<Token, SourceError>> + Send {
        T::fetch(self, previous)
    }

    fn renew(&self, previous: &Token) -> impl Future<Output = Result<Option<Token>, SourceError>> + Send {
        T::renew(self, previous)
    }

    fn revision(&self) -> u64 {
        T::revision(self)
    }

    fn scope(&self) -> Scope {
        T::scope(self)
    }
}

/// Boxed, so that it needs no name.
pub(crate) type Fetch<'a> = Pin<Box<dyn Future<Output = Result<Token, SourceError>> + Send + 'a>>;

/// [`TokenSource`] behind a pointer, so that the provider, and with it the layer, has no type parameter for it.
pub(crate) trait DynTokenSource: Send + Sync {
    /// As [`TokenSource::fetch`]; `urgent` once somebody needs the token now, which may come about meanwhile.
    fn fetch<'a>(&'a self, previous: Option<&'a Token>, urgent: &'a AtomicBool) -> Fetch<'a>;

    fn revision(&self) -> u64;

    fn scope(&self) -> Scope;
}

impl<T: TokenSource> DynTokenSource for T {
    fn fetch<'a>(&'a self, previous: Option<&'a Token>, _urgent: &'a AtomicBool) -> Fetch<'a> {
        Box::pin(TokenSource::fetch(self, previous))
    }

    fn revision(&self) -> u64 {
        TokenSource::revision(self)
    }

    fn scope(&self) -> Scope {
        TokenSource::scope(self)
    }
}
