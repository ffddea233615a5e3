//! With `TokenProviderBuilder::runtime`, refreshes run on one runtime, whatever the runtimes of the callers are.

use std::{
    convert::Infallible,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{Request, Response, StatusCode, header::AUTHORIZATION};
use http_body_util::{Empty, Full};
use tokio::{
    runtime::{Builder, Handle, Id, Runtime},
    time::sleep,
};
use tower::{Layer, ServiceExt, service_fn};
use tower_bearer::{
    Credential, Error, RefreshAhead, RetryPolicy, SourceError, Token, TokenRequest, TokenSource,
};

use crate::support::{Act, HOUR, MILLISECOND, Scene, SceneBuilder, block_on, chain, get, scene, scene_of};

/// Runs a future on a runtime of its own, as a synchronous wrapper of a client does for each call.
fn call<F: Future>(future: F) -> F::Output {
    Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

/// A runtime that is always driven.
fn driven() -> Runtime {
    Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

/// How long an exchange takes.
const EXCHANGE: Duration = Duration::from_millis(300);

/// A login whose refresh tokens can be used once.
struct Login {
    lifetime: Duration,
    /// The number of the refresh token that works.
    newest: AtomicU64,
    /// How many exchanges have ended.
    ended: AtomicU64,
    /// The runtimes on which it was asked.
    runtimes: Mutex<Vec<Id>>,
}

impl Login {
    /// Starts a scene of a login that is exchanged on this runtime.
    fn scene<'a>(lifetime: Duration, runtime: &'a Runtime) -> SceneBuilder<'a, Self> {
        let (newest, ended) = (AtomicU64::new(0), AtomicU64::new(0));
        scene_of(Self { lifetime, newest, ended, runtimes: Mutex::default() })
            .provider(|builder| builder.login("0").runtime(runtime.handle().clone()))
    }

    fn exchanges(&self) -> u64 {
        self.newest.load(Ordering::SeqCst)
    }

    /// Expects that no exchange was interrupted, and that each ran on this runtime.
    fn expect_all_ended(&self, runtime: &Runtime) {
        assert_eq!(self.ended.load(Ordering::SeqCst), self.exchanges(), "an exchange was interrupted");
        assert!(self.runtimes.lock().unwrap().iter().all(|id| *id == runtime.handle().id()));
    }
}

impl TokenSource for Login {
    async fn fetch(&self, request: &TokenRequest<'_>) -> Result<Token, SourceError> {
        self.runtimes.lock().unwrap().push(Handle::current().id());
        let presented = request.refresh_token().unwrap_or("0");
        if presented != self.exchanges().to_string() {
            return Err(SourceError::login_required("the refresh token was presented before"));
        }
        let newest = self.newest.fetch_add(1, Ordering::SeqCst) + 1;
        sleep(EXCHANGE).await;
        self.ended.fetch_add(1, Ordering::SeqCst);
        let token = Token::builder(format!("access-{newest}")).refresh_token(newest.to_string());
        Ok(token.expires_in(self.lifetime).build()?)
    }

    fn credential(&self) -> Credential {
        Credential::default().of_login()
    }
}

/// A program makes a runtime for each call: no exchange ends with the runtime of the call that started it, and no call
/// waits for one.
#[test]
fn runtime_per_call_loses_no_exchange() {
    let (runtime, ahead) = (driven(), RefreshAhead::new().share(0.5).jitter(0.0));
    let scene = Login::scene(Duration::from_secs(2), &runtime);
    let Scene { source: login, layer, .. } = scene.provider(|builder| builder.refresh_ahead(ahead)).build();
    let api = service_fn(|_: Request<Empty<Bytes>>| async {
        Ok::<_, Infallible>(Response::new(Full::<Bytes>::default()))
    });
    let service = layer.layer(api);
    let (start, mut waited) = (Instant::now(), 0);
    for number in 1.. {
        let sent = Instant::now();
        if let Err(error) = call(service.clone().oneshot(get())) {
            panic!("call {number}: {}", chain(&*error));
        }
        waited += u64::from(sent.elapsed() >= EXCHANGE * 2 / 3);
        if start.elapsed() > 2500 * MILLISECOND {
            break;
        }
        thread::sleep(10 * MILLISECOND);
    }
    assert!((2..=4).contains(&login.exchanges()), "{} exchanges", login.exchanges());
    // The first call waits. On a busy machine, another may take as long without waiting.
    assert!(waited <= 2, "{waited} calls waited");
    thread::sleep(2 * EXCHANGE);
    login.expect_all_ended(&runtime);
}

/// A challenged request cannot be sent again, and its runtime ends with its call.
#[test]
fn challenge_heals_on_given_runtime() {
    let runtime = driven();
    let Scene { source: login, layer, .. } = Login::scene(HOUR, &runtime).build();
    let api = service_fn(|request: Request<Empty<Bytes>>| async move {
        let is_revoked = request.headers()[AUTHORIZATION] == "Bearer access-1";
        let status = if is_revoked { StatusCode::UNAUTHORIZED } else { StatusCode::OK };
        Ok::<_, Infallible>(Response::builder().status(status).body(Full::<Bytes>::default()).unwrap())
    });
    let service = layer.no_replay().layer(api);
    let statuses = [(); 3].map(|()| call(service.clone().oneshot(get())).unwrap().status().as_u16());
    assert_eq!(statuses, [401, 200, 200]);
    assert_eq!(login.exchanges(), 2);
    login.expect_all_ended(&runtime);
}

/// The runtime of a login's exchange is driven only while a call runs on it.
#[test]
fn login_survives_runtime_that_rests() {
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    let ahead = RefreshAhead::new().share(0.5).jitter(0.0);
    let Scene { source: login, layer, .. } = Login::scene(2 * EXCHANGE, &runtime)
        .provider(|builder| builder.refresh_ahead(ahead).refresh_timeout(2 * EXCHANGE))
        .build();
    let api = service_fn(|_: Request<Empty<Bytes>>| async {
        // An exchange starts meanwhile.
        sleep(20 * MILLISECOND).await;
        Ok::<_, Infallible>(Response::new(Full::<Bytes>::default()))
    });
    let service = layer.layer(api);
    for pause in [400, 800, 100, 400, 800, 0] {
        if let Err(error) = runtime.block_on(service.clone().oneshot(get())) {
            panic!("{}", chain(&*error));
        }
        thread::sleep(pause * MILLISECOND);
    }
    login.expect_all_ended(&runtime);
}

/// The given runtime is not driven. The caller, who has another, waits no longer than a refresh may take.
#[test]
fn runtime_that_is_not_driven_times_out() {
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    for keep_fresh in [false, true] {
        let provider = Login::scene(HOUR, &runtime)
            .provider(|builder| builder.refresh_timeout(EXCHANGE).keep_fresh(keep_fresh))
            .build()
            .provider;
        let result = call(async { tokio::time::timeout(20 * EXCHANGE, provider.token()).await });
        assert!(matches!(result.expect("hangs"), Err(Error::TimedOut(_))));
    }
}

/// The caller has no runtime at all.
#[test]
fn caller_needs_no_runtime() {
    let runtime = driven();
    let Scene { source: login, provider, .. } = Login::scene(HOUR, &runtime).build();
    let token = block_on(provider.token());
    assert_eq!(token.unwrap().access_token(), "access-1");
    login.expect_all_ended(&runtime);
}

/// `ready` and `shutdown` are called outside of a runtime.
#[test]
fn readiness_and_shutdown_need_no_runtime() {
    let runtime = driven();
    let retry = RetryPolicy::new().max_retries(0).backoff(MILLISECOND, 10 * MILLISECOND);
    let scene = scene().takes(Duration::ZERO).times(3, || Act::Fail(SourceError::unavailable("down")));
    let scene = scene.provider(|builder| builder.retry(retry).runtime(runtime.handle().clone()));
    let provider = scene.build().provider;
    assert_eq!(block_on(provider.ready()).unwrap().access_token(), "access-4");
    block_on(provider.shutdown());
    assert!(provider.status().shut_down);
}
