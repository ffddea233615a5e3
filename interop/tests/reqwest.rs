//! reqwest as the inner service, with the crate's adapter.

use bytes::Bytes;
use futures_util::stream;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Full, StreamBody};
use tower::{Layer, ServiceBuilder, ServiceExt};
use tower_bearer::{
    AllowedOrigins, ApiVideo, BearerAuthLayer, Error, ExecuteError, ReqwestExt, ReqwestService, StaticToken,
    TokenProvider,
};
use tower_bearer_interop::{Issuer, recovers_with_one_refresh, recovers_with_one_refresh_api_video, serve};
use tower_bearer_testing::AuthServer;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cloneable_body_needs_no_replay() {
    let server = AuthServer::start().await.unwrap();
    let provider = TokenProvider::new(ApiVideo::new(server.api_key()).base_url(server.uri()));
    let service = ServiceBuilder::new()
        .layer(BearerAuthLayer::with_provider(provider))
        .service(ReqwestService::new(reqwest::Client::new()));
    let uri = format!("{}videos", server.uri());
    let call = |_| {
        let (service, request) = (service.clone(), Request::get(&uri).body(String::new()).unwrap());
        async move {
            let answer = service.oneshot(request).await.unwrap();
            assert_eq!(answer.status(), StatusCode::OK);
            answer.into_body().collect().await.unwrap();
        }
    };
    recovers_with_one_refresh_api_video(&server, call).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_is_replayed() {
    let issuer = Issuer::default();
    let echo = axum::Router::new().fallback(async |body: Bytes| body);
    let address = serve(echo, &issuer).await;
    let layer = BearerAuthLayer::with_provider(TokenProvider::new(issuer.clone())).buffered(1 << 20);
    let service = layer.layer(ReqwestService::new(reqwest::Client::new()));
    recovers_with_one_refresh(&issuer, |number| {
        let frames = (0..10).map(move |frame| {
            Ok::<_, std::io::Error>(http_body::Frame::data(Bytes::from(format!("{number}:{frame};"))))
        });
        let body = reqwest::Body::wrap(StreamBody::new(stream::iter(frames)));
        let request = Request::post(format!("http://{address}/")).body(body).unwrap();
        let service = service.clone();
        async move {
            let answer = service.oneshot(request).await.unwrap();
            assert_eq!(answer.status(), StatusCode::OK);
            let text = answer.into_body().collect().await.unwrap().to_bytes();
            let whole: String = (0..10).map(|frame| format!("{number}:{frame};")).collect();
            assert_eq!(text, whole);
        }
    })
    .await;
}

/// A body of axum is not `Sync`, and reqwest's must be.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_axum_body_is_replayed() {
    let issuer = Issuer::default();
    let echo = axum::Router::new().fallback(async |body: Bytes| body);
    let address = serve(echo, &issuer).await;
    let service = BearerAuthLayer::with_provider(TokenProvider::new(issuer.clone()))
        .replay_with(1 << 20, reqwest::Body::wrap)
        .layer(ReqwestService::new(reqwest::Client::new()));
    recovers_with_one_refresh(&issuer, |number| {
        let frames = (0..10).map(move |frame| Ok::<_, std::io::Error>(format!("{number}:{frame};")));
        let body = axum::body::Body::from_stream(stream::iter(frames));
        let request = Request::post(format!("http://{address}/")).body(body).unwrap();
        let service = service.clone();
        async move {
            let answer = service.oneshot(request).await.unwrap();
            assert_eq!(answer.status(), StatusCode::OK);
            let whole: String = (0..10).map(|frame| format!("{number}:{frame};")).collect();
            assert_eq!(answer.into_body().collect().await.unwrap().to_bytes(), whole);
        }
    })
    .await;
}

#[tokio::test]
async fn invalid_uri_keeps_reqwest_error() {
    let service = ReqwestService::new(reqwest::Client::new());
    let layer = BearerAuthLayer::with_provider(TokenProvider::new(StaticToken::new("abc")));
    for uri in ["/videos", "*", "ftp://127.0.0.1/videos"] {
        let request = || Request::get(uri).body(Full::<Bytes>::default()).unwrap().map(reqwest::Body::wrap);
        let error = service.clone().oneshot(request()).await.unwrap_err();
        assert!(error.is_builder(), "{uri}: {error:?}");
        let layered = layer.clone().replay_with(1024, reqwest::Body::wrap).layer(service.clone());
        let error = layered.oneshot(request()).await.unwrap_err();
        assert!(error.downcast_ref::<reqwest::Error>().is_some_and(reqwest::Error::is_builder), "{error:?}");
    }
}

