//! Random lives of a fleet: whatever becomes of its store, its processes and its endpoint, nobody is given a token that
//! has expired, nobody is left without one, and, once all is well, there is one token and one POST per expiry again.
//!
//! What proptest shrinks a failure to is kept in `tests/fleet_model.proptest-regressions` and run first from then on.

#[path = "support/fleet.rs"]
mod fleet;

use std::{collections::BTreeSet, time::Duration};

use fleet::{Endpoint, Health, MINUTE, MemoryStore};
use proptest::{prelude::*, test_runner::TestCaseError};
use tokio::time::{Instant, sleep, timeout};
use tower_bearer::TokenProvider;

const PROCESSES: usize = 4;
const LEASE: Duration = Duration::from_secs(2);

/// Longer than any refresh, with all that it may wait for.
const PATIENCE: Duration = Duration::from_secs(40);

#[derive(Clone, Debug)]
enum Step {
    /// This process sends a request.
    Ask(usize),
    /// All of them do.
    AskAll,
    /// The API refuses the token of this process.
    Refuse(usize),
    /// Time passes.
    Pass(u64),
    Store(Health),
    Flush,
    /// The next grant's answer takes this much longer: its process is stopped, or as good as dead.
    Delay(u64),
    /// From now on each grant takes so long; more than [`LEASE`], at times.
    Takes(u64),
    /// Somebody else authenticates with the key.
    Elsewhere,
    /// This process is replaced by another, which knows nothing.
    Restart(usize),
}

/// What befalls neither the store nor a process.
fn calm_step() -> impl Strategy<Value = Step> {
    let process = 0..PROCESSES;
    prop_oneof![
        4 => process.clone().prop_map(Step::Ask),
        3 => Just(Step::AskAll),
        2 => process.prop_map(Step::Refuse),
        4 => (0..70_000u64).prop_map(Step::Pass),
        2 => takes(),
        1 => Just(Step::Elsewhere),
    ]
}

/// Two exchanges, of which the first is refused, are less than the others wait for a lease: five times [`LEASE`].
fn takes() -> impl Strategy<Value = Step> {
    prop_oneof![Just(200u64), Just(1_500), Just(2_500), Just(4_000)].prop_map(Step::Takes)
}

fn step() -> impl Strategy<Value = Step> {
    let process = 0..PROCESSES;
    prop_oneof![
        6 => process.clone().prop_map(Step::Ask),
        2 => Just(Step::AskAll),
        2 => process.clone().prop_map(Step::Refuse),
        4 => (0..70_000u64).prop_map(Step::Pass),
        2 => prop_oneof![
            Just(Health::Good),
            Just(Health::Down),
            Just(Health::Slow),
            Just(Health::ReadOnly),
            Just(Health::Forgetful),
        ].prop_map(Step::Store),
        1 => Just(Step::Flush),
        1 => prop_oneof![Just(3_000u64), Just(100_000)].prop_map(Step::Delay),
        1 => takes(),
        1 => Just(Step::Elsewhere),
        1 => process.prop_map(Step::Restart),
    ]
}

/// A process gets a token that has not expired.
async fn ask(process: &TokenProvider) -> Result<String, TestCaseError> {
    let begun = Instant::now();
    loop {
        // A refresh whose answer does not come ends with an error; the next caller has another.
        match process.token().await {
            Ok(token) => {
                prop_assert!(!token.remaining().unwrap().is_zero());
                return Ok(token.access_token().to_owned());
            }
            Err(error) => {
                prop_assert!(error.is_transient() && begun.elapsed() < PATIENCE * 4, "{:?}", error);
            }
        }
    }
}

async fn live(steps: Vec<Step>) -> Result<(), TestCaseError> {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    let build = || endpoint.process(&store).lease(LEASE).build().unwrap();
    let mut processes = [(); PROCESSES].map(|()| build());
    let disturbs =
        |step: &Step| matches!(step, Step::Store(_) | Step::Flush | Step::Delay(_) | Step::Restart(_));
    let is_calm = !steps.iter().any(disturbs);
    for step in steps {
        match step {
            Step::Ask(process) => _ = ask(&processes[process]).await?,
            Step::AskAll => {
                let asked = processes.clone().map(|process| tokio::spawn(async move { ask(&process).await }));
                for asked in asked {
                    asked.await.unwrap()?;
                }
            }
            Step::Refuse(process) => {
                if let Some(token) = processes[process].current() {
                    // It may be told to come back later, but not to wait for ever.
                    prop_assert!(timeout(PATIENCE, processes[process].refresh(&token)).await.is_ok());
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
            Step::Elsewhere => _ = endpoint.authenticate_elsewhere(),
            Step::Restart(process) => processes[process] = build(),
        }
    }

    // Where nothing has gone wrong, the lease was enough, however slow the endpoint was.
    let presented_twice = endpoint.grants().presented_twice;
    prop_assert!(
        !is_calm || presented_twice == 0,
        "refresh tokens presented by two at once: {}",
        presented_twice
    );

    // All is well from here on.
    store.set(Health::Good);
    endpoint.change(|grants| {
        grants.delays.clear();
        grants.takes = None;
    });
    sleep(3 * MINUTE).await;
    for process in &processes {
        ask(process).await?;
    }
    for _ in 0..2 {
        // One expiry, at which all of them come at once.
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
    #![proptest_config(ProptestConfig { cases: 1_000, max_shrink_iters: 10_000, ..ProptestConfig::default() })]

    #[test]
    fn fleet_converges_after_any_fault(
        steps in prop::collection::vec(step(), 0..40)
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        runtime.unwrap().block_on(live(steps))?;
    }

    #[test]
    fn calm_fleet_presents_no_token_twice(
        steps in prop::collection::vec(calm_step(), 0..40)
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        runtime.unwrap().block_on(live(steps))?;
    }
}
