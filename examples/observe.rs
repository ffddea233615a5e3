//! Shows the status and the `tracing` events of a provider during an hour of expiries, an outage, a revocation, a
//! rejected key and a lost response.
//!
//! ```text
//! cargo run --example observe
//! ```
//!
//! The server and its sockets are real. The clock is virtual and advances by one second per request, so that the hour
//! takes about half a minute.

use std::{
    collections::BTreeMap,
    fmt,
    process::ExitCode,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tokio::time::{Instant, advance};
use tower::{Service, ServiceExt};
use tower_bearer::{ApiVideo, BearerAuthLayer, BoxError, TokenProvider};
use tower_bearer_testing::{AuthServer, Fault, Route};
use tower_layer::Layer as _;
use tracing::{Event, Subscriber, field::Field};
use tracing_subscriber::{Layer, layer::Context, prelude::*};

const MINUTE: u64 = 60;

/// How many events of one kind are printed per step of the script.
const MAX_SHOWN: usize = 3;

/// The events that are not printed yet.
#[derive(Clone, Default)]
struct Logged(Arc<Mutex<Vec<String>>>);

impl Logged {
    fn lines(&self) -> MutexGuard<'_, Vec<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S: Subscriber> Layer<S> for Logged {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        if event.metadata().target() == "tower_bearer" {
            let (mut message, mut fields) = (String::new(), String::new());
            event.record(&mut |field: &Field, value: &dyn fmt::Debug| match field.name() {
                "message" => message = format!("{value:?}"),
                "provider" => {}
                name => fields += &format!(" {name}={value:?}"),
            });
            self.lines().push(format!("{:5} {message}{fields}", event.metadata().level()));
        }
    }
}

/// A change at the start of a minute.
struct Step {
    minute: u64,
    description: &'static str,
    apply: fn(&AuthServer, &ApiVideo),
}

const NEW_KEY: &str = "the-new-key";

const SCRIPT: [Step; 8] = [
    Step {
        minute: 0,
        description: "tokens expire after 15 minutes; one request per second",
        apply: |_, _| (),
    },
    Step {
        minute: 25,
        description: "the auth endpoint is down",
        apply: |server, _| {
            for route in [Route::RefreshGrant, Route::ApiKeyGrant] {
                server.inject_always(route, Fault::Status(StatusCode::SERVICE_UNAVAILABLE));
            }
        },
    },
    Step {
        minute: 28,
        description: "the auth endpoint is up again",
        apply: |server, _| server.clear_faults(),
    },
    Step {
        minute: 35,
        description: "every access token is revoked",
        apply: |server, _| server.revoke_access_tokens(),
    },
    Step {
        minute: 40,
        description: "the account gets a new key; the old key and all tokens are revoked",
        apply: |server, _| {
            server.set_api_key(NEW_KEY);
            server.revoke_refresh_token();
            server.revoke_access_tokens();
        },
    },
    Step {
        minute: 42,
        description: "the provider gets the new key",
        apply: |_, source| source.set_key(NEW_KEY),
    },
    Step {
        minute: 50,
        description: "the response to the next refresh is lost, and with it the new refresh token",
        apply: |server, _| server.inject(Route::RefreshGrant, Fault::LoseAnswer),
    },
    Step { minute: 59, description: "no further changes", apply: |_, _| () },
];

/// The number of outcomes of each kind.
#[derive(Default)]
struct Outcomes(BTreeMap<String, u64>);

impl fmt::Display for Outcomes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts: Vec<_> = self.0.iter().map(|(outcome, count)| format!("{count} × {outcome}")).collect();
        f.write_str(&counts.join(", "))
    }
}

fn clock(elapsed: Duration) -> String {
    format!("{:02}:{:02}", elapsed.as_secs() / 60, elapsed.as_secs() % 60)
}

fn main() -> Result<ExitCode, BoxError> {
    let logged = Logged::default();
    tracing::subscriber::set_global_default(tracing_subscriber::registry().with(logged.clone()))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build()?;
    runtime.block_on(async {
        // While a blocking task runs, tokio does not advance the paused clock by itself. Sockets then have real time.
        let (done, wait) = std::sync::mpsc::channel::<()>();
        let blocking = tokio::task::spawn_blocking(move || wait.recv());
        let outcome = run(&logged).await;
        drop(done);
        let _ = blocking.await;
        outcome
    })
}

