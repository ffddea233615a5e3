//! A request waits only if there is no valid token. Callers do not notice an outage of the source while a token is
//! valid.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use http::StatusCode;
use tokio::{
    runtime::{Builder, Handle, Runtime},
    time::{Instant, advance, sleep},
};
use tower::{Service, ServiceExt};
use tower_bearer::{
    Credential, Error, Freshness, RefreshAhead, SourceError, Token, TokenProvider, TokenRequest, TokenSource,
};

use crate::support::{
    self, Act, HOUR, MINUTE, SECOND, Scene, SceneBuilder, Source, at_once, chain, get, scene, scene_of,
};

/// Builds a scene whose provider keeps its token fresh.
fn keep_fresh<T: TokenSource>(scene: SceneBuilder<'_, T>) -> Scene<T> {
    scene.provider(|builder| builder.keep_fresh(true)).build()
}

fn rejected() -> Act {
    Act::Fail(SourceError::rejected("the key was rejected"))
}

fn down() -> Act {
    Act::Fail(SourceError::unavailable("the auth endpoint is down"))
}

/// Runs all tasks until they wait, without advancing the clock.
async fn settle() {
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().start_paused(true).build().unwrap()
}

/// A token is fresh, then expiring, then expired: callers wait only at its end.
#[tokio::test(start_paused = true)]
async fn token_is_fresh_expiring_expired() {
    let ahead = RefreshAhead::new().share(0.5).jitter(0.0);
    let provider = scene().living(HOUR).provider(|builder| builder.refresh_ahead(ahead)).build().provider;
    let freshness = || provider.status().freshness;
    assert_eq!(freshness(), Freshness::Missing);
    provider.token().await.unwrap();
    assert_eq!(freshness(), Freshness::Fresh);
    advance(HOUR / 2 - SECOND).await;
    assert_eq!(freshness(), Freshness::Fresh);
    advance(SECOND).await;
    assert_eq!(freshness(), Freshness::Expiring);
    assert_eq!(provider.status().remaining, Some(HOUR / 2));
    advance(HOUR / 2).await;
    assert_eq!(freshness(), Freshness::Expired);
    assert_eq!(provider.status().refreshes, 1);
    assert_eq!(provider.token().await.unwrap().generation(), 2);
}

/// `expires_in` is zero: a lifetime that is over on arrival is unknown, and costs no fetches.
#[tokio::test(start_paused = true)]
async fn zero_lifetime_costs_no_fetches() {
    let Scene { source, provider, .. } = keep_fresh(scene().living(Duration::ZERO));
    provider.ready().await.unwrap();
    let start = Instant::now();
    while start.elapsed() < 10 * MINUTE {
        sleep(SECOND).await;
        assert!(at_once(provider.token()).expect("a caller must not wait").is_ok());
    }
    assert_eq!((source.fetches(), provider.status().remaining), (1, None));
}

/// The source returns the same token again and again.
#[tokio::test(start_paused = true)]
async fn repeated_token_causes_no_fetch_loop() {
    let Scene { source, provider, .. } = keep_fresh(scene().then(Act::Live(HOUR)));
    let first = provider.ready().await.unwrap();
    // A metadata server returns the same token with its remaining lifetime, until four minutes before its expiry.
    let expiry = Instant::now() + HOUR;
    let mut changes = provider.subscribe();
    while provider.status().generation == 1 {
        let left = expiry.saturating_duration_since(Instant::now() + SECOND);
        source.next(if left > 4 * MINUTE { Act::Again(left) } else { Act::Live(HOUR) });
        let fetches = source.fetches();
        while source.fetches() == fetches {
            changes.next().await.unwrap();
        }
        changes.next().await.unwrap();
    }
    let current = provider.current().unwrap();
    assert_eq!(current.generation(), 2, "a repeated access token counted as a new one");
    assert_ne!(current.access_token(), first.access_token());
    assert!(source.fetches() <= 5, "{}", source.fetches());

    // A repeated access token keeps its generation. Every fetch after the first gets it as the previous token.
    assert!(source.previous.lock().unwrap().iter().skip(1).all(|generation| *generation == Some(1)));
}

/// The API challenges a token, and the source returns the same one.
#[tokio::test(start_paused = true)]
async fn refetched_same_token_is_not_new() {
    let Scene { source, service, .. } =
        scene().then(Act::Live(HOUR)).then(Act::Again(HOUR)).then(Act::Again(HOUR)).build();
    let start = Instant::now();
    let response = service.clone().oneshot(get()).await.unwrap();
    assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
    // The retries waited for the backoff. The cool-down prevented one fetch per retry.
    assert_eq!(source.fetches(), 2);
    assert!(start.elapsed() >= 2 * SECOND + Duration::from_millis(200));
}

