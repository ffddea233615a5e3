//! Measures how often a fleet calls its auth endpoint, and how many requests fail, while processes and stores fail.
//! Uses real processes, a real Redis, and files.
//!
//! ```text
//! cargo run --release -p tower-bearer-store --all-features --example fleet_bench                 # needs redis-server
//! cargo run --release -p tower-bearer-store --all-features --example fleet_bench -- --brief
//! ```

#![allow(clippy::incompatible_msrv)] // A file store needs Rust 1.89.

#[path = "../../../../tests/support/folder.rs"]
mod folder;
#[path = "../../../../tests/support/proxy.rs"]
mod proxy;
#[path = "../../../../tests/support/redis_server.rs"]
mod redis_server;
#[allow(dead_code, unreachable_pub)]
mod worker;

use std::{
    fs::{self, File, Permissions},
    mem,
    os::unix::fs::PermissionsExt,
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use folder::Folder;
use proxy::Proxy;
use redis_server::RedisServer;
use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    task::JoinSet,
    time::{Instant, sleep, sleep_until, timeout},
};
use tower_bearer::{
    BoxError,
    store::{Role, TokenStore},
};
use tower_bearer_store::{FileStore, RedisStore};
use tower_bearer_testing::{AuthServer, Fault, Route};
use worker::{Job, STOPPING, Tally};

const LIFETIME: Duration = Duration::from_millis(1500);
const LEASE: Duration = Duration::from_millis(400);
/// The number of expiries with a slow endpoint.
const SLOW_EXPIRIES: u64 = 4;

/// How long a stopped process stays stopped: longer than its lease.
const STOPPED: Duration = Duration::from_millis(700);

/// How long after an outage a process may still refresh without the store.
const HEALS_WITHIN: Duration = Duration::from_secs(5);

/// One row of the table.
#[derive(Default)]
struct Row {
    /// The number of published tokens.
    expiries: u64,
    posts: u64,
    /// The maximum number of POSTs for one of them.
    worst: u64,
    /// The number of outages after which the processes did not share their tokens in time.
    unhealed: u64,
    heard: Heard,
}

/// The reports of the processes.
#[derive(Clone, Copy, Default)]
struct Heard {
    mishaps: u64,
    requests: u64,
    lost: u64,
    /// Requests whose token had expired at the server although the crate could have prevented it: by the process's own
    /// clock, the token had expired more than a second before the request was sent, or it had more than a second left
    /// when the 401 arrived. Requests in progress while their process was stopped do not count.
    expired: u64,
}

/// The lifetime of tokens, the length of a lease, and the response time of the auth endpoint.
#[derive(Clone, Copy)]
struct Timing {
    lifetime: Duration,
    lease: Duration,
    endpoint: Duration,
}

const TIMING: Timing = Timing { lifetime: LIFETIME, lease: LEASE, endpoint: Duration::ZERO };

/// Processes that share a store, and their reports.
struct Fleet {
    server: AuthServer,
    lifetime: Duration,
    heard: Arc<Mutex<Heard>>,
    running: JoinSet<()>,
    newest: u64,
    row: Row,
}

impl Fleet {
    async fn start(store: &str, processes: usize, mishaps: u64) -> Result<Self, BoxError> {
        Self::start_with(TIMING, store, processes, mishaps).await
    }

    async fn start_with(
        timing: Timing,
        store: &str,
        processes: usize,
        mishaps: u64,
    ) -> Result<Self, BoxError> {
        let Timing { lifetime, lease, endpoint } = timing;
        let server = AuthServer::builder().token_lifetime(lifetime).start().await?;
        if !endpoint.is_zero() {
            for route in [Route::ApiKeyGrant, Route::RefreshGrant] {
                server.inject_always(route, Fault::Delay(endpoint));
            }
        }
        let (heard, mut running) = (Arc::default(), JoinSet::new());
        let job = Job {
            store: store.to_owned(),
            server: server.uri(),
            api_key: server.api_key(),
            role: Role::Member,
            mishaps,
            lease,
        };
        for _ in 0..processes {
            running.spawn(keep_running(job.clone(), Arc::clone(&heard)));
        }
        Ok(Self { server, lifetime, heard, running, newest: 0, row: Row::default() })
    }

