//! A publisher and eight other processes share one token in Redis. Halfway through, the publisher is killed.
//!
//! ```text
//! cargo run -p tower-bearer-store --all-features --example fleet     # needs redis-server
//! ```

#[path = "../../../tests/support/redis_server.rs"]
mod redis_server;
#[allow(dead_code, unreachable_pub)]
#[path = "fleet_bench/worker.rs"]
mod worker;

use std::{
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use redis_server::RedisServer;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    task::JoinHandle,
    time::sleep,
};
use tower_bearer::{
    BoxError,
    store::{Role, TokenStore},
};
use tower_bearer_store::RedisStore;
use tower_bearer_testing::AuthServer;
use worker::{Job, Tally};

const LIFETIME: Duration = Duration::from_secs(2);
const HALF: Duration = Duration::from_secs(7);

#[tokio::main]
async fn main() -> Result<ExitCode, BoxError> {
    if worker::run_if_worker().await? {
        return Ok(ExitCode::SUCCESS);
    }
    let server = AuthServer::builder().token_lifetime(LIFETIME).start().await?;
    let redis = RedisServer::start().await;
    let start = |role| -> Result<(u32, JoinHandle<Tally>, tokio::process::Child), BoxError> {
        let job = Job {
            store: redis.url(),
            server: server.uri(),
            api_key: server.api_key(),
            role,
            mishaps: 0,
            lease: Duration::from_millis(500),
        };
        let mut child = job.start()?;
        let mut lines = BufReader::new(child.stdout.take().ok_or("no output")?).lines();
        let tally = tokio::spawn(async move {
            let mut last = Tally::default();
            while let Ok(Some(line)) = lines.next_line().await {
                last = Tally::parse(&line).unwrap_or(last);
            }
            last
        });
        Ok((child.id().unwrap_or_default(), tally, child))
    };
    let roles = [&[Role::Publisher][..], &[Role::Reader; 4], &[Role::Member; 4]].concat();
    let mut processes = roles.iter().map(|role| start(*role)).collect::<Result<Vec<_>, _>>()?;

    // Counts the tokens of the fleet.
    let tokens = Arc::new(AtomicU64::new(0));
    let count = tokio::spawn({
        let (store, tokens) = (RedisStore::new(&redis.url(), "fleet")?, Arc::clone(&tokens));
        async move {
            let mut newest = 0;
            loop {
                let record = store.load().await.ok().flatten();
                let version = record.map_or(newest, |record| record.version());
                tokens.fetch_add(u64::from(version != newest), Relaxed);
                newest = version;
                sleep(Duration::from_millis(10)).await;
            }
        }
    });

    sleep(HALF).await;
    println!("the publisher, process {}, is killed (SIGKILL); a member takes its place\n", processes[0].0);
    processes[0].2.kill().await?;
    sleep(HALF).await;
    count.abort();
    let posts = worker::posts(&server);
    let expiries = tokens.load(Relaxed);

    println!(
        "{:>8}  {:<9} {:>8} {:>8} {:>5} {:>7} {:>7}",
        "process", "role", "requests", "answered", "lost", "tokens", "POSTs"
    );
    let mut all = Tally::default();
    for (role, (id, tally, mut child)) in roles.iter().zip(processes) {
        let _ = child.kill().await;
        let Tally { sent, answered, lost, asked, tokens, .. } = tally.await?;
        println!(
            "{id:>8}  {:<9} {sent:>8} {answered:>8} {lost:>5} {tokens:>7} {asked:>7}",
            format!("{role:?}").to_lowercase()
        );
        (all.sent, all.lost) = (all.sent + sent, all.lost + lost);
    }
    let per_expiry = posts as f64 / expiries as f64;
    println!(
        "\n{} requests, {} lost; {posts} POSTs for {expiries} tokens: {per_expiry:.2} per expiry",
        all.sent, all.lost
    );
    Ok(if all.lost == 0 && per_expiry < 1.5 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