/// Tokens expire after four seconds.
#[tokio::test(start_paused = true)]
async fn four_second_token_blocks_no_caller() {
    let ahead = RefreshAhead::new().between(MINUTE, HOUR);
    let Scene { source, provider, .. } =
        scene().living(4 * SECOND).provider(|builder| builder.refresh_ahead(ahead)).build();
    provider.token().await.unwrap();
    for _ in 0..60_000 {
        sleep(Duration::from_millis(1)).await;
        assert!(at_once(provider.token()).expect("a caller must not wait").is_ok());
    }
    // A refresh starts after half of the lifetime and takes a second.
    let fetches = source.fetches();
    assert!((19..=22).contains(&fetches), "{fetches}");
}

/// A clock is changed, or the machine is suspended, so that only the API knows of the expiry.
#[tokio::test(start_paused = true)]
async fn expiry_seen_only_by_api_heals() {
    let Scene { api, source, service, .. } = scene().living(HOUR).accept(["access-1"]).build();
    assert_eq!(service.clone().oneshot(get()).await.unwrap().status(), StatusCode::OK);

    // The machine was suspended: an hour passed for the API, but not for the monotonic clock.
    api.revoke_all();
    api.accept("access-2");
    let requests = (0..10).map(|_| tokio::spawn(service.clone().oneshot(get())));
    for request in requests.collect::<Vec<_>>() {
        assert_eq!(request.await.unwrap().unwrap().status(), StatusCode::OK);
    }
    assert_eq!(source.fetches(), 2);
}

/// The auth endpoint is down for half an hour while the token lives: no request fails, and the provider recovers within
/// one backoff step.
#[tokio::test(start_paused = true)]
async fn outage_is_unnoticed_while_token_lives() {
    /// A source that fails while the flag is set.
    struct Outage(AtomicBool);

    impl TokenSource for Outage {
        async fn fetch(&self, request: &TokenRequest<'_>) -> Result<Token, SourceError> {
            sleep(Duration::from_millis(200)).await;
            if self.0.load(Ordering::Relaxed) {
                return Err(SourceError::unavailable("the auth endpoint is down"));
            }
            let number = request.previous().map_or(0, Token::generation) + 1;
            Ok(Token::builder(format!("access-{number}")).expires_in(HOUR).build()?)
        }
    }

    for keep_fresh in [false, true] {
        // The token is expiring after 24 minutes, four minutes into the outage.
        let ahead = RefreshAhead::new().share(0.6).jitter(0.0);
        let Scene { source, provider, mut service, .. } = scene_of(Outage(AtomicBool::new(false)))
            .accept(["access-1", "access-2"])
            .provider(|builder| builder.refresh_ahead(ahead).keep_fresh(keep_fresh))
            .build();
        provider.ready().await.unwrap();
        let start = Instant::now();
        while start.elapsed() < 55 * MINUTE {
            let down = (20 * MINUTE..50 * MINUTE).contains(&start.elapsed());
            source.0.store(down, Ordering::Relaxed);
            let sent = Instant::now();
            let response = service.ready().await.unwrap().call(get()).await.unwrap();
            assert_eq!((response.status(), sent.elapsed()), (StatusCode::OK, Duration::ZERO));
            // At most one backoff step and the exchange itself.
            let must_be_new = start.elapsed() > 50 * MINUTE + Duration::from_millis(5200 + 200);
            assert!(
                !must_be_new || provider.status().generation == 2,
                "no new token: {:?}",
                provider.status()
            );
            sleep(Duration::from_millis(100)).await;
        }
        assert!(provider.status().failed_refreshes > 0);
    }
}

/// The token expires during an outage of the auth endpoint.
#[tokio::test(start_paused = true)]
async fn outage_past_expiry_is_typed_error() {
    let Scene { api, provider, service, .. } = keep_fresh(scene().then(Act::Live(MINUTE)).times(100, down));
    provider.ready().await.unwrap();
    sleep(MINUTE + SECOND).await;
    let error = service.oneshot(get()).await.unwrap_err();
    assert!(matches!(support::ours(&error), Error::Source(_)), "{error:?}");
    assert_eq!(api.requests(), 0);
}

