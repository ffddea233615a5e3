//! [`SlowPath`]: every path but the happy one: no token yet, a challenge and what follows it, a request that was not sent.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Buf;
use http::{Request, Response};
use http_body::Body;
use pin_project_lite::pin_project;
use tokio::time::{Instant, Sleep};
use tower_service::Service;

use super::pending_request::{BODY, NO_TOKEN, NotRetried, PendingRequest, Unsent};
use super::shared::Via;
use crate::authorization::{ExistingAuthorization, authorize};
use crate::challenge::Challenge;
use crate::error::{BoxError, Error};
use crate::provider::{TokenProvider, Waiting};
use crate::replay::Replay;

/// How much of a challenge's body is read at most, so that its connection can be used again. One that may be larger is
/// not kept for long.
const MAX_DRAINED: usize = 64 * 1024;

/// How long that may take.
const DRAIN_TIMEOUT: Duration = Duration::from_millis(100);

/// How long an attempt that was challenged is kept, if its challenge is not small or its body is still being sent. Over
/// HTTP/2, they take a stream and a share of the connection's window, which the token request may need.
const MAX_KEPT: Duration = Duration::from_secs(1);

/// How much the small challenges of one provider, or of one group, may take together.
const MAX_SMALL: u32 = 1024 * 1024;

pin_project! {
    #[project = SlowPathProj]
    pub(super) enum SlowPath<S, Req, ResBody> {
        // There is no token. Holds no service: one that is ready may hold a permit that the token source needs to send
        // its own request, and both would wait for each other.
        Waiting {
            #[pin]
            token: Waiting,
            unsent: Option<Unsent<Req>>,
            given_up: GivenUp,
        },
        // The challenge is kept whole: the caller gets it if there is no other token.
        Refreshing {
            #[pin]
            token: Waiting,
            // `None` after it was kept for too long.
            challenge: Option<Response<ResBody>>,
            // The share of a small one in what is kept of them.
            small: Option<Small>,
            // Ends the time for which the attempt is kept.
            #[pin]
            keep: Option<Sleep>,
            // Why the request is not sent again, whatever the refresh brings.
            not_retried: Option<NotRetried>,
        },
        // The challenge is drained, then the retry waits for its backoff.
        BackingOff {
            #[pin]
            body: Option<ResBody>,
            drained: usize,
            #[pin]
            drain_timeout: Option<Sleep>,
            #[pin]
            backoff: Option<Sleep>,
            unsent: Option<Unsent<Req>>,
        },
        // The token is added once this clone is ready: it may be replaced before that.
        GettingReady {
            service: S,
            unsent: Option<Unsent<Req>>,
        },
        // Holds no request: what was not sent must not keep a permit for as long as the caller keeps the future. `None` if
        // the caller has the result.
        Ended {
            error: Option<Error>,
        },
    }
}

/// Counts a request that is dropped while it waits for a token, which its caller sees as a failure. `None` if the wait
/// has ended.
pub(super) struct GivenUp(Option<(TokenProvider, Instant)>);

impl Drop for GivenUp {
    fn drop(&mut self) {
        if let Some((provider, since)) = &self.0 {
            provider.reporter().request_given_up(&provider.core().timed_out(*since));
        }
    }
}

/// A small challenge that is kept: the provider that counts the bytes of all, and its own.
pub(super) struct Small(TokenProvider, u32);

impl Small {
    /// `None` if the challenge may be large, or is one too many.
    fn new<ResBody: Body>(provider: &TokenProvider, challenge: &Response<ResBody>) -> Option<Self> {
        let length = challenge.body().size_hint().upper().filter(|length| *length <= MAX_DRAINED as u64)?;
        let length = u32::try_from(length).ok()?;
        let small = Self(provider.clone(), length);
        (provider.core().kept.fetch_add(length, Ordering::Relaxed) + length <= MAX_SMALL).then_some(small)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        self.0.core().kept.fetch_sub(self.1, Ordering::Relaxed);
    }
}

