//! [`BearerAuth`]: the service that the layer makes.

use std::fmt;
use std::sync::Arc;
use std::task::{Context, Poll};

use http::{Request, Response, Uri, header::AUTHORIZATION};
use tower_service::Service;

use crate::authorization::{Authorized, ExistingAuthorization, authorize};
use crate::bounds::HttpService;
use crate::error::{BoxError, Error};
use crate::future::{ResponseFuture, Shared, Via};
use crate::layer_options::LayerOptions;
use crate::origin_hash::OriginHash;
use crate::origins;
use crate::per_request::{NoBearer, UseToken};
use crate::provider::{Need, TokenProvider};
use crate::replay::{Cloned, KeepHead, Replay};
use crate::sync::Cache;
use crate::token::Token;

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
/// that may be larger than 64 KiB, such as one of unknown length, is kept for a second at most, and so is one of those that
/// together may be larger than 1 MiB for one provider, or one group: if the refresh fails after that, the caller gets
/// [`Error::ChallengeDropped`]. A body that is still being sent is paused for as long. A request that is not sent again,
/// and waits lest the refresh of a login is lost, keeps its 401, however large, until the refresh ends. What the inner
/// service ties to the body of a response, such as a permit, is kept with a 401. Give a token source that needs it a
/// separate client.
///
/// # Waits
///
/// [`TokenProvider`] has the rules by which a request [waits](TokenProvider#rules) for a token. One with a fresh token costs
/// one atomic load, one clock read and one header. An error of the inner
/// service is returned as it is, also that of a retry.
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
    pub(crate) fn new(inner: S, options: LayerOptions, replay: R) -> Self {
        let cache = options.providers.default.core().cache();
        let shared = Arc::new(Shared::new(inner.clone(), options, replay));
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

/// What is done with a request.
enum Plan {
    /// The token of this generation was added, which is that of the selected provider.
    Send(u32, Option<TokenProvider>),
    /// There is no token that is fresh.
    Obtain(Option<TokenProvider>),
    /// It is sent as it is, and the response is not inspected.
    Pass,
    Fail(Error),
}

impl<S, R> BearerAuth<S, R> {
    /// Adds the token to a request that gets one, if there is one that is fresh.
    #[inline]
    fn plan<B>(&mut self, request: &mut Request<B>) -> Plan {
        let options = &self.shared.options;
        if let Some(error) = &self.shared.invalid {
            return Plan::Fail(error.clone());
        }
        if !request.extensions().is_empty() {
            if request.extensions().get::<NoBearer>().is_some() {
                return Plan::Pass;
            }
            if let Some(UseToken(token)) = request.extensions().get().cloned() {
                return self.plan_with_token(request, &token);
            }
        }
        let selected = match options.providers.select {
            None if self.covers(&None, request.uri()) => None,
            None => return self.pass_foreign(request, None),
            Some(_) => match self.select(request) {
                Ok(selected) => selected,
                Err(plan) => return plan,
            },
        };
        let current;
        let token = match &selected {
            None => options.providers.default.header(&mut self.cache),
            // A service keeps none of their tokens, since it would keep them all.
            Some(provider) => {
                current = provider.fresh();
                current.as_ref().map(|token| (token.header(), token.id()))
            }
        };
        let Some((header, token)) = token else {
            return if self.keeps_authorization(request) {
                self.keep(&selected)
            } else {
                Plan::Obtain(selected)
            };
        };
        match authorize(request.headers_mut(), header, options.existing) {
            Some(Authorized::Layer) => Plan::Send(token.generation, selected),
            Some(Authorized::Caller) => self.keep(&selected),
            None => Plan::Fail(Error::TooManyHeaders),
        }
    }

    /// For a request that keeps the `Authorization` header of its caller.
    #[cold]
    fn keep(&self, selected: &Option<TokenProvider>) -> Plan {
        let provider = selected.as_ref().unwrap_or(&self.shared.options.providers.default);
        provider.reporter().authorization_kept();
        Plan::Pass
    }

    /// Selects the provider of a request, or says what is done without one.
    fn select<B>(&self, request: &Request<B>) -> Result<Option<TokenProvider>, Plan> {
        // A request that gets no token needs no provider.
        let origins = self.shared.options.allowed_origins.as_ref();
        if origins.is_some_and(|origins| !origins.covers(request.uri())) {
            return Err(self.pass_foreign(request, None));
        }
        match self.shared.options.providers.of(request) {
            Ok(selected) if self.covers(&selected, request.uri()) => Ok(selected),
            Ok(selected) => Err(self.pass_foreign(request, selected)),
            Err(error) => Err(self.plan_without_provider(request, error)),
        }
    }

    /// For a request whose extensions have the token that it gets.
    #[cold]
    fn plan_with_token<B>(&self, request: &mut Request<B>, token: &Token) -> Plan {
        let options = &self.shared.options;
        // The request has a token. It needs a provider only for the origins.
        let selected = match options.providers.of(request) {
            Ok(selected) => selected,
            Err(_) if options.allowed_origins.is_some() => None,
            Err(error) => return self.plan_without_provider(request, error),
        };
        if !self.covers(&selected, request.uri()) {
            return self.pass_foreign(request, selected);
        }
        match authorize(request.headers_mut(), token.header(), options.existing) {
            Some(Authorized::Layer) => Plan::Pass,
            Some(Authorized::Caller) => self.keep(&selected),
            None => Plan::Fail(Error::TooManyHeaders),
        }
    }

    /// For a request to an origin that is not allowed.
    #[cold]
    fn pass_foreign<B>(&self, request: &Request<B>, selected: Option<TokenProvider>) -> Plan {
        if self.keeps_authorization(request) {
            return self.keep(&selected);
        }
        let (options, via) = (&self.shared.options, Via::new(&self.shared, selected));
        if !options.is_strict {
            via.report_origin(request.uri());
            return Plan::Pass;
        }
        let allowed = options.allowed_origins.as_ref().unwrap_or(&via.provider().core().allowed_origins);
        let origin = origins::shown(request.uri());
        let text = format!("{origin} is not an allowed origin: the token is sent only to {allowed:?}");
        Plan::Fail(Error::OriginNotAllowed(text))
    }

    /// For a request for which no provider can be selected.
    #[cold]
    fn plan_without_provider<B>(&self, request: &Request<B>, error: Error) -> Plan {
        if self.keeps_authorization(request) {
            return self.keep(&None);
        }
        self.shared.options.providers.default.reporter().request_failed(&error);
        Plan::Fail(error)
    }

    /// Whether a request to `uri` may carry the token of the selected provider.
    #[inline]
    fn covers(&self, selected: &Option<TokenProvider>, uri: &Uri) -> bool {
        let options = &self.shared.options;
        let provider = selected.as_ref().unwrap_or(&options.providers.default);
        options.allowed_origins.as_ref().unwrap_or(&provider.core().allowed_origins).covers(uri)
    }

    /// Whether the request keeps the `Authorization` header of its caller.
    fn keeps_authorization<B>(&self, request: &Request<B>) -> bool {
        self.shared.options.existing == ExistingAuthorization::Keep
            && request.headers().contains_key(AUTHORIZATION)
    }
}

impl<S, R, B> Service<Request<B>> for BearerAuth<S, R>
where
    R: Replay<B>,
    S: HttpService<R::Body> + Clone,
{
    type Response = Response<S::ResBody>;
    type Error = BoxError;
    type Future = ResponseFuture<S, R, B, S::Future, R::Body, S::ResBody, (R::Head, R::Spare)>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    #[inline]
    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        // Copied before the token is added, so that the copy never contains one.
        let head = R::Head::of(&request);
        match self.plan(&mut request) {
            Plan::Send(token, selected) => {
                let origin = self.shared.origin(request.uri());
                let (response, spare) = self.shared.replay.call(&mut self.inner, request);
                let via = Via::new(&self.shared, selected);
                ResponseFuture::sending(response, token, origin, head.zip(spare), via)
            }
            Plan::Obtain(selected) => self.obtain(request, head, Via::new(&self.shared, selected)),
            Plan::Pass => {
                let response = self.shared.replay.call(&mut self.inner, request).0;
                ResponseFuture::sending(response, 0, OriginHash::NONE, None, Via::new(&self.shared, None))
            }
            Plan::Fail(error) => {
                // A request that is not sent holds no permit of the ready service.
                self.inner = self.shared.service();
                ResponseFuture::failed(error, Via::new(&self.shared, None))
            }
        }
    }
}