/// No request is sent for hours: only `keep_fresh` refreshes then.
#[tokio::test(start_paused = true)]
async fn only_keep_fresh_refreshes_when_idle() {
    let Scene { source, provider, .. } = keep_fresh(scene().living(HOUR));
    let idle = scene().living(HOUR).build();
    for _ in 0..24 * 60 {
        sleep(MINUTE).await;
        assert!(provider.current().is_some());
    }
    // A refresh starts after nine tenths of each hour. Jitter changes the count by about one.
    let fetches = source.fetches();
    assert!((26..=28).contains(&fetches), "{fetches}");
    assert_eq!((idle.source.fetches(), idle.provider.status().refreshes), (0, 0));
}

/// A week of virtual time with every kind of fault ends the background task.
#[tokio::test(start_paused = true)]
async fn background_survives_week_of_faults() {
    #[derive(Default)]
    struct Week {
        fetches: AtomicU64,
        /// The start of each fetch.
        starts: Mutex<Vec<Instant>>,
        healthy: AtomicBool,
        /// The expiry of the newest token.
        valid_until: Mutex<Option<Instant>>,
        revision: AtomicU64,
    }

    impl TokenSource for Week {
        async fn fetch(&self, _: &TokenRequest<'_>) -> Result<Token, SourceError> {
            let fetch = self.fetches.fetch_add(1, Ordering::Relaxed);
            self.starts.lock().unwrap().push(Instant::now());
            // Pseudorandom, and the same in every run.
            let draw = fetch.wrapping_mul(6_364_136_223_846_793_005).rotate_left(23) % 20;
            sleep(Duration::from_millis(50)).await;
            let healthy = self.healthy.load(Ordering::Relaxed);
            let lifetime = match draw {
                _ if healthy => HOUR,
                0 => return Err(SourceError::rejected("rejected")),
                1 => return Err(SourceError::configuration("no such URL")),
                2..=4 => return Err(SourceError::unavailable("down")),
                5 => return Err(SourceError::unavailable("limited").with_retry_after(20 * SECOND)),
                6 => return Err(SourceError::unavailable("limited").with_retry_after(Duration::MAX)),
                7 => return Err(SourceError::invalid_response("not a token response")),
                8 => panic!("expected panic of the source"),
                9 => std::future::pending().await,
                10 => {
                    self.revision.fetch_add(1, Ordering::Relaxed);
                    return Err(SourceError::rejected("the key has just been replaced"));
                }
                11 => SECOND,
                12 => 2 * SECOND,
                13 => {
                    sleep(29 * SECOND).await;
                    MINUTE
                }
                14 => 5 * MINUTE,
                _ => HOUR,
            };
            *self.valid_until.lock().unwrap() = Some(Instant::now() + lifetime);
            let text = format!("access-{}", if draw == 15 { 0 } else { fetch });
            let requested_at = Instant::now().into_std();
            Ok(Token::builder(text).expires_in(lifetime).requested_at(requested_at).build()?)
        }

        fn credential(&self) -> Credential {
            Credential::default().with_revision(self.revision.load(Ordering::Relaxed))
        }
    }

    std::panic::set_hook(Box::new(|info| {
        // The panics of the source are expected and would fill the output.
        if !info.to_string().contains("expected panic") {
            eprintln!("{info}");
        }
    }));
    let Scene { source, provider, .. } = keep_fresh(scene_of(Week::default()));
    let start = Instant::now();
    while start.elapsed() < 7 * 24 * HOUR {
        sleep(Duration::from_millis(30_500)).await;
        if source.valid_until.lock().unwrap().is_some_and(|at| Instant::now() < at) {
            assert!(
                at_once(provider.token()).expect("a caller must not wait while a token is valid").is_ok()
            );
        }
    }
    source.healthy.store(true, Ordering::Relaxed);
    // Longer than the maximum cool-down or `Retry-After`, plus a refresh that hangs.
    sleep(2 * MINUTE).await;
    assert_eq!(provider.status().freshness, Freshness::Fresh);
    assert!(provider.status().last_error.is_none());

    let fetches = source.starts.lock().unwrap();
    assert!(fetches.len() > 400, "{} fetches in a week", fetches.len());
    for minute in fetches.windows(100) {
        assert!(minute[99] - minute[0] > MINUTE, "a hundred fetches within {:?}", minute[99] - minute[0]);
    }
    drop(std::panic::take_hook());
}

