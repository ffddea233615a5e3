//! [`BearerAuthLayer`]: the layer and its options.

use std::sync::Arc;
#[cfg(feature = "tenants")]
use std::{
    borrow::{Borrow, Cow},
    hash::Hash,
};

use http_body::Body;
use tower_layer::Layer;

use crate::authorization::ExistingAuthorization;
use crate::bounds::CloneService;
use crate::challenge::{ChallengeRule, ResponseHead};
use crate::layer_options::LayerOptions;
use crate::origins::AllowedOrigins;
use crate::provider::TokenProvider;
use crate::replay::{Buffered, CloneWith, Cloned, NoReplay, ReplayBody, ReplayWith};
use crate::retry::RetryPolicy;
use crate::select::Providers;
use crate::service::BearerAuth;
use crate::source::TokenSource;
#[cfg(feature = "tenants")]
use crate::{
    error::Error,
    tenants::{RequestHead, TokenProviders},
};

/// Adds a fresh bearer token to each request, and sends a request again with a new token if the API answers 401.
///
/// ```
/// use tower::ServiceBuilder;
/// use tower_bearer::{BearerAuthLayer, RetryPolicy, StaticToken, TokenProvider};
///
/// let provider = TokenProvider::new(StaticToken::new("eyJ0eXAi"));
/// let layer = BearerAuthLayer::with_provider(provider.clone()).retry(RetryPolicy::new().max_retries(1));
/// # let client = tower::service_fn(|_: http::Request<String>| async {
/// #     Ok::<_, std::convert::Infallible>(http::Response::new(String::new()))
/// # });
/// let service = ServiceBuilder::new().layer(layer).service(client);
/// # let _ = service;
/// ```
///
/// All services that are made from one layer, its clones, or its [`provider`](Self::provider) share one token.
///
/// # Which services it wraps
///
/// Any service that returns [`http::Response`] ([`HttpService`](crate::HttpService)) and is `Clone`
/// ([`CloneService`](crate::CloneService)): a retry is sent on a clone, since the service that was ready has
/// been called. `tower::buffer` makes any service `Clone`.
///
/// # Challenges
///
/// A challenged request is sent again with another token ([`RetryPolicy`]). Ten revocations in a row heal at once, and
/// from then on one every 5 s; beyond that, the caller gets the 401
/// ([`TokenProvider`](crate::TokenProvider#rules)). A token that has just replaced a challenged one, and is challenged too,
/// is tried again with backoff before it is replaced. The last of several retries comes when it is a second old, since an
/// API may know a token later than its issuer. A request that cannot be sent again gets its 401, and the next one has a new
/// token.
///
/// # Which origins get the token
///
/// Those of its [`AllowedOrigins`], checked for each attempt. A request to another origin is sent unchanged, and an
/// event reports it; with [`strict_origins`](Self::strict_origins), it fails.
///
/// Put a redirect follower above the layer: the layer then sees every hop, and adds the token only where it is allowed.
/// A follower beneath the layer must remove `Authorization` when the origin changes, as tower-http's does. The follower
/// may be redirected to an origin that answers 401. Only a response from the request's own origin is a challenge, or shows
/// that the API accepts the token. The layer can see where a response comes from with `ReqwestService` (feature
/// `reqwest`), and with tower-http's `FollowRedirect` (feature `tower-http`). Only the last hop counts: a redirect to
/// another origin and back is treated as one that stayed.
///
/// # One request without the token, or with another
///
/// A request's extensions say that it is sent without a token ([`NoBearer`](crate::NoBearer)), or with another one
/// ([`UseToken`](crate::UseToken)).
///
/// # What the caller gets
///
/// The API's last response, unchanged: a 401 that no other token heals is a response, not an error. An error is the
/// inner service's, boxed, or the crate's [`Error`](crate::Error): the reason why the request could not be sent, or that
/// a 401, large or of unknown length, could not be kept while a refresh failed ([`BearerAuth`](crate::BearerAuth#permits)).
///
/// # Options out of their range
///
/// The layer's methods cannot fail. The first request gets [`Error::InvalidOption`](crate::Error::InvalidOption).
#[derive(Clone, Debug)]
#[must_use = "a layer does nothing until it wraps a service"]
pub struct BearerAuthLayer<R = Cloned> {
    options: LayerOptions,
    replay: R,
}

