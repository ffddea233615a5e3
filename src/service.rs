//! [`BearerAuth`]: the service that the layer makes.

use std::{
    fmt,
    sync::Arc,
    task::{Context, Poll},
};

use http::{Request, Response, header::AUTHORIZATION};
use tower_service::Service;

use crate::{
    authorization::{Authorized, ExistingAuthorization, TooManyHeaders, authorize},
    bounds::HttpService,
    config::Config,
    error::{BoxError, Error},
    future::{ResponseFuture, Shared, Via},
    per_request::AuthOverride,
    provider::TokenProvider,
    replay::{Cloned, Head, Replay},
    select::SelectProvider,
};

/// A service that adds a bearer token to each request, and sends a request again after a 401.
///
/// Made by [`BearerAuthLayer`](crate::BearerAuthLayer). `S` is the inner service, `R` how request bodies are sent again
/// ([`replay`](crate::replay)), and `P` which provider's token a request gets ([`SelectProvider`]).
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
pub struct BearerAuth<S, R = Cloned, P = TokenProvider>
where
    P: SelectProvider,
{
    /// Made ready by `poll_ready`, and called with the first attempt.
    inner: S,
    cache: P::Cache,
    shared: Arc<Shared<S, R, P>>,
}

impl<S, R, P> BearerAuth<S, R, P>
where
    S: Clone,
    P: SelectProvider,
{
    pub(crate) fn new(inner: S, options: Config<R, P>) -> Self {
        let cache = options.providers.cache();
        let shared = Arc::new(Shared::new(inner.clone(), options));
        Self { inner, cache, shared }
    }
}

impl<S, R, P: SelectProvider> BearerAuth<S, R, P> {
    /// Returns the inner service.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }

    /// Returns the inner service, without this layer.
    pub fn into_inner(self) -> S {
        self.inner
    }
}

impl<S, R, P, B> Service<Request<B>> for BearerAuth<S, R, P>
where
    R: Replay<B>,
    P: SelectProvider,
    S: HttpService<R::Body> + Clone,
{
    type Response = Response<S::ResBody>;
    type Error = BoxError;
    type Future = ResponseFuture<S, R, B, S::ResBody, P>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    #[inline]
    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let options = &self.shared.options;
        if let Some(error) = &self.shared.invalid {
            return ResponseFuture::failed(error.clone(), self.via_none());
        }
        if !request.extensions().is_empty() {
            if let Some(requested) = AuthOverride::of(request.extensions()) {
                return self.call_with_override(request, requested);
            }
        }
        // Before a provider is selected: a request that gets no token needs none.
        if options.allowed_origins.as_ref().is_some_and(|origins| !origins.covers(request.uri())) {
            return self.call_not_allowed(request, options.providers.none());
        }
        let selected = match options.providers.select(&request) {
            Ok(selected) => selected,
            Err(error) => return self.call_without_provider(request, error),
        };
        if options.allowed_origins.is_none() && !options.covers(&selected, request.uri()) {
            return self.call_not_allowed(request, selected);
        }
        // Copied before the token is added, so that the copy never contains one.
        let head = R::Head::of(&request);
        let headers = request.headers_mut();
        let authorized = options.providers.authorize(&selected, &mut self.cache, headers, options.existing);
        let Some((authorized, token)) = authorized else {
            return self.call_without_token(request, head, selected);
        };
        match authorized {
            Ok(Authorized::Layer) => {
                let (response, spare) = options.replay.call(&mut self.inner, request);
                ResponseFuture::sending(response, token, head.zip(spare), Via::new(&self.shared, selected))
            }
            Ok(Authorized::Caller) => self.pass(request),
            Err(TooManyHeaders) => ResponseFuture::failed(Error::TooManyHeaders, self.via_none()),
        }
    }
}

impl<S, R, P: SelectProvider> BearerAuth<S, R, P> {
    /// For a request that needs no provider any more.
    fn via_none(&self) -> Via<S, R, P> {
        Via::new(&self.shared, self.shared.options.providers.none())
    }

