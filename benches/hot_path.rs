//! Measures the cost of a request over the bare service: time, allocations, and instructions if valgrind is installed.
//!
//! ```text
//! cargo bench --bench hot_path              # all of it, a few minutes
//! cargo bench --bench hot_path -- --brief   # a few seconds, without instructions
//! ```
//!
//! All stacks are measured in the same run, over the same service, which responds at once. Header values are either
//! fresh (each owns its bytes, as in a request that was just built or received) or shared (clones of a template's
//! values). The table is also written to `target/bench/hot_path.json`.

use std::{
    alloc::System,
    future::Future,
    hint::black_box,
    pin::{Pin, pin},
    process::Command,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Instant,
};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Request, Response, Uri, header::AUTHORIZATION};
use http_body_util::Empty;
use serde_json::{Value, json};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use tokio::sync::Mutex;
use tower::{BoxError, Layer, Service, filter::AsyncFilterLayer, retry};
use tower_bearer::{BearerAuthLayer, TokenProvider};
use tower_http::auth::AddAuthorizationLayer;

#[path = "support/mod.rs"]
mod support;

use support::{Api, Hourly, On401, TOKEN};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const HEADER_COUNTS: [usize; 3] = [0, 5, 20];

type Body = Empty<Bytes>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stack {
    Bare,
    AddAuthorization,
    NoReplay,
    Replay,
    RetryAddAuthorization,
    RetryFilter,
}

impl Stack {
    const ALL: [(Self, &str); 6] = [
        (Self::Bare, "bare"),
        (Self::AddAuthorization, "AddAuthorization"),
        (Self::NoReplay, "BearerAuth, no replay"),
        (Self::Replay, "BearerAuth"),
        (Self::RetryAddAuthorization, "Retry + AddAuthorization"),
        (Self::RetryFilter, "Retry + kube-style filter"),
    ];

    fn name(self) -> &'static str {
        Self::ALL.iter().find(|(stack, _)| *stack == self).map_or("", |(_, name)| name)
    }
}

/// A filter like that of kube's client: a lock, a boxed future and a new header string per request.
fn kube_style_filter() -> impl Layer<
    Api,
    Service: Service<Request<Body>, Response = Response<Body>, Error = BoxError, Future: Send> + Clone,
> {
    let token = Arc::new(Mutex::new(TOKEN.to_owned()));
    AsyncFilterLayer::new(move |mut request: Request<Body>| {
        let token = Arc::clone(&token);
        Box::pin(async move {
            let token = token.lock().await;
            let mut value = HeaderValue::try_from(format!("Bearer {}", *token))?;
            value.set_sensitive(true);
            request.headers_mut().insert(AUTHORIZATION, value);
            Ok::<_, BoxError>(request)
        }) as Pin<Box<dyn Future<Output = Result<_, _>> + Send>>
    })
}

/// The template for requests.
struct Template {
    uri: Uri,
    names: Vec<HeaderName>,
    values: Vec<HeaderValue>,
    fresh: bool,
}

impl Template {
    fn new(headers: usize, fresh: bool) -> Self {
        let names = (0..headers).map(|at| HeaderName::try_from(format!("x-header-{at}")).unwrap()).collect();
        let values =
            (0..headers).map(|at| HeaderValue::try_from(format!("the value of {at}")).unwrap()).collect();
        Self { uri: Uri::from_static("https://ws.api.video/videos"), names, values, fresh }
    }

    fn request(&self) -> Request<Body> {
        let mut request = Request::new(Empty::new());
        *request.uri_mut() = self.uri.clone();
        for (name, value) in self.names.iter().zip(&self.values) {
            let value =
                if self.fresh { HeaderValue::from_bytes(value.as_bytes()).unwrap() } else { value.clone() };
            request.headers_mut().append(name.clone(), value);
        }
        request
    }
}

/// Sends `requests` requests through the stack.
fn send(stack: Stack, template: &Template, provider: &TokenProvider, requests: usize) {
    let layer = BearerAuthLayer::with_provider(provider.clone());
    let add = || AddAuthorizationLayer::bearer(TOKEN).as_sensitive(true);
    let retry = retry::RetryLayer::new(On401(2));
    match stack {
        Stack::Bare => each(Api, template, requests),
        Stack::AddAuthorization => each(add().layer(Api), template, requests),
        Stack::NoReplay => each(layer.no_replay().layer(Api), template, requests),
        Stack::Replay => each(layer.layer(Api), template, requests),
        Stack::RetryAddAuthorization => each(retry.layer(add().layer(Api)), template, requests),
        Stack::RetryFilter => each(retry.layer(kube_style_filter().layer(Api)), template, requests),
    }
}

