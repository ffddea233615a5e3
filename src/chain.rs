//! [`Chain`]: the refresh tokens of a credential or of a user's login: which one is presented next, and what an answer
//! changes.
//!
//! Nothing in here waits, or reads a store: the same rules hold for the memory of one process and for the record of a fleet.

use std::{mem, sync::Arc, time::Duration};

use secrecy::{ExposeSecret, SecretString};
use tokio::time::Instant;

use crate::{
    source::{Credential, fingerprint},
    token::Token,
};

/// How many logins are remembered after others have replaced them.
const MAX_REPLACED: usize = 16;

/// How often a doubtful refresh token is presented at most.
pub(crate) const DOUBT: Duration = Duration::from_secs(60);

/// What a process, or a record, knows.
#[derive(Clone, Default)]
pub(crate) struct Known {
    /// The newest access token, which may have expired. `None` if none can be used.
    pub(crate) token: Option<Token>,
    pub(crate) chain: Chain,
    /// The credential that both were granted to.
    pub(crate) credential: Option<Arc<Credential>>,
    /// The version of the record that has it, or that it was made from. 0 without a record.
    pub(crate) version: u64,
}

#[derive(Clone, Default)]
pub(crate) struct Chain {
    /// The newest refresh token, which is presented next.
    pub(crate) refresh_token: Option<SecretString>,
    /// The login that it belongs to. `None` if it was granted to a credential.
    pub(crate) login: Option<Box<LoginChain>>,
}

/// What is known of a login besides its refresh token.
#[derive(Clone, Default)]
pub(crate) struct LoginChain {
    /// The fingerprint of its first refresh token.
    pub(crate) id: String,
    /// The logins that this one has replaced, the newest last.
    pub(crate) replaced: Vec<String>,
    /// The login that a configured one replaces once a token is granted for that: its refresh token and its id.
    pub(crate) before: Option<(SecretString, String)>,
    /// Whether it has ended: then the version of the record whose refresh token was rejected.
    pub(crate) ended: Option<u64>,
    /// Until when a doubtful refresh token is not presented.
    pub(crate) doubted_until: Option<Instant>,
}

/// A refresh token that a login gave.
#[derive(Clone)]
pub(crate) struct Seed {
    pub(crate) refresh_token: SecretString,
    /// Whether it is part of the configuration, and not one that a user has just logged in with.
    pub(crate) is_configured: bool,
}

impl Seed {
    pub(crate) fn id(&self) -> String {
        fingerprint([self.refresh_token.expose_secret()])
    }
}

/// What becomes of a chain when a seed is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Begun {
    /// The login is new: its seed is presented next.
    New,
    /// The login is the chain's.
    Same,
    /// The login was replaced before, so the seed is ignored.
    Old,
    /// The configuration has the login again that an ungranted one was to replace.
    Back,
}

impl Chain {
    pub(crate) fn id(&self) -> Option<&str> {
        self.login.as_ref().map(|login| &*login.id)
    }

    pub(crate) fn knows(&self, id: &str) -> bool {
        let replaced = self.login.iter().flat_map(|login| &login.replaced);
        self.id() == Some(id) || replaced.into_iter().any(|replaced| replaced == id)
    }

    /// Begins the login of a seed, unless it is known.
    pub(crate) fn begin(&mut self, seed: &Seed) -> Begun {
        let id = seed.id();
        if self.id() == Some(&id) {
            return Begun::Same;
        }
        let mut old = self.login.take().map(|login| *login).unwrap_or_default();
        // A configuration that was corrected.
        let is_before = old.before.as_ref().is_some_and(|(_, before)| *before == id);
        if is_before || old.replaced.contains(&id) {
            self.login = Some(Box::new(old));
            return if is_before && self.fall_back() { Begun::Back } else { Begun::Old };
        }
        // A wrong configuration must not cost the login that works. A user who logs in may be another one.
        let works =
            self.refresh_token.take().filter(|_| !old.id.is_empty()).map(|works| (works, old.id.clone()));
        let before = old.before.take().or(works).filter(|_| seed.is_configured);
        old.replaced.extend((!old.id.is_empty()).then_some(old.id));
        old.replaced.drain(..old.replaced.len().saturating_sub(MAX_REPLACED));
        self.refresh_token = Some(seed.refresh_token.clone());
        self.login =
            Some(Box::new(LoginChain { id, replaced: old.replaced, before, ..LoginChain::default() }));
        Begun::New
    }

    /// Returns to the login before. Returns false if there is none.
    fn fall_back(&mut self) -> bool {
        let Some(login) = &mut self.login else { return false };
        let Some((refresh_token, id)) = login.before.take() else { return false };
        login.replaced.retain(|replaced| *replaced != id);
        let replaced = mem::take(&mut login.replaced);
        **login = LoginChain { id, replaced, ..LoginChain::default() };
        self.refresh_token = Some(refresh_token);
        true
    }

    /// Whether this refresh token is the next one.
    pub(crate) fn is_next(&self, refresh_token: &SecretString) -> bool {
        let next = self.refresh_token.as_ref().map(ExposeSecret::expose_secret);
        next == Some(refresh_token.expose_secret())
    }

    /// Records that a token was granted, with this refresh token if it has a new one (RFC 6749 §6).
    pub(crate) fn granted(&mut self, next: Option<SecretString>) {
        self.refresh_token = next.or(self.refresh_token.take());
        if let Some(login) = &mut self.login {
            (login.before, login.doubted_until) = (None, None);
        }
    }

    /// Records that the refresh token was rejected, so that it is not presented again. Returns whether the login before is
    /// used instead.
    pub(crate) fn reject(&mut self, version: u64) -> bool {
        let rejected = self.id().map(str::to_owned);
        let has_fallen_back = self.fall_back();
        if let Some(login) = &mut self.login {
            if has_fallen_back {
                login.replaced.extend(rejected);
                return true;
            }
            (login.ended, login.doubted_until) = (Some(version), None);
        }
        self.refresh_token = None;
        false
    }

    /// Records until when the refresh token is doubtful.
    pub(crate) fn doubt(&mut self, until: Option<Instant>) {
        self.login.iter_mut().for_each(|login| login.doubted_until = until);
    }

    /// How much longer the refresh token is doubtful.
    pub(crate) fn doubted_for(&self, now: Instant) -> Duration {
        let until = self.login.as_ref().and_then(|login| login.doubted_until);
        until.map_or(Duration::ZERO, |until| until.saturating_duration_since(now))
    }
}

impl Known {
    /// Takes up what a record knows, if that is newer. Returns whether it was.
    ///
    /// `is_unstored`: whether what this process knows is still to be stored.
    pub(crate) fn take_up(&mut self, found: &Self, is_unstored: bool) -> bool {
        let is_older = match (&self.chain.login, &found.chain.login) {
            _ if found.version <= self.version => true,
            // A fleet's login is not replaced by a token of the credential.
            (Some(_), None) => true,
            (Some(known), Some(login)) if known.id == login.id => {
                let is_behind = login.ended.is_some_and(|base| is_unstored || self.version > base);
                let is_seed = |token: &SecretString| fingerprint([token.expose_secret()]) == login.id;
                is_behind || (is_unstored && found.chain.refresh_token.as_ref().is_some_and(is_seed))
            }
            _ => false,
        };
        if !is_older {
            *self = found.clone();
        }
        !is_older
    }
}
