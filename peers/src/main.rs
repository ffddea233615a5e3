//! The same scenarios for tower-bearer and for other crates that keep a bearer token.
//!
//! ```text
//! cargo run --release --manifest-path peers/Cargo.toml                # all, about twelve minutes
//! cargo run --release --manifest-path peers/Cargo.toml -- --write     # and updates the page and the plot
//! cargo run --release --manifest-path peers/Cargo.toml -- --peer huskarl --scenario revocation
//! cargo run --manifest-path peers/Cargo.toml -- --brief               # shows only that it runs
//! ```

mod fronts;
mod happy;
mod peer;
mod plot;
mod scenarios;
mod server;

use std::{alloc::System, collections::BTreeMap, error::Error, fmt::Write, path::Path};

use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};
use tokio::task::JoinSet;

use crate::{
    peer::{Info, PEERS},
    scenarios::{SCENARIOS, Scale, Scenario},
};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

type BoxError = Box<dyn Error + Send + Sync>;

/// The figures of each scenario and peer.
type Results = BTreeMap<(&'static str, &'static str), Vec<String>>;

fn main() -> Result<(), BoxError> {
    // reqwest has none of its own in this workspace. An error says that there is one already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (mut scale, mut write, mut only_peer, mut only_scenario) =
        (Scale { brief: false }, false, None, None);
    let mut rest: Vec<&str> = arguments.iter().map(String::as_str).collect();
    loop {
        match rest[..] {
            [] => break,
            ["--send", peer, requests, through] => return happy::send_only(peer, requests, through),
            ["--brief", ..] => scale.brief = true,
            ["--write", ..] => write = true,
            ["--peer", peer, ..] => only_peer = Some(peer),
            ["--scenario", scenario, ..] => only_scenario = Some(scenario),
            _ => {
                return Err(
                    "usage: tower-bearer-peers [--brief] [--peer NAME] [--scenario NAME] [--write]".into()
                );
            }
        }
        rest.drain(..if matches!(rest[0], "--peer" | "--scenario") { 2 } else { 1 });
    }
    if write && (scale.brief || only_peer.is_some() || only_scenario.is_some()) {
        return Err("--write needs all peers and scenarios, and no --brief".into());
    }
    let peers: Vec<&'static Info> =
        PEERS.iter().filter(|info| only_peer.is_none_or(|only| only == info.name)).collect();
    let scenarios: Vec<_> =
        SCENARIOS.iter().filter(|(name, _)| only_scenario.is_none_or(|only| only == *name)).collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let results = runtime.block_on(measure(&peers, &scenarios, scale))?;
    let table = table(&peers, &scenarios, &results)?;
    println!("{table}");
    check(&results)?;
    if write {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        replace_table(&root.join("src/guide/peers.md"), &table)?;
        plot::draw(&root.join("benches/peers.svg"), &results)?;
    }
    Ok(())
}

/// The scenarios with so little load that all peers can run at once.
const TOGETHER: [&str; 7] = [
    "caller dropped in the exchange",
    "401 indefinitely",
    "dead connection",
    "gzip",
    "two resets",
    "odd rejection",
    "restart",
];

/// The number of scenarios that `--brief` runs at once.
const BRIEF_WAVE: usize = 5;

/// One after the other, as they share the machine. Those of [`TOGETHER`] at once.
async fn measure(
    peers: &[&'static Info],
    scenarios: &[&'static Scenario],
    scale: Scale,
) -> Result<Results, BoxError> {
    let mut results = Results::new();
    let mut running = JoinSet::new();
    for (at, &&(scenario, _)) in scenarios.iter().enumerate() {
        let together = TOGETHER.contains(&scenario) || scale.brief;
        for &info in peers {
            if !together || scenario == "happy path" {
                collect(&mut running, &mut results).await?;
            }
            running.spawn(async move {
                let cells = scenarios::run(scenario, info, scale).await;
                let cells = cells.map_err(|error| format!("{}, {scenario}: {error}", info.name))?;
                eprintln!("{}, {scenario}: {}", info.name, cells.join(", "));
                Ok::<_, BoxError>(((scenario, info.name), cells))
            });
        }
        // All at once would take more than the machine has.
        if !scale.brief || at % BRIEF_WAVE == BRIEF_WAVE - 1 {
            collect(&mut running, &mut results).await?;
        }
    }
    collect(&mut running, &mut results).await?;
    Ok(results)
}

type Running = JoinSet<Result<((&'static str, &'static str), Vec<String>), BoxError>>;

async fn collect(running: &mut Running, results: &mut Results) -> Result<(), BoxError> {
    while let Some(result) = running.join_next().await {
        results.extend([result??]);
    }
    Ok(())
}

/// Fails if tower-bearer breaks a promise that does not depend on the machine.
fn check(results: &Results) -> Result<(), BoxError> {
    for (scenario, expected) in [
        ("cold start", &["1", "0"][..]),
        ("expired while idle", &["1", "0"]),
        ("revocation", &["1", "0", "0"]),
        ("late 401", &["1", "200"]),
        ("caller dropped in the exchange", &["kept"]),
        ("token endpoint fails", &["0"]),
        ("token endpoint hangs", &["0"]),
        ("upload refused midway", &["201"]),
        ("dead connection", &["0"]),
        ("gzip", &["200", "kept"]),
        ("two resets", &["0", "kept"]),
        ("odd rejection", &["1", "yes", "1", "yes"]),
        ("restart", &["kept", "used"]),
    ] {
        let Some(cells) = results.get(&(scenario, "tower-bearer")) else { continue };
        if !cells.iter().zip(expected).all(|(cell, expected)| cell == expected) {
            return Err(format!("tower-bearer, {scenario}: expected {expected:?}, got {cells:?}").into());
        }
    }
    Ok(())
}

/// Returns the version in the lock file.
fn version(package: &str) -> Option<&'static str> {
    let lock = include_str!("../../interop/sdks/Cargo.lock");
    let entry = lock.split("[[package]]").find(|entry| entry.contains(&format!("name = \"{package}\"\n")))?;
    entry.lines().find_map(|line| line.strip_prefix("version = \"")?.strip_suffix('"'))
}

fn table(peers: &[&Info], scenarios: &[&'static Scenario], results: &Results) -> Result<String, BoxError> {
    let mut table = String::from("| scenario | figure |");
    for info in peers {
        let version = version(info.package).ok_or("the lock file has no such package")?;
        write!(table, " {} ({} {version}) |", info.name, info.package)?;
    }
    table = table.replace("tower-bearer (tower-bearer ", "tower-bearer (");
    writeln!(table, "\n|---|---|{}", "---|".repeat(peers.len()))?;
    for (scenario, figures) in scenarios {
        for (at, figure) in figures.iter().enumerate() {
            write!(table, "| {} | {figure} |", if at == 0 { scenario } else { "" })?;
            for info in peers {
                write!(table, " {} |", results[&(*scenario, info.name)][at])?;
            }
            writeln!(table)?;
        }
    }
    Ok(table)
}

/// Replaces the table in a page: the lines between two comments.
fn replace_table(page: &Path, table: &str) -> Result<(), BoxError> {
    let text = std::fs::read_to_string(page)?;
    let (begin, end) = ("<!-- table: written by peers -->\n", "<!-- end of the table -->");
    let (before, rest) = text.split_once(begin).ok_or("the page has no mark for the table")?;
    let (_, after) = rest.split_once(end).ok_or("the page has no mark for the end of the table")?;
    std::fs::write(page, format!("{before}{begin}\n{table}\n{end}{after}"))?;
    Ok(())
}
