//! [`Login`]: from the need of a token to the one exchange that brings it. The only place that presents refresh tokens.
//!
//! [`Chain`](crate::chain::Chain) has the rules of what is presented. Here they are applied: to the memory of this process, and, if
//! processes share a store, to its record, under the lease that one process at a time has
//! ([`TokenStore`](crate::store::TokenStore)).
//!
//! The exchange of a user's login runs in a task of its own, since its response has the next refresh token. What it brings
//! is kept here until a refresh takes it, and the store has it.
//!
//! This file leads from a refresh to [`exchange`], the one exchange at a time, or first to [`with_store`], the protocol of a
//! store. [`present`] decides which refresh token is presented and what its answer changes, [`publish`] stores that, and
//! [`memory`] is what the process knows.

mod exchange;
mod memory;
mod present;
mod publish;
mod with_store;

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use secrecy::{ExposeSecret, SecretString};
use tokio::time::Instant;

pub(crate) use self::present::NO_LOGINS;

use self::memory::Memory;
use crate::chain::Seed;
use crate::error::{SourceError, StoreError};
use crate::observability;
use crate::observability::Reporter;
use crate::source::{Credential, DynTokenSource, TokenRequest, check_text};
use crate::store::{Role, StoreAccess, StoreStatus};
use crate::token::{LEAST_LIFE, Token};

/// The future of [`Login::check_store`].
pub(crate) type Check = Pin<Box<dyn Future<Output = Result<(), StoreError>> + Send>>;

/// Called before something is asked for a token.
pub(crate) type Asking<'a> = &'a (dyn Fn(Asked) + Sync);

/// What is asked for a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    Source,
    /// The store, by a reader, for which nobody has stored a token in time.
    Publisher,
}

pub(crate) struct Login {
    pub(crate) source: Box<dyn DynTokenSource>,
    store: Option<Box<StoreAccess>>,
    pub(crate) reporter: Reporter,
    /// Never held across an await, or while foreign code runs.
    state: Mutex<Memory>,
}

