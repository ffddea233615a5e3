//! [`SharedState`]: the current token and the [`State`] behind its lock, and the order in which the two change.
//!
//! Whoever publishes holds the lock; whoever decides reads under it; the happy path reads without. What these stand on are
//! parameters, so that loom explores the very code that runs.

use std::{
    marker::PhantomData,
    ops::ControlFlow,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwapOption;
use tokio::{runtime, time::Instant};

use super::{
    settings::Settings,
    state::{Ended, Fetched, Landed, Need, State, Verdict},
};
use crate::{
    error::Error,
    source::{CurrentReason, RefreshReason as Reason},
    token::{self, Token},
};

/// Where the current token is; read at any time, written under the lock.
pub(super) trait Slot {
    fn empty() -> Self;
    fn load(&self) -> Option<Token>;
    fn swap(&self, token: Option<Token>) -> Option<Token>;
}

pub(super) trait Lock<T> {
    fn new(value: T) -> Self;
    fn with<R>(&self, change: impl FnOnce(&mut T) -> R) -> R;
}

/// `L` is what those who wait for a refresh hold.
pub(super) struct SharedState<L, S = ArcSwapOption<token::Inner>, M = Mutex<State<L>>> {
    current: S,
    /// The generation of the newest token that the API has accepted; 0 for none. Read for every answer, and written for the
    /// first with each token: beside `current`, which every request reads as well.
    accepted: AtomicU32,
    state: M,
    landing: PhantomData<fn() -> L>,
}

/// What a need comes to.
pub(super) enum Decision<L> {
    Settled(Verdict<L>),
    /// A refresh has to start, and nothing can carry it.
    Grounded,
    /// A refresh starts.
    Fly(TakeOff<L>),
}

/// What a refresh starts with.
pub(super) struct TakeOff<L> {
    pub(super) number: u64,
    pub(super) reason: Reason,
    /// The token that it is to renew.
    pub(super) previous: Option<Token>,
    pub(super) urgent: CurrentReason,
    pub(super) landing: L,
}

impl<L, S, M> SharedState<L, S, M>
where
    L: Clone,
    S: Slot,
    M: Lock<State<L>>,
{
    pub(super) fn new(settings: &Settings) -> Self {
        Self {
            current: S::empty(),
            accepted: AtomicU32::new(0),
            state: M::new(State::new(settings)),
            landing: PhantomData,
        }
    }

    /// Where the current token is, for those who read it without the lock.
    #[inline]
    pub(super) fn slot(&self) -> &S {
        &self.current
    }

    /// The generation of the newest token that the API has accepted; 0 for none.
    #[inline]
    pub(super) fn accepted(&self) -> u32 {
        self.accepted.load(Ordering::Relaxed)
    }

    /// The API has accepted a token. Evidence alone: nothing is published by it, so no order is needed.
    pub(super) fn accept(&self, generation: u32) {
        self.accepted.fetch_max(generation, Ordering::Relaxed);
    }

    /// The token as it was published last, whatever has become of it, unless it was invalidated.
    pub(super) fn published(&self) -> Option<Token> {
        self.current.load()
    }

    /// What `need` comes to. If it is a refresh, it is under way from here on, with `landing` for those who join it, on the
    /// runtime that is named with it; without one, it is grounded.
    pub(super) fn decide(
        &self,
        need: Need,
        now: Instant,
        revision: u64,
        landing: impl FnOnce() -> Option<(L, Option<runtime::Id>)>,
    ) -> Decision<L> {
        self.state.with(|state| {
            // Read under the lock, which every publication holds: a refresh that has just landed is not flown again.
            let reason = match state.decide(need, self.published(), self.accepted(), now, revision) {
                ControlFlow::Continue(reason) => reason,
                ControlFlow::Break(verdict) => return Decision::Settled(verdict),
            };
            let Some((landing, runtime)) = landing() else { return Decision::Grounded };
            let (number, previous, urgent) = state.take_off(need, reason, landing.clone(), runtime, now);
            Decision::Fly(TakeOff { number, reason, previous, urgent, landing })
        })
    }

    /// Ends a refresh: publishes its token, or notes its failure, which never takes a token away.
    pub(super) fn land(
        &self,
        outcome: Result<Fetched, Error>,
        ended: Ended,
        now: Instant,
        wall: SystemTime,
    ) -> Landed {
        let (landed, _dropped_unlocked) = self.state.with(|state| {
            let (landed, refresh) = state.land(outcome, ended, self.accepted(), now, wall);
            if let Landed::Published { token, same, .. } = &landed {
                if *same && ended.reason == Reason::Challenged {
                    // What was accepted before the challenge says nothing of the token since.
                    self.accepted.store(0, Ordering::Relaxed);
                }
                self.current.swap(Some(token.clone()));
            }
            (landed, refresh)
        });
        landed
    }

    /// Drops the current token, and returns it.
    pub(super) fn invalidate(&self) -> Option<Token> {
        self.state.with(|_| self.current.swap(None))
    }

    /// Shortens the current token's life by what the monotonic clock has not seen pass; returns it, and by how much.
    pub(super) fn compare_clocks(&self, now: Instant, wall: SystemTime) -> Option<(Token, Duration)> {
        self.state.with(|state| {
            let jump = state.clock_jump(now, wall)?;
            let token = self.published().filter(|token| token.expires_at().is_some())?.shortened(jump, now);
            state.replace_published(&token);
            self.current.swap(Some(token.clone()));
            Some((token, jump))
        })
    }

    /// Reads or changes what has nothing to do with the current token.
    pub(super) fn with<R>(&self, change: impl FnOnce(&mut State<L>) -> R) -> R {
        self.state.with(change)
    }
}

impl Slot for ArcSwapOption<token::Inner> {
    fn empty() -> Self {
        Self::empty()
    }

    fn load(&self) -> Option<Token> {
        self.load_full().map(Token)
    }

    fn swap(&self, token: Option<Token>) -> Option<Token> {
        self.swap(token.map(|token| Arc::clone(&token.0))).map(Token)
    }
}

impl<T> Lock<T> for Mutex<T> {
    fn new(value: T) -> Self {
        Self::new(value)
    }

    fn with<R>(&self, change: impl FnOnce(&mut T) -> R) -> R {
        // A panic cannot leave the state half changed, so a poisoned lock is as good as any.
        change(&mut self.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Every way in which three threads can meet here, explored by loom with at most three preemptions each.
#[cfg(test)]
mod tests {
    use loom::{
        sync::{Arc, Condvar, Mutex},
        thread,
    };

    use super::*;
    use crate::provider::{
        challenge_pause::Part,
        state::{Challenged, Outcome},
    };

    /// Waits by blocking: one that is never woken is a deadlock, which loom finds.
    #[derive(Clone)]
    struct Landing(Arc<(Mutex<Option<Outcome>>, Condvar)>);

    impl Landing {
        fn new() -> Self {
            Self(Arc::new((Mutex::new(None), Condvar::new())))
        }

        fn send(&self, outcome: Outcome) {
            *self.0.0.lock().unwrap() = Some(outcome);
            self.0.1.notify_all();
        }

        fn wait(&self) -> Outcome {
            let mut outcome = self.0.0.lock().unwrap();
            loop {
                match &*outcome {
                    Some(outcome) => return outcome.clone(),
                    None => outcome = self.0.1.wait(outcome).unwrap(),
                }
            }
        }
    }

    impl Slot for Mutex<Option<Token>> {
        fn empty() -> Self {
            Self::new(None)
        }

        fn load(&self) -> Option<Token> {
            self.lock().unwrap().clone()
        }

        fn swap(&self, token: Option<Token>) -> Option<Token> {
            std::mem::replace(&mut self.lock().unwrap(), token)
        }
    }

    struct StateLock(Mutex<State<Landing>>);

    impl Lock<State<Landing>> for StateLock {
        fn new(value: State<Landing>) -> Self {
            Self(Mutex::new(value))
        }

        fn with<R>(&self, change: impl FnOnce(&mut State<Landing>) -> R) -> R {
            change(&mut self.0.lock().unwrap())
        }
    }

    /// A provider without a runtime: whoever has a refresh start flies it.
    struct Provider {
        shared: SharedState<Landing, Mutex<Option<Token>>, StateLock>,
        now: Instant,
        fetches: std::sync::atomic::AtomicU64,
        /// The first so many refreshes are interrupted.
        interrupted: u64,
    }

    impl Provider {
        fn new(interrupted: u64) -> Self {
            let shared = SharedState::new(&Settings::default());
            Self { shared, now: Instant::now(), fetches: 0.into(), interrupted }
        }

        /// With its first token.
        fn with_token() -> Self {
            let provider = Self::new(0);
            provider.obtain(Need::Any).unwrap();
            provider
        }

        fn fetches(&self) -> u64 {
            self.fetches.load(std::sync::atomic::Ordering::SeqCst)
        }

        fn obtain(&self, need: Need) -> Outcome {
            // As the happy path does, without the lock.
            if let (Need::Any, Some(token)) = (need, self.shared.published()) {
                return Ok(token);
            }
            match self.shared.decide(need, self.now, 0, || Some((Landing::new(), None))) {
                Decision::Settled(Verdict::Join(landing, ..)) => landing.wait(),
                Decision::Settled(Verdict::Tell(error)) => Err(error),
                Decision::Settled(
                    Verdict::Use(token)
                    | Verdict::Replaced(token, _)
                    | Verdict::LeaveAlone(token)
                    | Verdict::Postpone(token),
                ) => Ok(token),
                Decision::Settled(Verdict::Overdue(_)) | Decision::Grounded => unreachable!(),
                Decision::Fly(take_off) => {
                    let fetch = self.fetches.fetch_add(1, std::sync::atomic::Ordering::SeqCst) + 1;
                    let outcome = if fetch <= self.interrupted {
                        Err(Error::Interrupted)
                    } else {
                        let token = Token::builder(format!("access-{fetch}")).build().unwrap();
                        Ok(Fetched { token, asked_at: self.now })
                    };
                    let wall = SystemTime::UNIX_EPOCH;
                    let TakeOff { number, reason, .. } = take_off;
                    let ended = Ended { number, reason, revision: 0, previous: None };
                    let outcome = match self.shared.land(outcome, ended, self.now, wall) {
                        Landed::Published { token, .. } => Ok(token),
                        Landed::Failed { error, .. } => Err(error),
                        Landed::Late => unreachable!(),
                    };
                    take_off.landing.send(outcome.clone());
                    outcome
                }
            }
        }
    }

    /// Runs `one` in two more threads and in this, in every order.
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
                let challenged = Challenged { token: seen.id(), part: Part::None, waits: true };
                let need = if number == 2 { Need::Any } else { Need::OtherThan(challenged) };
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
