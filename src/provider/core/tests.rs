//! Every way in which three threads can interleave, explored by loom with at most three preemptions each.

use loom::{sync::Arc, thread};

use super::*;
use crate::source::{TokenRequest, TokenSource};

static RUNTIME: std::sync::LazyLock<tokio::runtime::Runtime> =
    std::sync::LazyLock::new(|| tokio::runtime::Builder::new_current_thread().build().unwrap());

/// Not asked: the model counts what it would give.
struct NotAsked;

impl TokenSource for NotAsked {
    async fn fetch(&self, _: &TokenRequest<'_>) -> Result<Token, SourceError> {
        unreachable!()
    }
}

/// A provider without a runtime: the thread whose need starts a refresh runs it.
struct Provider {
    core: Core,
    fetches: std::sync::atomic::AtomicU64,
    /// The first so many refreshes are interrupted.
    interrupted: u64,
    /// Not driven: nothing is spawned.
    runtime: Handle,
}

impl Provider {
    fn new(interrupted: u64) -> Self {
        let config = ProviderOptions::default();
        let reporter = Reporter::new("default".into(), None);
        let core = Core::new(Login::new(Box::new(NotAsked), None, None, reporter), config);
        Self { core, fetches: 0.into(), interrupted, runtime: RUNTIME.handle().clone() }
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
        if let (Need::Any, Some(token)) = (&need, self.core.published()) {
            return Ok(token);
        }
        match self.core.decide(&need, Instant::now(), Some(0), Some(&self.runtime)).unwrap() {
            (Decision::Use(token) | Decision::LeaveAlone(token), _) => Ok(token),
            (Decision::Fail(error), _) => Err(error),
            (Decision::Join(_), running) => running.unwrap().1.wait(),
            (Decision::Start { .. }, running) => {
                let (refresh, _) = running.unwrap();
                let fetch = self.fetches.fetch_add(1, Ordering::SeqCst) + 1;
                let outcome = if fetch <= self.interrupted {
                    Err(Error::Interrupted)
                } else {
                    Ok(Token::builder(format!("access-{fetch}")).build().unwrap())
                };
                let ended = {
                    let asked = AskedAt { at: refresh.started_at, logins: 0, sets: 0 };
                    self.core.finish(&refresh, outcome, asked).unwrap()
                };
                let _ = ended.sender.unwrap().send(ended.outcome.clone());
                ended.outcome
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

/// Three callers on three threads have no token: one fetch, and no caller misses its end.
#[test]
fn three_callers_cost_one_fetch() {
    explore(
        || Provider::new(0),
        |provider, _| assert_eq!(provider.obtain(Need::Any).unwrap().generation(), 1),
        |provider| assert_eq!(provider.fetches(), 1),
    );
}

/// 401s arrive on three threads, late, during a refresh, or while its end is missed: one fetch.
#[test]
fn three_challenges_cost_one_fetch() {
    explore(
        Provider::with_token,
        |provider, number| {
            let seen = provider.core.published().unwrap();
            // One of them may have seen the new token already, and takes it as it is.
            let challenged = Need::Other { than: seen.id(), challenge: None, by_program: false };
            let need = if number == 2 { Need::Any } else { challenged };
            let got = provider.obtain(need).unwrap();
            assert!(got.generation() >= seen.generation());
            assert!(number == 2 || seen.generation() == 2 || got.generation() == 2);
        },
        |provider| {
            assert!(provider.fetches() <= 2);
            assert_eq!(provider.core.published().unwrap().generation(), provider.fetches());
        },
    );
}

/// A refresh is interrupted: all its waiters get the same error, on any thread.
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

/// A token is invalidated while other threads ask for it: one fetch.
#[test]
fn invalidation_costs_one_fetch() {
    explore(
        Provider::with_token,
        |provider, number| {
            if number == 0 {
                provider.core.invalidate();
                assert_eq!(provider.obtain(Need::Any).unwrap().generation(), 2);
            } else {
                assert!(provider.obtain(Need::Any).is_ok());
            }
        },
        |provider| assert_eq!(provider.fetches(), 2),
    );
}
