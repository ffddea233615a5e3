//! tower's contract: readiness is the inner service's, the ready service is called, and no stack of tower layers
//! deadlocks.

use std::{
    convert::Infallible,
    future::Future,
    hint::black_box,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use axum::body::Body as AxumBody;
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{Empty, Full};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use tokio::task::JoinSet;
use tower::{
    Layer, Service, ServiceBuilder, ServiceExt, buffer::BufferLayer, limit::ConcurrencyLimitLayer,
    limit::RateLimitLayer, load_shed::LoadShedLayer,
};
use tower_bearer::{
    BearerAuth, BearerAuthLayer, BoxError,
    replay::{Buffered, ReplayBody},
};

use crate::support::{Act, Api, CHALLENGED, Scene, at_once, get, scene};

/// Returns an API and a layer. The API challenges the layer's current token and accepts the next.
async fn revoked_once() -> (Api, BearerAuthLayer) {
    let Scene { api, layer, .. } = scene().accept(["access-2"]).with_token().await;
    (api, layer)
}

/// Sends a burst of requests that are all challenged, and expects all of them to succeed.
async fn burst<S>(service: S, requests: usize)
where
    S: Service<Request<Empty<Bytes>>, Response = Response<Full<Bytes>>, Error: std::fmt::Debug>
        + Clone
        + Send
        + 'static,
    S::Future: Send,
    S::Error: Send,
{
    let mut burst = JoinSet::new();
    for _ in 0..requests {
        burst.spawn(service.clone().oneshot(get()));
    }
    for response in burst.join_all().await {
        assert_eq!(response.unwrap().status(), StatusCode::OK);
    }
}

/// `ResponseFuture` is larger than it documents, beyond the inner service's future.
#[cfg(target_pointer_width = "64")]
#[test]
fn response_future_is_small() {
    type Request = http::Request<Full<Bytes>>;
    type Hyper = Client<HttpConnector, Full<Bytes>>;

    /// A future without a niche for the state of the response future.
    struct Plain(u64);

    impl Future for Plain {
        type Output = Result<Response<Full<Bytes>>, Infallible>;

        fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Self::Output> {
            black_box(self.0);
            Poll::Pending
        }
    }

    fn size<S: Service<Request>>(_: impl Fn(BearerAuthLayer) -> S) -> usize {
        size_of::<S::Future>()
    }

    let hyper = || -> Hyper { Client::builder(TokioExecutor::new()).build_http() };
    let of_hyper = size_of::<<Hyper as Service<Request>>::Future>();
    assert_eq!(size(|layer| layer.no_replay().layer(hyper())) - of_hyper, 32);
    assert_eq!(size(|layer| layer.layer(hyper())) - of_hyper, 224);
    let plain = || tower::service_fn(|_: Request| Plain(0));
    assert_eq!(size(|layer| layer.no_replay().layer(plain())) - size_of::<Plain>(), 40);
}

/// A service whose readiness the test sets.
#[derive(Clone)]
struct Gate {
    readiness: Arc<Mutex<Result<bool, &'static str>>>,
    api: Api,
}

impl Service<Request<Empty<Bytes>>> for Gate {
    type Response = Response<Full<Bytes>>;
    type Error = BoxError;
    type Future = std::future::Ready<Result<Self::Response, BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        match *self.readiness.lock().unwrap() {
            Ok(true) => Poll::Ready(Ok(())),
            Ok(false) => Poll::Pending,
            Err(error) => Poll::Ready(Err(error.into())),
        }
    }

    fn call(&mut self, request: Request<Empty<Bytes>>) -> Self::Future {
        std::future::ready(Ok(self.api.answer(request.headers())))
    }
}

