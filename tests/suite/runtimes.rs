//! A request works, or fails with a typed error, whatever drives it: a runtime for each call, one without time, or none.

use std::{
    convert::Infallible,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response, StatusCode, Version, header::AUTHORIZATION};
use http_body::Frame;
use http_body_util::{Channel, Empty, Full};
use tokio::{
    runtime::{Builder, Runtime},
    time::sleep,
};
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_bearer::{
    BoxError, Credential, Error, RefreshAhead, SourceError, StaticToken, Token, TokenProvider,
    TokenProviderBuilder, TokenProviders, TokenRequest, TokenSource, source_fn,
};

use crate::support::{
    Act, HOUR, MILLISECOND, Scene, SceneBuilder, block_on, chain, get, ours, scene, scene_of,
};

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// Runs a future on a runtime of its own, as a synchronous wrapper of a client does for each call.
fn call<F: Future>(future: F) -> F::Output {
    runtime().block_on(future)
}

fn token_of<B>(request: &Request<B>) -> String {
    let value = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok());
    value.and_then(|value| value.strip_prefix("Bearer ")).unwrap_or_default().to_owned()
}

fn response(status: StatusCode, body: &'static str) -> Response<Full<Bytes>> {
    Response::builder().status(status).body(Full::from(body)).unwrap()
}

/// An API that takes some time, and challenges the tokens for which this returns true.
fn api(
    is_challenged: impl Fn(&str) -> bool + Clone + Send + 'static,
) -> impl Service<
    Request<Empty<Bytes>>,
    Response = Response<Full<Bytes>>,
    Error = Infallible,
    Future = impl Future<Output = Result<Response<Full<Bytes>>, Infallible>> + Send,
> + Clone
+ Send
+ 'static {
    service_fn(move |request: Request<Empty<Bytes>>| {
        let challenged = is_challenged(&token_of(&request));
        async move {
            sleep(5 * MILLISECOND).await;
            Ok(response(if challenged { StatusCode::UNAUTHORIZED } else { StatusCode::OK }, ""))
        }
    })
}

/// A scene whose source takes 50 ms, and whose tokens live for an hour.
fn fast_scene<'a>() -> SceneBuilder<'a> {
    scene().takes(50 * MILLISECOND).living(HOUR)
}

/// A provider refreshes its token after half of the lifetime.
fn after_half<T: TokenSource>(builder: TokenProviderBuilder<T>) -> TokenProviderBuilder<T> {
    builder.refresh_ahead(RefreshAhead::new().share(0.5).jitter(0.0))
}

/// A challenged request cannot be sent again, and its runtime ends with its call.
#[test]
fn revoked_token_heals_without_replay() {
    let Scene { source, layer, .. } = fast_scene().build();
    let service = layer.no_replay().layer(api(|token| token == "access-1"));
    let mut statuses = Vec::new();
    for _ in 0..20 {
        statuses.push(call(service.clone().oneshot(get())).unwrap().status().as_u16());
        thread::sleep(40 * MILLISECOND);
    }
    // The first is challenged, and so are those that come shortly after its refresh was interrupted.
    assert!(statuses[5..].iter().all(|status| *status == 200), "{statuses:?}");
    assert!(source.fetches() <= 3, "{} fetches", source.fetches());
}

/// The refresh of an expiring token is interrupted when the call that started it returns.
#[test]
fn expiring_token_costs_three_fetches() {
    let Scene { source, layer, .. } =
        fast_scene().then(Act::Live(Duration::from_secs(2))).provider(after_half).build();
    let service = layer.layer(api(|_| false));
    call(service.clone().oneshot(get())).unwrap();
    thread::sleep(1050 * MILLISECOND);
    for _ in 0..40 {
        assert_eq!(call(service.clone().oneshot(get())).unwrap().status(), StatusCode::OK);
        thread::sleep(10 * MILLISECOND);
    }
    // The first token, a refresh that may be interrupted, and the one after it.
    let fetches = source.fetches();
    assert!((2..=3).contains(&fetches), "{fetches} fetches");
}

/// A login whose refresh tokens can be used once. One that is presented again ends the login.
struct Login {
    state: Mutex<LoginState>,
    /// How long an exchange takes.
    takes: Duration,
    lifetime: Duration,
}

impl Login {
    fn scene<'a>(takes: Duration, lifetime: Duration) -> SceneBuilder<'a, Self> {
        scene_of(Self { state: Mutex::default(), takes, lifetime }).provider(|builder| builder.login("0"))
    }
}

#[derive(Default)]
struct LoginState {
    /// The number of the refresh token that works.
    newest: u64,
    has_ended: bool,
}

impl TokenSource for Login {
    async fn fetch(&self, request: &TokenRequest<'_>) -> Result<Token, SourceError> {
        let presented = request.refresh_token().unwrap_or("0");
        let newest = {
            let mut state = self.state.lock().unwrap();
            state.has_ended |= presented != state.newest.to_string();
            if state.has_ended {
                return Err(SourceError::login_required("the refresh token was presented before"));
            }
            state.newest += 1;
            state.newest
        };
        // From here on the response may be lost.
        sleep(self.takes).await;
        let token = Token::builder(format!("access-{newest}")).refresh_token(newest.to_string());
        Ok(token.expires_in(self.lifetime).build()?)
    }

