//! The user's own API behind the token check, the check at the end of a body, and the records of requests.

use std::{
    cell::Cell,
    future::{Ready, ready},
    marker::PhantomData,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    Router,
    body::Body as AxumBody,
    routing::{any, get, post},
};
use base64::{Engine, prelude::BASE64_STANDARD};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Version, header::AUTHORIZATION};
use http_body::Body;
use http_body_util::{BodyExt, Channel, Full, channel::Sender};
use hyper::body::Incoming;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tower_bearer_testing::{AuthServer, AuthServerBuilder, Fault, RequestBody, RequestRecord, Route};
use tower_service::Service;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

async fn try_send<B>(request: Request<B>) -> Result<Response<Incoming>, hyper_util::client::legacy::Error>
where
    B: Body<Data = Bytes, Error: Into<BoxError>> + Send + Unpin + 'static,
{
    let http2 = request.version() == Version::HTTP_2;
    Client::builder(TokioExecutor::new()).http2_only(http2).build_http().request(request).await
}

async fn send<B>(request: Request<B>) -> Response<Incoming>
where
    B: Body<Data = Bytes, Error: Into<BoxError>> + Send + Unpin + 'static,
{
    try_send(request).await.unwrap()
}

async fn text(body: impl Body<Data: Send, Error: std::fmt::Debug> + Send) -> String {
    String::from_utf8(body.collect().await.unwrap().to_bytes().to_vec()).unwrap()
}

/// Returns a request with the token, if it is not empty.
fn request<B>(server: &AuthServer, method: &str, path: &str, token: &str, body: B) -> Request<B> {
    let mut request = Request::new(body);
    *request.method_mut() = method.parse().unwrap();
    *request.uri_mut() = format!("{}{path}", server.uri()).parse().unwrap();
    if !token.is_empty() {
        request.headers_mut().insert(AUTHORIZATION, format!("Bearer {token}").parse().unwrap());
    }
    request
}

async fn get_status(server: &AuthServer, path: &str, token: &str) -> StatusCode {
    send(request(server, "GET", path, token, Full::<Bytes>::default())).await.status()
}

async fn authenticate(server: &AuthServer) -> String {
    let body = json!({ "apiKey": server.api_key() }).to_string();
    let response = send(request(server, "POST", "auth/api-key", "", Full::<Bytes>::from(body))).await;
    let token: Value = serde_json::from_str(&text(response.into_body()).await).unwrap();
    token["access_token"].as_str().unwrap().to_owned()
}

/// A router that counts its requests, reads their bodies, and has a path of api.video.
fn counting() -> (Router, Arc<AtomicU64>) {
    let calls = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&calls);
    let echo = any(move |body: Bytes| {
        counted.fetch_add(1, Ordering::SeqCst);
        async { body }
    });
    (Router::new().route("/orders", echo.clone()).route("/upload", echo), calls)
}

/// A request without a valid token reaches the user's own service.
#[tokio::test]
async fn only_valid_tokens_reach_own_service() {
    for late in [false, true] {
        let (router, calls) = counting();
        let server = AuthServer::builder().challenge_late(late).api(router).start().await.unwrap();
        let token = authenticate(&server).await;
        assert_eq!(get_status(&server, "orders", &token).await, StatusCode::OK);
        assert_eq!(get_status(&server, "upload", &token).await, StatusCode::OK);
        assert_eq!(get_status(&server, "videos", &token).await, StatusCode::NOT_FOUND);
        assert_eq!(get_status(&server, ".well-known/oauth-authorization-server", "").await, StatusCode::OK);
        assert_eq!(calls.load(Ordering::SeqCst), 2);

        server.revoke_access_tokens();
        for token in [&*token, ""] {
            for path in ["orders", "upload?token=to0"] {
                let body = Full::from(vec![0; 1 << 20]);
                let response = send(request(&server, "POST", path, token, body)).await;
                assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
                let challenge = if token.is_empty() { "Bearer" } else { "Bearer error=\"invalid_token\"" };
                assert_eq!(response.headers()["www-authenticate"], challenge);
            }
        }
        assert_eq!(calls.load(Ordering::SeqCst), 2);
        let counters = server.counters();
        assert_eq!((counters.accepted, counters.challenged, counters.videos_listed), (3, 4, 0));
    }
}

