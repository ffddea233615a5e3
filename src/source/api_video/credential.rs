//! [`Credential`]: what the next grant is made with, and which refresh tokens are spent.

use secrecy::{ExposeSecret, SecretString};

use crate::{error::SourceError, token::Token};

/// A refresh token whose use may have been lost this often is spent, as far as we can tell.
const MAX_LOST: u8 = 2;

const MAX_KEY_LEN: usize = 1024;

pub(super) struct Credential {
    key: SecretString,
    /// Counts the keys.
    revision: u64,
    /// The token last granted was granted to this key.
    granted_revision: u64,
    /// The refresh token that was tried last, and how often its use may have been lost.
    tried: Option<(SecretString, u8)>,
}

impl Credential {
    pub(super) fn new(key: String) -> Self {
        Self { key: key.into(), revision: 0, granted_revision: 0, tried: None }
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

    /// The refresh token to spend, if one is left. It counts as lost from now on, until [`found`](Self::found).
    pub(super) fn spend<'a>(&mut self, previous: Option<&'a Token>) -> Option<&'a str> {
        let refresh_token = previous?.refresh_token()?;
        // Another key may be another account's.
        if self.revision != self.granted_revision {
            return None;
        }
        let lost = match &mut self.tried {
            Some((tried, lost)) if tried.expose_secret() == refresh_token => lost,
            tried => &mut tried.insert((refresh_token.into(), 0)).1,
        };
        if *lost >= MAX_LOST {
            return None;
        }
        // Before it is sent: the flight may be dropped at any await from here on.
        *lost += 1;
        Some(refresh_token)
    }

    /// The use of the refresh token that was tried last was not lost after all.
    pub(super) fn found(&mut self) {
        if let Some((_, lost)) = &mut self.tried {
            *lost = lost.saturating_sub(1);
        }
    }

    /// The refresh token that was tried last will never be of use again.
    pub(super) fn spent(&mut self) {
        if let Some((_, lost)) = &mut self.tried {
            *lost = MAX_LOST;
        }
    }

    /// Whether the refresh token that was tried last is not to be tried again.
    pub(super) fn is_spent(&self) -> bool {
        self.tried.as_ref().is_some_and(|(_, lost)| *lost >= MAX_LOST)
    }
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
        let token = Token::builder("abc").refresh_token("def").build().unwrap();
        assert_eq!(credential.spend(Some(&token)), Some("def"));
        overwritten(&credential.tried.unwrap().0);
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
