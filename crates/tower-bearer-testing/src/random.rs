//! Random text in hexadecimal digits.

use std::fmt::Write as _;

use ring::rand::{SecureRandom, SystemRandom};

/// Returns random bytes in hexadecimal digits.
pub(super) fn random(bytes: usize) -> String {
    let mut buffer = vec![0; bytes];
    // Fails only if the kernel has no random number generator.
    SystemRandom::new().fill(&mut buffer).expect("the system has no randomness");
    hex(&buffer)
}

/// Returns the bytes in hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
