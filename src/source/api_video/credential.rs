//! [`Credential`]: the API key, and how often the newest refresh token was presented.

use std::sync::{Mutex, MutexGuard, PoisonError};

use secrecy::{ExposeSecret, SecretString};

use super::super::endpoint::Sent;
use crate::error::SourceError;

/// How often a refresh token is presented at most: once it may have been spent, and once more.
const MAX_PRESENTED: u8 = 2;

const MAX_KEY_LEN: usize = 1024;

pub(super) struct Credential {
    key: SecretString,
    /// Counts the keys.
    revision: u64,
    /// The token last granted was granted to this key.
    granted_revision: u64,
    /// The refresh token that was presented last, and how often that may have spent it.
    presented: Option<(SecretString, u8)>,
}

impl Credential {
    pub(super) fn new(key: String) -> Self {
        Self { key: key.into(), revision: 0, granted_revision: 0, presented: None }
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
    pub(super) fn granted(&mut self, revision: u64) {
        self.granted_revision = revision;
    }

    /// Counts a refresh token as presented once more; false if it is not to be.
    fn present(&mut self, refresh_token: &str) -> bool {
        // Another key may be another account's.
        if self.revision != self.granted_revision {
            return false;
        }
        let times = match &mut self.presented {
            Some((presented, times)) if presented.expose_secret() == refresh_token => times,
            presented => &mut presented.insert((refresh_token.into(), 0)).1,
        };
        if *times >= MAX_PRESENTED {
            return false;
        }
        *times += 1;
        true
    }

    /// How often this refresh token was presented; `None` if another was since.
    fn times(&mut self, refresh_token: &str) -> Option<&mut u8> {
        let (presented, times) = self.presented.as_mut()?;
        (presented.expose_secret() == refresh_token).then_some(times)
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

    /// It will never be of use again.
    pub(super) fn spend(self) {
        if let Some(times) = lock(self.credential).times(self.refresh_token) {
            *times = MAX_PRESENTED;
        }
    }

    /// Whether it is not presented again after this.
    pub(super) fn is_last(&self) -> bool {
        lock(self.credential).times(self.refresh_token).is_none_or(|times| *times >= MAX_PRESENTED)
    }
}

impl Drop for Presented<'_> {
    fn drop(&mut self) {
        if self.is_unspent || !self.sent.get() {
            if let Some(times) = lock(self.credential).times(self.refresh_token) {
                *times = times.saturating_sub(1);
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
    fn a_key_and_a_tried_refresh_token_are_overwritten_when_they_are_dropped() {
        fn overwritten(_: &impl zeroize::ZeroizeOnDrop) {}

        let mut credential = Credential::new("key".into());
        overwritten(&credential.key);
        assert!(credential.present("def"));
        overwritten(&credential.presented.unwrap().0);
    }

    #[test]
    fn a_key_that_cannot_be_one_is_an_error_that_says_what_to_do() {
        for bad in ["", " ", "canary key", "canary\n", "canaré", &"a".repeat(MAX_KEY_LEN + 1)] {
            let error = Credential::new(bad.into()).key().err().unwrap();
            assert!(error.to_string().contains("dashboard") && !error.to_string().contains("canar"));
            assert!(!error.is_transient());
        }
        assert!(Credential::new("kq5z3-_x".into()).key().is_ok());
    }
}
