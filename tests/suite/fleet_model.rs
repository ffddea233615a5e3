//! Model test of a fleet with random faults in its store, its processes and its endpoint. No caller ever gets an
//! expired token, every caller gets a token, and after the faults there is again one token and one POST per expiry.
//!
//! A failure prints the shortest sequence that fails, and the `TEST_SEED` that repeats it.

use std::{collections::BTreeSet, time::Duration};

use tokio::runtime::Builder;
use tokio::time::{Instant, sleep, timeout};
use tower_bearer::TokenProvider;

use crate::support::{
    fleet::{Chance, Endpoint, Health, MINUTE, MemoryStore},
    runs, sequences,
};

const PROCESSES: usize = 4;
const LEASE: Duration = Duration::from_secs(2);

/// Longer than any refresh, including everything that it may wait for.
const MAX_REFRESH: Duration = Duration::from_secs(40);

#[derive(Clone, Debug)]
enum Step {
    /// One process sends a request.
    Ask(usize),
    /// All processes send a request.
    AskAll,
    /// The API challenges the token of one process.
    Challenge(usize),
    /// Time passes.
    Pass(u64),
    Store(Health),
    Flush,
    /// The next grant's response takes this much longer: its process is stopped, possibly for longer than a refresh.
    Delay(u64),
    /// From now on each grant takes this long, possibly more than [`LEASE`].
    Takes(u64),
    /// Another client authenticates with the key.
    Elsewhere,
    /// The next answers say nothing, of requests that were processed or not.
    Unclear(Vec<bool>),
    /// The store loses its lease, as in a failover.
    LoseLease,
    /// One process is replaced by a new one.
    Restart(usize),
}

fn process(chance: &mut Chance) -> usize {
    chance.draw(PROCESSES as u64) as usize
}

/// Steps without a fault of the store or of a process.
fn calm_step(chance: &mut Chance) -> Step {
    match chance.draw(16) {
        0..4 => Step::Ask(process(chance)),
        4..7 => Step::AskAll,
        7 | 8 => Step::Challenge(process(chance)),
        9..13 => Step::Pass(chance.draw(70_000)),
        13 | 14 => takes(chance),
        _ => Step::Elsewhere,
    }
}

/// Two exchanges, the first of which is rejected, take less time than the others wait for a lease: five times
/// [`LEASE`].
fn takes(chance: &mut Chance) -> Step {
    Step::Takes(chance.pick(&[200, 1_500, 2_500, 4_000]))
}

fn step(chance: &mut Chance) -> Step {
    use Health::{Down, Forgetful, Full, Good, ReadOnly, Slow};
    match chance.draw(23) {
        0..6 => Step::Ask(process(chance)),
        6 | 7 => Step::AskAll,
        8 | 9 => Step::Challenge(process(chance)),
        10..14 => Step::Pass(chance.draw(70_000)),
        14 | 15 => Step::Store(chance.pick(&[Good, Down, Slow, ReadOnly, Forgetful, Full])),
        16 => Step::Flush,
        17 => Step::LoseLease,
        18 => Step::Unclear(chance.list(5, |chance| chance.draw(2) == 0)),
        19 => Step::Delay(chance.pick(&[3_000, 100_000])),
        20 => takes(chance),
        21 => Step::Elsewhere,
        _ => Step::Restart(process(chance)),
    }
}

/// Gets a token of one process, and checks that it has not expired.
async fn ask(process: &TokenProvider) -> String {
    let begun = Instant::now();
    loop {
        // A refresh without a response ends with an error. The next call starts another one.
        match process.token().await {
            Ok(token) => {
                assert!(!token.remaining().unwrap().is_zero());
                return token.access_token().to_owned();
            }
            Err(error) => {
                assert!(error.is_transient() && begun.elapsed() < MAX_REFRESH * 4, "{:?}", error);
            }
        }
    }
}

async fn run(steps: Vec<Step>) {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    let build = || endpoint.process(&store).lease(LEASE).build().unwrap();
    let mut processes = [(); PROCESSES].map(|()| build());
    let is_calm_step = |step: &Step| {
        use Step::{Ask, AskAll, Challenge, Elsewhere, Pass, Takes};
        matches!(step, Ask(_) | AskAll | Challenge(_) | Pass(_) | Takes(_) | Elsewhere)
    };
    let is_calm = steps.iter().all(is_calm_step);
    for step in steps {
        match step {
            Step::Ask(process) => _ = ask(&processes[process]).await,
            Step::AskAll => {
                let asked = processes.clone().map(|process| tokio::spawn(async move { ask(&process).await }));
                for asked in asked {
                    asked.await.unwrap();
                }
            }
            Step::Challenge(process) => {
                if let Some(token) = processes[process].current() {
                    // The refresh may fail, but must end.
                    assert!(timeout(MAX_REFRESH, processes[process].refresh(&token)).await.is_ok());
                }
            }
            Step::Pass(millis) => sleep(Duration::from_millis(millis)).await,
            Step::Store(health) => store.set(health),
            Step::Flush => store.flush(),
            Step::Delay(millis) => {
                endpoint.change(|grants| grants.delays.push_back(Duration::from_millis(millis)));
            }
            Step::Takes(millis) => {
                endpoint.change(|grants| grants.takes = Some(Duration::from_millis(millis)));
            }
            Step::Unclear(answers) => endpoint.change(|grants| grants.unclear.extend(answers)),
            Step::LoseLease => store.lose_lease(),
            Step::Elsewhere => _ = endpoint.authenticate_elsewhere(),
            Step::Restart(process) => processes[process] = build(),
        }
    }

    // Without faults, leases prevent concurrent use of a refresh token, however slow the endpoint is.
    let presented_twice = endpoint.grants().presented_twice;
    assert!(!is_calm || presented_twice == 0, "refresh tokens presented by two at once: {}", presented_twice);

    // No faults from here on.
    store.set(Health::Good);
    endpoint.change(|grants| {
        grants.delays.clear();
        grants.takes = None;
        grants.unclear.clear();
    });
    sleep(3 * MINUTE).await;
    for process in &processes {
        ask(process).await;
    }
    for _ in 0..2 {
        // One expiry, at which all processes need a token at once.
        sleep(2 * MINUTE).await;
        let before = endpoint.grants().posts();
        let asked = processes.clone().map(|process| tokio::spawn(async move { ask(&process).await }));
        let mut tokens = BTreeSet::new();
        for asked in asked {
            tokens.insert(asked.await.unwrap());
        }
        assert_eq!(tokens.len(), 1);
        let posts = endpoint.grants().posts() - before;
        assert!(posts == 1, "{} POSTs", posts);
    }
}

fn check(step: fn(&mut Chance) -> Step) {
    sequences(runs(1_000), 0..40, step, |steps| {
        let runtime = Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(run(steps));
    });
}

/// A random sequence of faults leaves processes with different tokens.
#[test]
fn fleet_converges_after_any_fault() {
    check(step);
}

/// Without faults of the store, two processes present the same refresh token.
#[test]
fn calm_fleet_presents_no_token_twice() {
    check(calm_step);
}
