//! Measures requests over loopback: throughput and p99 of hyper-util's client, bare and with layers, and the connections
//! that it opens while the API challenges all requests.
//!
//! ```text
//! cargo bench --bench wire              # 201 rounds, about two minutes
//! cargo bench --bench wire -- --brief   # 3 rounds
//! ```
//!
//! The server has a thread of its own, and responds at once. The client has another, with 16 requests under way. The
//! stacks take turns within each round, in a random order, since what ran before affects what runs next. A figure is the
//! median over the rounds, and a ratio the median of the ratios within a round, so that a disturbance of the machine
//! affects one round only.

use std::{cell::RefCell, net::SocketAddr, rc::Rc, sync::mpsc, time::Instant};

use bytes::Bytes;
use futures_util::future::join_all;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use tokio::{net::TcpListener, task::JoinSet};
use tower::{
    BoxError, Layer, Service, ServiceBuilder, ServiceExt, retry,
    util::{
        BoxCloneService,
        rng::{HasherRng, Rng},
    },
};
use tower_bearer::{ApiVideo, BearerAuthLayer, TokenProvider};
use tower_bearer_testing::AuthServer;
use tower_http::auth::AddAuthorizationLayer;

#[path = "support/mod.rs"]
mod support;

use support::{Hourly, On401, TOKEN};

/// How many requests are under way at once.
const CALLERS: usize = 16;
/// How many requests a stack sends in one round.
const REQUESTS: usize = 1_600;

type Body = Full<Bytes>;
type HttpClient = Client<HttpConnector, Body>;
type Stack = BoxCloneService<Request<Body>, Response<Incoming>, BoxError>;

/// Serves with a thread of its own, until the program ends.
fn serve() -> SocketAddr {
    let (sender, address) = mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            sender.send(listener.local_addr().unwrap()).unwrap();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                stream.set_nodelay(true).unwrap();
                let respond = service_fn(|request: Request<Incoming>| async {
                    request.into_body().collect().await?;
                    Ok::<_, hyper::Error>(Response::new(Body::from("{\"data\":[]}")))
                });
                tokio::spawn(async move {
                    let _ = auto::Builder::new(TokioExecutor::new())
                        .serve_connection(TokioIo::new(stream), respond)
                        .await;
                });
            }
        })
    });
    address.recv().unwrap()
}

fn client(http2: bool) -> HttpClient {
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    Client::builder(TokioExecutor::new()).http2_only(http2).build(connector)
}

fn boxed<S>(service: S) -> Stack
where
    S: Service<Request<Body>, Response = Response<Incoming>, Error: Into<BoxError>, Future: Send>
        + Clone
        + Send
        + 'static,
{
    ServiceBuilder::new().boxed_clone().map_err(Into::into).service(service)
}

