//! A retry never waits for what its 401 holds: a stream, a window, a connection or a permit.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    net::{Ipv4Addr, SocketAddr},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::join_all;
use http::{Request, Response, StatusCode, Version, header::AUTHORIZATION};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt, Channel, Empty, Full, combinators::UnsyncBoxBody};
use hyper::{body::Incoming, server::conn};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioIo},
};
use tokio::{
    net::TcpListener,
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
    time::{sleep, timeout},
};
use tower::{Layer, ServiceExt, service_fn};
use tower_bearer::{BearerAuthLayer, BoxError, SourceError, Token, replay::ReplayBody, source_fn};

use crate::support::{self, MILLISECOND, http1, http2, ours, scene_of};

type BoxBody = UnsyncBoxBody<Bytes, Infallible>;

/// More than any exchange takes, and less than a test that hangs should take.
const LIMIT: Duration = Duration::from_secs(8);

/// More than a small 401 has.
const LARGE: usize = 100 * 1024;

/// The body of a 401.
#[derive(Clone, Copy, Debug)]
enum Refusal {
    /// Never has a frame, and never ends.
    Endless,
    /// One frame of this length.
    Whole(usize),
    /// [`LARGE`] in ten frames, without a length.
    Streamed,
}

impl Refusal {
    fn body(self) -> BoxBody {
        match self {
            Self::Whole(length) => Full::from(vec![b'x'; length]).boxed_unsync(),
            _ => {
                let (mut sender, body) = Channel::<Bytes, Infallible>::new(1);
                tokio::spawn(async move {
                    if matches!(self, Self::Endless) {
                        std::future::pending::<()>().await;
                    }
                    for _ in 0..10 {
                        sleep(2 * MILLISECOND).await;
                        if sender.send_data(vec![b'x'; LARGE / 10].into()).await.is_err() {
                            return;
                        }
                    }
                });
                body.boxed_unsync()
            }
        }
    }
}

/// Responds with the second token to `/token`, and otherwise with 401 unless the request has that token.
///
/// A request with the second token gets the length of its own body.
async fn respond(request: Request<Incoming>, refusal: Refusal) -> Result<Response<BoxBody>, Infallible> {
    if request.uri().path() == "/token" {
        sleep(200 * MILLISECOND).await;
        return Ok(Response::new(Full::from("access-2").boxed_unsync()));
    }
    if request.headers().get(AUTHORIZATION).is_some_and(|value| value == "Bearer access-2") {
        let length = request.into_body().collect().await.map_or(0, |body| body.to_bytes().len());
        return Ok(Response::new(Full::from(length.to_string()).boxed_unsync()));
    }
    Ok(Response::builder().status(StatusCode::UNAUTHORIZED).body(refusal.body()).unwrap())
}

/// Starts a server on loopback, of HTTP/2 with so many streams, or of HTTP/1.
async fn server(max_streams: Option<u32>, refusal: Refusal) -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let stream = TokioIo::new(listener.accept().await.unwrap().0);
            let service = hyper::service::service_fn(move |request| respond(request, refusal));
            match max_streams {
                Some(max_streams) => {
                    let mut builder = conn::http2::Builder::new(TokioExecutor::new());
                    builder.max_concurrent_streams(max_streams);
                    tokio::spawn(builder.serve_connection(stream, service));
                }
                None => {
                    tokio::spawn(conn::http1::Builder::new().serve_connection(stream, service));
                }
            }
        }
    });
    address
}

fn get(address: SocketAddr, path: &str) -> Request<Empty<Bytes>> {
    Request::get(format!("http://{address}{path}")).body(Empty::new()).unwrap()
}

/// Makes a client, with one connection if it speaks HTTP/2.
async fn client(address: SocketAddr, is_http2: bool) -> Client<HttpConnector, Empty<Bytes>> {
    if !is_http2 {
        return http1();
    }
    let client = http2();
    // The server's settings are known afterwards.
    client.request(get(address, "/token")).await.unwrap().into_body().collect().await.unwrap();
    client
}

/// A layer whose provider has `access-1`. Each refresh takes so long and returns `access-2`, or fails.
async fn layer(takes: Duration, is_up: bool) -> BearerAuthLayer {
    let fetches = AtomicU64::new(0);
    let scene = scene_of(source_fn(move |_| {
        let is_first = fetches.fetch_add(1, Ordering::SeqCst) == 0;
        async move {
            if is_first {
                return Ok(Token::builder("access-1").build()?);
            }
            sleep(takes).await;
            if !is_up {
                return Err(SourceError::rejected("the key was rejected"));
            }
            Ok(Token::builder("access-2").build()?)
        }
    }));
    scene.with_token().await.layer
}

