//! Random lives of a provider, against a model of api.video: rotating refresh tokens, faults, revocations, a clock, callers
//! that are dropped. What holds after every one of them is at the end of `live`.
//!
//! `PROPTEST_CASES=100000 cargo test --test model` explores more; what a failure shrinks to is kept in
//! `tests/model.proptest-regressions` and run first from then on.

mod support;

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use proptest::prelude::*;
use tokio::{
    runtime::Handle,
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tower::{Layer, ServiceExt};
use tower_bearer::{AllowedOrigins, ApiVideo, BearerAuthLayer, Error, RefreshAhead, TokenProvider};

const SECOND: Duration = Duration::from_secs(1);

/// What goes wrong with an exchange at the auth endpoint.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Trouble {
    None,
    /// Not acted upon.
    Down,
    Limited,
    /// Acted upon, and the answer lost.
    Lost,
    /// Acted upon, and answered as if it had failed.
    Failed,
    Hangs,
}

/// What happens to a provider.
#[derive(Clone, Debug)]
enum Step {
    /// So many requests at once; each is dropped after so many tenths of a second, if at all.
    Requests(Vec<Option<u8>>),
    /// So many requests to the endpoint that refuses every token, one a second.
    Refused(u8),
    Pass(Duration),
    /// The API refuses every token given so far.
    RevokeAccess,
    /// Somebody else authenticates with the key.
    RevokeRefresh,
    Trouble(Trouble),
    /// The account's key is another; the provider is told of it at once, or not.
    Key {
        told: bool,
    },
    Invalidate,
}

fn step() -> impl Strategy<Value = Step> {
    let trouble = prop_oneof![
        3 => Just(Trouble::None),
        1 => Just(Trouble::Down),
        1 => Just(Trouble::Limited),
        2 => Just(Trouble::Lost),
        1 => Just(Trouble::Failed),
        1 => Just(Trouble::Hangs),
    ];
    let pass = prop_oneof![Just(10), Just(500), Just(3_000), Just(20_000), Just(55_000), Just(61_000)];
    prop_oneof![
        6 => prop::collection::vec(prop::option::weighted(0.3, 0..30_u8), 1..5).prop_map(Step::Requests),
        1 => (1..10_u8).prop_map(Step::Refused),
        4 => pass.prop_map(|millis| Step::Pass(Duration::from_millis(millis))),
        2 => Just(Step::RevokeAccess),
        1 => Just(Step::RevokeRefresh),
        3 => trouble.prop_map(Step::Trouble),
        1 => any::<bool>().prop_map(|told| Step::Key { told }),
        1 => Just(Step::Invalidate),
    ]
}

/// The auth endpoint and the API behind it.
#[derive(Default)]
struct Account {
    key: u32,
    trouble: Option<Trouble>,
    given: u32,
    /// Until when each access token works.
    access: HashMap<String, Instant>,
    refresh: Option<String>,
    /// How often each refresh token was presented, and how often it was accepted.
    presented: HashMap<String, (u32, u32)>,
    /// When each exchange began.
    exchanges: Vec<Instant>,
    under_way: u32,
    /// What must never happen.
    broken: Vec<String>,
}

const LIFE: Duration = Duration::from_secs(60);

/// Where every token is refused.
const CHALLENGED: &str = "/refused";

impl Account {
    /// Acts on an exchange; the answer's status and body.
    fn act(&mut self, path: &str, body: &str) -> (StatusCode, String) {
        let text = |name: &str| {
            let value: serde_json::Value = serde_json::from_str(body).unwrap();
            value[name].as_str().map(str::to_owned)
        };
        let good = match path {
            "/auth/api-key" => text("apiKey") == Some(format!("key-{}", self.key)),
            _ => {
                let presented = text("refreshToken").unwrap();
                let good = self.refresh.as_ref() == Some(&presented);
                let times = self.presented.entry(presented).or_default();
                times.0 += 1;
                times.1 += u32::from(good);
                good
            }
        };
        if !good {
            return (StatusCode::BAD_REQUEST, String::new());
        }
        self.given += 1;
        let (access, refresh) = (format!("access-{}", self.given), format!("refresh-{}", self.given));
        self.access.insert(access.clone(), Instant::now() + LIFE);
        self.refresh = Some(refresh.clone());
        let body = format!(
            r#"{{"token_type": "Bearer", "expires_in": {}, "access_token": "{access}", "refresh_token": "{refresh}"}}"#,
            LIFE.as_secs()
        );
        (StatusCode::OK, body)
    }
}