async fn run(logged: &Logged) -> Result<ExitCode, BoxError> {
    let server = AuthServer::builder().token_lifetime(Duration::from_secs(15 * MINUTE)).start().await?;
    let source = ApiVideo::new(server.api_key()).base_url(server.uri());
    let provider = TokenProvider::new(source.clone());
    let client = Client::builder(TokioExecutor::new()).build_http();
    let mut service = BearerAuthLayer::with_provider(provider.clone()).layer(client);

    println!("{:<6} {:<24} changes and events", "clock", "token");
    let start = Instant::now();
    let (mut script, mut shown) = (SCRIPT.iter().peekable(), BTreeMap::<String, usize>::new());
    let (mut outcomes, mut all) = (Outcomes::default(), Outcomes::default());
    let mut unexpected_failures = 0;
    while start.elapsed().as_secs() < 60 * MINUTE {
        let minute = start.elapsed().as_secs() / 60;
        if let Some(step) = script.next_if(|step| step.minute == minute) {
            let hidden: usize = shown.values().map(|count| count.saturating_sub(MAX_SHOWN)).sum();
            if hidden > 0 {
                println!("{:31} … and {hidden} more events of these kinds", "");
            }
            if !outcomes.0.is_empty() {
                println!("{:31} outcomes: {outcomes}", "");
            }
            println!("{:-<32}- {}", format!("{} ", clock(start.elapsed())), step.description);
            (step.apply)(&server, &source);
            shown.clear();
            outcomes.0.clear();
        }

        let request = Request::get(format!("{}videos", server.uri())).body(Empty::<Bytes>::new())?;
        let outcome = match send(&mut service, request).await {
            Ok(status) => status.to_string(),
            Err(error) => error.to_string(),
        };
        unexpected_failures += u64::from(!outcome.starts_with("200") && !(40..42).contains(&minute));
        for count in [&mut outcomes, &mut all] {
            *count.0.entry(outcome.clone()).or_default() += 1;
        }

        for line in logged.lines().drain(..) {
            // Events whose text differs only in numbers are of one kind.
            let kind: String = line.chars().filter(|character| !character.is_ascii_digit()).collect();
            let times = shown.entry(kind.split('=').next().unwrap_or_default().to_owned()).or_default();
            *times += 1;
            if *times <= MAX_SHOWN {
                let status = provider.status();
                let left = status.remaining.map_or("-".to_owned(), clock);
                let token = format!("{} {:?}, {left} left", status.generation, status.freshness);
                println!("{:<6} {token:<24} {line}", clock(start.elapsed()));
            }
        }
        advance(Duration::from_secs(1)).await;
    }
    provider.shutdown().await;

    let counters = server.counters();
    println!("{:-<32}- end\n", format!("{} ", clock(start.elapsed())));
    println!("outcomes                         {all}");
    println!("POST /auth/api-key               {}", counters.api_key_grants + counters.rejected_api_keys);
    println!(
        "POST /auth/refresh               {}",
        counters.refresh_grants + counters.rejected_refresh_tokens
    );
    println!("responses changed by a fault     {}", counters.faults);
    println!("failures while the key was valid {unexpected_failures}");
    let recovered = provider.status().last_error.is_none() && provider.current().is_some();
    Ok(if unexpected_failures == 0 && recovered { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Sends a request, and advances the clock while it waits, so that timers fire.
async fn send<S, B>(service: &mut S, request: Request<Empty<Bytes>>) -> Result<StatusCode, BoxError>
where
    S: Service<Request<Empty<Bytes>>, Response = http::Response<B>, Error = BoxError>,
    B: BodyExt<Error: Into<BoxError>>,
{
    let exchange = async {
        let response = service.ready().await?.call(request).await?;
        let status = response.status();
        response.into_body().collect().await.map_err(Into::into)?;
        Ok(status)
    };
    tokio::pin!(exchange);
    loop {
        tokio::select! {
            biased;
            outcome = &mut exchange => return outcome,
            () = settled() => advance(Duration::from_millis(100)).await,
        }
    }
}

/// Gives tasks and sockets 20 ms of real time.
async fn settled() {
    let start = std::time::Instant::now();
    while start.elapsed() < Duration::from_millis(20) {
        tokio::task::yield_now().await;
    }
}