impl BearerAuthLayer {
    /// Makes a layer for api.video's production environment, with the default client for its auth endpoints.
    ///
    /// Its origin is the only one that gets the token. An empty or ill-formed key is an error of the first request to it, and
    /// so is a missing feature `default-client`. For the sandbox, and for all other options, use
    /// [`with_provider`](Self::with_provider) and [`ApiVideo`](crate::ApiVideo).
    pub fn new(api_key: impl Into<String>) -> Self {
        Self::with_source(crate::ApiVideo::new(api_key))
    }

    /// Makes a layer that uses the tokens of `source`, by a provider with default options ([`provider`](Self::provider)).
    pub fn with_source(source: impl TokenSource) -> Self {
        Self::with_provider(TokenProvider::new(source))
    }

    /// Makes a layer that uses the tokens of `provider`. Several layers may share one provider.
    pub fn with_provider(provider: TokenProvider) -> Self {
        let origins = provider.core().allowed_origins.clone();
        let options = LayerOptions::new(Providers { default: provider, select: None }, Some(origins));
        Self { options, replay: Cloned }
    }

    /// Makes a layer that adds to each request the token of its tenant. `key_of` reads the tenant's key from the head of the
    /// request, its extensions included.
    ///
    /// A key that is part of the request, such as a header's value or an extension, is [borrowed](Cow::Borrowed). A key that
    /// is made of it is [owned](Cow::Owned). The key may be borrowed as a `str` if the group's keys are `String`s.
    ///
    /// ```
    /// use std::borrow::Cow;
    /// use tower_bearer::{BearerAuthLayer, BoxError, StaticToken, TokenProvider, TokenProviders};
    ///
    /// let providers = TokenProviders::new(|tenant: &String| {
    ///     Ok::<_, BoxError>(TokenProvider::builder(StaticToken::new("eyJ0eXAi")).name(tenant))
    /// });
    /// let layer = BearerAuthLayer::by_key(providers, |head| {
    ///     head.headers.get("x-tenant")?.to_str().ok().map(Cow::Borrowed)
    /// });
    /// # let _ = layer;
    /// ```
    ///
    /// `key_of` must return a key that the caller of the API may use: a header that a client sets must have been checked.
    ///
    /// # Requests without a key
    ///
    /// If `key_of` returns `None`, the request fails with [`Error::MissingKey`]. If the factory returns an error, it fails
    /// with [`Error::Factory`]. It is never sent with the token of another tenant. A request that is to be sent without a
    /// token needs no key: one with [`NoBearer`](crate::NoBearer), with an `Authorization` header that is
    /// [kept](crate::ExistingAuthorization::Keep), or to an origin outside of the layer's
    /// [`allowed_origins`](Self::allowed_origins).
    ///
    /// # Options
    ///
    /// The origins are by default those of the tenant's source. The retry budget is that of the tenant's provider.
    #[cfg(feature = "tenants")]
    #[cfg_attr(docsrs, doc(cfg(feature = "tenants")))]
    pub fn by_key<K, Q, F>(providers: TokenProviders<K>, key_of: F) -> Self
    where
        K: Borrow<Q> + Clone + Eq + Hash + Send + Sync + 'static,
        Q: Eq + Hash + ToOwned<Owned = K> + ?Sized + 'static,
        F: for<'a> Fn(RequestHead<'a>) -> Option<Cow<'a, Q>> + Send + Sync + 'static,
    {
        let default = providers.nobody().clone();
        let select = move |head: RequestHead<'_>| {
            let key = key_of(head).ok_or(Error::MissingKey)?;
            providers.get::<Q>(&key)
        };
        let options = LayerOptions::new(Providers { default, select: Some(Arc::new(select)) }, None);
        Self { options, replay: Cloned }
    }
}

impl<R> BearerAuthLayer<R> {
    /// Returns the provider, to share it with another layer or to read its status.
    ///
    /// That of a layer `by_key` has no token: it stands for the requests without a key.
    pub fn provider(&self) -> &TokenProvider {
        &self.options.providers.default
    }

    /// Sets how often and how soon a challenged request is sent again. Default:
    /// [`RetryPolicy::new`].
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

    /// Sets which origins get the token. Default: those that the token source names
    /// ([`TokenSource::allowed_origins`](crate::TokenSource::allowed_origins)).
    pub fn allowed_origins(mut self, origins: AllowedOrigins) -> Self {
        self.options.allowed_origins = Some(origins);
        self
    }