/// The service is ready although the inner service is not.
#[tokio::test(start_paused = true)]
async fn readiness_is_the_inner_services() {
    let (api, layer) = revoked_once().await;
    api.accept("access-1");
    let gate = Gate { readiness: Arc::new(Mutex::new(Ok(false))), api: api.clone() };
    let mut service = layer.layer(gate.clone());
    assert!(at_once(service.ready()).is_none());
    *gate.readiness.lock().unwrap() = Ok(true);
    let response = at_once(service.ready()).unwrap().unwrap().call(get()).await.unwrap();
    assert_eq!((response.status(), api.tokens()), (StatusCode::OK, vec!["access-1".to_owned()]));

    *gate.readiness.lock().unwrap() = Err("the inner service is gone");
    let error = at_once(service.ready()).unwrap().err().unwrap();
    assert_eq!(error.to_string(), "the inner service is gone");
}

/// A service that panics if it is called before it is ready, as some services do.
struct Strict {
    ready: bool,
    clones: Arc<AtomicUsize>,
    api: Api,
}

impl Clone for Strict {
    fn clone(&self) -> Self {
        self.clones.fetch_add(1, Ordering::SeqCst);
        Self { ready: false, clones: Arc::clone(&self.clones), api: self.api.clone() }
    }
}

impl Service<Request<Empty<Bytes>>> for Strict {
    type Response = Response<Full<Bytes>>;
    type Error = Infallible;
    type Future = std::future::Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.ready = true;
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Empty<Bytes>>) -> Self::Future {
        assert!(std::mem::take(&mut self.ready), "called without being ready");
        std::future::ready(Ok(self.api.answer(request.headers())))
    }
}

/// `call` is sent to a clone that is not ready.
#[tokio::test(start_paused = true)]
async fn calls_ready_service_and_readies_clone() {
    for has_token in [true, false] {
        let clones = Arc::<AtomicUsize>::default();
        let Scene { api, layer, .. } = if has_token { scene().with_token().await } else { scene().build() };
        let strict = Strict { ready: false, clones: Arc::clone(&clones), api: api.clone() };
        let mut service = layer.layer(strict);
        let before = clones.load(Ordering::SeqCst);
        api.accept("access-1");
        assert_eq!(service.ready().await.unwrap().call(get()).await.unwrap().status(), StatusCode::OK);
        // With a token the service is not cloned, because cloning a client is expensive. Without one, the ready service
        // is dropped before the request waits: one clone replaces it, another sends the request.
        assert_eq!(clones.load(Ordering::SeqCst) - before, if has_token { 0 } else { 2 });

        api.revoke_all();
        api.accept("access-2");
        assert_eq!(service.ready().await.unwrap().call(get()).await.unwrap().status(), StatusCode::OK);
    }
}

/// The inner service has one permit, which the request and its retry need.
#[tokio::test(start_paused = true)]
async fn retry_works_with_one_permit() {
    let (api, layer) = revoked_once().await;
    let service = ServiceBuilder::new().layer(layer).concurrency_limit(1).service(api.service());
    let response = service.oneshot(get()).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(api.tokens(), ["access-1", "access-2"]);
}

/// Buffer, LoadShed, RateLimit or ConcurrencyLimit is below the layer, in a burst of 401s.
#[tokio::test(start_paused = true)]
async fn no_stack_deadlocks_in_burst_of_401s() {
    for limit in [1, 2, 7] {
        let (api, layer) = revoked_once().await;
        burst(ServiceBuilder::new().layer(layer).concurrency_limit(limit).service(api.service()), 100).await;

        let (api, layer) = revoked_once().await;
        let limit = ConcurrencyLimitLayer::new(limit);
        let service = ServiceBuilder::new().layer(limit).layer(layer).service(api.service());
        burst(service, 100).await;

        let (api, layer) = revoked_once().await;
        let buffered = ServiceBuilder::new().layer(BufferLayer::new(1)).concurrency_limit(1);
        burst(layer.layer(buffered.service(api.service())), 100).await;

        let (api, layer) = revoked_once().await;
        let service = ServiceBuilder::new().layer(BufferLayer::new(1)).layer(layer).service(api.service());
        burst(service, 100).await;

        let (api, layer) = revoked_once().await;
        let rate = RateLimitLayer::new(3, Duration::from_secs(1));
        let limited = ServiceBuilder::new().layer(BufferLayer::new(1)).layer(rate).service(api.service());
        burst(layer.layer(limited), 100).await;
    }
}

