//! One login at authorization servers that others wrote, while processes are killed, connections are cut, servers start
//! again and Redis fails over.
//!
//! ```text
//! cargo run -p tower-bearer-interop --bin foreign_servers                        # about 16 min
//! cargo run -p tower-bearer-interop --bin foreign_servers -- --server glewlwyd
//! cargo run -p tower-bearer-interop --bin foreign_servers -- --brief             # shows only that it runs
//! ```
//!
//! `interop/servers` has the servers. They need `npm ci` there, glewlwyd (Debian), and a Python with the packages of
//! `requirements.txt`, which `FOREIGN_SERVERS_PYTHON` names. Redis is needed as well. All servers are on loopback, and the
//! program kills only processes that it has started.
//!
//! A row is one login that two processes share by a store. With a grace period no login may be lost, without one only if
//! an answer that has spent a refresh token was lost. Otherwise the program fails.

mod front;
mod server;
mod worker;

#[path = "../../../../tests/support/folder.rs"]
mod folder;
#[path = "../../../../tests/support/proxy.rs"]
mod proxy;
#[path = "../../../../tests/support/redis_server.rs"]
mod redis_server;

use std::{
    collections::{BTreeMap, HashSet},
    env, fmt, mem,
    process::ExitCode,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt, BufReader},
    sync::{Notify, mpsc, oneshot},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tower_bearer::BoxError;

use crate::{
    folder::Folder,
    front::{ANSWER_LOST, Front, Ledger},
    proxy::Proxy,
    redis_server::RedisServer,
    server::{Kind, SERVERS, Server},
    worker::{Access, is_lost, random, run_if_worker},
};

const PROCESSES: usize = 2;

/// What the processes have reported.
#[derive(Default)]
struct Heard {
    /// Hashes of the access tokens that each process has used.
    tokens: [HashSet<String>; PROCESSES],
    calls: u64,
    /// Calls to which the login was lost.
    lost: u64,
    failed: u64,
    /// Why calls failed.
    failures: BTreeMap<String, u64>,
}

/// What the tasks of one row share.
#[derive(Clone, Default)]
struct Shared {
    ledger: Arc<Mutex<Ledger>>,
    heard: Arc<Mutex<Heard>>,
    login_lost: Arc<Notify>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Keeps one process running, and kills it when `kill` asks for it.
    async fn keep_running(
        self,
        process: usize,
        access: Access,
        mut kill: mpsc::Receiver<oneshot::Sender<()>>,
    ) {
        loop {
            let mut child = access.start(process).expect("a process");
            let mut lines = BufReader::new(child.stdout.take().expect("its output")).lines();
            let mut killed = None;
            loop {
                let line = tokio::select! {
                    biased;
                    line = lines.next_line() => line,
                    Some(dead) = kill.recv(), if killed.is_none() => {
                        killed = Some(dead);
                        let _ = child.start_kill();
                        continue;
                    }
                };
                let Ok(Some(line)) = line else { break };
                self.heard(process, &line);
            }
            let _ = child.wait().await;
            lock(&self.ledger).died(process);
            drop(killed);
        }
    }

    fn heard(&self, process: usize, line: &str) {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        let mut heard = lock(&self.heard);
        heard.calls += u64::from(matches!(word, "ok" | "failed" | "lost"));
        match word {
            "ok" => _ = heard.tokens[process].insert(rest.to_owned()),
            "published" => self.published(process),
            "dies" => *lock(&self.ledger).kills.entry(rest.to_owned()).or_default() += 1,
            "lost" => {
                heard.lost += 1;
                self.login_lost.notify_one();
            }
            _ => {
                heard.failed += 1;
                *heard.failures.entry(rest.to_owned()).or_default() += 1;
            }
        }
    }

    /// A process has published what it got.
    fn published(&self, process: usize) {
        lock(&self.ledger).published(process);
    }

    fn rotations(&self) -> usize {
        lock(&self.heard).tokens.iter().flatten().collect::<HashSet<_>>().len()
    }
}

