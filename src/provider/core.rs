//! [`Core`]: what all handles of a provider share: the published token, the lock around the [`State`], and the source.
//!
//! The lock is held while a token is published, and while the token is read for a decision. Otherwise a caller could
//! read the old token, find that no refresh is running because it has just ended, and start a second one. The happy
//! path reads without the lock: it only uses a token, and any token that was published may be used.
//!
//! Neither a source, nor a subscriber, nor a waker, nor the drop of an error may run under the lock: each is foreign code,
//! and may call the provider.
//!
//! The order of the locks: this one, then that of the login's memory, which [`Core::decide`] takes to know whether there is a
//! login. Nothing takes this one under another.

use std::pin::pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, atomic};
use std::time::Duration;

use futures_util::future::{Either, OptionFuture, select};
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::sync::watch;
use tokio::time::{Instant, Sleep};

use super::decide::{Decision, Need, Snapshot, decide};
use super::options::ProviderOptions;
use super::state::{AskedAt, Ended, NotEnded, Refresh, State};
use super::status::Status;
use crate::error::{Error, SourceError};
use crate::login::Login;
use crate::observability::{self, Reporter, TokenLeft};
use crate::origins::AllowedOrigins;
use crate::retry_budget::RetryBudget;
use crate::source::RefreshReason;
use crate::sync::{AtomicU32, Cache, Mutex, MutexGuard, Outcome, Published, Waiter, lock};
use crate::timer::timer;
use crate::token::{LEAST_LIFE, Token};

/// The last retry of a request waits until a token that the API has not accepted yet is this old: an API may know a token
/// later than its issuer.
const LAG: Duration = Duration::from_secs(1);

/// A decision, and for one to join or to start a refresh: that, and the wait for it.
pub(super) type Decided = (Decision, Option<(Arc<Refresh>, Waiter)>);

pub(crate) struct Core {
    /// Tells this provider's tokens from those of others in this process.
    pub(super) number: u32,
    /// The current token. Written under the lock, and read at any time.
    published: Arc<Published>,
    /// The generation of the newest token that the API has accepted; 0 for none. Read for each response, and written
    /// for the first with each token.
    accepted: AtomicU32,
    state: Mutex<State>,
    /// What gives the tokens.
    pub(super) login: Arc<Login>,
    pub(super) config: ProviderOptions,
    /// The origins that the source's tokens are meant for.
    pub(crate) allowed_origins: AllowedOrigins,
    /// How many bytes of small challenges are kept.
    pub(crate) kept: atomic::AtomicU32,
}

impl Core {
    pub(super) fn new(login: Login, config: ProviderOptions) -> Self {
        static PROVIDERS: atomic::AtomicU32 = atomic::AtomicU32::new(0);
        let number = PROVIDERS.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        Self {
            number,
            published: Arc::new(Published::empty()),
            accepted: AtomicU32::new(0),
            state: Mutex::new(State::new(number)),
            allowed_origins: login.source.allowed_origins(),
            login: Arc::new(login),
            config,
            kept: atomic::AtomicU32::new(0),
        }
    }

