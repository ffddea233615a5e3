//! Measures what many tenants cost: the happy path by key, the memory of idle tenants, and the token requests at an
//! expiry.
//!
//! ```text
//! cargo bench --bench tenants              # all of it, about two minutes
//! cargo bench --bench tenants -- --brief   # fewer tenants, without instructions
//! ```
//!
//! All figures are from one run. The happy path is measured over the same service, which responds at once. Instructions
//! need valgrind.

use std::{
    alloc::System,
    borrow::Cow,
    convert::Infallible,
    future::Future,
    hint::black_box,
    pin::pin,
    process::Command,
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::future::join_all;
use http::{HeaderValue, Request, Response};
use http_body_util::{Empty, Full};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use tokio::runtime::{Builder, Runtime};
use tower::{Layer, Service};
use tower_bearer::{
    ApiVideo, BearerAuthLayer, OAuth2, Token, TokenClient, TokenProvider, TokenProviders, TokenSource,
    oauth2::{ClientAuth, Server},
};
use tower_bearer_testing::AuthServer;

#[path = "support/mod.rs"]
mod support;

use support::{Api, Hourly, TOKEN};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// How many tenants send the requests of the happy path in turn.
const TENANTS: u64 = 1000;

type Body = Empty<Bytes>;

/// The tenant of a request, in its extensions.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Tenant(u64);

fn token() -> Token {
    Token::builder(TOKEN).expires_in(Duration::from_secs(3600)).build().unwrap()
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// Where the key of a request is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Key {
    /// One provider for all tenants.
    None,
    Extension,
    Header,
    /// In an extension, and cloned: a key that is made for each request costs no less.
    Owned,
}

impl Key {
    const ALL: [(Self, &str); 4] = [
        (Self::None, "one provider"),
        (Self::Extension, "by key, an extension"),
        (Self::Header, "by key, a header"),
        (Self::Owned, "by key, owned"),
    ];

    fn name(self) -> &'static str {
        Self::ALL.iter().find(|(key, _)| *key == self).map_or("", |(_, name)| name)
    }
}

/// A stack that sends so many requests. The tenants take turns.
type Sender = Box<dyn FnMut(usize)>;

fn sender(key: Key, replay: bool) -> Sender {
    let runtime = runtime();
    match key {
        Key::None => {
            let provider = TokenProvider::new(Hourly);
            runtime.block_on(provider.token()).unwrap();
            through(&BearerAuthLayer::with_provider(provider), replay)
        }
        Key::Extension | Key::Owned => {
            let providers = hourly::<Tenant>();
            for tenant in 0..TENANTS {
                runtime.block_on(providers.get(&Tenant(tenant)).unwrap().token()).unwrap();
            }
            let layer = BearerAuthLayer::by_key(providers, move |head| {
                let tenant = head.extensions.get::<Tenant>()?;
                Some(if key == Key::Owned { Cow::Owned(tenant.clone()) } else { Cow::Borrowed(tenant) })
            });
            through(&layer, replay)
        }
        Key::Header => {
            let providers = hourly::<String>();
            for tenant in 0..TENANTS {
                runtime.block_on(providers.get(&*name(tenant)).unwrap().token()).unwrap();
            }
            let layer = BearerAuthLayer::by_key(providers, |head| {
                head.headers.get("x-tenant")?.to_str().ok().map(Cow::Borrowed)
            });
            through(&layer, replay)
        }
    }
}

fn hourly<K: Clone + Eq + std::hash::Hash + Send + Sync + 'static>() -> TokenProviders<K> {
    TokenProviders::new(|_: &K| Ok::<_, Infallible>(TokenProvider::builder(Hourly)))
}

fn name(tenant: u64) -> String {
    format!("tenant-{tenant:06}")
}

fn through(layer: &BearerAuthLayer, replay: bool) -> Sender {
    if replay { each(layer.layer(Api)) } else { each(layer.clone().no_replay().layer(Api)) }
}

fn each<S>(mut service: S) -> Sender
where
    S: Service<Request<Body>, Response = Response<Body>> + 'static,
{
    // Each has both keys, so that the stacks get the same requests.
    let template = |tenant| {
        let mut request = Request::get("https://ws.api.video/videos").body(Empty::new()).unwrap();
        request.extensions_mut().insert(Tenant(tenant));
        request.headers_mut().insert("x-tenant", HeaderValue::try_from(name(tenant)).unwrap());
        request
    };
    let mut templates = (0..TENANTS).map(template).collect::<Vec<_>>().into_iter().cycle();
    Box::new(move |requests| {
        let mut cx = Context::from_waker(Waker::noop());
        for request in templates.by_ref().take(requests) {
            assert!(service.poll_ready(&mut cx).is_ready());
            let response = pin!(service.call(request));
            let Poll::Ready(Ok(response)) = response.poll(&mut cx) else { panic!("no answer") };
            black_box(response);
        }
    })
}

