//! [`Credential`]: what the tokens of a source depend on.

use std::fmt::Write;

use sha2::{Digest, Sha256};

/// What the tokens of a source depend on, as fingerprints ([`TokenSource::credential`](crate::TokenSource::credential)).
///
/// A token that is kept in a [store](crate::store) belongs to a credential: a process with another one does not use it.
/// The default is no fingerprint: all sources without one have the same credential.
///
/// ```
/// use tower_bearer::Credential;
///
/// let of_tenant = |tenant| Credential::new(["https://login.example", tenant]).for_token(["videos:read"]);
/// assert_eq!(of_tenant("acme"), of_tenant("acme"));
/// assert_ne!(of_tenant("acme"), of_tenant("emca"));
/// ```
///
/// `Debug` shows the fingerprints, from which nothing can be derived: SHA-256, shortened to 128 bits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Credential {
    /// Of what a refresh token depends on.
    holder: Option<String>,
    /// Of what an access token depends on.
    token: Option<String>,
    revision: u64,
    is_login: bool,
    takes_no_login: bool,
    /// Whether it depends on the refresh token of a login that only a provider without a store has.
    is_in_memory: bool,
    /// Whether it depends on a login that is not known yet: no record is one of it.
    is_open: bool,
}

impl Credential {
    /// Makes a credential from all that a refresh token depends on: the server, and what names the account there, such as the
    /// client's id, or an API key that stands for it.
    ///
    /// A secret that may be replaced for the same account, such as that of a client, is no part of it: then refresh tokens
    /// would be lost with each replacement.
    pub fn new<P: AsRef<[u8]>>(parts: impl IntoIterator<Item = P>) -> Self {
        let holder = Some(fingerprint(parts));
        Self { token: holder.clone(), holder, ..Self::default() }
    }

    /// Adds what only an access token depends on, such as scopes and an audience.
    pub fn for_token<P: AsRef<[u8]>>(mut self, parts: impl IntoIterator<Item = P>) -> Self {
        let further = fingerprint(parts);
        self.token = Some(fingerprint([self.token.as_deref().unwrap_or_default(), &further]));
        self
    }

    /// Sets a number that changes whenever a secret of the credential is replaced. Default: 0.
    ///
    /// A change ends the cool-down after a rejection.
    pub fn with_revision(mut self, revision: u64) -> Self {
        self.revision = self.revision.wrapping_add(revision);
        self
    }

    /// Says that the source has nothing but the refresh tokens of a user's login
    /// ([`TokenProviderBuilder::login`](crate::TokenProviderBuilder::login)). Default: it has a credential of its own.
    ///
    /// The provider then protects the refresh token from the start, as it protects that of a login that it was given.
    pub fn of_login(mut self) -> Self {
        self.is_login = true;
        self
    }

    /// Adds the credential of a source whose token is presented, and its revision.
    pub(crate) fn of_subject(self, subject: &Self) -> Self {
        let revision = subject.revision;
        let mut joined = self.for_token(subject.token.as_deref()).with_revision(revision);
        joined.holder.clone_from(&joined.token);
        Self { is_in_memory: subject.is_in_memory, is_open: subject.is_open, ..joined }
    }

    /// Returns the credential of a provider, which has the refresh token of its login.
    pub(crate) fn of_login_used(self, login: Option<String>, is_open: bool) -> Self {
        let credential = if login.is_some() { self.for_token(login) } else { self };
        Self { is_login: false, is_open, ..credential.without_logins() }
    }

    /// Says that only a provider without a store has the refresh token.
    pub(crate) fn in_memory(self) -> Self {
        Self { is_in_memory: true, ..self }
    }

    /// Returns what a token was granted to, which was asked for with this: the one that is known at the grant, unless another
    /// login was used meanwhile, or a secret was replaced.
    pub(crate) fn at_grant(self, granted: Self) -> Self {
        match granted.revision.wrapping_sub(self.revision) {
            // It has only become known.
            0 | 1 if self.is_open && !granted.is_open => granted,
            0 => self,
            _ if self.token == granted.token && !granted.is_open => self,
            _ => Self { is_open: true, ..self },
        }
    }

    pub(crate) fn is_open(&self) -> bool {
        self.is_open
    }

    pub(crate) fn is_login(&self) -> bool {
        self.is_login
    }

    /// Says that the source presents no refresh token of a login.
    pub(crate) fn without_logins(self) -> Self {
        Self { takes_no_login: true, ..self }
    }

    pub(crate) fn takes_no_login(&self) -> bool {
        self.takes_no_login
    }

    pub(crate) fn is_in_memory(&self) -> bool {
        self.is_in_memory
    }

    /// Returns the credential of a record.
    pub(crate) fn of_record(holder: Option<String>, token: Option<String>) -> Self {
        Self { holder, token, ..Self::default() }
    }

    /// Whether it has fingerprints.
    pub(crate) fn is_known(&self) -> bool {
        self.token.is_some()
    }

    pub(crate) fn revision(&self) -> u64 {
        self.revision
    }

    /// The fingerprint of what refresh tokens belong to.
    pub(crate) fn holder(&self) -> Option<&str> {
        self.holder.as_deref()
    }

    /// The fingerprint of what access tokens belong to.
    pub(crate) fn token(&self) -> Option<&str> {
        self.token.as_deref()
    }
}

/// Identifies secrets, and other parts, without them.
pub(crate) fn fingerprint<P: AsRef<[u8]>>(parts: impl IntoIterator<Item = P>) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        // With the length: otherwise the same bytes could be two parts or one.
        hash.update((part.as_ref().len() as u64).to_be_bytes());
        hash.update(part.as_ref());
    }
    hash.finalize()[..16].iter().fold(String::new(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
