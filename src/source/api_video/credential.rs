//! [`Credential`]: the API key, and how often each refresh token that was granted to it has been presented.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use secrecy::{ExposeSecret, SecretString};

use super::super::presented::{Count, MAX_PRESENTED};
use crate::{error::SourceError, token::Token};

/// How many refresh tokens are remembered. Several providers may share the credential, each with its own refresh token.
const MAX_KNOWN: usize = 16;

/// The maximum length of a key in bytes.
const MAX_KEY_LEN: usize = 1024;

/// The API key, and the refresh tokens that were granted to it.
pub(super) struct Credential {
    key: SecretString,
    /// How often the key was replaced.
    revision: u64,
    /// The revision of the newest key to which a token was granted.
    granted_revision: u64,
    /// The refresh tokens that are remembered, the newest last.
    known: VecDeque<Known>,
}

/// A refresh token that is remembered.
struct Known {
    refresh_token: SecretString,
    /// The revision of the key that it, or the first refresh token of its chain, was granted to.
    revision: u64,
    /// How often it was presented. Each time may have spent it.
    presented: u8,
}

impl Credential {
    pub(super) fn new(key: String) -> Self {
        Self { key: key.into(), revision: 0, granted_revision: 0, known: VecDeque::new() }
    }

    pub(super) fn set_key(&mut self, key: String) {
        self.key = key.into();
        self.revision += 1;
    }

    pub(super) fn revision(&self) -> u64 {
        self.revision
    }

    /// Returns the API key and its revision.
    ///
    /// # Errors
    ///
    /// [`SourceError::configuration`] if the key is empty, too long, or has a character that no key has.
    pub(super) fn key(&self) -> Result<(SecretString, u64), SourceError> {
        let key = self.key.expose_secret();
        let what = match key.len() {
            0 => "not be empty: copy it",
            1..=MAX_KEY_LEN if key.bytes().all(|byte| byte.is_ascii_graphic()) => {
                return Ok((self.key.clone(), self.revision));
            }
            _ => "be at most 1024 visible ASCII characters, without a space or a line break: copy it again",
        };
        let text = format!("the API key must {what} from api.video's dashboard, under API Keys");
        Err(SourceError::configuration(text))
    }

    /// Records that `token` was granted to the key of this revision.
    pub(super) fn granted(&mut self, revision: u64, token: &Token) {
        self.granted_revision = self.granted_revision.max(revision);
        if let Some(refresh_token) = token.refresh_token() {
            self.learn(refresh_token, revision);
        }
    }

    /// Records that `token` was granted for this refresh token, and so belongs to the same key.
    pub(super) fn renewed(&mut self, refresh_token: &str, token: &Token) {
        if let (Some(next), Some(revision)) =
            (token.refresh_token(), self.find(refresh_token).map(|known| known.revision))
        {
            self.learn(next, revision);
        }
    }

    fn find(&mut self, refresh_token: &str) -> Option<&mut Known> {
        self.known.iter_mut().find(|known| known.refresh_token.expose_secret() == refresh_token)
    }

    fn learn(&mut self, refresh_token: &str, revision: u64) {
        if self.find(refresh_token).is_some() {
            return;
        }
        if self.known.len() == MAX_KNOWN {
            self.known.pop_front();
        }
        self.known.push_back(Known { refresh_token: refresh_token.into(), revision, presented: 0 });
    }

    /// Counts a refresh token as presented once more. Returns false if it must not be presented.
    pub(super) fn present(&mut self, refresh_token: &str) -> bool {
        // An unknown refresh token is another process's. It is assumed to belong to the newest key that was granted a
        // token.
        self.learn(refresh_token, self.granted_revision);
        let newest = self.revision;
        let Some(known) = self.find(refresh_token) else { return false };
        // A new key may belong to another account, whose tokens the old refresh token does not give.
        if known.revision != newest || known.presented >= MAX_PRESENTED {
            return false;
        }
        known.presented += 1;
        true
    }
}

impl Count for Arc<Mutex<Credential>> {
    fn change(&self, refresh_token: &str, change: impl FnOnce(&mut u8)) {
        if let Some(known) = lock(self).find(refresh_token) {
            change(&mut known.presented);
        }
    }
}

pub(super) fn lock(credential: &Mutex<Credential>) -> MutexGuard<'_, Credential> {
    credential.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Row 48. Checked by type, because a test cannot read freed memory.
    #[test]
    fn zeroizes_key_and_refresh_token() {
        fn overwritten(_: &impl zeroize::ZeroizeOnDrop) {}

        let mut credential = Credential::new("key".into());
        overwritten(&credential.key);
        assert!(credential.present("def"));
        overwritten(&credential.known[0].refresh_token);
    }

    #[test]
    fn invalid_key_error_has_hint() {
        for bad in ["", " ", "canary key", "canary\n", "canaré", &"a".repeat(MAX_KEY_LEN + 1)] {
            let error = Credential::new(bad.into()).key().err().unwrap();
            assert!(error.to_string().contains("dashboard") && !error.to_string().contains("canar"));
            assert!(!error.is_transient());
        }
        assert!(Credential::new("kq5z3-_x".into()).key().is_ok());
    }
}
