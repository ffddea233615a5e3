//! [`Core`]: the current token, the state behind its one lock, and the source; what all handles of a provider share.
//!
//! The happy path takes no lock: [`Current`](super::current::Current) reads the current token with one atomic load.

use std::{
    future::Future,
    ops::ControlFlow,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwapOption;
use futures_util::FutureExt;
use tokio::{
    runtime::Handle,
    sync::{oneshot, watch},
    time::{Instant, timeout, timeout_at},
};

use super::{
    flight::Flight,
    keeper::Keeper,
    settings::Settings,
    state::{Fetched, Landed, Landing, Need, Outcome, Reason, State, Verdict},
    status::Status,
};
use crate::{
    error::{Error, SourceError},
    observability::Reporter,
    scope::Scope,
    source::{DynTokenSource, TokenSource},
    token::{self, Token},
};

/// Resolves with the outcome of a flight, or with what was decided without one.
pub(crate) enum Waiting {
    Decided(Option<Outcome>),
    Flight(Landing),
}

impl Future for Waiting {
    type Output = Outcome;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Outcome> {
        match &mut *self {
            Self::Decided(outcome) => Poll::Ready(outcome.take().unwrap_or(Err(Error::Interrupted))),
            // A flight always sends; were its sender lost, so would be the flight.
            Self::Flight(landing) => {
                Pin::new(landing).poll(cx).map(|outcome| outcome.unwrap_or(Err(Error::Interrupted)))
            }
        }
    }
}

pub(super) struct Core {
    current: ArcSwapOption<token::Inner>,
    state: Mutex<State>,
    /// Marked at every change of the state; true once the provider is shut down.
    changes: watch::Sender<bool>,
    /// Whether the background task runs.
    keeping: AtomicBool,
    pub(super) source: Box<dyn DynTokenSource>,
    pub(super) settings: Settings,
    pub(super) reporter: Reporter,
    /// Which origins the source's tokens are meant for.
    pub(super) scope: Scope,
    /// `SystemTime::now`, which tests replace.
    wall_clock: fn() -> SystemTime,
}

impl Core {
    pub(super) fn new(source: impl TokenSource, settings: Settings) -> Self {
        Self::with_wall_clock(source, settings, SystemTime::now)
    }

    pub(super) fn with_wall_clock(
        source: impl TokenSource,
        settings: Settings,
        wall_clock: fn() -> SystemTime,
    ) -> Self {
        Self {
            current: ArcSwapOption::empty(),
            state: Mutex::new(State::new(&settings)),
            changes: watch::Sender::new(false),
            keeping: AtomicBool::new(false),
            scope: source.scope(),
            source: Box::new(source),
            reporter: Reporter::new(&settings.name),
            settings,
            wall_clock,
        }
    }

    /// Where tokens are published.
    #[inline]
    pub(super) fn current(&self) -> &ArcSwapOption<token::Inner> {
        &self.current
    }

    /// The token as it was published last, whatever has become of it.
    fn published(&self) -> Option<Token> {
        self.current.load_full().map(Token)
    }

    /// The current token, unless it has expired.
    pub(super) fn working(&self) -> Option<Token> {
        self.published().filter(|token| !token.0.is_expired(Instant::now()))
    }

    /// The current token, unless it has expired; one that is ageing is renewed behind the caller's back.
    pub(super) fn usable(self: &Arc<Self>) -> Option<Token> {
        self.published().filter(|token| token.0.is_fresh_now() || self.renew_ahead(&token.0))
    }

    /// Whether a token that is not fresh will do all the same; if so, it is renewed behind the caller's back.
    ///
    /// The answer is of this very token: another may have been published since it was read.
    #[cold]
    pub(super) fn renew_ahead(self: &Arc<Self>, token: &token::Inner) -> bool {
        let will_do = !token.is_expired(Instant::now());
        if will_do {
            self.obtain(Need::Ahead);
        }
        will_do
    }

    /// What `need` comes to, without waiting longer than for the flight that it joins or starts.
    ///
    /// The flight, if one is to start, has started when this returns: dropping the future does not stop it.
    pub(super) fn obtain(self: &Arc<Self>, need: Need) -> Waiting {
        self.keep();
        let now = Instant::now();
        let revision = self.source.revision();
        let mut state = self.lock();
        // Read under the lock, which every publication holds: a flight that has just landed is not flown again.
        let reason = match state.decide(need, self.published(), now, revision) {
            ControlFlow::Continue(reason) => reason,
            ControlFlow::Break(verdict) => {
                drop(state);
                return self.decided(verdict);
            }
        };
        let Ok(runtime) = Handle::try_current() else {
            return Waiting::Decided(Some(Err(Error::NoRuntime)));
        };
        let (sender, receiver) = oneshot::channel();
        let landing = receiver.shared();
        let (number, previous) = state.take_off(landing.clone());
        drop(state);
        self.changed();
        let flight = Flight::new(Arc::clone(self), sender, number, reason, revision);
        // Not under the lock: a runtime that is shutting down drops the flight at once, which lands it.
        runtime.spawn(flight.fly(previous));
        Waiting::Flight(landing)
    }

    /// What was decided without a flight.
    fn decided(&self, verdict: Verdict) -> Waiting {
        let outcome = match verdict {
            Verdict::Join(landing, number) => {
                self.reporter.joined(number);
                return Waiting::Flight(landing);
            }
            Verdict::Use(token) => Ok(token),
            Verdict::Replaced(token, refused) => {
                self.reporter.replaced_already(refused, &token);
                Ok(token)
            }
            Verdict::LeaveAlone(token) => {
                self.reporter.left_alone(&token);
                Ok(token)
            }
            Verdict::Postpone(token) => {
                self.reporter.used_meanwhile(&token);
                Ok(token)
            }
            Verdict::Tell(error) => {
                self.reporter.told_again(&error);
                Err(error)
            }
        };
        Waiting::Decided(Some(outcome))
    }

    /// Ends a flight: publishes its token, or notes its failure, which never takes a token away.
    pub(super) fn land(&self, outcome: Result<Fetched, Error>, reason: Reason, revision: u64) -> Landed {
        let wall = (self.wall_clock)();
        let mut state = self.lock();
        let landed = state.land(outcome, reason, revision, Instant::now(), wall);
        if let Landed::Published { token, .. } = &landed {
            self.current.store(Some(Arc::clone(&token.0)));
        }
        drop(state);
        self.changed();
        landed
    }

    /// Puts off the next attempt of the flight under way; returns by how much.
    pub(super) fn back_off(&self, error: SourceError) -> (Error, Duration) {
        let put_off = self.lock().back_off(error, Instant::now());
        self.changed();
        put_off
    }

    /// Until when the source is to be left alone, and the failure because of which it is.
    pub(super) fn not_before(&self) -> (Option<Instant>, Option<Error>) {
        self.lock().not_before()
    }

    /// Waits until `at`; true if the provider was shut down meanwhile.
    pub(super) async fn is_shut_down_before(&self, at: Instant) -> bool {
        let mut changes = self.changes();
        timeout_at(at, changes.wait_for(|shut_down| *shut_down)).await.is_ok()
    }

    /// Drops the current token; its refresh token is kept for the next flight.
    pub(super) fn invalidate(&self) {
        let state = self.lock();
        let invalidated = self.current.swap(None);
        drop(state);
        if let Some(token) = invalidated {
            self.changed();
            self.reporter.invalidated(&Token(token));
        }
    }

    /// Shortens the current token's life by what the monotonic clock has not seen pass.
    pub(super) fn compare_clocks(&self) {
        let (now, wall) = (Instant::now(), (self.wall_clock)());
        let mut state = self.lock();
        let Some(jump) = state.clock_jump(now, wall) else { return };
        let Some(token) = self.published().filter(|token| token.expires_at().is_some()) else { return };
        let token = token.shortened(jump, now);
        state.replace_published(&token);
        self.current.store(Some(Arc::clone(&token.0)));
        drop(state);
        self.changed();
        self.reporter.shortened(&token, jump);
    }

    /// No flight starts from now on, none waits for its next attempt, and the background task ends.
    pub(super) fn shut_down(&self) {
        if self.lock().shut_down() {
            self.changes.send_replace(true);
            self.reporter.shut_down();
        }
    }

    /// Waits until no flight is under way, and the background task has ended.
    ///
    /// No longer than a flight takes: the runtime of either may be one that nobody drives any more.
    pub(super) async fn at_rest(&self) {
        let mut changes = self.changes();
        let at_rest = async {
            while self.lock().is_flying() || self.keeping.load(Ordering::Acquire) {
                // The sender is `self`'s own.
                let _ = changes.changed().await;
            }
        };
        let _ = timeout(self.settings.refresh_timeout, at_rest).await;
    }

    /// Starts the background task if there is to be one, and it does not run.
    pub(super) fn keep(self: &Arc<Self>) {
        if !self.settings.keep_fresh || self.keeping.load(Ordering::Acquire) || *self.changes.borrow() {
            return;
        }
        let Ok(runtime) = Handle::try_current() else { return };
        if !self.keeping.swap(true, Ordering::AcqRel) {
            runtime.spawn(Keeper::of(self).keep());
        }
    }

    pub(super) fn kept(&self) {
        self.keeping.store(false, Ordering::Release);
        self.changed();
    }

    /// When the background task has to decide again, if nothing changes before.
    pub(super) fn look_again_at(&self) -> Option<Instant> {
        let state = self.lock();
        state.look_again_at(self.published().as_ref(), Instant::now())
    }

    pub(super) fn changes(&self) -> watch::Receiver<bool> {
        self.changes.subscribe()
    }

    /// Wakes whoever waits for a change. Not under the lock: wakers are others' code.
    fn changed(&self) {
        self.changes.send_modify(|_| {});
    }

    pub(super) fn status(&self) -> Status {
        let state = self.lock();
        state.status(self.published().as_ref(), Instant::now())
    }

    /// A panic cannot leave the state half changed, so a poisoned lock is as good as any.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
