//! A body is replayed byte for byte, over real sockets, even if the 401 arrives while the body is still being sent.
#![cfg(feature = "default-client")]

use std::{
    convert::Infallible,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use hyper_util::client::legacy::{Client, connect::HttpConnector};
use tower::{Layer, Service, ServiceExt};
use tower_bearer::{ApiVideo, BearerAuthLayer, BoxError, SourceError, replay::ReplayBody};
use tower_bearer_testing::{AuthServer, Upload};

use crate::support::{self, Act, Scene, scene, scene_of};

/// A body of many different frames, with trailers. It yields to the runtime between frames, as a file does.
struct Video {
    sent: u64,
    frames: u64,
    /// Counts the frames that were read from this body.
    read: Arc<AtomicU64>,
    yielded: bool,
    trailers: Option<HeaderMap>,
    exact: bool,
}

const FRAME: u64 = 8 * 1024;

impl Video {
    fn new(frames: u64) -> Self {
        let mut trailers = HeaderMap::new();
        trailers.insert("x-checksum", "abc".parse().unwrap());
        Self { sent: 0, frames, read: Arc::default(), yielded: false, trailers: Some(trailers), exact: false }
    }

    fn without_trailers(frames: u64) -> Self {
        Self { trailers: None, exact: true, ..Self::new(frames) }
    }

    fn frame(index: u64) -> Bytes {
        (0..FRAME).map(|at| (at.wrapping_mul(31) ^ index.wrapping_mul(131)) as u8).collect::<Vec<_>>().into()
    }

    fn bytes(frames: u64) -> Vec<u8> {
        (0..frames).flat_map(Self::frame).collect()
    }
}

impl Body for Video {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if !std::mem::replace(&mut self.yielded, true) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.yielded = false;
        if self.sent < self.frames {
            let frame = Self::frame(self.sent);
            self.sent += 1;
            self.read.fetch_add(1, Ordering::SeqCst);
            return Poll::Ready(Some(Ok(Frame::data(frame))));
        }
        Poll::Ready(self.trailers.take().map(|trailers| Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.sent == self.frames && self.trailers.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        if self.exact { SizeHint::with_exact((self.frames - self.sent) * FRAME) } else { SizeHint::default() }
    }
}

fn layer(server: &AuthServer) -> BearerAuthLayer {
    let source = ApiVideo::new(server.api_key()).base_url(server.uri());
    // These tests revoke tokens more often than a cool-down allows.
    let instant = Duration::from_nanos(1);
    scene_of(source).provider(|builder| builder.cool_down(instant, instant)).build().layer
}

async fn video_id(server: &AuthServer, layer: &BearerAuthLayer) -> String {
    let request = Request::post(format!("{}videos", server.uri()))
        .body(Full::<Bytes>::from(r#"{"title": "a film"}"#))
        .unwrap();
    let response = layer.layer(support::http1()).oneshot(request).await.unwrap();
    assert_eq!(response.status(), StatusCode::CREATED);
    let body = response.into_body().collect().await.unwrap().to_bytes();
    let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
    body["videoId"].as_str().unwrap().to_owned()
}

fn clients<B>() -> [(&'static str, Client<HttpConnector, B>); 2]
where
    B: Body<Data: Send> + Send,
{
    [("HTTP/1.1", support::http1()), ("HTTP/2", support::http2())]
}

fn upload<B>(server: &AuthServer, id: &str, body: B) -> Request<B> {
    Request::post(format!("{}videos/{id}/source", server.uri()))
        .header("content-type", "application/octet-stream")
        // Without this header hyper sends no trailers over HTTP/1.
        .header("trailer", "x-checksum")
        .body(body)
        .unwrap()
}

fn arrived(server: &AuthServer) -> Upload {
    server.uploads().pop().expect("an upload arrived")
}

fn sha256(bytes: &[u8]) -> String {
    ring::digest::digest(&ring::digest::SHA256, bytes)
        .as_ref()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// A 401 arrives while the body is being sent, and the retry continues the upload.
#[tokio::test]
async fn early_401_retry_continues_upload() {
    const FRAMES: u64 = 200;
    let expected = sha256(&Video::bytes(FRAMES));
    for (version, client) in clients::<ReplayBody<Video>>() {
        let server = AuthServer::start().await.unwrap();
        let layer = layer(&server);
        let id = video_id(&server, &layer).await;
        for round in 1..=12 {
            server.revoke_access_tokens();
            let video = Video::new(FRAMES);
            let read = Arc::clone(&video.read);
            let service = layer.clone().buffered(4 << 20).layer(client.clone());
            let response = service.oneshot(upload(&server, &id, video)).await.unwrap();
            assert_eq!(response.status(), StatusCode::CREATED, "{version}, round {round}");
            let arrived = arrived(&server);
            assert_eq!((arrived.bytes, &arrived.sha256), (FRAMES * FRAME, &expected), "{version}");
            assert_eq!(arrived.trailers["x-checksum"], "abc", "{version}");
            // The source was read once: the retry replays the buffered prefix, then continues the stream.
            assert_eq!(read.load(Ordering::SeqCst), FRAMES, "{version}");
            assert_eq!(server.uploads().len(), round);
            assert_eq!(server.counters().challenged, round as u64);
        }
    }
}

/// A 401 arrives after the whole upload, which the retry repeats exactly.
#[tokio::test]
async fn late_401_replays_upload_exactly() {
    const FRAMES: u64 = 50;
    let expected = sha256(&Video::bytes(FRAMES));
    for (version, client) in clients::<ReplayBody<Video>>() {
        let server = AuthServer::builder().challenge_late(true).start().await.unwrap();
        let layer = layer(&server);
        let id = video_id(&server, &layer).await;
        for video in [Video::new(FRAMES), Video::without_trailers(FRAMES)] {
            server.revoke_access_tokens();
            let (exact, trailers) = (video.exact, video.trailers.clone().unwrap_or_default());
            let service = layer.clone().buffered((FRAMES * FRAME) as usize + 100).layer(client.clone());
            let response = service.oneshot(upload(&server, &id, video)).await.unwrap();
            assert_eq!(response.status(), StatusCode::CREATED, "{version}");
            let arrived = arrived(&server);
            assert_eq!(arrived.sha256, expected, "{version}");
            assert_eq!(arrived.trailers, trailers, "{version}");
            // The retry has an exact length, too.
            let length =
                arrived.headers.get("content-length").map(|length| length.to_str().unwrap().to_owned());
            assert_eq!(length, exact.then(|| (FRAMES * FRAME).to_string()), "{version}");
        }
        assert_eq!(server.counters().challenged, 2);
    }
}

/// A challenged upload is longer than the limit, and cannot be sent again.
#[tokio::test]
async fn upload_over_limit_gets_its_401() {
    const FRAMES: u64 = 50;
    for (version, client) in clients::<ReplayBody<Video>>() {
        let server = AuthServer::builder().challenge_late(true).start().await.unwrap();
        let layer = layer(&server);
        let id = video_id(&server, &layer).await;
        for video in [Video::new(FRAMES), Video::without_trailers(FRAMES)] {
            server.revoke_access_tokens();
            let service = layer.clone().buffered(FRAME as usize * 10).layer(client.clone());
            let challenged = service.clone().oneshot(upload(&server, &id, video)).await.unwrap();
            assert_eq!(challenged.status(), StatusCode::UNAUTHORIZED, "{version}");
            let body = challenged.into_body().collect().await.unwrap().to_bytes();
            assert!(body.starts_with(b"{"), "{version}: the 401's body is incomplete");
            while layer.provider().status().refreshing {
                tokio::task::yield_now().await;
            }
            let accepted = service.oneshot(upload(&server, &id, Video::new(FRAMES))).await.unwrap();
            assert_eq!(accepted.status(), StatusCode::CREATED, "{version}");
        }
    }
}

/// The request body fails midway.
#[tokio::test]
async fn failing_body_is_not_replayed() {
    /// One frame, then an I/O error.
    struct Broken(u8);

    impl Body for Broken {
        type Data = Bytes;
        type Error = std::io::Error;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
            self.0 += 1;
            Poll::Ready(Some(match self.0 {
                1 => Ok(Frame::data(Bytes::from_static(b"half"))),
                _ => Err(std::io::Error::other("the disk is gone")),
            }))
        }
    }

    for (version, client) in clients::<ReplayBody<Broken>>() {
        let server = AuthServer::builder().challenge_late(true).start().await.unwrap();
        let layer = layer(&server);
        let id = video_id(&server, &layer).await;
        let before = server.counters();
        let service = layer.buffered(1 << 20).layer(client);
        let error = service.oneshot(upload(&server, &id, Broken(0))).await.unwrap_err();
        // Over HTTP/2 hyper reports only that the user's body failed.
        let shown = support::chain(&*error);
        assert!(version == "HTTP/2" || shown.contains("the disk is gone"), "{version}: {shown}");
        // The request's head may not have been sent before its body failed.
        assert!(server.counters().accepted <= before.accepted + 1, "{version}");
        assert!(server.uploads().is_empty(), "{version}: a partial body was accepted");
    }
}

/// An upload is paused during the refresh: it neither exceeds the limit nor ends.
#[tokio::test]
async fn early_401_holds_upload_below_limit() {
    const FRAMES: u64 = 2000;
    for (version, client) in clients::<ReplayBody<Video>>() {
        let server = AuthServer::start().await.unwrap();
        let layer = layer(&server);
        let id = video_id(&server, &layer).await;
        server.revoke_access_tokens();
        let slow = tower_bearer_testing::Fault::Delay(Duration::from_millis(300));
        server.inject(tower_bearer_testing::Route::RefreshGrant, slow);
        // The upload is 16 MB. The socket buffers far less than the limit before the response is read.
        let service = layer.buffered(12 << 20).layer(client);
        let response = service.oneshot(upload(&server, &id, Video::new(FRAMES))).await.unwrap();
        assert_eq!(response.status(), StatusCode::CREATED, "{version}");
        assert_eq!(arrived(&server).bytes, FRAMES * FRAME, "{version}");
    }
}

/// A refresh fails during an upload, which resumes, and the caller gets its 401.
#[tokio::test(start_paused = true)]
async fn failed_refresh_resumes_upload() {
    let layer = scene()
        .then(Act::Live(Duration::from_secs(3600)))
        .then(Act::Fail(SourceError::rejected("no")))
        .build()
        .layer;
    let uploaded = Arc::new(AtomicU64::new(0));
    let service = tower::service_fn({
        let uploaded = Arc::clone(&uploaded);
        move |request: Request<ReplayBody<Video>>| {
            let uploaded = Arc::clone(&uploaded);
            async move {
                // Responds after the headers and keeps reading in the background, as a connection does.
                tokio::spawn(async move {
                    let body = request.into_body().collect().await.unwrap();
                    uploaded.store(body.to_bytes().len() as u64, Ordering::SeqCst);
                });
                Ok::<_, BoxError>(Response::builder().status(401).body(Full::<Bytes>::from("no"))?)
            }
        }
    });
    let request = Request::post("https://api.example/").body(Video::new(100)).unwrap();
    let response = layer.buffered(1 << 20).layer(service).oneshot(request).await.unwrap();
    assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(uploaded.load(Ordering::SeqCst), 100 * FRAME);
}

/// The inner service has a body type of its own.
#[tokio::test]
async fn replay_with_builds_inner_body() {
    type Boxed = UnsyncBoxBody<Bytes, BoxError>;

    const FRAMES: u64 = 20;
    for (version, client) in clients::<Boxed>() {
        let server = AuthServer::start().await.unwrap();
        let layer = layer(&server);
        let id = video_id(&server, &layer).await;
        server.revoke_access_tokens();
        let mut service = layer.replay_with(1 << 20, BodyExt::boxed_unsync).layer(client);
        let service = service.ready().await.unwrap();
        let response = service.call(upload(&server, &id, Video::new(FRAMES))).await.unwrap();
        assert_eq!(response.status(), StatusCode::CREATED, "{version}");
        assert_eq!(arrived(&server).sha256, sha256(&Video::bytes(FRAMES)), "{version}");
    }
}

/// A body can be cloned by a function, or not.
#[tokio::test(start_paused = true)]
async fn clone_with_replays_cloneable_body() {
    struct Own(Option<&'static str>);

    impl Own {
        fn try_clone(&self) -> Option<Self> {
            self.0.map(|text| Own(Some(text)))
        }
    }

    impl Body for Own {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            Poll::Ready(self.0.take().map(|text| Ok(Frame::data(text.into()))))
        }
    }

    for (body, requests) in [(Some("text"), 2), (None, 1)] {
        let Scene { api, layer, .. } = scene().accept(["access-2"]).build();
        let request = Request::post("https://api.example/").body(Own(body)).unwrap();
        let response = layer.clone_with(Own::try_clone).layer(api.service()).oneshot(request).await.unwrap();
        assert_eq!(api.requests(), requests);
        assert_eq!(response.status() == StatusCode::OK, requests == 2);
    }
}

/// A gateway forwards and replays an `Incoming` body.
#[tokio::test]
async fn replays_body_of_other_connection() {
    let server = AuthServer::start().await.unwrap();
    let layer = layer(&server);
    let id = video_id(&server, &layer).await;
    let api = server.uri();
    let upstream = layer.buffered(1 << 20).layer(support::http1());
    let gateway = hyper::service::service_fn(move |request: Request<hyper::body::Incoming>| {
        let (mut head, body) = request.into_parts();
        head.uri = format!("{}{}", api, &head.uri.path()[1..]).parse().unwrap();
        head.headers.remove("host");
        upstream.clone().oneshot(Request::from_parts(head, body))
    });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serving = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let stream = hyper_util::rt::TokioIo::new(stream);
        let _ = hyper::server::conn::http1::Builder::new().serve_connection(stream, gateway).await;
    });
    server.revoke_access_tokens();
    let request = Request::post(format!("http://{address}/videos/{id}/source")).body(Video::new(10)).unwrap();
    let response = support::http1().request(request).await.unwrap();
    assert_eq!(response.status(), StatusCode::CREATED);
    assert_eq!(arrived(&server).sha256, sha256(&Video::bytes(10)));
    serving.abort();
}
