//! A process of the fleet. It sends one request after another with the shared token, and reports the results.

use std::{
    collections::HashMap,
    env,
    io::Write,
    process::Stdio,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode, Uri, header::AUTHORIZATION};
use http_body_util::{BodyExt, Empty};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use rustix::process::{Signal, getpid, kill_process};
use tokio::{
    process::{Child, Command},
    time::{Instant, interval, sleep},
};
use tower::{Layer, ServiceExt, service_fn};
use tower_bearer::{
    ApiVideo, BearerAuthLayer, BoxError, Credential, RefreshAhead, SourceError, Token, TokenProvider,
    TokenProviderBuilder, TokenRequest, TokenSource,
    store::{Role, TokenStore},
};
use tower_bearer_store::{FileStore, RedisStore};
use tower_bearer_testing::AuthServer;

/// The environment variable that makes this program a worker, and names its store.
const STORE: &str = "FLEET_STORE";

/// The parameters of a worker.
#[derive(Clone)]
pub struct Job {
    /// A Redis URL, or the path of a file.
    pub store: String,
    pub server: Uri,
    pub api_key: String,
    pub role: Role,
    /// The percentage of POSTs at which the process is killed or stopped.
    pub mishaps: u64,
    pub lease: Duration,
}

impl Job {
    /// Starts this program again, as a worker.
    pub fn start(&self) -> Result<Child, BoxError> {
        let role = match self.role {
            Role::Publisher => "publisher",
            Role::Reader => "reader",
            _ => "member",
        };
        // A reader does not get the key.
        let api_key = if self.role == Role::Reader { "" } else { &self.api_key };
        Ok(Command::new(env::current_exe()?)
            .env(STORE, &self.store)
            .env("FLEET_SERVER", self.server.to_string())
            .env("FLEET_KEY", api_key)
            .env("FLEET_ROLE", role)
            .env("FLEET_MISHAPS", self.mishaps.to_string())
            .env("FLEET_LEASE", self.lease.as_millis().to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?)
    }
}

/// The counts of a worker so far. It prints them as one line after each request.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    pub sent: u64,
    pub answered: u64,
    pub lost: u64,
    /// The number of calls to the auth endpoint.
    pub asked: u64,
    /// The number of tokens that it has had.
    pub tokens: u64,
    /// Requests with an expired token that the crate could have prevented: see [`Expiries::is_counted`].
    pub expired: u64,
}

impl Tally {
    pub fn parse(line: &str) -> Option<Self> {
        let mut numbers = line.split(' ').map_while(|number| number.parse().ok());
        let mut next = || numbers.next();
        Some(Self {
            sent: next()?,
            answered: next()?,
            lost: next()?,
            asked: next()?,
            tokens: next()?,
            expired: next()?,
        })
    }
}

/// Returns the number of calls to the auth endpoint.
pub fn posts(server: &AuthServer) -> u64 {
    let counters = server.counters();
    counters.refresh_grants + counters.rejected_refresh_tokens + counters.api_key_grants
}

/// The number of times that this process was stopped.
static STOPS: AtomicU64 = AtomicU64::new(0);

static EXPIRED: AtomicU64 = AtomicU64::new(0);

/// The line that a worker prints before it stops itself. Its parent must resume it.
pub const STOPPING: &str = "stopping";

/// Runs the worker if this process is one. Returns whether it was.
pub async fn run_if_worker() -> Result<bool, BoxError> {
    let Ok(store) = env::var(STORE) else { return Ok(false) };
    if store.starts_with("redis://") {
        work(RedisStore::new(&store, "fleet")?).await?;
    } else {
        work(FileStore::new(store)).await?;
    }
    Ok(true)
}

async fn work(store: impl TokenStore) -> Result<(), BoxError> {
    let server: Uri = env::var("FLEET_SERVER")?.parse()?;
    let asked = Arc::new(AtomicU64::new(0));
    let lease = Duration::from_millis(env::var("FLEET_LEASE")?.parse()?);
    let role = env::var("FLEET_ROLE")?;
    if role == "reader" {
        return send(&server, TokenProvider::reader(store).lease(lease), &asked).await;
    }
    let source = FaultySource {
        source: ApiVideo::new(env::var("FLEET_KEY")?).base_url(server.clone()),
        asked: Arc::clone(&asked),
        mishaps: env::var("FLEET_MISHAPS")?.parse()?,
    };
    let role = if role == "publisher" { Role::Publisher } else { Role::Member };
    send(&server, TokenProvider::builder(source).store(store).role(role).lease(lease), &asked).await
}

/// How much the scheduling of the process and of the server may delay the check of a token.
const TOLERANCE: Duration = Duration::from_secs(1);

/// The expiry of each token that this process sends, by its own clock.
#[derive(Default)]
struct Expiries(Mutex<HashMap<String, Instant>>);

