//! [`Chain`]: the refresh tokens of a credential or of a user's login: which one is presented next, and what an answer
//! changes.
//!
//! Nothing in here waits, or reads a store: the same rules hold for the memory of one process and for the record of a fleet.

use std::{mem, sync::Arc, time::Duration};

use secrecy::{ExposeSecret, SecretString};
use tokio::time::Instant;

use crate::source::{Credential, fingerprint};
use crate::token::Token;

/// How many logins are remembered after others have replaced them.
const MAX_REPLACED: usize = 16;

/// How often a doubtful refresh token is presented at most.
pub(crate) const DOUBT: Duration = Duration::from_secs(60);

/// How long the process that presents a refresh token may take to store what it was granted, once the store works. Then the
/// refresh token is presented again.
pub(crate) const PUBLISH_GRACE: Duration = Duration::from_secs(3);

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
    /// The login that this one replaces once a token is granted for it. Until then it is none of `replaced`.
    pub(crate) before: Option<Before>,
    /// The logins that were given since the login before, and that no token was granted for.
    pub(crate) tried: Vec<String>,
    /// Orders the refresh tokens of the login. No time, but the version of the record that was the newest one when this was
    /// granted; 0 for the first.
    pub(crate) granted_at: u64,
    /// Whether a process presents the refresh token.
    pub(crate) is_presented: bool,
    /// Until when a doubtful refresh token is not presented. Without a refresh token, the login has ended.
    pub(crate) doubted_until: Option<Instant>,
}

/// A login that works, and that another one is to replace.
#[derive(Clone)]
pub(crate) struct Before {
    pub(crate) refresh_token: SecretString,
    pub(crate) granted_at: u64,
    pub(crate) id: String,
    /// What its refresh token belongs to ([`Credential`]).
    pub(crate) holder: Option<String>,
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

    /// The login that its login is to replace.
    pub(crate) fn before(&self) -> Option<&Before> {
        self.login.as_ref()?.before.as_ref()
    }

    /// Its login, as one that another is to replace.
    fn as_before(&self, holder: Option<&str>) -> Option<Before> {
        let login = self.login.as_ref()?;
        let refresh_token = self.refresh_token.clone()?;
        let holder = holder.map(str::to_owned);
        Some(Before { refresh_token, granted_at: login.granted_at, id: login.id.clone(), holder })
    }

    fn has_replaced(&self, id: &str) -> bool {
        self.login.as_ref().is_some_and(|login| login.replaced.iter().any(|replaced| replaced == id))
    }

    pub(crate) fn knows(&self, id: &str) -> bool {
        self.id() == Some(id) || self.has_replaced(id)
    }

    /// Whether its login stays the newest one, whatever logins were given.
    pub(crate) fn stands(&self, given: &[Seed]) -> bool {
        let mut newest_first = given.iter().rev().map(Seed::id);
        newest_first.find(|id| !self.has_replaced(id)).is_none_or(|id| self.id() == Some(&id))
    }

    /// Begins the login of a seed, unless it is known. `skipped` are those that it has replaced before they could begin,
    /// `holder` is what the refresh token of this chain belongs to, and `is_foreign` whether that is another credential than
    /// the seed's.
    pub(crate) fn begin(
        &mut self,
        seed: &Seed,
        skipped: impl Iterator<Item = String>,
        holder: Option<&str>,
        is_foreign: bool,
    ) -> Begun {
        let id = seed.id();
        if self.id() == Some(&id) && !is_foreign {
            return Begun::Same;
        }
        if self.before().is_some_and(|before| before.id == id) && !is_foreign {
            // A configuration that was corrected.
            return if self.fall_back(holder) { Begun::Back } else { Begun::Old };
        }
        if self.has_replaced(&id) && !is_foreign {
            return Begun::Old;
        }
        // A wrong configuration must not cost the login that works. A user who logs in may be another one.
        let keeps = seed.is_configured || is_foreign;
        let works = self.as_before(holder);
        let old = self.login.take().map(|login| *login).unwrap_or_default();
        let mut login = LoginChain { replaced: old.replaced, tried: old.tried, id, ..LoginChain::default() };
        login.replaced.retain(|replaced| *replaced != login.id);
        skipped.for_each(|id| login.replaces(id));
        if old.before.is_some() || (works.is_none() && !old.id.is_empty()) {
            login.tried.push(old.id);
            login.tried.drain(..login.tried.len().saturating_sub(MAX_REPLACED));
        }
        login.before = old.before.or(works);
        if !keeps || login.before.is_none() {
            login.replace_all();
        }
        self.refresh_token = Some(seed.refresh_token.clone());
        self.login = Some(Box::new(login));
        Begun::New
    }

    /// Returns to the login before, if it is one of this credential. Returns false if there is none.
    pub(crate) fn fall_back(&mut self, holder: Option<&str>) -> bool {
        let Some(login) = &mut self.login else { return false };
        let Some(before) = login.before.take_if(|before| before.holder.as_deref() == holder) else {
            return false;
        };
        let mut replaced = mem::take(&mut login.replaced);
        replaced.retain(|replaced| *replaced != before.id);
        **login =
            LoginChain { id: before.id, replaced, granted_at: before.granted_at, ..LoginChain::default() };
        self.refresh_token = Some(before.refresh_token);
        true
    }