/// Bodies are streamed through the user's own service in both directions.
#[tokio::test]
async fn own_service_streams() {
    let echo = post(|body: AxumBody| async { body });
    let server = AuthServer::builder()
        .check_after_body(true)
        .api(Router::new().route("/", echo))
        .start()
        .await
        .unwrap();
    let token = authenticate(&server).await;
    let (mut upload, body) = Channel::<Bytes, BoxError>::new(1);
    let mut download = send(request(&server, "POST", "", &token, body)).await.into_body();
    for part in ["first", "second"] {
        upload.send_data(Bytes::from(part)).await.unwrap();
        assert_eq!(download.frame().await.unwrap().unwrap().into_data().unwrap(), part);
    }
    drop(upload);
    assert!(download.frame().await.is_none());
}

/// Faults, the rate limit and errors of the user's own service lead to the documented responses.
#[tokio::test]
async fn faults_apply_to_own_service() {
    let orders = Router::new().route("/orders", get(async || ([("x-ratelimit-limit", "own")], "12345678")));
    let server = AuthServer::builder().api(orders).start().await.unwrap();
    let token = authenticate(&server).await;
    let orders = || request(&server, "GET", "orders", &token, Full::<Bytes>::default());
    for fault in [Fault::LoseAnswer, Fault::Reset] {
        server.inject(Route::Api, fault);
        assert!(try_send(orders()).await.is_err());
    }
    server.inject(Route::Api, Fault::Truncate);
    // A short response may be lost with its head.
    if let Ok(response) = try_send(orders()).await {
        assert!(response.into_body().collect().await.is_err());
    }
    server.inject(Route::Api, Fault::Status(StatusCode::BAD_GATEWAY));
    assert_eq!(send(orders()).await.status(), StatusCode::BAD_GATEWAY);
    for fault in [Fault::Drip(Duration::from_millis(1)), Fault::Delay(Duration::ZERO)] {
        server.inject(Route::Api, fault);
        let response = send(orders()).await;
        assert_eq!(response.headers()["x-ratelimit-limit"], "own");
        assert!(response.headers().contains_key("x-ratelimit-remaining"));
        assert_eq!(text(response.into_body()).await, "12345678");
    }
    assert_eq!(server.counters().faults, 6);
}

/// A service that is `Send` only, and fails.
#[derive(Clone)]
struct Fails(PhantomData<Cell<()>>);

impl Service<Request<RequestBody>> for Fails {
    type Response = Response<Full<Bytes>>;
    type Error = &'static str;
    type Future = Ready<Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<RequestBody>) -> Self::Future {
        assert!(!format!("{:?}", request.body()).contains("eyJ0eXAiOiJKV1QifQ"));
        ready(Err("out of orders"))
    }
}

/// The user's own service returns an error.
#[tokio::test]
async fn error_of_own_service_is_a_500() {
    let server = AuthServer::builder().api(Fails(PhantomData)).start().await.unwrap();
    let token = authenticate(&server).await;
    let response = send(request(&server, "GET", "orders", &token, Full::<Bytes>::default())).await;
    assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
    assert!(text(response.into_body()).await.contains("out of orders"));
}

/// Starts a POST, sends the first half of its body, and waits until the API has read it.
async fn half_sent(
    request: Request<Channel<Bytes, BoxError>>,
    upload: &mut Sender<Bytes, BoxError>,
    arrived: &mut mpsc::UnboundedReceiver<()>,
) -> tokio::task::JoinHandle<Response<Incoming>> {
    let response = tokio::spawn(send(request));
    upload.send_data(Bytes::from_static(b"first")).await.unwrap();
    arrived.recv().await.unwrap();
    response
}

