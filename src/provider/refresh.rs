//! [`Flight`]: one attempt after another to get a token, in a task of its own that nobody's end can cut short.

use std::sync::Arc;

use tokio::time::{Instant, timeout_at};

use super::{
    core::Core,
    landing::Landing,
    state::{Ended, Fetched, Landed},
};
use crate::{
    error::{Error, SourceError},
    source::{CurrentReason, TokenRequest},
    token::Token,
};

/// A refresh lands however it ends: by its outcome, a panic, or its runtime's end.
pub(super) struct Flight {
    core: Arc<Core>,
    /// Taken when the refresh lands.
    landing: Option<Landing>,
    flying: Ended,
    urgent: CurrentReason,
    begun: Instant,
}

impl Flight {
    pub(super) fn new(
        core: Arc<Core>,
        landing: Landing,
        flying: Ended,
        urgent: CurrentReason,
        begun: Instant,
    ) -> Self {
        Self { core, landing: Some(landing), flying, urgent, begun }
    }

    /// When it ends at the latest.
    pub(super) fn deadline(&self) -> Instant {
        self.begun + self.core.settings.refresh_timeout
    }

    /// Flies, to renew `previous`.
    pub(super) async fn fly(mut self, previous: Option<Token>) {
        let deadline = self.deadline();
        let outcome = match timeout_at(deadline, self.attempt(previous, deadline)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(self.core.timed_out(self.flying.number)),
        };
        self.land(outcome);
    }

    /// Asks the source until it gives a token, fails for good, or has failed too often.
    async fn attempt(&self, previous: Option<Token>, deadline: Instant) -> Result<Fetched, Error> {
        let core = &self.core;
        let mut attempt = 0;
        loop {
            attempt += 1;
            match core.not_before() {
                (Some(at), error) if at > deadline => {
                    return Err(error.unwrap_or_else(|| {
                        SourceError::unavailable(
                            "the newest token has expired, and the source is not asked again before its backoff ends",
                        )
                        .into()
                    }));
                }
                (Some(at), error) if core.is_shut_down_before(at).await => {
                    return Err(error.unwrap_or(Error::ShutDown));
                }
                _ => {}
            }
            if !core.may_ask(self.flying.number) {
                // Its runtime was not driven in time, and its waiters have their error already.
                return Err(core.timed_out(self.flying.number));
            }
            core.reporter.asking(attempt);
            let asked_at = Instant::now();
            let was = self.urgent.get();
            let error =
                match core.source.fetch(&TokenRequest::of(previous.as_ref(), &self.urgent, None)).await {
                    Ok(token) => return Ok(Fetched { token, asked_at }),
                    Err(error) if !error.is_transient() => return Err(error.into()),
                    Err(error) => error,
                };
            let (error, delay) = core.back_off(self.flying.number, error);
            core.reporter.attempt_failed(attempt, &error, delay);
            // Somebody has come to need the token since: what was declined for want of urgency is asked once more.
            let more_urgent = was != self.urgent.get();
            if attempt > core.settings.retry.retries() && !more_urgent {
                return Err(error);
            }
        }
    }

    /// Lands, if that has not come to pass before.
    fn land(&mut self, outcome: Result<Fetched, Error>) {
        let Some(landing) = self.landing.take() else { return };
        // The provider is told before the waiters: whoever wakes finds the token published.
        let landed = self.core.land(outcome, self.flying);
        let (reporter, reason, took) = (&self.core.reporter, self.flying.reason.name(), self.begun.elapsed());
        landing.land(match landed {
            Landed::Published { token, same, postponed } => {
                reporter.published(&token, reason, same, postponed, took);
                Ok(token)
            }
            Landed::Failed { error, cool_down } => {
                reporter.failed(&error, reason, cool_down, took);
                Err(error)
            }
            // Its waiters had their error when it was abandoned.
            Landed::Late => return,
        });
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.land(Err(Error::Interrupted));
    }
}