impl<S, R> BearerAuth<S, R> {
    /// Sends a request if there is a token that works, though it is not fresh. Otherwise the request waits.
    #[cold]
    fn obtain<B>(
        &mut self,
        request: Request<B>,
        head: Option<R::Head>,
        via: Via<S, R>,
    ) -> <Self as Service<Request<B>>>::Future
    where
        R: Replay<B>,
        S: HttpService<R::Body> + Clone,
    {
        let (parts, body) = request.into_parts();
        let (body, spare) = via.replay.begin(body);
        let is_sent_again = spare.is_some() && via.options.retry.retries() > 0;
        let need = if is_sent_again { Need::Any } else { Need::Settled };
        let (kept, mut request) = (head.zip(spare), Request::from_parts(parts, body));
        let waiting = match via.provider().obtain(need).take_token() {
            // The caller's own header would have been kept before.
            Ok(token) => {
                let (headers, header) = (request.headers_mut(), token.header());
                if authorize(headers, header, ExistingAuthorization::Replace).is_some() {
                    let origin = self.shared.origin(request.uri());
                    let response = self.inner.call(request);
                    return ResponseFuture::sending(response, token.id().generation, origin, kept, via);
                }
                self.inner = self.shared.service();
                return ResponseFuture::failed(Error::TooManyHeaders, via);
            }
            Err(waiting) => waiting,
        };
        via.provider().reporter().waiting();
        // While it waits, it holds no permit, which the token source may need.
        self.inner = self.shared.service();
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
            .field("replay", &self.shared.replay)
            .finish()
    }
}
