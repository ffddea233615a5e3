//! [`Flight`]: one attempt after another to get a token, in a task of its own that nobody's end can cut short.

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, timeout};

use super::{
    core::Core,
    landing::{Handover, Landing},
    state::{Fetched, Landed, Reason},
};
use crate::{error::Error, observability, token::Token};

/// A flight lands however it ends: by its outcome, a panic, or its runtime's end.
pub(super) struct Flight {
    core: Arc<Core>,
    /// Taken when the flight lands.
    landing: Option<Landing>,
    number: u64,
    reason: Reason,
    /// The source's, when the flight started.
    revision: u64,
    begun: Instant,
}

impl Flight {
    pub(super) fn new(core: Arc<Core>, landing: Landing, number: u64, reason: Reason, revision: u64) -> Self {
        Self { core, landing: Some(landing), number, reason, revision, begun: Instant::now() }
    }

    /// Flies, to renew `previous`. The span follows from that of whoever started the flight: it is not theirs alone.
    pub(super) fn fly(mut self, previous: Option<Token>) -> impl Future<Output = ()> + Send {
        let span = self.core.reporter.flight(self.number, self.reason.name(), previous.as_ref());
        observability::within(span, async move {
            let limit = self.core.settings.refresh_timeout;
            let mut newest = None;
            let outcome = match timeout(limit, self.attempt(previous, limit, &mut newest)).await {
                Ok(outcome) => outcome,
                // What failed says more than that the attempt after it was cut short.
                Err(_) => Err(newest.unwrap_or(Error::TimedOut(limit))),
            };
            let handover = self.land(outcome);
            drop(self);
            if let Some(handover) = handover {
                handover.finish().await;
            }
        })
    }

    /// Asks the source until it gives a token, fails for good, or has failed too often; `newest` is the failure before.
    async fn attempt(
        &self,
        previous: Option<Token>,
        limit: Duration,
        newest: &mut Option<Error>,
    ) -> Result<Fetched, Error> {
        let core = &self.core;
        let deadline = self.begun + limit;
        let urgent = self.reason != Reason::Ageing;
        let mut attempt = 0;
        loop {
            attempt += 1;
            match core.not_before() {
                (Some(at), Some(error)) if at > deadline => return Err(error),
                (Some(at), error) if core.is_shut_down_before(at).await => {
                    return Err(error.unwrap_or(Error::ShutDown));
                }
                _ => {}
            }
            core.reporter.asking(attempt);
            let asked = Instant::now();
            let error = match core.source.fetch(previous.as_ref(), urgent).await {
                Ok(token) => return Ok(Fetched { token, took: asked.elapsed() }),
                Err(error) if !error.is_transient() => return Err(error.into()),
                Err(error) => error,
            };
            let (error, delay) = core.back_off(error);
            core.reporter.attempt_failed(attempt, &error, delay);
            if attempt > core.settings.retry.retries() {
                return Err(error);
            }
            *newest = Some(error);
        }
    }

    /// Lands, if that has not come to pass before.
    fn land(&mut self, outcome: Result<Fetched, Error>) -> Option<Handover> {
        let landing = self.landing.take()?;
        // The provider is told before the waiters: whoever wakes finds the token published.
        let landed = self.core.land(outcome, self.reason, self.revision);
        let (reporter, reason, took) = (&self.core.reporter, self.reason.name(), self.begun.elapsed());
        Some(landing.land(match landed {
            Landed::Published { token, same, postponed } => {
                reporter.published(&token, reason, same, postponed, took);
                Ok(token)
            }
            Landed::Failed { error, cool_down } => {
                reporter.failed(&error, reason, cool_down, took);
                Err(error)
            }
        }))
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.land(Err(Error::Interrupted));
    }
}
