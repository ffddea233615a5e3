//! [`ResponseFuture`]: one request's way through the layer, as a state machine.
//!
//! ```text
//! (no token) Waiting ─▶ Sending ─▶ answer ──────────────────────────────▶ caller
//!                                   │ challenge                              ▲
//!                                   ▼                                        │
//!                               Refreshing ─▶ Draining ─▶ BackingOff ─▶ Retrying
//!                                   │ no other token, nothing to send again
//!                                   ▼
//!                             caller (the challenge, unchanged)
//! ```

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Buf;
use http::{Request, Response, Version};
use http_body::Body;
use pin_project_lite::pin_project;
use tokio::time::{Sleep, sleep};
use tower::{
    load_shed::error::Overloaded,
    retry::backoff::{Backoff, ExponentialBackoff},
    util::Oneshot,
};
use tower_service::Service;

use crate::{
    error::{BoxError, Error},
    layer::{BearerAuthLayer, Existing},
    provider::Waiting,
    replay::{Head, Replay},
    service::{Shared, authorize},
    token::{Token, TokenId},
};

/// The most that is read of a refused answer's body, so that its connection can serve again.
const MAX_DRAINED: usize = 64 * 1024;

/// The longest that is waited for that body.
const DRAIN_TIMEOUT: Duration = Duration::from_millis(100);

pin_project! {
    /// The future of [`BearerAuth`](crate::BearerAuth).
    ///
    /// # Cancel safety
    ///
    /// Dropping it drops the attempt under way, and nothing else: a token refresh that it started goes on.
    pub struct ResponseFuture<S, R, B, ResBody>
    where
        S: Service<Request<R::Body>>,
        R: Replay<B>,
    {
        #[pin]
        state: State<S, Request<R::Body>, ResBody>,
        attempt: Attempt<R::Spare>,
        shared: Arc<Shared<S, R>>,
    }
}

pin_project! {
    // Every request pays for the size of this, and for dropping it: all that is not the happy path is behind a pointer.
    #[project = StateProj]
    enum State<S, Req, ResBody>
    where
        S: Service<Req>,
    {
        Sending {
            #[pin]
            response: S::Future,
        },
        Detour {
            detour: Pin<Box<Detour<S, Req, ResBody>>>,
        },
    }
}

pin_project! {
    #[project = DetourProj]
    enum Detour<S, Req, ResBody>
    where
        S: Service<Req>,
    {
        // There is no token yet. Holds the service that was made ready.
        Waiting {
            token: Waiting,
            ready: Option<(S, Req)>,
        },
        // The challenge is kept whole: it is the answer if there is no other token.
        Refreshing {
            token: Waiting,
            challenge: Option<Response<ResBody>>,
        },
        Draining {
            #[pin]
            body: ResBody,
            drained: usize,
            #[pin]
            timeout: Sleep,
            retry: Option<Retry<Req, ResBody>>,
        },
        BackingOff {
            retry: Option<Retry<Req, ResBody>>,
        },
        Retrying {
            #[pin]
            response: Oneshot<S, Req>,
            challenge: Option<Response<ResBody>>,
        },
        Failed {
            error: Option<Error>,
        },
    }
}

/// A request that is about to be sent again.
struct Retry<Req, ResBody> {
    request: Req,
    backoff: Option<Delay>,
    /// The answer if this retry is shed before it is sent; `None` if it had to be drained.
    challenge: Option<Response<ResBody>>,
}

/// How long to wait before a retry.
type Delay = Pin<Box<Sleep>>;

/// What is kept of a request while its answer is awaited.
struct Attempt<Spare> {
    /// The token that it was sent with; `None` for one that has none of ours.
    token: Option<TokenId>,
    /// `None` if it cannot, or will not, be sent again. One field, so that `NoReplay`'s takes no room and no time.
    kept: Option<(Head, Spare)>,
    retries: u32,
    backoff: Option<Box<ExponentialBackoff>>,
}

impl<Spare> Attempt<Spare> {
    /// Of a request that has no token of ours.
    fn none() -> Self {
        Self { token: None, kept: None, retries: 0, backoff: None }
    }
}

