//! [`Shared`]: what all handles of a provider share: the published token, the lock around the [`State`], and the source.
//!
//! The lock is held while a token is published, and while the token is read for a decision. Otherwise a caller could
//! read the old token, find that no refresh is running because it has just ended, and start a second one. The happy
//! path reads without the lock: it only uses a token, and any token that was published may be used.

use std::{
    ops::{Deref, DerefMut},
    sync::{Arc, atomic::Ordering},
    time::{Duration, SystemTime},
};

use tokio::{
    sync::watch,
    time::{Instant, timeout, timeout_at},
};

use super::{
    config::Config,
    outage::{Counted, GIVEN_UP},
    state::{Decision, Failed, Finished, Need, Refresh, State},
    status::Status,
    sync::{AtomicU32, Cache, Mutex, MutexGuard, Outcome, Published, lock},
};
#[cfg(feature = "store")]
use crate::store::StoreStatus;
use crate::{
    error::{Error, SourceError},
    observability::Reporter,
    origins::AllowedOrigins,
    source::{DynTokenSource, RefreshReason},
    token::{Token, TokenId},
};

pub(crate) struct Shared {
    /// The current token. Written under the lock, and read at any time.
    published: Arc<Published>,
    /// The generation of the newest token that the API has accepted; 0 for none. Read for each response, and written
    /// for the first with each token.
    accepted: AtomicU32,
    state: Mutex<State>,
    pub(super) source: Box<dyn DynTokenSource>,
    pub(super) config: Arc<Config>,
    pub(super) reporter: Reporter,
    /// The origins that the source's tokens are meant for.
    pub(super) allowed_origins: AllowedOrigins,
    /// Whether the refresh token of a login is in this process only.
    #[cfg(feature = "tenants")]
    keeps_login: bool,
    /// `SystemTime::now`, which tests replace.
    wall_clock: fn() -> SystemTime,
}

impl Shared {
    pub(super) fn new(
        source: Box<dyn DynTokenSource>,
        config: Config,
        wall_clock: fn() -> SystemTime,
    ) -> Self {
        let config = Arc::new(config);
        Self {
            published: Arc::new(Published::empty()),
            accepted: AtomicU32::new(0),
            state: Mutex::new(State::new(Arc::clone(&config))),
            allowed_origins: source.allowed_origins(),
            #[cfg(feature = "tenants")]
            keeps_login: source.keeps_login(),
            source,
            reporter: config.reporter(),
            config,
            wall_clock,
        }
    }

