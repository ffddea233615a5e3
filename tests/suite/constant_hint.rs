//! A retry has the Content-Length of the first attempt, even if the size hint of its body does not shrink.

use std::{
    convert::Infallible,
    net::{Ipv4Addr, SocketAddr},
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{
    Request, Response, StatusCode,
    header::{AUTHORIZATION, CONTENT_LENGTH},
};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{
    net::TcpListener,
    sync::{Notify, mpsc},
    time::timeout,
};
use tower::{Layer, ServiceExt};
use tower_bearer::BoxError;

use crate::support::{self, chain, scene};

const FRAME: &[u8] = b"0123456789";
const LENGTH: u64 = 2 * FRAME.len() as u64;

/// A body of two frames, whose size hint is always [`LENGTH`].
struct Constant(mpsc::Receiver<Bytes>);

impl Body for Constant {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(cx).map(|data| data.map(|data| Ok(Frame::data(data))))
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(LENGTH)
    }
}

/// What the server has seen.
#[derive(Default)]
struct Seen {
    /// The Content-Length of each request.
    lengths: Mutex<Vec<String>>,
    /// Notified when the retry arrives.
    retried: Notify,
}

/// Responds with 401 to the first token, after the whole body or its first frame. Otherwise responds with the length
/// of the body.
async fn respond(
    request: Request<Incoming>,
    seen: Arc<Seen>,
    is_early: bool,
) -> Result<Response<Full<Bytes>>, BoxError> {
    let length = request.headers().get(CONTENT_LENGTH).and_then(|length| length.to_str().ok());
    seen.lengths.lock().unwrap().push(length.unwrap_or("none").to_owned());
    let is_first = request.headers()[AUTHORIZATION] == "Bearer access-1";
    let mut body = request.into_body();
    if is_first && is_early {
        body.frame().await.transpose()?;
        return Ok(Response::builder().status(401).body(Full::default())?);
    }
    if !is_first {
        seen.retried.notify_one();
    }
    let length = body.collect().await?.to_bytes().len();
    let status = if is_first { 401 } else { 200 };
    Ok(Response::builder().status(status).body(Full::from(length.to_string()))?)
}

async fn server(seen: Arc<Seen>, is_early: bool) -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let stream = TokioIo::new(listener.accept().await.unwrap().0);
            let seen = Arc::clone(&seen);
            let service = service_fn(move |request| respond(request, Arc::clone(&seen), is_early));
            tokio::spawn(http1::Builder::new().serve_connection(stream, service));
        }
    });
    address
}

/// Uploads the two frames, and expects that the retry is the same request.
async fn upload(is_early: bool) {
    let seen = Arc::<Seen>::default();
    let address = server(Arc::clone(&seen), is_early).await;
    let service = scene().with_token().await.layer.buffered(1024).layer(support::http1());
    let (sender, body) = mpsc::channel(2);
    tokio::spawn({
        let seen = Arc::clone(&seen);
        async move {
            sender.send(Bytes::from_static(FRAME)).await.unwrap();
            if is_early {
                seen.retried.notified().await;
            }
            // Fails if the request has failed.
            let _ = sender.send(Bytes::from_static(FRAME)).await;
        }
    });
    let request = Request::put(format!("http://{address}/")).body(Constant(body)).unwrap();
    let response = timeout(Duration::from_secs(10), service.oneshot(request)).await.expect("hangs");
    let response = response.map_err(|error| chain(&*error));
    let lengths = seen.lengths.lock().unwrap().clone();
    assert_eq!(lengths, [LENGTH.to_string(), LENGTH.to_string()], "{response:?}");
    let response = response.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), LENGTH.to_string());
}

/// The size hint of a body stays constant while it is read, and the 401 comes after the whole body.
#[tokio::test]
async fn retry_of_read_body_has_its_length() {
    upload(false).await;
}

/// The size hint of a body stays constant while it is read, and the 401 comes after the first frame. The retry reads
/// the second one.
#[tokio::test]
async fn retry_of_begun_body_has_its_length() {
    upload(true).await;
}
