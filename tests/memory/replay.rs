//! `buffered` keeps its memory within the limit, whatever the body's frames are.

#[allow(dead_code)]
#[path = "../../examples/axum_gateway.rs"]
#[allow(unreachable_pub)]
mod axum_gateway;

use std::{
    convert::Infallible,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
};

use axum::{Router, body::Body as AxumBody, extract::Request as AxumRequest};
use bytes::{Buf, Bytes};
use http::{HeaderMap, Request, Response, StatusCode, header::AUTHORIZATION};
use http_body::{Body, Frame};
use http_body_util::{BodyExt, Empty};
use ring::digest::{Context as Digest, SHA256};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tower::{Layer, ServiceExt, service_fn};

use crate::{alone, growth, support::scene};

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

/// The memory of a request, one frame in transit and the runtime, in addition to the recorded body.
const OVERHEAD: usize = 256 * KIB;

/// The memory of the four ends of two connections, all of which are in this process.
const CONNECTIONS: usize = 4 * MIB;

/// A body of `count` frames, each created when it is read.
struct Frames<F> {
    next: u64,
    count: u64,
    frame: F,
}

impl<F, D> Body for Frames<F>
where
    F: FnMut(u64) -> Frame<D> + Unpin,
    D: Buf,
{
    type Data = D;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<D>, Infallible>>> {
        let at = self.next;
        self.next += 1;
        Poll::Ready((at < self.count).then(|| Ok((self.frame)(at))))
    }
}

/// The data that arrived with one attempt.
#[derive(Debug, PartialEq)]
struct Arrived {
    bytes: u64,
    sha256: Vec<u8>,
    trailers: Option<HeaderMap>,
}

async fn read<B>(body: B) -> Arrived
where
    B: Body<Data = Bytes, Error: std::fmt::Debug>,
{
    let mut body = std::pin::pin!(body);
    let (mut bytes, mut digest, mut trailers) = (0, Digest::new(&SHA256), None);
    while let Some(frame) = body.frame().await {
        match frame.unwrap().into_data() {
            Ok(data) => {
                bytes += data.len() as u64;
                digest.update(&data);
            }
            Err(frame) => trailers = frame.into_trailers().ok(),
        }
    }
    Arrived { bytes, sha256: digest.finish().as_ref().to_vec(), trailers }
}

/// Sends `count` frames to a service that reads all of them and then responds with 401 to the first token. Returns the
/// final status and the data that arrived.
///
/// # Panics
///
/// If memory grows by more than the limit, 1 % of it and a constant.
async fn send<F, D>(limit: usize, count: u64, frame: F) -> (StatusCode, Vec<Arrived>)
where
    F: FnMut(u64) -> Frame<D> + Unpin + Send + 'static,
    D: Buf + Send + 'static,
{
    let _alone = alone().await;
    let arrived: Arc<Mutex<Vec<Arrived>>> = Arc::default();
    let service = service_fn(|request: Request<tower_bearer::replay::ReplayBody<Frames<F>>>| {
        let arrived = Arc::clone(&arrived);
        async move {
            let (head, body) = request.into_parts();
            let read = read(body).await;
            arrived.lock().unwrap().push(read);
            let status = if head.headers[AUTHORIZATION] == "Bearer access-1" { 401 } else { 200 };
            Ok::<_, Infallible>(Response::builder().status(status).body(Empty::<Bytes>::new()).unwrap())
        }
    });
    let layer = scene().with_token().await.layer;
    let request = Request::post("https://api.example/").body(Frames { next: 0, count, frame }).unwrap();
    let (grown, response) = growth(layer.buffered(limit).layer(service).oneshot(request)).await;
    let most = limit + limit / 100 + OVERHEAD;
    assert!(grown <= most, "memory has grown by {grown} bytes, with a limit of {limit}");
    (response.unwrap().status(), std::mem::take(&mut *arrived.lock().unwrap()))
}

/// As [`send`], and checks that the retry has sent the same `bytes`.
async fn is_sent_again<F, D>(limit: usize, count: u64, bytes: usize, frame: F)
where
    F: FnMut(u64) -> Frame<D> + Unpin + Send + 'static,
    D: Buf + Send + 'static,
{
    let (status, arrived) = send(limit, count, frame).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(arrived.len(), 2);
    assert_eq!(arrived[0].bytes, bytes as u64);
    assert_eq!(arrived[0], arrived[1]);
}

fn byte(at: u64) -> Bytes {
    Bytes::copy_from_slice(&[at as u8])
}

/// A body has millions of empty frames.
#[tokio::test(start_paused = true)]
async fn empty_frames_cost_nothing() {
    is_sent_again(KIB, 1 << 19, 0, |_| Frame::data(Bytes::new())).await;
}

/// A body has frames of one byte, each with its own allocation.
#[tokio::test(start_paused = true)]
async fn one_byte_frames_cost_their_bytes() {
    is_sent_again(MIB, 1 << 20, MIB, |at| Frame::data(byte(at))).await;
}

/// A body has small slices of large buffers.
#[tokio::test(start_paused = true)]
async fn small_slice_frees_its_buffer() {
    for slice in [1, 4 * KIB, 60 * KIB] {
        is_sent_again(1000 * slice, 1000, 1000 * slice, move |at| {
            Frame::data(Bytes::from(vec![at as u8; 128 * KIB]).slice(KIB..KIB + slice))
        })
        .await;
    }
}

