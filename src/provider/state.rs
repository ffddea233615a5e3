//! [`State`]: what a provider knows besides its token, and what the start and the end of a refresh change.
//!
//! [`Core`](super::core::Core) has the lock. Nothing in here runs foreign code: what has to be dropped without the lock,
//! such as an error that was replaced, is returned.

use std::mem;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::{runtime, sync::watch, time::Instant};

use super::background::{Background, REVISION_TICK, TICK};
use super::options::ProviderOptions;
use super::pace::{CoolDown, Pace};
use super::status::{Freshness, Status};
use crate::challenge::Challenge;
use crate::error::{Error, SourceError};
use crate::retry::Backoff;
use crate::source::{CurrentReason, RefreshReason};
use crate::sync::{Outcome, Sender, Waiter, channel};
use crate::token::{Token, TokenId};

/// The longest `Retry-After` of a source that is followed.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);

/// The shortest time between two decisions of the background task, and between two attempts of `ready`.
pub(super) const PAUSE: Duration = Duration::from_millis(100);

/// The pause between two attempts of [`ready`](crate::TokenProvider::ready) after a permanent failure, min and max. It doubles.
const FORGIVING: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

#[derive(Default)]
pub(super) struct State {
    /// Tells this provider's tokens from those of others in this process.
    provider: u32,
    pub(super) shut_down: bool,
    /// Whether the newest refresh was interrupted: its runtime ended, or its source panicked.
    pub(super) is_interrupted: bool,
    /// How many logins the provider was given.
    pub(super) logins: u32,
    /// The token published last, even if it has expired or was invalidated: its refresh token is the next to spend.
    pub(super) newest: Option<Token>,
    pub(super) published_at: Option<Instant>,
    /// When the source was asked for it.
    asked_at: Option<Instant>,
    pub(super) running: Option<Arc<Refresh>>,
    /// Those who wait for the running refresh. Another in its place inherits them.
    pub(super) waiters: Option<Box<(Sender, Waiter)>>,
    /// The runtime of the newest refresh.
    pub(super) runtime: Option<runtime::Id>,
    pub(super) failure: Option<Box<Failure>>,
    /// `None` until a challenge has started a refresh.
    pub(super) pace: Option<Box<Pace>>,
    /// Made for the first subscriber, and dropped after the last: most providers have none.
    changes: Option<watch::Sender<bool>>,
    background: Option<Box<Background>>,
    started: u64,
    /// How many refreshes have asked the source, and how many of these have failed.
    asked: u32,
    failed: u32,
}

/// One refresh: what its task, its waiters and the state share.
pub(crate) struct Refresh {
    /// Counted from 1.
    pub(super) number: u64,
    /// Why it started.
    pub(super) reason: RefreshReason,
    /// Why it is needed now: a caller that joins may need it more. A challenge that joins is not charged to the pace, since it
    /// starts no refresh.
    pub(super) current_reason: CurrentReason,
    /// The challenge that started it, and whether the program itself has reported that.
    pub(super) challenge: Option<Challenge>,
    by_program: bool,
    /// The token to replace.
    pub(super) previous: Option<Token>,
    /// The source's revision when it started.
    pub(super) revision: u64,
    pub(super) started_at: Instant,
    /// It ends itself by then, if its runtime is driven.
    pub(super) deadline: Instant,
    /// Whether the source was asked: otherwise it counts as no refresh.
    has_asked: AtomicBool,
}

impl Refresh {
    pub(super) fn has_asked(&self) -> bool {
        self.has_asked.load(Ordering::Relaxed)
    }
}

/// When the source was asked, and how many logins there were by then.
#[derive(Clone, Copy, Debug)]
pub(super) struct AskedAt {
    pub(super) at: Instant,
    pub(super) logins: u32,
}

/// The failure of the newest attempt since the newest token, and when the source may be asked again.
pub(super) struct Failure {
    pub(super) error: Error,
    /// Until then, callers get a permanent error at once. The next attempt after a transient one waits until then.
    pub(super) not_before: Instant,
    /// The revision of the source that a permanent error holds for.
    revision: u64,
    /// Spaces the attempts of [`ready`](crate::TokenProvider::ready).
    forgiving: CoolDown,
    backoff: Backoff,
    cool_down: CoolDown,
}

impl Failure {
    /// Whether callers get the error at once.
    pub(super) fn is_final(&self, now: Instant, revision: u64) -> bool {
        !self.error.is_transient() && self.revision == revision && now < self.not_before
    }
}

/// What the end of a refresh has changed.
pub(super) struct Ended {
    pub(super) outcome: Outcome,
    /// Whether the access token is the one before.
    pub(super) is_same: bool,
    /// For the waiters.
    pub(super) sender: Option<Sender>,
    /// The error before, to be dropped without the lock.
    pub(super) _replaced: Option<Error>,
}

/// Why a refresh does not end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NotEnded {
    /// It has ended before, or another one has replaced it, and the source was asked for the current token later.
    HasEnded,
    /// A login has begun since the source was asked: its answer is not used, and it is asked again.
    HasNewLogin,
}

