//! [`Login`]: from the need of a token to the one exchange that brings it. The only place that presents refresh tokens.
//!
//! [`Chain`](crate::chain::Chain) has the rules of what is presented. Here they are applied: to the memory of this process, and, if
//! processes share a store, to its record, under the lease that one process at a time has
//! ([`TokenStore`](crate::store::TokenStore)).
//!
//! The exchange of a user's login runs in a task of its own, since its response has the next refresh token. What it brings
//! is kept here until a refresh takes it, and the store has it.

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
    time::{Instant, sleep, sleep_until, timeout, timeout_at},
};

use crate::{
    chain::{Begun, Chain, DOUBT, Known, Seed},
    detached::detached,
    error::{Presented, SourceError, SourceErrorKind, StoreError, StoreErrorKind},
    observability::{self, Reporter},
    retry::Backoff,
    source::{Credential, DynTokenSource, RefreshReason, Sent, TokenRequest, check_text},
    store::{Lease, POLL_BACKOFF, Publication, Role, Share, StoreOutage},
    token::{LEAST_LIFE, Token},
};

/// An exchange that has shown no sign of life for so long is on a runtime that is not driven.
const ALIVE: Duration = Duration::from_secs(10);

/// The delay between two attempts to publish a token later, min and max.
const PUBLISH_BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(3));

/// A refresh token is presented again after a tenth of the outage so far, and after this at most.
const MAX_PAUSE: Duration = Duration::from_secs(60);

/// How long the process that presents a refresh token may take to store what it was granted, once the store works.
const PUBLISH_GRACE: Duration = Duration::from_secs(3);

/// A source with a credential uses it after so many answers that say nothing of the refresh token.
const MAX_UNCLEAR: u32 = 2;

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
    /// The refresh token of a login that has not begun, and the logins that it has replaced before they could begin.
    pending: Option<Seed>,
    skipped: Vec<String>,
    /// The record of another credential's login that was read last.
    foreign: Option<Known>,
    /// The version of the record in which this process has marked its refresh token as presented.
    marked: u64,
    /// When the first of the unclear answers was asked for.
    failing_since: Option<Instant>,
    /// Why a user has to log in.
    verdict: Option<SourceError>,
    exchange: Option<Exchange>,
    exchanges: u32,
    /// The task that publishes what is known. `None`, or finished, if there is none.
    publisher: Option<JoinHandle<()>>,
}

impl State {
    fn more(&mut self) -> &mut More {
        self.more.get_or_insert_default()
    }

    fn pending(&self) -> Option<&Seed> {
        self.more.as_ref()?.pending.as_ref()
    }

    fn exchange(&self) -> Option<&Exchange> {
        self.more.as_ref()?.exchange.as_ref()
    }

    /// Ends what was counted: there is a token, or another refresh token.
    fn reset(&mut self) {
        self.unclear = 0;
        if let Some(more) = &mut self.more {
            (more.failing_since, more.verdict) = (None, None);
        }
    }
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

/// An exchange that is counted as unclear, since its answer may be lost. If it is dropped, its drop takes that back unless
/// the request may have been sent.
struct Counted<'a> {
    login: &'a Login,
    sent: Sent,
    is_dropped: bool,
}

