//! [`obtain`]: what a caller's need leads to, the task that refreshes the token, and the future that waits for it.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    runtime::Handle,
    time::{Instant, timeout_at},
};

use super::{
    challenge_pause::Part,
    outage::Recovered,
    shared::Shared,
    state::{Decision, Failed, Finished, Need, Refresh, Starter},
    sync::{Outcome, Sender, Waiter},
};
use crate::{
    error::{Error, SourceErrorKind},
    observability,
    source::{Asked, RefreshReason, TokenRequest},
};

/// Decides what `need` leads to, and starts a refresh if it leads to one.
///
/// The refresh has started when this returns: dropping the future does not stop it.
pub(super) fn obtain(shared: &Arc<Shared>, need: Need) -> Waiting {
    let revision = shared.source.revision();
    let runtime = Handle::try_current().ok();
    let reporter = &shared.reporter;
    let outcome = loop {
        match shared.decide(&need, Instant::now(), revision, runtime.is_some()) {
            Decision::Start(refresh, starter) => return start(shared, &refresh, starter, runtime.as_ref()),
            Decision::Join(refresh) => {
                reporter.joined(refresh.number);
                return Waiting::on(shared, refresh, None);
            }
            Decision::Overdue(refresh) => abandon(shared, &refresh),
            Decision::Use(token) => break Ok(token),
            Decision::Replaced(token, challenged) => {
                break Ok(token).inspect(|token| reporter.replaced_already(challenged, token));
            }
            Decision::LeaveAlone(token, repeated) => {
                break Ok(token).inspect(|token| reporter.left_alone(token, repeated));
            }
            Decision::Postpone(token) => break Ok(token).inspect(|token| reporter.postponed(token)),
            Decision::Fail(Error::NoRuntime) => break Err(Error::NoRuntime),
            Decision::Fail(error) => break Err(error).inspect_err(|error| reporter.failed_again(error)),
        }
    };
    Waiting::Decided(Some(outcome))
}

fn start(
    shared: &Arc<Shared>,
    refresh: &Arc<Refresh>,
    starter: Starter,
    runtime: Option<&Handle>,
) -> Waiting {
    // Made before foreign code runs: if that panics, the task is dropped, and its drop ends the refresh. Otherwise the
    // state would wait for it until its deadline.
    let task = RefreshTask {
        shared: Arc::clone(shared),
        refresh: Arc::clone(refresh),
        asked_at: refresh.started_at,
    };
    let waiting = Waiting::on(shared, Arc::clone(refresh), Some(starter));
    shared.changed();
    let span = shared.reporter.refresh(refresh.number, refresh.reason.name(), refresh.previous.as_ref());
    let _ = refresh.span.set(span.clone());
    if let Some(runtime) = runtime {
        // Without the state's lock: a runtime that is shutting down drops the task at once, which takes the lock.
        runtime.spawn(observability::within(span, task.run()));
    }
    // Also if nobody waits: a source that blocks its thread keeps the refresh from its own timeout.
    watch(shared, refresh);
    waiting
}

/// Gives up a refresh that has not ended by its deadline, unless it has ended meanwhile.
fn abandon(shared: &Shared, refresh: &Refresh) {
    let Some(failed) = shared.abandon(refresh) else { return };
    let sender = refresh.take_sender();
    shared.changed();
    observability::report_within(refresh.span.get(), || {
        report_failed(shared, refresh, &failed, shared.config.refresh_timeout);
    });
    wake(sender, Err(failed.error));
}

fn report_failed(shared: &Shared, refresh: &Refresh, failed: &Failed, took: Duration) {
    let Failed { error, cool_down, left, is_needed, counted } = failed;
    let is_login = matches!(error, Error::Source(error) if error.kind() == SourceErrorKind::LoginRequired);
    let label = match cool_down {
        Some(_) if is_login => {
            shared.reporter.login_required(error, took, *left, *is_needed, counted.is_news);
            "permanent"
        }
        Some(cool_down) => {
            shared.reporter.credential_rejected(error, took, *cool_down, *left, *is_needed, counted.is_news);
            "permanent"
        }
        None => {
            shared.reporter.failed(error, took, *left, counted.is_news, counted.failures);
            "transient"
        }
    };
    report_end(shared, refresh, label, took);
}

/// Counts a refresh that has ended, if it has asked the source.
fn report_end(shared: &Shared, refresh: &Refresh, outcome: &'static str, took: Duration) {
    if refresh.has_asked() {
        shared.reporter.refreshed(refresh.reason.name(), outcome, took);
    }
}

/// Wakes all waiters. Without any lock: wakers run foreign code.
fn wake(sender: Option<Sender>, outcome: Outcome) {
    // Fails if nobody waits.
    let _ = sender.map(|sender| sender.send(outcome));
}

/// The task of a refresh. Its drop ends the refresh, also if the source panics or the runtime shuts down.
struct RefreshTask {
    shared: Arc<Shared>,
    refresh: Arc<Refresh>,
    /// When the source was asked last.
    asked_at: Instant,
}

impl RefreshTask {
    async fn run(mut self) {
        let outcome = timeout_at(self.refresh.deadline, self.attempt()).await;
        self.finish(outcome.unwrap_or_else(|_| Err(self.shared.state().timed_out(&self.refresh))));
    }