    fn credential(&self) -> Credential {
        Credential::default().of_login()
    }
}

/// The runtime of the call that started an exchange of a login ends with the call.
#[test]
fn login_survives_runtime_per_call() {
    let Scene { source: login, layer, .. } =
        Login::scene(50 * MILLISECOND, 300 * MILLISECOND).provider(after_half).build();
    let service = layer.layer(api(|_| false));
    for number in 1..=60 {
        if let Err(error) = call(service.clone().oneshot(get())) {
            panic!("call {number}: {}", chain(&*error));
        }
        thread::sleep(10 * MILLISECOND);
    }
    let state = login.state.lock().unwrap();
    assert!(!state.has_ended && state.newest > 2, "{} exchanges", state.newest);
}

/// A request that cannot be sent again is challenged, and the runtime that exchanges the login's refresh token ends
/// with the call.
#[test]
fn login_survives_challenges_without_replay() {
    let Scene { source: login, layer, .. } = Login::scene(50 * MILLISECOND, 300 * MILLISECOND).build();
    let service = layer.no_replay().layer(api(|token| token == "access-1"));
    for number in 1..=20 {
        let request = service.clone().oneshot(get());
        let result = call(async {
            let result = request.await;
            // As long as it takes to read a response: an exchange starts, and does not end.
            sleep(10 * MILLISECOND).await;
            result
        });
        if let Err(error) = result {
            panic!("call {number}: {}", chain(&*error));
        }
    }
    let state = login.state.lock().unwrap();
    assert!(!state.has_ended && state.newest > 1, "{} exchanges", state.newest);
}

/// A 401 without a known length is not kept for long, and the exchange of a login takes longer than its call.
#[test]
fn login_survives_chunked_401() {
    let Scene { source: login, layer, .. } = call(Login::scene(1500 * MILLISECOND, HOUR).with_token());
    let chunked = service_fn(|request: Request<Empty<Bytes>>| async move {
        let is_revoked = token_of(&request) == "access-1";
        let (mut sender, body) = Channel::<Bytes, Infallible>::new(1);
        let _ = sender.try_send(Frame::data("no".into()));
        let status = if is_revoked { StatusCode::UNAUTHORIZED } else { StatusCode::OK };
        Ok::<_, Infallible>(Response::builder().status(status).body(body).unwrap())
    });
    let service = layer.no_replay().layer(chunked);
    let statuses = [(); 3].map(|()| call(service.clone().oneshot(get())).unwrap().status().as_u16());
    assert_eq!(statuses, [401, 200, 200]);
    assert_eq!(login.state.lock().unwrap().newest, 2);
}

/// The runtime of each call has threads of its own, which exchange a login's refresh token.
#[test]
fn login_survives_runtime_with_threads_per_call() {
    let Scene { source: login, layer, .. } =
        Login::scene(100 * MILLISECOND, 400 * MILLISECOND).provider(after_half).build();
    let service = layer.layer(api(|_| false));
    for number in 1..=60 {
        let call = Runtime::new().unwrap().block_on(service.clone().oneshot(get()));
        if let Err(error) = call {
            panic!("call {number}: {}", chain(&*error));
        }
        thread::sleep(10 * MILLISECOND);
    }
    let state = login.state.lock().unwrap();
    assert!(!state.has_ended && state.newest > 2, "{} exchanges", state.newest);
}

/// The refresh that a challenge has started is on a runtime that is not driven any more, and past its deadline.
#[test]
fn unreplayable_waits_for_refresh_in_place_of_late_one() {
    let fetches = AtomicU64::new(0);
    let source = source_fn(move |_| {
        let fetch = fetches.fetch_add(1, Ordering::SeqCst) + 1;
        async move {
            match fetch {
                1 => {}
                2 => std::future::pending().await,
                _ => sleep(50 * MILLISECOND).await,
            }
            Ok::<_, SourceError>(Token::builder(format!("access-{fetch}")).build()?)
        }
    });
    let scene = scene_of(source).provider(|builder| builder.refresh_timeout(300 * MILLISECOND));
    let Scene { api, provider, layer, .. } = scene.accept(["access-3"]).build();
    let service = layer.no_replay().layer(api.service());
    let stalled = runtime();
    let first = stalled.block_on(async {
        provider.token().await.unwrap();
        let status = service.clone().oneshot(get()).await.unwrap().status().as_u16();
        sleep(20 * MILLISECOND).await;
        status
    });
    assert_eq!(first, 401);
    assert!(provider.status().refreshing);
    thread::sleep(400 * MILLISECOND);
    let (second, third) = runtime().block_on(async {
        let second = service.clone().oneshot(get()).await.unwrap().status().as_u16();
        (second, service.clone().oneshot(get()).await.unwrap().status().as_u16())
    });
    assert_eq!((second, third), (200, 200));
}