/// A retry is shed: the caller gets that error, because its 401 was dropped before.
#[tokio::test(start_paused = true)]
async fn shed_retry_is_overloaded() {
    /// Responds with one 401, then is never ready again.
    #[derive(Clone)]
    struct Once {
        calls: Arc<AtomicUsize>,
        version: http::Version,
    }

    impl Service<Request<Empty<Bytes>>> for Once {
        type Response = Response<Full<Bytes>>;
        type Error = Infallible;
        type Future = std::future::Ready<Result<Self::Response, Infallible>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            if self.calls.load(Ordering::SeqCst) == 0 { Poll::Ready(Ok(())) } else { Poll::Pending }
        }

        fn call(&mut self, _: Request<Empty<Bytes>>) -> Self::Future {
            self.calls.fetch_add(1, Ordering::SeqCst);
            let response = Response::builder().status(401).version(self.version);
            let body = if self.version == http::Version::HTTP_2 { CHALLENGED } else { "" };
            std::future::ready(Ok(response.body(Full::from(body)).unwrap()))
        }
    }

    for version in [http::Version::HTTP_11, http::Version::HTTP_2] {
        let (_, layer) = revoked_once().await;
        let once = Once { calls: Arc::default(), version };
        let service = ServiceBuilder::new().layer(layer).layer(LoadShedLayer::new()).service(once);
        let error = service.oneshot(get()).await.unwrap_err();
        assert!(error.is::<tower::load_shed::error::Overloaded>(), "{error}");
    }
}

/// A request or a retry is shed in a burst: each caller gets an answer or that error.
#[tokio::test(start_paused = true)]
async fn load_shed_burst_loses_no_answer() {
    let (api, layer) = revoked_once().await;
    let service = ServiceBuilder::new()
        .layer(layer)
        .layer(LoadShedLayer::new())
        .concurrency_limit(3)
        .service(api.service());
    let mut burst = JoinSet::new();
    for _ in 0..100 {
        burst.spawn(service.clone().oneshot(get()));
    }
    let answers = burst.join_all().await;
    let answered = answers.iter().flatten().filter(|response| response.status() == StatusCode::OK).count();
    let shed = answers
        .iter()
        .filter_map(|answer| answer.as_ref().err())
        .filter(|error| error.is::<tower::load_shed::error::Overloaded>())
        .count();
    assert_eq!(answered + shed, 100);
    assert!(answered > 0);
    // No permit leaked: the service handles as many requests at once as its limit allows.
    let again: Vec<_> = (0..3).map(|_| tokio::spawn(service.clone().oneshot(get()))).collect();
    for response in again {
        assert_eq!(response.await.unwrap().unwrap().status(), StatusCode::OK);
    }
}

/// The response future is dropped at any point.
#[tokio::test(start_paused = true)]
async fn drop_at_any_point_leaks_no_permit() {
    for polls in 0..8 {
        let (api, layer) = revoked_once().await;
        let mut service =
            ServiceBuilder::new().layer(layer).concurrency_limit(1).service(api.service::<Empty<Bytes>>());
        let mut request = Box::pin(service.ready().await.unwrap().call(get()));
        for _ in 0..polls {
            let mut cx = Context::from_waker(std::task::Waker::noop());
            if request.as_mut().poll(&mut cx).is_ready() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(400)).await;
        }
        drop(request);
        let ready = tokio::time::timeout(Duration::from_secs(1), service.ready()).await;
        assert_eq!(ready.expect("a free permit").unwrap().call(get()).await.unwrap().status(), 200);
    }
}

