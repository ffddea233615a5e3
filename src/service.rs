//! [`BearerAuth`]: the service that the layer makes.

use std::{
    fmt,
    sync::Arc,
    task::{Context, Poll},
};

use http::{Request, Response, header::AUTHORIZATION};
use tower_service::Service;

use crate::{
    authorization::{Authorized, authorize},
    bounds::HttpService,
    config::{Config, ExistingAuthorization},
    error::BoxError,
    future::{ResponseFuture, Shared},
    per_request::AuthOverride,
    provider::{Cache, Need},
    replay::{Cloned, Replay, RequestHead},
};

/// A service that adds a bearer token to each request, and sends a request again after a 401.
///
/// Made by [`BearerAuthLayer`](crate::BearerAuthLayer). `S` is the inner service, and `R` how request bodies are sent
/// again ([`replay`](crate::replay)).
///
/// A field of a struct has its type, such as `BearerAuth<Client<HttpConnector, Full<Bytes>>>`. [`guide::recipes`] shows
/// such fields.
///
/// [`guide::recipes`]: crate::guide::recipes#the-client-as-a-field
///
/// # Clone
///
/// The inner service must be `Clone`, and its clones should be cheap: a retry is sent on a clone. The service that was
/// made ready is called with the first attempt, if there is a token. There is no `get_mut`: the clones for retries
/// would not see the change.
///
/// # Permits
///
/// A request that has to wait for a token drops the ready service first, and is sent on a clone that is made ready
/// afterwards: while it waits, it holds no permit of a concurrency limit, which the token source may need as well. It
/// carries the token that is current when the clone is ready, and so does a retry. A challenged request keeps its 401
/// while it waits for another token, and with it whatever the inner service ties to the body of a response.
///
/// # A retry that is shed
///
/// If the inner service sheds the retry (`tower::load_shed`), the caller gets the 401, unless its body had to be
/// drained: over HTTP/1, where the connection could not have served the retry otherwise, the caller gets the inner
/// service's `Overloaded`. Likewise, if the token expires before the inner service is ready for the retry, and there is
/// no other, the caller gets the 401, or [`Error`](crate::Error) if the 401 had to be drained.
pub struct BearerAuth<S, R = Cloned> {
    /// Made ready by `poll_ready`, and called with the first attempt.
    inner: S,
    cache: Cache,
    shared: Arc<Shared<S, R>>,
}

impl<S, R> BearerAuth<S, R>
where
    S: Clone,
{
    pub(crate) fn new(inner: S, options: Config<R>) -> Self {
        let cache = options.provider.cache();
        let shared = Arc::new(Shared::new(inner.clone(), options));
        Self { inner, cache, shared }
    }
}

impl<S, R> BearerAuth<S, R> {
    /// Returns the inner service.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }

    /// Returns the inner service, without this layer.
    pub fn into_inner(self) -> S {
        self.inner
    }
}

impl<S, R, B> Service<Request<B>> for BearerAuth<S, R>
where
    R: Replay<B>,
    S: HttpService<R::Body> + Clone,
{
    type Response = Response<S::ResBody>;
    type Error = BoxError;
    type Future = ResponseFuture<S, R, B, S::ResBody>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    #[inline]
    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let options = &self.shared.options;
        if let Some(error) = &self.shared.invalid {
            return ResponseFuture::failed(error.clone(), &self.shared);
        }
        if !request.extensions().is_empty() {
            if let Some(requested) = AuthOverride::of(request.extensions()) {
                return self.call_with_override(request, requested);
            }
        }
        if !options.allowed_origins.covers(request.uri()) {
            return self.call_not_allowed(request);
        }
        // Copied before the token is added, so that the copy never contains one.
        let head = R::REPLAYS.then(|| RequestHead::of(&request));
        let Some((header, token)) = options.provider.header(&mut self.cache) else {
            return self.call_without_token(request, head);
        };
        match authorize(request.headers_mut(), header.clone(), options.existing) {
            Ok(Authorized::Layer) => {
                let (response, spare) = options.replay.call(&mut self.inner, request);
                ResponseFuture::sending(response, token, head.zip(spare), &self.shared)
            }
            Ok(Authorized::Caller) => self.pass(request),
            Err(error) => ResponseFuture::failed(error, &self.shared),
        }
    }
}

impl<S, R> BearerAuth<S, R> {
    /// Sends a request whose extensions say which token it gets.
    #[cold]
    fn call_with_override<B, ResBody>(
        &mut self,
        mut request: Request<B>,
        requested: AuthOverride,
    ) -> ResponseFuture<S, R, B, ResBody>
    where
        R: Replay<B>,
        S: Service<Request<R::Body>>,
    {
        let options = &self.shared.options;
        match requested {
            AuthOverride::NoBearer => self.pass(request),
            AuthOverride::UseToken(_) if !options.allowed_origins.covers(request.uri()) => {
                self.call_not_allowed(request)
            }
            AuthOverride::UseToken(token) => {
                match authorize(request.headers_mut(), token.header_value(), options.existing) {
                    Ok(_) => self.pass(request),
                    Err(error) => ResponseFuture::failed(error, &self.shared),
                }
            }
        }
    }

    /// Sends a request to an origin that is not allowed, unchanged.
    #[cold]
    fn call_not_allowed<B, ResBody>(&mut self, request: Request<B>) -> ResponseFuture<S, R, B, ResBody>
    where
        R: Replay<B>,
        S: Service<Request<R::Body>>,
    {
        self.shared.report_origin(request.uri());
        self.pass(request)
    }

    /// Forwards the request unchanged; the response is not inspected.
    fn pass<B, ResBody>(&mut self, request: Request<B>) -> ResponseFuture<S, R, B, ResBody>
    where
        R: Replay<B>,
        S: Service<Request<R::Body>>,
    {
        ResponseFuture::passing(self.shared.options.replay.call(&mut self.inner, request).0, &self.shared)
    }

    #[cold]
    fn call_without_token<B, ResBody>(
        &mut self,
        request: Request<B>,
        head: Option<RequestHead>,
    ) -> ResponseFuture<S, R, B, ResBody>
    where
        R: Replay<B>,
        S: Service<Request<R::Body>> + Clone,
    {
        let options = &self.shared.options;
        if options.existing == ExistingAuthorization::Keep && request.headers().contains_key(AUTHORIZATION) {
            return self.pass(request);
        }
        options.provider.reporter().waiting();
        let (parts, body) = request.into_parts();
        let (body, spare) = options.replay.begin(body);
        // Drops the ready service, and the permit that it may hold, before the request waits for a token.
        self.inner = self.shared.service();
        let request = Request::from_parts(parts, body);
        ResponseFuture::waiting(options.provider.obtain(Need::Any), request, head.zip(spare), &self.shared)
    }
}

impl<S, R> Clone for BearerAuth<S, R>
where
    S: Clone,
{
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), cache: self.cache.clone(), shared: Arc::clone(&self.shared) }
    }
}

impl<S, R> fmt::Debug for BearerAuth<S, R>
where
    S: fmt::Debug,
    R: fmt::Debug,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BearerAuth")
            .field("inner", &self.inner)
            .field("options", &self.shared.options)
            .finish()
    }
}
