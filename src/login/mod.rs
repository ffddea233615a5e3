//! [`Login`]: from the need of a token to the one exchange that brings it. The only place that presents refresh tokens.
//!
//! [`Chain`](crate::chain::Chain) has the rules of what is presented. Here they are applied: to the memory of this process, and, if
//! processes share a store, to its record, under the lease that one process at a time has
//! ([`TokenStore`](crate::store::TokenStore)).
//!
//! The exchange of a user's login runs in a task of its own, since its response has the next refresh token. What it brings
//! is kept here until a refresh takes it, and the store has it.
//!
//! This file has the state, and the one exchange at a time. [`present`] decides which refresh token is presented and what its
//! answer changes, and [`shared`] has the protocol of a store.

mod present;
mod shared;

use std::{
    future::{Future, poll_fn},
    pin::{Pin, pin},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::Poll,
    time::Duration,
};

use futures_util::future::{FutureExt, Shared};
use secrecy::{ExposeSecret, SecretString};
use tokio::{
    sync::oneshot,
    task::JoinHandle,
    time::{Instant, timeout, timeout_at},
};

pub(crate) use self::present::NO_LOGINS;
use crate::{
    chain::{Known, Seed},
    detached::detached,
    error::{SourceError, StoreError},
    observability::{self, Reporter},
    source::{Credential, DynTokenSource, TokenRequest, check_text},
    store::{Lease, Role, Share, StoreOutage},
    token::{LEAST_LIFE, Token},
};

/// An exchange that has shown no sign of life for so long is on a runtime that is not driven.
const ALIVE: Duration = Duration::from_secs(10);

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
    share: Option<Box<Share>>,
    pub(crate) reporter: Reporter,
    /// Never held across an await, or while foreign code runs.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    known: Known,
    /// How many answers in a row did not say what became of the refresh token.
    unclear: u32,
    /// Whether the store does not have what is known.
    is_unstored: bool,
    /// Whether the refresh tokens are those of a user's login.
    is_login: bool,
    /// Whether a doubtful refresh token is presented now.
    asks_again: bool,
    /// Whether the record that was read last belongs to another credential.
    is_foreign: bool,
    /// Made when it is needed: most providers have neither a login nor a store.
    more: Option<Box<More>>,
}

/// What only a login, or a store that fails, needs.
#[derive(Default)]
struct More {
    /// The refresh tokens of logins that have not begun, the newest last.
    pending: Vec<Seed>,
    /// The record of another credential's login that was read last.
    foreign: Option<Known>,
    /// The version of the record in which this process has marked its refresh token as presented.
    marked: u64,
    failing: Option<Failing>,
    /// Why a user has to log in.
    verdict: Option<SourceError>,
    /// The error of an exchange that has outlived its refresh, and until when it holds.
    untaken: Option<(SourceError, Instant)>,
    /// The version of the record whose refresh token another process presents, and since when that is known.
    presented: Option<(u64, Instant)>,
    /// Whether the store granted no lease because it has failed.
    cannot_write: bool,
    exchange: Option<Exchange>,
    exchanges: u32,
    /// How often another login was given, or was used.
    changes: u32,
    /// The task that publishes what is known. `None`, or finished, if there is none.
    publisher: Option<JoinHandle<()>>,
}

impl State {
    fn more(&mut self) -> &mut More {
        self.more.get_or_insert_default()
    }

    /// The newest login that has not begun.
    fn pending(&self) -> Option<&Seed> {
        self.more.as_ref()?.pending.last()
    }

    /// Replaces what is known.
    fn replace(&mut self, known: Known) {
        if known.chain.id() != self.known.chain.id() {
            self.changed();
        }
        self.known = known;
    }

    /// Records that another login was given, or is used.
    fn changed(&mut self) {
        let more = self.more();
        more.changes = more.changes.wrapping_add(1);
    }

    fn exchange(&self) -> Option<&Exchange> {
        self.more.as_ref()?.exchange.as_ref()
    }

    /// Why a record's login is used, if that is another one than before.
    fn change(&self, found: &Known) -> Option<&'static str> {
        let (known, found) = (self.known.chain.id(), found.chain.id());
        let reason = if known.is_some() { "another process has begun it" } else { "it is in the store" };
        (found.is_some() && found != known).then_some(reason)
    }

    /// Ends what was counted: there is a token, or another refresh token.
    fn reset(&mut self) {
        self.unclear = 0;
        if let Some(more) = &mut self.more {
            (more.failing, more.verdict, more.untaken) = (None, None, None);
        }
    }
}

