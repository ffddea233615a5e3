//! [`ApiKey`]: the key of [`ApiVideo`](super::ApiVideo), which can be replaced.

use secrecy::{ExposeSecret, SecretString};

use crate::error::SourceError;

/// The maximum length of a key in bytes.
const MAX_LEN: usize = 1024;

#[derive(Clone)]
pub(super) struct ApiKey {
    pub(super) key: SecretString,
    /// How often it was replaced.
    pub(super) revision: u64,
}

impl ApiKey {
    pub(super) fn unchecked(&self) -> &str {
        self.key.expose_secret()
    }

    /// Returns the key.
    ///
    /// # Errors
    ///
    /// [`SourceError::configuration`] if it is empty, too long, or has a character that no key has.
    pub(super) fn checked(&self) -> Result<&str, SourceError> {
        let key = self.unchecked();
        let what = match key.len() {
            0 => "not be empty: copy it",
            1..=MAX_LEN if key.bytes().all(|byte| byte.is_ascii_graphic()) => return Ok(key),
            _ => "be at most 1024 visible ASCII characters, without a space or a line break: copy it again",
        };
        let text = format!("the API key must {what} from api.video's dashboard, under API Keys");
        Err(SourceError::configuration(text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(key: &str) -> ApiKey {
        ApiKey { key: key.into(), revision: 0 }
    }

    /// The API key stays in memory after it was dropped. Checked by type, because a test cannot read freed memory.
    #[test]
    fn zeroizes_key() {
        fn overwritten(_: &impl zeroize::ZeroizeOnDrop) {}

        overwritten(&key("key").key);
    }

    /// An API key is not valid: the error has a hint, and does not show the key.
    #[test]
    fn invalid_key_error_has_hint() {
        for bad in ["", " ", "canary key", "canary\n", "canaré", &"a".repeat(MAX_LEN + 1)] {
            let error = key(bad).checked().err().unwrap();
            assert!(error.to_string().contains("dashboard") && !error.to_string().contains("canar"));
            assert!(!error.is_transient());
        }
        assert!(key("kq5z3-_x").checked().is_ok());
    }
}
