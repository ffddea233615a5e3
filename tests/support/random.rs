//! Random sequences of steps for the models.

use std::{
    env,
    fmt::Debug,
    hash::{BuildHasher, RandomState},
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
};

use super::fleet::Chance;

/// Returns how often a random test runs: a twentieth of `all` times `TEST_RUNS` of the environment, which is 1 by default
/// and 20 in the gate.
pub fn runs(all: u64) -> u64 {
    all * env::var("TEST_RUNS").map_or(1, |factor| factor.parse::<u64>().unwrap()) / 20
}

/// Checks random sequences of steps: `check` panics if one fails.
///
/// Prints the shortest sequence that still fails, found by removing steps, and the `TEST_SEED` that repeats it.
pub fn sequences<S: Clone + Debug>(
    runs: u64,
    length: Range<u64>,
    step: impl Fn(&mut Chance) -> S,
    check: impl Fn(Vec<S>),
) {
    let first =
        env::var("TEST_SEED").map_or_else(|_| RandomState::new().hash_one(0), |seed| seed.parse().unwrap());
    let failure = |steps: &[S]| catch_unwind(AssertUnwindSafe(|| check(steps.to_vec()))).err();
    for run in 0..runs {
        let seed = first.wrapping_add(run);
        let mut chance = Chance(seed);
        let length = length.start + chance.draw(length.end - length.start);
        let mut steps: Vec<_> = (0..length).map(|_| step(&mut chance)).collect();
        let Some(mut failed) = failure(&steps) else { continue };
        let mut at = steps.len();
        while at > 0 {
            at -= 1;
            let mut shorter = steps.clone();
            shorter.remove(at);
            if let Some(still) = failure(&shorter) {
                (steps, failed) = (shorter, still);
                at = steps.len();
            }
        }
        eprintln!("TEST_SEED={seed}, the shortest sequence that fails: {steps:#?}");
        resume_unwind(failed);
    }
}
