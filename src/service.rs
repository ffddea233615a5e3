//! [`BearerAuth`]: the service that the layer makes.

use std::{
    fmt, mem,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};

use http::{HeaderMap, HeaderValue, Request, Response, header::AUTHORIZATION};
use http_body::Body;
use tower_service::Service;

use crate::{
    error::{BoxError, Error},
    future::ResponseFuture,
    layer::{BearerAuthLayer, Existing},
    provider::Current,
    replay::{Head, Replay},
};

/// A service whose requests carry a bearer token; made by [`BearerAuthLayer`].
///
/// # Clone
///
/// The inner service has to be `Clone`, and its clones cheap: a retry is sent on one. The service that was made ready is
/// the one that is called with the first attempt. There is no `get_mut`: the retries' clones would not follow it.
///
/// # A retry that is shed
///
/// If the inner service sheds the retry (`tower::load_shed`), the 401 is the answer, unless its body had to be drained:
/// over HTTP/1, where the connection could not have served the retry otherwise, the answer is the inner service's
/// `Overloaded`.
pub struct BearerAuth<S, R> {
    /// The one that `poll_ready` makes ready.
    inner: S,
    current: Current,
    shared: Arc<Shared<S, R>>,
}

/// What requests under way share with the service that sent them: one reference count per request.
pub(crate) struct Shared<S, R> {
    pub(crate) layer: BearerAuthLayer<R>,
    /// What a retry's service is cloned from. It is never made ready, so that it holds no permit of a
    /// `ConcurrencyLimit`. The lock is there so that the service need not be `Sync`.
    template: Mutex<S>,
}

impl<S, R> Shared<S, R>
where
    S: Clone,
{
    /// A service that nobody has made ready yet.
    pub(crate) fn service(&self) -> S {
        self.template.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl<S, R> BearerAuth<S, R>
where
    S: Clone,
{
    pub(crate) fn new(inner: S, layer: BearerAuthLayer<R>) -> Self {
        let template = Mutex::new(inner.clone());
        let current = layer.provider.current_for_service();
        Self { inner, current, shared: Arc::new(Shared { layer, template }) }
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

impl<S, R, B, ResBody> Service<Request<B>> for BearerAuth<S, R>
where
    R: Replay<B>,
    S: Service<Request<R::Body>, Response = Response<ResBody>> + Clone,
    S::Error: Into<BoxError>,
    ResBody: Body,
{
    type Response = Response<ResBody>;
    type Error = BoxError;
    type Future = ResponseFuture<S, R, B, ResBody>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    #[inline]
    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let layer = &self.shared.layer;
        if let Some(error) = &layer.invalid {
            return ResponseFuture::failed(error.clone(), &self.shared);
        }
        // Before a token is added, so that it never holds one.
        let head = R::REPLAYS.then(|| Head::of(&request));
        let Some((header, token)) = self.current.header(&layer.provider) else {
            return self.call_without_token(request, head);
        };
        match authorize(request.headers_mut(), header.clone(), layer.existing) {
            Ok(Authorized::Ours) => {
                let (response, spare) = layer.replay.call(&mut self.inner, request);
                ResponseFuture::sending(response, token, head, spare, &self.shared)
            }
            Ok(Authorized::Callers) => {
                ResponseFuture::passing(layer.replay.call(&mut self.inner, request).0, &self.shared)
            }
            Err(error) => ResponseFuture::failed(error, &self.shared),
        }
    }
}

impl<S, R> BearerAuth<S, R> {
    #[cold]
    fn call_without_token<B, ResBody>(
        &mut self,
        request: Request<B>,
        head: Option<Head>,
    ) -> ResponseFuture<S, R, B, ResBody>
    where
        R: Replay<B>,
        S: Service<Request<R::Body>> + Clone,
    {
        let layer = &self.shared.layer;
        if layer.existing == Existing::Keep && request.headers().contains_key(AUTHORIZATION) {
            return ResponseFuture::passing(layer.replay.call(&mut self.inner, request).0, &self.shared);
        }
        let (parts, body) = request.into_parts();
        let (body, spare) = layer.replay.begin(body);
        // The service that was made ready goes with the request, until there is a token.
        let ready = mem::replace(&mut self.inner, self.shared.service());
        let request = Request::from_parts(parts, body);
        ResponseFuture::waiting(layer.provider.obtain(), ready, request, head.zip(spare), &self.shared)
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
        f.debug_struct("BearerAuth").field("inner", &self.inner).field("layer", &self.shared.layer).finish()
    }
}

/// Whose `Authorization` header a request has.
pub(crate) enum Authorized {
    Ours,
    Callers,
}

/// Adds the token to a request that has no `Authorization` header, or whose own is not kept (RFC 6750 §2.1).
#[inline]
pub(crate) fn authorize(
    headers: &mut HeaderMap,
    token: HeaderValue,
    existing: Existing,
) -> Result<Authorized, Error> {
    match (headers.try_append(AUTHORIZATION, token), existing) {
        (Ok(false), _) => Ok(Authorized::Ours),
        (Ok(true), existing) => Ok(resolve(headers, existing)),
        (Err(_), _) => Err(Error::TooManyHeaders),
    }
}

/// Ours has just been added to what a caller had set: one of the two goes.
#[cold]
fn resolve(headers: &mut HeaderMap, existing: Existing) -> Authorized {
    let mut values: Vec<_> = headers.get_all(AUTHORIZATION).iter().cloned().collect();
    let ours = values.pop();
    headers.remove(AUTHORIZATION);
    match existing {
        Existing::Keep => {
            headers.extend(values.into_iter().map(|value| (AUTHORIZATION, value)));
            Authorized::Callers
        }
        Existing::Replace => {
            headers.extend(ours.map(|value| (AUTHORIZATION, value)));
            Authorized::Ours
        }
    }
}
