//! Soak test: two thousand callers over real sockets, tokens with a lifetime of one second, faults in one of twenty
//! exchanges with the auth endpoint and the API, revocations, and callers that give up. Reports lost requests and
//! calls.
//!
//! ```text
//! cargo run --release --example soak -- --seconds 60
//! ```

use std::{
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, header::RETRY_AFTER};
use http_body_util::{BodyExt, Full};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use peak_alloc::PeakAlloc;
use tokio::{task::JoinSet, time::sleep};
use tower::{Layer, Service, ServiceExt};
use tower_bearer::{ApiVideo, BearerAuthLayer, BoxError, Error, RetryPolicy, TokenClient, TokenProvider};
use tower_bearer_testing::{AuthServer, Fault, Route};

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

const CALLERS: u64 = 2_000;
/// The pause between two requests of one caller.
const PAUSE: Duration = Duration::from_secs(1);
const LIFETIME: Duration = Duration::from_secs(1);
/// One of this many exchanges of each kind fails.
const ONE_IN: u64 = 20;
/// The time between two revocations: longer than the cool-down after one.
const REVOCATION: Duration = Duration::from_secs(12);

/// The results of the requests.
#[derive(Default)]
struct Tally {
    sent: AtomicU64,
    answered: AtomicU64,
    given_up: AtomicU64,
    /// Failures of the API itself, which a layer cannot repair.
    failed_by_the_api: AtomicU64,
    /// A 401 or an error of this crate, which the layer should prevent.
    lost: AtomicU64,
}

/// Returns a fault: in the response, the connection, or the timing.
fn fault(draw: u64) -> Fault {
    match draw % 8 {
        0 => Fault::Status(StatusCode::SERVICE_UNAVAILABLE),
        // The server's default 429 asks for up to a minute, longer than a token's lifetime.
        1 => Fault::Answer(limited()),
        2 => Fault::Delay(Duration::from_millis(100)),
        3 => Fault::Hang,
        4 => Fault::Reset,
        5 => Fault::LoseAnswer,
        6 => Fault::Truncate,
        _ => Fault::Drip(Duration::from_micros(100)),
    }
}

fn limited() -> Response<Bytes> {
    let mut response = Response::new(Bytes::new());
    *response.status_mut() = StatusCode::TOO_MANY_REQUESTS;
    response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
    response
}

/// A pseudorandom number generator (xorshift64*).
struct Draws(u64);

impl Draws {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }
}

/// Sends one request after another until `until`.
async fn caller<S, B>(number: u64, service: S, server: Arc<AuthServer>, tally: Arc<Tally>, until: Instant)
where
    S: Service<Request<Full<Bytes>>, Response = Response<B>, Error = BoxError> + Clone,
    B: BodyExt<Error: Into<BoxError>>,
{
    let mut draws = Draws(number + 1);
    (0..8).for_each(|_| _ = draws.next());
    sleep(PAUSE.mul_f64((number as f64) / (CALLERS as f64))).await;
    while Instant::now() < until {
        // Without hanging faults, which would only test the caller's timeout.
        let draw = draws.next();
        if draw % ONE_IN == 0 && !matches!(fault(draw / ONE_IN), Fault::Hang) {
            server.inject(Route::Api, fault(draw / ONE_IN));
        }
        let limit = match draws.next() % 10 {
            0 => Duration::from_millis(draws.next() % 30),
            _ => Duration::from_secs(30),
        };
        // With a body to replay. The server discards it, so that it does not affect the memory figures.
        let request = Request::get(format!("{}videos", server.uri())).body(Full::from("body"));
        tally.sent.fetch_add(1, Relaxed);
        let exchange = async {
            let response = service.clone().oneshot(request?).await?;
            let status = response.status();
            response.into_body().collect().await.map_err(Into::into)?;
            Ok::<_, BoxError>(status)
        };
        let end = match tokio::time::timeout(limit, exchange).await {
            Err(_) => &tally.given_up,
            Ok(Ok(status)) if status.is_success() => &tally.answered,
            Ok(Ok(StatusCode::UNAUTHORIZED)) => &tally.lost,
            Ok(Err(error)) if error.is::<Error>() => {
                eprintln!("lost: {error}");
                &tally.lost
            }
            Ok(_) => &tally.failed_by_the_api,
        };
        end.fetch_add(1, Relaxed);
        sleep(PAUSE).await;
    }
}