/// Sends concurrent requests, and counts their statuses; `None` for those that hang.
async fn burst(
    address: SocketAddr,
    client: Client<HttpConnector, Empty<Bytes>>,
    layer: &BearerAuthLayer,
    requests: usize,
) -> BTreeMap<Option<StatusCode>, usize> {
    let service = layer.layer(client);
    let mut burst = JoinSet::new();
    for _ in 0..requests {
        burst.spawn(timeout(LIMIT, service.clone().oneshot(get(address, "/"))));
    }
    let mut statuses = BTreeMap::new();
    for result in burst.join_all().await {
        *statuses.entry(result.ok().map(|response| response.unwrap().status())).or_default() += 1;
    }
    statuses
}

/// Expects that a burst of requests, one for each stream, heals.
async fn heals(max_streams: Option<u32>, requests: usize, refusal: Refusal, refresh: Duration) {
    let address = server(max_streams, refusal).await;
    let client = client(address, max_streams.is_some()).await;
    let statuses = burst(address, client, &layer(refresh, true).await, requests).await;
    assert_eq!(statuses, BTreeMap::from([(Some(StatusCode::OK), requests)]), "{refusal:?}");
}

/// A retry over HTTP/1 does not wait for the body of its 401.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http1_retry_leaves_401_behind() {
    for refusal in [Refusal::Endless, Refusal::Whole(1024), Refusal::Whole(LARGE), Refusal::Streamed] {
        heals(None, 8, refusal, 200 * MILLISECOND).await;
    }
}

/// Over HTTP/2, small 401s fill a connection: their retries get streams.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn small_401s_hold_no_window() {
    heals(Some(100), 100, Refusal::Whole(1024), 200 * MILLISECOND).await;
}

/// A 401 that never ends has the only stream of an HTTP/2 connection, which its retry needs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endless_401_frees_only_stream() {
    heals(Some(1), 1, Refusal::Endless, Duration::ZERO).await;
}

/// 401s that never end have all streams of an HTTP/2 connection, which their retries need.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endless_401s_free_all_streams() {
    heals(Some(100), 100, Refusal::Endless, 200 * MILLISECOND).await;
}

/// The 401s arrive in one piece, and are together more than the window of the HTTP/2 connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_401s_hold_no_window() {
    heals(Some(100), 100, Refusal::Whole(LARGE), 200 * MILLISECOND).await;
}

/// The 401s share the window of the HTTP/2 connection evenly, so that none of them has arrived whole.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streamed_401s_hold_no_window() {
    heals(Some(100), 100, Refusal::Streamed, 1000 * MILLISECOND).await;
}

/// A 401 comes while an upload has the only stream of an HTTP/2 connection, which its retry needs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn early_401_frees_stream_of_upload() {
    for refusal in [Refusal::Whole(2), Refusal::Endless] {
        let address = server(Some(1), refusal).await;
        let layer = layer(100 * MILLISECOND, true).await.buffered(1024 * 1024);
        let (mut sender, body) = Channel::<Bytes, Infallible>::new(4);
        tokio::spawn(async move {
            for _ in 0..50 {
                sleep(10 * MILLISECOND).await;
                if sender.send_data(vec![b'x'; 1000].into()).await.is_err() {
                    return;
                }
            }
        });
        let request = Request::post(format!("http://{address}/")).body(body).unwrap();
        let response = timeout(LIMIT, layer.layer(http2()).oneshot(request)).await;
        let response = response.unwrap_or_else(|_| panic!("{refusal:?}: hangs")).unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "50000");
    }
}

/// A layer whose provider has `access-1`, and gets the next token by this request on the connection of the API.
async fn layer_on<B>(
    client: &Client<HttpConnector, B>,
    token: impl Fn() -> Request<B> + Clone + Send + Sync + 'static,
) -> BearerAuthLayer
where
    B: Body<Data: Send, Error: Into<BoxError>> + Send + Unpin + 'static,
{
    let (for_token, fetches) = (client.clone(), AtomicU64::new(0));
    let source = source_fn(move |_| {
        let is_first = fetches.fetch_add(1, Ordering::SeqCst) == 0;
        let (client, token) = (for_token.clone(), token.clone());
        async move {
            if is_first {
                return Ok(Token::builder("access-1").build()?);
            }
            let response = client.request(token()).await;
            let response = response.map_err(|_| SourceError::unavailable("no response"))?;
            let body = response.into_body().collect().await;
            let body = body.map_err(|_| SourceError::unavailable("no body"))?.to_bytes();
            Ok(Token::builder(String::from_utf8_lossy(&body)).build()?)
        }
    });
    scene_of(source).provider(|builder| builder.refresh_timeout(LIMIT / 2)).with_token().await.layer
}

