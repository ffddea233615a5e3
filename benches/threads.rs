//! Measures how many requests two threads with one provider send in the time in which one thread sends one.
//!
//! ```text
//! cargo bench --bench threads              # about a minute
//! cargo bench --bench threads -- --brief   # a second
//! ```
//!
//! The stacks take turns, over the same service: one that responds at once, and hyper-util's client, whose connections
//! lead to a server on the same thread. So two threads share nothing beneath the layer. The bare service shows what the
//! machine allows. The threads have a service each, or clones of one service.

use std::{
    convert::Infallible,
    io,
    pin::{Pin, pin},
    task::{Context, Poll, Waker},
    thread,
    time::Instant,
};

use bytes::Bytes;
use http::{HeaderName, Request, Response, Uri};
use http_body_util::{BodyExt, Empty};
use hyper::{
    body::Incoming,
    rt::{Read, ReadBufCursor, Write},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::{
    client::legacy::{
        Client, ResponseFuture,
        connect::{Connected, Connection},
    },
    rt::{TokioExecutor, TokioIo},
};
use tokio::{io::DuplexStream, runtime::Builder};
use tower::{Layer, Service, ServiceExt, retry};
use tower_bearer::{BearerAuthLayer, TokenProvider};
use tower_http::auth::AddAuthorizationLayer;

#[path = "support/mod.rs"]
mod support;

use support::{Api, Hourly, On401, TOKEN};

type Body = Empty<Bytes>;

/// A request with five headers.
fn request() -> Request<Body> {
    let mut request = Request::new(Empty::new());
    for name in ["accept", "content-type", "user-agent", "traceparent", "x-request-id"] {
        request.headers_mut().insert(HeaderName::from_static(name), "the value of a header".parse().unwrap());
    }
    request
}

fn send<S: Service<Request<Body>, Response = Response<Body>>>(mut service: S, requests: usize) {
    let mut cx = Context::from_waker(Waker::noop());
    for _ in 0..requests {
        assert!(service.poll_ready(&mut cx).is_ready());
        let response = pin!(service.call(request()));
        let Poll::Ready(Ok(_)) = response.poll(&mut cx) else { panic!("no response") };
    }
}

/// A connection to a server on the same thread.
struct Pipe(TokioIo<DuplexStream>);

impl Connection for Pipe {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

impl Read for Pipe {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl Write for Pipe {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buffer)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

#[derive(Clone)]
struct Connect;

impl Service<Uri> for Connect {
    type Response = Pipe;
    type Error = Infallible;
    type Future = std::future::Ready<Result<Pipe, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let (client, server) = tokio::io::duplex(64 * 1024);
        tokio::spawn(async move {
            let respond = service_fn(async |_| Ok::<_, Infallible>(Response::new(Body::new())));
            let _ = http1::Builder::new().serve_connection(TokioIo::new(server), respond).await;
        });
        std::future::ready(Ok(Pipe(TokioIo::new(client))))
    }
}

thread_local! {
    static CLIENT: Client<Connect, Body> = Client::builder(TokioExecutor::new()).build(Connect);
}

/// hyper-util's client, one for each thread.
#[derive(Clone)]
struct Hyper;

impl Service<Request<Body>> for Hyper {
    type Response = Response<Incoming>;
    type Error = hyper_util::client::legacy::Error;
    type Future = ResponseFuture;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> ResponseFuture {
        CLIENT.with(|client| client.request(request))
    }
}

fn send_by_hyper<S>(mut service: S, requests: usize)
where
    S: Service<Request<Body>, Response = Response<Incoming>, Error: std::fmt::Debug>,
{
    Builder::new_current_thread().enable_time().build().unwrap().block_on(async {
        for _ in 0..requests {
            let mut request = request();
            *request.uri_mut() = Uri::from_static("http://127.0.0.1/videos");
            let response = service.ready().await.unwrap().call(request).await.unwrap();
            response.into_body().collect().await.unwrap();
        }
    });
}

/// Returns how long so many threads take to `send`, each with a service that `service` makes.
fn took<S: Send>(threads: usize, service: impl Fn() -> S, send: impl Fn(S) + Sync) -> f64 {
    let begun = Instant::now();
    thread::scope(|scope| {
        for _ in 0..threads {
            let (service, send) = (service(), &send);
            scope.spawn(move || send(service));
        }
    });
    begun.elapsed().as_secs_f64()
}

/// The requests of two threads over those of one: with a service each, and with clones of one service.
fn ratios<S: Clone + Send>(layer: impl Fn() -> S, send: impl Fn(S) + Sync) -> [f64; 2] {
    let one = took(1, &layer, &send);
    let service = layer();
    [2.0 * one / took(2, &layer, &send), 2.0 * one / took(2, || service.clone(), &send)]
}

/// Adds the ratios of each stack over `$api`.
macro_rules! round {
    ($columns:expr, $api:expr, $send:expr, $layer:expr) => {
        let add = || AddAuthorizationLayer::bearer(TOKEN).as_sensitive(true);
        let retry = || retry::RetryLayer::new(On401(2));
        $columns[0].push(ratios(|| $api, $send));
        $columns[1].push(ratios(|| add().layer($api), $send));
        $columns[2].push(ratios(|| $layer.clone().no_replay().layer($api), $send));
        $columns[3].push(ratios(|| $layer.layer($api), $send));
        $columns[4].push(ratios(|| retry().layer(add().layer($api)), $send));
    };
}

const STACKS: [&str; 5] =
    ["bare", "AddAuthorization", "BearerAuth, no replay", "BearerAuth", "Retry + AddAuthorization"];

fn median(ratios: &[[f64; 2]], at: usize) -> f64 {
    let mut ratios: Vec<f64> = ratios.iter().map(|ratios| ratios[at]).collect();
    ratios.sort_by(f64::total_cmp);
    ratios[ratios.len() / 2]
}

fn main() {
    let brief = std::env::args().any(|argument| argument == "--brief");
    let (rounds, requests) = if brief { (3, 2_000) } else { (51, 100_000) };
    let provider = TokenProvider::new(Hourly);
    let runtime = Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(provider.token()).unwrap();

    let layer = BearerAuthLayer::with_provider(provider);
    let (mut at_once, mut by_hyper) = <([Vec<_>; 5], [Vec<_>; 5])>::default();
    for _ in 0..rounds {
        round!(at_once, Api, |service| send(service, requests), layer);
        // A request takes some twenty times as long.
        round!(by_hyper, Hyper, |service| send_by_hyper(service, requests / 20), layer);
    }
    println!("requests of two threads over those of one, medians of {rounds} rounds");
    println!(
        "{:<28}{:>20}{:>24}{:>20}{:>24}",
        "", "a service for each", "clones of one service", "hyper, each", "hyper, clones"
    );
    for (at, name) in STACKS.iter().enumerate() {
        let columns = [&at_once, &by_hyper].map(|columns| [0, 1].map(|column| median(&columns[at], column)));
        let [[own, clones], [hyper_own, hyper_clones]] = columns;
        println!("{name:<28}{own:>20.2}{clones:>24.2}{hyper_own:>20.2}{hyper_clones:>24.2}");
    }
}
