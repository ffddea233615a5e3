//! [`State`]: every decision about refreshes, and what their ends change.
//!
//! Each decision is a function of what is passed in. [`Shared`](super::shared::Shared) calls it under its lock, so no
//! source, subscriber or waker may run in here: each is foreign code, which may call the provider and would deadlock.

use std::{
    sync::{
        Arc, OnceLock, Weak,
        atomic::{self, AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use futures_util::FutureExt;
use tokio::{runtime, sync::watch, time::Instant};

use super::{
    challenge_pause::{ChallengePause, Part},
    config::Config,
    cool_down::CoolDown,
    outage::{Counted, GIVEN_UP, Outage, Recovered},
    status::{Freshness, Status},
    sync::{Mutex, Outcome, Sender, Waiter, channel, lock},
};
#[cfg(feature = "tenants")]
use crate::error::SourceErrorKind;
use crate::{
    challenge::Challenge,
    error::{Error, SourceError},
    observability::{Span, TokenLeft},
    retry::Backoff,
    source::{CurrentReason, RefreshReason},
    token::{LEAST_LIFE, Token, TokenId},
};

/// The longest `Retry-After` of a source that is followed.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);

/// The error of a caller that would have to wait for longer than a refresh may take, if no failure says why.
const BACKOFF_TOO_LONG: &str = "the source's backoff ends after refresh_timeout";

/// How long the source is not asked after a refresh that was interrupted or timed out, for which there is no backoff.
pub(super) const AFTER_INTERRUPTION: Duration = Duration::from_millis(100);

/// A token that arrives with less than [`LEAST_LIFE`] left is used until this long after its end, since it would
/// otherwise cost a refresh per request. If the API rejects it, a 401 says so.
const GRACE: Duration = Duration::from_secs(1);

/// How often a changed credential is looked for while the one before is rejected.
const REVISION_TICK: Duration = Duration::from_secs(1);

/// How often the background task compares the clocks.
const CLOCK_TICK: Duration = Duration::from_secs(60);

/// A difference between the two clocks that is no sign of a suspended machine.
const CLOCK_SLACK: Duration = Duration::from_secs(1);

/// A background task that is this late is on a runtime that is not driven.
const STALLED_AFTER: Duration = Duration::from_secs(1);

/// Why a caller asks, and so which tokens it can use.
#[derive(Clone, Debug)]
pub(crate) enum Need {
    /// Any token that has not expired.
    Any,
    /// Any token that has not expired; the one that is there is to be replaced, since it is expiring.
    Ahead,
    /// Any token but this one, which the API has challenged.
    OtherThan {
        token: TokenId,
        /// The part that the request took in the refresh that brought this token.
        part: Part,
        /// Whether the request waits for another token, to be sent again.
        waits: bool,
        /// What the API asks for.
        challenge: Option<Challenge>,
    },
}

/// What a need leads to.
pub(super) enum Decision {
    /// This token is used.
    Use(Token),
    /// This token has replaced the challenged one already.
    Replaced(Token, TokenId),
    /// This token is used and the source is not asked: the API challenges even the newest token. If that is news, with
    /// the number of such decisions since the last that was news.
    LeaveAlone(Token, Option<u64>),
    /// This token is used and replaced later: nobody waits, and the source is in its backoff.
    Postpone(Token),
    /// The source is not asked, for this reason.
    Fail(Error),
    /// The running refresh will bring the token.
    Join(Arc<Refresh>),
    /// The running refresh has not ended by its deadline, and is to be abandoned before the next decision.
    Overdue(Arc<Refresh>),
    /// This refresh is the running one from here on: the caller has to start its task, and to keep its `Starter` while
    /// it waits.
    Start(Arc<Refresh>, Starter),
}

/// What the end of a refresh has changed.
pub(super) enum Finished {
    Published {
        token: Token,
        /// The source gave the access token that it gave before.
        same: bool,
        /// The refresh before it brought another one.
        is_first_same: bool,
        /// How long the source is not asked, because the token is about to expire.
        postponed: Option<Duration>,
        /// Whether the token before it was not about to expire.
        is_first_postponed: bool,
        /// The outage that the token ends.
        recovered: Option<Recovered>,
        /// The refresh was abandoned before, and has been counted then.
        is_late: bool,
    },
    Failed(Failed),
}

/// A refresh that has failed.
pub(super) struct Failed {
    pub(super) error: Error,
    /// How long callers get the error without another refresh.
    pub(super) cool_down: Option<Duration>,
    /// What callers have meanwhile.
    pub(super) left: TokenLeft,
    /// Whether a caller needs the token, rather than the background.
    pub(super) is_needed: bool,
    pub(super) counted: Counted,
}

/// Held by the request that started a refresh, for as long as it waits.
pub(super) type Starter = Arc<()>;

/// One refresh: what its task, its waiters and the state share.
pub(crate) struct Refresh {
    /// Counted from 1.
    pub(super) number: u64,
    /// Why it started.
    pub(super) reason: RefreshReason,
    /// Why it is needed now: a caller that joins may need it more.
    pub(super) current_reason: CurrentReason,
    /// The challenge that started it.
    pub(super) challenge: Option<Challenge>,
    /// The token to replace.
    pub(super) previous: Option<Token>,
    /// The source's revision when it started.
    revision: u64,
    pub(super) started_at: Instant,
    /// When its timeout ends it. If it runs for longer, nobody drives its runtime.
    pub(super) deadline: Instant,
    /// Alive while the request that started it waits for another token, to be sent again.
    starter: Weak<()>,
    /// Where its end is reported. Set once, outside of the lock: a subscriber is foreign code.
    pub(super) span: OnceLock<Span>,
    /// Whether the source was asked: otherwise it counts as no refresh.
    has_asked: AtomicBool,
    /// Taken by the task, or by a caller that abandons the refresh, whichever ends it first.
    sender: Mutex<Option<Sender>>,
    pub(super) waiter: Waiter,
}

impl Refresh {
    /// Takes the sender of the outcome, for the caller that has ended the refresh.
    ///
    /// To be taken before any foreign code runs: if a subscriber or a waker panics, the sender is dropped, and all waiters
    /// get [`Error::Interrupted`]. If it stayed here, where each waiter holds it, they would wait forever.
    pub(super) fn take_sender(&self) -> Option<Sender> {
        lock(&self.sender).take()
    }

    pub(super) fn has_asked(&self) -> bool {
        self.has_asked.load(Ordering::Relaxed)
    }
}

pub(super) struct State {
    /// Tells this provider's tokens from those of others in this process.
    provider: u32,
    config: Arc<Config>,
    /// From the start of a refresh until it ends or is abandoned.
    running: Option<Box<Running>>,
    /// Made for the first subscriber, and dropped after the last: most providers have none.
    changes: Option<watch::Sender<bool>>,
    shut_down: bool,
    generation: u32,
    /// Whether the source gave the newest access token more than once.
    is_same: bool,
    /// The token published last, even if it has expired or was invalidated: its refresh token is the next to spend.
    previous: Option<Token>,
    /// When it was published, by both clocks.
    published_at: Option<(Instant, SystemTime)>,
    /// When the source was asked for it.
    asked_at: Option<Instant>,
    started: u64,
    /// How many refreshes have asked the source, and how many of these have failed.
    asked: u64,
    failed: u64,
    /// The errors that were replaced, for the caller to drop without the lock: the drop of a cause is foreign code.
    replaced: Vec<Error>,
    failures: Option<Box<Failures>>,
    /// After the first refresh that a challenge started: how long no other challenge starts one.
    challenged: Option<Box<ChallengePause>>,
    /// Continues from refresh to refresh, until one brings a token that lasts.
    backoff: Option<Box<Backoff>>,
    /// The source is not asked before this.
    not_before: Option<Instant>,
    /// Whether that is so because the newest token was about to expire when it arrived.
    is_postponed: bool,
    background: Option<Box<Background>>,
}

/// The running refresh, and what is known of it.
struct Running {
    refresh: Arc<Refresh>,
    /// Why its newest attempt failed.
    attempt_error: Option<Error>,
    /// The runtimes on which a task abandons it at its deadline.
    watched: Vec<runtime::Id>,
}

/// What has failed since the newest token.
#[derive(Default)]
struct Failures {
    outage: Outage,
    /// Why the newest attempt failed.
    last_error: Option<Error>,
    permanent: Option<Permanent>,
}

/// The newest permanent failure.
struct Permanent {
    error: Error,
    /// The source's revision that it holds for.
    revision: u64,
    /// How long callers get the error without another refresh.
    cool_down: CoolDown,
}

/// The newest task that keeps the token fresh.
struct Background {
    number: u64,
    /// When it has to run next.
    due: Instant,
    /// Resolves at its end.
    ended: Waiter,
}

impl Running {
    fn is(&self, refresh: &Refresh) -> bool {
        self.refresh.number == refresh.number
    }
}

impl State {
    pub(super) fn new(config: Arc<Config>) -> Self {
        static PROVIDERS: atomic::AtomicU32 = atomic::AtomicU32::new(0);
        Self {
            provider: PROVIDERS.fetch_add(1, Ordering::Relaxed).wrapping_add(1),
            running: None,
            changes: None,
            shut_down: false,
            generation: 0,
            is_same: false,
            previous: None,
            published_at: None,
            asked_at: None,
            started: 0,
            asked: 0,
            failed: 0,
            replaced: Vec::new(),
            failures: None,
            challenged: None,
            backoff: None,
            not_before: None,
            is_postponed: false,
            background: None,
            config,
        }
    }

    /// Decides what `need` leads to. `current` is the current token, which may have expired; the API has accepted the
    /// token of the generation `accepted`. Without a runtime, no refresh can start.
    pub(super) fn decide(
        &mut self,
        need: &Need,
        current: Option<Token>,
        accepted: u32,
        now: Instant,
        revision: u64,
        has_runtime: bool,
    ) -> Decision {
        let reason = match (need, &current) {
            (_, None) => RefreshReason::Missing,
            (_, Some(token)) if token.0.is_expired(now) => RefreshReason::Expired,
            (Need::Any, Some(token)) => return Decision::Use(token.clone()),
            (Need::Ahead, Some(token)) if token.0.is_fresh(now) => return Decision::Use(token.clone()),
            (Need::Ahead, Some(_)) => RefreshReason::Expiring,
            (Need::OtherThan { token: challenged, .. }, Some(token)) if token.id() != *challenged => {
                return Decision::Replaced(token.clone(), *challenged);
            }
            (Need::OtherThan { .. }, Some(_)) => RefreshReason::Challenged,
        };
        if let (Need::OtherThan { token, part, .. }, Some(pause)) = (need, &mut self.challenged) {
            pause.challenged_again(token.generation, *part);
        }
        if let Some(Running { refresh, .. }) = self.running.as_deref() {
            if now > refresh.deadline {
                return Decision::Overdue(Arc::clone(refresh));
            }
            if !matches!(need, Need::Ahead) {
                refresh.current_reason.raise(reason);
            }
            return Decision::Join(Arc::clone(refresh));
        }
        if self.shut_down {
            return Decision::Fail(Error::ShutDown);
        }
        if let Some(error) = self.permanent_error(now, revision) {
            return Decision::Fail(error);
        }
        match (reason, current) {
            (RefreshReason::Challenged, Some(token)) if self.is_paused(now, token.id(), accepted) => {
                let repeated = self.challenged.as_mut().and_then(|pause| pause.leave_alone(now));
                Decision::LeaveAlone(token, repeated)
            }
            (RefreshReason::Expiring, Some(token)) if self.not_before.is_some_and(|at| now < at) => {
                Decision::Postpone(token)
            }
            _ if !has_runtime => Decision::Fail(Error::NoRuntime),
            // A refresh could only wait for its own timeout: it would ask nothing.
            _ if self.not_before > now.checked_add(self.config.refresh_timeout) => {
                Decision::Fail(self.backoff_too_long())
            }
            _ => self.start(need, reason, revision, now),
        }
    }

    /// The error of a caller that would have to wait for longer than a refresh may take.
    pub(super) fn backoff_too_long(&self) -> Error {
        self.last_error_or(SourceError::unavailable(BACKOFF_TOO_LONG).into())
    }

    /// Why the newest attempt failed, or else `other`.
    pub(super) fn last_error_or(&self, other: Error) -> Error {
        self.last_error().unwrap_or(other)
    }

    fn last_error(&self) -> Option<Error> {
        self.failures.as_ref()?.last_error.clone()
    }

    /// Whether a challenge starts no refresh now.
    fn is_paused(&self, now: Instant, current: TokenId, accepted: u32) -> bool {
        self.challenged.as_ref().is_some_and(|pause| pause.is_active(now, current.generation == accepted))
    }

    fn start(&mut self, need: &Need, reason: RefreshReason, revision: u64, now: Instant) -> Decision {
        let ((sender, waiter), starter) = (channel(), Starter::default());
        let (waits, challenge) = match need {
            Need::OtherThan { waits, challenge, .. } => (*waits, challenge.clone()),
            Need::Any | Need::Ahead => (false, None),
        };
        self.started += 1;
        let refresh = Arc::new(Refresh {
            number: self.started,
            reason,
            current_reason: CurrentReason::new(reason, !matches!(need, Need::Ahead)),
            challenge,
            previous: self.previous.clone(),
            revision,
            started_at: now,
            deadline: now + self.config.refresh_timeout,
            starter: if waits { Arc::downgrade(&starter) } else { Weak::new() },
            span: OnceLock::new(),
            has_asked: AtomicBool::new(false),
            sender: Mutex::new(Some(sender)),
            waiter,
        });
        let running = Running { refresh: Arc::clone(&refresh), attempt_error: None, watched: Vec::new() };
        self.running = Some(Box::new(running));
        Decision::Start(refresh, starter)
    }

    fn is_running(&self, refresh: &Refresh) -> bool {
        self.running.as_ref().is_some_and(|running| running.is(refresh))
    }

    /// Ends a refresh. Returns false if it has ended before.
    fn end(&mut self, refresh: &Refresh) -> bool {
        let ended = self.running.take_if(|running| running.is(refresh));
        let is_first = ended.is_some();
        self.replaced.extend(ended.and_then(|running| running.attempt_error));
        is_first
    }

    /// Whether the caller has to make sure that the refresh ends by its deadline for those who wait on `runtime`: true
    /// at most once per runtime.
    pub(super) fn watch(&mut self, refresh: &Refresh, runtime: runtime::Id) -> bool {
        let Some(running) = self.running.as_mut().filter(|running| running.is(refresh)) else { return false };
        let is_first = !running.watched.contains(&runtime);
        running.watched.extend(is_first.then_some(runtime));
        is_first
    }

    /// Checks that the refresh may still ask the source: it was not abandoned, and its time is not up. Otherwise its
    /// runtime was not driven in time.
    pub(super) fn may_ask(&self, refresh: &Refresh, now: Instant) -> Result<(), Error> {
        let may_ask = self.is_running(refresh) && now < refresh.deadline;
        may_ask.then_some(()).ok_or_else(|| self.timed_out(refresh))
    }

    /// Counts a refresh that asks the source.
    pub(super) fn asks(&mut self, refresh: &Refresh) {
        if !refresh.has_asked.swap(true, Ordering::Relaxed) {
            self.asked += 1;
        }
    }

    /// The error of a refresh whose time is up: the failure of its newest attempt says more than the timeout.
    pub(super) fn timed_out(&self, refresh: &Refresh) -> Error {
        let running = self.running.as_ref().filter(|running| running.is(refresh));
        let failure = running.and_then(|running| running.attempt_error.clone());
        failure.unwrap_or(Error::TimedOut(self.config.refresh_timeout))
    }

    /// Gives up a refresh that has not ended by its deadline, so that another can start. `None` if it has ended.
    pub(super) fn abandon(
        &mut self,
        refresh: &Refresh,
        current: Option<Token>,
        now: Instant,
    ) -> Option<Failed> {
        let error = self.timed_out(refresh);
        if !self.end(refresh) {
            return None;
        }
        let failed = self.fail(refresh, error, current, now);
        // A runtime that is only late ends the refresh by then. Otherwise the source would be asked twice at a time.
        self.not_before = self.not_before.max(now.checked_add(AFTER_INTERRUPTION));
        Some(failed)
    }

    /// Counts a request that fails because there is no token. It may be polled when the outage has ended.
    pub(super) fn request_failed(&mut self, error: &Error, now: Instant) -> Counted {
        let failures = match error {
            Error::ShutDown => None,
            Error::NoRuntime => Some(self.failures.get_or_insert_default()),
            #[cfg(feature = "tenants")]
            Error::MissingKey | Error::Factory(_) => Some(self.failures.get_or_insert_default()),
            _ => self.failures.as_mut(),
        };
        failures.map(|failures| failures.outage.request_failed(now, error.name())).unwrap_or_default()
    }

    /// Counts a request that was dropped while it waited, and returns the error to report. `None` if nothing has failed.
    pub(super) fn request_given_up(&mut self, now: Instant) -> Option<(Error, Counted)> {
        let failures = self.failures.as_mut()?;
        let error = failures.last_error.clone().unwrap_or(Error::TimedOut(self.config.refresh_timeout));
        Some((error, failures.outage.request_failed(now, GIVEN_UP)))
    }

    /// Makes the next failed request news again.
    #[cfg(feature = "tenants")]
    pub(super) fn end_failures(&mut self, now: Instant) {
        if let Some(failures) = &mut self.failures {
            failures.outage.end(now);
        }
    }

    #[cfg(feature = "tenants")]
    pub(super) fn is_refreshing(&self) -> bool {
        self.running.is_some()
    }

    /// Whether the source was asked for a token, and its login has not ended, or its last token still works.
    #[cfg(feature = "tenants")]
    pub(super) fn may_have_login(&self, current: Option<Token>, now: Instant) -> bool {
        let permanent = self.failures.as_ref().and_then(|failures| failures.permanent.as_ref());
        let has_ended = permanent.is_some_and(|permanent| {
            matches!(&permanent.error, Error::Source(error) if error.kind() == SourceErrorKind::LoginRequired)
        });
        let works = current.is_some_and(|token| !token.0.is_expired(now));
        self.asked > 0 && (works || !has_ended)
    }

    /// Records that a request that took this part in the refresh for `token` has succeeded with it.
    pub(super) fn healed(&mut self, token: TokenId, part: Part) {
        if let Some(pause) = &mut self.challenged {
            pause.healed(token.generation, part);
        }
    }

    /// Until when the source is not asked.
    pub(super) fn not_before(&self) -> Option<Instant> {
        self.not_before
    }

    /// Postpones the next attempt of the refresh, by the backoff and the source's `Retry-After`. Returns by how much,
    /// and whether the failure is news.
    pub(super) fn back_off(
        &mut self,
        refresh: &Refresh,
        error: SourceError,
        now: Instant,
    ) -> (Error, Duration, bool) {
        let asked = error.retry_after().unwrap_or_default().min(MAX_RETRY_AFTER);
        let error = Error::from(error);
        // The failure of an abandoned refresh is old: it says nothing of the source today.
        let Some(running) = self.running.as_mut().filter(|running| running.is(refresh)) else {
            return (error, asked, false);
        };
        self.replaced.extend(running.attempt_error.replace(error.clone()));
        let failures = self.failures.get_or_insert_default();
        self.replaced.extend(failures.last_error.replace(error.clone()));
        let is_news = failures.outage.attempt_failed(now, error.name());
        let delay = asked + self.next_delay();
        self.not_before = now.checked_add(delay);
        (error, delay, is_news)
    }

    fn next_delay(&mut self) -> Duration {
        self.backoff.get_or_insert_with(|| Box::new(self.config.retry.make_backoff())).next_delay()
    }

    /// Ends a refresh that asked the source at `asked_at`. The caller publishes the token before it unlocks.
    ///
    /// `None` if the refresh has ended before: it was abandoned. Its token is used all the same if the source was asked for it
    /// after the current one.
    pub(super) fn finish(
        &mut self,
        refresh: &Refresh,
        outcome: Outcome,
        asked_at: Instant,
        current: Option<Token>,
        accepted: u32,
        (now, wall): (Instant, SystemTime),
    ) -> Option<Finished> {
        let is_late = !self.is_running(refresh);
        let finished = match outcome {
            Ok(_) if is_late && self.asked_at >= Some(asked_at) => None,
            Ok(token) if token.0.is_expired_by(GRACE, now) => {
                // Its access token is not used, but its refresh token is the one that has not been spent.
                let expires_at = token.expires_at();
                self.previous = Some(token.published(self.token_id(), expires_at, expires_at));
                let error = SourceError::invalid_response("the token had expired before it arrived");
                let (error, ..) = self.back_off(refresh, error, now);
                (!is_late).then(|| Finished::Failed(self.fail(refresh, error, current, now)))
            }
            Ok(token) => {
                let published = self.publish(token, asked_at, is_late, now, wall);
                if refresh.reason == RefreshReason::Challenged {
                    // If the starter is gone, no response to it will tell whether the API accepts the new token.
                    let starter_waits = !is_late && refresh.starter.strong_count() > 0;
                    let had_accepted = refresh
                        .previous
                        .as_ref()
                        .is_some_and(|previous| previous.id().generation == accepted);
                    self.challenged
                        .get_or_insert_with(|| Box::new(ChallengePause::new(self.config.cool_down)))
                        .begin(now, self.generation, starter_waits, had_accepted);
                }
                Some(published)
            }
            Err(_) if is_late => None,
            Err(error) => Some(Finished::Failed(self.fail(refresh, error, current, now))),
        };
        self.end(refresh);
        finished
    }

    fn token_id(&self) -> TokenId {
        TokenId { provider: self.provider, generation: self.generation }
    }

    fn publish(
        &mut self,
        token: Token,
        asked_at: Instant,
        is_late: bool,
        now: Instant,
        wall: SystemTime,
    ) -> Finished {
        let same = self.previous.as_ref().is_some_and(|previous| previous.has_same_access_token(&token));
        if !same {
            self.generation = self.generation.wrapping_add(1);
        }
        let left = token.expires_at().map(|at| at.saturating_duration_since(now));
        // While the source gives tokens that are about to expire, they are used, and it is asked less and less often.
        let postponed = left.filter(|left| *left < LEAST_LIFE).map(|_| self.next_delay());
        let grace = if postponed.is_some() { GRACE } else { Duration::ZERO };
        let expires_at = token.expires_at().and_then(|at| at.checked_add(grace));
        let took = now.saturating_duration_since(asked_at);
        let refresh_at = expires_at
            .map(|at| self.config.refresh_ahead.refresh_at(now, at.saturating_duration_since(now), took));
        let token = token.published(self.token_id(), expires_at, refresh_at);

        self.previous = Some(token.clone());
        self.published_at = Some((now, wall));
        self.asked_at = Some(asked_at);
        let is_first_postponed = !std::mem::replace(&mut self.is_postponed, postponed.is_some());
        self.not_before = postponed.and_then(|delay| now.checked_add(delay));
        if postponed.is_none() {
            self.backoff = None;
        }
        let is_first_same = !std::mem::replace(&mut self.is_same, same);
        let recovered = self.failures.take().and_then(|mut failures| {
            self.replaced.extend(failures.last_error);
            self.replaced.extend(failures.permanent.map(|permanent| permanent.error));
            failures.outage.end(now)
        });
        Finished::Published { token, same, is_first_same, postponed, is_first_postponed, recovered, is_late }
    }

    fn fail(&mut self, refresh: &Refresh, error: Error, current: Option<Token>, now: Instant) -> Failed {
        self.failed += u64::from(refresh.has_asked());
        let failures = self.failures.get_or_insert_default();
        self.replaced.extend(failures.last_error.replace(error.clone()));
        let mut cool_down = None;
        if !error.is_transient() && !matches!(error, Error::ShutDown) {
            let mut pause = match failures.permanent.take() {
                Some(Permanent { error, cool_down, .. }) => {
                    self.replaced.push(error);
                    cool_down
                }
                None => CoolDown::new(self.config.cool_down.0, self.config.cool_down.1),
            };
            cool_down = Some(pause.begin(now));
            failures.permanent =
                Some(Permanent { error: error.clone(), revision: refresh.revision, cool_down: pause });
        } else if !matches!(error, Error::Source(_)) {
            self.not_before = self.not_before.max(now.checked_add(AFTER_INTERRUPTION));
        }
        let left = match current.filter(|token| !token.0.is_expired(now)) {
            None => TokenLeft::None,
            Some(_) if refresh.current_reason.get() == RefreshReason::Challenged => TokenLeft::Challenged,
            Some(token) => TokenLeft::Works(token.remaining()),
        };
        let counted = failures.outage.refresh_failed(now, left, error.name());
        let is_needed = refresh.current_reason.is_needed();
        Failed { error, cool_down, left, is_needed, counted }
    }

    /// The permanent failure that callers get without a refresh, while its cool-down lasts.
    ///
    /// A new credential ends the cool-down: the failure was the old one's.
    fn permanent_error(&mut self, now: Instant, revision: u64) -> Option<Error> {
        let failures = self.failures.as_mut()?;
        let old = failures.permanent.take_if(|permanent| permanent.revision != revision);
        self.replaced.extend(old.map(|permanent| permanent.error));
        let permanent = failures.permanent.as_ref()?;
        permanent.cool_down.is_active(now).then(|| permanent.error.clone())
    }

    /// When the cool-down after the newest permanent failure ends or ended.
    fn cool_down_until(&self) -> Option<Instant> {
        self.failures.as_ref()?.permanent.as_ref()?.cool_down.until()
    }

    /// The current token with the life that is left by the wall clock, and the difference, if it is less than by the
    /// monotonic clock, which stands still while the machine is suspended.
    ///
    /// A wall clock can be set at will, so it only ever shortens a life.
    pub(super) fn compare_clocks(
        &mut self,
        current: Option<Token>,
        now: Instant,
        wall: SystemTime,
    ) -> Option<(Token, Duration)> {
        let (published_at, published_wall) = self.published_at?;
        let elapsed = now.saturating_duration_since(published_at);
        let jump = wall.duration_since(published_wall).unwrap_or_default().saturating_sub(elapsed);
        if jump <= CLOCK_SLACK {
            return None;
        }
        self.published_at = Some((now, wall));
        let token = current.filter(|token| token.expires_at().is_some())?.shortened(jump, now);
        self.previous = Some(token.clone());
        Some((token, jump))
    }

    /// Returns whether the provider was not shut down before.
    pub(super) fn shut_down(&mut self) -> bool {
        !std::mem::replace(&mut self.shut_down, true)
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

    /// Resolves at the end of the background task. `None` if it has ended, or is so late that nobody drives its runtime.
    pub(super) fn background_end(&self, now: Instant) -> Option<Waiter> {
        let Background { due, ended, .. } = self.background.as_deref()?;
        let runs = now <= *due + STALLED_AFTER && ended.clone().now_or_never().is_none();
        runs.then(|| ended.clone())
    }

    /// When the background task has to decide again if nothing changes before. `None` if a newer task has replaced it,
    /// because it was late.
    pub(super) fn background_runs_at(
        &mut self,
        number: u64,
        current: Option<&Token>,
        now: Instant,
    ) -> Option<Instant> {
        let cool_down_until = self.cool_down_until().filter(|until| now < *until);
        let at = match (&self.running, current) {
            // It ends before that, unless its runtime is not driven.
            (Some(running), _) => running.refresh.deadline.checked_add(AFTER_INTERRUPTION),
            _ if cool_down_until.is_some() => cool_down_until.min(now.checked_add(REVISION_TICK)),
            (None, Some(token)) if token.0.is_fresh(now) => token.refresh_at(),
            _ => self.not_before.max(now.checked_add(AFTER_INTERRUPTION)),
        };
        let background = self.background.as_mut().filter(|background| background.number == number)?;
        background.due = at.map_or(now + CLOCK_TICK, |at| at.min(now + CLOCK_TICK));
        Some(background.due)
    }

    /// Takes the errors that were replaced.
    pub(super) fn take_replaced(&mut self) -> Vec<Error> {
        std::mem::take(&mut self.replaced)
    }

    pub(super) fn status(&self, current: Option<&Token>, now: Instant) -> Status {
        let freshness = match current {
            None => Freshness::Missing,
            Some(token) if token.0.is_expired(now) => Freshness::Expired,
            Some(token) if token.0.is_fresh(now) => Freshness::Fresh,
            Some(_) => Freshness::Expiring,
        };
        let not_before = self.not_before.max(self.cool_down_until());
        Status {
            generation: self.generation.into(),
            freshness,
            remaining: current.and_then(Token::remaining),
            refreshing: self.running.is_some(),
            retry_in: not_before.map(|at| at.saturating_duration_since(now)).filter(|left| !left.is_zero()),
            refreshes: self.asked,
            failed_refreshes: self.failed,
            last_error: self.last_error(),
            #[cfg(feature = "store")]
            store: None,
            shut_down: self.shut_down,
        }
    }
}
