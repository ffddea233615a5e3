//! [`State`]: what is decided about refreshes, and what their ends change.
//!
//! Every decision is a function of what is passed in, made under the one lock of
//! [`SharedState`](super::shared_state::SharedState); no source, subscriber or waker runs in here.

use std::{
    ops::ControlFlow::{self, Break, Continue},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, SystemTime},
};

use tokio::{runtime, time::Instant};

use super::{
    challenge_pause::{ChallengePause, Part},
    cool_down::CoolDown,
    refresh_ahead::RefreshAhead,
    settings::Settings,
    status::{Freshness, Status},
};
use crate::{
    error::{Error, SourceError},
    observability::Span,
    retry::{Backoff, RetryPolicy},
    source::{CurrentReason, RefreshReason as Reason},
    token::{LEAST_LIFE, Token, TokenId},
};

/// The longest that a source's own wish to be left alone is followed.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);

/// How long the source is left alone after a refresh that was interrupted or timed out, of which no backoff was taken.
pub(super) const AFTER_INTERRUPTION: Duration = Duration::from_millis(100);

/// A token that arrives with less than [`LEAST_LIFE`] left is used until this long after its end, since it would otherwise
/// cost a refresh per request. If the API refuses it, its 401 says so.
const GRACE: Duration = Duration::from_secs(1);

/// How often a changed credential is looked for while the one before is refused.
const REVISION_TICK: Duration = Duration::from_secs(1);

/// Two clocks drift apart by this much without meaning anything.
const CLOCK_SLACK: Duration = Duration::from_secs(1);

/// What a refresh ends with; everyone who waits for it gets a clone.
pub(super) type Outcome = Result<Token, Error>;

/// `L` is what those who wait for a refresh hold.
pub(super) struct State<L> {
    provider: u32,
    refresh_ahead: RefreshAhead,
    retry: RetryPolicy,
    refresh_timeout: Duration,
    /// Set from the start of a refresh until it ends, or is abandoned.
    in_progress: Option<InProgress<L>>,
    shut_down: bool,
    generation: u32,
    /// The token published last, whatever has become of it: its refresh token is the next refresh's to spend.
    previous: Option<Token>,
    /// When that was, by both clocks.
    published_at: Option<(Instant, SystemTime)>,
    /// When the source was asked for it.
    asked_at: Option<Instant>,
    started: u64,
    failed: u64,
    last_error: Option<Error>,
    /// After a permanent failure: until when callers are told so at once.
    permanent: CoolDown,
    /// The failure that they are told, and the source's revision that it holds for.
    permanent_error: Option<(Error, u64)>,
    /// After a refresh that a challenge started: until when no other challenge starts one.
    challenged: ChallengePause,
    /// Goes on from refresh to refresh until one brings a token that is of use.
    backoff: Backoff,
    /// The source is not asked before this.
    not_before: Option<Instant>,
}

/// The refresh under way.
pub(super) struct InProgress<L> {
    landing: L,
    number: u64,
    /// When it ends by its own timeout. One that has not ended by then is on a runtime that nobody drives.
    deadline: Instant,
    /// The failure of its newest attempt.
    failure: Option<Error>,
    urgent: CurrentReason,
    reason: Reason,
    span: Option<Span>,
    /// Whether the request that started it waits to be sent again.
    starter_waits: bool,
    /// The runtime that it runs on.
    runtime: Option<runtime::Id>,
    /// The others, on which something ends it at its deadline.
    watched: Vec<runtime::Id>,
}

/// A refresh that was given up.
pub(super) struct Abandoned<L> {
    pub(super) landing: L,
    /// What its waiters are told.
    pub(super) error: Error,
    pub(super) reason: Reason,
    pub(super) span: Option<Span>,
}

/// A challenge to a token, and what its request did before.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Challenged {
    pub(crate) token: TokenId,
    /// What part the request took in the refresh that gave it this token.
    pub(crate) part: Part,
    /// Whether the request waits for another token, to be sent again.
    pub(crate) waits: bool,
}

/// Why a caller asks, and so which token will do.
#[derive(Clone, Copy)]
pub(super) enum Need {
    /// Any token that has not expired.
    Any,
    /// Any but this one, which the API has refused.
    OtherThan(Challenged),
    /// The current one still does, but is ageing.
    Ahead,
}

