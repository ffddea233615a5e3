//! [`Core`]: the shared state, the source, and what starts and ends with them; what all handles of a provider share.
//!
//! The happy path takes no lock: [`Current`](super::current::Current) reads the current token with one atomic load.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwapOption;
use tokio::{
    runtime::{self, Handle},
    sync::watch,
    time::{Instant, timeout, timeout_at},
};

use super::{
    challenge_pause::Part,
    keeper::{InCharge, Keeper},
    landing::{Landing, Waiter},
    refresh::Flight,
    settings::Settings,
    shared_state::{Decision, SharedState, TakeOff},
    state::{Abandoned, Ended, Fetched, Landed, Need, Outcome, State, Verdict},
    status::Status,
};
use crate::{
    error::{Error, SourceError},
    observability::{self, Reporter},
    origins::AllowedOrigins,
    source::DynTokenSource,
    token::{self, Token, TokenId},
};

/// Resolves with the outcome of a refresh, or with what was decided without one.
pub(crate) struct Waiting(For);

enum For {
    Decided(Option<Outcome>),
    Flight {
        waiter: Waiter,
        part: Part,
        /// Whether the caller has not had the outcome yet.
        waits: bool,
        core: Arc<Core>,
        number: u64,
        /// A runtime on which the refresh is sure to be over by its deadline; its own, where its timeout ends it.
        watched_on: Option<runtime::Id>,
    },
}

impl Waiting {
    fn on(
        core: &Arc<Core>,
        landing: &Landing,
        number: u64,
        runtime: Option<runtime::Id>,
        part: Part,
    ) -> Self {
        let (core, waiter) = (Arc::clone(core), landing.wait());
        Self(For::Flight { waiter, part, waits: true, core, number, watched_on: runtime })
    }

    /// What part the caller has in the refresh.
    pub(crate) fn part(&self) -> Part {
        match &self.0 {
            For::Decided(_) => Part::None,
            For::Flight { part, .. } => *part,
        }
    }
}

impl Future for Waiting {
    type Output = Outcome;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Outcome> {
        match &mut self.0 {
            For::Decided(outcome) => Poll::Ready(outcome.take().unwrap_or(Err(Error::Interrupted))),
            For::Flight { waiter, waits, core, number, watched_on, .. } => {
                match Pin::new(&mut *waiter).poll(cx) {
                    Poll::Ready(outcome) => {
                        *waits = false;
                        Poll::Ready(outcome.unwrap_or(Err(Error::Interrupted)))
                    }
                    Poll::Pending => {
                        core.watch(waiter, *number, watched_on);
                        Poll::Pending
                    }
                }
            }
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let For::Flight { part: Part::Started, waits: true, core, number, .. } = &self.0 {
            core.shared.with(|state| state.starter_is_gone(*number));
        }
    }
}

pub(super) struct Core {
    shared: SharedState<Landing>,
    /// Marked at every change of the state; true once the provider is shut down.
    changes: watch::Sender<bool>,
    /// Which background task keeps the token fresh.
    keeping: Mutex<InCharge>,
    pub(super) source: Box<dyn DynTokenSource>,
    pub(super) settings: Settings,
    pub(super) reporter: Reporter,
    /// Which origins the source's tokens are meant for.
    pub(super) scope: AllowedOrigins,
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
            keeping: Mutex::default(),
            scope: source.allowed_origins(),
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

    /// What `need` comes to, without waiting longer than for the refresh that it joins or starts.
    ///
    /// The refresh, if one is to start, has started when this returns: dropping the future does not stop it.
    pub(super) fn obtain(self: &Arc<Self>, need: Need) -> Waiting {
        self.keep();
        let revision = self.source.revision();
        loop {
            let now = Instant::now();
            let mut flown = None;
            let decision = self.shared.decide(need, now, revision, || {
                let runtime = Handle::try_current().ok()?;
                let id = runtime.id();
                flown = Some(runtime);
                Some((Landing::new(), Some(id)))
            });
            let TakeOff { number, reason, previous, urgent, landing } = match decision {
                Decision::Settled(Verdict::Overdue(number)) => {
                    self.abandon(number);
                    continue;
                }
                Decision::Settled(verdict) => return self.settled(verdict),
                Decision::Grounded => return Waiting(For::Decided(Some(Err(Error::NoRuntime)))),
                Decision::Fly(take_off) => take_off,
            };
            let runtime_id = flown.as_ref().map(Handle::id);
            let waiter = landing.wait();
            let waiting = Waiting::on(self, &landing, number, runtime_id, Part::Started);
            let previous_generation = previous.as_ref().map(|token| token.id().generation);
            let flying = Ended { number, reason, revision, previous: previous_generation };
            // Before any foreign code runs: should it panic, the drop of this ends the refresh.
            let refresh = Flight::new(Arc::clone(self), landing, flying, urgent, now);
            self.changed();
            let span = self.reporter.refresh(number, reason.name(), previous.as_ref());
            let its_own = span.clone();
            let _dropped_unlocked = self.shared.with(|state| state.set_span(number, its_own));
            if let Some(runtime) = flown {
                self.end_at_its_deadline(&runtime, &waiter, number, refresh.deadline());
                // Not under the lock: a runtime that is shutting down drops the refresh at once, which lands it.
                runtime.spawn(observability::within(span, refresh.fly(previous)));
            }
            return waiting;
        }
    }

