//! [`Detour`]: every way but the happy one: no token yet, a challenge and what follows from it, a request not sent.

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
use tower::{load_shed::error::Overloaded, util::Oneshot};
use tower_service::Service;

use super::{
    attempt::{Attempt, Delay},
    shared::Shared,
};
use crate::{
    authorization::authorize,
    error::{BoxError, Error},
    observability::NotSentAgain,
    options::Existing,
    provider::Waiting,
    replay::Replay,
    token::{Token, TokenId},
};

/// The most that is read of a refused answer's body, so that its connection can serve again.
const MAX_DRAINED: usize = 64 * 1024;

/// The longest that is waited for that body.
const DRAIN_TIMEOUT: Duration = Duration::from_millis(100);

pin_project! {
    #[project = DetourProj]
    pub(super) enum Detour<S, Req, ResBody>
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
pub(super) struct Retry<Req, ResBody> {
    request: Req,
    backoff: Option<Delay>,
    /// The answer if this retry is shed before it is sent; `None` if it had to be drained.
    challenge: Option<Response<ResBody>>,
}

/// What follows from an answer.
pub(super) enum Step<S, Req, ResBody>
where
    S: Service<Req>,
{
    Answer(Response<ResBody>),
    Next(Detour<S, Req, ResBody>),
}

/// How a detour ends.
pub(super) enum End<F, ResBody> {
    Answer(Response<ResBody>),
    /// There is a token, and the request has been sent with it.
    Sent(F),
}

impl<S, ReqBody, ResBody> Detour<S, Request<ReqBody>, ResBody>
where
    S: Service<Request<ReqBody>, Response = Response<ResBody>> + Clone,
    S::Error: Into<BoxError>,
    ResBody: Body,
{
    #[cold]
    pub(super) fn poll<R, B>(
        mut self: Pin<&mut Self>,
        attempt: &mut Attempt<R::Spare>,
        shared: &Shared<S, R>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<End<S::Future, ResBody>, BoxError>>
    where
        R: Replay<B, Body = ReqBody>,
    {
        loop {
            let next = match self.as_mut().project() {
                DetourProj::Waiting { token, ready } => {
                    let token = ready!(Pin::new(token).poll(cx))?;
                    let (mut service, mut request) = taken(ready);
                    // A request whose own header is kept has not waited.
                    authorize(request.headers_mut(), token.header_value(), Existing::Replace)?;
                    attempt.token = Some(token.id());
                    return Poll::Ready(Ok(End::Sent(service.call(request))));
                }
                DetourProj::Refreshing { token, challenge } => {
                    let token = ready!(Pin::new(token).poll(cx));
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
                        Err(error) => {
                            return Poll::Ready(shed(error.into(), challenge.take()).map(End::Answer));
                        }
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
            self.set(next);
        }
    }
}

/// Asks for another token, if the request can be sent again; else for the next request's sake, without waiting.
#[cold]
pub(super) fn challenged<S, R, B, ResBody>(
    attempt: &mut Attempt<R::Spare>,
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
            let token = options.provider.replace(token);
            Step::Next(Detour::Refreshing { token, challenge: Some(challenge) })
        }
        Err(reason) => {
            options.provider.replace_behind(token);
            not_sent_again(attempt, shared, reason);
            Step::Answer(challenge)
        }
    }
}

/// The request is not sent again: the challenge is its answer.
fn not_sent_again<S, R, Spare>(attempt: &mut Attempt<Spare>, shared: &Shared<S, R>, reason: NotSentAgain) {
    attempt.give_up();
    if let Some(refused) = attempt.token {
        shared.options.provider.reporter().not_sent_again(refused, reason);
    }
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
    let again = token.ok_or(NotSentAgain::Token).and_then(|token| attempt.again(&shared.options, token));
    let (request, backoff) = match again {
        Ok(again) => again,
        Err(reason) => {
            not_sent_again(attempt, shared, reason);
            return Step::Answer(challenge);
        }
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
