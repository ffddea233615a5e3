//! [`SlowPath`]: every way but the happy one: no token yet, a challenge and what follows from it, a request not sent.

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

use super::{pending_request::PendingRequest, shared::Shared};
use crate::{
    authorization::authorize,
    config::ExistingAuthorization,
    error::{BoxError, Error},
    observability::NotSentAgain,
    provider::{Part, Waiting},
    replay::Replay,
    token::{Token, TokenId},
};

/// The most that is read of a refused answer's body, so that its connection can serve again.
const MAX_DRAINED: usize = 64 * 1024;

/// The longest that is waited for that body.
const DRAIN_TIMEOUT: Duration = Duration::from_millis(100);

pin_project! {
    #[project = SlowPathProj]
    pub(super) enum SlowPath<S, Req, ResBody>
    where
        S: Service<Req>,
    {
        // There is no token. Holds no service: one that is ready may hold a permit, without which the token's own source
        // could not send.
        Waiting {
            token: Waiting,
            unsent: Option<Unsent<Req, ResBody>>,
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
            unsent: Option<Unsent<Req, ResBody>>,
        },
        BackingOff {
            #[pin]
            timer: Option<Sleep>,
            unsent: Option<Unsent<Req, ResBody>>,
        },
        // The token is added once this clone is ready: it may have been replaced while the clone was not.
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

/// A request that is about to be sent, or sent again, with whatever token is the current one then.
pub(super) struct Unsent<Req, ResBody> {
    request: Req,
    /// How long a retry waits first.
    backoff: Duration,
    /// The token that its challenge was answered with, and the part that it took in that token's refresh.
    renewed: Option<(TokenId, Part)>,
    /// The answer if this retry is shed before it is sent; `None` if it had to be drained, or if this is no retry.
    challenge: Option<Response<ResBody>>,
}

impl<Req, ResBody> Unsent<Req, ResBody> {
    /// A request that was not sent before.
    pub(super) fn first(request: Req) -> Self {
        Self { request, backoff: Duration::ZERO, renewed: None, challenge: None }
    }
}

/// What follows from an answer.
pub(super) enum Step<S, Req, ResBody>
where
    S: Service<Req>,
{
    Answer(Response<ResBody>),
    Next(SlowPath<S, Req, ResBody>),
}

/// How a slow_path ends.
pub(super) enum End<F, ResBody> {
    Answer(Response<ResBody>),
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
    pub(super) fn poll<R, B>(
        mut self: Pin<&mut Self>,
        attempt: &mut PendingRequest<R::Spare>,
        shared: &Shared<S, R>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<End<S::Future, ResBody>, BoxError>>
    where
        R: Replay<B, Body = ReqBody>,
    {
        loop {
            let next = match self.as_mut().project() {
                SlowPathProj::Waiting { token, unsent } => {
                    let token = ready!(Pin::new(token).poll(cx));
                    let unsent = taken(unsent);
                    match (token, unsent.challenge) {
                        (Ok(_), challenge) => SlowPath::GettingReady {
                            service: shared.service(),
                            unsent: Some(Unsent { challenge, ..unsent }),
                        },
                        (Err(_), Some(challenge)) => {
                            not_sent_again(attempt, shared, NotSentAgain::Token);
                            return Poll::Ready(Ok(End::Answer(challenge)));
                        }
                        (Err(error), None) => return Poll::Ready(Err(error.into())),
                    }
                }
                SlowPathProj::GettingReady { service, unsent } => {
                    if let Err(error) = ready!(service.poll_ready(cx)) {
                        return Poll::Ready(shed(error.into(), taken(unsent).challenge).map(End::Answer));
                    }
                    let Unsent { mut request, backoff, renewed, challenge } = taken(unsent);
                    match shared.options.provider.usable() {
                        Some(token) => {
                            // A request whose own header is kept has not waited.
                            authorize(
                                request.headers_mut(),
                                token.header_value(),
                                ExistingAuthorization::Replace,
                            )?;
                            attempt.send(token.id(), renewed);
                            let response = service.call(request);
                            if attempt.retries() == 0 {
                                return Poll::Ready(Ok(End::Sent(response)));
                            }
                            let reporter = shared.options.provider.reporter();
                            reporter.sent_again(token.id(), attempt.retries(), backoff);
                            SlowPath::Retrying { response, challenge }
                        }
                        // It has expired while the service got ready, which is let go of until there is another.
                        None => SlowPath::Waiting {
                            token: shared.options.provider.obtain(),
                            unsent: Some(Unsent { request, backoff, renewed, challenge }),
                        },
                    }
                }
                SlowPathProj::Refreshing { token: waiting, challenge } => {
                    let token = ready!(Pin::new(&mut *waiting).poll(cx));
                    match refreshed(attempt, shared, token.ok(), waiting.part(), taken(challenge)) {
                        Step::Answer(response) => return Poll::Ready(Ok(End::Answer(response))),
                        Step::Next(next) => next,
                    }
                }
                SlowPathProj::Draining { mut body, drained, timeout, unsent } => {
                    if timeout.poll(cx).is_pending() {
                        while let Some(Ok(frame)) = ready!(body.as_mut().poll_frame(cx)) {
                            // An empty frame counts too: there may be no end of them.
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
                    SlowPath::GettingReady { service: shared.service(), unsent: unsent.take() }
                }
                SlowPathProj::Retrying { response, challenge } => {
                    let response = match ready!(response.poll(cx)) {
                        Ok(response) => response,
                        Err(error) => {
                            return Poll::Ready(shed(error.into(), challenge.take()).map(End::Answer));
                        }
                    };
                    let Some(token) = attempt.challenged_again_by(shared, &response) else {
                        return Poll::Ready(Ok(End::Answer(response)));
                    };
                    match challenged(attempt, token, shared, response) {
                        Step::Answer(response) => return Poll::Ready(Ok(End::Answer(response))),
                        Step::Next(next) => next,
                    }
                }
                SlowPathProj::Failed { error } => return Poll::Ready(Err(taken(error).into())),
            };
            // Drops what was there: a body that was drained is gone before the retry, and so is a retry before the next.
            self.set(next);
        }
    }
}

/// Asks for another token, if the request can be sent again; else for the next request's sake, without waiting.
#[cold]
pub(super) fn challenged<S, R, B, ResBody>(
    attempt: &mut PendingRequest<R::Spare>,
    token: TokenId,
    shared: &Shared<S, R>,
    challenge: Response<ResBody>,
) -> Step<S, Request<R::Body>, ResBody>
where
    R: Replay<B>,
    S: Service<Request<R::Body>>,
{
    let options = &shared.options;
    options.retry.deposit();
    options.provider.reporter().challenged(token, challenge.status(), attempt.retries());
    match attempt.hold(options) {
        Ok(()) => {
            let token = options.provider.replace(attempt.challenged(token, true));
            Step::Next(SlowPath::Refreshing { token, challenge: Some(challenge) })
        }
        Err(reason) => {
            // For the next request: nobody waits for it.
            drop(options.provider.replace(attempt.challenged(token, false)));
            not_sent_again(attempt, shared, reason);
            Step::Answer(challenge)
        }
    }
}

/// The request is not sent again: the challenge is its answer.
fn not_sent_again<S, R, Spare>(
    attempt: &mut PendingRequest<Spare>,
    shared: &Shared<S, R>,
    reason: NotSentAgain,
) {
    attempt.give_up();
    if let Some(refused) = attempt.token {
        shared.options.provider.reporter().not_sent_again(refused, reason);
    }
}

/// The provider has answered a challenge: the request is sent again, or the challenge is the answer.
fn refreshed<S, R, B, ResBody>(
    attempt: &mut PendingRequest<R::Spare>,
    shared: &Shared<S, R>,
    token: Option<Token>,
    part: Part,
    challenge: Response<ResBody>,
) -> Step<S, Request<R::Body>, ResBody>
where
    R: Replay<B>,
    S: Service<Request<R::Body>>,
    ResBody: Body,
{
    let again = token.ok_or(NotSentAgain::Token).and_then(|token| {
        let (request, backoff) = attempt.again(&shared.options, &token)?;
        Ok(Unsent { request, backoff, renewed: Some((token.id(), part)), challenge: None })
    });
    let unsent = match again {
        Ok(unsent) => unsent,
        Err(reason) => {
            not_sent_again(attempt, shared, reason);
            return Step::Answer(challenge);
        }
    };
    // Only HTTP/1 has to have read one answer before its connection can serve the next request.
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
