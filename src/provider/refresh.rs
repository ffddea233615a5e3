//! [`obtain`]: from a need to the task that refreshes the token, and the future that waits for it.

use std::future::{Future, Ready, poll_fn, ready};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::Either;
use tokio::runtime::Handle;
use tokio::time::{Instant, timeout_at};

use super::core::Core;
use super::decide::{Decision, Need};
use super::state::{AskedAt, Ended, NotEnded, Refresh};
use crate::error::Error;
use crate::login::Asked;
use crate::observability;
use crate::source::{RefreshReason, TokenRequest};
use crate::sync::{Outcome, Waiter};
use crate::token::Token;

/// How much longer than a refresh those who wait for it wait: a refresh that ends itself says why.
const SLACK: Duration = Duration::from_millis(100);

/// Decides what `need` leads to, and starts a refresh if it leads to one.
///
/// The refresh has started when this returns: dropping the future does not stop it.
pub(super) fn obtain(core: &Arc<Core>, need: Need) -> Waiting {
    let runtime = core.config.runtime();
    let decide = |revision| core.decide(&need, Instant::now(), revision, runtime.as_ref());
    let decided = decide(None).or_else(|| decide(Some(core.login.source.credential().revision())));
    // A challenged token is no answer to its challenge, and neither is one that does not last.
    let is_other = matches!(need, Need::Other { .. } | Need::Lasting(_));
    let wait = |refresh: &Refresh, waiter, may_be_lost| {
        let uses_current = !is_other && core.published().is_some();
        let wait = wait(Arc::clone(core), waiter, refresh.deadline, uses_current);
        Waiting { outcome: Either::Right(Box::pin(wait)), may_be_lost }
    };
    match decided {
        Some((Decision::Use(token), _)) => Waiting::decided(Ok(token)),
        Some((Decision::Fail(error), _)) => Waiting::decided(Err(error)),
        Some((Decision::LeaveAlone(token), _)) => {
            core.reporter().left_alone(&token);
            Waiting::decided(Ok(token))
        }
        Some((Decision::Join(_), Some((refresh, waiter)))) => wait(&refresh, waiter, false),
        Some((Decision::Start { meanwhile, may_be_lost, .. }, Some((refresh, waiter)))) => {
            let waiting = match meanwhile {
                Some(token) => Waiting::decided(Ok(token)),
                None => wait(&refresh, waiter, may_be_lost),
            };
            start(core, refresh, runtime);
            waiting
        }
        // With a revision, there is always a decision, and a refresh that was joined or started is running.
        _ => Waiting::decided(Err(Error::Interrupted)),
    }
}

/// Starts the task of a refresh.
fn start(core: &Arc<Core>, refresh: Arc<Refresh>, runtime: Option<Handle>) {
    // Made before foreign code runs: if that panics, the task is dropped, and its drop ends the refresh. Otherwise its
    // waiters would wait for it until its deadline.
    let asked = core.state().asked_at(refresh.started_at);
    let task = RefreshTask { core: Arc::clone(core), asked, refresh };
    core.changed();
    let Some(runtime) = runtime else { return };
    let refresh = &task.refresh;
    let span = core.reporter().refresh(refresh.number, refresh.reason.name(), refresh.previous.as_ref());
    runtime.spawn(observability::within(span, task.run()));
}

/// The task of a refresh. Its drop ends the refresh, also if the source panics or the runtime shuts down.
struct RefreshTask {
    core: Arc<Core>,
    refresh: Arc<Refresh>,
    /// When the source was asked last.
    asked: AskedAt,
}

impl RefreshTask {
    async fn run(mut self) {
        let deadline = self.refresh.deadline;
        loop {
            let mut last_error = None;
            let outcome = timeout_at(deadline, self.attempt(&mut last_error)).await;
            let timed_out = || last_error.unwrap_or(Error::TimedOut(self.core.config.refresh_timeout));
            if self.finish(outcome.unwrap_or_else(|_| Err(timed_out()))) != Err(NotEnded::AsksAgain) {
                return;
            }
        }
    }