    /// Asks the source until it gives a token, fails permanently, or has failed too often.
    async fn attempt(&mut self) -> Outcome {
        let (shared, refresh) = (&self.shared, &self.refresh);
        let request =
            TokenRequest::of(refresh.previous.as_ref(), &refresh.current_reason, refresh.challenge.as_ref());
        let mut attempt = 0;
        loop {
            attempt += 1;
            let not_before = shared.state().not_before();
            if let Some(at) = not_before {
                if at > refresh.deadline {
                    return Err(shared.state().backoff_too_long());
                }
                if shared.is_shut_down_before(at).await {
                    return Err(shared.state().last_error_or(Error::ShutDown));
                }
            }
            self.asked_at = Instant::now();
            shared.state().may_ask(refresh, self.asked_at)?;
            let asking = |asked| {
                shared.state().asks(refresh);
                if asked == Asked::Source {
                    shared.reporter.asking(attempt);
                }
            };
            let was_needed = request.is_needed();
            let error = match shared.source.fetch(&request, &asking).await {
                Ok(token) => return Ok(token),
                Err(error) if !error.is_transient() => return Err(error.into()),
                Err(error) => error,
            };
            let (error, delay, is_news) = shared.back_off(refresh, error);
            // The first caller that needs the token has joined: the source is asked once more for that caller.
            let has_joined = request.is_needed() && !was_needed;
            let attempts = (shared.config.retry.retries() + 1).max(attempt + u32::from(has_joined));
            shared.reporter.attempt_failed(attempt, attempts, &error, delay, is_news);
            if attempt >= attempts {
                return Err(error);
            }
        }
    }

    /// Ends the refresh. Has no effect if it has ended.
    fn finish(&self, outcome: Outcome) {
        let refresh = &self.refresh;
        // Before the waiters wake: otherwise one of them could read the old token, and start another refresh.
        let Some(finished) = self.shared.finish(refresh, outcome, self.asked_at) else { return };
        let sender = refresh.take_sender();
        self.shared.changed();
        let (reporter, took) = (&self.shared.reporter, refresh.started_at.elapsed());
        let outcome = match finished {
            Finished::Published {
                token,
                same,
                is_first_same,
                postponed,
                is_first_postponed,
                recovered,
                is_late,
            } => {
                self.shared.report_expiry();
                match (same, refresh.reason) {
                    (false, _) => reporter.published(&token, took),
                    (true, RefreshReason::Challenged) => {
                        reporter.challenged_token_again(&token, is_first_same)
                    }
                    (true, _) => reporter.same_token(&token),
                }
                if let Some(delay) = postponed {
                    reporter.about_to_expire(&token, delay, is_first_postponed);
                }
                if let Some(Recovered { failed_refreshes, failed_requests, lasted }) = recovered {
                    reporter.recovered(failed_refreshes, failed_requests, lasted);
                }
                if !is_late {
                    report_end(&self.shared, refresh, "published", took);
                }
                Ok(token)
            }
            Finished::Failed(failed) => {
                report_failed(&self.shared, refresh, &failed, took);
                Err(failed.error)
            }
        };
        wake(sender, outcome);
    }
}

impl Drop for RefreshTask {
    fn drop(&mut self) {
        self.finish(Err(Error::Interrupted));
    }
}

/// Resolves with the outcome of a refresh, or with what was decided without one.
pub(crate) enum Waiting {
    Decided(Option<Outcome>),
    Refresh {
        shared: Arc<Shared>,
        refresh: Arc<Refresh>,
        waiter: Waiter,
        /// If the caller started the refresh.
        starter: Option<Starter>,
    },
}

impl Waiting {
    fn on(shared: &Arc<Shared>, refresh: Arc<Refresh>, starter: Option<Starter>) -> Self {
        let waiter = refresh.waiter.clone();
        Self::Refresh { shared: Arc::clone(shared), refresh, waiter, starter }
    }

    /// The part that the caller has in the refresh.
    pub(crate) fn part(&self) -> Part {
        match self {
            Self::Decided(_) => Part::None,
            Self::Refresh { starter: Some(_), .. } => Part::Started,
            Self::Refresh { starter: None, .. } => Part::Joined,
        }
    }
}

impl Future for Waiting {
    type Output = Outcome;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Outcome> {
        match &mut *self {
            Self::Decided(outcome) => Poll::Ready(outcome.take().unwrap_or(Err(Error::Interrupted))),
            Self::Refresh { shared, refresh, waiter, .. } => match Pin::new(&mut *waiter).poll(cx) {
                Poll::Ready(outcome) => Poll::Ready(outcome.unwrap_or(Err(Error::Interrupted))),
                Poll::Pending => {
                    watch(shared, refresh);
                    Poll::Pending
                }
            },
        }
    }
}

/// Makes sure that the refresh ends by its deadline for those who wait on this runtime.
///
/// The timeout of the refresh itself does not fire if its runtime is not driven, such as one for the current thread
/// after `block_on` has returned, or if the source blocks its thread. So the first caller who waits on a runtime starts
/// a task there that abandons the refresh.
fn watch(shared: &Arc<Shared>, refresh: &Arc<Refresh>) {
    let Ok(runtime) = Handle::try_current() else { return };
    if !shared.state().watch(refresh, runtime.id()) {
        return;
    }
    let (shared, refresh) = (Arc::downgrade(shared), Arc::clone(refresh));
    runtime.spawn(async move {
        if timeout_at(refresh.deadline, refresh.waiter.clone()).await.is_err() {
            if let Some(shared) = shared.upgrade() {
                abandon(&shared, &refresh);
            }
        }
    });
}
