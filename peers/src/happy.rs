//! The cost of a request with a valid token, over a service that responds at once: time, instructions (by callgrind)
//! and allocations. Each is the difference to the same requests without the peer.

use std::{process::Command, sync::Arc, time::Duration, time::Instant};

use stats_alloc::Region;

use crate::{
    ALLOCATOR, BoxError,
    peer::{Info, PEERS, Peer},
    server::{setup, start},
};

async fn peer(info: &Info) -> Result<(tower_bearer_testing::AuthServer, Arc<dyn Peer>), BoxError> {
    let server = start(Duration::from_secs(3600)).await?;
    let peer = (info.build)(setup(&server, None).await?).await?;
    // The first token.
    peer.get().await?;
    Ok((server, peer))
}

pub async fn figures(info: &Info, brief: bool) -> Result<Vec<String>, BoxError> {
    let (_server, peer) = peer(info).await?;
    let (rounds, requests) = if brief { (5, 200) } else { (31, 5_000) };
    let (mut with, mut without) = (Vec::new(), Vec::new());
    // They alternate, so that disturbances of the machine affect both.
    for _ in 0..rounds {
        for (through, samples) in [(true, &mut with), (false, &mut without)] {
            let begun = Instant::now();
            peer.stub(requests, through).await?;
            samples.push(begun.elapsed().as_secs_f64() * 1e9 / requests as f64);
        }
    }
    let nanoseconds = fastest(with) - fastest(without);
    let allocations = allocations(&*peer, true).await? - allocations(&*peer, false).await?;
    let has_valgrind = !brief && Command::new("valgrind").arg("--version").output().is_ok();
    let instructions = match has_valgrind {
        true => format!("{:.0}", instructions(info.name, true)? - instructions(info.name, false)?),
        false => "-".into(),
    };
    Ok(vec![format!("{nanoseconds:.0}"), instructions, format!("{allocations:.1}")])
}

/// What other programs take of the machine does not show in the fastest round.
fn fastest(samples: Vec<f64>) -> f64 {
    samples.into_iter().fold(f64::INFINITY, f64::min)
}

/// The difference of two numbers of requests cancels the allocations of the setup.
async fn allocations(peer: &dyn Peer, through: bool) -> Result<f64, BoxError> {
    let mut counts = [0, 0];
    for (count, requests) in counts.iter_mut().zip([100, 1_100]) {
        let region = Region::new(ALLOCATOR);
        peer.stub(requests, through).await?;
        let change = region.change();
        *count = change.allocations + change.reallocations;
    }
    Ok((counts[1] as f64 - counts[0] as f64) / 1_000.0)
}

/// Counts with callgrind, as a difference as well.
fn instructions(name: &str, through: bool) -> Result<f64, BoxError> {
    let program = std::env::current_exe()?;
    let count = |requests: usize| -> Result<f64, BoxError> {
        let output = Command::new("valgrind")
            .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
            .arg(&program)
            .args(["--send", name, &requests.to_string(), &through.to_string()])
            .output()?;
        let report = String::from_utf8_lossy(&output.stderr);
        let count = report.lines().find_map(|line| line.split_once("Collected : "));
        Ok(count.ok_or("callgrind has counted nothing")?.1.trim().parse()?)
    };
    // So many that the tasks in the background do not show.
    Ok((count(21_000)? - count(1_000)?) / 20_000.0)
}

/// The command that runs under callgrind: `--send PEER REQUESTS THROUGH`.
pub fn send_only(name: &str, requests: &str, through: &str) -> Result<(), BoxError> {
    let info = PEERS.iter().find(|info| info.name == name).ok_or("there is no such peer")?;
    let (requests, through) = (requests.parse()?, through.parse()?);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (_server, peer) = peer(info).await?;
        peer.stub(requests, through).await
    })
}