/// Two clones of a layer get a token each.
#[tokio::test(start_paused = true)]
async fn layer_clones_share_one_token() {
    let Scene { api, source, layer, .. } =
        scene().then(Act::Live(Duration::from_secs(60))).accept(["access-1"]).build();
    let services =
        [layer.layer(api.service()), layer.layer(api.service()), layer.clone().layer(api.service())];
    for service in services {
        assert_eq!(service.clone().oneshot(get()).await.unwrap().status(), StatusCode::OK);
        assert_eq!(service.oneshot(get()).await.unwrap().status(), StatusCode::OK);
    }
    assert_eq!(source.fetches(), 1);
}

/// A public type lacks a bound that users need, such as `Send`.
#[test]
fn types_are_send_and_sync() {
    fn is_send_and_sync<T: Send + Sync + 'static>(_: &T) {}
    fn is_send<T: Send + 'static>(_: &T) {}

    let Scene { layer, mut service, .. } = scene().build();
    is_send_and_sync(&layer);
    is_send_and_sync(layer.provider());
    is_send_and_sync(&layer.provider().status());
    is_send_and_sync(&service);
    is_send(&service.call(get()));
    let client = tower::service_fn(|_: Request<Empty<Bytes>>| {
        std::future::ready(Ok::<_, BoxError>(Response::new(Empty::<Bytes>::new())))
    });
    is_send_and_sync(&layer.layer(client).call(get()));
    fn is_sync<T: Sync>(_: &T) {}
    is_sync(&layer.provider().token());
    // hyper's client, as the fields of an application's state.
    #[derive(Clone)]
    struct State {
        client: BearerAuth<Client<HttpConnector, Empty<Bytes>>>,
        buffered: BearerAuth<Client<HttpConnector, ReplayBody<AxumBody>>, Buffered>,
    }
    let mut state = State {
        client: layer.layer(Client::builder(TokioExecutor::new()).build_http()),
        buffered: layer.clone().buffered(1).layer(Client::builder(TokioExecutor::new()).build_http()),
    };
    is_send_and_sync(&state.clone());
    is_send(&state.client.call(get()));
    is_send(&state.buffered.call(get().map(AxumBody::new)));
    // A client that is not `Sync`, such as tower's boxed ones, can also be wrapped.
    let boxed = tower::util::BoxCloneService::new(Api::default().service());
    let mut service = layer.layer(boxed);
    is_send(&service);
    is_send(&service.call(get()));
}

/// The inner service has another error type.
#[tokio::test(start_paused = true)]
async fn composes_with_every_error_type() {
    let (api, layer) = revoked_once().await;
    let infallible = layer.layer(api.service());
    assert!(infallible.oneshot(get()).await.is_ok());
    let boxed = layer.layer(api.service().map_err(BoxError::from));
    assert!(boxed.oneshot(get()).await.is_ok());
    let concrete = layer.layer(api.service().map_err(|_| std::io::Error::other("")));
    assert!(concrete.oneshot(get()).await.is_ok());
}

/// A request without this crate's token waits for one, or is not sent by the ready service.
#[tokio::test(start_paused = true)]
async fn tokenless_request_does_not_wait() {
    let Scene { api, layer, .. } = scene().then(Act::Hang).build();
    let limited = ServiceBuilder::new().layer(layer).concurrency_limit(1).service(api.service());
    let _waits = tokio::spawn(limited.clone().oneshot(get()));
    tokio::task::yield_now().await;
    let with_its_own = Request::get("https://api.example/").header("authorization", "Basic abc");
    for request in [
        Request::get("http://elsewhere.example/").body(Empty::new()).unwrap(),
        with_its_own.body(Empty::new()).unwrap(),
    ] {
        let answer = tokio::time::timeout(Duration::from_millis(1), limited.clone().oneshot(request)).await;
        assert_eq!(answer.unwrap().unwrap().status(), StatusCode::UNAUTHORIZED);
    }
}