/// What a need comes to without a refresh of its own.
pub(super) enum Verdict<L> {
    /// This token will do.
    Use(Token),
    /// This token has replaced the refused one already.
    Replaced(Token, TokenId),
    /// The refresh under way, of this number, on this runtime, will tell.
    Join(L, u64, Option<runtime::Id>),
    /// The refresh under way, of this number, has not ended by its deadline: it is to be abandoned.
    Overdue(u64),
    /// There will be no refresh, since challenges have caused one only just now: the API refuses even the newest token.
    LeaveAlone(Token),
    /// Nobody waits, so the next refresh need not come before the backoff's end.
    Postpone(Token),
    /// The failure of the refresh before holds, without another.
    Tell(Error),
}

/// What the source gave.
pub(super) struct Fetched {
    pub(super) token: Token,
    /// When the source was asked for it.
    pub(super) asked_at: Instant,
}

/// Which refresh has ended.
#[derive(Clone, Copy)]
pub(super) struct Ended {
    pub(super) number: u64,
    pub(super) reason: Reason,
    /// The source's revision when it started.
    pub(super) revision: u64,
    /// The generation of the token that it was to renew.
    pub(super) previous: Option<u32>,
}

/// What a refresh's end has changed.
pub(super) enum Landed {
    Published {
        token: Token,
        /// The source gave the access token that it had given before.
        same: bool,
        /// How long the source is left alone, because the token is hardly of use.
        postponed: Option<Duration>,
    },
    Failed {
        error: Error,
        /// How long callers are told so without another refresh.
        cool_down: Option<Duration>,
    },
    /// The refresh was abandoned, and its outcome is not used.
    Late,
}

impl<L: Clone> State<L> {
    pub(super) fn new(settings: &Settings) -> Self {
        static PROVIDERS: AtomicU32 = AtomicU32::new(0);
        let (min, max) = settings.cool_down;
        Self {
            provider: PROVIDERS.fetch_add(1, Ordering::Relaxed).wrapping_add(1),
            refresh_ahead: settings.refresh_ahead,
            retry: settings.retry.clone(),
            refresh_timeout: settings.refresh_timeout,
            in_progress: None,
            shut_down: false,
            generation: 0,
            previous: None,
            published_at: None,
            asked_at: None,
            started: 0,
            failed: 0,
            last_error: None,
            permanent: CoolDown::new(min, max),
            permanent_error: None,
            challenged: ChallengePause::new(settings.cool_down),
            backoff: settings.retry.make_backoff(),
            not_before: None,
        }
    }

    /// What `need` comes to while `current` is the current token, which may have expired: why a refresh has to start, or
    /// what is the case without one. The newest token that the API has accepted is of the generation `accepted`.
    pub(super) fn decide(
        &mut self,
        need: Need,
        current: Option<Token>,
        accepted: u32,
        now: Instant,
        revision: u64,
    ) -> ControlFlow<Verdict<L>, Reason> {
        let without = if current.is_some() { Reason::Expired } else { Reason::Missing };
        let working = current.filter(|token| !token.0.is_expired(now));
        match (need, &working) {
            (Need::Any, Some(token)) => return Break(Verdict::Use(token.clone())),
            (Need::Ahead, Some(token)) if token.0.is_fresh(now) => {
                return Break(Verdict::Use(token.clone()));
            }
            (Need::OtherThan(challenged), Some(token)) if token.id() != challenged.token => {
                return Break(Verdict::Replaced(token.clone(), challenged.token));
            }
            _ => {}
        }
        if let Need::OtherThan(Challenged { token, part, .. }) = need {
            self.challenged.challenged_again(token.generation, part);
        }
        if let Some(refresh) = &self.in_progress {
            if now > refresh.deadline {
                return Break(Verdict::Overdue(refresh.number));
            }
            let reason = match need {
                Need::Ahead => Reason::Expiring,
                Need::OtherThan(_) => Reason::Challenged,
                Need::Any => without,
            };
            refresh.urgent.raise(reason);
            return Break(Verdict::Join(refresh.landing.clone(), refresh.number, refresh.runtime));
        }
        if self.shut_down {
            return Break(Verdict::Tell(Error::ShutDown));
        }
        if let Some(error) = self.permanent_error(now, revision) {
            return Break(Verdict::Tell(error));
        }
        match (need, working) {
            // Another token would fare no better, so the source is left alone.
            (Need::OtherThan(_), Some(token))
                if self.challenged.is_active(now, token.id().generation == accepted) =>
            {
                Break(Verdict::LeaveAlone(token))
            }
            (Need::OtherThan(_), Some(_)) => Continue(Reason::Challenged),
            (Need::Ahead, Some(token)) if self.not_before.is_some_and(|at| now < at) => {
                Break(Verdict::Postpone(token))
            }
            (_, Some(_)) => Continue(Reason::Expiring),
            (_, None) => Continue(without),
        }
    }