/// One login, and what it went through.
struct Row {
    kind: &'static Kind,
    has_grace: bool,
    store: &'static str,
    rotations: usize,
    restarts: u64,
    failovers: u64,
    /// How many logins were lost, by their reasons.
    lost: BTreeMap<&'static str, u64>,
    shared: Shared,
}

const HEAD: &str = "\
| server | grace | store | rotations | kills | cuts | server restarts | failovers | answers lost | reuse accepted | reuse rejected | logins lost | calls | failed |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|";

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let grace = if self.has_grace { "30 s" } else { "none" };
        let (ledger, heard) = (lock(&self.shared.ledger), lock(&self.shared.heard));
        let (kills, cuts): (u64, u64) = (ledger.kills.values().sum(), ledger.cuts.values().sum());
        let lost: Vec<_> = self.lost.iter().map(|(why, count)| format!("{count} ({why})")).collect();
        let lost = if lost.is_empty() { "0".to_owned() } else { lost.join(", ") };
        let Self { store, rotations, restarts, failovers, .. } = self;
        let Ledger { answers_lost, reuse_accepted, reuse_rejected, .. } = &*ledger;
        write!(
            f,
            "| {} | {grace} | {store} | {rotations} | {kills} | {cuts} | {restarts} | {failovers} | {answers_lost} | \
             {reuse_accepted} | {reuse_rejected} | {lost} | {} | {} |",
            self.kind.name, heard.calls, heard.failed
        )
    }
}

/// The places where a row keeps the login.
enum Store {
    File(Folder),
    Redis { master: RedisServer, replica: RedisServer, proxy: Proxy },
}

impl Store {
    async fn start(name: &str) -> Result<Self, BoxError> {
        if name == "file" {
            return Ok(Self::File(Folder::new()));
        }
        let (master, replica) = tokio::join!(RedisServer::start(), RedisServer::start());
        replicate(&master, &replica).await?;
        Ok(Self::Redis { proxy: Proxy::start(master.port).await, master, replica })
    }

    fn address(&self) -> String {
        match self {
            Self::File(folder) => folder.token().display().to_string(),
            Self::Redis { proxy, .. } => proxy.url(),
        }
    }

    /// Kills the master, makes its replica the next one, and starts the old one as the replica of that.
    async fn fail_over(&mut self) -> Result<u64, BoxError> {
        let Self::Redis { master, replica, proxy } = self else { return Ok(0) };
        master.kill();
        replica.run(&["REPLICAOF", "NO", "ONE"]).await;
        proxy.switch(replica.port);
        proxy.close_all();
        master.restart().await;
        mem::swap(master, replica);
        replicate(master, replica).await?;
        Ok(1)
    }
}

/// Makes one server the replica of another, and waits until it has its data.
async fn replicate(master: &RedisServer, replica: &RedisServer) -> Result<(), BoxError> {
    replica.run(&["REPLICAOF", "127.0.0.1", &master.port.to_string()]).await;
    let replicated = async {
        while !replica.run(&["INFO", "replication"]).await.contains("master_link_status:up") {
            sleep(Duration::from_millis(5)).await;
        }
    };
    Ok(timeout(Duration::from_secs(60), replicated).await?)
}