impl<S, Req, ResBody> SlowPath<S, Req, ResBody> {
    pub(super) fn waiting(token: Waiting, unsent: Unsent<Req>, provider: &TokenProvider) -> Self {
        Self::Waiting {
            token,
            unsent: Some(unsent),
            given_up: GivenUp(Some((provider.clone(), Instant::now()))),
        }
    }
}

impl<S, ReqBody, ResBody: Body> SlowPath<S, Request<ReqBody>, ResBody> {
    /// Asks for another token. Returns the challenge if the request is not sent again, unless the refresh would be lost if
    /// nobody waited for it; else the next request uses its token.
    #[cold]
    pub(super) fn challenged<R, B>(
        pending: &mut PendingRequest<(R::Head, R::Spare)>,
        via: &Via<S, R>,
        challenge: Response<ResBody>,
    ) -> Result<Self, Response<ResBody>>
    where
        R: Replay<B, Body = ReqBody>,
    {
        let provider = via.provider();
        provider.core().retry_budget().inspect(|budget| budget.deposit());
        provider.reporter().challenged(pending.token, challenge.status(), pending.retries());
        let not_retried = pending.hold(via).err();
        let token = provider.challenged(pending.token, Challenge::from_headers(challenge.headers()));
        if let Some(reason) = not_retried.filter(|_| !token.may_be_lost) {
            return Err(give_up(pending, via, reason, challenge));
        }
        // The caller gets the challenge if the request is not sent again.
        let keep_until = not_retried.is_none().then(|| Instant::now() + MAX_KEPT);
        let keep = keep_until.and_then(|at| provider.core().timer(at));
        let small = Small::new(&via.options.providers.default, &challenge);
        Ok(Self::Refreshing { token, challenge: Some(challenge), small, keep, not_retried })
    }
}