impl Expiries {
    /// Returns the expiry of a request's token; `None` if the provider has never had that token.
    fn of(&self, provider: &TokenProvider, headers: &HeaderMap) -> Option<Instant> {
        let sent = headers.get(AUTHORIZATION)?.to_str().ok()?.strip_prefix("Bearer ")?;
        let mut expiries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(current) = provider.current() {
            let expires_at = Instant::now() + current.remaining()?;
            expiries.entry(current.access_token().to_owned()).or_insert(expires_at);
        }
        expiries.get(sent).copied()
    }

    /// Returns whether a request with a 401 counts as preventable. No token is revoked here, so the server found the
    /// token expired. The crate could have prevented that in two cases:
    ///
    /// * The token had expired more than a second before the request was sent.
    /// * The token had more than a second left when the response arrived, so its expiry was wrong.
    ///
    /// Otherwise the token expired in transit, or while this process waited for a processor, which depends on the load
    /// of the machine. A request does not count either if the process was stopped while it was in progress.
    fn is_counted(expires_at: Option<Instant>, sent_at: Instant, answered_at: Instant) -> bool {
        expires_at
            .is_none_or(|expires_at| expires_at + TOLERANCE < sent_at || answered_at + TOLERANCE < expires_at)
    }
}

/// Sends requests until the process is killed.
async fn send<T: TokenSource>(
    server: &Uri,
    provider: TokenProviderBuilder<T>,
    asked: &AtomicU64,
) -> Result<(), BoxError> {
    let provider = provider.refresh_ahead(RefreshAhead::new().share(0.3)).build()?;
    let client = Client::builder(TokioExecutor::new()).build_http();
    let expiries = Expiries::default();
    let counted = service_fn(|request: Request<_>| {
        let expires_at = expiries.of(&provider, request.headers());
        let (sent_at, stops) = (Instant::now(), STOPS.load(Relaxed));
        let answer = client.request(request);
        async move {
            let answer = answer.await?;
            let expired = answer.status() == StatusCode::UNAUTHORIZED
                && STOPS.load(Relaxed) == stops
                && Expiries::is_counted(expires_at, sent_at, Instant::now());
            EXPIRED.fetch_add(u64::from(expired), Relaxed);
            Ok::<_, BoxError>(answer)
        }
    });
    let service = BearerAuthLayer::with_provider(provider.clone()).layer(counted);
    let mut tally = Tally::default();
    let mut ticks = interval(Duration::from_millis(20));
    loop {
        ticks.tick().await;
        let request = Request::get(format!("{server}videos")).body(Empty::<Bytes>::new())?;
        tally.sent += 1;
        let answer = match service.clone().oneshot(request).await {
            Ok(answer) => {
                let status = answer.status();
                answer.into_body().collect().await.map(|_| status).map_err(BoxError::from)
            }
            Err(error) => Err(error),
        };
        match answer {
            Ok(status) if status.is_success() => tally.answered += 1,
            Ok(status) => {
                eprintln!("lost: {status}");
                tally.lost += 1;
            }
            Err(error) => {
                let error: &dyn std::error::Error = error.as_ref();
                let cause = error.source().map(|cause| format!(": {cause}")).unwrap_or_default();
                eprintln!("lost: {error}{cause}");
                tally.lost += 1;
            }
        }
        let (asked, tokens) = (asked.load(Relaxed), provider.status().generation);
        let (Tally { sent, answered, lost, .. }, expired) = (tally, EXPIRED.load(Relaxed));
        println!("{sent} {answered} {lost} {asked} {tokens} {expired}");
    }
}

/// A source whose process is killed or stopped before or after some of its POSTs.
struct FaultySource {
    source: ApiVideo,
    asked: Arc<AtomicU64>,
    mishaps: u64,
}

impl FaultySource {
    async fn around<T>(&self, post: impl Future<Output = T>) -> T {
        self.asked.fetch_add(1, Relaxed);
        let draw = random() % 100;
        let mishap = |kind| draw < self.mishaps && draw % 4 == kind;
        interrupt(mishap(0), mishap(1)).await;
        let outcome = post.await;
        interrupt(mishap(2), mishap(3)).await;
        outcome
    }
}

async fn interrupt(killed: bool, stopped: bool) {
    if killed {
        let _ = kill_process(getpid(), Signal::KILL);
        sleep(Duration::from_secs(60)).await;
    } else if stopped {
        println!("{STOPPING}");
        let _ = std::io::stdout().flush();
        STOPS.fetch_add(1, Relaxed);
        let _ = kill_process(getpid(), Signal::STOP);
    }
}

/// Returns a number that differs between processes, without a dependency on a random number generator.
fn random() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(std::time::Instant::now()) >> 8
}

impl TokenSource for FaultySource {
    async fn fetch(&self, request: &TokenRequest<'_>) -> Result<Token, SourceError> {
        self.around(self.source.fetch(request)).await
    }

    fn credential(&self) -> Credential {
        self.source.credential()
    }

    fn allowed_origins(&self) -> tower_bearer::AllowedOrigins {
        self.source.allowed_origins()
    }
}
