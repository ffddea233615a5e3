//! A model of the protocol by which processes share a login ([`TokenStore`](tower_bearer::store::TokenStore)), checked in
//! all its states by [stateright](https://docs.rs/stateright). Its steps are written from the rules: none calls the crate.
//! `tests/suite/fleet_model.rs` tests the crate itself, with random faults.
//!
//! # What it has
//!
//! One to three processes share one store and one rotating login. Each step of a process is one operation of the store, or
//! one of the request or its answer: [`Action`](actions::Action) lists them, and names the functions of the crate. A
//! process can be killed before and after each, and starts again with an empty memory and the first refresh token of the
//! login. Each operation can fail, performed or not. Requests and answers can be lost. [`Reuse`] is what the endpoint does
//! with a spent refresh token.
//!
//! # Time
//!
//! There is none: what takes long is a step that comes late. These are the assumptions about time:
//!
//! - **A lease ends by itself only if nobody extends it**, and then at any moment: its process was killed, or has given it up
//!   (`LeaseEnds`). A lease of `FileStore` ends with its process, by the kernel's lock, or after its length by the monotonic
//!   clock; one of `RedisStore` by Redis' clock. So a step of a host's wall clock ends none. What can end the lease of a
//!   process that works are faults of the kind `early`: it is stopped, or its store fails, for longer than the lease; Redis
//!   loses the lease, or its clock is set.
//! - **A process stores what it was granted within `PUBLISH_GRACE`** once the store works (`MarkWaited`).
//! - **The grace of the endpoint** ends when no process is on its way to present the refresh token again (`GraceEnds`). One
//!   whose access token is expiring, as far as it knows, is on its way. So the model assumes that processes have requests,
//!   that a killed one starts again within the grace, and that all learn of an expiry together. Without one of these the
//!   login can be lost: the page `fleet` says what that means for a deployment.
//! - **An access token lives longer** than a refresh takes, a stop of its process included.
//!
//! The check that half of the lease is left is not in the model. It only prevents steps that the model takes.
//!
//! # What holds
//!
//! | property | assumes |
//! |---|---|
//! | a refresh token is presented by one process at a time | no fault `early`, no record lost |
//! | no spent refresh token is presented | the same, no process killed, no answer lost |
//! | no record replaces a newer one | nothing |
//! | every process ends with a token, or with 'login required' | nothing |
//! | the login is never lost | a grace, and processes with requests that start again within it; or no process killed and no answer lost; and no record lost |
//!
//! `two_holders_cost_no_login`, `lost_record_hangs_nobody` and `without_grace_fleet_ends_with_login_required` show that each
//! assumption is needed, `each_rule_is_needed` that each property fails if the protocol lacks one of its mutants' rules. Six rules of the model have no mutant: the read
//! before a rejection counts, `cannot_write`, `compare_with`, `store_again`, `untaken`, and the adoption after `Superseded`.
//!
//! # Bounds
//!
//! The faults are counted, so that every run ends ([`check::ends`]), and what holds of the last states holds of every run.
//! The tests print their numbers (`--nocapture`): 2.9 million states, half a minute of CPU time. A fleet has two rotations,
//! or three with one fault. All pairs of faults of processes, requests and leases occur with two processes, and with three at
//! their start.
//!
//! Not in the model: readers, other credentials, a second login, doubtful answers, and refreshes that time out before their
//! exchange.

mod actions;
mod check;
mod fleet;
mod rules;
mod steps;

use std::{fs, path::Path};

use check::{
    ENDS_WELL, KEEPS_LOGIN, Lease, Mutant, NEVER_SPENT, NEWEST_STAYS, ONE_AT_A_TIME, ends, finds, holds,
};
use fleet::{Faults, Reuse};