/// What drives a request.
#[derive(Clone, Copy, Debug)]
enum Driver {
    /// Not tokio.
    Other,
    /// A tokio runtime without time.
    WithoutTime,
}

impl Driver {
    /// Runs a future, on a thread of its own.
    fn run<T: Send>(self, future: impl Future<Output = T> + Send) -> thread::Result<T> {
        thread::scope(|scope| {
            let driven = move || match self {
                Self::Other => block_on(future),
                Self::WithoutTime => Builder::new_current_thread().build().unwrap().block_on(future),
            };
            scope.spawn(driven).join()
        })
    }
}

/// Expects one of these statuses, or the crate's own error.
fn expect(result: thread::Result<Result<Response<Full<Bytes>>, BoxError>>, statuses: &[u16], driver: Driver) {
    match result {
        Ok(Ok(response)) => {
            let status = response.status();
            assert!(statuses.contains(&status.as_u16()), "{driver:?}: {status}");
        }
        // A runtime without time interrupts the refresh.
        Ok(Err(error)) => {
            assert!(matches!(ours(&error), Error::NoRuntime | Error::Interrupted), "{driver:?}: {error}")
        }
        Err(_) => panic!("{driver:?}: the request panicked"),
    }
}

/// A 401 arrives in a runtime without time, when there is another token already and its body has to be read.
#[test]
fn drain_without_timer_is_no_panic() {
    for driver in [Driver::Other, Driver::WithoutTime] {
        for version in [Version::HTTP_11, Version::HTTP_2] {
            let Scene { provider, layer, .. } = call(fast_scene().with_token());
            let service = layer.layer(service_fn(move |request: Request<Empty<Bytes>>| {
                let provider = provider.clone();
                async move {
                    if token_of(&request) == "access-2" {
                        return Ok::<_, BoxError>(response(StatusCode::OK, ""));
                    }
                    // Another request has been challenged, and has healed.
                    let challenged = provider.current().unwrap();
                    thread::spawn(move || call(provider.refresh(&challenged))).join().unwrap()?;
                    let mut response = response(StatusCode::UNAUTHORIZED, "who are you?");
                    *response.version_mut() = version;
                    Ok(response)
                }
            }));
            let request = service.oneshot(get());
            expect(driver.run(request), &[200, 401], driver);
        }
    }
}

/// The API challenges the newest token in a runtime without time, so that the retry would wait for its backoff.
#[test]
fn backoff_without_timer_is_no_panic() {
    for driver in [Driver::Other, Driver::WithoutTime] {
        let runtime = runtime();
        let same = source_fn(|_| async { Ok(Token::builder("same").build()?) });
        let service = scene_of(same).build().layer.layer(service_fn(|_: Request<Empty<Bytes>>| async {
            Ok::<_, BoxError>(response(StatusCode::UNAUTHORIZED, ""))
        }));
        let first = runtime.block_on(service.clone().oneshot(get())).unwrap();
        assert_eq!(first.status(), StatusCode::UNAUTHORIZED);
        let request = service.oneshot(get());
        expect(driver.run(request), &[401], driver);
    }
}

/// The first challenge arrives outside of a runtime.
#[test]
fn first_challenge_needs_no_runtime() {
    for driver in [Driver::Other, Driver::WithoutTime] {
        let same = source_fn(|_| async { Ok(Token::builder("same").build()?) });
        let request = call(scene_of(same).with_token()).service.oneshot(get());
        expect(driver.run(request), &[401], driver);
    }
}

/// The first token is asked for in a runtime without time.
#[test]
fn runtime_without_time_is_typed_error() {
    for builder in [Builder::new_current_thread, Builder::new_multi_thread] {
        let provider = TokenProvider::new(source_fn(|_| async { Ok(Token::builder("same").build()?) }));
        let runtime = builder().build().unwrap();
        let result = catch_unwind(AssertUnwindSafe(|| runtime.block_on(provider.token())));
        let result = result.unwrap_or_else(|_| panic!("the caller panicked"));
        assert!(matches!(result, Err(Error::NoRuntime | Error::Interrupted)), "{result:?}");
        // It is no lasting failure.
        assert_eq!(call(provider.token()).unwrap().access_token(), "same");
    }
}

/// A shutdown happens outside of a runtime, and needs no timer.
#[test]
fn shutdown_needs_no_runtime() {
    let group =
        TokenProviders::new(|_: &String| Ok::<_, BoxError>(TokenProvider::builder(StaticToken::new("a"))));
    let provider = group.get("a").unwrap();
    block_on(group.shutdown());
    block_on(TokenProvider::new(StaticToken::new("a")).shutdown());
    let without_time = Builder::new_current_thread().build().unwrap();
    without_time.block_on(TokenProvider::new(StaticToken::new("a")).shutdown());
    assert!(provider.status().shut_down);
}