fn happy_path(brief: bool, valgrind: bool) {
    let (rounds, requests) = if brief { (5, 1_000) } else { (31, 10_000) };
    for replay in [false, true] {
        println!(
            "\nthe happy path {} replay: one request, {TENANTS} tenants in turn",
            if replay { "with" } else { "without" }
        );
        println!("{:<24}{:>8}{:>14}{:>14}", "", "ns", "allocations", "instructions");
        let mut senders: Vec<_> = Key::ALL.iter().map(|(key, _)| sender(*key, replay)).collect();
        let mut samples = vec![Vec::new(); senders.len()];
        // Stacks alternate, so that disturbances of the machine affect all of them.
        for _ in 0..rounds {
            for (send, samples) in senders.iter_mut().zip(&mut samples) {
                let begun = Instant::now();
                send(requests);
                samples.push(begun.elapsed().as_secs_f64() * 1e9 / requests as f64);
            }
        }
        let mut figures = Vec::new();
        for (((key, _), send), mut samples) in Key::ALL.iter().zip(&mut senders).zip(samples) {
            samples.sort_by(f64::total_cmp);
            let region = Region::new(ALLOCATOR);
            send(1_000);
            let allocations = region.change().allocations as f64 / 1_000.0;
            figures.push((
                samples[samples.len() / 2],
                allocations,
                valgrind.then(|| instructions(*key, replay)),
            ));
        }
        for ((_, name), (ns, allocations, instructions)) in Key::ALL.iter().zip(&figures) {
            let instructions = instructions.map_or("-".into(), |count| format!("{count:.0}"));
            println!("{name:<24}{ns:>8.0}{allocations:>14.2}{instructions:>14}");
        }
        let (one, by_key) = (figures[0], figures[1]);
        let more = by_key.2.zip(one.2).map_or("-".into(), |(by_key, one)| format!("{:.0}", by_key - one));
        println!(
            "by key, an extension, over one provider: {:.2} of the time, {more} instructions more, {:.2} allocations more",
            by_key.0 / one.0,
            by_key.1 - one.1
        );
    }
}

/// Counts the instructions of one request with callgrind. The difference of two runs cancels those of the setup.
fn instructions(key: Key, replay: bool) -> f64 {
    let program = std::env::current_exe().expect("the path of this program");
    let count = |requests: usize| {
        let output = Command::new("valgrind")
            .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
            .arg(&program)
            .args(["--send", key.name(), &replay.to_string(), &requests.to_string()])
            .output()
            .expect("valgrind runs");
        let report = String::from_utf8_lossy(&output.stderr).into_owned();
        let count = report.lines().find_map(|line| line.split_once("Collected : ")).map(|(_, count)| count);
        count.and_then(|count| count.trim().parse::<f64>().ok()).unwrap_or_else(|| panic!("{report}"))
    };
    // Whole rounds of the tenants: the first use of each costs more.
    (count(3_000) - count(1_000)) / 2_000.0
}

/// Returns the heap bytes that remain of what `make` returns.
fn bytes_of<T>(make: impl FnOnce() -> T) -> (T, f64) {
    let region = Region::new(ALLOCATOR);
    let made = make();
    let change = region.change();
    (made, change.bytes_allocated as f64 - change.bytes_deallocated as f64 + change.bytes_reallocated as f64)
}