impl<S, R, B, ResBody> ResponseFuture<S, R, B, ResBody>
where
    S: Service<Request<R::Body>>,
    R: Replay<B>,
{
    /// A request that was sent with a token.
    #[inline]
    pub(crate) fn sending(
        response: S::Future,
        token: TokenId,
        head: Option<Head>,
        spare: Option<R::Spare>,
        shared: &Arc<Shared<S, R>>,
    ) -> Self {
        Self {
            state: State::Sending { response },
            attempt: Attempt { token: Some(token), kept: head.zip(spare), retries: 0, backoff: None },
            shared: Arc::clone(shared),
        }
    }

    /// A request that was sent with its caller's own credentials.
    pub(crate) fn passing(response: S::Future, shared: &Arc<Shared<S, R>>) -> Self {
        Self { state: State::Sending { response }, attempt: Attempt::none(), shared: Arc::clone(shared) }
    }

    /// A request that is to be sent as soon as there is a token.
    pub(crate) fn waiting(
        token: Waiting,
        ready: S,
        request: Request<R::Body>,
        kept: Option<(Head, R::Spare)>,
        shared: &Arc<Shared<S, R>>,
    ) -> Self {
        Self {
            state: State::detour(Detour::Waiting { token, ready: Some((ready, request)) }),
            attempt: Attempt { kept, ..Attempt::none() },
            shared: Arc::clone(shared),
        }
    }

    /// A request that was not sent.
    pub(crate) fn failed(error: Error, shared: &Arc<Shared<S, R>>) -> Self {
        Self {
            state: State::detour(Detour::Failed { error: Some(error) }),
            attempt: Attempt::none(),
            shared: Arc::clone(shared),
        }
    }
}