/// The stacks, with one client, so that they differ in their layers only. The first one is bare; the others are compared
/// to the second.
fn stacks(http2: bool) -> [(&'static str, Stack); 5] {
    let client = client(http2);
    let layer = BearerAuthLayer::with_provider(TokenProvider::new(Hourly));
    let add = AddAuthorizationLayer::bearer(TOKEN).as_sensitive(true);
    let retry = retry::RetryLayer::new(On401(2));
    [
        ("bare", boxed(client.clone())),
        ("AddAuthorization", boxed(add.layer(client.clone()))),
        ("Retry + AddAuthorization", boxed(retry.layer(add.layer(client.clone())))),
        ("BearerAuth, no replay", boxed(layer.clone().no_replay().layer(client.clone()))),
        ("BearerAuth", boxed(layer.layer(client.clone()))),
    ]
}

/// A request as an SDK sends it.
fn request(server: SocketAddr) -> Request<Body> {
    Request::post(format!("http://{server}/videos"))
        .header("accept", "application/json")
        .header("content-type", "application/json")
        .header("user-agent", "an-sdk/1.2.3 (linux; x86_64)")
        .header("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
        .header("x-request-id", "0af76519-16cd-43dd-8448-eb211c80319c")
        .body(Body::from("{\"title\":\"A video\"}"))
        .unwrap()
}

async fn send(stack: &mut Stack, request: Request<Body>) {
    let response = stack.ready().await.unwrap().call(request).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    response.into_body().collect().await.unwrap();
}

/// What one stack did in one round.
#[derive(Clone, Copy)]
struct Sample {
    per_second: f64,
    p99: f64,
}

async fn round(stack: &Stack, server: SocketAddr) -> Sample {
    let took = Rc::new(RefCell::new(Vec::with_capacity(REQUESTS)));
    let begun = Instant::now();
    join_all((0..CALLERS).map(|_| {
        let (mut stack, took) = (stack.clone(), Rc::clone(&took));
        async move {
            for _ in 0..REQUESTS / CALLERS {
                let begun = Instant::now();
                send(&mut stack, request(server)).await;
                took.borrow_mut().push(begun.elapsed().as_secs_f64());
            }
        }
    }))
    .await;
    let per_second = REQUESTS as f64 / begun.elapsed().as_secs_f64();
    let mut took = took.borrow_mut();
    took.sort_by(f64::total_cmp);
    Sample { per_second, p99: took[took.len() * 99 / 100] * 1e6 }
}

/// Returns the lower quartile, the median and the upper quartile.
fn quartiles(values: impl Iterator<Item = f64>) -> [f64; 3] {
    let mut values: Vec<_> = values.collect();
    values.sort_by(f64::total_cmp);
    [1, 2, 3].map(|quarter| values[(values.len() - 1) * quarter / 4])
}

async fn throughput(http2: bool, rounds: usize) {
    let server = serve();
    let stacks = stacks(http2);
    let mut samples = vec![Vec::new(); stacks.len()];
    let mut rng = HasherRng::new();
    // The first round opens the connections.
    for number in 0..=rounds {
        let mut order: Vec<_> = (0..stacks.len()).collect();
        order.sort_by_cached_key(|_| rng.next_u64());
        for at in order {
            let sample = round(&stacks[at].1, server).await;
            if number > 0 {
                samples[at].push(sample);
            }
        }
    }
    println!("\n{}, {rounds} rounds of {REQUESTS} requests", if http2 { "HTTP/2" } else { "HTTP/1.1" });
    println!(
        "{:<26}{:>12}{:>10}{:>40}{:>8}",
        "", "requests/s", "p99 µs", "requests/s over AddAuthorization's", "p99"
    );
    for ((name, _), of) in stacks.iter().zip(&samples) {
        let median = |figure: fn(&Sample) -> f64| quartiles(of.iter().map(figure))[1];
        let over = |base: usize, figure: fn(&Sample) -> f64| {
            quartiles(of.iter().zip(&samples[base]).map(|(one, base)| figure(one) / figure(base)))
        };
        let [lower, ratio, upper] = over(1, |sample| sample.per_second);
        println!(
            "{name:<26}{:>12.0}{:>10.0}{:>40}{:>8.3}",
            median(|sample| sample.per_second),
            median(|sample| sample.p99),
            format!("{ratio:.3} ({lower:.3} to {upper:.3})"),
            over(1, |sample| sample.p99)[1],
        );
        if name.starts_with("BearerAuth") {
            bar(&format!("{name}: requests/s over AddAuthorization's"), ratio, 0.99);
            bar(&format!("{name}: requests/s over Retry's"), over(2, |sample| sample.per_second)[1], 1.0);
        }
    }
}

fn bar(what: &str, figure: f64, bar: f64) {
    println!("  {what:<50}{figure:>8.3}, bar {bar:.2}: {}", if figure >= bar { "met" } else { "missed" });
}

/// So many callers send a request each, ten times. Returns how many connections the server accepted. If `revoked`, all
/// tokens are revoked before each time but the first, so that each request is challenged and sent again. Otherwise each
/// caller sends another request at once.
async fn connections(callers: usize, revoked: bool) -> u64 {
    let server = AuthServer::start().await.unwrap();
    let source = ApiVideo::new(server.api_key()).base_url(server.uri());
    let stack = boxed(BearerAuthLayer::with_provider(TokenProvider::new(source)).layer(client(false)));
    let uri = format!("{}videos", server.uri());
    for turn in 0..10 {
        if revoked && turn > 0 {
            server.revoke_access_tokens();
        }
        let requests = if revoked || turn == 0 { 1 } else { 2 };
        let mut sent = JoinSet::new();
        for _ in 0..callers {
            let (mut stack, request) = (stack.clone(), Request::get(&uri).body(Body::default()).unwrap());
            sent.spawn(async move {
                for _ in 0..requests {
                    send(&mut stack, request.clone()).await;
                }
            });
        }
        sent.join_all().await;
    }
    let expected = if revoked { 9 * callers as u64 } else { 0 };
    assert_eq!(server.counters().challenged, expected);
    server.counters().connections
}

async fn storm(callers: usize, rounds: usize) {
    let mut counts = [Vec::new(), Vec::new()];
    for _ in 0..rounds {
        counts[0].push(connections(callers, false).await as f64);
        counts[1].push(connections(callers, true).await as f64);
    }
    let [without, with] = counts.map(|counts| quartiles(counts.into_iter()));
    println!(
        "\n{callers} callers at once, HTTP/1.1, 19 requests each: connections, median of {rounds} runs (quartiles)"
    );
    println!("while no token is revoked      {:>8} ({} to {})", without[1], without[0], without[2]);
    println!("nine storms of 401s            {:>8} ({} to {})", with[1], with[0], with[2]);
    println!("  bar: no more than without: {}", if with[1] <= without[1] { "met" } else { "missed" });
}

fn main() {
    let brief = std::env::args().any(|argument| argument == "--brief");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        for http2 in [false, true] {
            throughput(http2, if brief { 3 } else { 201 }).await;
        }
        if brief { storm(100, 1).await } else { storm(1_000, 11).await }
    });
}
