//! Model test of a fleet with random faults in its store, its processes and its endpoint. No caller ever gets an
//! expired token, every caller gets a token, and after the faults there is again one token and one POST per expiry.
//!
//! proptest records shrunk failures in `tests/suite/fleet_model.proptest-regressions` and runs them first.

use std::{collections::BTreeSet, time::Duration};

use proptest::{prelude::*, test_runner::TestCaseError};
use tokio::time::{Instant, sleep, timeout};
use tower_bearer::TokenProvider;

use crate::support::{
    fleet::{Endpoint, Health, MINUTE, MemoryStore},
    runs,
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

/// Steps without a fault of the store or of a process.
fn calm_step() -> impl Strategy<Value = Step> {
    let process = 0..PROCESSES;
    prop_oneof![
        4 => process.clone().prop_map(Step::Ask),
        3 => Just(Step::AskAll),
        2 => process.prop_map(Step::Challenge),
        4 => (0..70_000u64).prop_map(Step::Pass),
        2 => takes(),
        1 => Just(Step::Elsewhere),
    ]
}

/// Two exchanges, the first of which is rejected, take less time than the others wait for a lease: five times
/// [`LEASE`].
fn takes() -> impl Strategy<Value = Step> {
    prop_oneof![Just(200u64), Just(1_500), Just(2_500), Just(4_000)].prop_map(Step::Takes)
}

fn step() -> impl Strategy<Value = Step> {
    let process = 0..PROCESSES;
    prop_oneof![
        6 => process.clone().prop_map(Step::Ask),
        2 => Just(Step::AskAll),
        2 => process.clone().prop_map(Step::Challenge),
        4 => (0..70_000u64).prop_map(Step::Pass),
        2 => prop_oneof![
            Just(Health::Good),
            Just(Health::Down),
            Just(Health::Slow),
            Just(Health::ReadOnly),
            Just(Health::Forgetful),
            Just(Health::Full),
        ].prop_map(Step::Store),
        1 => Just(Step::Flush),
        1 => Just(Step::LoseLease),
        1 => prop::collection::vec(any::<bool>(), 1..6).prop_map(Step::Unclear),
        1 => prop_oneof![Just(3_000u64), Just(100_000)].prop_map(Step::Delay),
        1 => takes(),
        1 => Just(Step::Elsewhere),
        1 => process.prop_map(Step::Restart),
    ]
}

/// Gets a token of one process, and checks that it has not expired.
async fn ask(process: &TokenProvider) -> Result<String, TestCaseError> {
    let begun = Instant::now();
    loop {
        // A refresh without a response ends with an error. The next call starts another one.
        match process.token().await {
            Ok(token) => {
                prop_assert!(!token.remaining().unwrap().is_zero());
                return Ok(token.access_token().to_owned());
            }
            Err(error) => {
                prop_assert!(error.is_transient() && begun.elapsed() < MAX_REFRESH * 4, "{:?}", error);
            }
        }
    }
}

async fn run(steps: Vec<Step>) -> Result<(), TestCaseError> {
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
            Step::Ask(process) => _ = ask(&processes[process]).await?,
            Step::AskAll => {
                let asked = processes.clone().map(|process| tokio::spawn(async move { ask(&process).await }));
                for asked in asked {
                    asked.await.unwrap()?;
                }
            }
            Step::Challenge(process) => {
                if let Some(token) = processes[process].current() {
                    // The refresh may fail, but must end.
                    prop_assert!(timeout(MAX_REFRESH, processes[process].refresh(&token)).await.is_ok());
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
    prop_assert!(
        !is_calm || presented_twice == 0,
        "refresh tokens presented by two at once: {}",
        presented_twice
    );

    // No faults from here on.
    store.set(Health::Good);
    endpoint.change(|grants| {
        grants.delays.clear();
        grants.takes = None;
        grants.unclear.clear();
    });
    sleep(3 * MINUTE).await;
    for process in &processes {
        ask(process).await?;
    }
    for _ in 0..2 {
        // One expiry, at which all processes need a token at once.
        sleep(2 * MINUTE).await;
        let before = endpoint.grants().posts();
        let asked = processes.clone().map(|process| tokio::spawn(async move { ask(&process).await }));
        let mut tokens = BTreeSet::new();
        for asked in asked {
            tokens.insert(asked.await.unwrap()?);
        }
        prop_assert_eq!(tokens.len(), 1);
        let posts = endpoint.grants().posts() - before;
        prop_assert!(posts == 1, "{} POSTs", posts);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: runs(1_000) as u32, max_shrink_iters: 10_000, ..ProptestConfig::default() })]

    /// A random sequence of faults leaves processes with different tokens.
    #[test]
    fn fleet_converges_after_any_fault(
        steps in prop::collection::vec(step(), 0..40)
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        runtime.unwrap().block_on(run(steps))?;
    }

    /// Without faults of the store, two processes present the same refresh token.
    #[test]
    fn calm_fleet_presents_no_token_twice(
        steps in prop::collection::vec(calm_step(), 0..40)
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        runtime.unwrap().block_on(run(steps))?;
    }
}