    /// Watches the store until `expiries` more tokens have been published.
    async fn watch(&mut self, store: &impl TokenStore, expiries: u64) -> Result<(), BoxError> {
        let until = self.row.expiries + expiries;
        let watched = async {
            while self.row.expiries < until {
                let record = store.load().await.ok().flatten();
                if let Some(version) = record.map(|record| record.version()).filter(|it| *it != self.newest) {
                    let posts = worker::posts(&self.server);
                    self.newest = version;
                    self.row.expiries += 1;
                    self.row.worst = self.row.worst.max(posts - self.row.posts);
                    self.row.posts = posts;
                }
                sleep(Duration::from_millis(5)).await;
            }
        };
        Ok(timeout(Duration::from_secs(60) + self.lifetime * 4 * u32::try_from(expiries)?, watched).await?)
    }

    /// Watches the store after an outage. When it has healed, each expiry costs one POST again.
    async fn watch_healing(&mut self, store: &impl TokenStore) -> Result<(), BoxError> {
        let until = Instant::now() + HEALS_WITHIN;
        while Instant::now() < until {
            self.watch(store, 1).await?;
        }
        let (posts, expiries) = (self.row.posts, 3);
        self.watch(store, expiries).await?;
        self.row.unhealed += u64::from(self.row.posts - posts > expiries);
        Ok(())
    }

    /// Ends the processes, and returns the row for the table.
    async fn end(mut self) -> Row {
        self.running.shutdown().await;
        let heard = *self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        Row { heard, ..self.row }
    }
}

/// Keeps one process running: starts it again after it was killed, and resumes it after it was stopped.
async fn keep_running(job: Job, heard: Arc<Mutex<Heard>>) {
    let hear =
        |change: &dyn Fn(&mut Heard)| change(&mut heard.lock().unwrap_or_else(PoisonError::into_inner));
    loop {
        let Ok(mut child) = job.start() else { return };
        let Some(stdout) = child.stdout.take() else { return };
        let mut lines = BufReader::new(stdout).lines();
        let mut last = Tally::default();
        while let Ok(Some(line)) = lines.next_line().await {
            if line == STOPPING {
                hear(&|heard| heard.mishaps += 1);
                sleep(STOPPED).await;
                if let Some(pid) = child.id().and_then(|pid| Pid::from_raw(pid.cast_signed())) {
                    let _ = kill_process(pid, Signal::CONT);
                }
            } else if let Some(tally) = Tally::parse(&line) {
                hear(&|heard| {
                    heard.requests += tally.sent - last.sent;
                    heard.lost += tally.lost - last.lost;
                    heard.expired += tally.expired - last.expired;
                });
                last = tally;
            }
        }
        hear(&|heard| heard.mishaps += 1);
        let _ = child.wait().await;
    }
}

/// The size of a run.
#[derive(Clone, Copy)]
struct Extent {
    expiries: u64,
    outage: Duration,
    /// Whether there are too few expiries for a meaningful average.
    brief: bool,
}

impl Extent {
    /// Returns only the first outage for a brief run.
    fn some_of<'a>(self, outages: &'a [&'a str]) -> &'a [&'a str] {
        if self.brief { &outages[..1] } else { outages }
    }
}

/// Prints the rows, and collects the names of those that missed a limit.
struct Table {
    brief: bool,
    missed: Vec<String>,
}

impl Table {
    fn head(brief: bool) -> Self {
        println!(
            "{:<38} {:>8} {:>5} {:>11} {:>5} {:>7} {:>8} {:>4} {:>7}",
            "", "expiries", "POSTs", "POSTs each", "worst", "mishaps", "requests", "lost", "expired"
        );
        Self { brief, missed: Vec::new() }
    }

