//! [`BearerAuth`]: the service that the layer makes.

use std::{
    fmt,
    sync::Arc,
    task::{Context, Poll},
};

use http::{Request, Response, Uri, header::AUTHORIZATION};
use tower_service::Service;

use crate::{
    authorization::{Authorized, ExistingAuthorization, TooManyHeaders, authorize},
    bounds::HttpService,
    config::Config,
    error::{BoxError, Error},
    future::{ResponseFuture, Shared, Via},
    origins::OriginHash,
    per_request::AuthOverride,
    provider::{Cache, Need, TokenProvider},
    replay::{Cloned, Head, Replay},
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
/// Nothing of one attempt is held while the next one waits, and a request that is not sent holds nothing. A request that
/// has to wait for a token drops the ready service first, and is sent on a clone that is made ready afterwards: while it
/// waits, it holds no permit of a concurrency limit, which the token source may need as well. It carries the token that
/// is current when the clone is ready, and so does a retry. The response to an attempt is dropped before its retry.
///
/// While a challenged request waits for another token, it keeps its 401, since the caller gets it if there is none. A 401
/// that may be larger than 64 KiB is kept for a second at most: if the refresh fails after that, the caller gets
/// [`Error::ChallengeDropped`]. What the inner service ties to the body of a response, such as a permit, is kept as
/// long. If the token source needs it, let it have a client of its own.
///
/// # Waits
///
/// A request waits if there is no token that works. One that cannot be sent again also waits for a refresh that a
/// challenge has started. An error of the inner service is returned as it is, also that of a retry.
pub struct BearerAuth<S, R = Cloned> {
    /// Made ready by `poll_ready`, and called with the first attempt.
    inner: S,
    /// The token of the service's only provider.
    cache: Cache,
    shared: Arc<Shared<S, R>>,
}

impl<S, R> BearerAuth<S, R>
where
    S: Clone,
{
    pub(crate) fn new(inner: S, options: Config<R>) -> Self {
        let cache = options.providers.default.core().cache();
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

/// The future of a request with a body of type `B`.
type FutureOf<S, R, B> = ResponseFuture<
    S,
    R,
    B,
    <S as Service<Request<<R as Replay<B>>::Body>>>::Future,
    <R as Replay<B>>::Body,
    <S as HttpService<<R as Replay<B>>::Body>>::ResBody,
    (<R as Replay<B>>::Head, <R as Replay<B>>::Spare),
>;

impl<S, R, B> Service<Request<B>> for BearerAuth<S, R>
where
    R: Replay<B>,
    S: HttpService<R::Body> + Clone,
{
    type Response = Response<S::ResBody>;
    type Error = BoxError;
    type Future = FutureOf<S, R, B>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    #[inline]
    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let options = &self.shared.options;
        if let Some(error) = &self.shared.invalid {
            return self.fail(error.clone());
        }
        if !request.extensions().is_empty() {
            if let Some(requested) = AuthOverride::of(request.extensions()) {
                return self.call_with_override(request, requested);
            }
        }
        // Before a provider is selected: a request that gets no token needs none.
        if options.allowed_origins.as_ref().is_some_and(|origins| !origins.covers(request.uri())) {
            return self.call_not_allowed(request, None);
        }
        let selected = match options.providers.of(&request) {
            Ok(selected) => selected,
            Err(error) => return self.call_without_provider(request, error),
        };
        if options.allowed_origins.is_none() && !self.covers(&selected, request.uri()) {
            return self.call_not_allowed(request, selected);
        }
        // Copied before the token is added, so that the copy never contains one.
        let head = R::Head::of(&request);
        let current;
        let token = match &selected {
            None => options.providers.default.header(&mut self.cache),
            // A service keeps none of their tokens, since it would keep them all.
            Some(provider) => {
                current = provider.fresh();
                current.as_ref().map(|token| (token.0.header(), token.id()))
            }
        };
        let Some((header, token)) = token else { return self.call_without_fresh(request, head, selected) };
        match authorize(request.headers_mut(), header, options.existing) {
            Ok(Authorized::Layer) => {
                let origin = OriginHash::of(request.uri());
                let (response, spare) = options.replay.call(&mut self.inner, request);
                let via = Via::new(&self.shared, selected);
                ResponseFuture::sending(response, token.generation, origin, head.zip(spare), via)
            }
            Ok(Authorized::Caller) => self.pass(request),
            Err(TooManyHeaders) => self.fail(Error::TooManyHeaders),
        }
    }
}

impl<S, R> BearerAuth<S, R> {
    /// Whether a request to `uri` may carry the token of the selected provider.
    #[inline]
    fn covers(&self, selected: &Option<TokenProvider>, uri: &Uri) -> bool {
        let options = &self.shared.options;
        let provider = selected.as_ref().unwrap_or(&options.providers.default);
        options.allowed_origins.as_ref().unwrap_or(&provider.core().allowed_origins).covers(uri)
    }

    /// Sends a request whose extensions say which token it gets.
    #[cold]
    fn call_with_override<B>(&mut self, mut request: Request<B>, requested: AuthOverride) -> FutureOf<S, R, B>
    where
        R: Replay<B>,
        S: HttpService<R::Body> + Clone,
    {
        let options = &self.shared.options;
        let AuthOverride::UseToken(token) = requested else { return self.pass(request) };
        // The request has a token. It needs a provider only for the origins.
        let selected = match options.providers.of(&request) {
            Ok(selected) => selected,
            Err(_) if options.allowed_origins.is_some() => None,
            Err(error) => return self.call_without_provider(request, error),
        };
        if !self.covers(&selected, request.uri()) {
            return self.call_not_allowed(request, selected);
        }
        match authorize(request.headers_mut(), token.0.header(), options.existing) {
            Ok(_) => self.pass(request),
            Err(TooManyHeaders) => self.fail(Error::TooManyHeaders),
        }
    }

    /// Sends a request to an origin that is not allowed, unchanged.
    #[cold]
    fn call_not_allowed<B>(
        &mut self,
        request: Request<B>,
        selected: Option<TokenProvider>,
    ) -> FutureOf<S, R, B>
    where
        R: Replay<B>,
        S: HttpService<R::Body> + Clone,
    {
        Via::new(&self.shared, selected).report_origin(request.uri());
        self.pass(request)
    }

    /// Forwards the request unchanged; the response is not inspected.
    fn pass<B>(&mut self, request: Request<B>) -> FutureOf<S, R, B>
    where
        R: Replay<B>,
        S: HttpService<R::Body> + Clone,
    {
        let response = self.shared.options.replay.call(&mut self.inner, request).0;
        ResponseFuture::passing(response, Via::new(&self.shared, None))
    }

    /// Fails a request without sending it.
    #[cold]
    fn fail<B>(&mut self, error: Error) -> FutureOf<S, R, B>
    where
        R: Replay<B>,
        S: HttpService<R::Body> + Clone,
    {
        self.release();
        ResponseFuture::failed(error, Via::new(&self.shared, None))
    }

    /// Drops the ready service, and the permit that it may hold.
    fn release(&mut self)
    where
        S: Clone,
    {
        self.inner = self.shared.service();
    }

    /// Whether the request keeps the `Authorization` header of its caller.
    fn keeps_authorization<B>(&self, request: &Request<B>) -> bool {
        self.shared.options.existing == ExistingAuthorization::Keep
            && request.headers().contains_key(AUTHORIZATION)
    }

    /// Fails a request for which no provider can be selected, unless it needs none.
    #[cold]
    fn call_without_provider<B>(&mut self, request: Request<B>, error: Error) -> FutureOf<S, R, B>
    where
        R: Replay<B>,
        S: HttpService<R::Body> + Clone,
    {
        if self.keeps_authorization(&request) {
            return self.pass(request);
        }
        self.shared.options.providers.default.reporter().request_failed(&error);
        self.fail(error)
    }

    /// Sends a request if there is a token that works, though it is not fresh. Otherwise the request waits.
    #[cold]
    fn call_without_fresh<B>(
        &mut self,
        request: Request<B>,
        head: Option<R::Head>,
        selected: Option<TokenProvider>,
    ) -> FutureOf<S, R, B>
    where
        R: Replay<B>,
        S: HttpService<R::Body> + Clone,
    {
        if self.keeps_authorization(&request) {
            return self.pass(request);
        }
        let via = Via::new(&self.shared, selected);
        let (parts, body) = request.into_parts();
        let (body, spare) = via.options.replay.begin(body);
        let need = if spare.is_some() { Need::Any } else { Need::Settled };
        let (kept, mut request) = (head.zip(spare), Request::from_parts(parts, body));
        let mut waiting = via.provider().obtain(need);
        if let Some(token) = waiting.take_token() {
            let header = token.0.header();
            if authorize(request.headers_mut(), header, ExistingAuthorization::Replace).is_err() {
                return self.fail(Error::TooManyHeaders);
            }
            let origin = OriginHash::of(request.uri());
            let response = self.inner.call(request);
            return ResponseFuture::sending(response, token.id().generation, origin, kept, via);
        }
        via.provider().reporter().waiting();
        // While it waits, it holds no permit, which the token source may need.
        self.release();
        ResponseFuture::waiting(waiting, request, kept, via)
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