    pub(crate) fn reporter(&self) -> &Reporter {
        &self.login.reporter
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// The current token as one service sees it.
    pub(crate) fn cache(&self) -> Cache {
        Cache::new(Arc::clone(&self.published))
    }

    /// The token published last, even if it has expired, unless it was invalidated.
    pub(super) fn published(&self) -> Option<Token> {
        self.published.load_full().map(Token)
    }

    /// The token published last, unless it has expired.
    pub(crate) fn current(&self) -> Option<Token> {
        self.published().filter(|token| !token.is_expired(Instant::now()))
    }

    /// Publishes a token, or none. The guard shows that the caller holds the lock, without which a decision could see
    /// the state of one token and the value of another.
    fn publish(&self, _locked: &MutexGuard<'_, State>, token: Option<Token>) -> Option<Token> {
        self.published.swap(token.map(|token| token.0)).map(Token)
    }

    /// Whether the API is known to accept this token, the newest one.
    #[inline]
    pub(crate) fn is_accepted(&self, token: u32) -> bool {
        self.accepted.load(Ordering::Relaxed) == token
    }

    /// Records that the API has accepted a token. It is only evidence: no other memory is read because of it, so no
    /// ordering is needed.
    pub(crate) fn accept(&self, token: u32) {
        self.accepted.fetch_max(token, Ordering::Relaxed);
    }

    /// Applies the decision for a need to the state.
    ///
    /// Without a `runtime`, no refresh starts. Its task is the caller's to spawn: a runtime that shuts down drops it at once,
    /// which takes the lock. `None` if the decision depends on the revision of the credential, which is not known: the source
    /// is foreign code, and is not asked for it by those who join a refresh.
    pub(super) fn decide(
        &self,
        need: &Need,
        now: Instant,
        revision: Option<u64>,
        runtime: Option<&Handle>,
    ) -> Option<Decided> {
        let mut state = self.state();
        let revision = match (revision, &state.running) {
            (Some(revision), _) => revision,
            (None, Some(running)) if now <= running.deadline => running.revision,
            (None, _) => return None,
        };
        // Read under the lock, which every publication holds: a refresh that has just ended is not started again.
        let current = self.published();
        // A runtime for the current thread may not be driven when the call has returned, and one that is new may end.
        let may_end = |runtime: &Handle| {
            runtime.runtime_flavor() == RuntimeFlavor::CurrentThread || state.runtime != Some(runtime.id())
        };
        let seen = Snapshot {
            current: current.as_ref(),
            accepted: self.accepted.load(Ordering::Relaxed),
            revision,
            refresh_timeout: self.config.refresh_timeout,
            has_runtime: runtime.is_some(),
            may_lose_login: self.login.is_login() && runtime.is_some_and(may_end),
        };
        let decision = decide(need, &state, &seen, now);
        let is_background = matches!(need, Need::Background);
        let reason = match &decision {
            Decision::Join(reason) => {
                if let Some(refresh) = state.running.as_ref().filter(|_| !is_background) {
                    refresh.current_reason.raise(*reason);
                }
                *reason
            }
            Decision::Start { reason, .. } => {
                let is_needed = !is_background && *reason != RefreshReason::Expiring;
                let challenge = match need {
                    Need::Other { challenge, by_program, .. } => {
                        (challenge.clone(), *by_program && *reason == RefreshReason::Challenged)
                    }
                    // Only if a token works for too short: any other refresh is paced by the lifetimes of the tokens.
                    Need::Lasting(_) => (None, *reason == RefreshReason::Expired && self.current().is_some()),
                    _ => (None, false),
                };
                state.runtime = runtime.map(Handle::id);
                let times = (now, now + self.config.refresh_timeout);
                state.start((*reason, is_needed), challenge, revision, times);
                *reason
            }
            _ => return Some((decision, None)),
        };
        state.is_joined |= !is_background;
        if reason == RefreshReason::Challenged {
            self.mark_expiring(&state, now);
        }
        let waiter = state.waiters.as_ref().map(|waiters| waiters.1.clone());
        Some((decision, state.running.clone().zip(waiter)))
    }

    /// Makes the current token count as expiring, so that requests do not take the happy path: a challenge is about to
    /// replace it, or its refresh was interrupted.
    fn mark_expiring(&self, state: &MutexGuard<'_, State>, now: Instant) {
        if let Some(token) = self.published().filter(|token| token.is_fresh(now)) {
            self.publish(state, Some(token.expiring(now)));
        }
    }

    /// Ends a refresh: publishes its token, or records its failure, which never takes a token away. Runs no foreign code: the caller takes the waiters' sender before it calls [`changed`](Self::changed).
    pub(super) fn finish(
        &self,
        refresh: &Refresh,
        outcome: Outcome,
        asked: AskedAt,
    ) -> Result<Ended, NotEnded> {
        let now = Instant::now();
        let mut state = self.state();
        let accepted = self.accepted.load(Ordering::Relaxed);
        let ended = state.finish(refresh, outcome, asked, accepted, &self.config, now)?;
        match &ended.outcome {
            _ if ended.is_superseded => {}
            Ok(token) => {
                if ended.is_same && refresh.reason == RefreshReason::Challenged {
                    // That the token was accepted before the challenge does not say that it is accepted now.
                    self.accepted.store(0, Ordering::Relaxed);
                }
                self.publish(&state, Some(token.clone()));
            }
            Err(_) if state.is_interrupted => self.mark_expiring(&state, now),
            // The token is no longer about to be replaced.
            Err(_) if self.published().is_some() => _ = self.publish(&state, state.newest.clone()),
            Err(_) => {}
        }
        Ok(ended)
    }

    /// What callers have after a refresh that has failed.
    pub(super) fn left(&self, refresh: &Refresh) -> TokenLeft {
        match self.current() {
            None => TokenLeft::None,
            Some(_) if refresh.current_reason.get() == RefreshReason::Challenged => TokenLeft::Challenged,
            Some(token) => TokenLeft::Works(token.remaining()),
        }
    }

    /// The error of those who wait since then for too long: the failure of an attempt says more than the timeout.
    pub(crate) fn timed_out(&self, since: Instant) -> Error {
        let state = self.state();
        let failure = state.failure.as_ref().filter(|failure| failure.not_before > since);
        failure.map_or(Error::TimedOut(self.config.refresh_timeout), |failure| failure.error.clone())
    }

    /// When a token that the API has not accepted yet is old enough to be known to all of the API. `None` if it is known.
    pub(crate) fn settled_at(&self, token: u32) -> Option<Instant> {
        let state = self.state();
        let is_new = state.generation() == token && !self.is_accepted(token);
        state.published_at.filter(|_| is_new).map(|at| at + LAG)
    }

    /// The budget for the retries of challenged requests. `None` if there is no limit.
    pub(crate) fn retry_budget(&self) -> Option<&RetryBudget> {
        self.config.retry_budget.as_ref()
    }

    /// Sets the gauge of the expiry to that of the current token.
    pub(super) fn report_expiry(&self) {
        let expiry = |token: &Option<Token>| token.as_ref().map(|token| (token.id(), token.ends_at()));
        loop {
            let reported = self.published();
            self.reporter().expires(reported.as_ref());
            // Otherwise the value that was read first could be set last.
            if expiry(&self.published()) == expiry(&reported) {
                return;
            }
        }
    }

    /// Postpones the next attempt of the refresh; returns by how much. Changes nothing if another refresh has replaced
    /// this one: its failure says nothing of the source today.
    pub(super) fn back_off(&self, refresh: &Refresh, error: &SourceError) -> Duration {
        let mut state = self.state();
        let result = state.is_running(refresh).then(|| {
            let (now, first) = (Instant::now(), Error::from(error.clone()));
            state.failure(&first, &self.config, now).back_off(error, now)
        });
        drop(state);
        self.changed();
        result.map(|(delay, _)| delay).unwrap_or_default()
    }

    /// Makes a timer on the runtime of the caller, or else on that of the refreshes.
    pub(crate) fn timer(&self, at: Instant) -> Option<Sleep> {
        timer(at, self.config.runtime.as_ref())
    }

    /// Waits until `at`; true if the provider was shut down first, or there is no timer.
    pub(super) async fn is_shut_down_before(&self, at: Instant) -> bool {
        let mut changes = self.changes();
        let Some(timer) = self.timer(at) else { return true };
        let shut_down = pin!(changes.wait_for(|shut_down| *shut_down));
        matches!(select(shut_down, pin!(timer)).await, Either::Left(_))
    }

    /// Publishes a token that the program has, in place of what a running refresh brings. Callers that wait for that get it.
    pub(super) fn set(&self, token: Token) {
        let is_current = |current: Token| current.has_same_access_token(&token);
        if token.is_expired(Instant::now() + LEAST_LIFE) || self.published().is_some_and(is_current) {
            return;
        }
        self.login.token_was_set();
        let (token, before, sender, number, _dropped_unlocked) = {
            let mut state = self.state();
            let before = state.newest.clone();
            // Under the lock: what a refresh asks for later is newer.
            let (token, sender, failure) =
                state.set(token.without_refresh_token(), &self.config, Instant::now());
            let replaced = self.publish(&state, Some(token.clone()));
            (token, before, sender, state.started(), (replaced, failure))
        };
        self.changed();
        self.report_expiry();
        let span = self.reporter().refresh(number, "set", before.as_ref());
        observability::in_span(&span, || self.reporter().published(&token, Duration::ZERO, false, false));
        let _ = sender.map(|sender| sender.send(Ok(token)));
    }

    /// Gives the provider the refresh token of a new login: the current token, which may be another user's, is not used any
    /// more.
    pub(super) fn log_in(&self, refresh_token: String) {
        // The login first: a refresh that starts now presents it.
        if refresh_token.is_empty() || !self.login.log_in(refresh_token) {
            return;
        }
        let _dropped_unlocked = {
            let mut state = self.state();
            (self.publish(&state, None), state.log_in())
        };
        self.changed();
        self.report_expiry();
    }

    /// Asks again at once after a permanent failure, here or of another process, unless that was done a moment ago. Returns
    /// from when on.
    pub(super) fn ask_again(&self) -> Option<Instant> {
        self.login.ask_again();
        self.state().failure.as_mut()?.forgive(Instant::now())
    }

    /// Removes the current token. Its refresh token is kept for the next refresh.
    pub(super) fn invalidate(&self) {
        let Some(token) = self.publish(&self.state(), None) else { return };
        self.changed();
        self.report_expiry();
        self.reporter().invalidated(&token);
    }

    /// From now on no refresh starts, none waits for its next attempt, and the background task ends.
    pub(crate) fn shut_down(&self) {
        if !std::mem::replace(&mut self.state().shut_down, true) {
            self.changed();
            self.reporter().shut_down();
        }
    }

    /// Waits until no refresh is running and the background task has ended, for as long as a refresh may take: the
    /// runtime of either may be one that nobody drives any more. Without a timer, there is no such bound.
    pub(super) async fn at_rest(&self) {
        let mut changes = self.changes();
        let at_rest = pin!(async {
            while self.state().running.is_some() {
                // Cannot fail: `self` has the sender.
                let _ = changes.changed().await;
            }
            let end = self.state().background_end(Instant::now());
            OptionFuture::from(end).await;
            // An exchange of a login that outlives its refresh.
            self.login.turn().await;
        });
        match self.timer(Instant::now() + self.config.refresh_timeout) {
            Some(timer) => _ = select(at_rest, pin!(timer)).await,
            None => at_rest.await,
        }
    }

    /// Whether a refresh is running, as far as is known: nobody drives the runtime of one that is past its deadline.
    pub(super) fn is_busy(&self) -> bool {
        self.state().running.as_ref().is_some_and(|refresh| Instant::now() <= refresh.deadline)
    }

    /// As [`State::subscribe`].
    pub(super) fn changes(&self) -> watch::Receiver<bool> {
        self.state().subscribe()
    }

    /// Wakes those who wait for a change. Called without the lock: wakers are foreign code.
    pub(super) fn changed(&self) {
        let mut state = self.state();
        let (subscribers, shut_down) = (state.subscribers(), state.shut_down);
        drop(state);
        subscribers.map(|changes| changes.send_replace(shut_down));
    }

    /// Why the store fails; `None` if it does not, or there is none.
    pub(super) fn store_error(&self) -> Option<Error> {
        self.login.store_status()?.error.map(Error::Store)
    }

    pub(super) fn status(&self) -> Status {
        let status = self.state().status(self.published().as_ref(), Instant::now());
        // Without the state's lock: there is no order between it and the store's.
        Status { store: self.login.store_status(), ..status }
    }
}

#[cfg(all(test, tower_bearer_loom))]
mod tests;
