//! Every fault and every example, with secrets that a search recognizes.
//!
//! The test server's keys, tokens and client secrets start with fixed texts. The tests search for these in Debug and Display of every
//! type of the crate, in whole chains of errors, in the TRACE events of this crate, hyper-util, h2 and rustls, in
//! panics, and in the output of the examples.

#![cfg(all(feature = "tracing", feature = "default-client"))]

mod support;

use std::{
    collections::BTreeMap,
    fmt::{self, Debug, Write as _},
    io::{BufRead, BufReader, Lines, Write as _},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::{Mutex, OnceLock, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty, Full};
use support::chain;
use support::fleet::{Health, MINUTE, MemoryStore};
use tower::{Layer as _, Service, ServiceExt};
use tower_bearer::{
    ApiVideo, BearerAuthLayer, BoxError, OAuth2, RetryPolicy, SourceError, StaticToken, Token, TokenClient,
    TokenProvider, TokenRequest, TokenSource,
    oauth2::{ClientAuth, Server},
    store::TokenStore,
};
use tower_bearer_store::{EncryptedStore, EncryptionKeys};
use tower_bearer_testing::{AuthServer, Fault, Route};
use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
    span,
};
use tracing_subscriber::{Layer, layer::Context, prelude::*};

/// The first characters of the test server's access tokens, refresh tokens, API keys and client secrets.
const SECRETS: [&str; 4] = ["eyJ0eXAiOiJKV1QifQ", "def50200", "test-key-", "test-secret-"];

/// The time limit of an exchange.
const TIMEOUT: Duration = Duration::from_millis(100);

/// The number of texts by printer, and the texts that contained a secret.
#[derive(Default)]
struct Sinks {
    counts: BTreeMap<String, u64>,
    hits: Vec<String>,
}

static SINKS: Mutex<Option<Sinks>> = Mutex::new(None);

/// Records that `whose` printed `text`.
fn printed(whose: &str, text: &str) {
    let mut sinks = SINKS.lock().unwrap_or_else(PoisonError::into_inner);
    let sinks = sinks.get_or_insert_default();
    *sinks.counts.entry(whose.to_owned()).or_default() += 1;
    if SECRETS.iter().any(|secret| text.contains(secret)) {
        sinks.hits.push(format!("{whose}: {text}"));
    }
}

fn shown(value: &dyn Debug) {
    printed("debug", &format!("{value:?} {value:#?}"));
}

/// Collects the events of every crate at every level.
struct Events;

struct Fields(String);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let _ = write!(self.0, " {}={value:?}", field.name());
    }
}

impl<S: Subscriber> Layer<S> for Events {
    fn on_new_span(&self, attributes: &span::Attributes<'_>, _: &span::Id, _: Context<'_, S>) {
        let mut fields = Fields(String::new());
        attributes.record(&mut fields);
        printed(crate_of(attributes.metadata().target()), &fields.0);
    }

    fn on_record(&self, _: &span::Id, values: &span::Record<'_>, _: Context<'_, S>) {
        let mut fields = Fields(String::new());
        values.record(&mut fields);
        printed("recorded", &fields.0);
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut fields = Fields(String::new());
        event.record(&mut fields);
        printed(crate_of(event.metadata().target()), &fields.0);
    }
}

/// Collects the records of `log`, which rustls and others use.
struct Records;

impl log::Log for Records {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        printed(crate_of(record.target()), &record.args().to_string());
    }

    fn flush(&self) {}
}

fn crate_of(target: &str) -> &str {
    target.split("::").next().unwrap_or(target)
}

/// Collects all events, log records and panics of this process from now on.
fn listen() {
    static LISTENING: OnceLock<()> = OnceLock::new();
    LISTENING.get_or_init(|| {
        tracing::subscriber::set_global_default(tracing_subscriber::registry().with(Events)).unwrap();
        log::set_logger(&Records).unwrap();
        log::set_max_level(log::LevelFilter::Trace);
        std::panic::set_hook(Box::new(|info| printed("panic", &info.to_string())));
    });
}

/// Sends a request through the layer and prints its response or its error.
async fn send<S, B>(service: S, server: &AuthServer)
where
    S: Service<Request<Empty<Bytes>>, Response = Response<B>, Error = BoxError> + Debug,
    B: BodyExt<Error: Into<BoxError>> + Debug,
    S::Future: Debug,
{
    shown(&service);
    match service.oneshot(support::get_videos(server)).await {
        Ok(response) => {
            shown(&response);
            // The list of videos, or a challenge.
            let _ = response.into_body().collect().await;
        }
        Err(error) => {
            shown(&error);
            printed("display", &chain(&*error));
        }
    }
}