#[tokio::main]
async fn main() -> Result<ExitCode, BoxError> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let seconds = match &arguments[..] {
        [] => 60,
        [name, value] if name == "--seconds" => value.parse()?,
        _ => {
            eprintln!("usage: soak [--seconds SECONDS]");
            return Ok(ExitCode::from(2));
        }
    };
    let server = Arc::new(AuthServer::builder().token_lifetime(LIFETIME).start().await?);
    // A short timeout, because the endpoint often hangs and tokens are short-lived.
    let client = TokenClient::new().timeout(Duration::from_millis(300));
    let source = ApiVideo::new(server.api_key()).base_url(server.uri()).with_client(client);
    let retry =
        RetryPolicy::new().max_retries(10).backoff(Duration::from_millis(10), Duration::from_millis(200));
    let provider = TokenProvider::builder(source).retry(retry).keep_fresh(true).build()?;
    provider.ready().await?;
    let service = BearerAuthLayer::with_provider(provider.clone())
        .layer(Client::builder(TokioExecutor::new()).build_http());

    println!("{CALLERS} callers for {seconds} s; tokens of {LIFETIME:?}; one of {ONE_IN} exchanges fails");
    // Opens all connections first, so that later growth of memory is not due to them.
    server.inject_always(Route::Api, Fault::Delay(Duration::from_secs(2)));
    let mut warm = JoinSet::new();
    for _ in 0..CALLERS {
        let request = Request::get(format!("{}videos", server.uri())).body(Full::<Bytes>::default())?;
        warm.spawn(service.clone().oneshot(request));
    }
    warm.join_all().await;
    server.clear_faults();

    let (before, tally) = (server.counters(), Arc::new(Tally::default()));
    let until = Instant::now() + Duration::from_secs(seconds);
    let mut callers = JoinSet::new();
    for number in 0..CALLERS {
        callers.spawn(caller(number, service.clone(), Arc::clone(&server), Arc::clone(&tally), until));
    }
    // Injects faults into the auth endpoint per refresh, and revokes all tokens from time to time.
    let trouble = tokio::spawn({
        let (server, mut changes, mut draws) = (Arc::clone(&server), provider.subscribe(), Draws(4711));
        async move {
            let (mut refreshes, mut revoked) = (0, Instant::now());
            while let Some(status) = changes.next().await {
                let draw = draws.next();
                if status.refreshes > refreshes && draw % ONE_IN == 0 {
                    server.inject(Route::RefreshGrant, fault(draw / ONE_IN));
                }
                refreshes = status.refreshes;
                if revoked.elapsed() > REVOCATION {
                    revoked = Instant::now();
                    server.revoke_access_tokens();
                }
            }
        }
    });

    let mut memory = Vec::new();
    while Instant::now() < until {
        sleep(Duration::from_secs(1)).await;
        memory.push(MEMORY.current_usage_as_mb());
    }
    callers.join_all().await;
    provider.shutdown().await;
    drop(service);
    trouble.await?;

    let (status, counters) = (provider.status(), server.counters());
    let posts = counters.api_key_grants
        + counters.refresh_grants
        + counters.rejected_api_keys
        + counters.rejected_refresh_tokens;
    let most = |part: &[f32]| part.iter().copied().fold(0.0, f32::max);
    let (first, second) = memory.split_at(memory.len() / 2);
    let lost = tally.lost.load(Relaxed);
    println!("requests               {}", tally.sent.load(Relaxed));
    println!("answered               {}", tally.answered.load(Relaxed));
    println!("given up by callers    {}", tally.given_up.load(Relaxed));
    println!("failed by the API      {}", tally.failed_by_the_api.load(Relaxed));
    println!("401s retried           {}", counters.challenged - before.challenged);
    println!("lost                   {lost}");
    println!("tokens                 {}", status.generation);
    println!("refreshes, failed      {}, {}", status.refreshes, status.failed_refreshes);
    println!(
        "refreshes per token    {:.2}",
        (status.refreshes - status.failed_refreshes) as f64 / status.generation as f64
    );
    println!(
        "POSTs per token        {:.2}, retries after faults included",
        posts as f64 / status.generation as f64
    );
    println!("faults                 {}", counters.faults - before.faults);
    println!("TCP connections        {}", counters.connections);
    println!(
        "memory, peak           {:.1} MB in the first half, {:.1} MB in the second",
        most(first),
        most(second)
    );
    let flat = most(second) <= most(first) * 1.25;
    let one_refresh_each = status.refreshes == status.generation + status.failed_refreshes;
    Ok(if lost == 0 && one_refresh_each && flat { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
