//! hyper-util's client, with tower's layers outside and inside of `BearerAuthLayer`.

use std::time::Duration;

use axum::{Router, body::Body as AxumBody, extract::State, routing::get};
use bytes::Bytes;
use futures_util::stream;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_rustls::HttpsConnectorBuilder;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use tower::{
    BoxError, Layer, Service, ServiceBuilder, ServiceExt, load_shed::error::Overloaded,
    util::BoxCloneSyncService,
};
use tower_bearer::{
    ApiVideo, BearerAuth, BearerAuthLayer, TokenClient, TokenProvider,
    replay::{Buffered, ReplayBody},
};
use tower_bearer_interop::{CALLS, all_at_once, recovers_with_one_refresh_api_video};
use tower_bearer_testing::{AuthServer, Counters};

type Body = Full<Bytes>;
type HttpClient = Client<HttpConnector, Body>;

const MANY: u64 = 1_000_000;
const LONG: Duration = Duration::from_secs(60);

struct Stack {
    server: AuthServer,
    layer: BearerAuthLayer,
}

impl Stack {
    async fn new() -> Self {
        let server = AuthServer::start().await.unwrap();
        let source = ApiVideo::new(server.api_key()).base_url(server.uri());
        let layer = BearerAuthLayer::with_provider(TokenProvider::new(source));
        Self { server, layer }
    }

    /// Revokes the token under 200 calls, and checks that all succeed after one refresh.
    async fn recovers<S, ResBody>(&self, service: S) -> Counters
    where
        S: Service<Request<Body>, Response = Response<ResBody>, Error = BoxError>
            + Clone
            + Send
            + Sync
            + 'static,
        S::Future: Send,
        ResBody: http_body::Body + Send,
        ResBody::Data: Send,
        ResBody::Error: std::fmt::Debug + Send,
    {
        let uri = format!("{}videos", self.server.uri());
        let call = |_| {
            let request = Request::get(&uri).body(Body::default()).unwrap();
            let service = service.clone();
            async move {
                let answer = service.oneshot(request).await.unwrap();
                assert_eq!(answer.status(), StatusCode::OK);
                answer.into_body().collect().await.unwrap();
            }
        };
        recovers_with_one_refresh_api_video(&self.server, call).await
    }
}