    /// Makes sure that the refresh is over by its deadline for those who wait for it on this runtime.
    ///
    /// What ends it on its own runtime does not run while that is not driven, such as one for the current thread after
    /// `block_on` has returned. So the first who waits on another runtime has it ended there.
    fn watch(self: &Arc<Self>, waiter: &Waiter, number: u64, watched_on: &mut Option<runtime::Id>) {
        let Ok(runtime) = Handle::try_current() else { return };
        let id = runtime.id();
        if watched_on.replace(id) == Some(id) {
            return;
        }
        if let Some(deadline) = self.shared.with(|state| state.watch(number, id)) {
            self.end_at_its_deadline(&runtime, waiter, number, deadline);
        }
    }

    /// Has the refresh abandoned by a task on `runtime` if it has not ended by its deadline.
    ///
    /// On its own runtime as well: a source that blocks its thread keeps the refresh from its own timeout.
    fn end_at_its_deadline(
        self: &Arc<Self>,
        runtime: &Handle,
        waiter: &Waiter,
        number: u64,
        deadline: Instant,
    ) {
        let (core, waiter) = (Arc::downgrade(self), waiter.clone());
        runtime.spawn(async move {
            if timeout_at(deadline, waiter).await.is_err() {
                if let Some(core) = core.upgrade() {
                    core.abandon(number);
                }
            }
        });
    }

    /// Gives up a refresh that has not ended by its deadline, if it still has not.
    fn abandon(&self, number: u64) {
        let Some(abandoned) = self.shared.with(|state| state.abandon(number, Instant::now())) else {
            return;
        };
        self.changed();
        let Abandoned { landing, error, reason, span } = abandoned;
        observability::report_within(span, || {
            self.reporter.failed(&error, reason.name(), None, self.settings.refresh_timeout);
        });
        landing.land(Err(error));
    }

    /// What was decided without a refresh.
    fn settled(self: &Arc<Self>, verdict: Verdict<Landing>) -> Waiting {
        let outcome = match verdict {
            Verdict::Join(landing, number, runtime) => {
                self.reporter.joined(number);
                return Waiting::on(self, &landing, number, runtime, Part::Joined);
            }
            Verdict::Overdue(_) => Err(Error::Interrupted),
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

    /// Ends a refresh; whoever waits for a change is told.
    pub(super) fn land(&self, outcome: Result<Fetched, Error>, ended: Ended) -> Landed {
        let landed = self.shared.land(outcome, ended, Instant::now(), (self.wall_clock)());
        self.changed();
        landed
    }

    /// Whether the refresh may still ask the source.
    pub(super) fn may_ask(&self, number: u64) -> bool {
        self.shared.with(|state| state.may_ask(number, Instant::now()))
    }

    /// What a refresh fails with whose time is up.
    pub(super) fn timed_out(&self, number: u64) -> Error {
        self.shared.with(|state| state.timed_out(number))
    }

    /// The generation of the newest token that the API has accepted; 0 for none.
    #[inline]
    pub(super) fn accepted(&self) -> u32 {
        self.shared.accepted()
    }

    /// The API has accepted a token.
    pub(super) fn accept(&self, token: TokenId) {
        self.shared.accept(token.generation);
    }

    /// A request that was challenged has succeeded with the token of a refresh in which it had this part.
    pub(super) fn healed(&self, token: TokenId, part: Part) {
        self.shared.with(|state| state.healed(token, part));
    }

    /// Puts off the next attempt of the refresh; returns by how much.
    pub(super) fn back_off(&self, number: u64, error: SourceError) -> (Error, Duration) {
        let put_off = self.shared.with(|state| state.back_off(number, error, Instant::now()));
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

    /// Drops the current token; its refresh token is kept for the next refresh.
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

    /// No refresh starts from now on, none waits for its next attempt, and the background task ends.
    pub(super) fn shut_down(&self) {
        if self.shared.with(State::shut_down) {
            self.changes.send_replace(true);
            self.reporter.shut_down();
        }
    }

    /// Waits until no refresh is under way, and the background task has ended.
    ///
    /// No longer than a refresh takes: the runtime of either may be one that nobody drives any more.
    pub(super) async fn at_rest(&self) {
        let mut changes = self.changes();
        let at_rest = async {
            while self.shared.with(|state| state.is_flying()) || self.keeping().runs(Instant::now()) {
                // The sender is `self`'s own.
                let _ = changes.changed().await;
            }
        };
        let _ = timeout(self.settings.refresh_timeout, at_rest).await;
    }

    /// Starts the background task if there is to be one, and none runs.
    pub(super) fn keep(self: &Arc<Self>) {
        if !self.settings.keep_fresh || *self.changes.borrow() {
            return;
        }
        let Ok(runtime) = Handle::try_current() else { return };
        let started = self.keeping().start(Instant::now());
        if let Some(number) = started {
            runtime.spawn(Keeper::of(self, number).keep());
        }
    }

    /// The background task `number` runs, and runs again when it is `due`; false if another has taken its place.
    pub(super) fn goes_on_keeping(&self, number: u64, due: Instant) -> bool {
        self.keeping().go_on(number, due)
    }

    pub(super) fn kept(&self, number: u64) {
        self.keeping().end(number);
        self.changed();
    }

    fn keeping(&self) -> MutexGuard<'_, InCharge> {
        self.keeping.lock().unwrap_or_else(PoisonError::into_inner)
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
