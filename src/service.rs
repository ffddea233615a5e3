//! [`BearerAuth`]: the service that the layer makes.

use std::{
    fmt, mem,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};

use http::{
    Request, Response,
    header::{AUTHORIZATION, Entry},
};
use http_body::Body;
use tower_service::Service;

use crate::{
    error::{BoxError, Error},
    future::{Attempt, ResponseFuture},
    layer::{BearerAuthLayer, Existing},
    replay::{Head, Replay},
    token::Token,
};

/// A service whose requests carry a bearer token; made by [`BearerAuthLayer`].
///
/// # Clone
///
/// The inner service has to be `Clone`, and its clones cheap: a retry is sent on one. The service that was made ready is
/// the one that is called with the first attempt. There is no `get_mut`: the retries' clones would not follow it.
pub struct BearerAuth<S, R> {
    /// The one that `poll_ready` makes ready.
    inner: S,
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
        Self { inner, shared: Arc::new(Shared { layer, template }) }
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

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let layer = &self.shared.layer;
        if let Some(error) = &layer.invalid {
            return ResponseFuture::failed(error.clone(), &self.shared);
        }
        let (parts, body) = request.into_parts();
        let (body, spare) = layer.replay.begin(body);
        let head = spare.is_some().then(|| Head::of(&parts));
        let mut request = Request::from_parts(parts, body);

        if let Some(token) = layer.provider.fresh() {
            return match authorize(&mut request, &token, layer.existing) {
                Ok(Authorized::Ours) => ResponseFuture::sending(
                    self.inner.call(request),
                    Attempt::new(token, head.zip(spare)),
                    &self.shared,
                ),
                Ok(Authorized::Callers) => ResponseFuture::passing(self.inner.call(request), &self.shared),
                Err(error) => ResponseFuture::failed(error, &self.shared),
            };
        }
        if layer.existing == Existing::Keep && request.headers().contains_key(AUTHORIZATION) {
            return ResponseFuture::passing(self.inner.call(request), &self.shared);
        }
        // The service that was made ready goes with the request, until there is a token.
        let ready = mem::replace(&mut self.inner, self.shared.service());
        ResponseFuture::waiting(layer.provider.obtain(), ready, request, head.zip(spare), &self.shared)
    }
}

impl<S, R> Clone for BearerAuth<S, R>
where
    S: Clone,
{
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), shared: Arc::clone(&self.shared) }
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
pub(crate) fn authorize<B>(
    request: &mut Request<B>,
    token: &Token,
    existing: Existing,
) -> Result<Authorized, Error> {
    match request.headers_mut().try_entry(AUTHORIZATION) {
        Ok(Entry::Vacant(entry)) => {
            entry.try_insert(token.header_value()).map_err(|_| Error::TooManyHeaders)?;
            Ok(Authorized::Ours)
        }
        Ok(Entry::Occupied(_)) if existing == Existing::Keep => Ok(Authorized::Callers),
        Ok(Entry::Occupied(mut entry)) => {
            entry.insert(token.header_value());
            Ok(Authorized::Ours)
        }
        Err(_) => Err(Error::TooManyHeaders),
    }
}
