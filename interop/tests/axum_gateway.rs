//! The gateway of `examples/axum_gateway.rs` over real sockets: what it retries, forwards and removes.

#[allow(dead_code)]
#[path = "../../examples/axum_gateway.rs"]
mod axum_gateway;

use std::{net::SocketAddr, sync::Arc};

use axum::{Router, body::Body as AxumBody, extract::Request as AxumRequest, routing::any};
use axum_gateway::{demonstration, gateway};
use bytes::Bytes;
use futures_util::StreamExt;
use http::{
    HeaderMap, Request, Response, StatusCode, Uri,
    header::{AUTHORIZATION, CONNECTION, COOKIE, PROXY_AUTHORIZATION, TE, UPGRADE},
};
use http_body::Body;
use http_body_util::{BodyExt, Channel, Full};
use hyper::body::Incoming;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tokio::sync::mpsc;
use tower::BoxError;
use tower_bearer::{ApiVideo, TokenProvider};
use tower_bearer_interop::{Issuer, recovers_with_one_refresh, recovers_with_one_refresh_api_video, serve};
use tower_bearer_testing::AuthServer;

async fn listen(gateway: Router) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, gateway).await });
    address
}

/// Starts a gateway to `api`, which checks tokens with the issuer.
async fn before(api: Router) -> (SocketAddr, Issuer) {
    let issuer = Issuer::default();
    let api: Uri = format!("http://{}", serve(api, &issuer).await).parse().unwrap();
    (listen(gateway(TokenProvider::new(issuer.clone()), api)).await, issuer)
}

async fn send<B>(request: Request<B>) -> Response<Incoming>
where
    B: Body<Data = Bytes, Error: Into<BoxError>> + Send + Unpin + 'static,
{
    Client::builder(TokioExecutor::new()).build_http().request(request).await.unwrap()
}