impl Counted<'_> {
    fn answered(mut self) {
        self.is_dropped = false;
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        if self.is_dropped && !self.sent.get() {
            let mut state = self.login.state();
            state.unclear = state.unclear.saturating_sub(1);
        }
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
            state.more().pending = Some(Seed { refresh_token, is_configured: true });
        }
        state.is_login = source.credential().is_login() || state.more.is_some();
        Self { source, share, reporter, state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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
            let is_pending = state.pending().is_some_and(|pending| pending.id() == id);
            let is_skipped = state.more.as_ref().is_some_and(|more| more.skipped.contains(&id));
            let is_reader = self.share.as_ref().is_some_and(|share| share.role == Role::Reader);
            if !(is_pending || is_skipped || is_reader || state.known.chain.knows(&id)) {
                let skipped = state.more().pending.replace(seed).map(|skipped| skipped.id());
                state.more().skipped.extend(skipped);
                state.is_login = true;
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
        let reason = if used == id { "it is used already" } else { "it was replaced before" };
        self.reporter.login_ignored(&used, reason);
        false
    }

    /// A doubtful refresh token is presented with the next attempt.
    pub(crate) fn ask_again(&self) {
        self.state().asks_again = true;
    }

    /// The login that the next token is one of.
    pub(crate) fn current(&self) -> Option<String> {
        let state = self.state();
        state.pending().map(Seed::id).or_else(|| state.known.chain.id().map(str::to_owned))
    }

    /// Returns a token that replaces the one of `request`, in one attempt.
    pub(crate) async fn token(
        self: &Arc<Self>,
        request: &TokenRequest<'_>,
        asking: Asking<'_>,
    ) -> Result<Token, SourceError> {
        self.turn().await;
        if let Some((token, is_unstored)) = self.untaken(request.previous()) {
            if let Some(share) = self.share.as_ref().filter(|_| is_unstored) {
                // With a runtime for each call, a task would not get to it.
                if self.publish_unless_newer(share).await.is_err() {
                    self.publish_later(None);
                }
            }
            return Ok(token);
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
            Err(error) => self.without_store(share, request, asking, error).await,
        }
    }

    /// Waits until no exchange of a login is running, or the runtime of one is not driven. That one is then given up.
    async fn turn(&self) {
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

    /// Returns a token that no refresh has taken, because its refresh has timed out, and whether it is to be stored.
    fn untaken(&self, previous: Option<&Token>) -> Option<(Token, bool)> {
        let credential = self.source.credential();
        let state = self.state();
        let token = state.known.token.clone().filter(|_| state.pending().is_none())?;
        let of = state.known.credential.as_deref().and_then(Credential::token);
        let is_ours =
            of == credential.token() || self.share.as_ref().is_some_and(|share| share.role == Role::Reader);
        let is_another = previous.is_none_or(|previous| !previous.has_same_access_token(&token));
        let works = !token.0.is_expired(Instant::now() + LEAST_LIFE);
        (is_ours && is_another && works).then_some((token, state.is_unstored))
    }

    /// The protocol of [`TokenStore`](crate::store::TokenStore). The outer error means that the source was not asked, because
    /// the store has failed.
    async fn with_store(
        self: &Arc<Self>,
        share: &Share,
        request: &TokenRequest<'_>,
        asking: Asking<'_>,
    ) -> Result<Result<Token, SourceError>, StoreError> {
        let previous = request.previous();
        let (mut polls, mut waited) = (share.polls(), Duration::ZERO);
        let mut presented: Option<(u64, Instant)> = None;
        loop {
            let found = self.load(share).await?;
            if let Some(token) = self.adopt_if_newer(share, &found, previous) {
                return Ok(Ok(token));
            }
            // The process that presents it may be about to store what it was granted, if the store has failed meanwhile.
            if let Some(version) = self.presented_by_another(&found) {
                let (seen, since) = presented.get_or_insert((version, Instant::now()));
                if *seen != version {
                    (*seen, *since) = (version, Instant::now());
                }
                if since.elapsed() < PUBLISH_GRACE {
                    sleep(polls.reads.next_delay()).await;
                    continue;
                }
            }
            let leased_at = Instant::now();
            let Some(lease) = share.lease_or_wait(&mut polls, &mut waited).await? else { continue };
            // Under the lease: the previous holder may have published since the first read.
            let found = match self.load(share).await {
                Ok(found) => found,
                Err(error) => {
                    self.release_in_background(lease);
                    return Err(error);
                }
            };
            if let Some(token) = self.adopt_if_newer(share, &found, previous) {
                self.release_in_background(lease);
                return Ok(Ok(token));
            }
            if leased_at.elapsed() > share.length / 2 {
                share.release(lease).await;
                share.record_lease_wait(leased_at.elapsed())?;
                continue;
            }
            share.reset_lease_wait();
            // Even if its access token has expired, the newest record has the only refresh token that still works.
            if let Some(found) = &found {
                self.take_up(found);
            }
            asking(Asked::Source);
            return Ok(self.exchange(request, Some(lease)).await);
        }
    }

    /// Returns what the record knows, if it belongs to this credential.
    async fn load(&self, share: &Share) -> Result<Option<Known>, StoreError> {
        let Some(mut found) = share.load(self.is_login()).await? else { return Ok(None) };
        let credential = self.source.credential();
        let token = found.credential.as_deref().and_then(Credential::token);
        let is_other_token = token != credential.token();
        let is_foreign = found.holder() != credential.holder();
        let was_foreign = std::mem::replace(&mut self.state().is_foreign, is_foreign || is_other_token);
        if (is_foreign || is_other_token) && !was_foreign {
            self.reporter.foreign_record(found.version);
        }
        if is_other_token {
            found.token = None;
        }
        // A wrong configuration has stored its own: the login that it was to replace is one of this credential.
        if is_foreign && found.chain.fall_back(credential.holder()) {
            found.credential = shared(credential);
            return Ok(Some(found));
        }
        if is_foreign {
            self.state().more().foreign = Some(found).filter(|found| found.chain.login.is_some());
            return Ok(None);
        }
        Ok(Some(found))
    }

    /// Returns the version of a record whose refresh token another process presents, or has presented before it ended.
    fn presented_by_another(&self, found: &Option<Known>) -> Option<u64> {
        let found = found.as_ref()?;
        let marked = self.state().more.as_ref().map_or(0, |more| more.marked);
        (found.chain.is_presented() && found.version != marked).then_some(found.version)
    }

    /// Uses the token of a record, if it is newer than `previous` and has not expired.
    fn adopt_if_newer(
        self: &Arc<Self>,
        share: &Share,
        found: &Option<Known>,
        previous: Option<&Token>,
    ) -> Option<Token> {
        let found = found.as_ref()?;
        let token = found.token.clone().filter(|token| !token.0.is_expired(Instant::now() + LEAST_LIFE))?;
        let seed = {
            let mut state = self.state();
            let is_newer = previous.is_none_or(|previous| !token.has_same_access_token(previous))
                && !state.known.is_newer_than(found);
            let knows = |seed: &Seed| found.chain.knows(&seed.id());
            if !is_newer || !state.pending().is_none_or(knows) {
                return None;
            }
            state.known = found.clone();
            state.is_login |= found.chain.login.is_some();
            state.is_unstored = false;
            state.reset();
            state.more.as_mut().and_then(|more| more.pending.take())
        };
        if let Some(seed) = seed {
            let used = found.chain.id().unwrap_or_default();
            self.reporter.using_login(used, if used == seed.id() { STORED } else { OLD });
        }
        share.adopted(found.version);
        if share.health.is_failing() {
            // A process that only adopts tokens would never learn that the store can be written again.
            // The operations record its result.
            drop(self.check_store());
        }
        Some(token)
    }

    fn take_up(&self, found: &Known) -> bool {
        let mut state = self.state();
        if state.known.is_newer_than(found) {
            return false;
        }
        // The same refresh token ends no outage.
        let is_same = found.chain.refresh_token.as_ref().is_some_and(|next| state.known.chain.is_next(next));
        state.known = found.clone();
        state.is_unstored = false;
        state.is_login |= found.chain.login.is_some();
        if !is_same {
            state.reset();
        }
        true
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
                lease.into_iter().for_each(|lease| self.release_in_background(lease));
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
            login.driven(number, login.ask_and_publish(&request, lease)).await
        });
        exchanged.await?.unwrap_or_else(|| {
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

    /// Asks the source, and stores what that changes.
    async fn ask_and_publish(
        self: &Arc<Self>,
        request: &TokenRequest<'_>,
        lease: Option<Lease>,
    ) -> Result<Token, SourceError> {
        let (Some(share), Some(lease)) = (&self.share, lease) else { return self.ask(request, None).await };
        let answer = share.extending(&lease, self.ask(request, Some((share, &lease)))).await;
        let known = {
            let state = self.state();
            state.is_unstored.then(|| state.known.clone())
        };
        let Some(known) = known else {
            share.release(lease).await;
            return answer;
        };
        let is_login = self.is_login();
        let published = match is_login {
            true => share.publish_for_a_lease(&known, &lease).await,
            false => share.publish(&known, &lease).await,
        };
        match published {
            Ok(Publication::Stored) => {
                self.stored(&known, lease.fence());
                share.release(lease).await;
            }
            Ok(Publication::Superseded) => {
                share.reporter.superseded();
                // If the newer lease's token is stored already, only its refresh token still works.
                let found = self.load(share).await.unwrap_or_default();
                if let Some(token) = self.adopt_if_newer(share, &found, answer.as_ref().ok()) {
                    return Ok(token);
                }
                self.publish_later(None);
            }
            Err(error) => {
                share.reporter.not_stored(&error);
                // A process that got the lease of a login would present the refresh token that is spent.
                let (kept, released) = if is_login { (Some(lease), None) } else { (None, Some(lease)) };
                released.into_iter().for_each(|lease| self.release_in_background(lease));
                self.publish_later(kept);
            }
        }
        answer
    }

    /// Presents the refresh tokens of the chain, or uses the credential. Each change is known before the next await, at which
    /// this may be dropped.
    async fn ask(
        self: &Arc<Self>,
        request: &TokenRequest<'_>,
        under: Option<(&Share, &Lease)>,
    ) -> Result<Token, SourceError> {
        loop {
            self.prepare(under.filter(|_| self.is_login())).await?;
            let credential = self.source.credential();
            let asked_at = Instant::now();
            let Some(refresh_token) = self.next(&credential, asked_at)? else {
                let token = self.source.fetch(&request.presenting(None, &Sent::unknown())).await?;
                return Ok(self.granted(None, token, credential));
            };
            let counted = Counted { login: self, sent: Sent::unknown(), is_dropped: true };
            let answer = self.source.fetch(&request.presenting(Some(&refresh_token), &counted.sent)).await;
            counted.answered();
            let error = match answer {
                Ok(token) => return Ok(self.granted(Some(&refresh_token), token, credential)),
                Err(error) => error,
            };
            if let Some((share, _)) = under.filter(|_| self.is_over(&error)) {
                // Another process may have exchanged it meanwhile, whose next refresh token must not be lost.
                let found = self.load(share).await.unwrap_or_default();
                if let Some(token) = self.adopt_if_newer(share, &found, request.previous()) {
                    return Ok(token);
                }
                if found.is_some_and(|found| self.take_up(&found)) {
                    continue;
                }
            }
            if let Some(used) = self.failed(&refresh_token, error, asked_at)? {
                self.reporter.using_login(&used, "the configured one was rejected");
            }
        }
    }

    /// Begins the login that is pending, and stores that a refresh token is presented: if this process ends, another one
    /// continues with it.
    async fn prepare(&self, under: Option<(&Share, &Lease)>) -> Result<(), SourceError> {
        let credential = self.source.credential();
        let (mut known, begun, is_marked) = {
            let state = self.state();
            let mut known = state.known.clone();
            let begun = match (&state.more, state.pending()) {
                (Some(more), Some(seed)) => {
                    check_refresh_token(seed.refresh_token.expose_secret())?;
                    let foreign = more.foreign.as_ref().filter(|_| known.chain.login.is_none());
                    let is_foreign = foreign.is_some();
                    if let Some(foreign) = foreign {
                        known = Known { version: known.version, ..foreign.clone() };
                    }
                    let holder = known.holder().map(str::to_owned);
                    let begun = known.chain.begin(seed, more.skipped.clone(), holder.as_deref(), is_foreign);
                    if matches!(begun, Begun::New | Begun::Back) {
                        (known.token, known.credential) = (None, shared(credential));
                    }
                    Some((seed.clone(), begun))
                }
                _ => None,
            };
            let marked = state.more.as_ref().map_or(0, |more| more.marked);
            let is_begun = matches!(begun, Some((_, Begun::New | Begun::Back)));
            (known, begun, !is_begun && !state.is_unstored && state.known.version == marked)
        };
        let is_doubtful = !known.chain.doubted_for(Instant::now()).is_zero() && !self.state().asks_again;
        let is_presented = known.chain.refresh_token.is_some() && !is_doubtful;
        let mut marked = None;
        if let (Some((share, lease)), Some(login)) = (under, &mut known.chain.login) {
            // Unless this process has, and its answer was lost.
            if is_presented && !(is_marked && login.presented.is_some()) {
                login.presented.get_or_insert(known.version);
                match share.publish(&known, lease).await {
                    Ok(Publication::Stored) => marked = Some(lease.fence()),
                    Ok(Publication::Superseded) => {
                        return Err(SourceError::unavailable(
                            "another process has taken over the refresh, before the refresh token was presented",
                        ));
                    }
                    Err(error) => {
                        return Err(
                            error.into_source_error("the refresh token of the login cannot be stored")
                        );
                    }
                }
            }
        }
        let used = known.chain.id().unwrap_or_default().to_owned();
        {
            let mut state = self.state();
            if matches!(begun, Some((_, Begun::New | Begun::Back))) {
                state.reset();
                state.is_unstored = self.share.is_some();
            }
            if let Some(version) = marked {
                (known.version, state.is_unstored) = (version, false);
                state.more().marked = version;
            }
            if begun.is_some() || marked.is_some() {
                state.known = known;
            }
            if let Some((seed, _)) = &begun {
                let more = state.more();
                more.pending.take_if(|pending| pending.id() == seed.id());
                (more.skipped, more.foreign) = (Vec::new(), None);
            }
        }
        if let Some((seed, begun)) = begun {
            let reason = match begun {
                Begun::New if seed.is_configured => "it is configured, and new",
                Begun::New => "a user has logged in",
                Begun::Same => STORED,
                Begun::Old => OLD,
                Begun::Back => "it is configured again, and no token was granted for the one in its place",
            };
            self.reporter.using_login(&used, reason);
        }
        Ok(())
    }

    /// Returns the refresh token to present. `None` if the credential is used.
    fn next(&self, credential: &Credential, now: Instant) -> Result<Option<SecretString>, SourceError> {
        let mut state = self.state();
        let is_login = state.is_login;
        let holder = state.known.credential.as_deref().map_or(credential.holder(), Credential::holder);
        // Those of another account, or whose answers were lost too often.
        let is_over = holder != credential.holder() || (!is_login && state.unclear >= MAX_UNCLEAR);
        if is_over {
            state.known.chain = Chain::default();
            state.reset();
        }
        let next = state.known.chain.refresh_token.clone();
        let is_doubtful =
            !std::mem::take(&mut state.asks_again) && !state.known.chain.doubted_for(now).is_zero();
        if is_login && (is_doubtful || next.is_none()) {
            let verdict = state.more.as_ref().and_then(|more| more.verdict.clone());
            return Err(verdict.unwrap_or_else(|| {
                SourceError::login_required(match is_doubtful {
                    true => "the refresh token was rejected a moment ago: a user has to log in again",
                    false => "there is no refresh token that works: a user has to log in again",
                })
            }));
        }
        // Counted before the answer: it may be lost.
        state.unclear += u32::from(next.is_some());
        Ok(next)
    }

    /// Records a token that was granted, for the refresh token that was presented or for the credential.
    fn granted(&self, presented: Option<&SecretString>, token: Token, credential: Credential) -> Token {
        let mut state = self.state();
        let next = token.refresh_token().map(SecretString::from);
        let has_next = next.is_some();
        match presented {
            Some(presented) if !state.known.chain.is_next(presented) => return token,
            Some(_) => state.known.chain.granted(next),
            None => state.known.chain = Chain { refresh_token: next, ..Chain::default() },
        }
        // RFC 6749 §6: without another one, it is kept.
        let token = match state.known.chain.refresh_token.clone().filter(|_| !has_next) {
            Some(kept) => token.with_refresh_token(kept),
            None => token,
        };
        // Without a store, only the exchange of a login outlives its refresh.
        state.known.token = Some(token.clone()).filter(|_| state.is_login || self.share.is_some());
        state.known.credential = shared(credential);
        state.is_unstored = self.share.is_some();
        state.reset();
        token
    }

    /// Whether a refresh token is not presented again after this error.
    fn is_over(&self, error: &SourceError) -> bool {
        let is_lost =
            || !self.is_login() && self.state().unclear >= MAX_UNCLEAR && error.retry_after().is_none();
        match error.presented() {
            Presented::Rejected | Presented::Doubtful => true,
            Presented::Unclear => is_lost(),
            Presented::Unspent => false,
        }
    }

    /// Records that the exchange of a refresh token has failed. If another refresh token or the credential is used then,
    /// returns the login that is used.
    fn failed(
        &self,
        presented: &SecretString,
        mut error: SourceError,
        asked_at: Instant,
    ) -> Result<Option<String>, SourceError> {
        let is_login = self.is_login();
        let is_over = self.is_over(&error);
        let credential = self.source.credential();
        let mut state = self.state();
        if !state.known.chain.is_next(presented) {
            // What the store has was taken up meanwhile.
            return if is_over { Ok(None) } else { Err(error) };
        }
        let (now, next) = (Instant::now(), error.take_next_refresh_token());
        let is_replaced = next.is_some();
        if is_replaced {
            state.known.chain.granted(next);
            state.is_unstored = self.share.is_some();
            state.unclear = 0;
        }
        match error.presented() {
            presented @ (Presented::Rejected | Presented::Doubtful) if is_login && !is_replaced => {
                let is_doubtful = presented == Presented::Doubtful;
                let Known { version, chain, .. } = &mut state.known;
                let (id, version) = (chain.id().unwrap_or_default().to_owned(), *version);
                let has_fallen_back = chain.fall_back(credential.holder());
                match chain.login.as_mut().filter(|_| has_fallen_back) {
                    Some(login) => login.replaced.push(id),
                    None => chain.judge(version, is_doubtful.then_some(now + DOUBT)),
                }
                let used = chain.id().map(str::to_owned);
                state.is_unstored = self.share.is_some();
                if has_fallen_back {
                    return Ok(used);
                }
                let further = if is_doubtful { "if that stays so, " } else { "" };
                let error =
                    SourceError::login_required(format!("{error}: {further}a user has to log in again"));
                state.more().verdict = Some(error.clone());
                Err(error)
            }
            _ if is_over && !is_replaced => {
                state.known.chain = Chain::default();
                state.unclear = 0;
                drop(state);
                observability::credential_used(&error);
                Ok(None)
            }
            presented => {
                state.unclear -= u32::from(presented == Presented::Unspent && state.unclear > 0);
                if !error.is_transient() && presented == Presented::Unclear && !is_replaced {
                    error = error.of_kind(SourceErrorKind::InvalidResponse);
                }
                if is_login && error.is_transient() {
                    let failing_for = now - *state.more().failing_since.get_or_insert(asked_at);
                    let pause = (failing_for / 10).min(MAX_PAUSE);
                    let pause = error.retry_after().unwrap_or_default().max(pause);
                    error = error.with_retry_after(pause);
                }
                Err(error)
            }
        }
    }

    /// Asks the source without the store, unless there is time left to wait for the store.
    async fn without_store(
        self: &Arc<Self>,
        share: &Share,
        request: &TokenRequest<'_>,
        asking: Asking<'_>,
        error: StoreError,
    ) -> Result<Token, SourceError> {
        // The reason is read only now, because a caller that cannot use the token may have joined since.
        if request.reason() == RefreshReason::Expiring
            && request.previous().is_some_and(|token| is_in_first_half_of_expiring(token, Instant::now()))
        {
            return Err(
                error.into_source_error("the token store cannot be used, and the current token still works")
            );
        }
        if self.is_login() {
            let text =
                "the token store cannot be used, and the refresh token must not be presented without it";
            return Err(match error.kind() {
                StoreErrorKind::Unavailable => error.into_source_error(text),
                // Only an operator can correct it.
                _ => SourceError::configuration(format!("{text}: {error}")),
            });
        }
        share.reporter.without_store(&error);
        asking(Asked::Source);
        let token = self.ask_and_publish(request, None).await?;
        self.publish_later(None);
        Ok(token)
    }

    /// Polls the store, as a reader, until there is a newer token, one lease length has passed, or the store has failed
    /// permanently.
    async fn wait_for_publisher(
        self: &Arc<Self>,
        share: &Share,
        previous: Option<&Token>,
        asking: Asking<'_>,
    ) -> Result<Token, SourceError> {
        let deadline = Instant::now() + share.length;
        let mut polls = Backoff::between(POLL_BACKOFF);
        loop {
            let mut found = share.load(false).await;
            // A reader keeps no refresh token.
            if let Ok(Some(Known { token, chain, .. })) = &mut found {
                *token = token.take().map(Token::without_refresh_token);
                *chain = Chain::default();
            }
            let usable = found.as_ref().ok().and_then(|found| self.adopt_if_newer(share, found, previous));
            if let Some(token) = usable {
                return Ok(token);
            }
            let now = Instant::now();
            let is_permanent = found.as_ref().is_err_and(|error| !error.is_transient());
            if now >= deadline || is_permanent {
                asking(Asked::Publisher);
                return Err(match found {
                    Err(error) => error.into_source_error("the token store cannot be used"),
                    Ok(None) => SourceError::unavailable("the store holds no token; is a publisher running?"),
                    Ok(Some(_)) => SourceError::unavailable("no publisher has stored a newer token yet"),
                });
            }
            sleep_until(deadline.min(now + polls.next_delay())).await;
        }
    }

    /// Records that the store has this, and so all that is known unless that has changed meanwhile.
    fn stored(&self, stored: &Known, version: u64) {
        let mut state = self.state();
        let is_same_token = match (&state.known.token, &stored.token) {
            (Some(known), Some(stored)) => known.has_same_access_token(stored),
            (known, stored) => known.is_none() && stored.is_none(),
        };
        let is_same = match &stored.chain.refresh_token {
            Some(refresh_token) => is_same_token && state.known.chain.is_next(refresh_token),
            None => is_same_token && state.known.chain.refresh_token.is_none(),
        };
        state.known.version = version;
        state.is_unstored &= !is_same;
    }

    /// Publishes what is known in the background until the store has it, under this lease as long as that is the newest one.
    /// The task ends with the provider.
    fn publish_later(self: &Arc<Self>, lease: Option<Lease>) {
        let span = observability::current_span();
        // Held until the new task is stored, otherwise two callers could each start one.
        let mut state = self.state();
        if lease.is_none() && state.more().publisher.as_ref().is_some_and(|task| !task.is_finished()) {
            return;
        }
        let (login, mut lease) = (Arc::downgrade(self), lease);
        let publish = async move {
            let mut delays = Backoff::between(PUBLISH_BACKOFF);
            loop {
                if lease.is_none() {
                    sleep(delays.next_delay()).await;
                }
                let Some(login) = login.upgrade() else { return };
                let Some(share) = &login.share else { return };
                {
                    let mut state = login.state();
                    if !state.is_unstored {
                        // In the same critical section as the check: otherwise `publish_later` could find this task running
                        // after it has decided to end.
                        state.more().publisher = None;
                        return;
                    }
                }
                let published = match lease.take() {
                    Some(kept) => login.publish_under(share, kept, &mut lease).await,
                    None => login.publish_unless_newer(share).await,
                };
                published.unwrap_or_else(|error| share.reporter.not_stored(&error));
            }
        };
        state.more().publisher = Some(tokio::spawn(observability::within(span, publish)));
    }

    /// Publishes what is known under a lease, which is kept if the store fails.
    async fn publish_under(
        &self,
        share: &Share,
        lease: Lease,
        kept: &mut Option<Lease>,
    ) -> Result<(), StoreError> {
        let known = self.state().known.clone();
        match share.publish_for_a_lease(&known, &lease).await {
            Ok(Publication::Stored) => {
                self.stored(&known, lease.fence());
                share.release(lease).await;
            }
            Ok(Publication::Superseded) => {}
            Err(error) => {
                *kept = Some(lease);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Publishes what is known, unless there is a newer record or another process has the lease.
    async fn publish_unless_newer(&self, share: &Share) -> Result<(), StoreError> {
        let Some(lease) = share.lease().await? else { return Ok(()) };
        let published = async {
            let found = self.load(share).await?;
            if found.is_some_and(|found| self.take_up(&found)) {
                share.health.nothing_to_publish();
                return Ok(());
            }
            let known = self.state().known.clone();
            if share.publish(&known, &lease).await? == Publication::Stored {
                self.stored(&known, lease.fence());
            }
            Ok(())
        };
        let published = published.await;
        share.release(lease).await;
        published
    }

    /// Releases the lease in the background, so that callers do not wait for a store that has just failed.
    fn release_in_background(self: &Arc<Self>, lease: Lease) {
        let login = Arc::clone(self);
        tokio::spawn(async move {
            if let Some(share) = &login.share {
                share.release(lease).await;
            }
        });
    }

    /// Whether a refresh token of a login would be lost with this process: it is being exchanged, or not stored.
    pub(crate) fn has_unstored_login(&self) -> bool {
        let state = self.state();
        let is_pending = state.pending().is_some_and(|pending| !pending.is_configured);
        state.is_login && (state.exchange().is_some() || state.is_unstored || is_pending)
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
                Some(share) => share.check(login.is_login()).await,
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

/// Returns the credential of what is known. The default takes no memory.
fn shared(credential: Credential) -> Option<Arc<Credential>> {
    credential.is_known().then(|| Arc::new(credential))
}

/// Why the refresh token of a login that was given is not presented.
const STORED: &str = "it is known, with a newer refresh token";
const OLD: &str = "it has replaced the one that was given";

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

fn is_in_first_half_of_expiring(token: &Token, now: Instant) -> bool {
    let (Some(refresh_at), Some(expires_at)) = (token.refresh_at(), token.expires_at()) else { return false };
    now < refresh_at + expires_at.saturating_duration_since(refresh_at) / 2
}