/// What an API has read, one for each request: the whole text of a body, or the error.
type ReadBodies = Arc<Mutex<Vec<Result<String, String>>>>;

/// Returns an API that reports when bytes of a body arrive, and what it has read of each.
fn reading() -> (Router, mpsc::UnboundedReceiver<()>, ReadBodies) {
    let (arrive, arrived) = mpsc::unbounded_channel();
    let read = ReadBodies::default();
    let results = Arc::clone(&read);
    let upload = post(move |mut body: AxumBody| {
        let (arrive, results) = (arrive.clone(), Arc::clone(&results));
        async move {
            let mut content = Vec::new();
            let length = body.size_hint().exact();
            // Like hyper's client, this reader does not ask for more than the known length.
            while length != Some(content.len() as u64) && !body.is_end_stream() {
                match body.frame().await {
                    Some(Ok(frame)) => content.extend(frame.into_data().unwrap()),
                    Some(Err(error)) => {
                        results.lock().unwrap().push(Err(error.to_string()));
                        return StatusCode::BAD_REQUEST;
                    }
                    None => break,
                }
                arrive.send(()).unwrap();
            }
            results.lock().unwrap().push(Ok(String::from_utf8(content).unwrap()));
            StatusCode::CREATED
        }
    });
    (Router::new().route("/upload", upload), arrived, read)
}

/// A token is revoked while a body is sent to the user's own service.
#[tokio::test]
async fn revocation_during_body_is_challenged() {
    for (version, length) in [
        (Version::HTTP_11, None),
        (Version::HTTP_11, Some("11")),
        (Version::HTTP_2, None),
        (Version::HTTP_2, Some("11")),
    ] {
        for (check, revoke) in [(false, true), (true, false), (true, true)] {
            let (router, mut arrived, read) = reading();
            let server = AuthServer::builder().check_after_body(check).api(router).start().await.unwrap();
            let token = authenticate(&server).await;
            let (mut upload, body) = Channel::new(1);
            let mut request = request(&server, "POST", "upload", &token, body);
            *request.version_mut() = version;
            if let Some(length) = length {
                request.headers_mut().insert("content-length", HeaderValue::from_static(length));
            }
            let response = half_sent(request, &mut upload, &mut arrived).await;
            if revoke {
                server.revoke_access_tokens();
            }
            upload.send_data(Bytes::from_static(b"second")).await.unwrap();
            drop(upload);
            let response = response.await.unwrap();
            let what = format!("{version:?} {length:?} {check} {revoke}");
            let read = read.lock().unwrap().pop().unwrap();
            let counters = server.counters();
            if check && revoke {
                assert_eq!(response.status(), StatusCode::UNAUTHORIZED, "{what}");
                assert_eq!(response.headers()["www-authenticate"], "Bearer error=\"invalid_token\"");
                assert_eq!(
                    read,
                    Err("the access token expired or was revoked during the request".to_owned()),
                    "{what}"
                );
                assert_eq!((counters.accepted, counters.challenged), (0, 1), "{what}");
            } else {
                assert_eq!(response.status(), StatusCode::CREATED, "{what}");
                assert_eq!(read, Ok("firstsecond".to_owned()), "{what}");
                assert_eq!((counters.accepted, counters.challenged), (1, 0), "{what}");
            }
        }
    }
}