/// The outage of the source so far, for one refresh token.
#[derive(Clone, Copy)]
struct Failing {
    since: Instant,
    /// Whether an answer was lost.
    is_lost: bool,
}

/// The exchange of a login that is running.
struct Exchange {
    number: u32,
    /// It counts as driven by its runtime until then.
    alive_until: Instant,
    ended: Shared<oneshot::Receiver<()>>,
}

/// Ends an exchange when it is dropped, also if its runtime shuts down.
struct Ending {
    login: Arc<Login>,
    number: u32,
    _ended: oneshot::Sender<()>,
}

impl Drop for Ending {
    fn drop(&mut self) {
        let mut state = self.login.state();
        state.more().exchange.take_if(|exchange| exchange.number == self.number);
    }
}

impl Login {
    pub(crate) fn new(
        source: Box<dyn DynTokenSource>,
        share: Option<Box<Share>>,
        seed: Option<SecretString>,
        reporter: Reporter,
    ) -> Self {
        let mut state = State::default();
        if let Some(refresh_token) = seed {
            state.more().pending.push(Seed { refresh_token, is_configured: true });
        }
        state.is_login = source.credential().is_login() || state.more.is_some();
        Self { source, share, reporter, state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_reader(&self) -> bool {
        self.share.as_ref().is_some_and(|share| share.role == Role::Reader)
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
            self.share.is_some() && state.known.version == 0 && !credential.takes_no_login();
        let is_unknown = used.is_none() && (state.is_login || may_be_in_store);
        // A reader does not know whose tokens it uses.
        let is_open = pending.is_some() || is_unknown || self.is_reader();
        let changes = state.more.as_ref().map_or(0, |more| more.changes);
        let credential = credential.of_login_used(pending.or(used), is_open).with_revision(changes.into());
        if self.share.is_none() && state.is_login { credential.in_memory() } else { credential }
    }

    /// Returns a token that replaces the one of `request`, in one attempt.
    pub(crate) async fn token(
        self: &Arc<Self>,
        request: &TokenRequest<'_>,
        asking: Asking<'_>,
    ) -> Result<Token, SourceError> {
        self.turn().await;
        let untaken = self.untaken(request.previous());
        if let (Some(_), Some(share)) = (&untaken, &self.share) {
            // With a runtime for each call, a task would not get to it.
            if self.state().is_unstored && self.publish_unless_newer(share).await.is_err() {
                self.publish_later(None);
            }
        }
        if let Some(token) = untaken.filter(|_| self.share.is_none()) {
            return Ok(token);
        }
        if let Some(error) = self.untaken_error() {
            return Err(error);
        }
        let Some(share) = &self.share else {
            asking(Asked::Source);
            return self.exchange(request, None).await;
        };
        if share.role == Role::Reader {
            return self.wait_for_publisher(share, request.previous(), asking).await;
        }
        match self.with_store(share, request, asking).await {
            Ok(result) => result,
            Err(error) => {
                // The process that presents a refresh token can store what it was granted only when the store works.
                self.state().more.as_mut().map(|more| more.presented.take());
                match self.untaken(request.previous()) {
                    Some(token) => {
                        self.store_again(&None);
                        Ok(token)
                    }
                    None => self.without_store(share, request, asking, error).await,
                }
            }
        }
    }

    /// Waits until no exchange of a login is running, or the runtime of one is not driven. That one is then given up.
    pub(crate) async fn turn(&self) {
        loop {
            let (number, alive_until, ended) = match self.state().exchange() {
                Some(exchange) => (exchange.number, exchange.alive_until, exchange.ended.clone()),
                None => return,
            };
            let is_late = timeout_at(alive_until.max(Instant::now()), ended).await.is_err();
            let is_dead = |exchange: &mut Exchange| {
                exchange.number == number && (!is_late || exchange.alive_until == alive_until)
            };
            self.state().more().exchange.take_if(is_dead);
        }
    }

    /// Returns a token that no refresh has taken, because its refresh has timed out.
    fn untaken(&self, previous: Option<&Token>) -> Option<Token> {
        let credential = self.source.credential();
        let state = self.state();
        let token = state.known.token.clone().filter(|_| state.pending().is_none())?;
        let of = state.known.credential.as_deref().and_then(Credential::token);
        let is_ours = of == credential.token() || self.is_reader();
        let is_another = previous.is_none_or(|previous| !previous.has_same_access_token(&token));
        let works = !token.0.is_expired(Instant::now() + LEAST_LIFE);
        (is_ours && is_another && works).then_some(token)
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

    /// Asks the source. For a login, in a task that goes on if the refresh is dropped, as long as its runtime is driven.
    async fn exchange(
        self: &Arc<Self>,
        request: &TokenRequest<'_>,
        lease: Option<Lease>,
    ) -> Result<Token, SourceError> {
        if !self.is_login() {
            return self.ask_and_publish(request, lease).await;
        }
        let (sender, ended) = oneshot::channel();
        let number = {
            let mut state = self.state();
            let more = state.more();
            if more.exchange.is_some() {
                drop(state);
                self.release_later(lease);
                return Err(SourceError::unavailable("another exchange of the login is running"));
            }
            more.exchanges = more.exchanges.wrapping_add(1);
            let (number, alive_until) = (more.exchanges, Instant::now() + ALIVE);
            more.exchange = Some(Exchange { number, alive_until, ended: ended.shared() });
            number
        };
        let ending = Ending { login: Arc::clone(self), number, _ended: sender };
        let request = request.clone().into_owned();
        let exchanged = detached(async move {
            let login = &ending.login;
            let result = login.driven(number, login.ask_and_publish(&request, lease)).await;
            if let Some(Err(error)) = &result {
                let holds_for = error.retry_after().unwrap_or(ALIVE);
                login.state().more().untaken = Some((error.clone(), Instant::now() + holds_for));
            }
            result
        });
        let result = exchanged.await?;
        self.state().more().untaken = None;
        result.unwrap_or_else(|| {
            Err(SourceError::unavailable("the token request was given up: its runtime was not driven"))
        })
    }

    /// Runs `exchange`, and shows at intervals that its runtime is driven. `None` if it was given up meanwhile: another one
    /// has presented its refresh token, so it does not go on.
    async fn driven<T>(&self, number: u32, exchange: impl Future<Output = T>) -> Option<T> {
        let mut exchange = pin!(exchange);
        let has_turn = || self.state().exchange().is_some_and(|running| running.number == number);
        let mut guarded =
            poll_fn(|cx| if has_turn() { exchange.as_mut().poll(cx).map(Some) } else { Poll::Ready(None) });
        loop {
            if let Ok(output) = timeout(ALIVE / 4, &mut guarded).await {
                return output;
            }
            let mut state = self.state();
            if let Some(running) = state.more().exchange.as_mut().filter(|running| running.number == number) {
                running.alive_until = Instant::now() + ALIVE;
            }
        }
    }

    /// Whether a refresh token of a login would be lost with this process: it is being exchanged, or not stored.
    pub(crate) fn has_unstored_login(&self) -> bool {
        let state = self.state();
        let is_pending = state.pending().is_some_and(|pending| !pending.is_configured);
        let is_in_memory = self.share.is_none() || state.is_unstored || is_pending;
        state.is_login && (state.exchange().is_some() || is_in_memory)
    }

    /// The outage of the store, if there is one. `None` without a store.
    pub(crate) fn store_outage(&self) -> Option<StoreOutage> {
        self.share.as_ref().map(|share| share.health.outage())
    }

    /// Whether it is not known that the store can be used.
    pub(crate) fn store_needs_check(&self) -> bool {
        self.share.as_ref().is_some_and(|share| share.health.needs_check(share.role))
    }

    /// Checks the store, if there is one.
    pub(crate) fn check_store(self: &Arc<Self>) -> Check {
        let login = Arc::clone(self);
        let check = async move {
            match &login.share {
                Some(share) if share.role == Role::Reader => share.check(false, |_| Ok(())).await,
                Some(share) => share.check(login.is_login(), |found| login.check_owner(found)).await,
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

/// Returns the credential of what is known. The default takes no memory.
fn shared(credential: Credential) -> Option<Arc<Credential>> {
    credential.is_known().then(|| Arc::new(credential))
}

/// Why the refresh token of a login that was given is not presented.
const STORED: &str = "it is known already";
const OLD: &str = "it has replaced the one that was given";