async fn text(body: impl Body<Data: Send, Error: std::fmt::Debug> + Send) -> String {
    String::from_utf8(body.collect().await.unwrap().to_bytes().to_vec()).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateway_recovers_from_revocation() {
    let server = AuthServer::start().await.unwrap();
    let provider = TokenProvider::new(ApiVideo::new(server.api_key()).base_url(server.uri()));
    let uri = format!("http://{}/videos", listen(gateway(provider, server.uri())).await);
    let call = |_| {
        let request = Request::get(&uri).body(Full::<Bytes>::default()).unwrap();
        async move {
            let answer = send(request).await;
            assert_eq!(answer.status(), StatusCode::OK);
            assert!(text(answer.into_body()).await.contains("pagination"));
        }
    };
    recovers_with_one_refresh_api_video(&server, call).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateway_replays_bodies() {
    let echo = any(|body: AxumBody| async { body });
    let (address, issuer) = before(Router::new().fallback(echo)).await;
    recovers_with_one_refresh(&issuer, |number| {
        let body = format!("{number}").repeat(10_000);
        let request =
            Request::put(format!("http://{address}/echo")).body(Full::<Bytes>::from(body.clone())).unwrap();
        async move {
            let answer = send(request).await;
            assert_eq!(answer.status(), StatusCode::OK);
            assert_eq!(text(answer.into_body()).await, body);
        }
    })
    .await;
}

#[tokio::test]
async fn strips_credentials_and_hop_headers() {
    let (seen, mut requests) = mpsc::unbounded_channel::<HeaderMap>();
    let api = any(move |headers: HeaderMap| {
        seen.send(headers).unwrap();
        async {
            [("connection", "x-internal"), ("x-internal", "1"), ("keep-alive", "timeout=5"), ("x-kept", "1")]
        }
    });
    let (address, _issuer) = before(Router::new().fallback(api)).await;
    let request = Request::get(format!("http://{address}/videos?page=2"))
        .header(AUTHORIZATION, "Bearer the-clients-own")
        .header(COOKIE, "session=1")
        .header(CONNECTION, "x-secret, te")
        .header("x-secret", "1")
        .header(TE, "trailers")
        .header("keep-alive", "timeout=1")
        .header("proxy-connection", "keep-alive")
        .header(PROXY_AUTHORIZATION, "Basic abc")
        .header("x-kept", "1")
        .body(Full::<Bytes>::default())
        .unwrap();
    let answer = send(request).await;
    let headers = requests.recv().await.unwrap();
    assert_eq!(headers.get_all(AUTHORIZATION).iter().collect::<Vec<_>>(), ["Bearer token-1"]);
    for name in
        ["cookie", "connection", "x-secret", "te", "keep-alive", "proxy-connection", "proxy-authorization"]
    {
        assert!(!headers.contains_key(name), "{name}");
    }
    assert_eq!(headers["x-kept"], "1");
    assert_eq!(headers["host"].to_str().unwrap().split(':').next(), Some("127.0.0.1"));
    assert_ne!(headers["host"], address.to_string().as_str(), "the API's own name");
    for name in ["x-internal", "keep-alive"] {
        assert!(!answer.headers().contains_key(name), "{name}");
    }
    assert_eq!(answer.headers()["x-kept"], "1");
    assert!(!answer.headers().contains_key(UPGRADE));
}

/// Bodies are streamed in both directions.
#[tokio::test]
async fn uploads_and_downloads_stream() {
    let (arrived, mut at_the_api) = mpsc::unbounded_channel::<Bytes>();
    let api = any(move |request: AxumRequest| {
        let arrived = arrived.clone();
        async move {
            let frames = request.into_body().into_data_stream().map(move |frame| {
                let frame = frame.unwrap();
                arrived.send(frame.clone()).unwrap();
                Ok::<_, BoxError>(frame)
            });
            // The response starts before the request ends.
            AxumBody::from_stream(frames)
        }
    });
    let (address, _issuer) = before(Router::new().fallback(api)).await;
    let (mut upload, body) = Channel::<Bytes, BoxError>::new(1);
    let request = Request::post(format!("http://{address}/echo")).body(body).unwrap();
    let answer = tokio::spawn(async move { send(request).await });
    upload.send_data(Bytes::from_static(b"first")).await.unwrap();
    assert_eq!(at_the_api.recv().await.unwrap(), "first");
    let mut download = answer.await.unwrap().into_body();
    assert_eq!(download.frame().await.unwrap().unwrap().into_data().unwrap(), "first");
    upload.send_data(Bytes::from_static(b"second")).await.unwrap();
    assert_eq!(at_the_api.recv().await.unwrap(), "second");
    assert_eq!(download.frame().await.unwrap().unwrap().into_data().unwrap(), "second");
    drop(upload);
    assert!(download.frame().await.is_none());
}

/// The gateway's client learns why there is no token, and no secret.
#[tokio::test]
async fn says_why_there_is_no_token() {
    let server = AuthServer::start().await.unwrap();
    let provider = TokenProvider::new(ApiVideo::new("canary").base_url(server.uri()));
    let address = listen(gateway(provider, server.uri())).await;
    let request = Request::get(format!("http://{address}/videos")).body(Full::<Bytes>::default()).unwrap();
    let answer = send(request).await;
    assert_eq!(answer.status(), StatusCode::BAD_GATEWAY);
    let text = text(answer.into_body()).await;
    let url = format!("{}auth/api-key", server.uri());
    let why = format!("no access token could be obtained: {url} rejected the API key (HTTP 400)");
    assert!(text.starts_with(&why) && !text.contains("canary"), "{text}");
}

#[tokio::test]
async fn answers_502_but_serves_page() {
    let provider = TokenProvider::new(Issuer::default());
    let nobody = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let address = listen(gateway(provider, format!("http://{nobody}").parse().unwrap())).await;
    let get = |path| Request::get(format!("http://{address}{path}")).body(Full::<Bytes>::default()).unwrap();
    assert_eq!(send(get("/videos")).await.status(), StatusCode::BAD_GATEWAY);
    let page = send(get("/")).await;
    assert_eq!(page.status(), StatusCode::OK);
    assert!(text(page.into_body()).await.contains("<title>Videos</title>"));
}

/// All tokens are revoked in the middle of an upload, by the button of the page.
#[tokio::test]
async fn upload_survives_revoke_button() {
    let server = Arc::new(AuthServer::builder().check_after_body(true).start().await.unwrap());
    let provider = TokenProvider::new(ApiVideo::new(server.api_key()).base_url(server.uri()));
    let routes = demonstration(provider.clone(), Arc::clone(&server));
    let address = listen(gateway(provider, server.uri()).merge(routes)).await;
    let call = async |method: &str, path: &str, body: &'static str| {
        let request = Request::builder().method(method).uri(format!("http://{address}{path}"));
        text(send(request.body(Full::<Bytes>::from(body)).unwrap()).await.into_body()).await
    };
    let video = call("POST", "/videos", r#"{"title": "A"}"#).await;
    let video: serde_json::Value = serde_json::from_str(&video).unwrap();
    let uri = format!("http://{address}/videos/{}/source", video["videoId"].as_str().unwrap());

    let (mut upload, body) = Channel::<Bytes, BoxError>::new(1);
    let answer = tokio::spawn(send(Request::post(uri).body(body).unwrap()));
    upload.send_data(Bytes::from_static(b"first")).await.unwrap();
    while server.counters().accepted < 2 {
        tokio::task::yield_now().await;
    }
    call("POST", "/revoke", "").await;
    upload.send_data(Bytes::from_static(b"second")).await.unwrap();
    drop(upload);
    assert_eq!(answer.await.unwrap().status(), StatusCode::CREATED);
    assert_eq!(server.uploads().iter().map(|upload| upload.bytes).collect::<Vec<_>>(), [11]);
    let status: serde_json::Value = serde_json::from_str(&call("GET", "/status", "").await).unwrap();
    assert_eq!((&status["generation"], &status["challenged"]), (&2.into(), &1.into()));
    assert!(status["seconds_left"].as_u64().is_some_and(|left| left <= 3600), "{status}");
}