impl<S, ReqBody, ResBody> SlowPath<S, Request<ReqBody>, ResBody>
where
    S: Service<Request<ReqBody>, Response = Response<ResBody>> + Clone,
    S::Error: Into<BoxError>,
    ResBody: Body,
{
    /// Resolves with the next attempt, which has been sent, or with what the caller gets.
    #[cold]
    #[expect(clippy::type_complexity, reason = "the second one is the future's output")]
    pub(super) fn poll<R, B>(
        mut self: Pin<&mut Self>,
        pending: &mut PendingRequest<(R::Head, R::Spare)>,
        via: &Via<S, R>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<S::Future, Result<Response<ResBody>, BoxError>>>
    where
        R: Replay<B, Body = ReqBody>,
    {
        let provider = via.provider();
        let result = loop {
            // The state before is dropped then: a drained body before its retry, and a retry before the next.
            let next = match self.as_mut().project() {
                SlowPathProj::Waiting { token, unsent, given_up } => {
                    let token = ready!(token.poll(cx));
                    given_up.0 = None;
                    if let Err(error) = token {
                        provider.reporter().request_failed(&error);
                        break Err(error.into());
                    }
                    Self::GettingReady { service: via.service(), unsent: unsent.take() }
                }
                SlowPathProj::Refreshing { token, challenge, small, mut keep, not_retried } => {
                    let outcome = match (token.poll(cx), keep.as_mut().as_pin_mut()) {
                        (Poll::Ready(outcome), _) => outcome,
                        (Poll::Pending, None) => return Poll::Pending,
                        (Poll::Pending, Some(keep_until)) => {
                            ready!(keep_until.poll(cx));
                            keep.set(None);
                            // The body of a small one goes on; a large one ends with its attempt.
                            pending.release(via, small.is_none());
                            challenge.take_if(|_| small.is_none());
                            return Poll::Pending;
                        }
                    };
                    let again = outcome.map_err(|error| (NO_TOKEN, Some(error))).and_then(|token| {
                        let again =
                            not_retried.map_or_else(|| pending.again(via, &token, challenge.is_some()), Err);
                        again.map_err(|reason| (reason, None))
                    });
                    match (again, challenge.take()) {
                        (Ok(mut unsent), challenge) => Self::BackingOff {
                            body: challenge.map(Response::into_body),
                            drained: 0,
                            drain_timeout: provider.core().timer(Instant::now() + DRAIN_TIMEOUT),
                            backoff: unsent.backoff.take(),
                            unsent: Some(unsent),
                        },
                        (Err((reason, _)), Some(challenge)) => {
                            break Ok(give_up(pending, via, reason, challenge));
                        }
                        (Err((_, cause)), None) => {
                            let error = Error::ChallengeDropped(cause.map(Arc::new));
                            provider.reporter().request_failed(&error);
                            break Err(error.into());
                        }
                    }
                }
                SlowPathProj::BackingOff { mut body, drained, drain_timeout, backoff, unsent } => {
                    if let (Some(body), Some(timeout)) =
                        (body.as_mut().as_pin_mut(), drain_timeout.as_pin_mut())
                    {
                        ready!(drain(body, drained, timeout, cx));
                    }
                    body.set(None);
                    if let Some(backoff) = backoff.as_pin_mut() {
                        ready!(backoff.poll(cx));
                    }
                    Self::GettingReady { service: via.service(), unsent: unsent.take() }
                }
                SlowPathProj::GettingReady { service, unsent } => {
                    if let Err(error) = ready!(service.poll_ready(cx)) {
                        break Err(error.into());
                    }
                    let Some(mut unsent) = unsent.take() else { polled_again() };
                    let need = || provider.obtain(pending.need(&via.options)).take_token();
                    let token = match provider.fresh().map_or_else(need, Ok) {
                        Ok(token) => token,
                        Err(waiting) => {
                            // It expired, or was challenged, before the service was ready. The service is dropped: it may
                            // hold a permit.
                            self.set(Self::waiting(waiting, unsent, provider));
                            continue;
                        }
                    };
                    // A request whose own header is kept does not come here.
                    let (headers, header) = (unsent.request.headers_mut(), token.header());
                    if authorize(headers, header, ExistingAuthorization::Replace).is_none() {
                        break Err(Error::TooManyHeaders.into());
                    }
                    pending.token = token.id().generation;
                    if pending.retries() > 0 {
                        provider.reporter().retrying(pending.token, pending.retries(), unsent.delay);
                    }
                    return Poll::Ready(Ok(service.call(unsent.request)));
                }
                SlowPathProj::Ended { error } => {
                    break Err(error.take().unwrap_or_else(|| polled_again()).into());
                }
            };
            self.set(next);
        };
        self.set(Self::Ended { error: None });
        pending.give_up();
        Poll::Ready(Err(result))
    }
}

/// Reads a challenge to its end, within bounds, so that its connection can be used again.
fn drain<ResBody: Body>(
    mut body: Pin<&mut ResBody>,
    drained: &mut usize,
    timeout: Pin<&mut Sleep>,
    cx: &mut Context<'_>,
) -> Poll<()> {
    if timeout.poll(cx).is_ready() {
        return Poll::Ready(());
    }
    while *drained <= MAX_DRAINED && !body.is_end_stream() {
        let Some(Ok(frame)) = ready!(body.as_mut().poll_frame(cx)) else { break };
        // An empty frame counts too: their number may be endless.
        *drained += frame.data_ref().map_or(0, Buf::remaining).max(1);
    }
    Poll::Ready(())
}

/// Gives up on the request: its caller gets the challenge.
fn give_up<S, R, K, ResBody>(
    pending: &mut PendingRequest<K>,
    via: &Via<S, R>,
    reason: NotRetried,
    challenge: Response<ResBody>,
) -> Response<ResBody> {
    pending.give_up();
    let reporter = via.provider().reporter();
    match via.options.replay_limit.filter(|_| reason == BODY) {
        Some(limit) => reporter.body_not_replayed(pending.token, reason, limit, via.body_is_news()),
        None => reporter.not_retrying(pending.token, reason),
    }
    challenge
}

fn polled_again() -> ! {
    panic!("`ResponseFuture` polled after it was ready")
}
