//! [`SlowPath`]: every path but the happy one: no token yet, a challenge and what follows it, a request that was not sent.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Buf;
use http::{Request, Response, Version};
use http_body::Body;
use pin_project_lite::pin_project;
use tokio::time::{Sleep, sleep};
use tower::load_shed::error::Overloaded;
use tower_service::Service;

use super::{
    pending_request::{NotRetried, PendingRequest},
    shared::Via,
};
use crate::{
    authorization::{ExistingAuthorization, TooManyHeaders, authorize},
    challenge::Challenge,
    error::{BoxError, Error},
    provider::{Need, Part, TokenProvider, Waiting},
    replay::{Head, Replay},
    select::SelectProvider,
    token::{Token, TokenId},
};

/// How much of a challenge's body is read at most, so that its connection can be used again.
const MAX_DRAINED: usize = 64 * 1024;

/// How long that may take.
const DRAIN_TIMEOUT: Duration = Duration::from_millis(100);

pin_project! {
    #[project = SlowPathProj]
    pub(super) enum SlowPath<S, Req, ResBody>
    where
        S: Service<Req>,
    {
        // There is no token. Holds no service: one that is ready may hold a permit that the token source needs to send
        // its own request, and both would wait for each other.
        Waiting {
            token: Waiting,
            unsent: Option<Unsent<Req, ResBody>>,
            given_up: GivenUp,
        },
        // The challenge is kept whole: the caller gets it if there is no other token.
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
            unsent: Option<Unsent<Req, ResBody>>,
        },
        BackingOff {
            #[pin]
            timer: Option<Sleep>,
            unsent: Option<Unsent<Req, ResBody>>,
        },
        // The token is added once this clone is ready: it may be replaced before that.
        GettingReady {
            service: S,
            unsent: Option<Unsent<Req, ResBody>>,
        },
        Retrying {
            #[pin]
            response: S::Future,
            challenge: Option<Response<ResBody>>,
        },
        Failed {
            error: Option<Error>,
        },
    }
}

/// Counts a request that is dropped while it waits for a token, which its caller sees as a failure. `None` if the wait
/// has ended, or the request has a response.
pub(super) struct GivenUp(pub(super) Option<TokenProvider>);

impl Drop for GivenUp {
    fn drop(&mut self) {
        if let Some(provider) = &self.0 {
            provider.request_given_up();
        }
    }
}

/// A request to be sent, or sent again, with the token that is current then.
pub(super) struct Unsent<Req, ResBody> {
    request: Req,
    /// How long a retry waits first.
    backoff: Duration,
    /// After a challenge: the token that the provider gave, and the part that the request had in its refresh.
    renewed: Option<(TokenId, Part)>,
    /// The response if the inner service sheds this retry. `None` if it had to be drained, or if this is no retry.
    challenge: Option<Response<ResBody>>,
}

impl<Req, ResBody> Unsent<Req, ResBody> {
    /// A request that has not been sent yet.
    pub(super) fn first(request: Req) -> Self {
        Self { request, backoff: Duration::ZERO, renewed: None, challenge: None }
    }
}

/// What follows a response.
pub(super) enum Step<S, Req, ResBody>
where
    S: Service<Req>,
{
    Return(Response<ResBody>),
    Next(SlowPath<S, Req, ResBody>),
}

/// How a slow path ends.
pub(super) enum End<F, ResBody> {
    Return(Response<ResBody>),
    /// There is a token, and the request has been sent with it.
    Sent(F),
}

