//! An hour in the life of a provider, on a fast clock: expiry, an outage, a revocation, a refused key, a lost answer. What
//! is told of it (`status` and the `tracing` events) stands beside what is done to it.
//!
//! ```text
//! cargo run --example observe
//! ```
//!
//! The sockets are real, and so is the server; only the clock is not: it is stepped by seconds.

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
use tower_bearer::{
    ApiVideo, BearerAuthLayer, BoxError, TokenProvider,
    testing::{AuthServer, Fault, Route},
};
use tower_layer::Layer as _;
use tracing::{Event, Subscriber, field::Field};
use tracing_subscriber::{Layer, layer::Context, prelude::*};

const MINUTE: u64 = 60;

/// An event of one kind is shown this often within one chapter of the script.
const SHOWN: usize = 3;

/// What was told since it was last asked for.
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

/// What happens at a minute of the hour.
struct Chapter {
    minute: u64,
    what: &'static str,
    happens: fn(&AuthServer, &ApiVideo),
}

const NEW_KEY: &str = "the-key-that-came-after";

const SCRIPT: [Chapter; 8] = [
    Chapter { minute: 0, what: "a token lives 15 minutes; a request each second", happens: |_, _| () },
    Chapter {
        minute: 25,
        what: "the auth endpoint is down",
        happens: |server, _| {
            for route in [Route::RefreshGrant, Route::ApiKeyGrant] {
                server.inject_always(route, Fault::Status(StatusCode::SERVICE_UNAVAILABLE));
            }
        },
    },
    Chapter { minute: 28, what: "it is up again", happens: |server, _| server.clear_faults() },
    Chapter {
        minute: 35,
        what: "every access token is revoked",
        happens: |server, _| server.revoke_access_tokens(),
    },
    Chapter {
        minute: 40,
        what: "the account has another key: nothing that the provider holds is of use any more",
        happens: |server, _| {
            server.set_api_key(NEW_KEY);
            server.revoke_refresh_token();
            server.revoke_access_tokens();
        },
    },
    Chapter { minute: 42, what: "the provider is told of it", happens: |_, source| source.set_key(NEW_KEY) },
    Chapter {
        minute: 50,
        what: "the answer to the next refresh will be lost, and the refresh token with it",
        happens: |server, _| server.inject(Route::RefreshGrant, Fault::LoseAnswer),
    },
    Chapter { minute: 59, what: "nothing more is done", happens: |_, _| () },
];

/// Answers since the last line, by what they were.
#[derive(Default)]
struct Answers(BTreeMap<String, u64>);

impl fmt::Display for Answers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts: Vec<_> = self.0.iter().map(|(answer, count)| format!("{count} × {answer}")).collect();
        f.write_str(&counts.join(", "))
    }
}

fn clock(elapsed: Duration) -> String {
    format!("{:02}:{:02}", elapsed.as_secs() / 60, elapsed.as_secs() % 60)
}

fn main() -> Result<ExitCode, BoxError> {
    let told = Logged::default();
    tracing::subscriber::set_global_default(tracing_subscriber::registry().with(told.clone()))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build()?;
    runtime.block_on(async {
        // While a blocking task runs, a paused clock is only moved by hand, and sockets are waited for in real time.
        let (done, wait) = std::sync::mpsc::channel::<()>();
        let holding = tokio::task::spawn_blocking(move || wait.recv());
        let outcome = hour(&told).await;
        drop(done);
        let _ = holding.await;
        outcome
    })
}

async fn hour(told: &Logged) -> Result<ExitCode, BoxError> {
    let server = AuthServer::builder().token_lifetime(Duration::from_secs(15 * MINUTE)).start().await?;
    let source = ApiVideo::new(server.api_key()).base_url(server.uri());
    let provider = TokenProvider::new(source.clone());
    let client = Client::builder(TokioExecutor::new()).build_http();
    let mut service = BearerAuthLayer::with_provider(provider.clone()).layer(client);

    println!("{:<6} {:<24} what happens, and what is told of it", "clock", "token");
    let begun = Instant::now();
    let (mut script, mut shown) = (SCRIPT.iter().peekable(), BTreeMap::<String, usize>::new());
    let (mut answers, mut all) = (Answers::default(), Answers::default());
    let mut unhealed_elsewhere = 0;
    while begun.elapsed().as_secs() < 60 * MINUTE {
        let minute = begun.elapsed().as_secs() / 60;
        if let Some(chapter) = script.next_if(|chapter| chapter.minute == minute) {
            let more: usize = shown.values().map(|count| count.saturating_sub(SHOWN)).sum();
            if more > 0 {
                println!("{:31} … and {more} events more of these kinds", "");
            }
            if !answers.0.is_empty() {
                println!("{:31} answers: {answers}", "");
            }
            println!("{:-<32}- {}", format!("{} ", clock(begun.elapsed())), chapter.what);
            (chapter.happens)(&server, &source);
            shown.clear();
            answers.0.clear();
        }

        let request = Request::get(format!("{}videos", server.uri())).body(Empty::<Bytes>::new())?;
        let answer = match send(&mut service, request).await {
            Ok(status) => status.to_string(),
            Err(error) => error.to_string(),
        };
        unhealed_elsewhere += u64::from(!answer.starts_with("200") && !(40..42).contains(&minute));
        for count in [&mut answers, &mut all] {
            *count.0.entry(answer.clone()).or_default() += 1;
        }

        for line in told.lines().drain(..) {
            // Without its figures, an event is of the kind of others.
            let kind: String = line.chars().filter(|character| !character.is_ascii_digit()).collect();
            let times = shown.entry(kind.split('=').next().unwrap_or_default().to_owned()).or_default();
            *times += 1;
            if *times <= SHOWN {
                let status = provider.status();
                let left = status.remaining.map_or("-".to_owned(), clock);
                let token = format!("{} {:?}, {left} left", status.generation, status.freshness);
                println!("{:<6} {token:<24} {line}", clock(begun.elapsed()));
            }
        }
        advance(Duration::from_secs(1)).await;
    }
    provider.shutdown().await;

    let counters = server.counters();
    println!("{:-<32}- the hour is over\n", format!("{} ", clock(begun.elapsed())));
    println!("answers of the hour  {all}");
    println!("POST /auth/api-key   {}", counters.api_key_grants + counters.rejected_api_keys);
    println!("POST /auth/refresh   {}", counters.refresh_grants + counters.rejected_refresh_tokens);
    println!("answered by a fault  {}", counters.faults);
    println!("not 200, but while the key was another  {unhealed_elsewhere}");
    let recovered = provider.status().last_error.is_none() && provider.current().is_some();
    Ok(if unhealed_elsewhere == 0 && recovered { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Sends a request; the clock moves on while it waits, so that timers do not hold it up for ever.
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

/// Gives sockets and tasks real time to come as far as they do without the clock.
async fn settled() {
    let begun = std::time::Instant::now();
    while begun.elapsed() < Duration::from_millis(20) {
        tokio::task::yield_now().await;
    }
}
