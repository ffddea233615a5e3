//! [`ResponseFuture`]: one request's path through the layer, as a state machine.
//!
//! ```text
//! (no token) Waiting ─▶ GettingReady ─▶ Sending ─▶ response ─▶ caller
//!                           ▲             │ challenge          ▲
//!                           │             ▼                    │
//!                       BackingOff ◀─ Refreshing ──────────────┘
//!                                       no other token, or the request is not sent again:
//!                                       the challenge, unchanged
//! ```
//!
//! Nothing of one attempt is held while the next one waits: neither its service, nor its response, nor its body.
//!
//! This file has the happy path, which most requests take: [`Stage`] is either the attempt that is sent, or one of the other
//! states, which are those of `slow_path`. `pending_request` has what is kept for them.

mod pending_request;
mod shared;
mod slow_path;

use std::fmt;
use std::future::Future;
use std::marker::PhantomData;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http::{Request, Response};
use http_body::Body;
use pin_project_lite::pin_project;
use tower_service::Service;

#[cfg(feature = "reqwest")]
pub(crate) use self::shared::Redirected;
pub(crate) use self::shared::{Shared, Via};

use self::pending_request::{PendingRequest, Unsent};
use self::slow_path::SlowPath;
use crate::error::{BoxError, Error};
use crate::origin_hash::OriginHash;
use crate::provider::Waiting;
use crate::replay::Replay;

pin_project! {
    /// The future of [`BearerAuth`](crate::BearerAuth), named `<BearerAuth<S, R> as Service<Request<B>>>::Future`.
    ///
    /// # Cancel safety
    ///
    /// Dropping it drops the running attempt, and nothing else: a token refresh that it started continues.
    ///
    /// # Size
    ///
    /// With [`no_replay`](crate::BearerAuthLayer::no_replay) it takes at most 40 bytes more than the future of the inner
    /// service on a 64-bit target, and 32 with hyper-util's client. With replay it also has the head and the body of the
    /// request: 224 bytes in all with a `Full<Bytes>`. What only the slow path needs is behind a pointer.
    // The parameters are the types themselves, not projections of `S` and `R`: the compiler could not prove that a task
    // with a projection is `Send` for all lifetimes.
    pub struct ResponseFuture<S, R, B, F, ReqBody, ResBody, K> {
        #[pin]
        state: Stage<S, F, Request<ReqBody>, ResBody>,
        pending: PendingRequest<K>,
        via: Via<S, R>,
        body: PhantomData<fn(B)>,
    }
}

pin_project! {
    // Every request pays for the size of this, and for dropping it: all but the happy path is behind a pointer.
    #[project = StageProj]
    enum Stage<S, F, Req, ResBody> {
        Sending {
            #[pin]
            response: F,
        },
        SlowPath {
            slow_path: Pin<Box<SlowPath<S, Req, ResBody>>>,
        },
    }
}

impl<S, R, B, F, ReqBody, ResBody, K> ResponseFuture<S, R, B, F, ReqBody, ResBody, K> {
    /// A request that was sent: with the token of this generation, or as it came if that is 0.
    #[inline]
    pub(crate) fn sending(
        response: F,
        token: u32,
        origin: OriginHash,
        kept: Option<K>,
        via: Via<S, R>,
    ) -> Self {
        let pending = PendingRequest::new(token, origin, kept);
        Self { state: Stage::Sending { response }, pending, via, body: PhantomData }
    }

    /// A request that waits for a token.
    pub(crate) fn waiting(
        token: Waiting,
        request: Request<ReqBody>,
        kept: Option<K>,
        via: Via<S, R>,
    ) -> Self {
        let pending = PendingRequest::new(0, via.origin(request.uri()), kept);
        let unsent = Unsent { request, delay: Duration::ZERO, backoff: None };
        let state = Stage::slow_path(SlowPath::waiting(token, unsent, via.provider()));
        Self { state, pending, via, body: PhantomData }
    }

    /// A request that was not sent.
    pub(crate) fn failed(error: Error, via: Via<S, R>) -> Self {
        let pending = PendingRequest::new(0, OriginHash::NONE, None);
        let state = Stage::slow_path(SlowPath::Ended { error: Some(error) });
        Self { state, pending, via, body: PhantomData }
    }
}

impl<S, R, B, F, ReqBody, ResBody> Future
    for ResponseFuture<S, R, B, F, ReqBody, ResBody, (R::Head, R::Spare)>
where
    R: Replay<B, Body = ReqBody>,
    S: Service<Request<ReqBody>, Response = Response<ResBody>, Future = F> + Clone,
    S::Error: Into<BoxError>,
    F: Future<Output = Result<Response<ResBody>, S::Error>>,
    ResBody: Body,
{
    type Output = Result<Response<ResBody>, BoxError>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        loop {
            match this.state.as_mut().project() {
                StageProj::Sending { response } => {
                    let response = ready!(response.poll(cx)).map_err(Into::into)?;
                    if !this.pending.is_challenged_by(this.via, &response) {
                        return Poll::Ready(Ok(response));
                    }
                    match SlowPath::challenged(this.pending, this.via, response) {
                        // Drops the attempt's future, which may hold a permit, before the retry waits for readiness.
                        // Otherwise a `ConcurrencyLimit(1)` would never get ready.
                        Ok(slow_path) => this.state.set(Stage::slow_path(slow_path)),
                        Err(challenge) => return Poll::Ready(Ok(challenge)),
                    }
                }
                StageProj::SlowPath { slow_path } => {
                    match ready!(slow_path.as_mut().poll(this.pending, this.via, cx)) {
                        Ok(response) => this.state.set(Stage::Sending { response }),
                        Err(result) => return Poll::Ready(result),
                    }
                }
            }
        }
    }
}

impl<S, F, Req, ResBody> Stage<S, F, Req, ResBody> {
    #[cold]
    fn slow_path(slow_path: SlowPath<S, Req, ResBody>) -> Self {
        Self::SlowPath { slow_path: Box::pin(slow_path) }
    }
}

impl<S, R, B, F, ReqBody, ResBody, K> fmt::Debug for ResponseFuture<S, R, B, F, ReqBody, ResBody, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}