/// Reqwest follows redirects by default.
#[tokio::test]
async fn foreign_401_is_no_challenge() {
    let (api, elsewhere) = (Issuer::default(), Issuer::default());
    // This server accepts no token.
    let hostile = serve(axum::Router::new(), &elsewhere).await;
    let away = axum::response::Redirect::temporary(&format!("http://{hostile}/"));
    let router = axum::Router::new().route("/away", axum::routing::get(move || async { away }));
    let address = serve(router, &api).await;
    let provider = TokenProvider::new(api.clone());
    let layer = BearerAuthLayer::with_provider(provider.clone())
        .allowed_origins(AllowedOrigins::origins([format!("http://{address}")]).unwrap());
    let service = layer.layer(ReqwestService::new(reqwest::Client::new()));
    for _ in 0..3 {
        let request = Request::get(format!("http://{address}/away")).body(String::new()).unwrap();
        let answer = service.clone().oneshot(request).await.unwrap();
        assert_eq!(answer.status(), StatusCode::UNAUTHORIZED);
    }
    assert_eq!(provider.status().refreshes, 1);
}

/// reqwest's builder, its response and its options stay: JSON, the URL, a timeout of one request.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn execute_keeps_what_reqwest_has() {
    let server = AuthServer::start().await.unwrap();
    let provider = TokenProvider::new(ApiVideo::new(server.api_key()).base_url(server.uri()));
    let http = reqwest::Client::new();
    let client = ServiceBuilder::new()
        .layer(BearerAuthLayer::with_provider(provider).buffered(1 << 20))
        .service(ReqwestService::new(http.clone()));
    let url = format!("{}videos", server.uri());
    let create = || http.post(&url).json(&serde_json::json!({ "title": "A film" })).build().unwrap();
    assert_eq!(client.execute(create()).await.unwrap().status(), 201);
    server.revoke_access_tokens();
    let response: reqwest::Response = client.execute(create()).await.unwrap();
    assert_eq!((response.status(), response.url().as_str()), (StatusCode::CREATED, &*url));
    let video: serde_json::Value = response.json().await.unwrap();
    assert_eq!(video["title"], "A film");
    assert_eq!(server.counters().challenged, 1);

    // Accepts connections, and never answers.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = silent.local_addr().unwrap();
    let layer = BearerAuthLayer::with_provider(TokenProvider::new(StaticToken::new("abc"))).no_replay();
    let client = layer.layer(ReqwestService::new(http.clone()));
    let request = http.get(format!("http://{address}/")).timeout(std::time::Duration::from_millis(50));
    let error = client.execute(request.build().unwrap()).await.unwrap_err();
    assert!(matches!(&error, ExecuteError::Reqwest(error) if error.is_timeout()), "{error:?}");
}

/// The error says where it comes from: the token, reqwest, or another layer.
#[tokio::test]
async fn execute_names_the_error() {
    let http = reqwest::Client::new();
    let client = |layer: BearerAuthLayer| layer.no_replay().layer(ReqwestService::new(http.clone()));
    let layer = || BearerAuthLayer::with_provider(TokenProvider::new(StaticToken::new("abc")));
    let get = |url: &str| http.get(url).build().unwrap();
    let strict = client(layer().strict_origins());
    let error = strict.execute(get("http://api.example/")).await.unwrap_err();
    assert!(matches!(&error, ExecuteError::Token(Error::OriginNotAllowed(_))), "{error:?}");
    let free = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let error = client(layer()).execute(get(&format!("http://{free}/"))).await.unwrap_err();
    assert!(matches!(&error, ExecuteError::Reqwest(error) if error.is_connect()), "{error:?}");
    let shed = ServiceBuilder::new().load_shed().concurrency_limit(0).service(client(layer()));
    let error = shed.execute(get(&format!("http://{free}/"))).await.unwrap_err();
    assert!(
        matches!(&error, ExecuteError::Other(error) if error.to_string().contains("overloaded")),
        "{error:?}"
    );
}