/// Prints the bytes per idle tenant with this source, without its token, and returns them.
fn memory<T: TokenSource>(
    what: &str,
    tenants: u64,
    keep_fresh: bool,
    source: impl Fn() -> T + Send + Sync + 'static,
) -> f64 {
    let (_kept, of_tokens) = bytes_of(|| (0..1_000).map(|_| token()).collect::<Vec<_>>());
    let (_kept, of_sources) = bytes_of(|| (0..1_000).map(|_| Box::new(source())).collect::<Vec<_>>());
    let vectors = 2_000.0 * size_of::<usize>() as f64;
    let (of_token, of_source) =
        ((of_tokens - vectors / 2.0) / 1_000.0, (of_sources - vectors / 2.0) / 1_000.0);
    let runtime = runtime();
    let (_providers, all) = bytes_of(|| {
        let providers = TokenProviders::builder(move |_: &Tenant| {
            Ok::<_, Infallible>(TokenProvider::builder(source()).keep_fresh(keep_fresh))
        });
        let providers = providers.max_providers(2 * tenants as usize).build().unwrap();
        for tenant in 0..tenants {
            runtime.block_on(async { providers.get(&Tenant(tenant)).unwrap().token().await }).unwrap();
        }
        assert_eq!(providers.len() as u64, tenants);
        providers
    });
    let beyond = all / tenants as f64 - of_token;
    println!("{what:<36}{tenants:>10}{beyond:>16.0}{:>16.0}{of_token:>12.0}", beyond - of_source);
    beyond
}

fn idle_tenants(brief: bool) {
    let many = if brief { 2_000 } else { 100_000 };
    println!("\nheap bytes of an idle tenant, with its key and its place in the cache");
    println!(
        "{:<36}{:>10}{:>16}{:>16}{:>12}",
        "source", "tenants", "beyond token", "without source", "token"
    );
    let beyond = memory("a source without data", many, false, || Hourly);
    memory("a source without data, kept fresh", many / 10, true, || Hourly);
    let answer = || async {
        let body = format!(r#"{{"access_token": "{TOKEN}", "token_type": "Bearer", "expires_in": 3600}}"#);
        Ok::<_, Infallible>(Response::new(Full::<Bytes>::from(body)))
    };
    let client = TokenClient::with_service(tower::service_fn(move |_: Request<String>| answer()));
    let api_video =
        move || ApiVideo::new("an-API-key-of-43-characters--like-api.video-s").with_client(client.clone());
    memory("ApiVideo", many / 10, false, api_video);
    let server = Server::token_endpoint("https://login.example/token");
    let oauth2 = OAuth2::client_credentials(server, ClientAuth::basic("client", "secret"))
        .with_client(TokenClient::with_service(tower::service_fn(move |_: Request<String>| answer())));
    memory("OAuth2, a clone of one template", many / 10, false, move || oauth2.clone());
    println!("bar: at most 1024 bytes beyond the token: {}", if beyond <= 1024.0 { "met" } else { "missed" });
}

/// Lets all tokens expire, and calls for 1,000 tenants by ten callers each.
fn expiry(brief: bool) {
    let (tenants, callers) = if brief { (100, 10) } else { (1_000, 10) };
    runtime().block_on(async {
        let server = AuthServer::start().await.unwrap();
        let keys: Vec<_> = (0..tenants).map(|_| server.add_account()).collect();
        let (base, client) = (server.uri(), TokenClient::new());
        let providers = TokenProviders::new(move |Tenant(tenant): &Tenant| {
            let source = ApiVideo::new(&*keys[*tenant as usize]).base_url(base.clone());
            Ok::<_, Infallible>(TokenProvider::builder(source.with_client(client.clone())))
        });
        let call_all = || async {
            let calls = (0..callers * tenants).map(|number| {
                let providers = providers.clone();
                async move { providers.get(&Tenant(number % tenants)).unwrap().token().await.unwrap() }
            });
            let begun = Instant::now();
            join_all(calls).await;
            begun.elapsed()
        };
        let posts = || server.counters().api_key_grants + server.counters().refresh_grants;
        call_all().await;
        let at_start = posts();
        for (_, provider) in providers.statuses().map(|(key, _)| (key.0, providers.get(&key).unwrap())) {
            provider.invalidate();
        }
        let took = call_all().await;
        println!(
            "\n{} callers over {tenants} tenants: {at_start} POSTs at the start, {} at the expiry, which took {took:.1?}",
            callers * tenants,
            posts() - at_start
        );
        assert_eq!((at_start, posts() - at_start), (tenants, tenants), "one POST for each tenant");
    });
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let Some(at) = arguments.iter().position(|argument| argument == "--send") {
        let [name, replay, requests] = &arguments[at + 1..] else { panic!("{arguments:?}") };
        let (key, _) = Key::ALL.iter().find(|(_, of)| of == name).expect("the name of a stack");
        return sender(*key, replay.parse().unwrap())(requests.parse().unwrap());
    }
    let brief = arguments.iter().any(|argument| argument == "--brief");
    let valgrind = !brief && Command::new("valgrind").arg("--version").output().is_ok();
    happy_path(brief, valgrind);
    idle_tenants(brief);
    expiry(brief);
}