/// A body has frames whose data are not contiguous.
#[tokio::test(start_paused = true)]
async fn non_contiguous_data_costs_its_bytes() {
    is_sent_again(MIB / 2, 1 << 18, MIB / 2, |at| Frame::data(byte(at).chain(byte(at + 1)))).await;
    let half = 40 * KIB;
    is_sent_again(8 * MIB, 100, 200 * half, move |at| {
        let part = |at| Bytes::from(vec![at as u8; half]);
        Frame::data(part(at).chain(part(at + 1)))
    })
    .await;
}

/// A body has small and large frames.
#[tokio::test(start_paused = true)]
async fn mixed_frame_sizes_cost_their_bytes() {
    for larger in [4 * KIB, 64 * KIB, 512 * KIB] {
        let pairs = 8 * MIB / larger;
        let bytes = pairs * (larger + 1);
        is_sent_again(bytes, 2 * pairs as u64, bytes, move |at| {
            Frame::data(if at % 2 == 0 { byte(at) } else { vec![at as u8; larger].into() })
        })
        .await;
    }
}

/// A body repeats its trailers without an end. Trailers end a body, so frames after them are not recorded.
#[tokio::test(start_paused = true)]
async fn repeated_trailers_hit_limit() {
    for length in [0, 1, 100] {
        let mut trailers = HeaderMap::new();
        trailers.extend(
            (length > 0)
                .then(|| (http::HeaderName::from_static("x-checksum"), "x".repeat(length).parse().unwrap())),
        );
        let (status, arrived) =
            send(16 * KIB, 1 << 15, move |_| Frame::<Bytes>::trailers(trailers.clone())).await;
        assert_eq!((status, arrived.len()), (StatusCode::UNAUTHORIZED, 1));
    }
}

/// The trailers of a body are large.
#[tokio::test(start_paused = true)]
async fn trailers_cost_their_bytes() {
    let mut trailers = HeaderMap::new();
    for at in 0..100 {
        trailers.append("x", at.to_string().parse().unwrap());
    }
    let (status, arrived) = send(16 * KIB, 2, move |at| match at {
        0 => Frame::data(byte(at)),
        _ => Frame::trailers(trailers.clone()),
    })
    .await;
    assert_eq!((status, arrived.len()), (StatusCode::OK, 2));
    assert_eq!(arrived[0], arrived[1]);
}

/// Sends a chunked body of `parts` times `part` through the example's gateway to an API that responds with 401 to the
/// first token. Returns the growth of memory, and the bytes that arrived with each attempt.
async fn through_the_gateway(parts: usize, part: Vec<u8>) -> (usize, Vec<u64>) {
    let listen = async |router: Router| {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        (address, tokio::spawn(async move { axum::serve(listener, router).await }))
    };
    let arrived: Arc<Mutex<Vec<u64>>> = Arc::default();
    let api = Router::new().fallback({
        let arrived = Arc::clone(&arrived);
        async move |request: AxumRequest<AxumBody>| {
            let (head, mut body) = request.into_parts();
            let mut bytes = 0;
            while let Some(frame) = body.frame().await {
                bytes += frame.unwrap().data_ref().unwrap().len() as u64;
            }
            arrived.lock().unwrap().push(bytes);
            if head.headers[AUTHORIZATION] == "Bearer access-1" {
                StatusCode::UNAUTHORIZED
            } else {
                StatusCode::OK
            }
        }
    });
    let (api, serving_api) = listen(api).await;
    let provider = scene().with_token().await.provider;
    let api = format!("http://{api}/").parse().unwrap();
    let (gateway, serving_gateway) = listen(axum_gateway::gateway(provider, api)).await;

    let (grown, answer) = growth(async {
        let mut stream = TcpStream::connect(gateway).await.unwrap();
        stream
            .write_all(
                b"POST /videos HTTP/1.1\r\nhost: a\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n",
            )
            .await
            .unwrap();
        for _ in 0..parts {
            stream.write_all(&part).await.unwrap();
        }
        stream.write_all(b"0\r\n\r\n").await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        answer
    })
    .await;
    serving_api.abort();
    serving_gateway.abort();
    assert!(answer.starts_with(b"HTTP/1.1 200 OK\r\n"), "{}", answer.escape_ascii());
    (grown, std::mem::take(&mut *arrived.lock().unwrap()))
}

/// A client of a gateway sends chunks of one byte.
#[tokio::test]
async fn gateway_keeps_only_chunk_bytes() {
    let _alone = alone().await;
    let chunks = 1 << 17;
    let (grown, arrived) = through_the_gateway(chunks / 1024, b"1\r\nx\r\n".repeat(1024)).await;
    assert!(grown < chunks + CONNECTIONS, "memory has grown by {grown} bytes for {chunks}");
    assert_eq!(arrived, [chunks as u64; 2]);
}

/// A client of a gateway sends chunks with long framing: nearly all of a connection's buffer is the zeros before the
/// length of a chunk.
#[tokio::test]
async fn gateway_keeps_no_chunk_framing() {
    let _alone = alone().await;
    for chunk in [4 * KIB, 64 * KIB] {
        let length = format!("{}{chunk:x}\r\n", "0".repeat(350 * KIB));
        let part = [length.as_bytes(), &b"x".repeat(chunk), b"\r\n"].concat();
        let parts = 24;
        let (grown, arrived) = through_the_gateway(parts, part).await;
        let bytes = parts * chunk;
        assert!(grown < bytes + CONNECTIONS, "memory has grown by {grown} bytes for {bytes}");
        assert_eq!(arrived, [bytes as u64; 2]);
    }
}