/// The last handle of a provider is dropped, and the background task goes on.
#[tokio::test(start_paused = true)]
async fn background_ends_with_last_handle() {
    let Scene { provider, layer, service, .. } = keep_fresh(scene().living(HOUR));
    provider.ready().await.unwrap();
    let tasks = || Handle::current().metrics().num_alive_tasks();
    assert_eq!(tasks(), 1);
    drop(provider);
    drop(layer);
    settle().await;
    assert_eq!(tasks(), 1, "a service holds a handle");
    drop(service);
    settle().await;
    assert_eq!(tasks(), 0);
}

/// The last handle of a provider is dropped during a fetch, whose refresh token must not get lost.
#[tokio::test(start_paused = true)]
async fn running_fetch_outlives_last_handle() {
    for keep_fresh in [false, true] {
        let Scene { source, provider, .. } =
            scene().living(HOUR).provider(|builder| builder.keep_fresh(keep_fresh)).build();
        let mut changes = provider.subscribe();
        let _ = tokio::time::timeout(SECOND / 2, provider.token()).await;
        drop(provider);
        let mut last = None;
        while let Some(status) = changes.next().await {
            last = Some(status);
        }
        let last = last.unwrap();
        assert_eq!((last.generation, last.refreshing, last.shut_down), (1, false, true));
        assert_eq!(source.fetches(), 1);
        settle().await;
        assert_eq!(Handle::current().metrics().num_alive_tasks(), 0);
    }
}

/// The last handle of a provider is dropped during the backoff of a refresh, which ends.
#[tokio::test(start_paused = true)]
async fn backoff_ends_with_last_handle() {
    let source =
        Source::new().then(Act::Fail(SourceError::unavailable("limited").with_retry_after(20 * SECOND)));
    let provider = TokenProvider::new(Arc::clone(&source));
    let _ = tokio::time::timeout(2 * SECOND, provider.token()).await;
    assert!(provider.status().refreshing);
    drop(provider);
    let start = Instant::now();
    settle().await;
    assert_eq!(Handle::current().metrics().num_alive_tasks(), 0);
    assert_eq!((start.elapsed(), source.fetches()), (Duration::ZERO, 1));
}

/// The runtime of the background task ends, and the program uses another one.
#[test]
fn background_restarts_on_new_runtime() {
    // Built outside a runtime, so the background task starts with the first request.
    let Scene { source, provider, .. } = keep_fresh(scene().living(HOUR));
    let first = runtime();
    first.block_on(async {
        sleep(10 * HOUR).await;
        assert_eq!(source.fetches(), 0);
        provider.token().await.unwrap();
        sleep(10 * HOUR).await;
        assert!(source.fetches() > 10);
    });
    drop(first);

    let second = runtime();
    second.block_on(async {
        // The clock of this runtime starts at the same time as the clock of the first one.
        sleep(30 * HOUR).await;
        let before = source.fetches();
        provider.token().await.unwrap();
        sleep(10 * HOUR).await;
        assert!(source.fetches() > before + 10);
        assert_eq!(provider.status().freshness, Freshness::Fresh);
    });
}

/// The key is replaced while no request is sent.
#[tokio::test(start_paused = true)]
async fn idle_provider_notices_new_key() {
    let Scene { source, provider, .. } = keep_fresh(scene().living(HOUR).times(10, rejected));
    // The cool-down reaches its maximum.
    sleep(5 * MINUTE).await;
    let before = source.fetches();
    assert!((7..=10).contains(&before), "{before}");
    while source.fetches() < 10 {
        sleep(MINUTE).await;
    }
    sleep(2 * SECOND).await;
    source.revision.fetch_add(1, Ordering::SeqCst);
    // One second until the provider checks the revision, and one for the fetch.
    sleep(2 * SECOND + Duration::from_millis(10)).await;
    assert_eq!(provider.current().unwrap().generation(), 1);
}

/// The auth endpoint is down when the program starts: `ready` waits for it, until an error is permanent.
#[tokio::test(start_paused = true)]
async fn ready_retries_until_permanent_error() {
    // One refresh makes three attempts, so five failures need a second refresh.
    let provider = scene().times(5, down).build().provider;
    assert_eq!(provider.ready().await.unwrap().access_token(), "access-6");
    assert_eq!(provider.status().failed_refreshes, 1);

    let Scene { source, provider, .. } = scene().then(rejected()).build();
    let error = provider.ready().await.unwrap_err();
    assert!(chain(&error).contains("the key was rejected"));
    assert_eq!(source.fetches(), 1);

    // The endpoint stays down. `ready` returns the error after the timeout.
    let limited = scene().times(100, down).provider(|builder| builder.refresh_timeout(10 * SECOND));
    let provider = limited.build().provider;
    let start = Instant::now();
    let error = provider.ready().await.unwrap_err();
    assert!(chain(&error).contains("is down"), "{error:?}");
    assert!((5 * SECOND..21 * SECOND).contains(&start.elapsed()), "{:?}", start.elapsed());
}

