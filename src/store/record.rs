//! [`Record`] and [`Lease`]: what a store keeps and what it grants, and the JSON text that a token is stored as.

use std::{
    any::Any,
    fmt,
    time::{Duration, UNIX_EPOCH},
};

use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::StoreError;
use crate::token::{Token, TokenBuilder};

/// The schema of the text. A record with another schema counts as absent.
const SCHEMA: u32 = 1;

/// What a [`TokenStore`](super::TokenStore) keeps: a token, as a text in this crate's own format.
///
/// The text is overwritten in memory when the record is dropped. `Debug` does not show it.
#[derive(Clone)]
pub struct Record {
    version: u64,
    expires_in: Option<Duration>,
    outlives_token: bool,
    text: SecretString,
}

impl Record {
    /// Creates a record from the version and the text that the store has kept.
    pub fn new(version: u64, text: impl Into<String>) -> Self {
        Self { version, expires_in: None, outlives_token: false, text: text.into().into() }
    }

    /// Sets how long the token is still valid. Default: until the API rejects it.
    ///
    /// The store measures this with its own clock, so the clocks of the processes need not agree.
    pub fn expires_in(mut self, left: Duration) -> Self {
        self.expires_in = Some(left);
        self
    }

    /// Returns this record with `age` subtracted from its lifetime.
    pub fn aged_by(&self, age: Duration) -> Self {
        Self { expires_in: self.expires_in.map(|left| left.saturating_sub(age)), ..self.clone() }
    }

    /// Returns the record's version: the fence of the lease under which it was published. A greater version is newer.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Returns how long the token is valid from now on; `None` if it is valid until the API rejects it.
    pub fn lifetime(&self) -> Option<Duration> {
        self.expires_in
    }

    /// Returns whether the record is needed after its token has expired, because it has the refresh token of a user's
    /// login. A store must not delete it then.
    ///
    /// Only the record that is passed to [`publish`](super::TokenStore::publish) says so.
    pub fn outlives_token(&self) -> bool {
        self.outlives_token
    }

    /// Returns the text to keep. It is a secret: at most 256 KiB of UTF-8 without a NUL.
    pub fn text(&self) -> &str {
        self.text.expose_secret()
    }

    /// Replaces the text.
    #[cfg(feature = "encryption")]
    pub(super) fn with_text(self, text: String) -> Self {
        Self { text: text.into(), ..self }
    }

    /// Creates the record in which `token` is published under the lease with this `fence`.
    pub(super) fn of(token: &Token, fence: u64) -> Self {
        let login = token.login();
        let stored = Written {
            schema: SCHEMA,
            access_token: Some(token.access_token()).filter(|token| !token.is_empty()),
            refresh_token: token.refresh_token(),
            refresh_token_expires_at: token.refresh_token_expires_at().map(|at| {
                let left = at.saturating_duration_since(Instant::now());
                (UNIX_EPOCH.elapsed().unwrap_or_default() + left).as_secs()
            }),
            login: login.as_deref(),
        };
        // Serializing a struct of strings cannot fail.
        let text = serde_json::to_string(&stored).unwrap_or_default();
        let outlives_token = login.is_some();
        Self { version: fence, expires_in: token.remaining(), outlives_token, text: text.into() }
    }

    /// Parses the token. Its lifetime counts from `loaded_at`.
    pub(super) fn token(&self, loaded_at: Instant) -> Result<Token, StoreError> {
        // serde's own error message is dropped because it could quote the text.
        let stored: Read = serde_json::from_str(self.text())
            .map_err(|_| StoreError::invalid_record("the stored record does not contain a token"))?;
        if stored.schema != SCHEMA {
            return Err(StoreError::invalid_record(format!(
                "the stored record has schema {}, expected {SCHEMA}",
                stored.schema
            )));
        }
        let login = stored.login.map(Into::into);
        let access_token = match (stored.access_token, &stored.refresh_token) {
            (Some(access_token), _) => access_token,
            (None, Some(refresh_token)) => {
                let token = Token::of_refresh_token(refresh_token.clone());
                return Ok(token.with_login(login).with_record_version(self.version));
            }
            (None, None) => return Err(StoreError::invalid_record("the stored record has no token")),
        };
        let mut token = Token::builder(access_token.expose_secret()).requested_at(loaded_at.into_std());
        if let Some(left) = self.expires_in {
            token = token.expires_in(left);
        }
        if let Some(refresh_token) = &stored.refresh_token {
            token = token.refresh_token(refresh_token.expose_secret());
            let end = stored.refresh_token_expires_at.map(Duration::from_secs);
            let left = end.map(|end| end.saturating_sub(UNIX_EPOCH.elapsed().unwrap_or_default()));
            token = left.into_iter().fold(token, TokenBuilder::refresh_token_expires_in);
        }
        let token = token.build().map_err(|error| {
            StoreError::invalid_record("the stored record contains an invalid token").with_cause(error)
        })?;
        Ok(token.with_login(login).with_record_version(self.version))
    }
}

impl fmt::Debug for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Record")
            .field("version", &self.version)
            .field("expires_in", &self.expires_in)
            .finish_non_exhaustive()
    }
}

#[derive(Deserialize)]
struct Read {
    schema: u32,
    /// Missing if the record has only the refresh token of a login.
    access_token: Option<SecretString>,
    refresh_token: Option<SecretString>,
    refresh_token_expires_at: Option<u64>,
    login: Option<String>,
}

#[derive(Serialize)]
struct Written<'a> {
    schema: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    access_token: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    refresh_token: Option<&'a str>,
    /// In seconds since 1970. The clocks of two hosts may differ: it only says when to refresh at the latest.
    #[serde(skip_serializing_if = "Option::is_none")]
    refresh_token_expires_at: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    login: Option<&'a str>,
}

/// The right to refresh the token, for a limited time. See [`TokenStore::lease`](super::TokenStore::lease).
#[derive(Debug)]
pub struct Lease {
    fence: u64,
    guard: Option<Box<dyn Any + Send + Sync>>,
}

impl Lease {
    /// Creates a lease with this fence.
    pub fn new(fence: u64) -> Self {
        Self { fence, guard: None }
    }

    /// Attaches a value that the store needs while the lease lasts, such as a lock. It is dropped with the lease.
    pub fn with_guard(mut self, guard: impl Any + Send + Sync) -> Self {
        self.guard = Some(Box::new(guard));
        self
    }

    /// Returns the value attached by [`with_guard`](Self::with_guard), if it is a `T`.
    pub fn guard<T: Any>(&self) -> Option<&T> {
        self.guard.as_deref().and_then(|guard| guard.downcast_ref())
    }

    /// Returns the number that identifies this lease. A newer lease has a greater fence.
    pub fn fence(&self) -> u64 {
        self.fence
    }
}

/// The result of [`TokenStore::extend`](super::TokenStore::extend).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Extension {
    /// The lease now ends later.
    Extended,
    /// The lease has ended, or a newer one was granted.
    Expired,
    /// The store cannot extend a lease.
    Unsupported,
}

/// The result of [`TokenStore::publish`](super::TokenStore::publish).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Publication {
    /// The record is stored.
    Stored,
    /// A newer lease was granted, so the record is not stored.
    Superseded,
}
