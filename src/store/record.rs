//! [`Record`] and [`Lease`]: what a store keeps and what it grants, and the JSON text that a token is stored as.

use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use secrecy::{ExposeSecret, SecretString};
use serde_json::{Map, Value, json};
use tokio::time::Instant;

use super::StoreError;
use crate::chain::{Before, Chain, DOUBT, Known, LoginChain};
use crate::debug::debug_fields;
use crate::observability::millis;
use crate::source::Credential;
use crate::token::Token;
use crate::token_builder::TokenBuilder;

/// The schema of the text. A record with another schema counts as absent.
const SCHEMA: u64 = 1;

/// What a [`TokenStore`](super::TokenStore) keeps: a token, as a text in this crate's own format.
///
/// The text is overwritten in memory when the record is dropped. `Debug` does not show it.
#[derive(Clone)]
pub struct Record {
    version: u64,
    expires_in: Option<Duration>,
    is_login: bool,
    text: SecretString,
}

impl Record {
    /// Creates a record from the version and the text that the store has kept.
    pub fn new(version: u64, text: impl Into<String>) -> Self {
        Self { version, expires_in: None, is_login: false, text: text.into().into() }
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

    /// Returns how long the token is valid from now on; `None` if it is valid until the API rejects it. If the record has no
    /// access token, or its refresh token is [doubtful](crate::OAuth2#refresh-tokens), this is for how long that lasts, if that
    /// is longer.
    pub fn lifetime(&self) -> Option<Duration> {
        self.expires_in
    }

    /// Returns whether the record is needed after its token has expired, because it has the refresh token of a user's login. A
    /// store must not delete it then. Known of a record that is published.
    pub fn outlives_token(&self) -> bool {
        self.is_login
    }

    /// Returns the text to keep. It is a secret: at most 256 KiB of UTF-8 without a NUL.
    pub fn text(&self) -> &str {
        self.text.expose_secret()
    }

    /// Replaces the text, and keeps the rest: for a store that encrypts what another store keeps.
    pub fn with_text(self, text: impl Into<String>) -> Self {
        Self { text: text.into().into(), ..self }
    }

    /// Creates the record of what is known, published under the lease with this `fence`.
    pub(super) fn of(known: &Known, fence: u64) -> Self {
        let Known { token, chain, credential, .. } = known;
        let now = Instant::now();
        let token = token.as_ref().filter(|token| !token.is_expired(now));
        let secret = |secret: &SecretString| secret.expose_secret().to_owned();
        let ends_at = token.and_then(Token::refresh_token_expires_at);
        let credential = credential.as_deref();
        let login = chain.login.as_deref();
        let ids = |of: fn(&LoginChain) -> &Vec<String>| login.map(of).filter(|ids| !ids.is_empty()).cloned();
        let before = login.and_then(|login| login.before.as_ref()).map(|before| {
            let Before { refresh_token, granted_at, id, holder } = before;
            json!({ "refresh_token": secret(refresh_token), "granted_at": granted_at, "login": id, "credential": holder })
        });
        // The store measures how long the token is valid, and for how long the refresh token is doubtful, by one clock: the
        // lifetime is the longer of the two, and the record has what is left of it when the other one ends.
        let doubted_for = Some(chain.doubted_for(now)).filter(|left| !left.is_zero());
        let works_for = token.map_or(Some(Duration::ZERO), Token::remaining);
        let expires_in =
            doubted_for.map_or(works_for, |doubted| Some(doubted.max(works_for.unwrap_or_default())));
        let left_after = |span: Duration| millis(expires_in.unwrap_or_default().saturating_sub(span));
        let expires =
            doubted_for.map(|_| works_for.map_or(Value::from("never"), |works| left_after(works).into()));
        let fields: [(&str, Value); 14] = [
            ("schema", SCHEMA.into()),
            ("access_token", token.map(Token::access_token).into()),
            ("refresh_token", chain.refresh_token.as_ref().map(secret).into()),
            ("refresh_token_expires_at", ends_at.map(seconds_since_1970).into()),
            ("credential", credential.and_then(Credential::holder).into()),
            // Of one that was not known at the grant, no token is used by another process.
            (
                "token_credential",
                credential
                    .and_then(|credential| if credential.is_open() { Some("") } else { credential.token() })
                    .into(),
            ),
            ("login", chain.id().into()),
            ("replaced", ids(|login| &login.replaced).into()),
            ("tried", ids(|login| &login.tried).into()),
            ("before", before.into()),
            ("granted_at", login.map(|login| login.granted_at).into()),
            ("presented", login.map(|login| login.is_presented).filter(|is_presented| *is_presented).into()),
            ("doubted_until", doubted_for.map(left_after).into()),
            ("expires", expires.into()),
        ];
        let fields = fields.iter().filter(|(_, value)| !value.is_null());
        let fields: Vec<_> = fields.map(|(name, value)| format!("\"{name}\":{value}")).collect();
        let text = format!("{{{}}}", fields.join(","));
        Self { version: fence, expires_in, is_login: chain.login.is_some(), text: text.into() }
    }

    /// Parses what is known. The lifetime of the token counts from `loaded_at`.
    pub(super) fn known(&self, loaded_at: Instant) -> Result<Known, StoreError> {
        // The parser's own error is dropped because it could quote the text.
        let invalid = |what: &str| StoreError::invalid_record(format!("the stored record {what}"));
        let Ok(Value::Object(mut fields)) = serde_json::from_str(self.text()) else {
            return Err(invalid("does not contain a token"));
        };
        match fields.get("schema").and_then(Value::as_u64) {
            Some(SCHEMA) => {}
            Some(schema) => return Err(invalid(&format!("has schema {schema}, expected {SCHEMA}"))),
            None => return Err(invalid("does not contain a token")),
        }
        let [access_token, refresh_token, login_id, holder, scope] =
            ["access_token", "refresh_token", "login", "credential", "token_credential"]
                .map(|name| text(&mut fields, name));
        let number = |name: &str| fields.get(name).and_then(Value::as_u64);
        let left = |at: u64| Duration::from_secs(at.saturating_sub(since_1970()));
        let refresh_token_left = number("refresh_token_expires_at").map(left);
        let granted_at = number("granted_at").unwrap_or_default();
        let is_presented = fields.get("presented").is_some_and(|presented| *presented == true);
        let until = |at: u64| self.expires_in.map(|left| left.saturating_sub(Duration::from_millis(at)));
        let doubted_for = number("doubted_until").and_then(until).map(|left| left.min(DOUBT));
        let lasts = fields.get("expires").is_some_and(Value::is_string);
        let works_for = until(number("expires").unwrap_or_default()).filter(|_| !lasts);
        let [replaced, tried] = ["replaced", "tried"].map(|name| {
            let ids = fields.get(name).and_then(Value::as_array).into_iter().flatten();
            ids.filter_map(|login| login.as_str().map(str::to_owned)).collect()
        });
        let before = match fields.remove("before") {
            Some(Value::Object(mut fields)) => {
                let granted_at = fields.get("granted_at").and_then(Value::as_u64).unwrap_or_default();
                let holder = text(&mut fields, "credential");
                let before = text(&mut fields, "refresh_token").zip(text(&mut fields, "login"));
                before.map(|(refresh_token, id)| Before {
                    refresh_token: refresh_token.into(),
                    granted_at,
                    id,
                    holder,
                })
            }
            _ => None,
        };
        let refresh_token = refresh_token.map(SecretString::from);
        if access_token.is_none() && refresh_token.is_none() && login_id.is_none() {
            return Err(invalid("has no token"));
        }
        let token = access_token.map(|access_token| {
            let mut token = Token::builder(access_token).requested_at(loaded_at.into_std());
            if let Some(left) = works_for {
                token = token.expires_in(left);
            }
            if let Some(refresh_token) = &refresh_token {
                token = token.refresh_token(refresh_token.expose_secret());
                token = refresh_token_left.into_iter().fold(token, TokenBuilder::refresh_token_expires_in);
            }
            token.build().map_err(|error| invalid("contains an invalid token").with_cause(error))
        });
        let doubted_until = doubted_for.map(|left| loaded_at + left);
        let login = LoginChain {
            replaced,
            before,
            tried,
            granted_at,
            is_presented,
            doubted_until,
            ..LoginChain::default()
        };
        let login = login_id.map(|id| Box::new(LoginChain { id, ..login }));
        let credential = Credential::of_record(holder, scope);
        let credential = Some(Arc::new(credential)).filter(|credential| credential.is_known());
        let chain = Chain { refresh_token, login };
        Ok(Known { token: token.transpose()?, chain, credential, version: self.version })
    }
}

/// Takes a text, which may be a secret.
fn text(fields: &mut Map<String, Value>, name: &str) -> Option<String> {
    match fields.remove(name)? {
        Value::String(text) => Some(text),
        _ => None,
    }
}

fn since_1970() -> u64 {
    UNIX_EPOCH.elapsed().unwrap_or_default().as_secs()
}

/// The clocks of two hosts may differ: the time only says when to refresh at the latest.
fn seconds_since_1970(at: Instant) -> u64 {
    since_1970() + at.saturating_duration_since(Instant::now()).as_secs()
}

debug_fields!(Record |it| { version: it.version, expires_in: it.expires_in });

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