fn each<S>(mut service: S, template: &Template, requests: usize)
where
    S: Service<Request<Body>, Response = Response<Body>>,
{
    let mut cx = Context::from_waker(Waker::noop());
    for _ in 0..requests {
        assert!(service.poll_ready(&mut cx).is_ready());
        let response = pin!(service.call(template.request()));
        let Poll::Ready(Ok(response)) = response.poll(&mut cx) else { panic!("no answer") };
        black_box(response);
    }
}

/// One cell of the table: a stack with one kind of request. The figures are the difference to the bare service.
#[derive(Clone, Copy, Default)]
struct Cost {
    nanoseconds: f64,
    allocations: f64,
    instructions: Option<f64>,
}

struct Run {
    provider: TokenProvider,
    brief: bool,
    valgrind: bool,
}

impl Run {
    /// Measures all stacks, in the order of [`Stack::ALL`].
    fn measure(&self, headers: usize, fresh: bool) -> Vec<Cost> {
        let template = Template::new(headers, fresh);
        let (rounds, requests) = if self.brief { (5, 200) } else { (31, 5_000) };
        let mut samples = vec![Vec::new(); Stack::ALL.len()];
        // Stacks alternate, so that disturbances of the machine affect all of them.
        for _ in 0..rounds {
            for ((stack, _), samples) in Stack::ALL.iter().zip(&mut samples) {
                let begun = Instant::now();
                send(*stack, &template, &self.provider, requests);
                samples.push(begun.elapsed().as_secs_f64() * 1e9 / requests as f64);
            }
        }
        let mut costs: Vec<_> = Stack::ALL
            .iter()
            .zip(samples)
            .map(|((stack, _), mut samples)| {
                samples.sort_by(f64::total_cmp);
                Cost {
                    nanoseconds: samples[samples.len() / 2],
                    allocations: self.allocations(*stack, &template),
                    instructions: self.valgrind.then(|| instructions(*stack, headers, fresh)),
                }
            })
            .collect();
        let bare = costs[0];
        for cost in &mut costs {
            cost.nanoseconds -= bare.nanoseconds;
            cost.allocations -= bare.allocations;
            cost.instructions = cost.instructions.zip(bare.instructions).map(|(all, bare)| all - bare);
        }
        costs
    }

    fn allocations(&self, stack: Stack, template: &Template) -> f64 {
        let count = |requests| {
            let region = Region::new(ALLOCATOR);
            send(stack, template, &self.provider, requests);
            let change = region.change();
            (change.allocations + change.reallocations) as f64
        };
        // The difference cancels the allocations of the setup.
        (count(1_100) - count(100)) / 1_000.0
    }
}

/// Counts the instructions of one request with callgrind. The difference of two runs cancels those of the setup.
fn instructions(stack: Stack, headers: usize, fresh: bool) -> f64 {
    let program = std::env::current_exe().expect("the path of this program");
    let count = |requests: usize| {
        let output = Command::new("valgrind")
            .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
            .arg(&program)
            .args(["--send", stack.name(), &headers.to_string(), &fresh.to_string(), &requests.to_string()])
            .output()
            .expect("valgrind runs");
        let report = String::from_utf8_lossy(&output.stderr).into_owned();
        let count = report.lines().find_map(|line| line.split_once("Collected : ")).map(|(_, count)| count);
        count.and_then(|count| count.trim().parse::<f64>().ok()).unwrap_or_else(|| panic!("{report}"))
    };
    (count(1_100) - count(100)) / 1_000.0
}

fn provider() -> TokenProvider {
    let provider = TokenProvider::new(Hourly);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(provider.token()).unwrap();
    provider
}

/// The command that runs under callgrind: `--send STACK HEADERS FRESH REQUESTS`.
fn send_only(arguments: &[String]) {
    let [name, headers, fresh, requests] = arguments else { panic!("{arguments:?}") };
    let (stack, _) = Stack::ALL.iter().find(|(_, of)| of == name).expect("the name of a stack");
    let template = Template::new(headers.parse().unwrap(), fresh.parse().unwrap());
    send(*stack, &template, &provider(), requests.parse().unwrap());
}

