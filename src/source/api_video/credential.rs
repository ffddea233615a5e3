//! [`Credential`]: the API key, and what is known of the refresh tokens that were granted to it.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
};

use secrecy::{ExposeSecret, SecretString};

use super::super::endpoint::Sent;
use crate::{error::SourceError, token::Token};

/// How often a refresh token is presented at most: once it may have been spent, and once more.
const MAX_PRESENTED: u8 = 2;

/// Of so many refresh tokens it is known how often they were presented: several providers may share the credential.
const MAX_KNOWN: usize = 16;

const MAX_KEY_LEN: usize = 1024;

pub(super) struct Credential {
    key: SecretString,
    /// Counts the keys.
    revision: u64,
    /// The newest key to which a token was granted.
    granted_revision: u64,
    /// The newest last.
    known: VecDeque<Known>,
}

/// What is known of a refresh token.
struct Known {
    refresh_token: SecretString,
    /// The key that it was granted to, itself or the one before it.
    revision: u64,
    /// How often it was presented: each time may have spent it.
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

    /// The API key, if it can be one, and its revision.
    pub(super) fn key(&self) -> Result<(SecretString, u64), SourceError> {
        let key = self.key.expose_secret();
        let wrong = |what: &'static str| Err(SourceError::configuration(what));
        if key.is_empty() {
            return wrong("the API key is empty: copy it from api.video's dashboard, under API Keys");
        }
        if key.len() > MAX_KEY_LEN || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
            return wrong(
                "the API key has a space, a line break or another character that no key has: copy it again from \
                 api.video's dashboard, under API Keys",
            );
        }
        Ok((self.key.clone(), self.revision))
    }

    /// A token was granted to the key of this revision.
    pub(super) fn granted(&mut self, revision: u64, token: &Token) {
        self.granted_revision = self.granted_revision.max(revision);
        if let Some(refresh_token) = token.refresh_token() {
            self.learn(refresh_token, revision);
        }
    }

    /// A token was granted for this refresh token: it is of the same key.
    fn renewed(&mut self, refresh_token: &str, token: &Token) {
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

    /// Counts a refresh token as presented once more; false if it is not to be.
    fn present(&mut self, refresh_token: &str) -> bool {
        // Another process' is taken for one of the key that a token was granted to last.
        self.learn(refresh_token, self.granted_revision);
        let newest = self.revision;
        let Some(known) = self.find(refresh_token) else { return false };
        // Another key may be another account's.
        if known.revision != newest || known.presented >= MAX_PRESENTED {
            return false;
        }
        known.presented += 1;
        true
    }
}

/// A refresh token on its way to the endpoint.
///
/// It counts as presented from the start, since the exchange may be dropped at any await; but not in the end if its request
/// was not sent.
pub(super) struct Presented<'a> {
    credential: &'a Mutex<Credential>,
    refresh_token: &'a str,
    sent: &'a Sent,
    is_unspent: bool,
}

impl<'a> Presented<'a> {
    /// `None` if the refresh token is not to be presented any more.
    pub(super) fn new(
        credential: &'a Mutex<Credential>,
        refresh_token: &'a str,
        sent: &'a Sent,
    ) -> Option<Self> {
        let is_left = lock(credential).present(refresh_token);
        is_left.then(|| Self { credential, refresh_token, sent, is_unspent: false })
    }

    pub(super) fn refresh_token(&self) -> &'a str {
        self.refresh_token
    }

    /// The answer says that it was not spent.
    pub(super) fn take_back(mut self) {
        self.is_unspent = true;
    }

    /// `token` was granted for it.
    pub(super) fn renewed(self, token: &Token) {
        lock(self.credential).renewed(self.refresh_token, token);
    }

    /// It will never be of use again.
    pub(super) fn spend(self) {
        if let Some(known) = lock(self.credential).find(self.refresh_token) {
            known.presented = MAX_PRESENTED;
        }
    }

    /// Whether it is not presented again after this.
    pub(super) fn is_last(&self) -> bool {
        lock(self.credential).find(self.refresh_token).is_none_or(|known| known.presented >= MAX_PRESENTED)
    }
}

impl Drop for Presented<'_> {
    fn drop(&mut self) {
        if self.is_unspent || !self.sent.get() {
            if let Some(known) = lock(self.credential).find(self.refresh_token) {
                known.presented = known.presented.saturating_sub(1);
            }
        }
    }
}

pub(super) fn lock(credential: &Mutex<Credential>) -> MutexGuard<'_, Credential> {
    credential.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Row 48: by type, since memory that has been freed cannot be looked at.
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