    /// Whether this refresh token is the next one.
    pub(crate) fn is_next(&self, refresh_token: &SecretString) -> bool {
        let next = self.refresh_token.as_ref().map(ExposeSecret::expose_secret);
        next == Some(refresh_token.expose_secret())
    }

    /// Whether a login is this chain's, or the one before, whose first refresh token was replaced since.
    pub(crate) fn has_spent(&self, seed: &Seed) -> bool {
        let (id, first) = (seed.id(), seed.refresh_token.expose_secret());
        let is_spent = |before: &Before| before.id == id && before.refresh_token.expose_secret() != first;
        self.before().is_some_and(is_spent) || (self.id() == Some(&id) && !self.is_next(&seed.refresh_token))
    }

    /// Records that a token was granted, with this refresh token if it has a new one (RFC 6749 §6). `version` is that of the
    /// record that the one before came from.
    pub(crate) fn granted(&mut self, next: Option<SecretString>, version: u64) {
        let is_new = next.is_some();
        self.refresh_token = next.or(self.refresh_token.take());
        if let Some(login) = &mut self.login {
            login.replace_all();
            let after = version.max(login.granted_at.saturating_add(1));
            login.granted_at = if is_new { after } else { login.granted_at };
            (login.is_presented, login.doubted_until) = (false, None);
        }
    }

    /// Records that a process presents the refresh token: its answer decides whether it is still doubtful.
    pub(crate) fn presented(&mut self) {
        if let Some(login) = &mut self.login {
            (login.is_presented, login.doubted_until) = (true, None);
        }
    }

    /// Records that the refresh token was rejected, which ends the login, or that it is doubtful until then.
    pub(crate) fn judge(&mut self, doubted_until: Option<Instant>) {
        if let Some(login) = &mut self.login {
            (login.is_presented, login.doubted_until) = (false, doubted_until);
        }
        self.refresh_token.take_if(|_| doubted_until.is_none());
    }

    /// How much longer the refresh token is doubtful.
    pub(crate) fn doubted_for(&self, now: Instant) -> Duration {
        let until = self.login.as_ref().and_then(|login| login.doubted_until);
        until.map_or(Duration::ZERO, |until| until.saturating_duration_since(now))
    }

    /// Whether a process presents the refresh token, as far as is known.
    pub(crate) fn is_presented(&self) -> bool {
        self.login.as_ref().is_some_and(|login| login.is_presented)
    }

    /// Returns its access token as one that is refreshed soon, if the refresh token may be spent: the process that presents it
    /// may have been killed, and a server accepts it again for a short time only, however long the access token works.
    pub(crate) fn renewable(&self, token: Token) -> Token {
        if self.is_presented() { token.renewable_until(Instant::now() + PUBLISH_GRACE) } else { token }
    }
}

impl LoginChain {
    /// Remembers a login that this one has replaced.
    pub(crate) fn replaces(&mut self, id: String) {
        self.replaced.retain(|replaced| *replaced != id);
        self.replaced.extend(Some(id).filter(|id| *id != self.id));
        self.replaced.drain(..self.replaced.len().saturating_sub(MAX_REPLACED));
    }

    /// Records that nothing leads back to the login before.
    fn replace_all(&mut self) {
        let before = self.before.take().map(|before| before.id);
        let tried = mem::take(&mut self.tried);
        before.into_iter().chain(tried).for_each(|id| self.replaces(id));
    }
}

impl Known {
    /// What its refresh token belongs to.
    pub(crate) fn holder(&self) -> Option<&str> {
        self.credential.as_deref().and_then(Credential::holder)
    }

    /// Whether a record says nothing that this does not know, or knows better. True of an equal one.
    pub(crate) fn is_newer_than(&self, found: &Self) -> bool {
        let is_older = found.version <= self.version;
        match (&self.chain.login, &found.chain.login) {
            // A fleet's login is not replaced by a token of the credential.
            (Some(_), None) => true,
            // Whatever the versions are: a store may lose its newest record.
            (Some(known), Some(login)) if known.id != login.id => {
                match (self.chain.has_replaced(&login.id), found.chain.has_replaced(&known.id)) {
                    (true, true) | (false, false) => is_older,
                    (is_replaced, _) => is_replaced,
                }
            }
            // What is known of an older refresh token, by a process that is late, replaces no newer one. A mark and what
            // becomes of it may have one version.
            (Some(_), Some(_)) => found.order() <= self.order(),
            (None, _) => is_older,
        }
    }

    fn order(&self) -> (u64, u64, bool) {
        let granted_at = self.chain.login.as_ref().map_or(0, |login| login.granted_at);
        (granted_at, self.version, !self.chain.is_presented())
    }

    /// Takes the refresh token of the login before from what is known of that login, if it is newer there. Returns whether it
    /// is.
    pub(crate) fn renew_before(&mut self, other: &Self) -> bool {
        let Some(before) = self.chain.login.as_mut().and_then(|login| login.before.as_mut()) else {
            return false;
        };
        let known = [other.chain.as_before(other.holder()), other.chain.before().cloned()];
        let is_newer = |other: &Before| {
            other.id == before.id && other.holder == before.holder && other.granted_at > before.granted_at
        };
        let newest = known.into_iter().flatten().filter(is_newer).max_by_key(|other| other.granted_at);
        let Some(newest) = newest else { return false };
        *before = newest;
        true
    }
}
