//! [`Record`] and [`Lease`]: what a store keeps, and what it gives out; and the text that a token is stored as.

use std::{any::Any, fmt, time::Duration};

use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::{error::StoreError, token::Token};

/// The schema of the text. A record of another counts as absent.
const SCHEMA: u32 = 1;

/// What a [`TokenStore`](crate::TokenStore) keeps: a token, as a text that only the crate reads.
///
/// The text is overwritten in memory when the record is dropped, and `Debug` does not show it.
#[derive(Clone)]
pub struct Record {
    generation: u64,
    expires_in: Option<Duration>,
    text: SecretString,
}

impl Record {
    /// What a store has kept, on its way out; `generation` and `text` as they were given to it.
    pub fn new(generation: u64, text: impl Into<String>) -> Self {
        Self { generation, expires_in: None, text: text.into().into() }
    }

    /// Says how long the token still lives. Default: until the API refuses it.
    ///
    /// A store counts by its own clock, so that those of the processes need not agree.
    pub fn expires_in(mut self, left: Duration) -> Self {
        self.expires_in = Some(left);
        self
    }

    /// The same record when it has been kept for `age`.
    pub fn aged_by(&self, age: Duration) -> Self {
        Self { expires_in: self.expires_in.map(|left| left.saturating_sub(age)), ..self.clone() }
    }

    /// Which record this is: the fence of the lease under which it was published. A greater one is newer.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// How long the token lives, from now on; `None` if until the API refuses it.
    pub fn lifetime(&self) -> Option<Duration> {
        self.expires_in
    }

    /// The text to keep, a secret: at most 256 KiB of UTF-8 without a NUL.
    pub fn text(&self) -> &str {
        self.text.expose_secret()
    }

    /// The same record with another text.
    #[cfg(feature = "encryption")]
    pub(super) fn with_text(self, text: String) -> Self {
        Self { text: text.into(), ..self }
    }

    /// The record that `token` is published in, under the lease of this `fence`.
    pub(super) fn of(token: &Token, fence: u64) -> Self {
        let stored = Written {
            schema: SCHEMA,
            access_token: token.access_token(),
            refresh_token: token.refresh_token(),
        };
        // Texts always serialize.
        let text = serde_json::to_string(&stored).unwrap_or_default();
        Self { generation: fence, expires_in: token.remaining(), text: text.into() }
    }

    /// The token, whose life counts from `loaded_at`.
    pub(super) fn token(&self, loaded_at: Instant) -> Result<Token, StoreError> {
        // serde's own message could quote the text.
        let stored: Read = serde_json::from_str(self.text())
            .map_err(|_| StoreError::InvalidRecord("the stored record is no token's".into()))?;
        if stored.schema != SCHEMA {
            return Err(StoreError::InvalidRecord(
                format!("the stored record is of schema {}, not {SCHEMA}", stored.schema).into(),
            ));
        }
        let mut token =
            Token::builder(stored.access_token.expose_secret()).requested_at(loaded_at.into_std());
        if let Some(left) = self.expires_in {
            token = token.expires_in(left);
        }
        if let Some(refresh_token) = &stored.refresh_token {
            token = token.refresh_token(refresh_token.expose_secret());
        }
        let token = token.build().map_err(|error| {
            StoreError::InvalidRecord(format!("the stored record's token cannot be used: {error}").into())
        })?;
        Ok(token.recorded_as(self.generation))
    }
}

impl fmt::Debug for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Record")
            .field("generation", &self.generation)
            .field("expires_in", &self.expires_in)
            .finish_non_exhaustive()
    }
}

#[derive(Deserialize)]
struct Read {
    schema: u32,
    access_token: SecretString,
    refresh_token: Option<SecretString>,
}

#[derive(Serialize)]
struct Written<'a> {
    schema: u32,
    access_token: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    refresh_token: Option<&'a str>,
}

/// The right to renew the token, for a while; see [`TokenStore::lease`](crate::TokenStore::lease).
#[derive(Debug)]
pub struct Lease {
    fence: u64,
    guard: Option<Box<dyn Any + Send + Sync>>,
}

impl Lease {
    /// The lease of this fence.
    pub fn new(fence: u64) -> Self {
        Self { fence, guard: None }
    }

    /// Adds what the store wants to have by it until it ends, and dropped with it, such as a lock.
    pub fn with_guard(mut self, guard: impl Any + Send + Sync) -> Self {
        self.guard = Some(Box::new(guard));
        self
    }

    /// What [`with_guard`](Self::with_guard) added, if it is a `T`.
    pub fn guard<T: Any>(&self) -> Option<&T> {
        self.guard.as_deref().and_then(|guard| guard.downcast_ref())
    }

    /// Tells leases apart, and which is the newer: the greater one.
    pub fn fence(&self) -> u64 {
        self.fence
    }
}

/// The result of extending a lease; see [`TokenStore::extend`](crate::TokenStore::extend).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Extension {
    /// The lease ends later.
    Extended,
    /// The lease has ended, or a newer one has been given out.
    Expired,
    /// The store cannot extend a lease.
    Unsupported,
}

/// What has become of a record that was to be published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Publication {
    /// It is stored.
    Stored,
    /// A newer lease has been given out: it is not stored.
    Superseded,
}