    /// Sends a request whose extensions say which token it gets.
    #[cold]
    fn call_with_override<B, ResBody>(
        &mut self,
        mut request: Request<B>,
        requested: AuthOverride,
    ) -> ResponseFuture<S, R, B, ResBody, P>
    where
        R: Replay<B>,
        S: Service<Request<R::Body>>,
    {
        let options = &self.shared.options;
        let AuthOverride::UseToken(token) = requested else { return self.pass(request) };
        // The request has a token. It needs a provider only for the origins.
        let selected = options.providers.select(&request).unwrap_or_else(|_| options.providers.none());
        if !options.covers(&selected, request.uri()) {
            return self.call_not_allowed(request, selected);
        }
        match authorize(request.headers_mut(), token.0.header(), options.existing) {
            Ok(_) => self.pass(request),
            Err(TooManyHeaders) => ResponseFuture::failed(Error::TooManyHeaders, self.via_none()),
        }
    }

    /// Sends a request to an origin that is not allowed, unchanged.
    #[cold]
    fn call_not_allowed<B, ResBody>(
        &mut self,
        request: Request<B>,
        selected: P::Selected,
    ) -> ResponseFuture<S, R, B, ResBody, P>
    where
        R: Replay<B>,
        S: Service<Request<R::Body>>,
    {
        Via::new(&self.shared, selected).report_origin(request.uri());
        self.pass(request)
    }

    /// Forwards the request unchanged; the response is not inspected.
    fn pass<B, ResBody>(&mut self, request: Request<B>) -> ResponseFuture<S, R, B, ResBody, P>
    where
        R: Replay<B>,
        S: Service<Request<R::Body>>,
    {
        let response = self.shared.options.replay.call(&mut self.inner, request).0;
        ResponseFuture::passing(response, self.via_none())
    }

    /// Whether the request keeps the `Authorization` header of its caller.
    fn keeps_authorization<B>(&self, request: &Request<B>) -> bool {
        self.shared.options.existing == ExistingAuthorization::Keep
            && request.headers().contains_key(AUTHORIZATION)
    }

    /// Fails a request for which no provider can be selected, unless it needs none.
    #[cold]
    fn call_without_provider<B, ResBody>(
        &mut self,
        request: Request<B>,
        error: Error,
    ) -> ResponseFuture<S, R, B, ResBody, P>
    where
        R: Replay<B>,
        S: Service<Request<R::Body>>,
    {
        if self.keeps_authorization(&request) {
            return self.pass(request);
        }
        let via = self.via_none();
        via.provider().request_failed(&error);
        ResponseFuture::failed(error, via)
    }

    #[cold]
    fn call_without_token<B, ResBody>(
        &mut self,
        request: Request<B>,
        head: Option<R::Head>,
        selected: P::Selected,
    ) -> ResponseFuture<S, R, B, ResBody, P>
    where
        R: Replay<B>,
        S: Service<Request<R::Body>> + Clone,
    {
        if self.keeps_authorization(&request) {
            return self.pass(request);
        }
        let via = Via::new(&self.shared, selected);
        via.provider().reporter().waiting();
        let (parts, body) = request.into_parts();
        let (body, spare) = via.options.replay.begin(body);
        // Drops the ready service, and the permit that it may hold, before the request waits for a token.
        self.inner = self.shared.service();
        ResponseFuture::waiting(Request::from_parts(parts, body), head.zip(spare), via)
    }
}

impl<S, R, P> Clone for BearerAuth<S, R, P>
where
    S: Clone,
    P: SelectProvider,
{
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), cache: self.cache.clone(), shared: Arc::clone(&self.shared) }
    }
}

impl<S, R, P> fmt::Debug for BearerAuth<S, R, P>
where
    S: fmt::Debug,
    R: fmt::Debug,
    P: SelectProvider + fmt::Debug,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BearerAuth")
            .field("inner", &self.inner)
            .field("options", &self.shared.options)
            .finish()
    }
}