/// The functions that the model has steps or rules for, by file.
const MODELS: &[(&str, &[&str])] = &[
    ("src/chain.rs", &["begin", "granted", "presented", "judge", "renewable", "is_newer_than", "order"]),
    ("src/login/mod.rs", &["token", "untaken"]),
    (
        "src/login/with_store.rs",
        &["with_store", "is_presented_by_another", "newest", "adopt_if_newer", "take_up", "without_store"],
    ),
    ("src/login/present.rs", &["ask", "prepare", "mark", "next", "granted", "is_over", "failed"]),
    (
        "src/login/publish.rs",
        &[
            "ask_and_publish",
            "compare_with",
            "store_again",
            "publish_later",
            "publish_under",
            "publish_unless_newer",
        ],
    ),
    ("src/store/access.rs", &["lease_or_wait", "extending", "publish_for_a_lease", "release"]),
    ("src/store/token_store.rs", &["load", "lease", "extend", "publish", "release"]),
    ("crates/tower-bearer-store/src/file/files.rs", &["load", "lease", "extend", "replace_lease", "publish"]),
    ("crates/tower-bearer-store/src/redis/mod.rs", &["load", "lease", "extend", "publish", "release"]),
];

/// What holds of every fleet whose processes are never stopped for longer than a lease.
const SAFE: &[&str] = &[ONE_AT_A_TIME, NEWEST_STAYS, ENDS_WELL];
const SAFE_AND_KEPT: &[&str] = &[ONE_AT_A_TIME, NEWEST_STAYS, ENDS_WELL, KEEPS_LOGIN];
/// What holds even if nothing is lost at an endpoint without a grace.
const ALL: &[&str] = &[ONE_AT_A_TIME, NEVER_SPENT, NEWEST_STAYS, ENDS_WELL, KEEPS_LOGIN];

fn lease(processes: usize, reuse: Reuse, faults: Faults) -> Lease {
    Lease { processes, reuse, faults, properties: &[], sorts: true, mutant: None }
}

/// One expiry, and no fault.
const CALM: Faults =
    Faults { total: 0, expiries: 1, crashes: 0, store: 0, outages: 0, lost: 0, early: 0, rollbacks: 0 };

/// A function that the model describes is renamed, or moves.
#[test]
fn modelled_functions_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    for (file, functions) in MODELS {
        let source = fs::read_to_string(root.join(file)).unwrap();
        for function in *functions {
            let is_there =
                [format!("fn {function}("), format!("fn {function}<")].iter().any(|it| source.contains(it));
            assert!(is_there, "{file} has no {function}: does the model still describe the crate?");
        }
    }
}

/// Three processes start, and their access token expires, at any moment.
#[test]
fn healthy_fleet_presents_each_refresh_token_once() {
    let model = lease(3, Reuse::Revokes, CALM);
    holds("three processes", &model, ALL);
    ends("three processes", &model);
}

/// Operations of the store fail, performed or not, and the store is down for longer than a lease.
#[test]
fn failures_of_store_spend_no_refresh_token_twice() {
    let faults = Faults { total: 1, outages: 1, ..CALM };
    holds("three processes, one outage", &lease(3, Reuse::Revokes, faults), ALL);
    let model = lease(2, Reuse::Revokes, Faults { total: 2, store: 2, ..faults });
    holds("two processes, two failures", &model, ALL);
    ends("two processes, two failures", &model);
}

/// Processes are killed between any two steps, requests and answers are lost, and the store fails. The endpoint has a
/// grace.
#[test]
fn killed_processes_and_lost_answers_cost_no_login() {
    let faults = Faults { crashes: 2, lost: 2, store: 1, outages: 1, ..CALM };
    let one = lease(1, Reuse::Grace, Faults { total: 2, expiries: 2, ..faults });
    holds("one process, two faults", &one, SAFE_AND_KEPT);
    ends("one process, two faults", &one);
    let two = Faults { total: 2, crashes: 2, lost: 1, ..CALM };
    holds("two processes, two faults", &lease(2, Reuse::Grace, two), SAFE_AND_KEPT);
    let expiries = lease(2, Reuse::Grace, Faults { total: 1, expiries: 2, crashes: 1, lost: 1, ..CALM });
    holds("two processes, two expiries, one fault", &expiries, SAFE_AND_KEPT);
    let three = lease(3, Reuse::Grace, Faults { total: 2, expiries: 0, ..faults });
    holds("three processes, two faults at the start", &three, SAFE_AND_KEPT);
}

