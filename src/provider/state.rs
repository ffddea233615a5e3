//! [`State`]: what is decided about flights, and what their ends change.
//!
//! Every decision is a function of what is passed in, made under the one lock of
//! [`SharedState`](super::shared_state::SharedState); no source, subscriber or waker runs in here.

use std::{
    ops::ControlFlow::{self, Break, Continue},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, SystemTime},
};

use tokio::time::Instant;

use super::{
    cool_down::CoolDown,
    refresh_ahead::RefreshAhead,
    settings::Settings,
    status::{Freshness, Status},
};
use crate::{
    error::{Error, SourceError},
    retry::{Backoff, RetryPolicy},
    token::{LEAST_LIFE, Token, TokenId},
};

/// The longest that a source's own wish to be left alone is followed.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);

/// How long the source is left alone after a flight that was interrupted or timed out, of which no backoff was taken.
pub(super) const AFTER_INTERRUPTION: Duration = Duration::from_millis(100);

/// A token that is as good as expired is used for this long all the same, since it would otherwise cost a flight per
/// request. If the API refuses it, its 401 says so.
const GRACE: Duration = Duration::from_secs(1);

/// How often a changed credential is looked for while the one before is refused.
const REVISION_TICK: Duration = Duration::from_secs(1);

/// Two clocks drift apart by this much without meaning anything.
const CLOCK_SLACK: Duration = Duration::from_secs(1);

/// What a flight ends with; everyone who waits for it gets a clone.
pub(super) type Outcome = Result<Token, Error>;

/// `L` is what those who wait for a flight hold.
pub(super) struct State<L> {
    provider: u32,
    refresh_ahead: RefreshAhead,
    retry: RetryPolicy,
    /// Set from the start of a flight until it lands.
    in_progress: Option<L>,
    shut_down: bool,
    generation: u32,
    /// The token published last, whatever has become of it: its refresh token is the next flight's to spend.
    previous: Option<Token>,
    /// When that was, by both clocks.
    published_at: Option<(Instant, SystemTime)>,
    started: u64,
    failed: u64,
    last_error: Option<Error>,
    /// After a permanent failure: until when callers are told so at once.
    permanent: CoolDown,
    /// The failure that they are told, and the source's revision that it holds for.
    permanent_error: Option<(Error, u64)>,
    /// After a flight that a challenge caused: until when no other challenge may cause one.
    challenged: CoolDown,
    /// Goes on from flight to flight until one brings a token that is of use.
    backoff: Backoff,
    /// The source is not asked before this.
    not_before: Option<Instant>,
}

/// Why a caller asks, and so which token will do.
#[derive(Clone, Copy)]
pub(super) enum Need {
    /// Any token that has not expired.
    Any,
    /// Any but this one, which the API has refused.
    OtherThan(TokenId),
    /// The current one still does, but is ageing.
    Ahead,
}

/// Why a flight starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reason {
    /// There is no token.
    Missing,
    /// The current token has expired.
    Expired,
    /// The current token is about to expire.
    Ageing,
    /// The API has refused the current token.
    Refused,
}

impl Reason {
    /// As events and metrics show it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Expired => "expired",
            Self::Ageing => "ageing",
            Self::Refused => "refused",
        }
    }
}

/// What a need comes to without a flight of its own.
pub(super) enum Verdict<L> {
    /// This token will do.
    Use(Token),
    /// This token has replaced the refused one already.
    Replaced(Token, TokenId),
    /// The flight under way, of this number, will tell.
    Join(L, u64),
    /// There will be no flight, since challenges have caused one only just now: the API refuses even the newest token.
    LeaveAlone(Token),
    /// Nobody waits, so the next flight need not come before the backoff's end.
    Postpone(Token),
    /// The failure of the flight before holds, without another.
    Tell(Error),
}

/// What the source gave.
pub(super) struct Fetched {
    pub(super) token: Token,
    /// How long it took for it.
    pub(super) took: Duration,
}

/// What a flight's end has changed.
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
        /// How long callers are told so without another flight.
        cool_down: Option<Duration>,
    },
}

impl<L: Clone> State<L> {
    pub(super) fn new(settings: &Settings) -> Self {
        static PROVIDERS: AtomicU32 = AtomicU32::new(0);
        let (min, max) = settings.cool_down;
        Self {
            provider: PROVIDERS.fetch_add(1, Ordering::Relaxed).wrapping_add(1),
            refresh_ahead: settings.refresh_ahead,
            retry: settings.retry.clone(),
            in_progress: None,
            shut_down: false,
            generation: 0,
            previous: None,
            published_at: None,
            started: 0,
            failed: 0,
            last_error: None,
            permanent: CoolDown::new(min, max),
            permanent_error: None,
            challenged: CoolDown::new(min, max),
            backoff: settings.retry.make_backoff(),
            not_before: None,
        }
    }

