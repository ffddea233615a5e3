//! [`ResponseFuture`]: one request's path through the layer, as a state machine.
//!
//! ```text
//! (no token) Waiting ─▶ GettingReady ─▶ Sending ─▶ response ──────────────────────────▶ caller
//!                                                 │ challenge                          ▲
//!                                                 ▼                                    │
//!                          Refreshing ─▶ Draining ─▶ BackingOff ─▶ GettingReady ─▶ Retrying
//!                              │ no other token, or the body cannot be sent again
//!                              ▼
//!                        caller (the challenge, unchanged)
//! ```
//!
//! This file has the happy path, which most requests take. `slow_path` has the others, `pending_request` what is kept
//! for them.

mod pending_request;
mod shared;
mod slow_path;

use std::{
    fmt,
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
};

use http::{Request, Response};
use http_body::Body;
use pin_project_lite::pin_project;
use tower_service::Service;

#[cfg(feature = "reqwest")]
pub(crate) use self::shared::FinalUri;
pub(crate) use self::shared::{Shared, Via};

use self::{
    pending_request::PendingRequest,
    slow_path::{End, GivenUp, SlowPath, Step, Unsent},
};
use crate::{
    error::{BoxError, Error},
    provider::{Need, TokenProvider},
    replay::Replay,
    select::SelectProvider,
    token::TokenId,
};

pin_project! {
    /// The future of [`BearerAuth`](crate::BearerAuth).
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
    pub struct ResponseFuture<S, R, B, ResBody, P = TokenProvider>
    where
        S: Service<Request<R::Body>>,
        R: Replay<B>,
        P: SelectProvider,
    {
        #[pin]
        state: State<S, Request<R::Body>, ResBody>,
        pending: PendingRequest<R::Head, R::Spare>,
        via: Via<S, R, P>,
    }
}

pin_project! {
    // Every request pays for the size of this, and for dropping it: all but the happy path is behind a pointer.
    #[project = StateProj]
    enum State<S, Req, ResBody>
    where
        S: Service<Req>,
    {
        Sending {
            #[pin]
            response: S::Future,
        },
        SlowPath {
            slow_path: Pin<Box<SlowPath<S, Req, ResBody>>>,
        },
    }
}

impl<S, R, B, ResBody, P> ResponseFuture<S, R, B, ResBody, P>
where
    S: Service<Request<R::Body>>,
    R: Replay<B>,
    P: SelectProvider,
{
    /// A request that was sent with a token.
    #[inline]
    pub(crate) fn sending(
        response: S::Future,
        token: TokenId,
        kept: Option<(R::Head, R::Spare)>,
        via: Via<S, R, P>,
    ) -> Self {
        Self { state: State::Sending { response }, pending: PendingRequest::new(Some(token), kept), via }
    }

    /// A request that was sent as it came: with its caller's own credentials, or to an origin that is not allowed.
    pub(crate) fn passing(response: S::Future, via: Via<S, R, P>) -> Self {
        Self { state: State::Sending { response }, pending: PendingRequest::new(None, None), via }
    }

    /// A request that waits for a token.
    pub(crate) fn waiting(
        request: Request<R::Body>,
        kept: Option<(R::Head, R::Spare)>,
        via: Via<S, R, P>,
    ) -> Self {
        let provider = via.provider();
        Self {
            state: State::slow_path(SlowPath::Waiting {
                token: provider.obtain(Need::Any),
                unsent: Some(Unsent::first(request)),
                given_up: GivenUp(Some(provider.clone())),
            }),
            pending: PendingRequest::new(None, kept),
            via,
        }
    }

    /// A request that was not sent.
    pub(crate) fn failed(error: Error, via: Via<S, R, P>) -> Self {
        Self {
            state: State::slow_path(SlowPath::Failed { error: Some(error) }),
            pending: PendingRequest::new(None, None),
            via,
        }
    }
}

impl<S, R, B, ResBody, P> Future for ResponseFuture<S, R, B, ResBody, P>
where
    R: Replay<B>,
    P: SelectProvider,
    S: Service<Request<R::Body>, Response = Response<ResBody>> + Clone,
    S::Error: Into<BoxError>,
    ResBody: Body,
{
    type Output = Result<Response<ResBody>, BoxError>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        loop {
            match this.state.as_mut().project() {
                StateProj::Sending { response } => {
                    let response = ready!(response.poll(cx)).map_err(Into::into)?;
                    let Some(token) = this.pending.challenged_by(this.via, &response) else {
                        return Poll::Ready(Ok(response));
                    };
                    match slow_path::challenged(this.pending, token, this.via, response) {
                        Step::Return(response) => return Poll::Ready(Ok(response)),
                        // Drops the service that was ready before the retry waits for readiness. Otherwise a
                        // `ConcurrencyLimit(1)` would never get ready.
                        Step::Next(slow_path) => this.state.set(State::slow_path(slow_path)),
                    }
                }
                StateProj::SlowPath { slow_path } => {
                    match ready!(slow_path.as_mut().poll(this.pending, this.via, cx))? {
                        End::Return(response) => return Poll::Ready(Ok(response)),
                        End::Sent(response) => this.state.set(State::Sending { response }),
                    }
                }
            }
        }
    }
}

impl<S, Req, ResBody> State<S, Req, ResBody>
where
    S: Service<Req>,
{
    #[cold]
    fn slow_path(slow_path: SlowPath<S, Req, ResBody>) -> Self {
        Self::SlowPath { slow_path: Box::pin(slow_path) }
    }
}

impl<S, R, B, ResBody, P> fmt::Debug for ResponseFuture<S, R, B, ResBody, P>
where
    S: Service<Request<R::Body>>,
    R: Replay<B>,
    P: SelectProvider,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}