impl Login {
    pub(crate) fn new(
        source: Box<dyn DynTokenSource>,
        store: Option<Box<StoreAccess>>,
        seed: Option<SecretString>,
        reporter: Reporter,
    ) -> Self {
        let mut state = Memory::default();
        if let Some(refresh_token) = seed {
            state.more().pending.push(Seed { refresh_token, is_configured: true });
        }
        state.is_login = source.credential().is_login() || state.more.is_some();
        Self { source, store, reporter, state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, Memory> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_reader(&self) -> bool {
        self.store.as_ref().is_some_and(|store| store.role == Role::Reader)
    }

    /// Whether the refresh tokens are those of a user's login: nothing else gives a token.
    pub(crate) fn is_login(&self) -> bool {
        self.state().is_login
    }

    /// Sets the refresh token of a new login. Returns false if it is known not to be new.
    pub(crate) fn log_in(&self, refresh_token: String) -> bool {
        let seed = Seed { refresh_token: refresh_token.into(), is_configured: false };
        let id = seed.id();
        let used = {
            let mut state = self.state();
            // It cannot begin, and would fail each exchange.
            state
                .more()
                .pending
                .retain(|pending| check_refresh_token(pending.refresh_token.expose_secret()).is_ok());
            let is_pending = state.more().pending.iter().any(|pending| pending.id() == id);
            if !(is_pending || self.is_reader() || state.known.chain.knows(&id)) {
                state.more().pending.push(seed);
                state.is_login = true;
                state.changed();
                return true;
            }
            let used = match state.pending() {
                Some(pending) => pending.id(),
                None => state.known.chain.id().unwrap_or_default().to_owned(),
            };
            // The user says that it is good.
            state.asks_again |= used == id;
            used
        };
        let reason = if self.is_reader() {
            "a reader uses the tokens in its store"
        } else if used == id {
            "it is used already"
        } else {
            "it was replaced before"
        };
        self.reporter.login_ignored(&used, reason);
        false
    }

    /// A doubtful refresh token is presented with the next attempt.
    pub(crate) fn ask_again(&self) {
        self.state().asks_again = true;
    }

    /// The credential of the tokens, which are those of the login that is used.
    pub(crate) fn credential(&self) -> Credential {
        let credential = self.source.credential();
        let state = self.state();
        let pending = state.pending().map(Seed::id);
        let used = state.known.chain.id().map(str::to_owned);
        // The store may have another login than the one that was given, or any at all.
        let may_be_in_store =
            self.store.is_some() && state.known.version == 0 && !credential.takes_no_login();
        let is_unknown = used.is_none() && (state.is_login || may_be_in_store);
        // A reader does not know whose tokens it uses.
        let is_open = pending.is_some() || is_unknown || self.is_reader();
        let changes = state.more.as_ref().map_or(0, |more| more.changes);
        let credential = credential.of_login_used(pending.or(used), is_open).with_revision(changes.into());
        if self.store.is_none() && state.is_login { credential.in_memory() } else { credential }
    }

    /// Returns a token that replaces the one of `request`, in one attempt.
    pub(crate) async fn token(
        self: &Arc<Self>,
        request: &TokenRequest<'_>,
        asking: Asking<'_>,
    ) -> Result<Token, SourceError> {
        self.turn().await;
        let untaken = self.untaken(request.previous());
        if let (Some(_), Some(store)) = (&untaken, &self.store) {
            // With a runtime for each call, a task would not get to it.
            if self.state().is_unstored && self.publish_unless_newer(store).await.is_err() {
                self.publish_later(None);
            }
        }
        if let Some(token) = untaken.filter(|_| self.store.is_none()) {
            return Ok(token);
        }
        if let Some(error) = self.untaken_error() {
            return Err(error);
        }
        let Some(store) = &self.store else {
            asking(Asked::Source);
            return self.exchange(request, None).await;
        };
        if store.role == Role::Reader {
            return self.wait_for_publisher(store, request.previous(), asking).await;
        }
        match self.with_store(store, request, asking).await {
            Ok(result) => result,
            Err(error) => {
                // The process that presents a refresh token can store what it was granted only when the store works.
                self.state().more.as_mut().map(|more| more.seen_mark.take());
                match self.untaken(request.previous()) {
                    Some(token) => {
                        self.store_again(&None);
                        Ok(token)
                    }
                    None => self.without_store(store, request, asking, error).await,
                }
            }
        }
    }

    /// Returns a token that no refresh has taken, because its refresh has timed out.
    fn untaken(&self, previous: Option<&Token>) -> Option<Token> {
        let credential = self.source.credential();
        let state = self.state();
        let token = state.known.token.clone().filter(|_| state.pending().is_none())?;
        let of = state.known.credential.as_deref().and_then(Credential::token);
        let is_ours = of == credential.token() || self.is_reader();
        // A reader has no source that it could ask instead.
        let set = state.more.as_ref().and_then(|more| more.taken.as_ref()).filter(|_| !self.is_reader());
        let is_another = previous.into_iter().chain(set).all(|taken| !taken.has_same_access_token(&token));
        let works = !token.is_expired(Instant::now() + LEAST_LIFE);
        (is_ours && is_another && works).then(|| state.known.chain.renewable(token))
    }

    /// The program has set a token: the one that is known is not used in its place.
    pub(crate) fn token_was_set(&self) {
        let mut state = self.state();
        if let Some(known) = state.known.token.clone() {
            state.more().taken = Some(known);
        }
    }

    /// Returns the error of an exchange that no refresh has taken: the refresh that timed out meanwhile could not know when to
    /// ask again.
    fn untaken_error(&self) -> Option<SourceError> {
        let mut state = self.state();
        let is_due = state.asks_again || state.pending().is_some();
        let (error, until) = state.more.as_mut()?.untaken.take().filter(|_| !is_due)?;
        let left = until.checked_duration_since(Instant::now())?;
        Some(if error.is_transient() { error.with_retry_after(left) } else { error })
    }

    /// Whether a refresh token of a login would be lost with this process: it is being exchanged, or not stored.
    pub(crate) fn has_unstored_login(&self) -> bool {
        let state = self.state();
        let is_pending = state.pending().is_some_and(|pending| !pending.is_configured);
        let is_in_memory = self.store.is_none() || state.is_unstored || is_pending;
        state.is_login && (state.exchange().is_some() || is_in_memory)
    }

    /// Whether the store can be used. `None` without a store.
    pub(crate) fn store_status(&self) -> Option<StoreStatus> {
        self.store.as_ref().map(|store| store.health.status())
    }

    /// Whether it is not known that the store can be used.
    pub(crate) fn store_needs_check(&self) -> bool {
        self.store.as_ref().is_some_and(|store| store.health.needs_check(store.role))
    }

    /// Checks the store, if there is one.
    pub(crate) fn check_store(self: &Arc<Self>) -> Check {
        let login = Arc::clone(self);
        let check = async move {
            match &login.store {
                Some(store) if store.role == Role::Reader => store.check(false, |_| Ok(())).await,
                Some(store) => store.check(login.is_login(), |found| login.check_owner(found)).await,
                None => Ok(()),
            }
        };
        // In a task: if it were dropped between the lease and its release, the other processes would wait for the lease.
        let checked = tokio::spawn(observability::within(observability::current_span(), check));
        Box::pin(async move {
            let interrupted =
                |_| Err(StoreError::unavailable("the check of the token store was interrupted"));
            checked.await.unwrap_or_else(interrupted)
        })
    }
}

/// Checks the refresh token of a login.
///
/// # Errors
///
/// [`SourceError::configuration`], without the text.
pub(crate) fn check_refresh_token(refresh_token: &str) -> Result<(), SourceError> {
    if refresh_token.len() > Token::MAX_LEN {
        return Err(SourceError::configuration("the refresh token must be at most 16384 bytes long"));
    }
    check_text("the refresh token", refresh_token)
}