    /// Locks the state. Neither a source, nor a subscriber, nor a waker may run before the guard is dropped: each is
    /// foreign code, and may call the provider.
    pub(super) fn state(&self) -> Locked<'_> {
        Locked { state: lock(&self.state), replaced: Vec::new() }
    }

    /// The current token as one service sees it.
    pub(super) fn cache(&self) -> Cache {
        Cache::new(Arc::clone(&self.published))
    }

    /// The token published last, even if it has expired, unless it was invalidated.
    pub(super) fn published(&self) -> Option<Token> {
        self.published.load_full().map(Token)
    }

    /// Publishes a token, or none. The guard shows that the caller holds the lock, without which a decision could see
    /// the state of one token and the value of another.
    fn publish(&self, _locked: &Locked<'_>, token: Option<Token>) -> Option<Token> {
        self.published.swap(token.map(|token| token.0)).map(Token)
    }

    /// The generation of the newest token that the API has accepted; 0 for none.
    #[inline]
    pub(super) fn accepted(&self) -> u32 {
        self.accepted.load(Ordering::Relaxed)
    }

    /// Records that the API has accepted a token. It is only evidence: no other memory is read because of it, so no
    /// ordering is needed.
    pub(super) fn accept(&self, token: TokenId) {
        self.accepted.fetch_max(token.generation, Ordering::Relaxed);
    }

    pub(super) fn decide(&self, need: &Need, now: Instant, revision: u64, has_runtime: bool) -> Decision {
        let mut state = self.state();
        // Read under the lock, which every publication holds: a refresh that has just ended is not started again.
        state.decide(need, self.published(), self.accepted(), now, revision, has_runtime)
    }

    /// Ends a refresh: publishes its token, or records its failure, which never takes a token away. Runs no foreign code: the
    /// caller takes the waiters' sender before it calls [`changed`](Self::changed).
    pub(super) fn finish(&self, refresh: &Refresh, outcome: Outcome, asked_at: Instant) -> Option<Finished> {
        let clocks = (Instant::now(), (self.wall_clock)());
        let mut state = self.state();
        let finished = state.finish(refresh, outcome, asked_at, self.published(), self.accepted(), clocks);
        if let Some(Finished::Published { token, same, .. }) = &finished {
            if *same && refresh.reason == RefreshReason::Challenged {
                // That the token was accepted before the challenge does not say that it is accepted now.
                self.accepted.store(0, Ordering::Relaxed);
            }
            self.publish(&state, Some(token.clone()));
        }
        finished
    }

    /// Gives up a refresh that has not ended by its deadline. `None` if it has ended.
    pub(super) fn abandon(&self, refresh: &Refresh) -> Option<Failed> {
        let mut state = self.state();
        state.abandon(refresh, self.published(), Instant::now())
    }

    /// Counts and reports a request that fails because there is no token.
    pub(super) fn request_failed(&self, error: &Error) {
        let Counted { is_news, failures } = self.state().request_failed(error, Instant::now());
        self.reporter.request_failed(error, error.name(), is_news, failures);
    }

    /// Counts and reports a request that is dropped while it waits for a token, if refreshes fail.
    pub(super) fn request_given_up(&self) {
        let given_up = self.state().request_given_up(Instant::now());
        if let Some((error, Counted { is_news, failures })) = given_up {
            self.reporter.request_failed(&error, GIVEN_UP, is_news, failures);
        }
    }

    /// Sets the gauge of the expiry to that of the current token.
    pub(super) fn report_expiry(&self) {
        let expiry = |token: &Option<Token>| token.as_ref().map(|token| (token.id(), token.expires_at()));
        loop {
            let reported = self.published();
            self.reporter.expires(reported.as_ref());
            // Otherwise the value that was read first could be set last.
            if expiry(&self.published()) == expiry(&reported) {
                return;
            }
        }
    }

    /// Postpones the next attempt of the refresh; returns by how much, and whether the failure is news.
    pub(super) fn back_off(&self, refresh: &Refresh, error: SourceError) -> (Error, Duration, bool) {
        let postponed = self.state().back_off(refresh, error, Instant::now());
        self.changed();
        postponed
    }

    /// Waits until `at`; true if the provider was shut down first.
    pub(super) async fn is_shut_down_before(&self, at: Instant) -> bool {
        let mut changes = self.changes();
        timeout_at(at, changes.wait_for(|shut_down| *shut_down)).await.is_ok()
    }

    /// Removes the current token. The state keeps its refresh token for the next refresh.
    pub(super) fn invalidate(&self) -> Option<Token> {
        let token = self.publish(&self.state(), None)?;
        self.changed();
        self.report_expiry();
        self.reporter.invalidated(&token);
        Some(token)
    }

    /// Shortens the current token's life by what the monotonic clock has not counted.
    pub(super) fn compare_clocks(&self) {
        let mut state = self.state();
        let compared = state.compare_clocks(self.published(), Instant::now(), (self.wall_clock)());
        let Some((token, jump)) = compared else { return };
        self.publish(&state, Some(token.clone()));
        drop(state);
        self.changed();
        self.report_expiry();
        self.reporter.shortened(&token, jump);
    }

    /// From now on no refresh starts, none waits for its next attempt, and the background task ends.
    pub(super) fn shut_down(&self) {
        let is_first = self.state().shut_down();
        if is_first {
            let subscribers = self.state().subscribers();
            if let Some(changes) = subscribers {
                changes.send_replace(true);
            }
            self.reporter.shut_down();
        }
    }

    /// Waits until no refresh is running and the background task has ended, for as long as a refresh may take: the
    /// runtime of either may be one that nobody drives any more.
    pub(super) async fn at_rest(&self) {
        let mut changes = self.changes();
        let at_rest = async {
            while self.status().refreshing {
                // Cannot fail: `self` has the sender.
                let _ = changes.changed().await;
            }
            let background = self.state().background_end(Instant::now());
            if let Some(end) = background {
                let _ = end.await;
            }
        };
        let _ = timeout(self.config.refresh_timeout, at_rest).await;
    }

    /// Whether a refresh is running.
    #[cfg(feature = "tenants")]
    pub(super) fn is_refreshing(&self) -> bool {
        self.state().is_refreshing()
    }

    /// Whether only this process has the refresh token of a login. Runs no foreign code.
    #[cfg(feature = "tenants")]
    pub(super) fn holds_only_copy(&self) -> bool {
        (self.keeps_login && self.state().may_have_login(self.published(), Instant::now()))
            || self.source.has_unpublished_login()
    }

    /// Subscribes to the changes of the state. The value is true once the provider is shut down.
    pub(super) fn changes(&self) -> watch::Receiver<bool> {
        self.state().subscribe()
    }

    /// Wakes those who wait for a change. Called without the lock: wakers are foreign code.
    pub(super) fn changed(&self) {
        let subscribers = self.state().subscribers();
        if let Some(changes) = subscribers {
            changes.send_modify(|_| {});
        }
    }

    /// Why the store fails; `None` if it does not, or there is none.
    #[cfg(feature = "store")]
    pub(super) fn store_error(&self) -> Option<Error> {
        self.source.store_outage()?.map(|(_, error)| Error::Store(error))
    }

    pub(super) fn status(&self) -> Status {
        let status = self.state().status(self.published().as_ref(), Instant::now());
        // Without the state's lock, so that there is no order between it and the store's.
        #[cfg(feature = "store")]
        let status = Status { store: self.source.store_outage().map(StoreStatus::of), ..status };
        status
    }
}