/// A token is invalidated, and a caller still gets it.
#[tokio::test(start_paused = true)]
async fn invalidated_token_is_never_given() {
    let Scene { api, source, provider, mut service, .. } =
        scene().living(HOUR).accept(["access-2"]).with_token().await;
    let _ = service.ready().await.unwrap();
    provider.invalidate();
    assert!(provider.current().is_none());
    assert_eq!(provider.status().freshness, Freshness::Missing);
    assert_eq!(service.call(get()).await.unwrap().status(), StatusCode::OK);
    assert_eq!(api.tokens(), ["access-2"]);
    assert_eq!(*source.previous.lock().unwrap(), [None, Some(1)]);
    // With `keep_fresh`, the background task gets a new token without a caller.
    let provider = keep_fresh(scene().living(HOUR)).provider;
    provider.ready().await.unwrap();
    provider.invalidate();
    sleep(2 * SECOND).await;
    assert_eq!(provider.current().unwrap().generation(), 2);
}

/// A program shuts down during an exchange, whose refresh token must not get lost.
#[tokio::test(start_paused = true)]
async fn shutdown_waits_for_running_exchange() {
    let Scene { source, provider, .. } = keep_fresh(scene().living(HOUR));
    settle().await;
    assert!(provider.status().refreshing);
    provider.shutdown().await;
    assert_eq!((provider.status().generation, provider.status().shut_down), (1, true));
    assert_eq!(Handle::current().metrics().num_alive_tasks(), 0);

    // Callers still get the valid token. A challenge of it is an error.
    let token = at_once(provider.token()).unwrap().unwrap();
    assert!(matches!(provider.refresh(&token).await, Err(Error::ShutDown)));
    advance(2 * HOUR).await;
    assert!(matches!(provider.token().await, Err(Error::ShutDown)));
    assert!(matches!(provider.ready().await, Err(Error::ShutDown)));
    provider.shutdown().await;
    assert_eq!(source.fetches(), 1);
    assert!(provider.subscribe().next().await.is_none());
}

/// The API responds with 401 to every token: at most one refresh starts per cool-down, however many requests are
/// challenged.
#[tokio::test(start_paused = true)]
async fn endless_401s_obey_cool_down() {
    let Scene { source, service, .. } = scene().living(HOUR).build();
    let start = Instant::now();
    while start.elapsed() < HOUR {
        let response = service.clone().oneshot(get()).await.unwrap();
        assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
        sleep(Duration::from_millis(200)).await;
    }
    // The cool-downs are 1, 2, 4, … and 32 s, then a minute each.
    let fetches = source.fetches();
    assert!((50..=68).contains(&fetches), "{fetches}");
}

/// A subscriber misses a change of the status, or waits after the last handle was dropped.
#[tokio::test(start_paused = true)]
async fn subscriber_sees_changes_until_drop() {
    let provider = scene().living(HOUR).then(down()).build().provider;
    let mut changes = provider.subscribe();
    let waiter = tokio::spawn({
        let provider = provider.clone();
        async move { provider.token().await.map(|token| token.generation()) }
    });
    let started = changes.next().await.unwrap();
    assert!(started.refreshing && started.last_error.is_none());
    let failed = changes.next().await.unwrap();
    assert!(failed.refreshing && failed.last_error.is_some() && failed.retry_in.is_some());
    let published = changes.next().await.unwrap();
    assert_eq!(
        (published.generation, published.refreshing, published.freshness),
        (1, false, Freshness::Fresh)
    );
    assert_eq!(waiter.await.unwrap().unwrap(), 1);
    drop(provider);
    assert!(changes.next().await.unwrap().shut_down);
    assert!(changes.next().await.is_none());
}