    /// A refresh starts, because of `need`, on `runtime`; returns its number, the token that it is to renew, and whether
    /// it is urgent.
    pub(super) fn take_off(
        &mut self,
        need: Need,
        reason: Reason,
        landing: L,
        runtime: Option<runtime::Id>,
        now: Instant,
    ) -> (u64, Option<Token>, CurrentReason) {
        self.started += 1;
        let urgent = CurrentReason::new(if matches!(need, Need::Ahead) { Reason::Expiring } else { reason });
        self.in_progress = Some(InProgress {
            landing,
            number: self.started,
            deadline: now + self.refresh_timeout,
            failure: None,
            urgent: urgent.clone(),
            reason,
            span: None,
            starter_waits: matches!(need, Need::OtherThan(Challenged { waits: true, .. })),
            runtime,
            watched: Vec::new(),
        });
        (self.started, self.previous.clone(), urgent)
    }

    fn in_progress(&mut self, number: u64) -> Option<&mut InProgress<L>> {
        self.in_progress.as_mut().filter(|refresh| refresh.number == number)
    }

    /// When the refresh has to be ended on `runtime`; `None` if something does so already, or it has ended.
    pub(super) fn watch(&mut self, number: u64, runtime: runtime::Id) -> Option<Instant> {
        let refresh = self.in_progress(number)?;
        if refresh.watched.contains(&runtime) {
            return None;
        }
        refresh.watched.push(runtime);
        Some(refresh.deadline)
    }

    /// Sets the span in which the end of the refresh is reported. Returns the span if the refresh has ended.
    ///
    /// Neither cloned nor dropped in here: both run the subscriber, which may ask for the provider's status.
    pub(super) fn set_span(&mut self, number: u64, span: Span) -> Option<Span> {
        match self.in_progress(number) {
            Some(refresh) => refresh.span.replace(span),
            None => Some(span),
        }
    }

    /// Whether the refresh may still ask the source: it has not been abandoned, and its time is not up.
    pub(super) fn may_ask(&mut self, number: u64, now: Instant) -> bool {
        self.in_progress(number).is_some_and(|refresh| now < refresh.deadline)
    }

    /// The request that started the refresh is gone: no answer to it will tell whether the refresh has healed it.
    pub(super) fn starter_is_gone(&mut self, number: u64) {
        if let Some(refresh) = self.in_progress(number) {
            refresh.starter_waits = false;
        }
    }

    /// Gives up a refresh that has not ended by its deadline, so that another can start.
    pub(super) fn abandon(&mut self, number: u64, now: Instant) -> Option<Abandoned<L>> {
        self.in_progress(number)?;
        let InProgress { landing, failure, reason, span, .. } = self.in_progress.take()?;
        let error = failure.unwrap_or(Error::TimedOut(self.refresh_timeout));
        // Transient, as every failure that a refresh goes on after: the revision of the source does not count.
        self.fail(error.clone(), 0, now);
        // By then its own timeout has ended it if its runtime is merely late: the source is not asked twice at a time.
        self.not_before = self.not_before.max(now.checked_add(AFTER_INTERRUPTION));
        Some(Abandoned { landing, error, reason, span })
    }