impl<S, R, B, ResBody> Future for ResponseFuture<S, R, B, ResBody>
where
    R: Replay<B>,
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
                    let Some(token) = this.attempt.refused_by(this.shared, &response) else {
                        return Poll::Ready(Ok(response));
                    };
                    match challenged(this.attempt, token, this.shared, response) {
                        Step::Answer(response) => return Poll::Ready(Ok(response)),
                        // The service that was ready is gone before a retry waits for readiness:
                        // `ConcurrencyLimit(1)` would never get ready otherwise.
                        Step::Next(detour) => this.state.set(State::detour(detour)),
                    }
                }
                StateProj::Detour { detour } => {
                    match ready!(poll_detour(detour.as_mut(), this.attempt, this.shared, cx))? {
                        End::Answer(response) => return Poll::Ready(Ok(response)),
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
    fn detour(detour: Detour<S, Req, ResBody>) -> Self {
        Self::Detour { detour: Box::pin(detour) }
    }
}

/// What follows from an answer.
enum Step<S, Req, ResBody>
where
    S: Service<Req>,
{
    Answer(Response<ResBody>),
    Next(Detour<S, Req, ResBody>),
}

/// How a detour ends.
enum End<F, ResBody> {
    Answer(Response<ResBody>),
    /// There is a token, and the request has been sent with it.
    Sent(F),
}

#[cold]
fn poll_detour<S, R, B, ResBody>(
    mut detour: Pin<&mut Detour<S, Request<R::Body>, ResBody>>,
    attempt: &mut Attempt<R::Spare>,
    shared: &Shared<S, R>,
    cx: &mut Context<'_>,
) -> Poll<Result<End<S::Future, ResBody>, BoxError>>
where
    R: Replay<B>,
    S: Service<Request<R::Body>, Response = Response<ResBody>> + Clone,
    S::Error: Into<BoxError>,
    ResBody: Body,
{
    loop {
        let next = match detour.as_mut().project() {
            DetourProj::Waiting { token, ready } => {
                let token = ready!(token.as_mut().poll(cx))?;
                let (mut service, mut request) = taken(ready);
                // A request whose own header is kept has not waited.
                authorize(request.headers_mut(), token.header_value(), Existing::Replace)?;
                attempt.token = Some(token.id());
                return Poll::Ready(Ok(End::Sent(service.call(request))));
            }
            DetourProj::Refreshing { token, challenge } => {
                let token = ready!(token.as_mut().poll(cx));
                match refreshed(attempt, shared, token.ok(), taken(challenge)) {
                    Step::Answer(response) => return Poll::Ready(Ok(End::Answer(response))),
                    Step::Next(next) => next,
                }
            }
            DetourProj::Draining { mut body, drained, timeout, retry } => {
                if timeout.poll(cx).is_pending() {
                    while let Some(Ok(frame)) = ready!(body.as_mut().poll_frame(cx)) {
                        // An empty frame counts too: there may be no end of them.
                        *drained += frame.data_ref().map_or(0, Buf::remaining).max(1);
                        if *drained > MAX_DRAINED {
                            break;
                        }
                    }
                }
                Detour::BackingOff { retry: retry.take() }
            }
            DetourProj::BackingOff { retry } => {
                if let Some(backoff) = retry.as_mut().and_then(|retry| retry.backoff.as_mut()) {
                    ready!(backoff.as_mut().poll(cx));
                }
                let retry = taken(retry);
                let response = Oneshot::new(shared.service(), retry.request);
                Detour::Retrying { response, challenge: retry.challenge }
            }
            DetourProj::Retrying { response, challenge } => {
                let response = match ready!(response.poll(cx)) {
                    Ok(response) => response,
                    Err(error) => return Poll::Ready(shed(error.into(), challenge.take()).map(End::Answer)),
                };
                let Some(token) = attempt.refused_by(shared, &response) else {
                    return Poll::Ready(Ok(End::Answer(response)));
                };
                match challenged(attempt, token, shared, response) {
                    Step::Answer(response) => return Poll::Ready(Ok(End::Answer(response))),
                    Step::Next(next) => next,
                }
            }
            DetourProj::Failed { error } => return Poll::Ready(Err(taken(error).into())),
        };
        // Drops what was there: a body that was drained is gone before the retry, and so is a retry before the next.
        detour.set(next);
    }
}

/// Asks for another token, if the request can be sent again; else for the next request's sake, without waiting.
#[cold]
fn challenged<S, R, B, ResBody>(
    attempt: &mut Attempt<R::Spare>,
    token: TokenId,
    shared: &Shared<S, R>,
    challenge: Response<ResBody>,
) -> Step<S, Request<R::Body>, ResBody>
where
    R: Replay<B>,
    S: Service<Request<R::Body>>,
{
    let layer = &shared.layer;
    layer.retry.deposit();
    let can_retry = attempt.retries < layer.retry.retries()
        && attempt.kept.as_ref().is_some_and(|(_, spare)| layer.replay.hold(spare));
    if can_retry {
        let token = layer.provider.replace(token);
        return Step::Next(Detour::Refreshing { token, challenge: Some(challenge) });
    }
    layer.provider.replace_behind(token);
    attempt.kept = None;
    Step::Answer(challenge)
}

/// The provider has answered a challenge: the request is sent again, or the challenge is the answer.
fn refreshed<S, R, B, ResBody>(
    attempt: &mut Attempt<R::Spare>,
    shared: &Shared<S, R>,
    token: Option<Token>,
    challenge: Response<ResBody>,
) -> Step<S, Request<R::Body>, ResBody>
where
    R: Replay<B>,
    S: Service<Request<R::Body>>,
    ResBody: Body,
{
    let Some((request, backoff)) = token.and_then(|token| attempt.again(&shared.layer, token)) else {
        // Nothing more is sent, and an upload that was held goes on.
        attempt.kept = None;
        return Step::Answer(challenge);
    };
    // Only HTTP/1 has to have read one answer before its connection can serve the next request.
    let drain = challenge.version() < Version::HTTP_2 && !challenge.body().is_end_stream();
    Step::Next(if drain {
        Detour::Draining {
            body: challenge.into_body(),
            drained: 0,
            timeout: sleep(DRAIN_TIMEOUT),
            retry: Some(Retry { request, backoff, challenge: None }),
        }
    } else {
        Detour::BackingOff { retry: Some(Retry { request, backoff, challenge: Some(challenge) }) }
    })
}

impl<Spare> Attempt<Spare> {
    /// The token that an answer refuses; `None` if the answer is the caller's.
    #[inline]
    fn refused_by<S, R, ResBody>(
        &mut self,
        shared: &Shared<S, R>,
        response: &Response<ResBody>,
    ) -> Option<TokenId> {
        let refused = self.token.filter(|_| shared.layer.challenge.matches(response));
        if refused.is_none() {
            // Recording stops here: an answer's body may be read while the request's is still being sent.
            self.kept = None;
        }
        refused
    }

    /// The request once more, with `token`, and how long to wait first; `None` if it is not to be sent again.
    fn again<R, B>(
        &mut self,
        layer: &BearerAuthLayer<R>,
        token: Token,
    ) -> Option<(Request<R::Body>, Option<Delay>)>
    where
        R: Replay<B, Spare = Spare>,
    {
        // The first retry with a token that the API has not seen refused waits for nothing, and costs nothing.
        let free = self.retries == 0 && self.token != Some(token.id());
        if !free && !layer.retry.withdraw() {
            return None;
        }
        let (head, spare) = self.kept.take()?;
        let (body, spare) = layer.replay.again(spare)?;
        let mut request = head.request(body);
        authorize(request.headers_mut(), token.header_value(), Existing::Replace).ok()?;
        self.kept = spare.map(|spare| (head, spare));
        self.retries += 1;
        self.token = Some(token.id());
        let backoff = self.backoff.get_or_insert_with(|| Box::new(layer.retry.make_backoff()));
        Some((request, (!free).then(|| Box::pin(backoff.next_backoff()))))
    }
}

/// An inner service that sheds the retry has not refused it: the challenge is the answer, if there is still one to give.
fn shed<ResBody>(
    error: BoxError,
    challenge: Option<Response<ResBody>>,
) -> Result<Response<ResBody>, BoxError> {
    match challenge {
        Some(challenge) if error.is::<Overloaded>() => Ok(challenge),
        _ => Err(error),
    }
}

/// What a state holds until it ends.
///
/// # Panics
///
/// If the future is polled again after it was ready, as futures do.
fn taken<T>(slot: &mut Option<T>) -> T {
    match slot.take() {
        Some(value) => value,
        None => panic!("`ResponseFuture` polled after it was ready"),
    }
}

impl<S, R, B, ResBody> fmt::Debug for ResponseFuture<S, R, B, ResBody>
where
    S: Service<Request<R::Body>>,
    R: Replay<B>,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}
