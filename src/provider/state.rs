//! [`State`]: what a provider knows besides its token, and what the start and the end of a refresh change.
//!
//! [`Core`](super::core::Core) has the lock. Nothing in here runs foreign code: what has to be dropped without the lock,
//! such as an error that was replaced, is returned.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::{runtime, sync::watch, time::Instant};

use super::background::{Background, REVISION_TICK, TICK};
use super::failure::{Failure, PAUSE};
use super::options::ProviderOptions;
use super::pace::Pace;
use super::status::{Freshness, Status};
use crate::challenge::Challenge;
use crate::error::Error;
use crate::source::{CurrentReason, RefreshReason};
use crate::sync::{Outcome, Sender, Waiter, channel};
use crate::token::{Token, TokenId};

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
    /// Whether the newest token was obtained from the source, by this process.
    pub(super) is_from_source: bool,
    /// How many tokens the program has set.
    pub(super) sets: u32,
    /// Whether a caller has waited for the running refresh since then.
    pub(super) is_joined: bool,
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
    pub(super) sets: u32,
}

/// What the end of a refresh has changed.
pub(super) struct Ended {
    pub(super) outcome: Outcome,
    /// Whether the access token is the one before.
    pub(super) is_same: bool,
    /// Whether the program has set a token meanwhile, so that nothing has changed.
    pub(super) is_superseded: bool,
    /// For the waiters.
    pub(super) sender: Option<Sender>,
    /// An error that is not used any more, to be dropped without the lock.
    pub(super) _replaced: Option<Error>,
}

/// Why a refresh does not end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NotEnded {
    /// It has ended before, or another one has replaced it, and the source was asked for the current token later.
    HasEnded,
    /// A login has begun, or a token was set, since the source was asked: its answer is not used, and it is asked again.
    AsksAgain,
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

    /// The failure since the newest token, which begins with `error`.
    pub(super) fn failure(&mut self, error: &Error, config: &ProviderOptions, now: Instant) -> &mut Failure {
        self.failure.get_or_insert_with(|| Box::new(Failure::new(error, config, now)))
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
        if is_running && self.is_superseded(asked) {
            if outcome.is_ok() {
                self.charge(refresh, accepted, config, now);
            }
            self.running = None;
            self.waiters = None;
            let (newest, replaced) = (self.newest.clone().ok_or(Error::Interrupted), outcome.err());
            return Ok(Ended {
                outcome: newest,
                is_same: false,
                is_superseded: true,
                sender: None,
                _replaced: replaced,
            });
        }
        let (outcome, is_same, replaced) = match outcome {
            _ if is_answer && self.has_changed_since(asked) => {
                let may_ask = is_running && now < refresh.deadline;
                if may_ask || !is_running {
                    return Err(if may_ask { NotEnded::AsksAgain } else { NotEnded::HasEnded });
                }
                let replaced = self.fail(refresh, &Error::Interrupted, config, now);
                (Err(Error::Interrupted), false, replaced)
            }
            Ok(token) if is_running || self.asked_at < Some(asked.at) => {
                self.charge(refresh, accepted, config, now);
                let (token, is_same, failure) = self.take(token, asked.at, config, now);
                self.is_from_source = refresh.has_asked();
                (Ok(token), is_same, failure.map(|failure| failure.error))
            }
            Err(error) if is_running => {
                let replaced = self.fail(refresh, &error, config, now);
                (Err(error), false, replaced)
            }
            _ => return Err(NotEnded::HasEnded),
        };
        self.running.take_if(|_| is_running);
        Ok(Ended {
            outcome,
            is_same,
            is_superseded: false,
            sender: self.renew_waiters(),
            _replaced: replaced,
        })
    }

    /// Charges a token to the pace of challenges, if one has started its refresh.
    fn charge(&mut self, refresh: &Refresh, accepted: u32, config: &ProviderOptions, now: Instant) {
        if refresh.reason == RefreshReason::Challenged || refresh.by_program {
            let was_accepted = self.generation() == accepted;
            let pace = self.pace.get_or_insert_with(|| Box::new(Pace::new(config.cool_down)));
            pace.charge(now, was_accepted, refresh.by_program);
        }
    }

    /// Takes a token that the program has set. What a running refresh was asked for before is not used. Returns the token as it
    /// is published, what wakes those who wait, and what has to be dropped without the lock.
    pub(super) fn set(
        &mut self,
        token: Token,
        config: &ProviderOptions,
        now: Instant,
    ) -> (Token, Option<Sender>, Option<Box<Failure>>) {
        self.sets = self.sets.wrapping_add(1);
        (self.is_joined, self.is_from_source) = (false, false);
        let (token, _, failure) = self.take(token, now, config, now);
        (token, self.renew_waiters(), failure)
    }

    /// Whether a login has begun, or a token was set, since the source was asked then.
    pub(super) fn has_changed_since(&self, asked: AskedAt) -> bool {
        (asked.logins, asked.sets) != (self.logins, self.sets)
    }

    /// Whether a token was set since the source was asked then, and nobody has waited for another one since.
    pub(super) fn is_superseded(&self, asked: AskedAt) -> bool {
        asked.sets != self.sets && !self.is_joined
    }

    /// What a refresh knows that asks the source now.
    pub(super) fn asked_at(&self, at: Instant) -> AskedAt {
        AskedAt { at, logins: self.logins, sets: self.sets }
    }

    /// The number of the newest refresh.
    pub(super) fn started(&self) -> u64 {
        self.started
    }

    /// Takes what wakes those who wait. A late token is one for those who wait for the refresh in its place, too.
    pub(super) fn renew_waiters(&mut self) -> Option<Sender> {
        let sender = self.waiters.take().map(|waiters| waiters.0);
        self.waiters = self.running.is_some().then(|| Box::new(channel()));
        sender
    }

    /// Takes a token that was asked for then. Returns it as it is published, whether its access token is the newest one, and
    /// what has to be dropped without the lock.
    pub(super) fn take(
        &mut self,
        token: Token,
        asked_at: Instant,
        config: &ProviderOptions,
        now: Instant,
    ) -> (Token, bool, Option<Box<Failure>>) {
        let is_same = self.newest.as_ref().is_some_and(|newest| newest.has_same_access_token(&token));
        let generation = self.generation().wrapping_add(u32::from(!is_same));
        let id = TokenId { provider: self.provider, generation };
        let token = token.published(id, asked_at, &config.refresh_ahead, now);
        self.newest = Some(token.clone());
        (self.published_at, self.asked_at) = (Some(now), Some(asked_at));
        self.is_interrupted = false;
        (token, is_same, self.failure.take())
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
        Some(self.failure(error, config, now).end(error, refresh.revision, config, now))
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