/// Runs until the processes have used `rotations` access tokens.
async fn run(
    kind: &'static Kind,
    has_grace: bool,
    name: &'static str,
    rotations: usize,
) -> Result<Row, BoxError> {
    let folder = Folder::new();
    let mut server = Server::start(kind, has_grace, &folder.0).await?;
    let mut store = Store::start(name).await?;
    let shared = Shared::default();
    let mut row = Row {
        kind,
        has_grace,
        store: name,
        rotations: 0,
        restarts: 0,
        failovers: 0,
        lost: BTreeMap::new(),
        shared: shared.clone(),
    };
    let (kill, killed): (Vec<_>, Vec<_>) = (0..PROCESSES).map(|_| mpsc::channel(1)).unzip();
    let token_endpoint = Front::start(kill, server.token_endpoint(), Arc::clone(&shared.ledger)).await?;
    let access = Access { kind, token_endpoint, store: store.address() };
    let login = access.login(server.log_in().await?)?;
    login.ready().await?;
    shared.published(usize::MAX);
    let mut running = JoinSet::new();
    for (process, killed) in killed.into_iter().enumerate() {
        running.spawn(shared.clone().keep_running(process, access.clone(), killed));
    }

    let deadline =
        Instant::now() + Duration::from_secs(60) + Duration::from_secs(10) * u32::try_from(rotations)?;
    let (restart_every, failover_every) = ((rotations / 8).max(3), (rotations / 6).max(3));
    let (mut next_restart, mut next_failover) = (restart_every, failover_every);
    while shared.rotations() < rotations {
        if Instant::now() > deadline {
            return Err(format!("{row}\nthe tokens do not rotate: {:?}", lock(&shared.heard).failures).into());
        }
        if timeout(Duration::from_millis(20 + random(50)), shared.login_lost.notified()).await.is_ok()
            && is_lost(&login.token().await)
        {
            *row.lost.entry(lock(&shared.ledger).end_login()).or_default() += 1;
            login.log_in(server.log_in().await?);
            login.ready().await?;
            shared.published(usize::MAX);
        }
        if shared.rotations() > next_restart {
            server.restart().await?;
            row.restarts += 1;
            next_restart += restart_every;
        }
        if shared.rotations() > next_failover {
            row.failovers += store.fail_over().await?;
            next_failover += failover_every;
        }
    }
    running.shutdown().await;
    row.rotations = shared.rotations();
    Ok(row)
}

/// Whether every lost login had to be lost, and each process has used it.
fn is_good(row: &Row) -> bool {
    let heard = lock(&row.shared.heard);
    let had_to_be_lost = row.lost.keys().all(|why| ANSWER_LOST.contains(why));
    let is_kept = row.lost.is_empty() && heard.lost == 0;
    heard.tokens.iter().all(|tokens| tokens.len() > row.rotations / 8)
        && (is_kept || !row.has_grace && had_to_be_lost)
}

#[tokio::main]
async fn main() -> Result<ExitCode, BoxError> {
    let args: Vec<_> = env::args().skip(1).collect();
    let args: Vec<_> = args.iter().map(String::as_str).collect();
    if run_if_worker(&args).await? {
        return Ok(ExitCode::SUCCESS);
    }
    let (brief, only) = match args[..] {
        [] => (false, None),
        ["--brief"] => (true, None),
        ["--server", name] => (false, Some(Kind::find(name).ok_or("there is no such server")?)),
        _ => return Err("usage: foreign_servers [--brief | --server NAME]".into()),
    };
    println!("{HEAD}");
    // The servers together, and the rows of each one after the other.
    let mut running = JoinSet::new();
    for kind in SERVERS.iter().filter(|kind| only.is_none_or(|only| only.name == kind.name)) {
        running.spawn(async move {
            let mut rows = Vec::new();
            for has_grace in [kind.has_grace, false] {
                for store in ["file", "Redis"] {
                    let row = run(kind, has_grace, store, if brief { 8 } else { 100 }).await?;
                    println!("{row}");
                    for (failure, calls) in &lock(&row.shared.heard).failures {
                        eprintln!("{calls} calls failed: {failure}");
                    }
                    rows.push(row);
                    if brief {
                        return Ok(rows);
                    }
                }
                if !has_grace {
                    break;
                }
            }
            Ok::<_, BoxError>(rows)
        });
    }
    let (mut counts, mut is_all_good) = ([("kills", BTreeMap::new()), ("cuts", BTreeMap::new())], true);
    while let Some(rows) = running.join_next().await {
        for row in rows?? {
            is_all_good &= is_good(&row);
            let ledger = lock(&row.shared.ledger);
            for ((_, sums), steps) in counts.iter_mut().zip([&ledger.kills, &ledger.cuts]) {
                steps.iter().for_each(|(step, count)| *sums.entry(step.clone()).or_insert(0) += count);
            }
        }
    }
    for (what, steps) in counts {
        let steps: Vec<_> = steps.iter().map(|(step, count)| format!("{step} {count}")).collect();
        println!("\n{what}: {}", steps.join(", "));
    }
    Ok(if is_all_good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