fn http1() -> HttpClient {
    Client::builder(TokioExecutor::new()).build_http()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_http1() {
    let stack = Stack::new().await;
    let service = ServiceBuilder::new().layer(stack.layer.clone()).service(http1());
    assert_eq!(stack.recovers(service).await.http2_requests, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_http2() {
    let stack = Stack::new().await;
    let client: HttpClient = Client::builder(TokioExecutor::new()).http2_only(true).build_http();
    let service = ServiceBuilder::new().layer(stack.layer.clone()).service(client);
    assert!(stack.recovers(service).await.http2_requests > CALLS as u64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_tls() {
    let server = AuthServer::builder().tls(true).start().await.unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(server.certificate().unwrap().to_vec().into()).unwrap();
    let crypto = rustls::crypto::ring::default_provider().into();
    let tls = rustls::ClientConfig::builder_with_provider(crypto)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connector = || {
        HttpsConnectorBuilder::new().with_tls_config(tls.clone()).https_only().enable_all_versions().build()
    };
    // The source's client has to trust the server, too.
    let source = ApiVideo::new(server.api_key()).base_url(server.uri()).with_client(
        TokenClient::with_service(Client::builder(TokioExecutor::new()).build::<_, String>(connector())),
    );
    let layer = BearerAuthLayer::with_provider(TokenProvider::new(source));
    let service = ServiceBuilder::new()
        .layer(layer.clone())
        .service(Client::builder(TokioExecutor::new()).build::<_, Body>(connector()));
    assert!(Stack { server, layer }.recovers(service).await.http2_requests > CALLS as u64, "by ALPN");
}

/// A request and its retry take one slot in each layer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_towers_layers_around_it() {
    let stack = Stack::new().await;
    let service = ServiceBuilder::new()
        .buffer(CALLS)
        .rate_limit(MANY, Duration::from_secs(1))
        .load_shed()
        .concurrency_limit(CALLS)
        .timeout(LONG)
        .layer(stack.layer.clone())
        .service(http1());
    stack.recovers(service).await;
}

/// A buffer makes a service that is not `Clone`, such as a rate limit, usable as the inner service.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_towers_layers_under_it() {
    let stack = Stack::new().await;
    let service = ServiceBuilder::new()
        .layer(stack.layer.clone())
        .buffer(2 * CALLS)
        .rate_limit(MANY, Duration::from_secs(1))
        .load_shed()
        .concurrency_limit(2 * CALLS)
        .timeout(LONG)
        .service(http1());
    stack.recovers(service).await;
}

/// Both branches of an optional layer have the same error type.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn as_an_optional_layer() {
    let stack = Stack::new().await;
    let with = |layer: Option<BearerAuthLayer>| {
        ServiceBuilder::new().option_layer(layer).map_err(BoxError::from).service(http1())
    };
    stack.recovers(with(Some(stack.layer.clone()))).await;
    let request = Request::get(format!("{}videos", stack.server.uri())).body(Body::default()).unwrap();
    assert_eq!(with(None).oneshot(request).await.unwrap().status(), StatusCode::UNAUTHORIZED);
}

/// As in the recipe "The client as a field".
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn as_fields_of_an_axum_state() {
    #[derive(Clone)]
    struct AppState {
        videos: String,
        client: BearerAuth<HttpClient>,
        uploads: BearerAuth<Client<HttpConnector, ReplayBody<AxumBody>>, Buffered>,
        boxed: BoxCloneSyncService<Request<Body>, Response<Incoming>, BoxError>,
    }

    async fn statuses(State(state): State<AppState>) -> String {
        let AppState { videos, client, uploads, boxed } = state;
        let chunk =
            AxumBody::from_stream(stream::iter([Ok::<_, BoxError>("{\"title\": "), Ok("\"A film\"}")]));
        let answers = [
            client.oneshot(Request::get(&videos).body(Body::default()).unwrap()).await,
            boxed.oneshot(Request::get(&videos).body(Body::default()).unwrap()).await,
            uploads.oneshot(Request::post(&videos).body(chunk).unwrap()).await,
        ];
        answers.map(|answer| answer.unwrap().status().as_u16()).map(|status| status.to_string()).join(" ")
    }

    let Stack { server, layer } = Stack::new().await;
    let state = AppState {
        videos: format!("{}videos", server.uri()),
        client: layer.layer(http1()),
        uploads: layer.clone().buffered(1024).layer(Client::builder(TokioExecutor::new()).build_http()),
        boxed: BoxCloneSyncService::new(layer.layer(http1())),
    };
    let router = Router::new().route("/", get(statuses)).with_state(state);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let uri = format!("http://{}/", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, router).await });
    for _ in 0..2 {
        let answer = http1().oneshot(Request::get(&uri).body(Body::default()).unwrap()).await.unwrap();
        assert_eq!(answer.into_body().collect().await.unwrap().to_bytes(), "200 200 201");
        server.revoke_access_tokens();
    }
    assert_eq!(server.counters().refresh_grants, 1);
}

/// With a load shedder inside the layer, each call gets a response or a load-shed error. A shed retry
/// fails only its own call.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shed_requests_get_overloaded() {
    let stack = Stack::new().await;
    let shed =
        ServiceBuilder::new().layer(stack.layer.clone()).load_shed().concurrency_limit(20).service(http1());
    stack.layer.provider().ready().await.unwrap();
    stack.server.revoke_access_tokens();
    let uri = format!("{}videos", stack.server.uri());
    all_at_once(|_| {
        let request = Request::get(&uri).body(Body::default()).unwrap();
        let service = shed.clone();
        async move {
            match service.oneshot(request).await {
                Ok(answer) => {
                    assert!(matches!(answer.status(), StatusCode::OK | StatusCode::UNAUTHORIZED));
                }
                Err(error) => assert!(error.is::<Overloaded>(), "{error}"),
            }
        }
    })
    .await;
    let counters = stack.server.counters();
    assert_eq!((counters.api_key_grants, counters.refresh_grants), (1, 1), "{counters:?}");
    // The shedder's capacity is unchanged.
    let request = Request::get(&uri).body(Body::default()).unwrap();
    assert_eq!(shed.oneshot(request).await.unwrap().status(), StatusCode::OK);
}