/// The locked state. Its drop unlocks, and then drops the errors that were replaced.
pub(super) struct Locked<'a> {
    state: MutexGuard<'a, State>,
    /// After the guard: fields are dropped in their order.
    replaced: Vec<Error>,
}

impl Deref for Locked<'_> {
    type Target = State;

    fn deref(&self) -> &State {
        &self.state
    }
}

impl DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut State {
        &mut self.state
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        self.replaced = self.state.take_replaced();
    }
}

/// Every way in which three threads can interleave, explored by loom with at most three preemptions each.
#[cfg(all(test, tower_bearer_loom))]
mod tests {
    use loom::{sync::Arc, thread};

    use super::*;
    use crate::{
        provider::challenge_pause::Part,
        source::{TokenRequest, TokenSource},
    };

    /// Not asked: the model counts what it would give.
    struct NotAsked;

    impl TokenSource for NotAsked {
        async fn fetch(&self, _: &TokenRequest<'_>) -> Result<Token, SourceError> {
            unreachable!()
        }
    }

    /// A provider without a runtime: the thread whose need starts a refresh runs it.
    struct Provider {
        shared: Shared,
        fetches: std::sync::atomic::AtomicU64,
        /// The first so many refreshes are interrupted.
        interrupted: u64,
    }

    impl Provider {
        fn new(interrupted: u64) -> Self {
            let shared = Shared::new(Box::new(NotAsked), Config::default(), || SystemTime::UNIX_EPOCH);
            Self { shared, fetches: 0.into(), interrupted }
        }

        fn with_token() -> Self {
            let provider = Self::new(0);
            provider.obtain(Need::Any).unwrap();
            provider
        }

        fn fetches(&self) -> u64 {
            self.fetches.load(Ordering::SeqCst)
        }

