//! Random sequences of events for a provider, against a model of api.video.
//!
//! The model has rotating refresh tokens, faults, revocations, interrupted refreshes, a clock, callers that are dropped
//! and waiters that give up. The end of `run` checks what must hold after every sequence.
//!
//! `TEST_RUNS=500 cargo test --test suite model::` runs more sequences. A failure prints the shortest sequence that fails,
//! and the `TEST_SEED` that repeats it.

use std::{
    collections::HashMap,
    io,
    panic::{catch_unwind, resume_unwind},
    pin::pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::{Either, select};
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use tokio::{
    runtime::{Builder, Handle},
    sync::Notify,
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tower::{Layer, ServiceExt};
use tower_bearer::{
    AllowedOrigins, ApiVideo, Credential, Error, RefreshAhead, SourceError, Token, TokenClient, TokenRequest,
    TokenSource,
};

use crate::support::{SECOND, Scene, fleet::Chance, runs, scene_of, sequences};

/// How an exchange with the auth endpoint fails.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    /// The endpoint does not process the request, and responds with 503.
    Down,
    /// The endpoint does not process the request, and responds with 429.
    Limited,
    /// The endpoint processes the request, and the response is lost.
    Lost,
    /// The endpoint processes the request, and responds with 500.
    Failed,
    /// The endpoint never responds.
    Hangs,
}

/// One event of a sequence.
#[derive(Clone, Debug)]
enum Step {
    /// Concurrent requests. Each is dropped after its number of tenths of a second, if it has one.
    Requests(Vec<Option<u8>>),
    /// A number of requests to the endpoint that challenges every token, one per second.
    Challenged(u8),
    /// So many times, 150 ms apart: the API challenges every token issued so far, and then gets a request.
    Revocations(u8),
    /// So many requests to the endpoint that challenges every token, each beside one that works.
    Beside(u8),
    /// Waiters for a token. Each gives up after its number of tenths of a second.
    Waiters(Vec<u8>),
    /// The running refresh is interrupted, as when its runtime ends.
    Interrupt,
    Pass(Duration),
    /// The API challenges every token issued so far.
    RevokeAccess,
    /// Another client authenticates with the key, which revokes the refresh token.
    RevokeRefresh,
    Fault(Fault),
    /// The key of the account changes. If `is_set`, the source gets the new key at once.
    Key {
        is_set: bool,
    },
    Invalidate,
}

fn step(chance: &mut Chance) -> Step {
    match chance.draw(28) {
        0..6 => Step::Requests(chance.list(4, |chance| (chance.draw(10) < 3).then(|| chance.draw(30) as u8))),
        6 => Step::Challenged(1 + chance.draw(9) as u8),
        7 => Step::Revocations(1 + chance.draw(19) as u8),
        8 => Step::Beside(1 + chance.draw(19) as u8),
        9 => Step::Waiters(chance.list(4, |chance| chance.draw(30) as u8)),
        10 | 11 => Step::Interrupt,
        12..16 => Step::Pass(Duration::from_millis(chance.pick(&[10, 500, 3_000, 20_000, 55_000, 61_000]))),
        16 | 17 => Step::RevokeAccess,
        18 => Step::RevokeRefresh,
        19..22 => {
            use Fault::{Down, Failed, Hangs, Limited, Lost, None};
            Step::Fault(chance.pick(&[None, None, None, Down, Limited, Lost, Lost, Failed, Hangs]))
        }
        22..24 => Step::Key { is_set: chance.draw(2) == 0 },
        _ => Step::Invalidate,
    }
}

/// The state of the auth endpoint and of the API.
#[derive(Default)]
struct Account {
    key: u32,
    fault: Option<Fault>,
    issued: u32,
    /// The expiry of each valid access token.
    access: HashMap<String, Instant>,
    refresh: Option<String>,
    /// How often each refresh token was presented, and how often it was accepted.
    presented: HashMap<String, (u32, u32)>,
    /// The start of each exchange.
    exchanges: Vec<Instant>,
    running: u32,
    /// Violations of what must always hold.
    violations: Vec<String>,
}

const LIFETIME: Duration = Duration::from_secs(60);

/// The path at which every token is challenged.
const CHALLENGED: &str = "/challenged";

impl Account {
    /// Processes an exchange. Returns the status and the body of the response.
    fn process(&mut self, path: &str, body: &str) -> (StatusCode, String) {
        let text = |name: &str| {
            let value: serde_json::Value = serde_json::from_str(body).unwrap();
            value[name].as_str().map(str::to_owned)
        };
        let is_accepted = match path {
            "/auth/api-key" => text("apiKey") == Some(format!("key-{}", self.key)),
            _ => {
                let presented = text("refreshToken").unwrap();
                let is_accepted = self.refresh.as_ref() == Some(&presented);
                let times = self.presented.entry(presented).or_default();
                times.0 += 1;
                times.1 += u32::from(is_accepted);
                is_accepted
            }
        };
        if !is_accepted {
            return (StatusCode::BAD_REQUEST, String::new());
        }
        self.issued += 1;
        let (access, refresh) = (format!("access-{}", self.issued), format!("refresh-{}", self.issued));
        self.access.insert(access.clone(), Instant::now() + LIFETIME);
        self.refresh = Some(refresh.clone());
        let body = format!(
            r#"{{"token_type": "Bearer", "expires_in": {}, "access_token": "{access}", "refresh_token": "{refresh}"}}"#,
            LIFETIME.as_secs()
        );
        (StatusCode::OK, body)
    }
}

type Shared = Arc<Mutex<Account>>;

async fn exchange(account: Shared, request: Request<String>) -> io::Result<Response<Full<Bytes>>> {
    /// Counts the exchanges that overlap, dropped ones included.
    struct Running(Shared);

    impl Drop for Running {
        fn drop(&mut self) {
            self.0.lock().unwrap().running -= 1;
        }
    }

    let fault = {
        let mut account = account.lock().unwrap();
        account.running += 1;
        account.exchanges.push(Instant::now());
        if account.running > 1 {
            account.violations.push("two concurrent exchanges".to_owned());
        }
        account.fault.unwrap_or(Fault::None)
    };
    let _running = Running(Arc::clone(&account));
    sleep(Duration::from_millis(200)).await;
    let respond = |status: StatusCode| Response::builder().status(status);
    if fault == Fault::Hangs {
        std::future::pending::<()>().await;
    }
    if fault == Fault::Down {
        return Ok(respond(StatusCode::SERVICE_UNAVAILABLE).body(Full::default()).unwrap());
    }
    if fault == Fault::Limited {
        let limited = respond(StatusCode::TOO_MANY_REQUESTS).header("retry-after", "3");
        return Ok(limited.body(Full::default()).unwrap());
    }
    let (status, body) = account.lock().unwrap().process(request.uri().path(), request.body());
    if fault == Fault::Lost {
        return Err(io::ErrorKind::ConnectionReset.into());
    }
    if fault == Fault::Failed {
        return Ok(respond(StatusCode::INTERNAL_SERVER_ERROR).body(Full::default()).unwrap());
    }
    Ok(respond(status).body(Full::from(body)).unwrap())
}

async fn api(account: Shared, request: Request<Full<Bytes>>) -> io::Result<Response<Full<Bytes>>> {
    sleep(Duration::from_millis(20)).await;
    let mut account = account.lock().unwrap();
    let token =
        request.headers().get("authorization").and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
    let Some(token) = token else {
        account.violations.push("a request without a token".to_owned());
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let is_accepted = request.uri().path() != CHALLENGED
        && account.access.get(token).is_some_and(|until| Instant::now() < *until + SECOND);
    let status = if is_accepted { StatusCode::OK } else { StatusCode::UNAUTHORIZED };
    Ok(Response::builder().status(status).body(Full::default()).unwrap())
}

/// api.video's source, whose calls can be interrupted.
struct Interruptible(ApiVideo, Arc<Notify>);

impl TokenSource for Interruptible {
    async fn fetch(&self, request: &TokenRequest<'_>) -> Result<Token, SourceError> {
        match select(pin!(self.0.fetch(request)), pin!(self.1.notified())).await {
            Either::Left((result, _)) => result,
            // As a panic, without a message on standard error.
            Either::Right(_) => resume_unwind(Box::new("interrupted")),
        }
    }

    fn credential(&self) -> Credential {
        self.0.credential()
    }
}

async fn run(steps: Vec<Step>, keep_fresh: bool) {
    let account = Shared::default();
    let auth = tower::service_fn({
        let account = Arc::clone(&account);
        move |request| exchange(Arc::clone(&account), request)
    });
    let source = ApiVideo::new("key-0").with_client(TokenClient::with_service(auth).timeout(5 * SECOND));
    let interrupt = Arc::new(Notify::new());
    let ahead = RefreshAhead::new().share(0.2);
    let Scene { provider, layer, .. } = scene_of(Interruptible(source.clone(), Arc::clone(&interrupt)))
        .provider(|builder| builder.refresh_ahead(ahead).keep_fresh(keep_fresh))
        .layer(|layer| layer.allowed_origins(AllowedOrigins::https()))
        .build();
    let inner = tower::service_fn({
        let account = Arc::clone(&account);
        move |request| api(Arc::clone(&account), request)
    });
    let (service, without_replay) = (layer.layer(inner.clone()), layer.no_replay().layer(inner));
    let request_to = |path: &str| {
        Request::get(format!("https://ws.api.video{path}")).body(Full::<Bytes>::default()).unwrap()
    };
    let request = || request_to("/videos");

    let mut callers = JoinSet::new();
    for step in steps {
        match step {
            Step::Requests(drops) => {
                for tenths in drops {
                    let sent = service.clone().oneshot(request());
                    let limit = tenths.map_or(Duration::MAX, |tenths| SECOND * tenths.into() / 10);
                    callers.spawn(async move { timeout(limit, sent).await.ok() });
                }
            }
            Step::Challenged(requests) => {
                for _ in 0..requests {
                    let sent = service.clone().oneshot(request_to(CHALLENGED));
                    callers.spawn(async move { Some(sent.await) });
                    sleep(SECOND).await;
                }
            }
            Step::Revocations(times) => {
                for _ in 0..times {
                    account.lock().unwrap().access.clear();
                    let sent = service.clone().oneshot(request());
                    callers.spawn(async move { Some(sent.await) });
                    sleep(SECOND * 3 / 20).await;
                }
            }
            Step::Beside(requests) => {
                for _ in 0..requests {
                    for path in [CHALLENGED, "/videos"] {
                        let sent = service.clone().oneshot(request_to(path));
                        callers.spawn(async move { Some(sent.await) });
                    }
                    sleep(SECOND / 2).await;
                }
            }
            Step::Waiters(waiters) => {
                for tenths in waiters {
                    let provider = provider.clone();
                    callers.spawn(async move {
                        let _ = timeout(SECOND * tenths.into() / 10, provider.token()).await;
                        None
                    });
                }
            }
            Step::Interrupt => interrupt.notify_waiters(),
            Step::Pass(duration) => sleep(duration).await,
            Step::RevokeAccess => account.lock().unwrap().access.clear(),
            Step::RevokeRefresh => account.lock().unwrap().refresh = None,
            Step::Fault(fault) => account.lock().unwrap().fault = Some(fault),
            Step::Key { is_set } => {
                let key = {
                    let mut account = account.lock().unwrap();
                    account.key += 1;
                    account.refresh = None;
                    account.key
                };
                if is_set {
                    source.set_key(format!("key-{key}"));
                }
            }
            Step::Invalidate => provider.invalidate(),
        }
    }

    // The refresh timeout and the limit of retries bound how long a caller waits.
    let results = timeout(SECOND * 120, callers.join_all()).await;
    assert!(results.is_ok(), "a caller is stuck: {:?}", provider.status());
    for result in results.unwrap().into_iter().flatten() {
        match result {
            Ok(response) => assert!([200, 401].contains(&response.status().as_u16())),
            Err(error) => assert!(error.is::<Error>(), "{error:?}"),
        }
    }
    // Once all faults have ended and the longest pause is over, the next request succeeds.
    let key = {
        let mut account = account.lock().unwrap();
        account.fault = None;
        account.key
    };
    source.set_key(format!("key-{key}"));
    sleep(SECOND * 65).await;
    let response = service.clone().oneshot(request()).await;
    assert!(response.is_ok(), "{response:?}");
    assert_eq!(response.unwrap().status(), StatusCode::OK);

    // After a revocation of an accepted token, the next request succeeds. The same holds for a second revocation.
    for _ in 0..2 {
        account.lock().unwrap().access.clear();
        let response = service.clone().oneshot(request()).await;
        assert_eq!(response.unwrap().status(), StatusCode::OK);
    }
    // A request that cannot be sent again waits for the refresh that a challenge has started.
    account.lock().unwrap().access.clear();
    let challenged = without_replay.clone().oneshot(request()).await;
    assert_eq!(challenged.unwrap().status(), StatusCode::UNAUTHORIZED);
    assert_eq!(without_replay.oneshot(request()).await.unwrap().status(), StatusCode::OK);

    // A program that reports challenges itself heals eight in a row. One of the refreshes is interrupted.
    sleep(SECOND * 65).await;
    for number in 0..8 {
        let challenged = provider.token().await.unwrap();
        account.lock().unwrap().access.clear();
        if number == 3 {
            let _ = timeout(SECOND / 10, provider.refresh(&challenged)).await;
            interrupt.notify_waiters();
        }
        let token = provider.refresh(&challenged).await;
        let token = if token.is_ok() { token } else { provider.refresh(&challenged).await };
        assert!(token.is_ok_and(|token| token.access_token() != challenged.access_token()), "{}", number);
        sleep(SECOND * 3 / 20).await;
    }
    // Nobody has a wrong token by now, and the bucket of challenges is full again.
    sleep(SECOND * 65).await;
    assert_eq!(service.clone().oneshot(request()).await.unwrap().status(), StatusCode::OK);
    let exchanges = account.lock().unwrap().exchanges.clone();
    let most = exchanges
        .iter()
        .map(|begun| exchanges.iter().filter(|at| *at >= begun && **at - *begun < 60 * SECOND).count());
    assert!(most.max().unwrap_or_default() < 100, "{:?}", exchanges);

    // One endpoint challenges every token, another one works. The first one causes at most ten exchanges at once, and
    // then one per five seconds.
    let before = account.lock().unwrap().exchanges.len();
    for _ in 0..13 {
        let challenged = service.clone().oneshot(request_to(CHALLENGED)).await;
        assert_eq!(challenged.unwrap().status(), StatusCode::UNAUTHORIZED);
        assert_eq!(service.clone().oneshot(request()).await.unwrap().status(), StatusCode::OK);
        sleep(SECOND).await;
    }
    {
        let account = account.lock().unwrap();
        let exchanges = account.exchanges.len() - before;
        assert!(exchanges <= 10 + 13 / 5 + 1, "{} exchanges", exchanges);
    }
    // The other endpoint recovers from a revocation within that time.
    account.lock().unwrap().access.clear();
    sleep(5 * SECOND).await;
    assert_eq!(service.clone().oneshot(request()).await.unwrap().status(), StatusCode::OK);

    drop(service);
    provider.shutdown().await;
    assert!(!provider.status().refreshing);
    drop(provider);
    assert_eq!(Handle::current().metrics().num_alive_tasks(), 0);
    let account = account.lock().unwrap();
    assert!(account.violations.is_empty(), "{:?}", account.violations);
    for (refresh_token, (presented, accepted)) in &account.presented {
        assert!(*accepted <= 1 && *presented <= 2, "{refresh_token}: {presented}, {accepted}");
    }
}

/// A random sequence of events leaves a provider without a token, or spends a refresh token twice.
#[test]
fn heals_and_spends_no_token_twice() {
    for keep_fresh in [false, true] {
        sequences(runs(2_000), 1..16, step, |steps| {
            let runtime = Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
            runtime.block_on(run(steps, keep_fresh));
        });
    }
}

/// A sequence that fails is not found, or is not made shorter.
#[test]
fn shortest_failing_sequence_is_found() {
    let newest = Mutex::new(Vec::new());
    let failed = catch_unwind(|| {
        sequences(
            100,
            1..40,
            |chance| chance.draw(10),
            |steps| {
                if steps.contains(&3) && steps.contains(&7) {
                    *newest.lock().unwrap() = steps;
                    panic!("3 and 7");
                }
            },
        );
    });
    assert!(failed.is_err());
    let mut newest = newest.into_inner().unwrap();
    newest.sort_unstable();
    assert_eq!(newest, [3, 7]);
}
