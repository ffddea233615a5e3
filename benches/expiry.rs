//! Latency during expiries: 64 callers send requests at a steady rate over real sockets, while each token lives for two
//! seconds and the auth endpoint takes 200 ms for the next one.
//!
//! ```text
//! cargo bench --bench expiry                          # rounds of four seconds: 15, and 3 of the others
//! cargo bench --bench expiry -- --brief               # one of each
//! cargo bench --bench expiry -- --plot FILE.svg       # and one of eight seconds as a plot
//! ```
//!
//! Two stacks run at a time, each with its own server, so that the machine's noise affects both: tower-bearer with
//! the same stack without any expiry, then the other two, whose callers all continue at once when their wait ends. The
//! latency of a request counts from when it was due.

use std::{
    error::Error,
    future::Future,
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{HeaderValue, Request, StatusCode, Uri, header::AUTHORIZATION};
use http_body_util::{BodyExt, Empty};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use plotters::prelude::*;
use tokio::{sync::Mutex, task::JoinSet, time::MissedTickBehavior};
use tower::{Layer, ServiceExt};
use tower_bearer::{
    ApiVideo, BearerAuthLayer, RefreshReason, Token, TokenProvider, TokenRequest, TokenSource,
};
use tower_bearer_testing::{AuthServer, Fault, Route};

const CALLERS: usize = 64;
/// The time between two requests of one caller.
const PERIOD: Duration = Duration::from_millis(50);
const LIFETIME: Duration = Duration::from_secs(2);
const LATENCY: Duration = Duration::from_millis(200);
/// The time before and after the measurement. Callers start and end together there, which slows them down.
const MARGIN: Duration = Duration::from_millis(500);

type BoxError = Box<dyn Error + Send + Sync>;
type Http = Client<HttpConnector, Empty<Bytes>>;
type Sending = Pin<Box<dyn Future<Output = Result<StatusCode, BoxError>> + Send>>;
type Stack = Arc<dyn Fn() -> Sending + Send + Sync>;

const ROUND: Duration = Duration::from_secs(4);
const PAIRS: [[usize; 2]; 2] = [[0, 1], [2, 3]];
const STACKS: [&str; 4] = ["no expiry", "tower-bearer", "locked, at expiry", "on 401 only"];
const COLORS: [RGBColor; 4] =
    [RGBColor(150, 150, 150), RGBColor(0, 114, 178), RGBColor(213, 94, 0), RGBColor(204, 121, 167)];

/// When a request was due, and the time from then to its response.
type Sample = (Duration, Duration);

fn request(api: &Uri, authorization: Option<HeaderValue>) -> Request<Empty<Bytes>> {
    let mut request = Request::get(format!("{api}videos")).body(Empty::new()).unwrap();
    request.headers_mut().extend(authorization.map(|value| (AUTHORIZATION, value)));
    request
}

/// The crate's layer with its defaults.
fn layered(server: &AuthServer) -> Stack {
    let source = ApiVideo::new(server.api_key()).base_url(server.uri());
    let client: Http = Client::builder(TokioExecutor::new()).build_http();
    let service = BearerAuthLayer::with_provider(TokenProvider::new(source)).layer(client);
    let api = server.uri();
    Arc::new(move || {
        let (service, request) = (service.clone(), request(&api, None));
        Box::pin(async move {
            let response = service.oneshot(request).await?;
            let status = response.status();
            response.into_body().collect().await?;
            Ok(status)
        })
    })
}

/// The two other stacks: a client, and a token behind a lock.
#[derive(Clone)]
struct Locked {
    source: ApiVideo,
    http: Http,
    api: Uri,
    token: Arc<Mutex<Option<Token>>>,
}

impl Locked {
    fn new(server: &AuthServer) -> Self {
        Self {
            source: ApiVideo::new(server.api_key()).base_url(server.uri()),
            http: Client::builder(TokioExecutor::new()).build_http(),
            api: server.uri(),
            token: Arc::default(),
        }
    }

    /// Returns the token, and renews it first if it is `outdated`. The lock is held meanwhile.
    async fn token(&self, outdated: impl Fn(&Token) -> bool) -> Result<Token, BoxError> {
        let mut current = self.token.lock().await;
        if let Some(token) = current.as_ref().filter(|token| !outdated(token)) {
            return Ok(token.clone());
        }
        let mut request = TokenRequest::new(RefreshReason::Missing);
        if let Some(token) = current.as_ref() {
            request = request.with_previous(token.clone());
        }
        let renewed = self.source.fetch(&request).await?;
        Ok(current.insert(renewed).clone())
    }

    async fn send(&self, token: &Token) -> Result<StatusCode, BoxError> {
        let response = self.http.request(request(&self.api, Some(token.header_value()))).await?;
        let status = response.status();
        response.into_body().collect().await?;
        Ok(status)
    }

    /// The first caller that finds the token expired renews it, as kube does.
    async fn at_expiry(self) -> Result<StatusCode, BoxError> {
        let token = self.token(|token| token.remaining().is_some_and(|left| left.is_zero())).await?;
        self.send(&token).await
    }

    /// The first caller that is challenged renews the token.
    async fn on_challenge(self) -> Result<StatusCode, BoxError> {
        let mut token = self.token(|_| false).await?;
        let mut status = self.send(&token).await?;
        for _ in 0..2 {
            if status == StatusCode::UNAUTHORIZED {
                token = self.token(|current| current.access_token() == token.access_token()).await?;
                status = self.send(&token).await?;
            }
        }
        Ok(status)
    }
}

/// Sends at a steady rate, without waiting for earlier responses.
async fn load(stack: Stack, length: Duration) -> Result<Vec<Sample>, BoxError> {
    // Not measured: the first token, and the connections.
    for _ in 0..3 {
        let mut warm = JoinSet::new();
        (0..CALLERS).for_each(|_| drop(warm.spawn(stack())));
        warm.join_all().await.into_iter().collect::<Result<Vec<_>, _>>()?;
    }
    let begun = tokio::time::Instant::now();
    let mut callers = JoinSet::new();
    for caller in 0..CALLERS {
        let stack = Arc::clone(&stack);
        callers.spawn(async move {
            let first = begun + PERIOD * caller as u32 / CALLERS as u32;
            let mut ticks = tokio::time::interval_at(first, PERIOD);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
            let mut requests = JoinSet::new();
            while begun.elapsed() < length + 2 * MARGIN {
                ticks.tick().await;
                let (due, sent, sending) = (begun.elapsed(), Instant::now(), stack());
                requests.spawn(async move { sending.await.map(|status| (status, (due, sent.elapsed()))) });
            }
            requests.join_all().await
        });
    }
    let answers = callers.join_all().await.into_iter().flatten();
    let mut samples = Vec::new();
    for answer in answers {
        match answer? {
            (StatusCode::OK, (due, took)) if (MARGIN..MARGIN + length).contains(&due) => {
                samples.push((due - MARGIN, took));
            }
            (StatusCode::OK, _) => {}
            (status, _) => return Err(format!("a request was answered {status}").into()),
        }
    }
    Ok(samples)
}

/// Returns p50, p99 and the maximum.
fn figures(samples: &[Sample]) -> [Duration; 3] {
    let mut took: Vec<_> = samples.iter().map(|(_, took)| *took).collect();
    took.sort_unstable();
    let at = |share: f64| took[((took.len() - 1) as f64 * share) as usize];
    [at(0.5), at(0.99), at(1.0)]
}

fn median(mut values: Vec<Duration>) -> Duration {
    values.sort_unstable();
    values[values.len() / 2]
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// Returns the samples of each of the two stacks, and the number of requests to its auth endpoint.
async fn round(pair: [usize; 2], length: Duration) -> Result<Vec<(Vec<Sample>, u64)>, BoxError> {
    let mut running = Vec::new();
    for stack in pair {
        let lifetime = if stack == 0 { Duration::from_secs(3600) } else { LIFETIME };
        let server = AuthServer::builder().token_lifetime(lifetime).start().await?;
        for route in [Route::ApiKeyGrant, Route::RefreshGrant] {
            server.inject_always(route, Fault::Delay(LATENCY));
        }
        let locked = Locked::new(&server);
        let stack: Stack = match stack {
            0 | 1 => layered(&server),
            2 => Arc::new(move || Box::pin(locked.clone().at_expiry())),
            _ => Arc::new(move || Box::pin(locked.clone().on_challenge())),
        };
        running.push((tokio::spawn(load(stack, length)), server));
    }
    let mut seen = Vec::new();
    for (load, server) in running {
        let samples = load.await??;
        let counters = server.counters();
        seen.push((samples, counters.api_key_grants + counters.refresh_grants));
    }
    Ok(seen)
}

/// Plots the slowest request of each 50 ms.
fn plot(path: &str, stacks: &[Vec<Sample>], length: Duration) -> Result<(), BoxError> {
    let root = SVGBackend::new(path, (900, 420)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(
            "Latency with an expiry every 2 s, and an auth endpoint that takes 200 ms",
            ("sans-serif", 18),
        )
        .margin(12)
        .x_label_area_size(38)
        .y_label_area_size(58)
        .build_cartesian_2d(0.0..length.as_secs_f64(), (0.1..10_000.0).log_scale())?;
    chart
        .configure_mesh()
        .x_desc("seconds")
        .y_desc("slowest request of each 50 ms, in ms")
        .light_line_style(WHITE)
        .y_label_formatter(&|value| format!("{value}"))
        .draw()?;
    let buckets = length.as_millis() as usize / 50;
    // tower-bearer is drawn last, so that it is on top.
    for stack in [0, 3, 2, 1] {
        let mut slowest = vec![None::<Duration>; buckets + 1];
        for (due, took) in &stacks[stack] {
            let bucket = &mut slowest[(due.as_millis() as usize / 50).min(buckets)];
            *bucket = (*bucket).max(Some(*took));
        }
        let points = slowest
            .iter()
            .enumerate()
            .filter_map(|(bucket, took)| Some((bucket as f64 / 20.0, millis((*took)?))));
        let style = COLORS[stack].stroke_width(if stack == 1 { 2 } else { 1 });
        chart
            .draw_series(LineSeries::new(points, style))?
            .label(STACKS[stack])
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], COLORS[stack].stroke_width(3)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.4))
        .draw()?;
    root.present()?;
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let arguments: Vec<_> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let (rounds, svg) = match arguments[..] {
        [] => ([15, 3], None),
        ["--brief"] => ([1, 1], None),
        ["--plot", path] => ([15, 3], Some(path)),
        _ => return Err("usage: expiry [--brief | --plot FILE.svg]".into()),
    };
    println!(
        "{CALLERS} callers, a request each {PERIOD:?}; tokens live {LIFETIME:?}; the auth endpoint takes {LATENCY:?}"
    );
    if let Some(path) = svg {
        let mut samples = Vec::new();
        for pair in PAIRS {
            samples.extend(round(pair, 2 * ROUND).await?.into_iter().map(|(samples, _)| samples));
        }
        plot(path, &samples, 2 * ROUND)?;
        println!("written to {path}");
    }
    let mut all: Vec<Vec<[Duration; 3]>> = vec![Vec::new(); STACKS.len()];
    let mut grants = vec![0; STACKS.len()];
    for (pair, rounds) in PAIRS.into_iter().zip(rounds) {
        for _ in 0..rounds {
            for (stack, (samples, posts)) in pair.into_iter().zip(round(pair, ROUND).await?) {
                all[stack].push(figures(&samples));
                grants[stack] += posts;
            }
        }
    }

    println!("\nmedians of the rounds, in ms        p50      p99      max    POSTs per round");
    let mut medians = Vec::new();
    for (stack, name) in STACKS.iter().enumerate() {
        let of = |figure: usize| median(all[stack].iter().map(|round| round[figure]).collect());
        let [p50, p99, max] = [of(0), of(1), of(2)];
        println!(
            "{name:<25} {:>8.2} {:>8.2} {:>8.2} {:>18.1}",
            millis(p50),
            millis(p99),
            millis(max),
            grants[stack] as f64 / all[stack].len() as f64
        );
        medians.push([p50, p99, max]);
    }
    println!("\nbars                                              figure     bar");
    let bar = |what: &str, figure: f64, bar: f64, met: bool| {
        println!("{what:<48} {figure:>7.2} {bar:>7.2}  {}", if met { "met" } else { "MISSED" });
    };
    for (figure, name) in [(1, "p99"), (2, "max")] {
        let ratio = medians[1][figure].as_secs_f64() / medians[0][figure].as_secs_f64();
        bar(&format!("tower-bearer's {name} over that without expiry"), ratio, 1.2, ratio <= 1.2);
    }
    for stack in [2, 3] {
        let max = millis(medians[stack][2]);
        bar(
            &format!("{}: its max shows the 200 ms", STACKS[stack]),
            max,
            millis(LATENCY),
            max >= millis(LATENCY),
        );
    }
    Ok(())
}
