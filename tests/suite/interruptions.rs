//! Panics of foreign code, runtimes that stall, and shutdowns: no caller waits without an end, and no task is left.
#![cfg(feature = "tracing")]

use std::{
    future::pending,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use tokio::{
    runtime::{Builder, Handle, Runtime},
    sync::{Notify, oneshot},
    time::{sleep, timeout},
};
use tower_bearer::{
    Credential, Error, RetryPolicy, SourceError, Token, TokenProvider, TokenRequest, TokenSource, source_fn,
};
use tracing::{Event, Subscriber, field::Visit};
use tracing_subscriber::{Layer, layer::Context, layer::SubscriberExt};

use crate::support::{self, Act, HOUR, MILLISECOND, SECOND, Scene, scene};

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// A source that never answers.
fn hangs() -> impl TokenSource {
    source_fn(|_| pending::<Result<Token, SourceError>>())
}

/// Starts a refresh on a runtime that is not driven afterwards.
fn start_on_stalled_runtime(provider: &TokenProvider) -> Runtime {
    let stalled = runtime();
    stalled.block_on(async {
        let _ = timeout(20 * MILLISECOND, provider.token()).await;
    });
    assert!(provider.status().refreshing);
    stalled
}

/// Panics at the event that a refresh has failed.
struct PanicsAtFailure;

impl<S: Subscriber> Layer<S> for PanicsAtFailure {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        struct Message(String);

        impl Visit for Message {
            fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
                if field.name() == "message" {
                    self.0 = format!("{value:?}");
                }
            }
        }

        let mut message = Message(String::new());
        event.record(&mut message);
        assert!(!message.0.starts_with("token refresh failed"), "the subscriber panics");
    }
}

/// The runtime drops the refresh, and the subscriber panics when that is reported.
#[test]
fn panic_while_refresh_is_dropped_interrupts_waiters() {
    let provider = TokenProvider::builder(hangs()).refresh_timeout(60 * SECOND).build().unwrap();
    let stalled = start_on_stalled_runtime(&provider);
    let (joined, has_joined) = std::sync::mpsc::channel();
    let waiter = thread::spawn({
        let provider = provider.clone();
        move || {
            runtime().block_on(async {
                let mut token = Box::pin(provider.token());
                assert!(timeout(MILLISECOND, &mut token).await.is_err());
                joined.send(()).unwrap();
                timeout(30 * SECOND, token).await
            })
        }
    });
    has_joined.recv().unwrap();
    tracing::subscriber::with_default(tracing_subscriber::registry().with(PanicsAtFailure), || {
        let _ = catch_unwind(AssertUnwindSafe(|| drop(stalled)));
    });
    assert!(matches!(waiter.join().unwrap(), Ok(Err(Error::Interrupted))));
}

/// A source blocks the thread of a refresh for which no caller waits. The shutdown waits for it no longer than it may
/// take, and the changes end when it has ended.
#[test]
fn shutdown_does_not_wait_for_blocked_source() {
    let (release, released) = std::sync::mpsc::channel::<()>();
    let (calls, released) = (AtomicU64::new(0), std::sync::Mutex::new(released));
    let source = source_fn(move |_| {
        if calls.fetch_add(1, Ordering::SeqCst) > 0 {
            let _ = released.lock().unwrap().recv();
        }
        async { Ok::<_, SourceError>(Token::builder("abc").expires_in(SECOND).build()?) }
    });
    Builder::new_multi_thread().worker_threads(3).enable_all().build().unwrap().block_on(async {
        let provider = TokenProvider::builder(source).refresh_timeout(200 * MILLISECOND).build().unwrap();
        let mut changes = provider.subscribe();
        while !provider.status().refreshing || provider.status().refreshes < 2 {
            provider.token().await.unwrap();
            sleep(MILLISECOND).await;
        }
        timeout(30 * SECOND, provider.shutdown()).await.expect("it waits for the source");
        release.send(()).unwrap();
        let ended = timeout(30 * SECOND, async { while changes.next().await.is_some() {} }).await;
        assert!(ended.is_ok(), "no end after the refresh");
        assert!(!provider.status().refreshing);
    });
}

/// A late token reaches the waiters of the refresh in its place, and the rest of that refresh is no news.
#[test]
fn late_token_reaches_waiters() {
    struct Scripted(AtomicU64, Notify);

    impl TokenSource for Scripted {
        async fn fetch(&self, _: &TokenRequest<'_>) -> Result<Token, SourceError> {
            if self.0.fetch_add(1, Ordering::SeqCst) == 0 {
                self.1.notified().await;
                return Ok(Token::builder("late").build()?);
            }
            pending().await
        }
    }

    let source = Arc::new(Scripted(AtomicU64::new(0), Notify::new()));
    let provider =
        TokenProvider::builder(Arc::clone(&source)).refresh_timeout(500 * MILLISECOND).build().unwrap();
    let stalled = start_on_stalled_runtime(&provider);
    thread::sleep(520 * MILLISECOND);
    let outcome = runtime().block_on(async {
        let waiter = tokio::spawn({
            let provider = provider.clone();
            async move { provider.token().await }
        });
        while source.0.load(Ordering::SeqCst) < 2 {
            sleep(MILLISECOND).await;
        }
        source.1.notify_one();
        thread::spawn(move || stalled.block_on(async { sleep(100 * MILLISECOND).await })).join().unwrap();
        // The refresh in its place has not ended yet.
        assert!(provider.status().refreshing);
        waiter.await.unwrap()
    });
    assert_eq!(outcome.unwrap().access_token(), "late");
}

