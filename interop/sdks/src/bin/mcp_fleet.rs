//! Many processes of a small command-line tool share one login. Processes are killed (`SIGKILL`) at random.
//!
//! ```text
//! cargo run --manifest-path interop/sdks/Cargo.toml --bin mcp_fleet     # --brief: about 10 s
//! ```
//!
//! Each process calls a tool of an MCP server, with the client of the page `guide::mcp` and a token from one `FileStore`.
//! All servers are on loopback. The program kills only processes that it has started.

use std::{
    collections::{HashMap, HashSet},
    env, fmt, fs,
    hash::{BuildHasher, RandomState},
    io,
    path::{Path, PathBuf},
    process::{ExitCode, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use futures_core::stream::BoxStream;
use http::{HeaderName, HeaderValue};
use reqwest::redirect::Policy;
use rmcp::{
    RoleClient, ServiceExt,
    model::{CallToolRequestParams, ClientJsonRpcMessage},
    service::RunningService,
    transport::streamable_http_client::{
        SseError, StreamableHttpClient, StreamableHttpClientTransport, StreamableHttpClientTransportConfig,
        StreamableHttpError, StreamableHttpPostResponse,
    },
};
use sse_stream::Sse;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
    sync::Notify,
    task::JoinSet,
    time::{Instant, interval, timeout},
};
use tower_bearer::{
    BoxError, Error, OAuth2, RefreshAhead, SourceErrorKind, Token, TokenProvider, TokenProviderBuilder,
    oauth2::{ClientAuth, Server},
};
use tower_bearer_store::FileStore;
use tower_bearer_testing::{AuthServer, Fault, Route};

const PROCESSES: usize = 16;
const CLIENT_ID: &str = "mcp-fleet";
const LIFETIME: Duration = Duration::from_secs(2);
const LEASE: Duration = Duration::from_secs(1);
/// The mean time between two kills.
const KILL_EVERY: u64 = 150;
/// How long the server accepts a spent refresh token: more than five seconds longer than a lease.
const GRACE: Duration = Duration::from_secs(30);

include!("../mcp_client.rs");

/// The argument that makes this program one process of the tool.
const WORKER: &str = "--worker";

fn provider(issuer: &str, mcp: &str, state: &Path) -> TokenProviderBuilder<OAuth2> {
    let server = Server::token_endpoint(format!("{issuer}/oauth/token"));
    let source = OAuth2::login(server, ClientAuth::public(CLIENT_ID)).resources([mcp]);
    let cool_down = Duration::from_millis(200);
    TokenProvider::builder(source)
        .store(FileStore::new(state))
        .lease(LEASE)
        .refresh_ahead(RefreshAhead::new().share(0.4))
        .cool_down(cool_down, 5 * cool_down)
}

fn is_lost<T>(result: &std::result::Result<T, Error>) -> bool {
    matches!(result, Err(Error::Source(error)) if error.kind() == SourceErrorKind::LoginRequired)
}

/// Calls the tool until the process is killed. Prints a line per call.
async fn work(issuer: &str, mcp: &str, state: &Path) -> std::result::Result<(), BoxError> {
    tower_bearer_sdks::install_cryptography();
    let client = reqwest::Client::builder().redirect(Policy::none()).pool_max_idle_per_host(0);
    let client = client.no_proxy().build()?;
    let client = WithToken { client, provider: provider(issuer, mcp, state).build()? };
    let mut session: Option<RunningService<RoleClient, ()>> = None;
    let mut ticks = interval(Duration::from_millis(100));
    loop {
        ticks.tick().await;
        let started = Instant::now();
        let call = async {
            if session.is_none() {
                let config = StreamableHttpClientTransportConfig::with_uri(mcp);
                let transport = StreamableHttpClientTransport::with_client(client.clone(), config);
                session = Some(().serve(transport).await?);
            }
            let session = session.as_ref().ok_or("no session")?;
            Ok::<_, BoxError>(session.call_tool(CallToolRequestParams::new("film")).await?)
        };
        let result = call.await;
        let elapsed = started.elapsed().as_millis();
        match (result, client.provider.token().await) {
            // A hash, because the token is a secret.
            (Ok(_), Ok(token)) => println!("ok {elapsed} {:x}", fnv(token.access_token())),
            (Ok(_), Err(_)) => println!("ok {elapsed}"),
            (Err(error), token) => {
                session = None;
                let outcome = if is_lost(&token) { "lost" } else { "failed" };
                if outcome == "failed" {
                    eprintln!("process {}: {error}", std::process::id());
                }
                println!("{outcome} {elapsed}");
            }
        }
    }
}

fn fnv(text: &str) -> u64 {
    text.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// What the processes have reported.
#[derive(Default)]
struct Heard {
    /// Hashes of the access tokens that a process has used.
    tokens: Mutex<HashSet<String>>,
    kills: AtomicU64,
    calls: AtomicU64,
    failed: AtomicU64,
    /// The longest call, in milliseconds.
    slowest: AtomicU64,
    login_lost: Notify,
    ended: AtomicBool,
}

/// Keeps one process running, and kills it whenever `kill` is notified.
async fn keep_running(start: impl Fn() -> io::Result<Child>, kill: Arc<Notify>, heard: Arc<Heard>) {
    while !heard.ended.load(Relaxed) {
        let mut child = start().expect("a process");
        let mut lines = BufReader::new(child.stdout.take().expect("its output")).lines();
        let mut killed = false;
        loop {
            let line = tokio::select! {
                line = lines.next_line() => line,
                () = kill.notified(), if !killed => {
                    killed = true;
                    heard.kills.fetch_add(1, Relaxed);
                    let _ = child.start_kill();
                    continue;
                }
            };
            let Ok(Some(line)) = line else { break };
            let mut words = line.split(' ');
            let outcome = words.next();
            heard.calls.fetch_add(1, Relaxed);
            heard.failed.fetch_add(u64::from(outcome != Some("ok")), Relaxed);
            let elapsed = words.next().and_then(|elapsed| elapsed.parse().ok());
            heard.slowest.fetch_max(elapsed.unwrap_or_default(), Relaxed);
            if let Some(token) = words.next() {
                heard.tokens.lock().unwrap_or_else(PoisonError::into_inner).insert(token.to_owned());
            }
            if outcome == Some("lost") {
                heard.login_lost.notify_one();
            }
        }
        let _ = child.wait().await;
    }
}

fn random(below: u64) -> u64 {
    RandomState::new().hash_one(0) % below
}

struct Row {
    grace: Duration,
    rotations: u64,
    kills: u64,
    unused: u64,
    reused: u64,
    logins_lost: u64,
    calls: u64,
    failed: u64,
    slowest: Duration,
}

const HEAD: &str = "\
| grace period | processes | rotations | kills | tokens issued and never used | reuse seen by the server | logins lost | calls | calls that failed | slowest call |
|---|---|---|---|---|---|---|---|---|---|";

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { grace, rotations, kills, unused, reused, logins_lost, calls, failed, slowest } = self;
        write!(
            f,
            "| {} s | {PROCESSES} | {rotations} | {kills} | {unused} | {reused} | {logins_lost} | {calls} | {failed} | {:.1} s |",
            grace.as_secs(),
            slowest.as_secs_f64()
        )
    }
}