type Shared = Arc<Mutex<Account>>;

async fn exchange(account: Shared, request: Request<String>) -> io::Result<Response<Full<Bytes>>> {
    /// Counts the exchanges that overlap, dropped ones included.
    struct UnderWay(Shared);

    impl Drop for UnderWay {
        fn drop(&mut self) {
            self.0.lock().unwrap().under_way -= 1;
        }
    }

    let trouble = {
        let mut account = account.lock().unwrap();
        account.under_way += 1;
        account.exchanges.push(Instant::now());
        if account.under_way > 1 {
            account.broken.push("two exchanges at once".to_owned());
        }
        account.trouble.unwrap_or(Trouble::None)
    };
    let _under_way = UnderWay(Arc::clone(&account));
    sleep(Duration::from_millis(200)).await;
    let answer = |status: StatusCode| Response::builder().status(status);
    if trouble == Trouble::Hangs {
        std::future::pending::<()>().await;
    }
    if trouble == Trouble::Down {
        return Ok(answer(StatusCode::SERVICE_UNAVAILABLE).body(Full::default()).unwrap());
    }
    if trouble == Trouble::Limited {
        let limited = answer(StatusCode::TOO_MANY_REQUESTS).header("retry-after", "3");
        return Ok(limited.body(Full::default()).unwrap());
    }
    let (status, body) = account.lock().unwrap().act(request.uri().path(), request.body());
    if trouble == Trouble::Lost {
        return Err(io::ErrorKind::ConnectionReset.into());
    }
    if trouble == Trouble::Failed {
        return Ok(answer(StatusCode::INTERNAL_SERVER_ERROR).body(Full::default()).unwrap());
    }
    Ok(answer(status).body(Full::from(body)).unwrap())
}