    /// Prints a row. `bar` is the maximum of POSTs per expiry, on average and at worst. A row of an outage has none,
    /// because the processes do not share a token then.
    fn add(&mut self, name: &str, row: &Row, bar: Option<(f64, u64)>) {
        let each = row.posts as f64 / row.expiries as f64;
        let [expiries, shown, at_worst] = match bar {
            Some(_) => [row.expiries.to_string(), format!("{each:.2}"), row.worst.to_string()],
            None => ["", "", ""].map(str::to_owned),
        };
        let Row { posts, worst, unhealed, heard: Heard { mishaps, requests, lost, expired }, .. } = *row;
        println!(
            "{name:<38} {expiries:>8} {posts:>5} {shown:>11} {at_worst:>5} {mishaps:>7} {requests:>8} {lost:>4} \
             {expired:>7}"
        );
        let (most, most_at_worst) = bar.unwrap_or((f64::INFINITY, u64::MAX));
        let missed = lost > 0 || worst > most_at_worst.max(8);
        if missed || !self.brief && (expired > 0 || unhealed > 0 || worst > most_at_worst || each > most) {
            self.missed.push(name.to_owned());
        }
    }
}

async fn over_redis(table: &mut Table, extent: Extent) -> Result<(), BoxError> {
    let processes = 16;
    for (name, mishaps, bar) in
        [("Redis, 16 processes", 0, (1.0, 1)), ("Redis, 20 % killed or stopped", 20, (1.5, 8))]
    {
        let redis = RedisServer::start().await;
        let mut fleet = Fleet::start(&redis.url(), processes, mishaps).await?;
        fleet.watch(&RedisStore::new(&redis.url(), "fleet")?, extent.expiries).await?;
        table.add(name, &fleet.end().await, Some(bar));
    }
    for outage in extent.some_of(&["stopped", "flushed", "read-only", "slow"]) {
        let mut redis = RedisServer::start().await;
        let store = RedisStore::new(&redis.url(), "fleet")?;
        let mut fleet = Fleet::start(&redis.url(), processes, 0).await?;
        fleet.watch(&store, 2).await?;
        let until = Instant::now() + extent.outage;
        match *outage {
            "stopped" => {
                redis.kill();
                sleep_until(until).await;
                redis.restart().await;
            }
            "read-only" => {
                redis.run(&["REPLICAOF", "127.0.0.1", "1"]).await;
                sleep_until(until).await;
                redis.run(&["REPLICAOF", "NO", "ONE"]).await;
            }
            "flushed" => {
                while Instant::now() < until {
                    redis.run(&["FLUSHALL"]).await;
                    sleep(Duration::from_millis(200)).await;
                }
            }
            _ => {
                while Instant::now() < until {
                    redis.run(&["DEBUG", "SLEEP", "0.4"]).await;
                }
            }
        }
        // The store is used again.
        fleet.watch(&store, 3).await?;
        table.add(&format!("Redis {outage} for {:?}", extent.outage), &fleet.end().await, None);
    }
    Ok(())
}

/// A path to Redis that is silent, and one that leads to another master.
async fn behind_a_proxy(table: &mut Table, extent: Extent) -> Result<(), BoxError> {
    let silences = if extent.brief { 1 } else { 3 };
    let redis = RedisServer::start().await;
    let store = RedisStore::new(&redis.url(), "fleet")?;
    let proxy = Proxy::start(redis.port).await;
    let mut fleet = Fleet::start(&proxy.url(), 16, 0).await?;
    fleet.watch(&store, 2).await?;
    for _ in 0..silences {
        proxy.freeze();
        sleep(extent.outage).await;
        proxy.thaw();
        fleet.watch_healing(&store).await?;
    }
    table.add(&format!("Redis silent {silences} x {:?}", extent.outage), &fleet.end().await, None);

    let failovers = if extent.brief { 1 } else { 6 };
    let (mut master, mut replica) = tokio::join!(RedisServer::start(), RedisServer::start());
    replicate(&master, &replica).await?;
    let proxy = Proxy::start(master.port).await;
    let timing = Timing { endpoint: LEASE / 2, ..TIMING };
    let mut fleet = Fleet::start_with(timing, &proxy.url(), 16, 0).await?;
    fleet.watch(&RedisStore::new(&master.url(), "fleet")?, 2).await?;
    for failover in 0..failovers {
        // Meanwhile a process waits for the auth endpoint.
        answers(&replica, &["EXISTS", "tower-bearer:{fleet}:lease"], "1").await?;
        replica.run(&["REPLICAOF", "NO", "ONE"]).await;
        proxy.switch(replica.port);
        replicate(&replica, &master).await?;
        if failover % 2 == 1 {
            // Otherwise the processes stay connected to the old master.
            proxy.close_all();
        }
        mem::swap(&mut master, &mut replica);
        fleet.watch_healing(&RedisStore::new(&master.url(), "fleet")?).await?;
    }
    table.add(&format!("Redis, {failovers} failovers"), &fleet.end().await, Some((1.5, 8)));
    Ok(())
}

/// Makes one server the replica of another, and waits until it has its data.
async fn replicate(master: &RedisServer, replica: &RedisServer) -> Result<(), BoxError> {
    replica.run(&["REPLICAOF", "127.0.0.1", &master.port.to_string()]).await;
    answers(replica, &["INFO", "replication"], "master_link_status:up").await
}

/// Waits until the answer to a command contains `part`.
async fn answers(redis: &RedisServer, command: &[&str], part: &str) -> Result<(), BoxError> {
    let asked = async {
        while !redis.run(command).await.contains(part) {
            sleep(Duration::from_millis(5)).await;
        }
    };
    Ok(timeout(Duration::from_secs(60), asked).await?)
}

/// An endpoint whose response takes longer than a lease or nearly so, once or, with rejected refresh tokens, twice.
async fn with_a_slow_endpoint(table: &mut Table, brief: bool) -> Result<(), BoxError> {
    let [lifetime, lifetime_of_rejected, lease, endpoint] =
        if brief { [3000, 6000, 400, 600] } else { [40_000, 80_000, 10_000, 9000] }
            .map(Duration::from_millis);
    let fleet = async |lifetime, is_rejected| {
        let redis = RedisServer::start().await;
        let store = RedisStore::new(&redis.url(), "fleet")?;
        let mut fleet = Fleet::start_with(Timing { lifetime, lease, endpoint }, &redis.url(), 16, 0).await?;
        // The first token always costs one POST.
        fleet.watch(&store, 1).await?;
        for _ in 0..SLOW_EXPIRIES {
            if is_rejected {
                fleet.server.revoke_refresh_token();
            }
            fleet.watch(&store, 1).await?;
        }
        Ok::<_, BoxError>(fleet.end().await)
    };
    // Run both at once: they mostly wait.
    let (row, rejected) = tokio::try_join!(fleet(lifetime, false), fleet(lifetime_of_rejected, true))?;
    table.add(&format!("Redis, an endpoint of {endpoint:?}"), &row, Some((1.0, 1)));
    table.add("the same, refresh tokens rejected", &rejected, Some((2.0, 2)));
    Ok(())
}

async fn over_files(table: &mut Table, extent: Extent) -> Result<(), BoxError> {
    let processes = 8;
    for (name, mishaps, bar) in
        [("a file, 8 processes", 0, (1.0, 1)), ("a file, 20 % killed or stopped", 20, (1.5, 8))]
    {
        let folder = Folder::new();
        let mut fleet = Fleet::start(&folder.token().display().to_string(), processes, mishaps).await?;
        fleet.watch(&FileStore::new(folder.token()), extent.expiries).await?;
        table.add(name, &fleet.end().await, Some(bar));
    }
    for outage in extent.some_of(&["deleted", "open to others", "locked"]) {
        let folder = Folder::new();
        let store = FileStore::new(folder.token());
        let mut fleet = Fleet::start(&folder.token().display().to_string(), processes, 0).await?;
        fleet.watch(&store, 2).await?;
        let until = Instant::now() + extent.outage;
        match *outage {
            "deleted" => {
                while Instant::now() < until {
                    let _ = fs::remove_file(folder.token());
                    sleep(Duration::from_millis(200)).await;
                }
            }
            "open to others" => {
                fs::set_permissions(&folder.0, Permissions::from_mode(0o777))?;
                sleep_until(until).await;
                fs::set_permissions(&folder.0, Permissions::from_mode(0o700))?;
            }
            _ => {
                let lock = File::options().write(true).open(folder.0.join("token.lock"))?;
                lock.lock()?;
                sleep_until(until).await;
            }
        }
        fleet.watch(&store, 3).await?;
        table.add(&format!("a file {outage} for {:?}", extent.outage), &fleet.end().await, None);
    }
    Ok(())
}

#[tokio::main]
async fn main() -> Result<ExitCode, BoxError> {
    if worker::run_if_worker().await? {
        return Ok(ExitCode::SUCCESS);
    }
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let extent = match &arguments[..] {
        [] => Extent { expiries: 100, outage: Duration::from_secs(10), brief: false },
        [brief] if brief == "--brief" => Extent { expiries: 5, outage: Duration::from_secs(2), brief: true },
        _ => {
            eprintln!("usage: fleet_bench [--brief]");
            return Ok(ExitCode::from(2));
        }
    };
    println!(
        "token lifetime {LIFETIME:?}, refreshed when 30 % of it is left; lease {LEASE:?}; each process sends a request \
         every 20 ms\n"
    );
    let mut table = Table::head(extent.brief);
    over_redis(&mut table, extent).await?;
    behind_a_proxy(&mut table, extent).await?;
    over_files(&mut table, extent).await?;
    with_a_slow_endpoint(&mut table, extent.brief).await?;
    if table.missed.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("\nmissed the limit: {}", table.missed.join("; "));
    Ok(ExitCode::FAILURE)
}
