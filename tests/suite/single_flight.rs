//! One refresh serves all callers. A dropped caller does not cancel it.

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Waker},
    time::Duration,
};

use tokio::task::JoinSet;
use tower::{Service, ServiceExt};
use tower_bearer::{Error, SourceError, Token, TokenProvider, TokenRequest, TokenSource};

use crate::support::{self, Act, HOUR, Scene, Source, at_once, chain, get, scene};

const CALLERS: usize = 10_000;

/// Runs [`CALLERS`] calls concurrently and returns their results.
async fn call_all<F>(call: impl Fn(TokenProvider) -> F, provider: &TokenProvider) -> Vec<F::Output>
where
    F: Future<Output: Send + 'static> + Send + 'static,
{
    let mut callers = JoinSet::new();
    for _ in 0..CALLERS {
        callers.spawn(call(provider.clone()));
    }
    callers.join_all().await
}

/// 10,000 callers have no token: one fetch.
#[tokio::test(start_paused = true)]
async fn ten_thousand_callers_cost_one_fetch() {
    let Scene { source, provider, .. } = scene().build();
    let tokens = call_all(|provider| async move { provider.token().await }, &provider).await;
    assert!(tokens.into_iter().all(|token| token.unwrap().generation() == 1));
    for generation in 2..=10 {
        let challenged = provider.current().unwrap();
        // Longer than the cool-down after the last challenge.
        tokio::time::advance(HOUR).await;
        let tokens = call_all(
            move |provider| {
                let challenged = challenged.clone();
                async move { provider.refresh(&challenged).await }
            },
            &provider,
        )
        .await;
        assert!(tokens.into_iter().all(|token| token.unwrap().generation() == generation));
        assert_eq!(source.fetches(), generation);
    }
}