    /// What `need` comes to while `current` is the current token, which may have expired: why a flight has to start, or
    /// what is the case without one.
    pub(super) fn decide(
        &mut self,
        need: Need,
        current: Option<Token>,
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
            (Need::OtherThan(refused), Some(token)) if token.id() != refused => {
                return Break(Verdict::Replaced(token.clone(), refused));
            }
            _ => {}
        }
        if let Some(flight) = &self.in_progress {
            return Break(Verdict::Join(flight.clone(), self.started));
        }
        if self.shut_down {
            return Break(Verdict::Tell(Error::ShutDown));
        }
        if let Some(error) = self.permanent_error(now, revision) {
            return Break(Verdict::Tell(error));
        }
        match (need, working) {
            // Another token would fare no better, so the source is left alone.
            (Need::OtherThan(_), Some(token)) if self.challenged.is_active(now) => {
                Break(Verdict::LeaveAlone(token))
            }
            (Need::OtherThan(_), Some(_)) => Continue(Reason::Refused),
            (Need::Ahead, Some(token)) if self.not_before.is_some_and(|at| now < at) => {
                Break(Verdict::Postpone(token))
            }
            (_, Some(_)) => Continue(Reason::Ageing),
            (_, None) => Continue(without),
        }
    }

    /// A flight starts, whose landing is told to `flight`; returns its number and the token that it is to renew.
    pub(super) fn take_off(&mut self, flight: L) -> (u64, Option<Token>) {
        self.in_progress = Some(flight);
        self.started += 1;
        (self.started, self.previous.clone())
    }

    /// Until when the source is to be left alone, and the failure because of which it is.
    pub(super) fn not_before(&self) -> (Option<Instant>, Option<Error>) {
        (self.not_before, self.last_error.clone())
    }

    /// Puts off the next attempt, by the backoff and by what the source asks for; returns by how much.
    pub(super) fn back_off(&mut self, error: SourceError, now: Instant) -> (Error, Duration) {
        let asked = error.retry_after().unwrap_or_default().min(MAX_RETRY_AFTER);
        let delay = asked + self.backoff.next_delay();
        self.not_before = now.checked_add(delay);
        let error = Error::from(error);
        self.last_error = Some(error.clone());
        (error, delay)
    }

    /// Ends a flight that started for `reason`: a failure takes no token away.
    pub(super) fn land(
        &mut self,
        outcome: Result<Fetched, Error>,
        reason: Reason,
        revision: u64,
        now: Instant,
        wall: SystemTime,
    ) -> Landed {
        self.in_progress = None;
        match outcome {
            Ok(fetched) => self.publish(fetched, reason, now, wall),
            Err(error) => self.fail(error, revision, now),
        }
    }

    fn publish(&mut self, fetched: Fetched, reason: Reason, now: Instant, wall: SystemTime) -> Landed {
        let Fetched { token, took } = fetched;
        let same = self.previous.as_ref().is_some_and(|previous| previous.has_same_access_token(&token));
        if !same {
            self.generation = self.generation.wrapping_add(1);
        }
        let left = token.expires_at().map(|at| at.saturating_duration_since(now));
        // The source is asked again later and later while its tokens are as good as expired, and they are used meanwhile.
        let postponed = left.filter(|left| *left < LEAST_LIFE).map(|_| self.backoff.next_delay());
        let life = left.map(|left| postponed.map_or(left, |delay| delay.max(GRACE)));
        let id = TokenId { provider: self.provider, generation: self.generation };
        let expires_at = life.map(|life| now + life);
        let ageing_at = life.map(|life| self.refresh_ahead.ageing_at(now, life, took));
        let token = token.published(id, expires_at, ageing_at);

        self.previous = Some(token.clone());
        self.published_at = Some((now, wall));
        self.last_error = None;
        self.permanent.reset();
        self.permanent_error = None;
        self.not_before = postponed.and_then(|delay| now.checked_add(delay));
        if postponed.is_none() {
            self.backoff = self.retry.make_backoff();
        }
        if reason == Reason::Refused {
            self.challenged.begin(now);
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

    /// The permanent failure that callers are told without a flight, while its cool-down lasts.
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
        if self.in_progress.is_some() {
            return None;
        }
        if self.permanent.is_active(now) {
            return self.permanent.until().min(now.checked_add(REVISION_TICK));
        }
        match current {
            Some(token) if token.0.is_fresh(now) => token.ageing_at(),
            _ => self.not_before.max(now.checked_add(AFTER_INTERRUPTION)),
        }
    }

    pub(super) fn status(&self, current: Option<&Token>, now: Instant) -> Status {
        let freshness = match current {
            None => Freshness::Missing,
            Some(token) if token.0.is_expired(now) => Freshness::Expired,
            Some(token) if token.0.is_fresh(now) => Freshness::Fresh,
            Some(_) => Freshness::Ageing,
        };
        let left_alone = self.not_before.max(self.permanent.until());
        Status {
            generation: self.generation.into(),
            freshness,
            remaining: current.and_then(Token::remaining),
            refreshing: self.in_progress.is_some(),
            retry_in: left_alone.map(|at| at.saturating_duration_since(now)).filter(|left| !left.is_zero()),
            flights: self.started,
            failed_flights: self.failed,
            last_error: self.last_error.clone(),
            shut_down: self.shut_down,
        }
    }
}
