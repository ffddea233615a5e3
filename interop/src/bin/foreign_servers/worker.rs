//! A process that uses the login. It is killed from outside, and kills itself at the steps of the store.

use std::{
    env,
    hash::{BuildHasher, RandomState},
    process::Stdio,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::Duration,
};

use rustix::process::{Signal, getpid, kill_process};
use tokio::{
    process::{Child, Command},
    time::interval,
};
use tower_bearer::{
    BoxError, Error, OAuth2, RefreshAhead, SourceErrorKind, TokenClient, TokenProvider, TokenProviderBuilder,
    oauth2::Server,
    store::{Extension, Lease, Publication, Record, StoreError, TokenStore},
};
use tower_bearer_store::{FileStore, RedisStore};

use crate::{front::PROCESS, server::Kind};

/// The argument that makes this program a worker.
const WORKER: &str = "--worker";

const LEASE: Duration = Duration::from_secs(1);

/// One in this many steps of the store kills the process.
const DEATHS: u64 = 60;

/// How a process gets to the login.
#[derive(Clone)]
pub struct Access {
    pub kind: &'static Kind,
    pub token_endpoint: String,
    /// A URL of Redis, or the path of a file.
    pub store: String,
}

impl Access {
    /// Starts this program again, as a worker with this number.
    pub fn start(&self, process: usize) -> std::io::Result<Child> {
        let args = [WORKER, self.kind.name, &self.token_endpoint, &self.store, &process.to_string()];
        let mut command = Command::new(env::current_exe()?);
        command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true).spawn()
    }

    fn builder(&self, process: &str) -> TokenProviderBuilder<OAuth2> {
        // Not an address for each process: a login belongs to its token endpoint.
        let client = TokenClient::new().header(PROCESS, process);
        let server = Server::token_endpoint(&self.token_endpoint);
        let cool_down = Duration::from_millis(200);
        TokenProvider::builder(OAuth2::login(server, self.kind.client_auth()).with_client(client))
            .lease(LEASE)
            .refresh_ahead(RefreshAhead::new().share(0.5))
            .cool_down(cool_down, 5 * cool_down)
    }

    /// A provider that begins logins.
    pub fn login(&self, refresh_token: String) -> Result<TokenProvider, BoxError> {
        let builder = self.builder("none").login(refresh_token);
        Ok(match self.store.starts_with("redis://") {
            true => builder.store(RedisStore::new(&self.store, "login")?).build()?,
            false => builder.store(FileStore::new(&self.store)).build()?,
        })
    }
}

pub fn is_lost<T>(result: &Result<T, Error>) -> bool {
    matches!(result, Err(Error::Source(error)) if error.kind() == SourceErrorKind::LoginRequired)
}

/// Runs the worker if this process is one. Returns whether it was.
pub async fn run_if_worker(args: &[&str]) -> Result<bool, BoxError> {
    let &[WORKER, kind, token_endpoint, store, process] = args else { return Ok(false) };
    let kind = Kind::find(kind).ok_or("there is no such server")?;
    let access = Access { kind, token_endpoint: token_endpoint.to_owned(), store: store.to_owned() };
    let builder = access.builder(process);
    let provider = match store.starts_with("redis://") {
        true => builder.store(Deadly::new(RedisStore::new(store, "login")?)).build()?,
        false => builder.store(Deadly::new(FileStore::new(store))).build()?,
    };
    let mut ticks = interval(Duration::from_millis(50));
    loop {
        ticks.tick().await;
        match provider.token().await {
            // A hash, because the token is a secret.
            Ok(token) => println!("ok {:x}", hash(token.access_token())),
            result if is_lost(&result) => println!("lost"),
            Err(error) => {
                let cause = error.cause_as::<std::io::Error>().map(|cause| format!(" ({cause})"));
                println!("failed {error}{}", cause.unwrap_or_default());
            }
        }
    }
}

/// FNV-1a, which is the same in each process.
pub fn hash(text: &str) -> u64 {
    text.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

pub fn random(below: u64) -> u64 {
    RandomState::new().hash_one(0) % below
}

/// A store whose process dies at some of its steps.
struct Deadly<S> {
    store: S,
    /// Whether the next publication has the answer of the exchange. The one before marks the refresh token as presented.
    is_marked: AtomicBool,
}

impl<S> Deadly<S> {
    fn new(store: S) -> Self {
        Self { store, is_marked: AtomicBool::new(false) }
    }
}

fn may_die(step: &str) {
    if random(DEATHS) == 0 {
        println!("dies {step}");
        let _ = kill_process(getpid(), Signal::KILL);
    }
}

impl<S: TokenStore> TokenStore for Deadly<S> {
    fn namespace(&self) -> &str {
        self.store.namespace()
    }

    async fn load(&self) -> Result<Option<Record>, StoreError> {
        self.store.load().await
    }

    async fn lease(&self, length: Duration) -> Result<Option<Lease>, StoreError> {
        let lease = self.store.lease(length).await?;
        if lease.is_some() {
            self.is_marked.store(false, Relaxed);
            may_die("with the lease");
        }
        Ok(lease)
    }

    async fn extend(&self, lease: &Lease, length: Duration) -> Result<Extension, StoreError> {
        self.store.extend(lease, length).await
    }

    async fn publish(&self, lease: &Lease, record: Record) -> Result<Publication, StoreError> {
        let has_answer = self.is_marked.swap(true, Relaxed);
        may_die(if has_answer { "before the publication" } else { "before the mark" });
        let publication = self.store.publish(lease, record).await?;
        if has_answer && matches!(publication, Publication::Stored) {
            println!("published");
        }
        may_die(if has_answer { "after the publication" } else { "after the mark" });
        Ok(publication)
    }

    async fn release(&self, lease: Lease) -> Result<(), StoreError> {
        self.store.release(lease).await?;
        may_die("after the release");
        Ok(())
    }
}