async fn api(account: Shared, request: Request<Full<Bytes>>) -> io::Result<Response<Full<Bytes>>> {
    sleep(Duration::from_millis(20)).await;
    let mut account = account.lock().unwrap();
    let token =
        request.headers().get("authorization").and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
    let Some(token) = token else {
        account.broken.push("a request without a token".to_owned());
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let good = request.uri().path() != CHALLENGED
        && account.access.get(token).is_some_and(|until| Instant::now() < *until + SECOND);
    let status = if good { StatusCode::OK } else { StatusCode::UNAUTHORIZED };
    Ok(Response::builder().status(status).body(Full::default()).unwrap())
}

async fn live(steps: Vec<Step>, keep_fresh: bool) -> Result<(), TestCaseError> {
    let account = Shared::default();
    let auth = tower::service_fn({
        let account = Arc::clone(&account);
        move |request| exchange(Arc::clone(&account), request)
    });
    let source = ApiVideo::new("key-0").with_client(auth).timeout(5 * SECOND);
    let provider = TokenProvider::builder(source.clone())
        .refresh_ahead(RefreshAhead::new().share(0.2))
        .keep_fresh(keep_fresh)
        .build()
        .unwrap();
    let inner = tower::service_fn({
        let account = Arc::clone(&account);
        move |request| api(Arc::clone(&account), request)
    });
    let service = BearerAuthLayer::with_provider(provider.clone())
        .allowed_origins(AllowedOrigins::https())
        .layer(inner);
    let request_to = |path: &str| {
        Request::get(format!("https://ws.api.video{path}")).body(Full::<Bytes>::default()).unwrap()
    };
    let request = || request_to("/videos");

    let mut callers = JoinSet::new();
    for step in steps {
        match step {
            Step::Requests(patience) => {
                for tenths in patience {
                    let sent = service.clone().oneshot(request());
                    let patience = tenths.map_or(Duration::MAX, |tenths| SECOND * tenths.into() / 10);
                    callers.spawn(async move { timeout(patience, sent).await.ok() });
                }
            }
            Step::Refused(requests) => {
                for _ in 0..requests {
                    let sent = service.clone().oneshot(request_to(CHALLENGED));
                    callers.spawn(async move { Some(sent.await) });
                    sleep(SECOND).await;
                }
            }
            Step::Pass(duration) => sleep(duration).await,
            Step::RevokeAccess => account.lock().unwrap().access.clear(),
            Step::RevokeRefresh => account.lock().unwrap().refresh = None,
            Step::Trouble(trouble) => account.lock().unwrap().trouble = Some(trouble),
            Step::Key { told } => {
                let key = {
                    let mut account = account.lock().unwrap();
                    account.key += 1;
                    account.refresh = None;
                    account.key
                };
                if told {
                    source.set_key(format!("key-{key}"));
                }
            }
            Step::Invalidate => provider.invalidate(),
        }
    }

    // Nobody waits for ever: a refresh's limit, and the requests' own retries.
    let ends = timeout(SECOND * 120, callers.join_all()).await;
    prop_assert!(ends.is_ok(), "a caller is stuck: {:?}", provider.status());
    for end in ends.unwrap().into_iter().flatten() {
        match end {
            Ok(answer) => prop_assert!([200, 401].contains(&answer.status().as_u16())),
            Err(error) => prop_assert!(error.is::<Error>(), "{error:?}"),
        }
    }
    // All is well again: so is the next request, once the longest pause is over.
    let key = {
        let mut account = account.lock().unwrap();
        account.trouble = None;
        account.key
    };
    source.set_key(format!("key-{key}"));
    sleep(SECOND * 65).await;
    let answer = service.clone().oneshot(request()).await;
    prop_assert!(answer.is_ok(), "{answer:?}");
    prop_assert_eq!(answer.unwrap().status(), StatusCode::OK);

    // A revocation of the token that was accepted heals at once, and the next one too.
    for _ in 0..2 {
        account.lock().unwrap().access.clear();
        let answer = service.clone().oneshot(request()).await;
        prop_assert_eq!(answer.unwrap().status(), StatusCode::OK);
    }
    // One endpoint refuses every token, another works: the one costs an exchange per five seconds at most.
    let before = account.lock().unwrap().exchanges.len();
    for _ in 0..13 {
        let refused = service.clone().oneshot(request_to(CHALLENGED)).await;
        prop_assert_eq!(refused.unwrap().status(), StatusCode::UNAUTHORIZED);
        prop_assert_eq!(service.clone().oneshot(request()).await.unwrap().status(), StatusCode::OK);
        sleep(SECOND).await;
    }
    {
        let account = account.lock().unwrap();
        let since: Vec<_> = account.exchanges[before..].windows(2).map(|two| two[1] - two[0]).collect();
        prop_assert!(since.iter().all(|since| *since >= 5 * SECOND), "{:?}", since);
    }
    // And a revocation heals on the other within that time.
    account.lock().unwrap().access.clear();
    sleep(5 * SECOND).await;
    prop_assert_eq!(service.clone().oneshot(request()).await.unwrap().status(), StatusCode::OK);

    drop(service);
    provider.shutdown().await;
    prop_assert!(!provider.status().refreshing);
    drop(provider);
    prop_assert_eq!(Handle::current().metrics().num_alive_tasks(), 0);
    let account = account.lock().unwrap();
    prop_assert!(account.broken.is_empty(), "{:?}", account.broken);
    for (refresh_token, (presented, accepted)) in &account.presented {
        prop_assert!(*accepted <= 1 && *presented <= 2, "{refresh_token}: {presented}, {accepted}");
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 10_000, max_shrink_iters: 10_000, ..ProptestConfig::default() })]

    #[test]
    fn heals_and_spends_no_token_twice(
        steps in prop::collection::vec(step(), 1..16),
        keep_fresh: bool,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(live(steps, keep_fresh))?;
    }
}
