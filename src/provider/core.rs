//! [`Core`]: the shared state, the source, and what starts and ends with them; what all handles of a provider share.
//!
//! The happy path takes no lock: [`Current`](super::current::Current) reads the current token with one atomic load.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwapOption;
use tokio::{
    runtime::Handle,
    sync::watch,
    time::{Instant, timeout, timeout_at},
};

use super::{
    flight::Flight,
    keeper::Keeper,
    landing::{Landing, Waiter},
    settings::Settings,
    shared_state::{Decision, SharedState, TakeOff},
    state::{Fetched, Landed, Need, Outcome, Reason, State, Verdict},
    status::Status,
};
use crate::{
    error::{Error, SourceError},
    observability::Reporter,
    scope::Scope,
    source::DynTokenSource,
    token::{self, Token},
};

/// Resolves with the outcome of a flight, or with what was decided without one.
pub(crate) struct Waiting(For);

enum For {
    Decided(Option<Outcome>),
    Flight(Waiter),
}

impl Future for Waiting {
    type Output = Outcome;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Outcome> {
        match &mut self.0 {
            For::Decided(outcome) => Poll::Ready(outcome.take().unwrap_or(Err(Error::Interrupted))),
            For::Flight(waiter) => Pin::new(waiter).poll(cx),
        }
    }
}

pub(super) struct Core {
    shared: SharedState<Landing>,
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
    pub(super) fn new(source: Box<dyn DynTokenSource>, settings: Settings) -> Self {
        Self::with_wall_clock(source, settings, SystemTime::now)
    }

    pub(super) fn with_wall_clock(
        source: Box<dyn DynTokenSource>,
        settings: Settings,
        wall_clock: fn() -> SystemTime,
    ) -> Self {
        Self {
            shared: SharedState::new(&settings),
            changes: watch::Sender::new(false),
            keeping: AtomicBool::new(false),
            scope: source.scope(),
            source,
            reporter: Reporter::new(&settings.name),
            settings,
            wall_clock,
        }
    }

    /// Where tokens are published.
    #[inline]
    pub(super) fn current(&self) -> &ArcSwapOption<token::Inner> {
        self.shared.slot()
    }

    /// The current token, unless it has expired.
    pub(super) fn working(&self) -> Option<Token> {
        self.shared.published().filter(|token| !token.0.is_expired(Instant::now()))
    }

    /// The current token, unless it has expired; one that is ageing is renewed behind the caller's back.
    pub(super) fn usable(self: &Arc<Self>) -> Option<Token> {
        self.shared.published().filter(|token| token.0.is_fresh_now() || self.renew_ahead(&token.0))
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
        let revision = self.source.revision();
        let mut flown = None;
        let decision = self.shared.decide(need, Instant::now(), revision, || {
            let runtime = Handle::try_current().ok()?;
            flown = Some(runtime);
            Some(Landing::new())
        });
        let take_off = match decision {
            Decision::Settled(verdict) => return self.settled(verdict),
            Decision::Grounded => return Waiting(For::Decided(Some(Err(Error::NoRuntime)))),
            Decision::Fly(take_off) => take_off,
        };
        self.changed();
        let TakeOff { number, reason, previous, landing } = take_off;
        let waiter = landing.wait();
        if let Some(runtime) = flown {
            let flight = Flight::new(Arc::clone(self), landing, number, reason, revision);
            // Not under the lock: a runtime that is shutting down drops the flight at once, which lands it.
            runtime.spawn(flight.fly(previous));
        }
        Waiting(For::Flight(waiter))
    }

    /// What was decided without a flight.
    fn settled(&self, verdict: Verdict<Landing>) -> Waiting {
        let outcome = match verdict {
            Verdict::Join(landing, number) => {
                self.reporter.joined(number);
                return Waiting(For::Flight(landing.wait()));
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
        Waiting(For::Decided(Some(outcome)))
    }

    /// Ends a flight; whoever waits for a change is told.
    pub(super) fn land(&self, outcome: Result<Fetched, Error>, reason: Reason, revision: u64) -> Landed {
        let landed = self.shared.land(outcome, reason, revision, Instant::now(), (self.wall_clock)());
        self.changed();
        landed
    }

    /// Puts off the next attempt of the flight under way; returns by how much.
    pub(super) fn back_off(&self, error: SourceError) -> (Error, Duration) {
        let put_off = self.shared.with(|state| state.back_off(error, Instant::now()));
        self.changed();
        put_off
    }

    /// Until when the source is to be left alone, and the failure because of which it is.
    pub(super) fn not_before(&self) -> (Option<Instant>, Option<Error>) {
        self.shared.with(|state| state.not_before())
    }

    /// Waits until `at`; true if the provider was shut down meanwhile.
    pub(super) async fn is_shut_down_before(&self, at: Instant) -> bool {
        let mut changes = self.changes();
        timeout_at(at, changes.wait_for(|shut_down| *shut_down)).await.is_ok()
    }

    /// Drops the current token; its refresh token is kept for the next flight.
    pub(super) fn invalidate(&self) {
        if let Some(token) = self.shared.invalidate() {
            self.changed();
            self.reporter.invalidated(&token);
        }
    }

    /// Shortens the current token's life by what the monotonic clock has not seen pass.
    pub(super) fn compare_clocks(&self) {
        if let Some((token, jump)) = self.shared.compare_clocks(Instant::now(), (self.wall_clock)()) {
            self.changed();
            self.reporter.shortened(&token, jump);
        }
    }

    /// No flight starts from now on, none waits for its next attempt, and the background task ends.
    pub(super) fn shut_down(&self) {
        if self.shared.with(State::shut_down) {
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
            while self.shared.with(|state| state.is_flying()) || self.keeping.load(Ordering::Acquire) {
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
        self.shared.with(|state| state.look_again_at(self.shared.published().as_ref(), Instant::now()))
    }

    pub(super) fn changes(&self) -> watch::Receiver<bool> {
        self.changes.subscribe()
    }

    /// Wakes whoever waits for a change. Not under the lock: wakers are others' code.
    fn changed(&self) {
        self.changes.send_modify(|_| {});
    }

    pub(super) fn status(&self) -> Status {
        self.shared.with(|state| state.status(self.shared.published().as_ref(), Instant::now()))
    }
}