    /// What a refresh fails with whose time is up: what failed before says more than that the attempt after it was cut short.
    pub(super) fn timed_out(&mut self, number: u64) -> Error {
        let failure = self.in_progress(number).and_then(|refresh| refresh.failure.take());
        failure.unwrap_or(Error::TimedOut(self.refresh_timeout))
    }

    /// A request that took this part in the refresh for `token` has succeeded with it.
    pub(super) fn healed(&mut self, token: TokenId, part: Part) {
        self.challenged.healed(token.generation, part);
    }

    /// Until when the source is to be left alone, and the failure because of which it is.
    pub(super) fn not_before(&self) -> (Option<Instant>, Option<Error>) {
        (self.not_before, self.last_error.clone())
    }

    /// Puts off the next attempt of the refresh, by the backoff and by what the source asks for; returns by how much.
    pub(super) fn back_off(&mut self, number: u64, error: SourceError, now: Instant) -> (Error, Duration) {
        let asked = error.retry_after().unwrap_or_default().min(MAX_RETRY_AFTER);
        let error = Error::from(error);
        // What an abandoned refresh fails with says nothing of the source today.
        let Some(refresh) = self.in_progress(number) else { return (error, asked) };
        refresh.failure = Some(error.clone());
        let delay = asked + self.backoff.next_delay();
        self.not_before = now.checked_add(delay);
        self.last_error = Some(error.clone());
        (error, delay)
    }

    /// Ends a refresh: a failure takes no token away.
    ///
    /// One that was abandoned is of use only if it has brought a token that is newer than the one published last. What was
    /// kept of it is returned, to be dropped outside of the lock: its span's subscriber is foreign code.
    pub(super) fn land(
        &mut self,
        outcome: Result<Fetched, Error>,
        ended: Ended,
        accepted: u32,
        now: Instant,
        wall: SystemTime,
    ) -> (Landed, Option<InProgress<L>>) {
        let starter_waits = self.in_progress(ended.number).is_some_and(|refresh| refresh.starter_waits);
        let is_late = self.in_progress(ended.number).is_none();
        let landed = match outcome {
            Ok(fetched) if is_late && self.asked_at >= Some(fetched.asked_at) => Landed::Late,
            Ok(Fetched { token, .. }) if token.0.is_expired_by(GRACE, now) => {
                // Its refresh token is the one that counts; its access token takes the place of none.
                let id = TokenId { provider: self.provider, generation: self.generation };
                let expires_at = token.expires_at();
                self.previous = Some(token.published(id, expires_at, expires_at));
                let error = SourceError::invalid_response("the token had expired before it arrived");
                let (error, _) = self.back_off(ended.number, error, now);
                if is_late { Landed::Late } else { self.fail(error, ended.revision, now) }
            }
            Ok(fetched) => {
                let published = self.publish(fetched, now, wall);
                if let (Landed::Published { token, .. }, Reason::Challenged) = (&published, ended.reason) {
                    let had_accepted = ended.previous.is_some_and(|previous| previous == accepted);
                    self.challenged.begin(now, token.id().generation, starter_waits, had_accepted);
                }
                published
            }
            Err(_) if is_late => Landed::Late,
            Err(error) => self.fail(error, ended.revision, now),
        };
        (landed, self.in_progress.take_if(|refresh| refresh.number == ended.number))
    }

    fn publish(&mut self, fetched: Fetched, now: Instant, wall: SystemTime) -> Landed {
        let Fetched { token, asked_at } = fetched;
        let same = self.previous.as_ref().is_some_and(|previous| previous.has_same_access_token(&token));
        if !same {
            self.generation = self.generation.wrapping_add(1);
        }
        let left = token.expires_at().map(|at| at.saturating_duration_since(now));
        // The source is asked again later and later while its tokens are as good as expired, and they are used meanwhile.
        let postponed = left.filter(|left| *left < LEAST_LIFE).map(|_| self.backoff.next_delay());
        let grace = if postponed.is_some() { GRACE } else { Duration::ZERO };
        let expires_at = token.expires_at().and_then(|at| at.checked_add(grace));
        let took = now.saturating_duration_since(asked_at);
        let refresh_at =
            expires_at.map(|at| self.refresh_ahead.refresh_at(now, at.saturating_duration_since(now), took));
        let id = TokenId { provider: self.provider, generation: self.generation };
        let token = token.published(id, expires_at, refresh_at);

        self.previous = Some(token.clone());
        self.published_at = Some((now, wall));
        self.asked_at = Some(asked_at);
        self.last_error = None;
        self.permanent.reset();
        self.permanent_error = None;
        self.not_before = postponed.and_then(|delay| now.checked_add(delay));
        if postponed.is_none() {
            self.backoff = self.retry.make_backoff();
        }
        Landed::Published { token, same, postponed }
    }