/// An option of a provider is out of its range.
#[test]
fn build_checks_every_option() {
    let builder = || TokenProvider::builder(Source::new());
    for (builder, option) in [
        (builder().refresh_timeout(Duration::ZERO), "refresh_timeout"),
        (builder().refresh_timeout(HOUR + SECOND), "refresh_timeout"),
        (builder().cool_down(Duration::ZERO, SECOND), "cool_down"),
        (builder().cool_down(2 * SECOND, SECOND), "cool_down"),
        (builder().cool_down(SECOND, 2 * HOUR), "cool_down"),
        (builder().name(""), "name"),
    ] {
        match builder.build() {
            Err(Error::InvalidOption(text)) => assert!(text.contains(option), "{text}"),
            other => panic!("{other:?}"),
        }
    }
    assert!(builder().refresh_timeout(HOUR).cool_down(SECOND, HOUR).name("videos").build().is_ok());
}

/// A token without a known lifetime is used until the API challenges it.
#[tokio::test(start_paused = true)]
async fn zero_lifetime_token_lasts_until_challenge() {
    let Scene { api, source, service, .. } = scene().living(Duration::ZERO).accept(["access-1"]).build();
    for _ in 0..9 {
        assert_eq!(service.clone().oneshot(get()).await.unwrap().status(), StatusCode::OK);
        sleep(MINUTE).await;
    }
    assert_eq!(source.fetches(), 1);
    api.revoke_all();
    api.accept("access-2");
    assert_eq!(service.oneshot(get()).await.unwrap().status(), StatusCode::OK);
    assert_eq!(source.fetches(), 2);
}

/// Tokens that hardly live cost at most ten fetches in a second, and so do refreshes that time out.
#[tokio::test(start_paused = true)]
async fn fetches_are_bounded() {
    let fetches = Arc::new(AtomicU64::new(0));
    for (keep_fresh, takes) in [(false, 0), (true, 0), (false, 1000), (true, 1000)] {
        fetches.store(0, Ordering::SeqCst);
        let source = tower_bearer::source_fn({
            let fetches = Arc::clone(&fetches);
            move |_| {
                let number = fetches.fetch_add(1, Ordering::SeqCst);
                async move {
                    sleep(Duration::from_millis(takes)).await;
                    let token = Token::builder(format!("access-{number}"));
                    Ok::<_, SourceError>(token.expires_in(Duration::from_millis(110)).build()?)
                }
            }
        });
        let ahead = RefreshAhead::new().share(0.9);
        let builder = TokenProvider::builder(source).refresh_ahead(ahead).keep_fresh(keep_fresh);
        let provider = builder.refresh_timeout(Duration::from_millis(10)).build().unwrap();
        let start = Instant::now();
        while start.elapsed() < MINUTE {
            let _ = provider.token().await;
            sleep(Duration::from_millis(1)).await;
        }
        let fetches = fetches.load(Ordering::SeqCst);
        assert!((10..=600 + 2).contains(&fetches), "{fetches}, {keep_fresh}, {takes}");
    }
}

/// A token expires before it arrives: its lifetime is unknown, and it is used.
#[tokio::test(start_paused = true)]
async fn token_expired_in_transit_is_used() {
    struct Slow {
        previous: Mutex<Vec<Option<String>>>,
        /// The duration of each exchange, the last one first.
        durations: Mutex<Vec<Duration>>,
    }

    impl TokenSource for Slow {
        async fn fetch(&self, request: &TokenRequest<'_>) -> Result<Token, SourceError> {
            let previous = request.refresh_token().map(str::to_owned);
            let call = {
                let mut seen = self.previous.lock().unwrap();
                seen.push(previous);
                seen.len()
            };
            let requested_at = Instant::now().into_std();
            let duration = self.durations.lock().unwrap().pop().unwrap();
            sleep(duration).await;
            let token = Token::builder(format!("access-{call}")).refresh_token(format!("refresh-{call}"));
            Ok(token.expires_in(10 * SECOND).requested_at(requested_at).build()?)
        }
    }

    let durations = Mutex::new(vec![SECOND, 12 * SECOND, SECOND]);
    let source = Arc::new(Slow { previous: Mutex::default(), durations });
    let provider = TokenProvider::new(Arc::clone(&source));
    let first = provider.token().await.unwrap();
    let refresh = tokio::spawn({
        let (provider, first) = (provider.clone(), first.clone());
        async move { provider.refresh(&first).await }
    });
    sleep(5 * SECOND).await;
    assert_eq!(provider.token().await.unwrap().access_token(), "access-1");
    let second = refresh.await.unwrap().unwrap();
    assert_eq!((second.access_token(), second.remaining()), ("access-2", None));
    provider.refresh(&second).await.unwrap();
    let previous = source.previous.lock().unwrap().clone();
    assert_eq!(previous, [None, Some("refresh-1".to_owned()), Some("refresh-2".to_owned())]);
}
