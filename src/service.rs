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
    provider::Current,
    replay::{Replay, RequestHead},
};

/// A service whose requests carry a bearer token; made by [`BearerAuthLayer`](crate::BearerAuthLayer).
///
/// # Clone
///
/// The inner service has to be `Clone`, and its clones cheap: a retry is sent on one. The service that was made ready is
/// the one that is called with the first attempt, if there is a token. There is no `get_mut`: the retries' clones would not
/// follow it.
///
/// # Permits
///
/// A request that has to wait for a token lets go of the ready service first, and is sent on a clone that is made ready
/// afterwards: while it waits it holds no permit of a concurrency limit, which the token's source may need as well. It carries
/// the token that is current when that clone is ready, and so does a retry. A challenged request keeps its 401 while it
/// waits for another token, and with it whatever the inner service ties to the body of an answer.
///
/// # A retry that is shed
///
/// If the inner service sheds the retry (`tower::load_shed`), the 401 is the answer, unless its body had to be drained:
/// over HTTP/1, where the connection could not have served the retry otherwise, the answer is the inner service's
/// `Overloaded`. Likewise, if its token expires before the inner service is ready for the retry, and there is no other, the
/// answer is the 401, or [`Error`](crate::Error) where the 401 had to be drained.
pub struct BearerAuth<S, R> {
    /// The one that `poll_ready` makes ready.
    inner: S,
    current: Current,
    shared: Arc<Shared<S, R>>,
}

impl<S, R> BearerAuth<S, R>
where
    S: Clone,
{
    pub(crate) fn new(inner: S, options: Config<R>) -> Self {
        let current = options.provider.current_for_service();
        let shared = Arc::new(Shared::new(inner.clone(), options));
        Self { inner, current, shared }
    }
}

impl<S, R> BearerAuth<S, R> {
    /// The inner service.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }

    /// The inner service, without its layer.
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
        if let Some(error) = &options.invalid {
            return ResponseFuture::failed(error.clone(), &self.shared);
        }
        if !request.extensions().is_empty() {
            if let Some(requested) = AuthOverride::of(request.extensions()) {
                return self.call_with_override(request, requested);
            }
        }
        if !options.scope.covers(request.uri()) {
            return self.call_outside(request);
        }
        // Before a token is added, so that it never holds one.
        let head = R::REPLAYS.then(|| RequestHead::of(&request));
        let Some((header, token)) = options.provider.header(&mut self.current) else {
            return self.call_without_token(request, head);
        };
        match authorize(request.headers_mut(), header.clone(), options.existing) {
            Ok(Authorized::Ours) => {
                let (response, spare) = options.replay.call(&mut self.inner, request);
                ResponseFuture::sending(response, token, head.zip(spare), &self.shared)
            }
            Ok(Authorized::Callers) => self.pass(request),
            Err(error) => ResponseFuture::failed(error, &self.shared),
        }
    }
}

impl<S, R> BearerAuth<S, R> {
    /// The request itself says which token it is to have.
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
            AuthOverride::UseToken(_) if !options.scope.covers(request.uri()) => self.call_outside(request),
            AuthOverride::UseToken(token) => {
                match authorize(request.headers_mut(), token.header_value(), options.existing) {
                    Ok(_) => self.pass(request),
                    Err(error) => ResponseFuture::failed(error, &self.shared),
                }
            }
        }
    }

    /// Outside of the scope: the request goes as it is.
    #[cold]
    fn call_outside<B, ResBody>(&mut self, request: Request<B>) -> ResponseFuture<S, R, B, ResBody>
    where
        R: Replay<B>,
        S: Service<Request<R::Body>>,
    {
        self.shared.outside(request.uri());
        self.pass(request)
    }

    /// Sends a request as it is, whose answer is none of ours.
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
        // The service that was made ready, and what it holds, goes before the request waits for a token, not after.
        self.inner = self.shared.service();
        let request = Request::from_parts(parts, body);
        ResponseFuture::waiting(options.provider.obtain(), request, head.zip(spare), &self.shared)
    }
}

impl<S, R> Clone for BearerAuth<S, R>
where
    S: Clone,
{
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), current: self.current.clone(), shared: Arc::clone(&self.shared) }
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