/// Sends concurrent requests on the connection that the token endpoint uses too, and expects that they heal.
async fn heals_on_connection_of_endpoint(max_streams: u32, requests: usize, refusal: Refusal) {
    let address = server(Some(max_streams), refusal).await;
    let client = client(address, true).await;
    let layer = layer_on(&client, move || get(address, "/token")).await;
    let statuses = burst(address, client, &layer, requests).await;
    assert_eq!(statuses, BTreeMap::from([(Some(StatusCode::OK), requests)]), "{refusal:?}");
    assert_eq!(layer.provider().status().failed_refreshes, 0, "{refusal:?}");
}

/// Unread small 401s leave room on the connection on which the token has to come.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn small_401s_leave_room_for_token() {
    heals_on_connection_of_endpoint(1000, 60, Refusal::Whole(1024)).await;
}

/// Unread 401s use up the window of the connection on which the token has to come.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_401s_leave_room_for_token() {
    heals_on_connection_of_endpoint(1000, 60, Refusal::Whole(LARGE)).await;
}

/// An unread 401 has the only stream of the connection on which the token has to come.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endless_401_leaves_stream_for_token() {
    heals_on_connection_of_endpoint(1, 1, Refusal::Endless).await;
}

/// A refresh fails after a small 401, which was kept until then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn small_401_survives_failed_refresh() {
    let cases = [(None, 0), (None, 1024), (Some(1), 0), (Some(1), 1024), (Some(1), 64 * 1024)];
    let expect = |(max_streams, length): (Option<u32>, usize)| async move {
        let address = server(max_streams, Refusal::Whole(length)).await;
        let client = client(address, max_streams.is_some()).await;
        let service = layer(1500 * MILLISECOND, false).await.layer(client);
        let response = timeout(LIMIT, service.oneshot(get(address, "/"))).await.expect("hangs").unwrap();
        assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
        let body = timeout(LIMIT, response.into_body().collect()).await.expect("hangs").unwrap();
        assert_eq!(body.to_bytes().len(), length);
    };
    join_all(cases.map(expect)).await;
}

/// A refresh fails after a 401 that may be large, which is not kept while a refresh takes long: the caller gets an
/// error.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_401_becomes_typed_error() {
    let cases = [
        (None, Refusal::Endless),
        (None, Refusal::Whole(LARGE)),
        (Some(1), Refusal::Endless),
        (Some(1), Refusal::Whole(LARGE)),
        (Some(1), Refusal::Streamed),
    ];
    let expect = |(max_streams, refusal): (Option<u32>, Refusal)| async move {
        let address = server(max_streams, refusal).await;
        let client = client(address, max_streams.is_some()).await;
        let service = layer(3000 * MILLISECOND, false).await.layer(client);
        let result = timeout(LIMIT, service.oneshot(get(address, "/"))).await.expect("hangs");
        let result = result.map(|response| response.status());
        // Panics if it is the inner service's error.
        ours(&result.expect_err("the 401 was kept"));
    };
    join_all(cases.map(expect)).await;
}

/// A large 401 that no refresh follows is passed on whole.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_401_is_returned_without_replay() {
    for max_streams in [None, Some(1)] {
        let address = server(max_streams, Refusal::Whole(LARGE)).await;
        let client = client(address, max_streams.is_some()).await;
        let service = layer(1500 * MILLISECOND, true).await.no_replay().layer(client);
        let response = timeout(LIMIT, service.oneshot(get(address, "/"))).await.expect("hangs").unwrap();
        assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
        let body = timeout(LIMIT, response.into_body().collect()).await.expect("hangs").unwrap();
        assert_eq!(body.to_bytes().len(), LARGE);
    }
}

/// A body that holds a permit until it is dropped.
struct Permitted(Full<Bytes>, #[allow(dead_code)] OwnedSemaphorePermit);

impl Body for Permitted {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Pin::new(&mut self.0).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.0.size_hint()
    }
}

/// Waits for a permit and responds with 401 unless the token is `access-2`. The response has the permit.
async fn with_permit(
    permits: Arc<Semaphore>,
    request: Request<Empty<Bytes>>,
    version: Version,
    refusal: &'static str,
) -> Result<Response<Permitted>, BoxError> {
    let permit = permits.acquire_owned().await?;
    let is_accepted = request.headers().get(AUTHORIZATION).is_some_and(|value| value == "Bearer access-2");
    let (status, body) = if is_accepted { (200, "") } else { (401, refusal) };
    Ok(Response::builder().status(status).version(version).body(Permitted(Full::from(body), permit))?)
}