/// A waiter gets an error of an earlier refresh.
#[test]
fn waiter_gets_no_old_error() {
    let (cool_down, limit) = (10 * MILLISECOND, 300 * MILLISECOND);
    let provider = scene()
        .takes(Duration::ZERO)
        .then(Act::Fail(SourceError::rejected("the key of last week")))
        .times(10, || Act::Hang)
        .provider(|builder| builder.cool_down(cool_down, cool_down).refresh_timeout(limit))
        .build()
        .provider;
    let stalled = runtime();
    stalled.block_on(async {
        assert!(matches!(provider.token().await, Err(Error::Source(_))));
        sleep(50 * MILLISECOND).await;
        let _ = timeout(20 * MILLISECOND, provider.token()).await;
    });
    let outcome = runtime().block_on(provider.token());
    assert!(matches!(outcome, Err(Error::TimedOut(_))), "{outcome:?}");
}

/// The methods of a source are foreign code, which may read the status.
#[test]
fn source_that_reads_status_is_no_deadlock() {
    struct Foreign(Arc<OnceLock<TokenProvider>>);

    impl TokenSource for Foreign {
        async fn fetch(&self, _: &TokenRequest<'_>) -> Result<Token, SourceError> {
            Ok(Token::builder("abc").build()?)
        }

        fn credential(&self) -> Credential {
            Credential::default()
                .with_revision(self.0.get().map_or(0, |provider| provider.status().generation))
        }
    }

    let provider = Arc::new(OnceLock::new());
    provider.set(TokenProvider::new(Foreign(Arc::clone(&provider)))).unwrap();
    support::ends(async move {
        let token = provider.get().unwrap().token().await.unwrap();
        provider.get().unwrap().refresh(&token).await.unwrap();
    });
}

/// A caller joins a refresh that the background has started, and the source then fails once.
#[tokio::test(start_paused = true)]
async fn joiner_of_background_refresh_gets_one_more_attempt() {
    let provider = scene()
        .then(Act::Fail(SourceError::unavailable("once")))
        .provider(|builder| builder.keep_fresh(true).retry(RetryPolicy::new().max_retries(0)))
        .build()
        .provider;
    sleep(10 * MILLISECOND).await;
    assert!(provider.status().refreshing);
    assert!(provider.token().await.is_ok());
}

/// A refresh that the background has started fails while no caller has joined it.
#[tokio::test(start_paused = true)]
async fn background_gets_no_further_attempt() {
    let Scene { source, provider, .. } = scene()
        .then(Act::Live(100 * SECOND))
        .times(2, || Act::Fail(SourceError::unavailable("down")))
        .provider(|builder| builder.keep_fresh(true).retry(RetryPolicy::new().max_retries(0)))
        .build();
    provider.ready().await.unwrap();
    while provider.status().refreshes < 2 {
        sleep(100 * MILLISECOND).await;
    }
    provider.invalidate();
    while provider.status().failed_refreshes == 0 {
        sleep(10 * MILLISECOND).await;
    }
    assert_eq!(source.fetches(), 2);
}

/// A caller of `shutdown` gives up, and the next one does not wait for the end of the background task.
#[tokio::test(start_paused = true)]
async fn each_shutdown_waits_for_background_task() {
    let provider = scene().living(HOUR).provider(|builder| builder.keep_fresh(true)).build().provider;
    provider.ready().await.unwrap();
    sleep(SECOND).await;
    assert_eq!(Handle::current().metrics().num_alive_tasks(), 1);
    assert!(support::at_once(provider.shutdown()).is_none());
    let ends = || async {
        provider.shutdown().await;
        Handle::current().metrics().num_alive_tasks()
    };
    assert_eq!(tokio::join!(ends(), ends()), (0, 0));
}

/// The runtime of the background task ends: a shutdown must not wait for it.
#[test]
fn shutdown_does_not_wait_for_lost_background_task() {
    let lost = runtime();
    let provider = lost.block_on(async {
        let source = source_fn(|_| async { Ok::<_, SourceError>(Token::builder("abc").build()?) });
        let provider = TokenProvider::builder(source).keep_fresh(true).build().unwrap();
        provider.ready().await.unwrap();
        provider
    });
    drop(lost);
    let (done, ended) = oneshot::channel();
    runtime().block_on(async {
        let shutdown = tokio::spawn(async move {
            provider.shutdown().await;
            let _ = done.send(());
        });
        assert!(timeout(10 * SECOND, ended).await.is_ok(), "it waits for the refresh timeout");
        shutdown.await.unwrap();
    });
}

/// The drop of an error's cause is foreign code, which may read the status.
#[test]
fn drop_of_an_error_is_no_deadlock() {
    #[derive(Debug)]
    struct Cause(Arc<OnceLock<TokenProvider>>);

    impl std::fmt::Display for Cause {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("cause")
        }
    }

    impl std::error::Error for Cause {}

    impl Drop for Cause {
        fn drop(&mut self) {
            self.0.get().map(TokenProvider::status);
        }
    }

    let provider = Arc::new(OnceLock::new());
    let source = source_fn({
        let provider = Arc::clone(&provider);
        let calls = AtomicU64::new(0);
        move |_| {
            let cause = Cause(Arc::clone(&provider));
            let error = match calls.fetch_add(1, Ordering::Relaxed) {
                0..4 => Some(SourceError::unavailable("down")),
                4..6 => Some(SourceError::rejected("no")),
                _ => None,
            };
            async move {
                match error {
                    Some(error) => Err(error.with_cause(cause)),
                    None => Ok(Token::builder("abc").build()?),
                }
            }
        }
    });
    provider.set(TokenProvider::new(source)).unwrap();
    support::ends(async move {
        let provider = provider.get().unwrap();
        while provider.token().await.is_err() {
            sleep(10 * SECOND).await;
        }
    });
}
