//! [`Credential`]: a secret that can be replaced, and how often each refresh token that was granted to it has been
//! presented.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
};

use secrecy::{ExposeSecret, SecretString};

use super::Sent;
use crate::token::Token;

/// How often a refresh token is presented at most. The first time may have spent it, so there is a second one.
const MAX_PRESENTED: u8 = 2;

/// How many refresh tokens are remembered. Several providers may share the credential, each with its own refresh token.
const MAX_KNOWN: usize = 16;

/// A secret that tokens are granted to, and the refresh tokens of its chains: each is granted for the one before it.
///
/// For `ApiVideo` the secret is the API key. For `OAuth2` it is the refresh token that a login gave, the first of its
/// chain.
pub(crate) struct Credential {
    secret: SecretString,
    /// How often the secret was replaced.
    revision: u64,
    /// The revision of the newest secret to which a token was granted.
    granted_revision: Option<u64>,
    /// The refresh tokens that are remembered, the newest last.
    known: VecDeque<Known>,
}

/// A refresh token that is remembered.
struct Known {
    refresh_token: SecretString,
    /// The revision of the secret that it, or the first refresh token of its chain, was granted to.
    revision: u64,
    /// How often it was presented. Each time may have spent it.
    presented: u8,
}

impl Credential {
    pub(crate) fn new(secret: String) -> Self {
        Self { secret: secret.into(), revision: 0, granted_revision: None, known: VecDeque::new() }
    }

    pub(crate) fn set_secret(&mut self, secret: String) {
        // It may have been presented before, and rejected since. The user says that it is good.
        self.known.retain(|known| known.refresh_token.expose_secret() != secret);
        self.secret = secret.into();
        self.revision += 1;
    }

    pub(crate) fn revision(&self) -> u64 {
        self.revision
    }

    /// Returns the secret and its revision.
    pub(crate) fn secret(&self) -> (SecretString, u64) {
        (self.secret.clone(), self.revision)
    }

    /// Returns the secret as a refresh token, if no token was granted for it and it may be presented. An empty one is none.
    #[cfg(feature = "oauth2")]
    pub(crate) fn seed(&mut self) -> Option<SecretString> {
        let seed = self.secret.clone();
        let is_left = self.find(seed.expose_secret()).is_none_or(|known| known.presented < MAX_PRESENTED);
        let is_left =
            is_left && !seed.expose_secret().is_empty() && self.granted_revision != Some(self.revision);
        is_left.then_some(seed)
    }

    /// Records that `token` was granted to the secret of this revision.
    #[cfg(feature = "api-video")]
    pub(crate) fn granted(&mut self, revision: u64, token: &Token) {
        self.granted_revision = self.granted_revision.max(Some(revision));
        if let Some(refresh_token) = token.refresh_token() {
            self.learn(refresh_token, revision);
        }
    }

    /// Records that `token` was granted for this refresh token, and so belongs to the same secret.
    fn renewed(&mut self, refresh_token: &str, token: &Token) {
        let Some(known) = self.find(refresh_token) else { return };
        let (is_rotated, revision) = (token.refresh_token() != Some(refresh_token), known.revision);
        known.presented = if is_rotated { MAX_PRESENTED } else { 0 };
        if let Some(next) = token.refresh_token() {
            self.learn(next, revision);
        }
        if is_rotated && refresh_token == self.secret.expose_secret() {
            self.granted_revision = self.granted_revision.max(Some(revision));
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
    fn present(&mut self, refresh_token: &str) -> bool {
        let newest = self.revision;
        let is_secret = refresh_token == self.secret.expose_secret();
        // An unknown refresh token is another process's. It is assumed to belong to the newest secret that was granted a
        // token.
        self.learn(refresh_token, if is_secret { newest } else { self.granted_revision.unwrap_or(0) });
        let Some(known) = self.find(refresh_token) else { return false };
        // A new secret may belong to another account, whose tokens the old refresh token does not give.
        if known.revision != newest || known.presented >= MAX_PRESENTED {
            return false;
        }
        known.presented += 1;
        true
    }
}

/// A refresh token that is being presented to the endpoint.
///
/// It counts as presented from the start, because the exchange may be dropped at any await. Its drop takes that back if
/// the request was not sent.
pub(crate) struct Presented<'a> {
    credential: &'a Mutex<Credential>,
    refresh_token: &'a str,
    sent: &'a Sent,
    is_unspent: bool,
}

impl<'a> Presented<'a> {
    /// Counts the refresh token as presented. Returns `None` if it must not be presented any more.
    pub(crate) fn new(
        credential: &'a Mutex<Credential>,
        refresh_token: &'a str,
        sent: &'a Sent,
    ) -> Option<Self> {
        let is_left = lock(credential).present(refresh_token);
        is_left.then(|| Self { credential, refresh_token, sent, is_unspent: false })
    }

    pub(crate) fn refresh_token(&self) -> &'a str {
        self.refresh_token
    }

    /// Records that the response says that the refresh token was not spent.
    pub(crate) fn take_back(mut self) {
        self.is_unspent = true;
    }

    /// Records that `token` was granted for the refresh token.
    pub(crate) fn renewed(self, token: &Token) {
        lock(self.credential).renewed(self.refresh_token, token);
    }

    /// Records that the refresh token must not be presented again.
    pub(crate) fn spend(self) {
        if let Some(known) = lock(self.credential).find(self.refresh_token) {
            known.presented = MAX_PRESENTED;
        }
    }

    /// Whether this is the last time that the refresh token is presented.
    pub(crate) fn is_last(&self) -> bool {
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

pub(crate) fn lock(credential: &Mutex<Credential>) -> MutexGuard<'_, Credential> {
    credential.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Row 48. Checked by type, because a test cannot read freed memory.
    #[test]
    fn zeroizes_secret_and_refresh_token() {
        fn overwritten(_: &impl zeroize::ZeroizeOnDrop) {}

        let mut credential = Credential::new("key".into());
        overwritten(&credential.secret);
        assert!(credential.present("def"));
        overwritten(&credential.known[0].refresh_token);
    }
}