/// The versions and the bodies of a 401.
fn refusals() -> impl Iterator<Item = (Version, &'static str)> {
    [Version::HTTP_11, Version::HTTP_2].into_iter().flat_map(|version| [(version, ""), (version, "no")])
}

/// The inner service ties a permit to the body of each response, and the retry needs the only one.
#[tokio::test(start_paused = true)]
async fn retry_gets_permit_of_its_401() {
    for (version, refusal) in refusals() {
        let permits = Arc::new(Semaphore::new(1));
        let service = service_fn(move |request| with_permit(Arc::clone(&permits), request, version, refusal));
        let service = layer(MILLISECOND, true).await.layer(service);
        let response = timeout(LIMIT, service.oneshot(support::get())).await;
        let response = response.unwrap_or_else(|_| panic!("{version:?}, {refusal:?}: hangs"));
        assert_eq!(response.unwrap().status(), StatusCode::OK);
    }
}

/// Many 401s are small each, but together take the window of the connection on which the token has to come.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_small_401s_leave_room_for_token() {
    heals_on_connection_of_endpoint(1000, 100, Refusal::Whole(64 * 1024)).await;
}

/// Many small 401s, whose requests have a service each from one layer, take the window of the connection on which the
/// token has to come.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn small_401s_of_many_services_leave_room_for_token() {
    let address = server(Some(1000), Refusal::Whole(64 * 1024)).await;
    let client = client(address, true).await;
    let layer = layer_on(&client, move || get(address, "/token")).await;
    let all = (0..100).map(|_| layer.layer(client.clone()).oneshot(get(address, "/")));
    let all = timeout(LIMIT, join_all(all)).await.expect("hangs");
    assert!(
        all.iter()
            .all(|response| response.as_ref().is_ok_and(|response| response.status() == StatusCode::OK))
    );
    assert_eq!(layer.provider().status().failed_refreshes, 0);
}

/// As `respond`, but reads the request's body in the background, as a server does that lingers.
async fn respond_early(request: Request<Incoming>) -> Result<Response<BoxBody>, Infallible> {
    if request.uri().path() == "/token" {
        return Ok(Response::new(Full::from("access-2").boxed_unsync()));
    }
    if request.headers().get(AUTHORIZATION).is_some_and(|value| value == "Bearer access-2") {
        let length = request.into_body().collect().await.map_or(0, |body| body.to_bytes().len());
        return Ok(Response::new(Full::from(length.to_string()).boxed_unsync()));
    }
    tokio::spawn(request.into_body().collect());
    Ok(Response::builder().status(StatusCode::UNAUTHORIZED).body(Full::default().boxed_unsync()).unwrap())
}

/// An upload, whose early 401 is empty, has the only stream of the connection on which the token has to come.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn challenged_upload_leaves_stream_for_token() {
    type Upload = ReplayBody<BoxBody>;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let stream = TokioIo::new(listener.accept().await.unwrap().0);
            let mut builder = conn::http2::Builder::new(TokioExecutor::new());
            builder.max_concurrent_streams(1);
            tokio::spawn(builder.serve_connection(stream, hyper::service::service_fn(respond_early)));
        }
    });
    let client: Client<HttpConnector, UnsyncBoxBody<Bytes, BoxError>> = http2();
    let empty = || Empty::<Bytes>::new().map_err(|never| match never {}).boxed_unsync();
    let token = move || Request::get(format!("http://{address}/token")).body(empty()).unwrap();
    client.request(token()).await.unwrap().into_body().collect().await.unwrap();
    let service =
        layer_on(&client, token).await.replay_with(1 << 20, |body: Upload| body.boxed_unsync()).layer(client);
    // An upload that ends after a second.
    let (mut sender, body) = Channel::<Bytes, Infallible>::new(4);
    tokio::spawn(async move {
        for _ in 0..100 {
            sleep(10 * MILLISECOND).await;
            if sender.send_data(vec![b'x'; 1000].into()).await.is_err() {
                return;
            }
        }
    });
    let request = Request::post(format!("http://{address}/")).body(body.boxed_unsync()).unwrap();
    let response = timeout(2 * LIMIT, service.oneshot(request)).await.expect("hangs").unwrap();
    assert_eq!(response.status(), StatusCode::OK);
}