        fn obtain(&self, need: Need) -> Outcome {
            // As the happy path does, without the lock.
            if let (Need::Any, Some(token)) = (&need, self.shared.published()) {
                return Ok(token);
            }
            match self.shared.decide(&need, Instant::now(), 0, true) {
                Decision::Join(refresh) => refresh.waiter.wait(),
                Decision::Fail(error) => Err(error),
                Decision::Use(token)
                | Decision::Replaced(token, _)
                | Decision::LeaveAlone(token, _)
                | Decision::Postpone(token) => Ok(token),
                Decision::Overdue(_) => unreachable!(),
                Decision::Start(refresh, _) => {
                    let fetch = self.fetches.fetch_add(1, Ordering::SeqCst) + 1;
                    let outcome = if fetch <= self.interrupted {
                        Err(Error::Interrupted)
                    } else {
                        Ok(Token::builder(format!("access-{fetch}")).build().unwrap())
                    };
                    let outcome = match self.shared.finish(&refresh, outcome, refresh.started_at).unwrap() {
                        Finished::Published { token, .. } => Ok(token),
                        Finished::Failed(failed) => Err(failed.error),
                    };
                    let _ = refresh.take_sender().unwrap().send(outcome.clone());
                    outcome
                }
            }
        }
    }

    /// Runs `one` in two more threads and in this one, in every order.
    fn explore(
        provider: impl Fn() -> Provider + Send + Sync + 'static,
        one: impl Fn(&Provider, usize) + Send + Sync + Copy + 'static,
        end: impl Fn(&Provider) + Send + Sync + 'static,
    ) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(move || {
            let provider = Arc::new(provider());
            let others: Vec<_> = (1..3)
                .map(|number| {
                    let provider = Arc::clone(&provider);
                    thread::spawn(move || one(&provider, number))
                })
                .collect();
            one(&provider, 0);
            others.into_iter().for_each(|thread| thread.join().unwrap());
            end(&provider);
        });
    }

    /// Rows 1 and 9.
    #[test]
    fn three_callers_cost_one_fetch() {
        explore(
            || Provider::new(0),
            |provider, _| assert_eq!(provider.obtain(Need::Any).unwrap().generation(), 1),
            |provider| assert_eq!(provider.fetches(), 1),
        );
    }

    /// Rows 5, 6 and 9.
    #[test]
    fn three_challenges_cost_one_fetch() {
        explore(
            Provider::with_token,
            |provider, number| {
                let seen = provider.shared.published().unwrap();
                // One of them may have seen the new token already, and takes it as it is.
                let challenged =
                    Need::OtherThan { token: seen.id(), part: Part::None, waits: true, challenge: None };
                let need = if number == 2 { Need::Any } else { challenged };
                let got = provider.obtain(need).unwrap();
                assert!(got.generation() >= seen.generation());
                assert!(number == 2 || seen.generation() == 2 || got.generation() == 2);
            },
            |provider| {
                assert!(provider.fetches() <= 2);
                assert_eq!(provider.shared.published().unwrap().generation(), provider.fetches());
            },
        );
    }

    /// Rows 4, 9 and 10.
    #[test]
    fn interrupted_refresh_wakes_all_waiters() {
        explore(
            || Provider::new(1),
            |provider, _| {
                if provider.obtain(Need::Any).is_err() {
                    assert_eq!(provider.obtain(Need::Any).unwrap().generation(), 1);
                }
            },
            |provider| assert_eq!(provider.fetches(), 2),
        );
    }

    #[test]
    fn invalidation_costs_one_fetch() {
        explore(
            Provider::with_token,
            |provider, number| {
                if number == 0 {
                    assert_eq!(provider.shared.invalidate().unwrap().generation(), 1);
                    assert_eq!(provider.obtain(Need::Any).unwrap().generation(), 2);
                } else {
                    assert!(provider.obtain(Need::Any).is_ok());
                }
            },
            |provider| assert_eq!(provider.fetches(), 2),
        );
    }
}