/// 10,000 callers have an expiring token: none waits, one fetch.
#[tokio::test(start_paused = true)]
async fn expiring_token_makes_nobody_wait() {
    let Scene { source, provider, .. } = scene().then(Act::Live(HOUR)).with_token().await;
    tokio::time::advance(HOUR * 89 / 100 - HOUR / 100).await;
    provider.token().await.unwrap();
    assert_eq!(source.fetches(), 1, "refreshed too early");

    tokio::time::advance(HOUR * 3 / 100).await;
    for _ in 0..CALLERS {
        let result = at_once(provider.token());
        assert_eq!(result.unwrap().unwrap().generation(), 1);
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(provider.token().await.unwrap().generation(), 2);
    assert_eq!(source.fetches(), 2);
}

/// The caller that started a refresh is dropped.
#[tokio::test(start_paused = true)]
async fn dropped_leader_spends_refresh_token_once() {
    // The request completes within 12 polls. Each round drops it before another poll.
    for polls in 0..12 {
        let Scene { source, provider, mut service, .. } = scene().accept(["access-2"]).build();
        let first = provider.token().await.unwrap();
        let mut request = Box::pin(service.ready().await.unwrap().call(get()));
        for _ in 0..polls {
            if request.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready() {
                break;
            }
            // A running refresh gets to its next await.
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        drop(request);

        let second = provider.refresh(&first).await.unwrap();
        assert_eq!(second.generation(), 2, "dropped after {polls} polls");
        assert_eq!(*source.previous.lock().unwrap(), [None, Some(1)], "dropped after {polls} polls");
    }
}

/// A refresh panics.
#[tokio::test(start_paused = true)]
async fn panicked_refresh_fails_its_waiters() {
    let Scene { source, provider, .. } = scene().then(Act::Panic).build();
    let results = call_all(|provider| async move { provider.token().await }, &provider).await;
    assert!(results.iter().all(|result| matches!(result, Err(Error::Interrupted))));
    assert_eq!(source.fetches(), 1);
    assert!(!provider.status().refreshing);
    assert_eq!(provider.status().failed_refreshes, 1);
    assert_eq!(provider.token().await.unwrap().access_token(), "access-2");
}

/// The runtime of a refresh shuts down.
#[test]
fn lost_runtime_interrupts_waiters() {
    let runtime =
        || tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    let Scene { source: _, provider, .. } = scene().then(Act::Hang).build();
    let (leader, live) = (runtime(), runtime());
    leader.block_on(async {
        let _ = tokio::time::timeout(Duration::from_secs(2), provider.token()).await;
    });
    let waiter = provider.token();
    drop(leader);
    assert!(matches!(live.block_on(waiter), Ok(token) if token.access_token() == "access-2"));

    // This waiter waits already when the runtime shuts down.
    let provider = scene().then(Act::Hang).build().provider;
    let leader = runtime();
    leader.block_on(async {
        let _ = tokio::time::timeout(Duration::from_secs(2), provider.token()).await;
    });
    let mut waiter = Box::pin(provider.token());
    assert!(waiter.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    drop(leader);
    assert!(matches!(live.block_on(waiter), Err(Error::Interrupted)));
    assert_eq!(live.block_on(provider.token()).unwrap().access_token(), "access-2");
}

/// A token is needed outside of a runtime.
#[test]
fn no_runtime_is_typed_error() {
    let provider = TokenProvider::new(Source::new());
    assert!(matches!(at_once(provider.token()), Some(Err(Error::NoRuntime))));
}

/// 401s arrive late, for a token that was already replaced.
#[tokio::test(start_paused = true)]
async fn late_401_costs_no_refresh() {
    let Scene { source, provider, .. } = scene().build();
    let first = provider.token().await.unwrap();
    let second = provider.refresh(&first).await.unwrap();
    for _ in 0..CALLERS {
        let result = at_once(provider.refresh(&first)).expect("a late challenge must not wait");
        assert_eq!(result.unwrap().generation(), second.generation());
    }
    assert_eq!(source.fetches(), 2);
}

/// A 401 arrives during a refresh.
#[tokio::test(start_paused = true)]
async fn challenge_joins_running_refresh() {
    let Scene { source, provider, .. } = scene().build();
    let first = provider.token().await.unwrap();
    let started = tokio::spawn({
        let (provider, first) = (provider.clone(), first.clone());
        async move { provider.refresh(&first).await }
    });
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(provider.status().refreshing);
    assert_eq!(provider.refresh(&first).await.unwrap().generation(), 2);
    assert_eq!(started.await.unwrap().unwrap().generation(), 2);
    assert_eq!(source.fetches(), 2);
}

/// A program reports challenges itself, of tokens that were just published: the bucket alone bounds the fetches.
#[tokio::test(start_paused = true)]
async fn ten_reported_challenges_cost_ten_fetches() {
    let Scene { source, provider, .. } = scene().build();
    let mut token = provider.token().await.unwrap();
    let start = tokio::time::Instant::now();
    while start.elapsed() < Duration::from_secs(60) {
        token = provider.refresh(&token).await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // The first token, ten at once, and one per 5 s.
    assert!((20..=1 + 10 + 60 / 5).contains(&source.fetches()), "{}", source.fetches());
}

/// A waiter is dropped.
#[tokio::test(start_paused = true)]
async fn dropped_waiter_keeps_refresh_running() {
    let Scene { source, provider, .. } = scene().build();
    let timed_out = tokio::time::timeout(Duration::from_millis(10), provider.token()).await;
    assert!(timed_out.is_err());
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(provider.current().unwrap().generation(), 1);
    assert_eq!(source.fetches(), 1);
}

/// A refresh fails: all its waiters get the same error.
#[tokio::test(start_paused = true)]
async fn waiters_share_refresh_error() {
    let down = || Act::Fail(SourceError::unavailable("the auth endpoint is down"));
    let Scene { source, provider, .. } = scene().times(3, down).build();
    let results = call_all(|provider| async move { provider.token().await }, &provider).await;
    for result in results {
        assert_eq!(support::chain(&result.unwrap_err()).matches("is down").count(), 1);
    }
    // All callers share one refresh, which makes three attempts.
    assert_eq!(source.fetches(), 3);
    assert_eq!(provider.status().refreshes, 1);
}

/// Callers and challenges on real threads start refreshes at one moment.
#[tokio::test(flavor = "multi_thread", worker_threads = 8)]
async fn threads_never_fetch_concurrently() {
    /// Counts the fetches, the running fetches and the overlaps.
    #[derive(Default)]
    struct Counting {
        fetches: AtomicU64,
        running: AtomicU64,
        overlaps: AtomicU64,
    }

    impl TokenSource for Counting {
        async fn fetch(&self, _: &TokenRequest<'_>) -> Result<Token, SourceError> {
            self.overlaps.fetch_add(self.running.fetch_add(1, Ordering::SeqCst), Ordering::SeqCst);
            let fetch = self.fetches.fetch_add(1, Ordering::SeqCst) + 1;
            tokio::task::yield_now().await;
            self.running.fetch_sub(1, Ordering::SeqCst);
            Ok(Token::builder(format!("access-{fetch}")).build()?)
        }
    }

    const ROUNDS: u64 = 20;
    let source = Arc::new(Counting::default());
    let instant = Duration::from_nanos(1);
    let provider = TokenProvider::builder(Arc::clone(&source)).cool_down(instant, instant).build().unwrap();
    // Every caller reports a challenge of each token. The first one starts a refresh. The others join it or are late.
    let generations = call_all(
        |provider| async move {
            let mut token = provider.token().await.unwrap();
            while token.generation() <= ROUNDS {
                token = provider.refresh(&token).await.unwrap();
            }
            token.generation()
        },
        &provider,
    );
    let newest = generations.await.into_iter().max().unwrap();
    assert_eq!(newest, ROUNDS + 1);
    assert_eq!(source.fetches.load(Ordering::SeqCst), newest);
    assert_eq!(source.overlaps.load(Ordering::SeqCst), 0);
}

/// The tokens of two providers are mixed up.
#[tokio::test(start_paused = true)]
async fn two_providers_never_mix_their_tokens() {
    let provider = TokenProvider::new(Source::new());
    let other_provider = TokenProvider::new(Source::new());
    let token = provider.token().await.unwrap();
    let other_token = other_provider.token().await.unwrap();
    let other_token = other_provider.refresh(&other_token).await.unwrap();
    assert_eq!((token.generation(), other_token.generation()), (1, 2));
    // A challenge of another provider's token starts no refresh, whatever its generation.
    assert_eq!(provider.refresh(&other_token).await.unwrap().access_token(), "access-1");
    assert_eq!(provider.status().refreshes, 1);
}

/// A refresh fails while the token is still valid.
#[tokio::test(start_paused = true)]
async fn failed_refresh_keeps_live_token() {
    let rejected = Act::Fail(SourceError::rejected("no"));
    let provider = scene().then(Act::Live(Duration::from_secs(100))).then(rejected).build().provider;
    let first = provider.token().await.unwrap();
    assert!(provider.refresh(&first).await.is_err());
    assert_eq!(provider.current().map(|token| token.generation()), Some(1));
    assert_eq!(provider.token().await.unwrap().generation(), 1);

    tokio::time::advance(Duration::from_secs(100)).await;
    assert!(provider.current().is_none());
    assert_eq!(provider.token().await.unwrap().generation(), 2);
}

/// The credential is rejected: the source is not asked until the cool-down ends.
#[tokio::test(start_paused = true)]
async fn permanent_failure_lasts_cool_down() {
    let rejected = || Act::Fail(SourceError::rejected("the key was rejected"));
    let Scene { source, provider, .. } = scene().times(3, rejected).build();
    assert!(provider.token().await.is_err());
    for _ in 0..100 {
        let error = at_once(provider.token()).expect("a caller must not wait").unwrap_err();
        assert!(support::chain(&error).contains("the key was rejected"));
    }
    assert_eq!(source.fetches(), 1);

    // After the cool-down, one call asks the source again. The next cool-down is twice as long.
    tokio::time::advance(Duration::from_secs(1)).await;
    assert!(provider.token().await.is_err());
    tokio::time::advance(Duration::from_millis(1900)).await;
    assert!(at_once(provider.token()).unwrap().is_err());
    assert_eq!(source.fetches(), 2);

    source.revision.fetch_add(1, Ordering::SeqCst);
    assert!(provider.token().await.is_err(), "the new key is rejected too");
    assert_eq!(source.fetches(), 3);
    source.revision.fetch_add(1, Ordering::SeqCst);
    assert_eq!(provider.token().await.unwrap().access_token(), "access-4");
}

/// The source never answers.
#[tokio::test(start_paused = true)]
async fn hanging_refresh_times_out() {
    let limit = Duration::from_secs(7);
    let Scene { source, provider, .. } =
        scene().then(Act::Hang).provider(|builder| builder.refresh_timeout(limit)).build();
    assert!(matches!(provider.token().await, Err(Error::TimedOut(after)) if after == limit));
    assert_eq!(provider.token().await.unwrap().access_token(), "access-2");
    // If an attempt failed before the timeout, callers get the error of that attempt.
    source.next(Act::Fail(SourceError::unavailable("the disk is full")));
    source.next(Act::Hang);
    provider.invalidate();
    let error = provider.token().await.unwrap_err();
    assert!(chain(&error).contains("the disk is full"), "{error:?}");
    assert_eq!(source.fetches(), 4);
}

/// The source is down for many refreshes, one after the other: the backoff goes on from refresh to refresh.
#[tokio::test(start_paused = true)]
async fn bounded_backoff_spans_refreshes() {
    let down = || Act::Fail(SourceError::unavailable("down"));
    let Scene { source, provider, .. } = scene().times(60, down).build();
    let mut token = None::<Token>;
    let start = tokio::time::Instant::now();
    while token.is_none() {
        token = provider.token().await.ok();
    }
    // Each fetch takes a second. Then a backoff of at most 5 s with full jitter follows.
    let (elapsed, fetches) = (start.elapsed(), source.fetches() as u32);
    assert_eq!(fetches, 61);
    assert!(elapsed >= Duration::from_secs(2) * fetches, "{elapsed:?}");
    assert!(elapsed <= Duration::from_secs(6) * fetches, "{elapsed:?}");
}

/// The source asks for a delay, or for one that is too long.
#[tokio::test(start_paused = true)]
async fn retry_after_is_followed_and_capped() {
    let limited = |seconds| {
        Act::Fail(SourceError::unavailable("limited").with_retry_after(Duration::from_secs(seconds)))
    };
    let Scene { source, provider, .. } = scene().then(limited(20)).then(limited(u64::MAX)).build();
    let start = tokio::time::Instant::now();
    // The second delay exceeds the refresh timeout, so the refresh fails at once.
    assert!(provider.token().await.is_err());
    assert_eq!(start.elapsed().as_secs(), 22);
    assert!(provider.token().await.is_err());
    assert_eq!((start.elapsed().as_secs(), source.fetches()), (22, 2));
    let retry_in = provider.status().retry_in.unwrap();
    assert!(retry_in > Duration::from_secs(60) && retry_in < Duration::from_secs(61), "{retry_in:?}");
    tokio::time::advance(retry_in).await;
    assert_eq!(provider.token().await.unwrap().access_token(), "access-3");
}

/// A source whose first fetch waits for the gate. Each token has a refresh token and expires after `lifetime`.
struct Gated {
    gate: tokio::sync::Semaphore,
    fetches: AtomicU64,
    lifetime: Option<Duration>,
    previous: std::sync::Mutex<Vec<Option<String>>>,
}

impl Gated {
    fn new(is_open: bool, lifetime: Option<Duration>) -> Arc<Self> {
        let gate = tokio::sync::Semaphore::new(is_open.into());
        Arc::new(Self { gate, fetches: AtomicU64::new(0), lifetime, previous: Default::default() })
    }
}

impl TokenSource for Gated {
    async fn fetch(&self, request: &TokenRequest<'_>) -> Result<Token, SourceError> {
        let fetch = self.fetches.fetch_add(1, Ordering::SeqCst) + 1;
        self.previous.lock().unwrap().push(request.refresh_token().map(str::to_owned));
        if fetch == 1 {
            let _ = self.gate.acquire().await;
        }
        let token = Token::builder(format!("access-{fetch}")).refresh_token(format!("refresh-{fetch}"));
        Ok(match self.lifetime {
            Some(lifetime) => token.expires_in(lifetime),
            None => token,
        }
        .build()?)
    }
}

fn current_thread() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// Starts a refresh on a runtime that is not driven afterwards. The refresh runs past its deadline.
fn stalled_refresh() -> (Arc<Gated>, TokenProvider, tokio::runtime::Runtime) {
    let source = Gated::new(false, None);
    let limit = Duration::from_millis(200);
    let provider = TokenProvider::builder(Arc::clone(&source)).refresh_timeout(limit).build().unwrap();
    let runtime = current_thread();
    runtime.block_on(async {
        let _ = tokio::time::timeout(Duration::from_millis(10), provider.token()).await;
    });
    assert!(provider.status().refreshing);
    (source, provider, runtime)
}

/// The runtime of a refresh is not driven any more, while callers wait.
#[test]
fn stalled_runtime_times_out_waiters() {
    let (source, provider, stalled) = stalled_refresh();
    current_thread().block_on(async {
        let waiters: Vec<_> = (0..10)
            .map(|_| {
                let provider = provider.clone();
                tokio::spawn(async move { provider.token().await })
            })
            .collect();
        for waiter in waiters {
            let outcome = tokio::time::timeout(Duration::from_secs(60), waiter).await;
            assert!(matches!(outcome.expect("the caller is stuck").unwrap(), Err(Error::TimedOut(_))));
        }
        // Nobody needs a token now, so the refresh counts as running.
        let status = provider.status();
        assert_eq!((status.refreshing, status.refreshes), (true, 1));
        // The next caller starts another refresh on its own runtime.
        assert_eq!(provider.token().await.unwrap().access_token(), "access-2");
    });
    // The token of the first refresh is older than the current one, so it is not published.
    source.gate.add_permits(1);
    stalled.block_on(async { tokio::time::sleep(Duration::from_millis(10)).await });
    assert_eq!(provider.current().unwrap().access_token(), "access-2");
    let status = provider.status();
    assert_eq!((status.generation, status.refreshes, status.failed_refreshes), (1, 2, 0));
}

/// The runtime of a refresh was not driven for some time, and the token comes late.
#[test]
fn late_refresh_still_publishes() {
    let (source, provider, stalled) = stalled_refresh();
    let live = current_thread();
    assert!(matches!(live.block_on(provider.token()), Err(Error::TimedOut(_))));
    source.gate.add_permits(1);
    stalled.block_on(async { tokio::time::sleep(Duration::from_millis(10)).await });
    let late = provider.current().expect("the late token was lost");
    assert_eq!(late.access_token(), "access-1");
    live.block_on(provider.refresh(&late)).unwrap();
    assert_eq!(*source.previous.lock().unwrap(), [None, Some("refresh-1".to_owned())]);
}

/// A refresh without waiters passes its deadline. The next caller starts another one.
#[test]
fn overdue_refresh_is_not_joined() {
    let (_source, provider, _stalled) = stalled_refresh();
    std::thread::sleep(Duration::from_millis(250));
    assert_eq!(current_thread().block_on(provider.token()).unwrap().access_token(), "access-2");
}

/// The runtime of the background task is not driven any more: it moves to that of the next caller that needs it.
#[test]
fn background_leaves_stalled_runtime() {
    let source = Gated::new(true, Some(Duration::from_millis(300)));
    let stalled = current_thread();
    let provider = stalled.block_on(async {
        let provider = TokenProvider::builder(Arc::clone(&source)).keep_fresh(true).build().unwrap();
        provider.ready().await.unwrap();
        provider
    });
    current_thread().block_on(async {
        // Long enough for the provider to see that the task does not run.
        tokio::time::sleep(Duration::from_millis(1500)).await;
        assert_eq!(provider.status().generation, 1);
        provider.token().await.unwrap();
        let refreshed = async {
            let mut changes = provider.subscribe();
            while changes.next().await.unwrap().generation < 5 {}
        };
        tokio::time::timeout(Duration::from_secs(60), refreshed)
            .await
            .expect("no background task refreshes the token");
    });
    // The first task was aborted. It ends as soon as its runtime is driven.
    stalled.block_on(async { tokio::time::sleep(Duration::from_millis(10)).await });
    assert_eq!(stalled.metrics().num_alive_tasks(), 0);
}

/// A refresh fails late, and the source has returned a token since.
#[test]
fn late_failure_changes_nothing() {
    struct LateFailure(tokio::sync::Semaphore, AtomicU64);

    impl TokenSource for LateFailure {
        async fn fetch(&self, _: &TokenRequest<'_>) -> Result<Token, SourceError> {
            if self.1.fetch_add(1, Ordering::SeqCst) == 0 {
                let _ = self.0.acquire().await;
                return Err(SourceError::unavailable("busy").with_retry_after(Duration::from_secs(60)));
            }
            Ok(Token::builder("access").build()?)
        }
    }

    let source = Arc::new(LateFailure(tokio::sync::Semaphore::new(0), AtomicU64::new(0)));
    let limit = Duration::from_millis(200);
    let provider = TokenProvider::builder(Arc::clone(&source)).refresh_timeout(limit).build().unwrap();
    let (stalled, live) = (current_thread(), current_thread());
    stalled.block_on(async {
        let _ = tokio::time::timeout(Duration::from_millis(10), provider.token()).await;
    });
    assert!(live.block_on(provider.token()).is_err());
    live.block_on(provider.token()).unwrap();
    source.0.add_permits(1);
    stalled.block_on(async { tokio::time::sleep(Duration::from_millis(10)).await });
    let status = provider.status();
    assert!(status.last_error.is_none() && status.retry_in.is_none(), "{status:?}");
    // The late refresh does not ask the source again.
    assert_eq!(source.1.load(Ordering::SeqCst), 2);
}

/// A source blocks its thread, with waiters on other threads.
#[test]
fn blocking_source_times_out_waiters() {
    struct Blocking(std::sync::Mutex<std::sync::mpsc::Receiver<()>>);

    impl TokenSource for Blocking {
        async fn fetch(&self, _: &TokenRequest<'_>) -> Result<Token, SourceError> {
            let _ = self.0.lock().unwrap().recv();
            Ok(Token::builder("access").build()?)
        }
    }

    let (end, blocks_until_end) = std::sync::mpsc::channel();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build().unwrap();
    let provider = TokenProvider::builder(Blocking(std::sync::Mutex::new(blocks_until_end)))
        .refresh_timeout(Duration::from_millis(200))
        .build()
        .unwrap();
    let outcome = runtime.block_on(async {
        let waiter = tokio::spawn(async move { provider.token().await });
        tokio::time::timeout(Duration::from_secs(60), waiter).await
    });
    drop(end);
    assert!(matches!(outcome.expect("the caller is stuck").unwrap(), Err(Error::TimedOut(_))));
}

/// `expires_in` is as large as an `Instant` can represent.
#[tokio::test(start_paused = true)]
async fn latest_possible_expiry_works() {
    struct LatestExpiry;

    impl TokenSource for LatestExpiry {
        async fn fetch(&self, _: &TokenRequest<'_>) -> Result<Token, SourceError> {
            let mut end = std::time::Instant::now();
            let mut step = Duration::from_secs(1 << 62);
            while step > Duration::from_nanos(1) {
                while let Some(later) = end.checked_add(step) {
                    end = later;
                }
                step /= 2;
            }
            Ok(Token::builder("access").requested_at(end).expires_in(Duration::ZERO).build()?)
        }
    }

    let provider = TokenProvider::new(LatestExpiry);
    let token = tokio::time::timeout(Duration::from_secs(60), provider.token()).await;
    assert!(token.expect("the caller is stuck").is_ok());
}

/// What was rejected is repaired during the cool-down, which grows to a minute.
#[tokio::test(start_paused = true)]
async fn ready_asks_again_after_repair() {
    let Scene { source, provider, .. } = scene().build();
    for _ in 0..8 {
        source.next(Act::Fail(SourceError::rejected("not yet")));
        provider.token().await.unwrap_err();
        tokio::time::sleep(Duration::from_secs(70)).await;
    }
    source.next(Act::Fail(SourceError::rejected("not yet")));
    provider.token().await.unwrap_err();
    provider.token().await.unwrap_err();
    let begun = tokio::time::Instant::now();
    provider.ready().await.unwrap();
    assert_eq!(begun.elapsed(), Duration::from_secs(1), "the source takes a second");
}
