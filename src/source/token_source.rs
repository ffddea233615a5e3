//! [`TokenSource`]: what a token source does.

use std::{future::Future, sync::Arc};

use futures_util::future::BoxFuture;

use super::{Credential, TokenRequest};
use crate::error::SourceError;
use crate::origins::AllowedOrigins;
use crate::token::Token;

/// Where a [`TokenProvider`](crate::TokenProvider) gets its tokens.
///
/// Implement it for another token service. If that needs no state, [`source_fn`](super::source_fn) is shorter.
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
///
/// # Refresh tokens
///
/// The provider keeps the refresh token of the newest [`Token`], and decides when it is presented: then
/// [`TokenRequest::refresh_token`] has it. So a source has no state for it:
///
/// ```
/// use tower_bearer::{Credential, SourceError, Token, TokenClient, TokenProvider, TokenRequest, TokenSource};
///
/// struct Login(TokenClient);
///
/// impl TokenSource for Login {
///     async fn fetch(&self, request: &TokenRequest<'_>) -> Result<Token, SourceError> {
///         let Some(refresh_token) = request.refresh_token() else {
///             return Err(SourceError::login_required("a user has to log in"));
///         };
///         let body = serde_json::json!({ "refreshToken": refresh_token });
///         self.0.post_json("https://auth.example.com/refresh", body.to_string()).await?.token()
///     }
///
///     fn credential(&self) -> Credential {
///         Credential::new(["https://auth.example.com"]).of_login()
///     }
/// }
///
/// # fn run(refresh_token: String) -> Result<(), tower_bearer::Error> {
/// let provider = TokenProvider::builder(Login(TokenClient::new())).login(refresh_token).build()?;
/// # Ok(())
/// # }
/// # run("r".into()).unwrap();
/// ```
pub trait TokenSource: Send + Sync + 'static {
    /// Obtains one token, in one attempt.
    ///
    /// If [`request`](TokenRequest) has a [refresh token](TokenRequest::refresh_token), this presents that and nothing else.
    /// If it has none, this uses the source's credential. A source without refresh tokens ignores that.
    ///
    /// The provider calls this from its own task, and does the retries. It does not make a second call before the
    /// first ends, unless the runtime of the first is not driven any more
    /// ([`TokenProvider`](crate::TokenProvider#rules)). A source that waits for a peer should limit that wait.
    ///
    /// # Errors
    ///
    /// A [`SourceError`] whose kind says whether to try again. [`TokenClient`](super::TokenClient) makes it for a response, and
    /// [`SourceError::from_status`] for the status of one. The message must not contain a secret.
    ///
    /// If a refresh token was presented, the error also says what became of it:
    ///
    /// | error | what follows |
    /// |---|---|
    /// | [`LoginRequired`](crate::SourceErrorKind::LoginRequired), or [`with_rejected_refresh_token`](SourceError::with_rejected_refresh_token) | the refresh token is not presented again |
    /// | [`Rejected`](crate::SourceErrorKind::Rejected) | the rejection of a login is [doubtful](crate::OAuth2#refresh-tokens): its refresh token is kept, and presented once a minute at most, and by [`ready`](crate::TokenProvider::ready) |
    /// | [`Configuration`](crate::SourceErrorKind::Configuration) | the refresh token of a login is kept; otherwise the credential is used |
    /// | [`with_unspent_refresh_token`](SourceError::with_unspent_refresh_token) | it is kept |
    /// | a transient one | it is presented again after the backoff; if there is a credential, that is used after the second one |
    /// | [`with_next_refresh_token`](SourceError::with_next_refresh_token) | the next one is presented after the backoff |
    ///
    /// After a rejection, the provider calls this without a refresh token, unless that was one of a user's login.
    ///
    /// # Cancel safety
    ///
    /// The future is dropped when the refresh times out
    /// ([`refresh_timeout`](crate::TokenProviderBuilder::refresh_timeout)), except for that of a user's login: it must end by
    /// itself.
    fn fetch(&self, request: &TokenRequest<'_>) -> impl Future<Output = Result<Token, SourceError>> + Send;

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

    /// Returns what the tokens depend on, without any I/O. Default: none, so that all sources have the same.
    ///
    /// A refresh token is presented, and a token of a [store](crate::TokenProviderBuilder::store) is used, only for the
    /// credential that it was granted to. A change of its [revision](Credential::with_revision) ends the cool-down after the
    /// rejection of the credential.
    fn credential(&self) -> Credential {
        Credential::default()
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

    fn validate(&self) -> Result<(), SourceError> {
        T::validate(self)
    }

    fn credential(&self) -> Credential {
        T::credential(self)
    }

    fn allowed_origins(&self) -> AllowedOrigins {
        T::allowed_origins(self)
    }
}

/// A [`TokenSource`] that can be a trait object, so that the provider and the layer have no type parameter for it.
pub(crate) trait DynTokenSource: Send + Sync {
    fn fetch<'a>(&'a self, request: &'a TokenRequest<'_>) -> BoxFuture<'a, Result<Token, SourceError>>;
    fn validate(&self) -> Result<(), SourceError>;
    fn credential(&self) -> Credential;
    fn allowed_origins(&self) -> AllowedOrigins;
}

impl<T: TokenSource> DynTokenSource for T {
    fn fetch<'a>(&'a self, request: &'a TokenRequest<'_>) -> BoxFuture<'a, Result<Token, SourceError>> {
        Box::pin(TokenSource::fetch(self, request))
    }

    fn validate(&self) -> Result<(), SourceError> {
        TokenSource::validate(self)
    }

    fn credential(&self) -> Credential {
        TokenSource::credential(self)
    }

    fn allowed_origins(&self) -> AllowedOrigins {
        TokenSource::allowed_origins(self)
    }
}