    /// Fails a request to an origin that is not allowed with
    /// [`Error::OriginNotAllowed`](crate::Error::OriginNotAllowed). Default: it is sent without the token, and a WARN
    /// event reports the origin.
    ///
    /// A request with [`NoBearer`](crate::NoBearer), or with an `Authorization` header that is
    /// [kept](ExistingAuthorization::Keep), does not need the token and is sent. Do not use it if a redirect follower is
    /// above the layer, and may leave the allowed origins.
    pub fn strict_origins(mut self) -> Self {
        self.options.is_strict = true;
        self
    }

    /// Sets what happens to an `Authorization` header that a request already has. Default:
    /// [`ExistingAuthorization::Keep`].
    pub fn existing_authorization(mut self, existing: ExistingAuthorization) -> Self {
        self.options.existing = existing;
        self
    }

    /// Records request bodies while they are sent, up to `limit` bytes each, to send them again. For any body, and an
    /// inner service that takes [`ReplayBody`](crate::replay::ReplayBody).
    ///
    /// A body over the limit is streamed, but not sent again: the caller gets the 401, and the next request has a new
    /// token. A limit of 0 is [`Error::InvalidOption`](crate::Error::InvalidOption).
    ///
    /// The bytes of the data and of the trailers count. What is kept in memory is at most the limit, 1 % of it and 1
    /// KiB, however small the frames are. [`ReplayBody`](crate::replay::ReplayBody#memory) documents which frames are
    /// copied.
    pub fn buffered(self, limit: usize) -> BearerAuthLayer<Buffered> {
        self.with_replay(Buffered { limit }, Some(limit))
    }

    /// As [`buffered`](Self::buffered), for an inner service with a body type of its own: `wrap` converts a
    /// [`ReplayBody`](crate::replay::ReplayBody) to that type.
    ///
    /// ```
    /// # use tower_bearer::{BearerAuthLayer, StaticToken, TokenProvider};
    /// # let provider = TokenProvider::new(StaticToken::new("eyJ0eXAi"));
    /// use bytes::Bytes;
    /// use http::{Request, Response};
    /// use http_body_util::{BodyExt, combinators::UnsyncBoxBody};
    /// use tower::{ServiceBuilder, service_fn};
    /// use tower_bearer::{BoxError, replay::ReplayBody};
    ///
    /// type Body = UnsyncBoxBody<Bytes, BoxError>;
    ///
    /// let layer = BearerAuthLayer::with_provider(provider)
    ///     .replay_with(64 * 1024, |body: ReplayBody<Body>| body.boxed_unsync());
    /// let service = ServiceBuilder::new()
    ///     .layer(layer)
    ///     .service(service_fn(|_: Request<Body>| async { Ok::<_, BoxError>(Response::new(String::new())) }));
    /// # fn is_service<S: tower::Service<Request<Body>>>(_: &S) {}
    /// # is_service(&service);
    /// ```
    pub fn replay_with<B: Body, W>(
        self,
        limit: usize,
        wrap: fn(ReplayBody<B>) -> W,
    ) -> BearerAuthLayer<ReplayWith<B, W>> {
        self.with_replay(ReplayWith { buffered: Buffered { limit }, wrap }, Some(limit))
    }

    /// Clones request bodies with `clone` to send them again, such as kube's `Body::try_clone`. `None` for a body that
    /// cannot be cloned.
    pub fn clone_with<B>(self, clone: fn(&B) -> Option<B>) -> BearerAuthLayer<CloneWith<B>> {
        self.with_replay(CloneWith { clone }, None)
    }

    /// Sends no request again: the caller gets the challenge, and the next request has a new token. For any body.
    pub fn no_replay(self) -> BearerAuthLayer<NoReplay> {
        self.with_replay(NoReplay, None)
    }

    fn with_replay<R2>(self, replay: R2, replay_limit: Option<usize>) -> BearerAuthLayer<R2> {
        BearerAuthLayer { options: LayerOptions { replay_limit, ..self.options }, replay }
    }
}

impl<S, R> Layer<S> for BearerAuthLayer<R>
where
    S: CloneService,
    R: Clone,
{
    type Service = BearerAuth<S, R>;

    fn layer(&self, inner: S) -> Self::Service {
        BearerAuth::new(inner, self.options.clone(), self.replay.clone())
    }
}