/// Injects every fault into every route, one after the other, over one kind of connection. The first route is that of the
/// first token.
async fn faults<T, C, B>(server: &AuthServer, source: T, routes: &[Route], client: C)
where
    T: TokenSource + Clone + Debug,
    C: Service<Request<Empty<Bytes>>, Response = Response<B>, Error: Into<BoxError>, Future: Send>
        + Clone
        + Debug
        + Send
        + 'static,
    B: http_body::Body<Error: Into<BoxError>, Data: Send> + Send + Debug + 'static,
{
    let short = Duration::from_millis(1);
    let retry = RetryPolicy::new().backoff(short, short);
    let quoting = |status: StatusCode, content: &str| {
        let body = format!(
            r#"{{"you_sent": "{} {}", "access_token": "{} is{content}", "refresh_token": "def50200", "error": null}}"#,
            server.api_key(),
            server.client_secret(),
            SECRETS[0],
        );
        Fault::Answer(Response::builder().status(status).body(body.into()).unwrap())
    };
    let error = |code: &str| {
        let body = format!(r#"{{"error": "{code}", "error_description": "{}"}}"#, server.client_secret());
        Fault::Answer(Response::builder().status(StatusCode::BAD_REQUEST).body(body.into()).unwrap())
    };
    let faults = [
        Fault::Status(StatusCode::INTERNAL_SERVER_ERROR),
        Fault::Status(StatusCode::UNAUTHORIZED),
        Fault::Status(StatusCode::FOUND),
        Fault::Status(StatusCode::NOT_FOUND),
        quoting(StatusCode::BAD_REQUEST, ""),
        quoting(StatusCode::TOO_MANY_REQUESTS, ""),
        quoting(StatusCode::OK, " no token"),
        quoting(StatusCode::OK, "\\r\\nX: y"),
        error(SECRETS[3]),
        error("invalid_grant"),
        Fault::Answer(Response::new(Bytes::from(format!("{{{}", SECRETS[1])))),
        Fault::Delay(short),
        Fault::Hang,
        Fault::Reset,
        Fault::LoseAnswer,
        Fault::Truncate,
        Fault::Drip(Duration::from_micros(10)),
    ];
    for &route in routes {
        for fault in &faults {
            if route == Route::Api && matches!(fault, Fault::Hang | Fault::Answer(_)) {
                continue;
            }
            shown(&source);
            let builder = TokenProvider::builder(source.clone()).retry(retry).cool_down(short, short);
            let is_login = format!("{source:?}").contains(r#"grant: "refresh_token""#);
            let builder = if is_login { builder.login(server.log_in()) } else { builder };
            shown(&builder);
            let provider = builder.build().unwrap();
            let mut changes = provider.subscribe();
            let layer = BearerAuthLayer::with_provider(provider.clone()).retry(retry);
            shown(&layer);
            let service = layer.layer(client.clone());
            let mut call = service.clone();
            if let Ok(ready) = ServiceExt::<Request<Empty<Bytes>>>::ready(&mut call).await {
                shown(&ready.call(Request::new(Empty::new())));
            }
            if route == routes[0] {
                server.inject(route, fault.clone());
            }
            send(service.clone(), server).await;
            server.inject(route, fault.clone());
            server.revoke_access_tokens();
            send(service.clone(), server).await;
            match provider.token().await {
                Ok(token) => {
                    shown(&(&token, token.header_value(), provider.refresh(&token).await));
                }
                Err(error) => printed("display", &chain(&error)),
            }
            shown(&(provider.status(), changes.next().await, &changes, &provider, server));
            server.clear_faults();
        }
    }
}

/// Uses stores that fail, or whose record cannot be read.
async fn stores(server: &AuthServer, source: ApiVideo) {
    let [access_token, refresh_token, key, _] = SECRETS;
    for (number, text) in (1..).zip([
        format!(r#"{{"schema": 1, "access_token": "{access_token}", "refresh_token": "{refresh_token}"}}"#),
        format!(r#"{{"schema": 2, "access_token": "{access_token}"}}"#),
        format!(r#"{{"schema": 1, "access_token": "{access_token} is no token"}}"#),
        format!("{access_token} {refresh_token} {key}"),
        format!("sealed-1:1:{access_token}"),
        format!("sealed-1:{key}:{access_token}"),
    ]) {
        let store = MemoryStore::default();
        store.put(&text, MINUTE);
        let keys = EncryptionKeys::new("1", &[number; 32]).unwrap();
        let sealed = EncryptedStore::new(store.clone(), keys);
        shown(&(sealed.load().await, store.load().await, store.lease(Duration::ZERO).await));
        let provider = TokenProvider::builder(source.clone()).store(sealed);
        shown(&provider);
        let provider = provider.build().unwrap();
        for health in [Health::Good, Health::Down, Health::ReadOnly, Health::Forgetful, Health::Good] {
            store.set(health);
            let service = BearerAuthLayer::with_provider(provider.clone()).layer(support::http1());
            send(service, server).await;
            server.revoke_access_tokens();
            if let Some(token) = provider.current() {
                shown(&provider.refresh(&token).await);
            }
            shown(&(&provider, store.kept().record));
        }
    }
}

/// A fault makes a secret appear in an error, event, log record, panic or `Debug` output.
#[tokio::test]
async fn no_fault_prints_a_secret() {
    listen();
    let source = |server: &AuthServer| {
        let client = TokenClient::new().timeout(TIMEOUT);
        ApiVideo::new(server.api_key()).base_url(server.uri()).with_client(client)
    };
    let routes = [Route::ApiKeyGrant, Route::RefreshGrant, Route::Api];
    let server = AuthServer::start().await.unwrap();
    faults(&server, source(&server), &routes, support::http1()).await;
    faults(
        &server,
        source(&server).with_client(TokenClient::with_service(support::http2()).timeout(TIMEOUT)),
        &routes,
        support::http2(),
    )
    .await;
    let server = AuthServer::builder().tls(true).start().await.unwrap();
    let certificate = server.certificate().unwrap().to_vec();
    let trusting =
        source(&server).with_client(TokenClient::with_service(support::https(&certificate)).timeout(TIMEOUT));
    faults(&server, trusting, &routes, support::https(&certificate)).await;
    // A certificate that the client does not trust.
    faults(&server, source(&server), &routes, support::https(&certificate)).await;
    let server = AuthServer::start().await.unwrap();
    stores(&server, source(&server)).await;

    let routes = [Route::OAuthToken, Route::Metadata, Route::Api];
    let issuer = || Server::issuer(server.issuer());
    let client = |id: String| ClientAuth::basic(id, server.client_secret());
    let grants = [
        OAuth2::client_credentials(issuer(), client(server.client_id())),
        OAuth2::client_credentials(issuer(), ClientAuth::post("another", server.client_secret())),
        OAuth2::login(issuer(), client(server.client_id())),
        OAuth2::token_exchange(issuer(), client(server.client_id()), StaticToken::new(SECRETS[0])),
    ];
    for source in grants {
        source.set_secret(server.client_secret());
        let client = TokenClient::new().timeout(TIMEOUT);
        faults(&server, source.parameter("x", SECRETS[3]).with_client(client), &routes, support::http1())
            .await;
    }

    struct Panics;

    impl TokenSource for Panics {
        async fn fetch(&self, _: &TokenRequest<'_>) -> Result<Token, SourceError> {
            let _token = Token::builder(SECRETS[0]).refresh_token(SECRETS[1]).build()?;
            panic!("the source's own")
        }
    }
    let error = TokenProvider::new(Panics).token().await.unwrap_err();
    printed("display", &chain(&error));

    let sinks = SINKS.lock().unwrap().take().unwrap();
    assert!(sinks.hits.is_empty(), "{:#?}", &sinks.hits[..sinks.hits.len().min(5)]);
    // Every printer printed something.
    for whose in ["debug", "display", "panic", "tower_bearer", "hyper_util", "h2", "rustls"] {
        assert!(sinks.counts.get(whose).is_some_and(|count| *count > 0), "{whose} in {:?}", sinks.counts);
    }
    // The search would have found a secret.
    tracing::info!(secret = SECRETS[0]);
    log::info!("{}", SECRETS[1]);
    shown(&SECRETS[2]);
    printed("display", SECRETS[3]);
    assert_eq!(SINKS.lock().unwrap().take().unwrap().hits.len(), 4);
}

/// An example prints a secret.
#[test]
fn no_example_prints_a_secret() {
    for example in ["quickstart", "observe", "upload", "delegated_upload", "tenants"] {
        let output = support::cargo()
            .args(["run", "--quiet", "--example", example])
            .env_remove("API_VIDEO_KEY")
            .output()
            .unwrap();
        assert!(output.status.success(), "{example}: {}", Lossy(&output.stderr));
        let text = format!("{}{}", Lossy(&output.stdout), Lossy(&output.stderr));
        assert!(text.len() > 100, "{example} says nothing");
        assert!(!SECRETS.iter().any(|secret| text.contains(secret)), "{example}: {text}");
    }
}

/// A running `auth_server` example, which is killed at the end.
struct Program {
    child: Child,
    input: Option<ChildStdin>,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Program {
    /// Starts the example. Cargo has built it before, so that the program can be killed instead of cargo.
    fn start() -> Self {
        let build = ["build", "--quiet", "--example", "auth_server", "--message-format", "json"];
        let output = support::cargo().args(build).output().unwrap();
        assert!(output.status.success(), "{}", Lossy(&output.stderr));
        let messages = Lossy(&output.stdout).to_string();
        let program = messages
            .lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
            .filter(|message| message["target"]["name"] == "auth_server")
            .find_map(|message| message["executable"].as_str().map(str::to_owned))
            .unwrap();
        let mut command = Command::new(program);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { input: child.stdin.take(), child, lines }
    }

    fn line(&mut self) -> String {
        self.lines.next().unwrap().unwrap()
    }

    /// Returns the text after a label, in the next line.
    fn labelled(&mut self, label: &str) -> String {
        let line = self.line();
        line.strip_prefix(label).unwrap_or_else(|| panic!("{line}")).trim().to_owned()
    }

    /// Runs a command. Returns the line that it prints.
    fn run(&mut self, command: &str) -> String {
        writeln!(self.input.as_ref().unwrap(), "{command}").unwrap();
        self.line()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The program `auth_server` ignores a command, or its log has a token.
#[tokio::test]
async fn auth_server_obeys_and_logs_no_token() {
    let mut program = Program::start();
    let uri = program.labelled("listening on ");
    let api_key = program.labelled("API key ");
    for label in ["OAuth 2.0 ", "client ID ", "secret "] {
        program.labelled(label);
    }
    let login = program.labelled("login ");
    program.labelled("commands ");

    let http = support::http1();
    let send = |request: http::request::Builder, body: String| {
        http.clone().oneshot(request.body(Full::<Bytes>::from(body)).unwrap())
    };
    let get = |token: &str| {
        let request = Request::get(format!("{uri}/videos?title=night"));
        let sent = send(request.header("authorization", format!("Bearer {token}")), String::new());
        async { sent.await.map(|response| response.status()) }
    };
    let request = Request::post(format!("{uri}/auth/api-key"));
    let granted = send(request, format!(r#"{{"apiKey": "{api_key}"}}"#)).await.unwrap();
    let granted = granted.into_body().collect().await.unwrap().to_bytes();
    let granted: serde_json::Value = serde_json::from_slice(&granted).unwrap();
    let token = granted["access_token"].as_str().unwrap();
    assert_eq!(program.line(), "POST /auth/api-key 200");
    assert_eq!(get(token).await.unwrap(), StatusCode::OK);
    assert_eq!(program.line(), "GET /videos 200");

    assert_eq!(program.run("fault api 503"), "503 at the next request to api");
    assert_eq!(get(token).await.unwrap(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(program.line(), "GET /videos 503");
    assert_eq!(program.run("fault api reset always"), "reset at every request to api");
    assert!(get(token).await.is_err());
    assert_eq!(program.line(), "GET /videos lost");
    assert_eq!(program.run("clear"), "all faults are removed");
    assert!(program.run("fault api 99").starts_with("KIND must be a status from 200 to 999"));
    assert!(program.run("fault videos reset").starts_with("ROUTE must be "));
    assert_eq!(program.run("obey"), "unknown command: obey; `help` lists the commands");

    assert_eq!(program.run("revoke"), "all access tokens are revoked");
    assert_eq!(get(token).await.unwrap(), StatusCode::UNAUTHORIZED);
    assert_eq!(program.line(), "GET /videos 401");
    let other = program.run("login").split_off("login        ".len());
    assert!(other.starts_with(SECRETS[1]) && other != login);
    assert_eq!(program.run("logout"), "all logins have ended");

    // The end of standard input does not end the program.
    program.input = None;
    assert_eq!(get(token).await.unwrap(), StatusCode::UNAUTHORIZED);
    assert_eq!(program.line(), "GET /videos 401");
}

struct Lossy<'a>(&'a [u8]);

impl fmt::Display for Lossy<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(self.0))
    }
}