/// Runs until `rotations` access tokens were used. Returns the row for the table.
async fn run(grace: Duration, rotations: usize, state: PathBuf) -> std::result::Result<Row, BoxError> {
    let server = AuthServer::builder()
        .client(CLIENT_ID, "unused")
        .token_lifetime(LIFETIME)
        .refresh_token_grace(grace)
        .start()
        .await?;
    // The response to an exchange takes a millisecond per byte, after the server has spent the refresh token.
    server.inject_always(Route::OAuthToken, Fault::Drip(Duration::from_millis(1)));
    let (issuer, mcp) = (server.issuer(), tower_bearer_sdks::mcp_server(server.issuer()).await);
    let login = provider(&issuer, &mcp, &state).login(server.log_in()).build()?;
    login.ready().await?;

    let heard = Arc::new(Heard::default());
    let mut running = JoinSet::new();
    let kills: Vec<_> = (0..PROCESSES).map(|_| Arc::new(Notify::new())).collect();
    for kill in &kills {
        let (program, args) = (env::current_exe()?, [WORKER.to_owned(), issuer.clone(), mcp.clone()]);
        let state = state.clone();
        let start = move || {
            let mut command = Command::new(&program);
            command
                .args(&args)
                .arg(&state)
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .kill_on_drop(true)
                .spawn()
        };
        running.spawn(keep_running(start, Arc::clone(kill), Arc::clone(&heard)));
    }

    let mut logins_lost = 0;
    let deadline = Instant::now() + 10 * LIFETIME * u32::try_from(rotations)?;
    while heard.tokens.lock().unwrap_or_else(PoisonError::into_inner).len() < rotations {
        assert!(Instant::now() < deadline, "the tokens do not rotate");
        let until_kill = Duration::from_millis(random(2 * KILL_EVERY));
        if timeout(until_kill, heard.login_lost.notified()).await.is_err() {
            kills[random(PROCESSES as u64) as usize].notify_one();
        } else if is_lost(&login.token().await) {
            logins_lost += 1;
            login.log_in(server.log_in());
            login.ready().await?;
        }
    }
    heard.ended.store(true, Relaxed);
    running.shutdown().await;

    let counters = server.counters();
    let used = heard.tokens.lock().unwrap_or_else(PoisonError::into_inner).len() as u64;
    Ok(Row {
        grace,
        rotations: used,
        kills: heard.kills.load(Relaxed),
        unused: counters.oauth_refresh_grants.saturating_sub(used),
        reused: counters.reused_refresh_tokens,
        logins_lost,
        calls: heard.calls.load(Relaxed),
        failed: heard.failed.load(Relaxed),
        slowest: Duration::from_millis(heard.slowest.load(Relaxed)),
    })
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> std::result::Result<ExitCode, BoxError> {
    let args: Vec<_> = env::args().skip(1).collect();
    let args: Vec<_> = args.iter().map(String::as_str).collect();
    let (graces, rotations) = match args[..] {
        [WORKER, issuer, mcp, state] => {
            work(issuer, mcp, Path::new(state)).await?;
            return Ok(ExitCode::SUCCESS);
        }
        ["--brief"] => (&[GRACE][..], 6),
        [] => (&[GRACE, Duration::ZERO][..], 100),
        _ => return Err("the only option is --brief".into()),
    };
    let folder = env::temp_dir().join(format!("mcp-fleet-{}", std::process::id()));
    let mut is_good = true;
    println!("{HEAD}");
    for grace in graces {
        let row = run(*grace, rotations, folder.join(format!("login-{}", grace.as_secs()))).await?;
        println!("{row}");
        // Without a grace period, a process that is killed with the answer to its exchange costs the login.
        is_good &= grace.is_zero() || (row.reused, row.logins_lost, row.failed) == (0, 0, 0);
    }
    fs::remove_dir_all(folder)?;
    Ok(if is_good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