impl State {
    pub(super) fn new(provider: u32) -> Self {
        Self { provider, ..Self::default() }
    }

    /// Starts a refresh, in place of the running one if there is one, which has not ended in time.
    pub(super) fn start(
        &mut self,
        (reason, is_needed): (RefreshReason, bool),
        (challenge, by_program): (Option<Challenge>, bool),
        revision: u64,
        (now, deadline): (Instant, Instant),
    ) {
        self.started += 1;
        self.waiters.get_or_insert_with(|| Box::new(channel()));
        let refresh = Arc::new(Refresh {
            number: self.started,
            reason,
            current_reason: CurrentReason::new(reason, is_needed),
            challenge,
            by_program,
            previous: self.newest.clone(),
            revision,
            started_at: now,
            deadline,
            has_asked: AtomicBool::new(false),
        });
        self.running = Some(refresh);
    }

    pub(super) fn is_running(&self, refresh: &Refresh) -> bool {
        self.running.as_ref().is_some_and(|running| running.number == refresh.number)
    }

    /// Counts a refresh that asks the source.
    pub(super) fn asks(&mut self, refresh: &Refresh) {
        if !refresh.has_asked.swap(true, Ordering::Relaxed) {
            self.asked += 1;
        }
    }

    /// Until when the source is not asked, because it has failed transiently.
    pub(super) fn retry_at(&self) -> Option<Instant> {
        let failure = self.failure.as_ref().filter(|failure| failure.error.is_transient())?;
        Some(failure.not_before)
    }

    fn failure(&mut self, error: &Error, config: &ProviderOptions, now: Instant) -> &mut Failure {
        self.failure.get_or_insert_with(|| {
            Box::new(Failure {
                error: error.clone(),
                not_before: now,
                revision: 0,
                forgiving: CoolDown::new(FORGIVING),
                backoff: config.retry.make_backoff(),
                cool_down: CoolDown::new(config.cool_down),
            })
        })
    }

    /// Records that an attempt has failed: the next one waits for the backoff, and for the source's `Retry-After`. Returns
    /// the delay, and the failure before.
    pub(super) fn back_off(
        &mut self,
        error: &SourceError,
        config: &ProviderOptions,
        now: Instant,
    ) -> (Duration, Error) {
        let asked = error.retry_after().unwrap_or_default().min(MAX_RETRY_AFTER);
        let error = Error::from(error.clone());
        let failure = self.failure(&error, config, now);
        let delay = asked + failure.backoff.next_delay();
        failure.not_before = now + delay;
        (delay, mem::replace(&mut failure.error, error))
    }

    /// Ends the cool-down of a permanent failure, but only after a pause that doubles. Returns when it ends; `None` if there is
    /// none.
    pub(super) fn forgive(&mut self, now: Instant) -> Option<Instant> {
        let failure = self.failure.as_mut().filter(|failure| !failure.error.is_transient())?;
        let at = failure.forgiving.until().map_or(now, |until| until.max(now));
        if at < failure.not_before {
            failure.not_before = at;
            failure.forgiving.begin(at);
        }
        Some(failure.not_before)
    }

    /// A login has begun: what failed before says nothing of it. Returns what has to be dropped without the lock.
    pub(super) fn log_in(&mut self) -> Option<Box<Failure>> {
        self.logins = self.logins.wrapping_add(1);
        self.failure.take()
    }

    /// Ends a refresh that asked the source then.
    pub(super) fn finish(
        &mut self,
        refresh: &Refresh,
        outcome: Outcome,
        asked: AskedAt,
        accepted: u32,
        config: &ProviderOptions,
        now: Instant,
    ) -> Result<Ended, NotEnded> {
        let is_running = self.is_running(refresh);
        let is_answer = matches!(outcome, Ok(_) | Err(Error::Source(_)));
        let (outcome, is_same, replaced) = match outcome {
            _ if is_answer && asked.logins != self.logins => {
                let may_ask = is_running && now < refresh.deadline;
                if may_ask || !is_running {
                    return Err(if may_ask { NotEnded::HasNewLogin } else { NotEnded::HasEnded });
                }
                let replaced = self.fail(refresh, &Error::Interrupted, config, now);
                (Err(Error::Interrupted), false, replaced)
            }
            Ok(token) if is_running || self.asked_at < Some(asked.at) => {
                let is_same = self.newest.as_ref().is_some_and(|newest| newest.has_same_access_token(&token));
                if refresh.reason == RefreshReason::Challenged {
                    let was_accepted = self.generation() == accepted;
                    let pace = self.pace.get_or_insert_with(|| Box::new(Pace::new(config.cool_down)));
                    pace.charge(now, was_accepted, refresh.by_program);
                }
                let generation = self.generation().wrapping_add(u32::from(!is_same));
                let id = TokenId { provider: self.provider, generation };
                let token = token.published(id, asked.at, &config.refresh_ahead, now);
                self.newest = Some(token.clone());
                (self.published_at, self.asked_at) = (Some(now), Some(asked.at));
                self.is_interrupted = false;
                (Ok(token), is_same, self.failure.take().map(|failure| failure.error))
            }
            Err(error) if is_running => {
                let replaced = self.fail(refresh, &error, config, now);
                (Err(error), false, replaced)
            }
            _ => return Err(NotEnded::HasEnded),
        };
        self.running.take_if(|_| is_running);
        // A late token is one for those who wait for the refresh in its place, too.
        let sender = self.waiters.take().map(|waiters| waiters.0);
        self.waiters = self.running.is_some().then(|| Box::new(channel()));
        Ok(Ended { outcome, is_same, sender, _replaced: replaced })
    }

