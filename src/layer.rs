//! [`BearerAuthLayer`]: the options of the layer, and what it makes of a service.

use std::{fmt, sync::Arc};

use tower_layer::Layer;

use crate::{
    bounds::CloneService,
    challenge::{ChallengeRule, ResponseHead},
    config::{Config, ExistingAuthorization},
    error::Error,
    origins::AllowedOrigins,
    provider::TokenProvider,
    replay::{Buffered, CloneWith, Cloned, NoReplay, ReplayWith},
    retry::RetryPolicy,
    service::BearerAuth,
};

/// Gives every request a bearer token that is fresh, and sends it again with a new one when it is refused.
///
/// ```
/// use tower::ServiceBuilder;
/// use tower_bearer::{BearerAuthLayer, RetryPolicy, TokenProvider};
/// # use tower_bearer::{SourceError, Token, TokenRequest, TokenSource};
/// # struct Vault;
/// # impl TokenSource for Vault {
/// #     async fn fetch(&self, _: &TokenRequest<'_>) -> Result<Token, SourceError> { Ok(Token::builder("a").build()?) }
/// # }
///
/// let provider = TokenProvider::new(Vault);
/// let layer = BearerAuthLayer::with_provider(provider.clone()).retry(RetryPolicy::new().max_retries(1));
/// # let client = tower::service_fn(|_: http::Request<String>| async {
/// #     Ok::<_, std::convert::Infallible>(http::Response::new(String::new()))
/// # });
/// let service = ServiceBuilder::new().layer(layer).service(client);
/// # let _ = service;
/// ```
///
/// Everything that is made from one layer, its clones, or its [`provider`](Self::provider) shares one token.
///
/// # Which service it wraps
///
/// Any that answers [`http::Response`] ([`HttpService`](crate::HttpService)) and is `Clone`
/// ([`CloneService`](crate::CloneService)): a retry is sent on a clone, since the service that was ready has
/// been used. `tower::buffer` makes any service `Clone`.
///
/// # Which origins see the token
///
/// Those of its [`AllowedOrigins`], which is looked up for every attempt. A request to another is sent as it is, and an event says so.
///
/// Put a redirect follower above the layer: the layer then sees every hop, and adds the token where it belongs. A follower
/// beneath must remove `Authorization` when the origin changes, as tower-http's does. It may be led to an origin that
/// answers 401. That is no challenge, if the layer can see where the answer comes from: it can with
/// `ReqwestService` (feature `reqwest`), and with tower-http's `FollowRedirect` (feature `tower-http`). Only the last hop
/// counts: a redirect that leads elsewhere and back is taken for one that stayed.
///
/// # A request of its own kind
///
/// A request says by its extensions that it is to go without a token ([`NoBearer`](crate::NoBearer)), or with another
/// ([`UseToken`](crate::UseToken)).
///
/// # What reaches the caller
///
/// The last answer of the API itself, unchanged: a 401 that could not be healed is an answer, not an error. An error is
/// the inner service's, boxed, or our [`Error`]: what prevented the request from being sent with a token.
#[derive(Clone)]
#[must_use = "a layer does nothing until it wraps a service"]
pub struct BearerAuthLayer<R = Cloned> {
    options: Config<R>,
}

impl BearerAuthLayer {
    /// A layer for api.video's production environment, with the default client for its auth endpoints.
    ///
    /// An empty or ill-formed key is the first request's error. For the sandbox, and all other options:
    /// [`with_provider`](Self::with_provider) and [`ApiVideo`](crate::ApiVideo).
    #[cfg(feature = "api-video")]
    pub fn new(api_key: impl Into<String>) -> Self {
        Self::with_provider(TokenProvider::new(crate::ApiVideo::new(api_key)))
    }

    /// A layer that takes its tokens from `provider`, which it may share with others.
    pub fn with_provider(provider: TokenProvider) -> Self {
        Self { options: Config::new(provider) }
    }
}

impl<R> BearerAuthLayer<R> {
    /// Sets how often, how soon and how much is sent again. Default: [`RetryPolicy::new`].
    pub fn retry(mut self, policy: RetryPolicy) -> Self {
        self.options.retry = policy;
        self
    }

