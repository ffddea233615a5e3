//! Measures how many requests two threads with one provider send in the time in which one thread sends one.
//!
//! ```text
//! cargo bench --bench threads              # about a minute
//! cargo bench --bench threads -- --brief   # a second
//! ```
//!
//! The stacks take turns, over the same service, which responds at once. The bare service shows what the machine allows.
//! The threads have a service each, or clones of one service.

use std::{
    pin::pin,
    task::{Context, Poll, Waker},
    thread,
    time::Instant,
};

use bytes::Bytes;
use http::{HeaderName, Request, Response};
use http_body_util::Empty;
use tower::{Layer, Service, retry};
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

/// Returns how long so many threads take, each with a service that `service` makes.
fn took<S>(threads: usize, requests: usize, service: impl Fn() -> S) -> f64
where
    S: Service<Request<Body>, Response = Response<Body>> + Send,
{
    let begun = Instant::now();
    thread::scope(|scope| {
        for _ in 0..threads {
            let service = service();
            scope.spawn(move || send(service, requests));
        }
    });
    begun.elapsed().as_secs_f64()
}

/// The requests of two threads over those of one: with a service each, and with clones of one service.
fn ratios<S>(requests: usize, layer: impl Fn() -> S) -> [f64; 2]
where
    S: Service<Request<Body>, Response = Response<Body>> + Clone + Send,
{
    let one = took(1, requests, &layer);
    let service = layer();
    [2.0 * one / took(2, requests, &layer), 2.0 * one / took(2, requests, || service.clone())]
}

fn main() {
    let brief = std::env::args().any(|argument| argument == "--brief");
    let (rounds, requests) = if brief { (3, 2_000) } else { (51, 100_000) };
    let provider = TokenProvider::new(Hourly);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(provider.token()).unwrap();

    let layer = BearerAuthLayer::with_provider(provider);
    let add = || AddAuthorizationLayer::bearer(TOKEN).as_sensitive(true);
    let mut stacks = [
        ("bare", Vec::new()),
        ("AddAuthorization", Vec::new()),
        ("BearerAuth, no replay", Vec::new()),
        ("BearerAuth", Vec::new()),
        ("Retry + AddAuthorization", Vec::new()),
    ];
    for _ in 0..rounds {
        stacks[0].1.push(ratios(requests, || Api));
        stacks[1].1.push(ratios(requests, || add().layer(Api)));
        stacks[2].1.push(ratios(requests, || layer.clone().no_replay().layer(Api)));
        stacks[3].1.push(ratios(requests, || layer.layer(Api)));
        stacks[4].1.push(ratios(requests, || retry::RetryLayer::new(On401(2)).layer(add().layer(Api))));
    }
    println!("requests of two threads over those of one, medians of {rounds} rounds");
    println!("{:<28}{:>20}{:>24}", "", "a service for each", "clones of one service");
    for (name, ratios) in stacks {
        let [own, clones] = [0, 1].map(|at| {
            let mut ratios: Vec<f64> = ratios.iter().map(|ratios: &[f64; 2]| ratios[at]).collect();
            ratios.sort_by(f64::total_cmp);
            ratios[rounds / 2]
        });
        println!("{name:<28}{own:>20.2}{clones:>24.2}");
    }
}
