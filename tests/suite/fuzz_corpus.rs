//! Runs the fuzz targets on their corpus and on small mutations of it, quickly and on any compiler.

#[allow(unreachable_pub)]
#[path = "../../fuzz/src/lib.rs"]
mod targets;

use std::{fs, path::Path};

/// Runs a target on each file of its corpus, on each prefix of it, and with each of its bytes changed.
fn run(name: &str, target: fn(&[u8])) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let mut seeds = 0;
    for file in fs::read_dir(corpus).unwrap() {
        let seed = fs::read(file.unwrap().path()).unwrap();
        seeds += 1;
        target(&seed);
        for at in 0..seed.len().min(200) {
            target(&seed[..at]);
            for change in [0x01, 0x20, 0x80] {
                let mut changed = seed.clone();
                changed[at] ^= change;
                target(&changed);
            }
        }
    }
    assert!(seeds >= 10, "{seeds} seeds of {name}");
}

/// A token response of any bytes makes the crate panic.
#[test]
fn token_response() {
    run("token_response", targets::token_response);
}

/// A `Retry-After` header of any bytes makes the crate panic.
#[test]
fn retry_after() {
    run("retry_after", targets::retry_after);
}

/// A stored record of any bytes makes the crate panic.
#[test]
fn store_record() {
    run("store_record", targets::store_record);
}

/// A `WWW-Authenticate` header of any bytes makes the crate panic.
#[test]
fn www_authenticate() {
    run("www_authenticate", targets::www_authenticate);
}