/// Returns the limits: a name, the figure and its maximum.
fn bars(headers: usize, fresh: bool, costs: &[Cost]) -> Vec<(String, f64, f64)> {
    let of = |stack| costs[Stack::ALL.iter().position(|(of, _)| *of == stack).unwrap()];
    let [add, no_replay, replay, retry] =
        [Stack::AddAuthorization, Stack::NoReplay, Stack::Replay, Stack::RetryAddAuthorization].map(of);
    let ratio = match (headers, fresh) {
        (0, _) => 0.80,
        (5, true) => 0.65,
        (5, false) => 0.90,
        (_, true) => 0.25,
        (_, false) => 0.85,
    };
    let mut bars = vec![
        (
            "no replay: allocations more than AddAuthorization".into(),
            no_replay.allocations - add.allocations,
            0.0,
        ),
        (
            "replay: allocations more than AddAuthorization".into(),
            replay.allocations - add.allocations,
            if headers == 0 { 0.0 } else { 1.0 },
        ),
    ];
    if let (Some(add), Some(no_replay), Some(replay), Some(retry)) =
        (add.instructions, no_replay.instructions, replay.instructions, retry.instructions)
    {
        bars.push(("no replay: instructions more than AddAuthorization".into(), no_replay - add, 200.0));
        bars.push(("replay: instructions by Retry + AddAuthorization's".into(), replay / retry, ratio));
    }
    bars
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let Some(at) = arguments.iter().position(|argument| argument == "--send") {
        return send_only(&arguments[at + 1..]);
    }
    let brief = arguments.iter().any(|argument| argument == "--brief");
    let valgrind = !brief && Command::new("valgrind").arg("--version").output().is_ok();
    let run = Run { provider: provider(), brief, valgrind };

    let mut cells = Vec::new();
    let mut held = Vec::new();
    for fresh in [true, false] {
        let values = if fresh { "fresh" } else { "shared" };
        println!("\n{values} header values: cost of a request over the bare service");
        println!("{:<28}{:>10}{:>10}{:>14}{:>14}", "", "headers", "ns", "allocations", "instructions");
        for headers in HEADER_COUNTS {
            let costs = run.measure(headers, fresh);
            for ((_, name), cost) in Stack::ALL.iter().zip(&costs).skip(1) {
                let instructions = cost.instructions.map_or("-".into(), |count| format!("{count:.0}"));
                println!(
                    "{name:<28}{headers:>10}{:>10.0}{:>14.2}{instructions:>14}",
                    cost.nanoseconds, cost.allocations
                );
                cells.push(json!({
                    "stack": name,
                    "values": values,
                    "headers": headers,
                    "nanoseconds": cost.nanoseconds,
                    "allocations": cost.allocations,
                    "instructions": cost.instructions,
                }));
            }
            for (what, figure, bar) in bars(headers, fresh, &costs) {
                held.push((format!("{what}, {values}, {headers} headers"), figure, bar));
            }
        }
    }
    println!("\n{:<84}{:>8}{:>8}", "bars", "figure", "bar");
    let mut bars = Vec::new();
    for (what, figure, bar) in held {
        let verdict = if figure <= bar { "met" } else { "missed" };
        println!("{what:<84}{figure:>8.2}{bar:>8.2}  {verdict}");
        bars.push(json!({ "what": what, "figure": figure, "bar": bar, "met": figure <= bar }));
    }
    if !valgrind {
        println!("\nwithout instructions: {}", if brief { "--brief" } else { "valgrind is not installed" });
    }
    write(&json!({ "brief": brief, "costs": cells, "bars": bars }));
}

fn write(table: &Value) {
    let target =
        std::env::var("CARGO_TARGET_DIR").unwrap_or(concat!(env!("CARGO_MANIFEST_DIR"), "/target").into());
    let folder = std::path::Path::new(&target).join("bench");
    std::fs::create_dir_all(&folder).expect("the target directory is writable");
    std::fs::write(folder.join("hot_path.json"), format!("{table:#}\n"))
        .expect("the target directory is writable");
    println!("\nwritten to {}", folder.join("hot_path.json").display());
}