/// The answer is lost, or dies with its process, and the endpoint has no grace: the login may be lost, and no process
/// hangs.
#[test]
fn without_grace_fleet_ends_with_login_required() {
    let faults = Faults { total: 2, crashes: 1, lost: 1, ..CALM };
    for reuse in [Reuse::Rejects, Reuse::Revokes] {
        holds(&format!("{reuse:?}"), &lease(2, reuse, faults), SAFE);
        finds(&format!("{reuse:?}"), &lease(2, reuse, faults), &[KEEPS_LOGIN]);
    }
    ends("no grace", &lease(2, Reuse::Revokes, faults));
}

/// A process is stopped for longer than its lease, or the store forgets that: two present one refresh token. The grace of
/// the endpoint keeps the login, and the fence the newest record.
#[test]
fn two_holders_cost_no_login() {
    let faults = Faults { total: 2, early: 1, crashes: 1, lost: 1, ..CALM };
    let model = lease(2, Reuse::Grace, faults);
    holds("two holders", &model, &[NEWEST_STAYS, ENDS_WELL, KEEPS_LOGIN]);
    ends("two holders", &Lease { faults: Faults { total: 1, store: 1, outages: 1, ..faults }, ..model });
    // What `ONE_AT_A_TIME` and `NEVER_SPENT` assume.
    let early = Faults { total: 1, early: 1, ..CALM };
    finds("a lease ends early", &lease(2, Reuse::Grace, early), &[ONE_AT_A_TIME]);
    finds("a lease ends early", &lease(2, Reuse::Grace, early), &[NEVER_SPENT]);
}

/// The store loses its newest record, and the lease.
#[test]
fn lost_record_hangs_nobody() {
    let model = lease(2, Reuse::Grace, Faults { total: 1, rollbacks: 1, ..CALM });
    holds("a lost record", &model, &[NEWEST_STAYS, ENDS_WELL]);
    ends("a lost record", &model);
    // `RedisStore` says so: "a lost record of a user's login may cost it".
    finds("a lost record", &model, &[KEEPS_LOGIN]);
}

/// Each rule of the protocol is left out in turn: the checker finds what it prevents.
#[test]
fn each_rule_is_needed() {
    use Mutant::*;
    let crash = Faults { total: 1, crashes: 1, ..CALM };
    let lost = Faults { total: 1, lost: 1, ..CALM };
    let store = Faults { total: 1, store: 1, outages: 1, ..CALM };
    let early = Faults { total: 1, early: 1, ..CALM };
    type Of = &'static [&'static str; 1];
    let rules: [(Mutant, usize, Reuse, Faults, Of); 10] = [
        (IgnoresLease, 2, Reuse::Grace, CALM, &[ONE_AT_A_TIME]),
        (ReadsOnce, 2, Reuse::Grace, CALM, &[NEVER_SPENT]),
        (IgnoresMark, 2, Reuse::Revokes, store, &[NEVER_SPENT]),
        (AdoptsOlderRecord, 2, Reuse::Revokes, store, &[NEVER_SPENT]),
        (PublishesWithoutFence, 2, Reuse::Rejects, early, &[NEWEST_STAYS]),
        (OrdersByVersion, 2, Reuse::Rejects, early, &[KEEPS_LOGIN]),
        (RestartPresentsSeed, 1, Reuse::Grace, Faults { expiries: 2, ..crash }, &[KEEPS_LOGIN]),
        (TrustsMarkedToken, 1, Reuse::Grace, crash, &[KEEPS_LOGIN]),
        (LostAnswerEndsLogin, 2, Reuse::Grace, lost, &[KEEPS_LOGIN]),
        (LeaseNeverEnds, 2, Reuse::Grace, crash, &[ENDS_WELL]),
    ];
    for (mutant, processes, reuse, faults, property) in rules {
        let model = Lease { mutant: Some(mutant), ..lease(processes, reuse, faults) };
        finds(&format!("{mutant:?}"), &model, property);
        // It is the rule that makes the difference.
        holds("with the rule", &Lease { mutant: None, ..model }, property);
    }
}