    /// That of the newest access token; 0 before the first.
    pub(super) fn generation(&self) -> u32 {
        self.newest.as_ref().map_or(0, |token| token.id().generation)
    }

    /// Records that a refresh has failed. Returns the error before.
    fn fail(
        &mut self,
        refresh: &Refresh,
        error: &Error,
        config: &ProviderOptions,
        now: Instant,
    ) -> Option<Error> {
        self.failed += u32::from(refresh.has_asked());
        self.is_interrupted = matches!(error, Error::Interrupted);
        if matches!(error, Error::ShutDown) {
            return None;
        }
        let failure = self.failure(error, config, now);
        if !error.is_transient() {
            let ends_at = failure.cool_down.begin(now);
            let asked_for = if let Error::Source(error) = error { error.retry_after() } else { None };
            let asked_for = asked_for.map_or(ends_at, |delay| now + delay.max(config.cool_down.0));
            failure.not_before = asked_for.min(ends_at);
            failure.revision = refresh.revision;
        } else if !matches!(error, Error::Source(_)) {
            // An attempt that has failed has begun its backoff itself. A short refresh could not wait for a long one.
            let delay = failure.backoff.next_delay().min(config.refresh_timeout / 2).max(PAUSE);
            failure.not_before = failure.not_before.max(now + delay);
        }
        Some(mem::replace(&mut failure.error, error.clone()))
    }

    /// Subscribes to the changes of the state. The value is true once the provider is shut down.
    pub(super) fn subscribe(&mut self) -> watch::Receiver<bool> {
        self.changes.get_or_insert_with(|| watch::Sender::new(self.shut_down)).subscribe()
    }

    /// What notifies the subscribers, if there are any.
    pub(super) fn subscribers(&mut self) -> Option<watch::Sender<bool>> {
        // Its drop wakes nobody: there is no receiver, and none can be made without the lock.
        self.changes.take_if(|changes| changes.is_closed());
        self.changes.clone()
    }

    /// Makes room for a background task that ends when `ended` resolves, and returns its number. `None` if the provider
    /// is shut down, or one is running on a runtime that is driven, as far as can be known.
    pub(super) fn start_background(&mut self, ended: Waiter, now: Instant) -> Option<u64> {
        if self.shut_down || self.background_end(now).is_some() {
            return None;
        }
        let number = self.background.as_ref().map_or(1, |background| background.number + 1);
        self.background = Some(Box::new(Background { number, due: now, ended }));
        Some(number)
    }

    /// Resolves at the end of the background task. `None` if none runs.
    pub(super) fn background_end(&self, now: Instant) -> Option<Waiter> {
        self.background.as_ref()?.end(now)
    }

    /// When the background task has to decide again if nothing changes before. `None` if a newer task has replaced it,
    /// because it was late.
    pub(super) fn background_runs_at(
        &mut self,
        number: u64,
        current: Option<&Token>,
        now: Instant,
    ) -> Option<Instant> {
        let soon = now + PAUSE;
        let at = match (&self.running, current, &self.failure) {
            // It ends before that, unless its runtime is not driven.
            (Some(running), ..) => Some(running.deadline + PAUSE),
            (None, Some(token), _) if token.is_fresh(now) => token.refresh_at(),
            (None, _, Some(failure)) if failure.error.is_transient() => Some(failure.not_before.max(soon)),
            (None, _, Some(failure)) => Some(failure.not_before.min(now + REVISION_TICK).max(soon)),
            (None, _, None) => Some(soon),
        };
        let background = self.background.as_mut().filter(|background| background.number == number)?;
        background.due = at.map_or(now + TICK, |at| at.min(now + TICK));
        Some(background.due)
    }

    pub(super) fn last_error(&self) -> Option<Error> {
        self.failure.as_ref().map(|failure| failure.error.clone())
    }

    pub(super) fn status(&self, current: Option<&Token>, now: Instant) -> Status {
        let freshness = match current {
            None => Freshness::Missing,
            Some(token) if token.is_expired(now) => Freshness::Expired,
            Some(token) if token.is_fresh(now) => Freshness::Fresh,
            Some(_) => Freshness::Expiring,
        };
        let not_before = self.failure.as_ref().map(|failure| failure.not_before);
        Status {
            generation: self.generation().into(),
            freshness,
            remaining: current.and_then(Token::remaining),
            refreshing: self.running.is_some(),
            retry_in: not_before.map(|at| at.saturating_duration_since(now)).filter(|left| !left.is_zero()),
            refreshes: self.asked.into(),
            failed_refreshes: self.failed.into(),
            last_error: self.last_error(),
            store: None,
            shut_down: self.shut_down,
        }
    }
}