    /// Asks the source until it gives a token, fails permanently, or has failed too often.
    async fn attempt(&mut self, last_error: &mut Option<Error>) -> Outcome {
        let (core, refresh) = (&self.core, &self.refresh);
        // The program may have set one since the refresh was started.
        let previous = core.state().newest.clone();
        let request =
            TokenRequest::of(previous.as_ref(), &refresh.current_reason, refresh.challenge.as_ref());
        let retries = core.config.retry.retries();
        let mut attempt = 0_u32;
        loop {
            attempt = attempt.saturating_add(1);
            let retry_at = core.state().retry_at();
            if let Some(at) = retry_at {
                if at > refresh.deadline || core.is_shut_down_before(at).await {
                    let failure = core.state().last_error();
                    return Err(failure.unwrap_or(Error::ShutDown));
                }
            }
            // A runtime that is driven again after the deadline finds another refresh in place of this one.
            let may_ask = {
                let state = core.state();
                if state.is_superseded(self.asked) {
                    return Err(Error::Interrupted);
                }
                self.asked = state.asked_at(Instant::now());
                state.is_running(refresh) && self.asked.at < refresh.deadline
            };
            if !may_ask {
                return Err(Error::TimedOut(core.config.refresh_timeout));
            }
            let asking = |asked| {
                core.state().asks(refresh);
                if asked == Asked::Source {
                    core.reporter().asking(attempt);
                }
            };
            let was_needed = request.is_needed();
            let error = match core.login.token(&request, &asking).await {
                Ok(token) => return Ok(token),
                Err(error) if !error.is_transient() => return Err(error.into()),
                Err(error) => error,
            };
            if core.state().has_changed_since(self.asked) {
                // It says nothing of the login that has begun, or of the token that was set.
                continue;
            }
            let delay = core.back_off(refresh, &error);
            let error = Error::from(error);
            // The first caller that needs the token has joined: the source is asked once more for that caller.
            let has_joined = request.is_needed() && !was_needed;
            let attempts = retries.saturating_add(1).max(attempt.saturating_add(has_joined.into()));
            core.reporter().attempt_failed(attempt, attempts, &error, delay);
            if attempt >= attempts {
                return Err(error);
            }
            *last_error = Some(error);
        }
    }

    /// Ends the refresh. Has no effect if it has ended.
    fn finish(&self, outcome: Outcome) -> Result<(), NotEnded> {
        let (core, refresh) = (&self.core, &self.refresh);
        // The token is published before the waiters wake: otherwise one of them could read the old token, and start
        // another refresh. Their sender is a local: if a subscriber or a waker panics, its drop interrupts them.
        let Ended { outcome, is_same, is_superseded, sender, .. } =
            core.finish(refresh, outcome, self.asked)?;
        core.changed();
        let (reporter, took) = (core.reporter(), refresh.started_at.elapsed());
        let label = match &outcome {
            _ if is_superseded => "superseded",
            Ok(token) => {
                core.report_expiry();
                reporter.published(token, took, is_same, refresh.reason == RefreshReason::Challenged);
                "published"
            }
            Err(error) => {
                reporter.failed(error, took, core.left(refresh), refresh.current_reason.is_needed());
                if error.is_transient() { "transient" } else { "permanent" }
            }
        };
        if refresh.has_asked() {
            reporter.refreshed(refresh.reason.name(), label, took);
        }
        // Fails if nobody waits.
        let _ = sender.map(|sender| sender.send(outcome));
        Ok(())
    }
}

impl Drop for RefreshTask {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.finish(Err(Error::Interrupted));
    }
}

/// Resolves with what a need leads to.
pub(crate) struct Waiting {
    /// What was decided without a refresh, or the [wait] for one.
    outcome: Either<Ready<Outcome>, Pin<Box<dyn Future<Output = Outcome> + Send + Sync>>>,
    /// Whether the refresh is lost if the caller, who has started it, does not wait.
    pub(crate) may_be_lost: bool,
}

impl Waiting {
    fn decided(outcome: Outcome) -> Self {
        Self { outcome: Either::Left(ready(outcome)), may_be_lost: false }
    }

    /// Takes the token, if there is one without a wait.
    pub(crate) fn take_token(self) -> Result<Token, Self> {
        match self.outcome {
            Either::Left(decided) => decided.into_inner().map_err(|error| Self::decided(Err(error))),
            waiting => Err(Self { outcome: waiting, ..self }),
        }
    }
}

impl Future for Waiting {
    type Output = Outcome;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Outcome> {
        self.outcome.poll_unpin(cx)
    }
}

/// Waits for a refresh. `uses_current`: the current token is used if it fails, since it worked when this began to wait.
///
/// Each waiter has its own deadline: nobody may drive the runtime of the refresh any more. Outside of a tokio runtime there
/// is no timer, and no bound.
async fn wait(core: Arc<Core>, waiter: Waiter, deadline: Instant, uses_current: bool) -> Outcome {
    let interrupted = |_| Err(Error::Interrupted);
    let (mut waiter, mut timer) = (waiter, None);
    let answered = poll_fn(|cx| {
        if let Poll::Ready(outcome) = waiter.poll_unpin(cx) {
            return Poll::Ready(Some(outcome.unwrap_or_else(interrupted)));
        }
        // The next poll may be the first one within a runtime.
        timer = timer.take().or_else(|| core.timer(deadline + SLACK).map(Box::pin));
        timer.as_mut().map_or(Poll::Pending, |timer| timer.poll_unpin(cx).map(|()| None))
    });
    let timed_out = || Err(core.timed_out(deadline - core.config.refresh_timeout));
    let outcome = answered.await.unwrap_or_else(timed_out);
    // Not the one of then: a login may have begun.
    let current = || core.current().filter(|_| uses_current);
    outcome.or_else(|error| current().ok_or(error))
}