    fn fail(&mut self, error: Error, revision: u64, now: Instant) -> Landed {
        self.failed += 1;
        self.last_error = Some(error.clone());
        let mut cool_down = None;
        if !error.is_transient() && !matches!(error, Error::ShutDown) {
            cool_down = Some(self.permanent.begin(now));
            self.permanent_error = Some((error.clone(), revision));
        } else if !matches!(error, Error::Source(_)) {
            self.not_before = self.not_before.max(now.checked_add(AFTER_INTERRUPTION));
        }
        Landed::Failed { error, cool_down }
    }

    /// The permanent failure that callers are told without a refresh, while its cool-down lasts.
    ///
    /// A new credential ends the cool-down: the failure was another's.
    fn permanent_error(&mut self, now: Instant, revision: u64) -> Option<Error> {
        let (error, failed_revision) = self.permanent_error.as_ref()?;
        if *failed_revision != revision {
            self.permanent.reset();
            self.permanent_error = None;
            return None;
        }
        self.permanent.is_active(now).then(|| error.clone())
    }

    /// By how much the current token's end is nearer than the monotonic clock says, which stands still while the machine
    /// is suspended. The wall clock may be set at will, so it only ever shortens a life.
    pub(super) fn clock_jump(&mut self, now: Instant, wall: SystemTime) -> Option<Duration> {
        let (published_at, published_wall) = self.published_at?;
        let elapsed = now.saturating_duration_since(published_at);
        let jump = wall.duration_since(published_wall).unwrap_or_default().saturating_sub(elapsed);
        if jump <= CLOCK_SLACK {
            return None;
        }
        self.published_at = Some((now, wall));
        Some(jump)
    }

    /// The token published last is another now, though its access token is the same.
    pub(super) fn replace_published(&mut self, token: &Token) {
        self.previous = Some(token.clone());
    }

    /// Returns whether it was not shut down before.
    pub(super) fn shut_down(&mut self) -> bool {
        !std::mem::replace(&mut self.shut_down, true)
    }

    pub(super) fn is_flying(&self) -> bool {
        self.in_progress.is_some()
    }

    /// When the background task has to decide again, if nothing changes before; `None` if only a change can tell.
    pub(super) fn look_again_at(&self, current: Option<&Token>, now: Instant) -> Option<Instant> {
        if let Some(refresh) = &self.in_progress {
            // It ends by itself before that, unless its runtime is not driven.
            return refresh.deadline.checked_add(AFTER_INTERRUPTION);
        }
        if self.permanent.is_active(now) {
            return self.permanent.until().min(now.checked_add(REVISION_TICK));
        }
        match current {
            Some(token) if token.0.is_fresh(now) => token.refresh_at(),
            _ => self.not_before.max(now.checked_add(AFTER_INTERRUPTION)),
        }
    }

    pub(super) fn status(&self, current: Option<&Token>, now: Instant) -> Status {
        let freshness = match current {
            None => Freshness::Missing,
            Some(token) if token.0.is_expired(now) => Freshness::Expired,
            Some(token) if token.0.is_fresh(now) => Freshness::Fresh,
            Some(_) => Freshness::Expiring,
        };
        let left_alone = self.not_before.max(self.permanent.until());
        Status {
            generation: self.generation.into(),
            freshness,
            remaining: current.and_then(Token::remaining),
            refreshing: self.in_progress.is_some(),
            retry_in: left_alone.map(|at| at.saturating_duration_since(now)).filter(|left| !left.is_zero()),
            refreshes: self.started,
            failed_refreshes: self.failed,
            last_error: self.last_error.clone(),
            shut_down: self.shut_down,
        }
    }
}