impl<S, ReqBody, ResBody> SlowPath<S, Request<ReqBody>, ResBody>
where
    S: Service<Request<ReqBody>, Response = Response<ResBody>> + Clone,
    S::Error: Into<BoxError>,
    ResBody: Body,
{
    #[cold]
    pub(super) fn poll<R, P, B>(
        mut self: Pin<&mut Self>,
        pending: &mut PendingRequest<R::Head, R::Spare>,
        via: &Via<S, R, P>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<End<S::Future, ResBody>, BoxError>>
    where
        R: Replay<B, Body = ReqBody>,
        P: SelectProvider,
    {
        loop {
            let next = match self.as_mut().project() {
                SlowPathProj::Waiting { token, unsent, given_up } => {
                    let token = ready!(Pin::new(token).poll(cx));
                    given_up.0 = None;
                    let unsent = taken(unsent);
                    match (token, unsent.challenge) {
                        (Ok(_), challenge) => SlowPath::GettingReady {
                            service: via.service(),
                            unsent: Some(Unsent { challenge, ..unsent }),
                        },
                        (Err(_), Some(challenge)) => {
                            not_retried(pending, via, NotRetried::Token);
                            return Poll::Ready(Ok(End::Return(challenge)));
                        }
                        (Err(error), None) => {
                            via.provider().request_failed(&error);
                            return Poll::Ready(Err(error.into()));
                        }
                    }
                }
                SlowPathProj::GettingReady { service, unsent } => {
                    if let Err(error) = ready!(service.poll_ready(cx)) {
                        return Poll::Ready(shed(error.into(), taken(unsent).challenge).map(End::Return));
                    }
                    let Unsent { mut request, backoff, renewed, challenge } = taken(unsent);
                    match via.provider().usable() {
                        Some(token) => {
                            // A request whose own header is kept does not come here.
                            authorize(
                                request.headers_mut(),
                                token.0.header(),
                                ExistingAuthorization::Replace,
                            )
                            .map_err(|TooManyHeaders| Error::TooManyHeaders)?;
                            pending.send(token.id(), renewed);
                            let response = service.call(request);
                            if pending.retries() == 0 {
                                return Poll::Ready(Ok(End::Sent(response)));
                            }
                            let reporter = via.provider().reporter();
                            reporter.retrying(token.id(), pending.retries(), backoff);
                            SlowPath::Retrying { response, challenge }
                        }
                        // It expired before the service was ready. The service is dropped: it may hold a permit.
                        None => SlowPath::Waiting {
                            token: via.provider().obtain(Need::Any),
                            given_up: GivenUp(challenge.is_none().then(|| via.provider().clone())),
                            unsent: Some(Unsent { request, backoff, renewed, challenge }),
                        },
                    }
                }
                SlowPathProj::Refreshing { token: waiting, challenge } => {
                    let token = ready!(Pin::new(&mut *waiting).poll(cx));
                    match refreshed(pending, via, token.ok(), waiting.part(), taken(challenge)) {
                        Step::Return(response) => return Poll::Ready(Ok(End::Return(response))),
                        Step::Next(next) => next,
                    }
                }
                SlowPathProj::Draining { mut body, drained, timeout, unsent } => {
                    if timeout.poll(cx).is_pending() {
                        while let Some(Ok(frame)) = ready!(body.as_mut().poll_frame(cx)) {
                            // An empty frame counts too: their number may be endless.
                            *drained += frame.data_ref().map_or(0, Buf::remaining).max(1);
                            if *drained > MAX_DRAINED {
                                break;
                            }
                        }
                    }
                    back_off(taken(unsent))
                }
                SlowPathProj::BackingOff { timer, unsent } => {
                    if let Some(timer) = timer.as_pin_mut() {
                        ready!(timer.poll(cx));
                    }
                    SlowPath::GettingReady { service: via.service(), unsent: unsent.take() }
                }
                SlowPathProj::Retrying { response, challenge } => {
                    let response = match ready!(response.poll(cx)) {
                        Ok(response) => response,
                        Err(error) => {
                            return Poll::Ready(shed(error.into(), challenge.take()).map(End::Return));
                        }
                    };
                    let Some(token) = pending.challenged_again_by(via, &response) else {
                        return Poll::Ready(Ok(End::Return(response)));
                    };
                    match challenged(pending, token, via, response) {
                        Step::Return(response) => return Poll::Ready(Ok(End::Return(response))),
                        Step::Next(next) => next,
                    }
                }
                SlowPathProj::Failed { error } => return Poll::Ready(Err(taken(error).into())),
            };
            // Drops the state before: a drained body before its retry, and a retry before the next.
            self.set(next);
        }
    }
}

/// Asks for another token. Waits for it if the request can be sent again; otherwise the next request will use it.
#[cold]
pub(super) fn challenged<S, R, P, B, ResBody>(
    pending: &mut PendingRequest<R::Head, R::Spare>,
    token: TokenId,
    via: &Via<S, R, P>,
    challenge: Response<ResBody>,
) -> Step<S, Request<R::Body>, ResBody>
where
    R: Replay<B>,
    P: SelectProvider,
    S: Service<Request<R::Body>>,
{
    let (options, provider) = (&via.options, via.provider());
    let asked = Challenge::from_headers(challenge.headers());
    options.retry.deposit(via.budgets());
    provider.reporter().challenged(token, challenge.status(), pending.retries());
    match pending.hold(options) {
        Ok(()) => {
            let token = provider.obtain(pending.need(token, true, asked));
            Step::Next(SlowPath::Refreshing { token, challenge: Some(challenge) })
        }
        Err(reason) => {
            // For the next request: this one does not wait.
            drop(provider.obtain(pending.need(token, false, asked)));
            not_retried(pending, via, reason);
            Step::Return(challenge)
        }
    }
}

/// Gives up on the request: its caller gets the challenge.
fn not_retried<S, R, P, H: Head, Spare>(
    pending: &mut PendingRequest<H, Spare>,
    via: &Via<S, R, P>,
    reason: NotRetried,
) where
    P: SelectProvider,
{
    pending.give_up();
    if let Some(token) = pending.token {
        via.provider().reporter().not_retrying(token, reason.name());
    }
}

/// After the provider's answer to a challenge: sends the request again, or returns the challenge.
fn refreshed<S, R, P, B, ResBody>(
    pending: &mut PendingRequest<R::Head, R::Spare>,
    via: &Via<S, R, P>,
    token: Option<Token>,
    part: Part,
    challenge: Response<ResBody>,
) -> Step<S, Request<R::Body>, ResBody>
where
    R: Replay<B>,
    P: SelectProvider,
    S: Service<Request<R::Body>>,
    ResBody: Body,
{
    let again = token.ok_or(NotRetried::Token).and_then(|token| {
        let (request, backoff) = pending.again(via, &token)?;
        Ok(Unsent { request, backoff, renewed: Some((token.id(), part)), challenge: None })
    });
    let unsent = match again {
        Ok(unsent) => unsent,
        Err(reason) => {
            not_retried(pending, via, reason);
            return Step::Return(challenge);
        }
    };
    // Only HTTP/1 has to read one response before its connection can be used for the next request.
    let drain = challenge.version() < Version::HTTP_2 && !challenge.body().is_end_stream();
    Step::Next(if drain {
        SlowPath::Draining {
            body: challenge.into_body(),
            drained: 0,
            timeout: sleep(DRAIN_TIMEOUT),
            unsent: Some(unsent),
        }
    } else {
        back_off(Unsent { challenge: Some(challenge), ..unsent })
    })
}

fn back_off<S, Req, ResBody>(unsent: Unsent<Req, ResBody>) -> SlowPath<S, Req, ResBody>
where
    S: Service<Req>,
{
    let timer = (!unsent.backoff.is_zero()).then(|| sleep(unsent.backoff));
    SlowPath::BackingOff { timer, unsent: Some(unsent) }
}

/// Handles an inner service that sheds the retry: returns the challenge, if it was not drained.
fn shed<ResBody>(
    error: BoxError,
    challenge: Option<Response<ResBody>>,
) -> Result<Response<ResBody>, BoxError> {
    match challenge {
        Some(challenge) if error.is::<Overloaded>() => Ok(challenge),
        _ => Err(error),
    }
}

/// Takes what a state holds until it ends.
///
/// # Panics
///
/// If the future is polled again after it was ready.
fn taken<T>(slot: &mut Option<T>) -> T {
    match slot.take() {
        Some(value) => value,
        None => panic!("`ResponseFuture` polled after it was ready"),
    }
}