/// A token is revoked while a video is uploaded.
#[tokio::test]
async fn revocation_during_upload_stores_nothing() {
    let form = [
        "--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a.mp4\"\r\n\r\nfirst",
        "second\r\n--b--\r\n",
        "after the form",
    ];
    for (content_type, parts) in
        [("video/mp4", &["first", "second"][..]), ("multipart/form-data; boundary=b", &form[..])]
    {
        for check in [false, true] {
            let server = AuthServer::builder().check_after_body(check).start().await.unwrap();
            let token = authenticate(&server).await;
            let title = Full::<Bytes>::from(json!({ "title": "A" }).to_string());
            let video = text(send(request(&server, "POST", "videos", &token, title)).await.into_body()).await;
            let video: Value = serde_json::from_str(&video).unwrap();
            let path = format!("videos/{}/source", video["videoId"].as_str().unwrap());
            let accepted = server.counters().accepted;

            let (mut upload, body) = Channel::<Bytes, BoxError>::new(1);
            let mut request = request(&server, "POST", &path, &token, body);
            request.headers_mut().insert("content-type", HeaderValue::from_static(content_type));
            let response = tokio::spawn(send(request));
            let (last, first) = parts.split_last().unwrap();
            for part in first {
                upload.send_data(Bytes::from_static(part.as_bytes())).await.unwrap();
            }
            while server.counters().accepted == accepted {
                tokio::task::yield_now().await;
            }
            server.revoke_access_tokens();
            upload.send_data(Bytes::from_static(last.as_bytes())).await.unwrap();
            drop(upload);
            let expected = if check { StatusCode::UNAUTHORIZED } else { StatusCode::CREATED };
            assert_eq!(response.await.unwrap().status(), expected, "{content_type}");
            assert_eq!(server.uploads().len(), usize::from(!check), "{content_type}");
        }
    }
}

/// A server of one's own asks whether a request's token is valid.
#[tokio::test]
async fn accepts_only_valid_credentials() {
    let server = AuthServer::start().await.unwrap();
    let token = authenticate(&server).await;
    let with = |value: String| HeaderMap::from_iter([(AUTHORIZATION, value.parse().unwrap())]);
    assert!(server.accepts(&with(format!("Bearer {token}"))));
    assert!(!server.accepts(&with(format!("Bearer {token}0"))));
    assert!(!server.accepts(&with(format!("Basic {token}"))));
    let basic = |key: &str| with(format!("Basic {}", BASE64_STANDARD.encode(format!("{key}:"))));
    assert!(server.accepts(&basic(&server.api_key())));
    assert!(!server.accepts(&basic("no-key")));
    assert!(!server.accepts(&HeaderMap::new()));
    server.revoke_access_tokens();
    assert!(!server.accepts(&with(format!("Bearer {token}"))));
    assert_eq!((server.counters().accepted, server.counters().challenged), (2, 5));
}

fn recording(builder: AuthServerBuilder) -> (AuthServerBuilder, mpsc::UnboundedReceiver<RequestRecord>) {
    let (report, reports) = mpsc::unbounded_channel();
    (builder.on_request_end(move |record| report.send(record.clone()).unwrap()), reports)
}

/// A request is not recorded, or is recorded with its query.
#[tokio::test]
async fn each_request_is_recorded_once() {
    let (builder, mut records) = recording(AuthServer::builder());
    let server = builder.start().await.unwrap();
    let token = authenticate(&server).await;
    get_status(&server, "videos?title=secret", &token).await;
    get_status(&server, "videos", "").await;
    server.inject(Route::Api, Fault::Reset);
    let lost = request(&server, "GET", "videos", &token, Full::<Bytes>::default());
    assert!(try_send(lost).await.is_err());
    // The client gives up.
    server.inject(Route::Api, Fault::Hang);
    let hanging =
        tokio::spawn(try_send(request(&server, "DELETE", "videos/vi0", &token, Full::<Bytes>::default())));
    while server.counters().faults < 2 {
        tokio::task::yield_now().await;
    }
    hanging.abort();
    for expected in [
        ("POST", "/auth/api-key", Some(200)),
        ("GET", "/videos", Some(200)),
        ("GET", "/videos", Some(401)),
        ("GET", "/videos", None),
        ("DELETE", "/videos/vi0", None),
    ] {
        let RequestRecord { method, path, status, .. } = records.recv().await.unwrap();
        assert_eq!((method.as_str(), &*path, status.map(|status| status.as_u16())), expected);
    }
    drop(server);
    assert!(records.recv().await.is_none());
}
