//! How many refreshes challenges start, which requests wait for them, and how a token that the API does not know yet
//! is tried again.

use std::{
    collections::HashMap,
    convert::Infallible,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::join_all;
use http::{Request, Response, StatusCode, header::AUTHORIZATION};
use http_body_util::Full;
use tokio::time::{Instant, advance, sleep};
use tower::{Layer, ServiceExt, limit::GlobalConcurrencyLimitLayer, service_fn, util::BoxCloneService};
use tower_bearer::{BearerAuthLayer, BoxError, RetryPolicy, SourceError, Token, TokenProvider, source_fn};

use crate::support::{Act, Api, MILLISECOND, SECOND, Scene, Source, scene, scene_of};

type Client = BoxCloneService<Request<Full<Bytes>>, Response<Full<Bytes>>, BoxError>;

/// A request with a body of 100 bytes.
fn post() -> Request<Full<Bytes>> {
    Request::post("https://api.example/videos").body(Full::from(vec![b'x'; 100])).unwrap()
}

async fn status(client: &Client) -> u16 {
    client.clone().oneshot(post()).await.unwrap().status().as_u16()
}

/// Revokes all tokens: the API accepts only the next one.
fn revoke(api: &Api, source: &Source) {
    api.revoke_all();
    api.accept(&format!("access-{}", source.fetches() + 1));
}

/// Clients whose requests cannot be sent again.
fn unreplayable(layer: &BearerAuthLayer, api: &Api) -> [(&'static str, Client); 3] {
    let layer = || layer.clone();
    [
        ("no replay", BoxCloneService::new(layer().no_replay().layer(api.service()))),
        ("over the limit", BoxCloneService::new(layer().buffered(10).layer(api.service()))),
        ("not cloned", BoxCloneService::new(layer().clone_with(|_: &Full<Bytes>| None).layer(api.service()))),
    ]
}

/// No request may be sent again, though each could, and the token is revoked.
#[tokio::test(start_paused = true)]
async fn without_retries_waits_for_refresh() {
    let Scene { api, layer, .. } = scene().accept(["access-2"]).with_token().await;
    let layer = layer.retry(RetryPolicy::new().max_retries(0));
    let client: Client = BoxCloneService::new(layer.layer(api.service()));
    assert_eq!(status(&client).await, 401);
    let later = (1..10).map(|number| {
        let client = client.clone();
        async move {
            sleep(number * 100 * MILLISECOND).await;
            status(&client).await
        }
    });
    assert_eq!(join_all(later).await, [200; 9]);
}

/// Requests that cannot be sent again wait for a permit while the first of them is challenged.
#[tokio::test(start_paused = true)]
async fn unreplayable_behind_limit_waits_for_refresh() {
    let Scene { api, layer, .. } = scene().accept(["access-2"]).build();
    let slow = service_fn(move |request: Request<Full<Bytes>>| {
        let api = api.clone();
        async move {
            sleep(50 * MILLISECOND).await;
            Ok::<_, Infallible>(api.answer(request.headers()))
        }
    });
    let limited = GlobalConcurrencyLimitLayer::new(1).layer(slow);
    let client: Client = BoxCloneService::new(layer.no_replay().layer(limited));
    let statuses = join_all((0..10).map(|_| status(&client))).await;
    assert_eq!(statuses.iter().filter(|status| **status == 401).count(), 1, "{statuses:?}");
}

/// One endpoint challenges every token, and the source fails, or does not answer. Requests to another endpoint are held
/// up once at most.
#[tokio::test(start_paused = true)]
async fn failing_source_holds_up_nobody_for_long() {
    for hangs in [true, false] {
        let down = || Act::Fail(SourceError::unavailable("the server is down"));
        let Scene { source, layer, .. } = scene().takes(Duration::ZERO).with_token().await;
        (0..10_000).for_each(|_| source.next(if hangs { Act::Hang } else { down() }));
        let api = service_fn(|request: Request<Full<Bytes>>| async move {
            let status = if request.uri().path() == "/bad" { 401 } else { 200 };
            Ok::<_, Infallible>(Response::builder().status(status).body(Full::<Bytes>::default()).unwrap())
        });
        let client = layer.no_replay().layer(api);
        let send = |path: &str| {
            let request = Request::get(format!("https://api.example{path}")).body(Full::default()).unwrap();
            client.clone().oneshot(request)
        };
        let (start, mut waited) = (Instant::now(), Vec::new());
        while start.elapsed() < 600 * SECOND {
            assert_eq!(send("/bad").await.unwrap().status(), StatusCode::UNAUTHORIZED);
            let sent = Instant::now();
            assert_eq!(send("/good").await.unwrap().status(), StatusCode::OK);
            waited.extend((!sent.elapsed().is_zero()).then(|| sent.elapsed()));
            sleep(SECOND).await;
        }
        assert!(waited.len() <= 1 && waited.iter().all(|waited| *waited <= 30 * SECOND), "{waited:?}");
    }
}

/// A refresh takes a second, in which nine requests arrive that cannot be sent again, and would get a 401 each.
#[tokio::test(start_paused = true)]
async fn unreplayable_waits_for_refresh() {
    for number in 0..3 {
        let Scene { source, api, layer, .. } = scene().accept(["access-2"]).with_token().await;
        let (name, client) = unreplayable(&layer, &api)[number].clone();
        assert_eq!(status(&client).await, 401, "{name}");
        let statuses = join_all((1..10).map(|request| {
            let client = client.clone();
            async move {
                sleep(request * 100 * MILLISECOND).await;
                status(&client).await
            }
        }));
        assert_eq!(statuses.await, [200; 9], "{name}");
        assert_eq!((api.requests(), source.fetches()), (10, 2), "{name}");
    }
}

/// A request that can be sent again has a token, and is not delayed by a refresh.
#[tokio::test(start_paused = true)]
async fn replayable_waits_for_no_refresh() {
    let Scene { api, layer, .. } = scene().accept(["access-2"]).with_token().await;
    let replayable: [Client; 2] = [
        BoxCloneService::new(layer.clone().layer(api.service())),
        BoxCloneService::new(layer.clone().buffered(1000).layer(api.service())),
    ];
    let [(_, client), ..] = unreplayable(&layer, &api);
    assert_eq!(status(&client).await, 401);
    // The refresh runs. The old token works again.
    api.accept("access-1");
    let start = Instant::now();
    for client in &replayable {
        assert_eq!(status(client).await, 200);
    }
    assert_eq!(start.elapsed(), Duration::ZERO);
    assert_eq!(api.tokens(), ["access-1"; 3]);
}

/// The refresh of a token that is only expiring delays no request.
#[tokio::test(start_paused = true)]
async fn unreplayable_waits_for_challenges_alone() {
    let Scene { api, layer, .. } = scene().living(60 * SECOND).accept(["access-1"]).with_token().await;
    advance(55 * SECOND).await;
    let start = Instant::now();
    for (name, client) in unreplayable(&layer, &api) {
        assert_eq!(status(&client).await, 200, "{name}");
    }
    assert!(layer.provider().status().refreshing);
    assert_eq!((start.elapsed(), api.tokens()), (Duration::ZERO, vec!["access-1".to_owned(); 3]));
}

/// A refresh fails while a request waits: it is sent with the token that there is.
#[tokio::test(start_paused = true)]
async fn failed_refresh_holds_up_no_request() {
    let no = Act::Fail(SourceError::rejected("no"));
    let scene = scene().then(Act::Live(60 * SECOND)).then(no).accept(["access-2"]);
    let Scene { api, layer, .. } = scene.with_token().await;
    let [(_, client), ..] = unreplayable(&layer, &api);
    assert_eq!(status(&client).await, 401);
    assert_eq!(status(&client).await, 401);
    assert_eq!(api.tokens(), ["access-1"; 2]);
}

/// The token is revoked again and again, each time after a success.
#[tokio::test(start_paused = true)]
async fn ten_revocations_heal_at_once() {
    let Scene { source, api, layer, .. } = scene().takes(Duration::ZERO).accept(["access-1"]).build();
    let client: Client = BoxCloneService::new(layer.layer(api.service()));
    assert_eq!(status(&client).await, 200);
    let start = Instant::now();
    for revocation in 1..=10 {
        revoke(&api, &source);
        assert_eq!(status(&client).await, 200, "revocation {revocation}");
    }
    assert_eq!(start.elapsed(), Duration::ZERO);
    // Then one in five seconds heals.
    for revocation in 11..=30 {
        advance(5 * SECOND).await;
        revoke(&api, &source);
        assert_eq!(status(&client).await, 200, "revocation {revocation}");
    }
    assert_eq!(source.fetches(), 31);
}

/// A token is revoked after every success, which must not cost a refresh each for long.
#[tokio::test(start_paused = true)]
async fn refreshes_that_heal_are_bounded() {
    let Scene { source, api, layer, .. } = scene().takes(Duration::ZERO).accept(["access-1"]).build();
    let client: Client = BoxCloneService::new(layer.layer(api.service()));
    let start = Instant::now();
    while start.elapsed() < 60 * SECOND {
        if status(&client).await == 200 {
            revoke(&api, &source);
        }
        advance(100 * MILLISECOND).await;
    }
    // The first token, ten at once, and one in five seconds.
    let fetches = source.fetches();
    assert!((20..=1 + 10 + 12 + 1).contains(&fetches), "{fetches} fetches in a minute");
}

/// The token is revoked again and again, and the challenged requests cannot be sent again. Those after them succeed.
#[tokio::test(start_paused = true)]
async fn revocations_heal_without_replay() {
    let Scene { source, api, layer, .. } = scene().takes(Duration::ZERO).accept(["access-1"]).build();
    let unreplayable: Client = BoxCloneService::new(layer.clone().no_replay().layer(api.service()));
    let replayable: Client = BoxCloneService::new(layer.layer(api.service()));
    assert_eq!(status(&unreplayable).await, 200);
    for revocation in 1..=30 {
        if revocation > 10 {
            advance(5 * SECOND).await;
        }
        revoke(&api, &source);
        assert_eq!(status(&unreplayable).await, 401, "revocation {revocation}");
        let next = if revocation % 2 == 0 { &unreplayable } else { &replayable };
        assert_eq!(status(next).await, 200, "after revocation {revocation}");
    }
    assert_eq!(source.fetches(), 31);
}

/// A provider has every retry that the type allows.
#[tokio::test(start_paused = true)]
async fn provider_takes_most_retries() {
    let Scene { source, provider, .. } = scene()
        .times(5, || Act::Fail(SourceError::unavailable("the auth endpoint is down")))
        .provider(|builder| builder.retry(RetryPolicy::new().max_retries(u32::MAX)))
        .build();
    assert_eq!(provider.token().await.unwrap().access_token(), "access-6");
    assert_eq!(source.fetches(), 6);
}

/// A layer has every retry that the type allows.
#[tokio::test(start_paused = true)]
async fn layer_takes_most_retries() {
    let Scene { api, layer, .. } = scene().accept(["access-4"]).build();
    let layer = layer.retry(RetryPolicy::new().max_retries(u32::MAX));
    let client: Client = BoxCloneService::new(layer.layer(api.service()));
    assert_eq!(status(&client).await, 200);
}

/// More attempts than a backoff up to five seconds makes in ten.
const MANY: u64 = 60;

/// A policy whose first delay may be zero.
fn from_zero() -> RetryPolicy {
    RetryPolicy::new().max_retries(10_000).backoff(Duration::ZERO, 5 * SECOND)
}

/// The backoff of a provider starts from zero, and the source is down for ten seconds.
#[tokio::test(start_paused = true)]
async fn provider_backs_off_from_zero() {
    let (start, calls) = (Instant::now(), Arc::new(AtomicU64::new(0)));
    let source = source_fn({
        let calls = Arc::clone(&calls);
        move |_| {
            let call = calls.fetch_add(1, Ordering::SeqCst) + 1;
            async move {
                if call > MANY {
                    return Err(SourceError::rejected("asked too often"));
                }
                if start.elapsed() < 10 * SECOND {
                    return Err(SourceError::unavailable("down"));
                }
                Ok(Token::builder("access").build()?)
            }
        }
    });
    let provider = TokenProvider::builder(source).retry(from_zero()).build().unwrap();
    let result = provider.token().await;
    let calls = calls.load(Ordering::SeqCst);
    assert!(result.is_ok(), "{result:?} after {calls} calls in {:?}", start.elapsed());
    assert!((2..=MANY).contains(&calls), "{calls} calls");
}

/// The backoff of a layer starts from zero, and the API challenges every token for ten seconds.
#[tokio::test(start_paused = true)]
async fn layer_backs_off_from_zero() {
    let (start, requests) = (Instant::now(), Arc::new(AtomicU64::new(0)));
    let source = source_fn(|_| async { Ok(Token::builder("access").build()?) });
    let scene = scene_of(source).provider(|builder| builder.without_retry_budget());
    let service = service_fn(move |_: Request<Full<Bytes>>| {
        // Without a delay between them, this would never end.
        assert!(requests.fetch_add(1, Ordering::SeqCst) < MANY, "too many requests");
        let status = if start.elapsed() < 10 * SECOND { 401 } else { 200 };
        async move { Ok::<_, Infallible>(Response::builder().status(status).body(Full::default()).unwrap()) }
    });
    let client: Client = BoxCloneService::new(scene.build().layer.retry(from_zero()).layer(service));
    assert_eq!(status(&client).await, 200);
}

/// An API that knows a token only some time after its issue.
#[derive(Clone, Default)]
struct Lagging {
    issued: Arc<Mutex<HashMap<String, Instant>>>,
    lag: Duration,
}

impl Lagging {
    /// Makes a client. Its source, which takes no time, has been asked `fetches` times.
    fn client(&self, fetches: &Arc<AtomicU64>) -> Client {
        let (fetches, issued) = (Arc::clone(fetches), Arc::clone(&self.issued));
        let scene = scene_of(source_fn(move |_| {
            let token = format!("access-{}", fetches.fetch_add(1, Ordering::SeqCst) + 1);
            issued.lock().unwrap().insert(token.clone(), Instant::now());
            async move { Ok(Token::builder(token).build()?) }
        }));
        let api = self.clone();
        let service = service_fn(move |request: Request<Full<Bytes>>| {
            let token = request.headers()[AUTHORIZATION].to_str().unwrap().trim_start_matches("Bearer ");
            let issued = api.issued.lock().unwrap().get(token).copied();
            let status = match issued {
                Some(at) if at.elapsed() >= api.lag => StatusCode::OK,
                _ => StatusCode::UNAUTHORIZED,
            };
            async move { Ok::<_, Infallible>(Response::builder().status(status).body(Full::default()).unwrap()) }
        });
        BoxCloneService::new(scene.build().layer.layer(service))
    }
}

/// The API knows the first token only some time after its issue.
#[tokio::test(start_paused = true)]
async fn first_token_survives_lag_of_api() {
    for lag in [300 * MILLISECOND, SECOND] {
        let mut healed = 0;
        for _ in 0..100 {
            let (api, fetches) = (Lagging { lag, ..Lagging::default() }, Arc::default());
            healed += u32::from(status(&api.client(&fetches)).await == 200);
            let fetches = fetches.load(Ordering::SeqCst);
            assert!(fetches <= 2, "{fetches} fetches for a lag of {lag:?}");
        }
        assert!(healed >= 99, "{healed} of 100 heal after {lag:?}");
    }
}

/// The API knows the token that replaces a revoked one only some time after its issue.
#[tokio::test(start_paused = true)]
async fn next_token_survives_lag_of_api() {
    for lag in [300 * MILLISECOND, SECOND] {
        let mut healed = 0;
        for _ in 0..100 {
            let (api, fetches) = (Lagging { lag, ..Lagging::default() }, Arc::default());
            let client = api.client(&fetches);
            status(&client).await;
            advance(60 * SECOND).await;
            assert_eq!(status(&client).await, 200);
            advance(60 * SECOND).await;
            let before = fetches.load(Ordering::SeqCst);
            api.issued.lock().unwrap().clear();
            healed += u32::from(status(&client).await == 200);
            let fetches = fetches.load(Ordering::SeqCst) - before;
            assert!(fetches <= 2, "{fetches} fetches for a lag of {lag:?}");
        }
        assert!(healed >= 99, "{healed} of 100 heal after {lag:?}");
    }
}

/// A client without the layer reports each challenge, and the API revokes the token every 150 ms.
#[tokio::test(start_paused = true)]
async fn provider_refresh_heals_revocations() {
    let Scene { source, provider, .. } = scene().takes(Duration::ZERO).build();
    let mut healed = 0;
    for _ in 0..8 {
        let challenged = provider.token().await.unwrap();
        let token = provider.refresh(&challenged).await.unwrap();
        healed += u32::from(token.access_token() != challenged.access_token());
        advance(150 * MILLISECOND).await;
    }
    assert_eq!(healed, 8, "of 8 revocations");
    assert_eq!(source.fetches(), 9);
}

/// A client without the layer reports each challenge of an API that challenges every token.
#[tokio::test(start_paused = true)]
async fn provider_refreshes_are_bounded() {
    let Scene { source, provider, .. } = scene().takes(Duration::ZERO).build();
    let start = Instant::now();
    while start.elapsed() < 60 * SECOND {
        let challenged = provider.token().await.unwrap();
        provider.refresh(&challenged).await.unwrap();
        advance(100 * MILLISECOND).await;
    }
    let fetches = source.fetches();
    assert!(fetches <= 1 + 10 + 12 + 1, "{fetches} fetches in a minute");
}

/// A program's own refreshes begin no cool-down for the layer.
#[tokio::test(start_paused = true)]
async fn provider_refreshes_begin_no_cool_down() {
    let Scene { api, provider, layer, .. } = scene().takes(Duration::ZERO).with_token().await;
    for _ in 0..6 {
        let challenged = provider.token().await.unwrap();
        assert_ne!(provider.refresh(&challenged).await.unwrap().generation(), challenged.generation());
        sleep(5 * SECOND).await;
    }
    api.accept("access-8");
    assert_eq!(status(&BoxCloneService::new(layer.layer(api.service()))).await, 200);
}
