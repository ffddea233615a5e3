//! A process of the fleet: sends one request after another with the token that it shares, and says what becomes of them.

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
    ApiVideo, BearerAuthLayer, BoxError, RefreshAhead, SourceError, Token, TokenProvider,
    TokenProviderBuilder, TokenRequest, TokenSource,
    store::{FileStore, RedisStore, Role, TokenStore},
    testing::AuthServer,
};

/// Tells this program to be a worker, and which store it shares.
const STORE: &str = "FLEET_STORE";

/// What a worker is started with.
#[derive(Clone)]
pub struct Job {
    /// A Redis URL, or the path of a file.
    pub store: String,
    pub server: Uri,
    pub api_key: String,
    pub role: Role,
    /// In how many of 100 POSTs it is killed or stopped.
    pub mishaps: u64,
    pub lease: Duration,
}

impl Job {
    /// Starts this program once more, as a worker.
    pub fn start(&self) -> Result<Child, BoxError> {
        let role = match self.role {
            Role::Publisher => "publisher",
            Role::Reader => "reader",
            _ => "member",
        };
        // A reader never sees the key.
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

/// What a worker has done so far; each line that it prints is one of these.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    pub sent: u64,
    pub answered: u64,
    pub lost: u64,
    /// Times that it asked the auth endpoint.
    pub asked: u64,
    /// Tokens that it used.
    pub tokens: u64,
    /// Requests whose token had expired, where the crate could have prevented that: see [`Expiries::is_counted`].
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

/// What a fleet has cost its auth endpoint.
pub fn posts(server: &AuthServer) -> u64 {
    let counters = server.counters();
    counters.refresh_grants + counters.rejected_refresh_tokens + counters.api_key_grants
}

/// How often this process was stopped.
static STOPS: AtomicU64 = AtomicU64::new(0);

static EXPIRED: AtomicU64 = AtomicU64::new(0);

/// What a worker says before it stops itself; whoever reads this has to let it go on.
pub const STOPPING: &str = "stopping";

/// `true` if this process was a worker, and is done.
pub async fn work_if_told() -> Result<bool, BoxError> {
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
    let source = Clumsy {
        source: ApiVideo::new(env::var("FLEET_KEY")?).base_url(server.clone()),
        asked: Arc::clone(&asked),
        mishaps: env::var("FLEET_MISHAPS")?.parse()?,
    };
    let role = if role == "publisher" { Role::Publisher } else { Role::Member };
    send(&server, TokenProvider::builder(source).store(store).role(role).lease(lease), &asked).await
}

/// How far the process' own schedule, and the server's, may move the moment at which a token is looked at.
const TOLERANCE: Duration = Duration::from_secs(1);

/// When each token that this process sends expires, by its own clock.
#[derive(Default)]
struct Expiries(Mutex<HashMap<String, Instant>>);

impl Expiries {
    /// When the token of a request that is being sent expires; `None` if the provider has never had it.
    fn of(&self, provider: &TokenProvider, headers: &HeaderMap) -> Option<Instant> {
        let sent = headers.get(AUTHORIZATION)?.to_str().ok()?.strip_prefix("Bearer ")?;
        let mut expiries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(current) = provider.current() {
            let expires_at = Instant::now() + current.remaining()?;
            expiries.entry(current.access_token().to_owned()).or_insert(expires_at);
        }
        expiries.get(sent).copied()
    }

    /// Whether a request that was answered 401 counts as sent with a token that had expired. Nothing is revoked here, so
    /// that the server takes the token for expired. The crate could have prevented it in two cases:
    ///
    /// * when the request was sent, the token had expired more than a second before;
    /// * when the answer came, more than a second of the token's life was left: its expiry was not known.
    ///
    /// In between, the token has expired on the way, or while this process waited for a processor: that says how loaded
    /// the machine is. A request is not counted either if the process was stopped while it was under way.
    fn is_counted(expires_at: Option<Instant>, sent_at: Instant, answered_at: Instant) -> bool {
        expires_at
            .is_none_or(|expires_at| expires_at + TOLERANCE < sent_at || answered_at + TOLERANCE < expires_at)
    }
}

/// Sends requests until it is killed.
async fn send<T: TokenSource>(
    server: &Uri,
    provider: TokenProviderBuilder<T>,
    asked: &AtomicU64,
) -> Result<(), BoxError> {
    let provider = provider.refresh_ahead(RefreshAhead::new().share(0.3)?).build()?;
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

/// A source whose process is killed, or stopped, before or after some of its POSTs.
struct Clumsy {
    source: ApiVideo,
    asked: Arc<AtomicU64>,
    mishaps: u64,
}

impl Clumsy {
    async fn around<T>(&self, post: impl Future<Output = T>) -> T {
        self.asked.fetch_add(1, Relaxed);
        let draw = random() % 100;
        let mishap = |kind| draw < self.mishaps && draw % 4 == kind;
        befall(mishap(0), mishap(1)).await;
        let outcome = post.await;
        befall(mishap(2), mishap(3)).await;
        outcome
    }
}

async fn befall(killed: bool, stopped: bool) {
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

/// Numbers that no two processes draw alike, without a crate for them.
fn random() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(std::time::Instant::now()) >> 8
}

impl TokenSource for Clumsy {
    async fn fetch(&self, request: &TokenRequest<'_>) -> Result<Token, SourceError> {
        self.around(self.source.fetch(request)).await
    }

    async fn renew(&self, request: &TokenRequest<'_>) -> Result<Option<Token>, SourceError> {
        self.around(self.source.renew(request)).await
    }

    fn allowed_origins(&self) -> tower_bearer::AllowedOrigins {
        self.source.allowed_origins()
    }
}