    /// Sets which response is a challenge. Default: [`challenge::bearer`](crate::challenge::bearer).
    pub fn challenge<F>(mut self, predicate: F) -> Self
    where
        F: Fn(ResponseHead<'_>) -> bool + Send + Sync + 'static,
    {
        self.options.challenge = ChallengeRule::Custom(Arc::new(predicate));
        self
    }

    /// Sets which origins may see the token. Default: what the token source says
    /// ([`TokenSource::scope`](crate::TokenSource::allowed_origins)).
    pub fn allowed_origins(mut self, scope: AllowedOrigins) -> Self {
        self.options.scope = scope;
        self
    }

    /// Sets what becomes of a request's own `Authorization` header. Default: [`ExistingAuthorization::Keep`].
    pub fn existing_authorization(mut self, existing: ExistingAuthorization) -> Self {
        self.options.existing = existing;
        self
    }

    /// Records request bodies as they are sent, up to `limit` bytes each, to send them again: for any body, and an inner
    /// service that takes [`ReplayBody`](crate::ReplayBody).
    ///
    /// A body over the limit streams through all the same. If it is refused, the 401 reaches the caller, and the next
    /// request has a new token. A limit of 0 is the first request's [`Error::InvalidOption`].
    ///
    /// The bytes of the data and of the trailers count. What is kept in memory is at most the limit, 1 % of it and 1 KiB,
    /// however small the frames are. [`ReplayBody`](crate::ReplayBody#memory) documents which frames are copied.
    pub fn buffered(self, limit: usize) -> BearerAuthLayer<Buffered> {
        self.with_limit(limit, Buffered::new(limit))
    }

    /// As [`buffered`](Self::buffered), for an inner service whose body type is its own: `wrap` makes that type of a
    /// [`ReplayBody`](crate::ReplayBody).
    ///
    /// ```
    /// # use tower_bearer::{BearerAuthLayer, SourceError, Token, TokenProvider, TokenRequest, TokenSource};
    /// # struct Vault;
    /// # impl TokenSource for Vault {
    /// #     async fn fetch(&self, _: &TokenRequest<'_>) -> Result<Token, SourceError> { Ok(Token::builder("a").build()?) }
    /// # }
    /// # let provider = TokenProvider::new(Vault);
    /// use bytes::Bytes;
    /// use http::{Request, Response};
    /// use http_body_util::{BodyExt, combinators::UnsyncBoxBody};
    /// use tower::{ServiceBuilder, service_fn};
    /// use tower_bearer::{BoxError, ReplayBody};
    ///
    /// type Body = UnsyncBoxBody<Bytes, BoxError>;
    ///
    /// let service = ServiceBuilder::new()
    ///     .layer(BearerAuthLayer::with_provider(provider).replay_with(64 * 1024, |body: ReplayBody<Body>| body.boxed_unsync()))
    ///     .service(service_fn(|_: Request<Body>| async { Ok::<_, BoxError>(Response::new(String::new())) }));
    /// # fn is_service<S: tower::Service<Request<Body>>>(_: &S) {}
    /// # is_service(&service);
    /// ```
    pub fn replay_with<F>(self, limit: usize, wrap: F) -> BearerAuthLayer<ReplayWith<F>> {
        self.with_limit(limit, ReplayWith::new(limit, wrap))
    }

    /// Clones request bodies by `clone` to send them again, such as kube's `Body::try_clone`: `None` for a body that
    /// cannot be.
    pub fn clone_with<F>(self, clone: F) -> BearerAuthLayer<CloneWith<F>> {
        self.with_replay(CloneWith::new(clone))
    }

    /// Sends nothing again: a challenge reaches the caller, and the next request has a new token. For any body.
    pub fn no_replay(self) -> BearerAuthLayer<NoReplay> {
        self.with_replay(NoReplay)
    }

    /// The provider, to hand to another layer or to ask for its status.
    pub fn provider(&self) -> &TokenProvider {
        &self.options.provider
    }

    fn with_limit<R2>(self, limit: usize, replay: R2) -> BearerAuthLayer<R2> {
        let mut layer = self.with_replay(replay);
        layer.options.invalid = (limit == 0).then(|| {
            Error::InvalidOption("a replay limit of 0 keeps no body: give more, or use no_replay()".into())
        });
        layer
    }

    fn with_replay<R2>(self, replay: R2) -> BearerAuthLayer<R2> {
        BearerAuthLayer { options: self.options.with_replay(replay) }
    }
}

impl<S, R> Layer<S> for BearerAuthLayer<R>
where
    S: CloneService,
    R: Clone,
{
    type Service = BearerAuth<S, R>;

    fn layer(&self, inner: S) -> Self::Service {
        BearerAuth::new(inner, self.options.clone())
    }
}

impl<R> fmt::Debug for BearerAuthLayer<R>
where
    R: fmt::Debug,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BearerAuthLayer").field("options", &self.options).finish()
    }
}
