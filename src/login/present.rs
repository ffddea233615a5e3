//! Which refresh token an exchange presents, and what its answer changes.

use std::{sync::Arc, time::Duration};

use secrecy::{ExposeSecret, SecretString};
use tokio::time::Instant;

use super::{Login, check_refresh_token, memory::Failing};
use crate::chain::{Begun, Chain, DOUBT, Known, Seed};
use crate::error::{Fate, SourceError, SourceErrorKind};
use crate::observability;
use crate::source::{Credential, Sent, TokenRequest};
use crate::store::{Lease, Publication, StoreAccess};
use crate::token::Token;

/// A refresh token is presented again after a tenth of the outage so far, and after this at most.
const MAX_PAUSE: Duration = Duration::from_secs(60);

/// A source with a credential uses it after so many answers that say nothing of the refresh token.
const MAX_UNCLEAR: u32 = 2;

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

/// What becomes of the logins that are pending.
struct Given {
    count: usize,
    begun: Begun,
    is_configured: bool,
}

impl Given {
    fn has_begun(&self) -> bool {
        matches!(self.begun, Begun::New | Begun::Back)
    }
}

/// A login was given to a source that presents no refresh token.
pub(crate) const NO_LOGINS: &str = "the source takes no refresh token of a login: give the login to a provider of its \
                                    own, whose source does";

/// Returns the credential of what is known. The default takes no memory.
pub(super) fn shared(credential: Credential) -> Option<Arc<Credential>> {
    credential.is_known().then(|| Arc::new(credential))
}

/// Why the refresh token of a login that was given is not presented.
pub(super) const STORED: &str = "it is known already";
pub(super) const OLD: &str = "it has replaced the one that was given";

fn other_credential() -> SourceError {
    SourceError::configuration(
        "the refresh token of the login was used with another server, client or key: restore that in the \
         configuration, or log in again",
    )
}

impl Login {
    /// Presents the refresh tokens of the chain, or uses the credential. Each change is known before the next await, at which
    /// this may be dropped.
    pub(super) async fn ask(
        self: &Arc<Self>,
        request: &TokenRequest<'_>,
        under: Option<(&StoreAccess, &Lease)>,
    ) -> Result<Token, SourceError> {
        loop {
            // Once for each attempt: it may change meanwhile, and be changed back.
            let credential = self.source.credential();
            self.prepare(&credential, under.filter(|_| self.is_login())).await?;
            let asked_at = Instant::now();
            let Some(refresh_token) = self.next(&credential, asked_at)? else {
                let token = self.source.fetch(&request.presenting(None, &Sent::unknown())).await?;
                return Ok(self.granted(None, token, credential.at_grant(self.source.credential())));
            };
            let counted = Counted { login: self, sent: Sent::unknown(), is_dropped: true };
            let answer = self.source.fetch(&request.presenting(Some(&refresh_token), &counted.sent)).await;
            counted.answered();
            let error = match answer {
                Ok(token) => return Ok(self.granted(Some(&refresh_token), token, credential)),
                Err(error) => error,
            };
            if let Some((store, _)) = under.filter(|_| self.is_over(&error)) {
                // Another process may have been granted another one meanwhile, which must not be lost.
                let found = self.load(store).await.unwrap_or_default();
                if let Some(token) = self.adopt_if_newer(store, &found, request.previous()) {
                    return Ok(token);
                }
                if found.is_some_and(|found| self.take_up(&found, false)) {
                    continue;
                }
            }
            if let Some(used) = self.failed(&refresh_token, &credential, error, asked_at)? {
                self.reporter.using_login(&used, "the configured one was rejected");
            }
        }
    }

    /// Begins the login that is pending, and stores that its refresh token is presented. Nothing has changed if that fails.
    pub(super) async fn prepare(
        &self,
        credential: &Credential,
        under: Option<(&StoreAccess, &Lease)>,
    ) -> Result<(), SourceError> {
        let (mut known, given) = self.begin(credential)?;
        let has_begun = given.as_ref().is_some_and(Given::has_begun);
        let is_marked = match under {
            Some((store, lease)) => self.mark(store, lease, &mut known, has_begun).await?,
            None => false,
        };
        let used = known.chain.id().unwrap_or_default().to_owned();
        {
            let mut state = self.state();
            if has_begun {
                state.reset();
                state.is_unstored = self.store.is_some();
            }
            if is_marked {
                state.is_unstored = false;
                state.more().marked = known.version;
            }
            if has_begun || is_marked {
                state.replace(known);
            }
            if let Some(Given { count, .. }) = given {
                let more = state.more();
                // Another one may have been given meanwhile.
                more.pending = more.pending.split_off(count.min(more.pending.len()));
                more.foreign = None;
            }
        }
        if let Some(Given { begun, is_configured, .. }) = given {
            let reason = match begun {
                Begun::Same => STORED,
                Begun::Old => OLD,
                _ if !is_configured => "a user has logged in",
                Begun::New => "it is configured, and new",
                Begun::Back => "it is configured again, and no token was granted for the one in its place",
            };
            self.reporter.using_login(&used, reason);
        }
        Ok(())
    }

    /// Returns what is known once the newest login that is pending has begun. One that was replaced before does not count.
    fn begin(&self, credential: &Credential) -> Result<(Known, Option<Given>), SourceError> {
        let state = self.state();
        let mut known = state.known.clone();
        let Some(more) = &state.more else { return Ok((known, None)) };
        let foreign = more.foreign.as_ref().filter(|_| known.chain.login.is_none());
        if foreign.is_some() && more.pending.is_empty() && state.is_login {
            return Err(other_credential());
        }
        if let Some(foreign) = foreign.filter(|_| !more.pending.is_empty()) {
            let is_spent = |seed: &Seed| foreign.chain.has_spent(seed);
            if more.pending.last().is_some_and(is_spent) {
                return Err(other_credential());
            }
            known = Known { version: known.version, ..foreign.clone() };
        }
        if credential.takes_no_login() && !more.pending.is_empty() {
            return Err(SourceError::configuration(NO_LOGINS));
        }
        let holder = known.holder().map(str::to_owned);
        let (count, mut given) = (more.pending.len(), None::<Given>);
        for (older, seed) in more.pending.iter().enumerate().rev() {
            check_refresh_token(seed.refresh_token.expose_secret())?;
            let skipped = more.pending[..older].iter().map(Seed::id);
            let begun = known.chain.begin(seed, skipped, holder.as_deref(), foreign.is_some());
            given = Some(Given { count, begun, is_configured: seed.is_configured });
            if begun != Begun::Old {
                break;
            }
        }
        if given.as_ref().is_some_and(Given::has_begun) {
            (known.token, known.credential) = (None, shared(credential.clone()));
        } else if known.chain.login.is_some() && known.holder() != credential.holder() {
            return Err(other_credential());
        }
        Ok((known, given))
    }

    /// Stores that the refresh token is presented: if this process ends, another one continues with it. Returns false if
    /// there is nothing to store.
    async fn mark(
        &self,
        store: &StoreAccess,
        lease: &Lease,
        known: &mut Known,
        has_begun: bool,
    ) -> Result<bool, SourceError> {
        let is_doubtful = !known.chain.doubted_for(Instant::now()).is_zero();
        {
            let state = self.state();
            let is_presented = known.chain.refresh_token.is_some() && (!is_doubtful || state.asks_again);
            let Some(login) = known.chain.login.as_ref().filter(|_| is_presented) else { return Ok(false) };
            let marked = state.more.as_ref().map_or(0, |more| more.marked);
            // This process has, and the answer was lost.
            let is_marked = !has_begun && !state.is_unstored && known.version == marked;
            if is_marked && login.is_presented {
                return Ok(false);
            }
        }
        known.chain.presented();
        match store.publish(known, lease).await {
            Ok(Publication::Stored) => {
                known.version = lease.fence();
                Ok(true)
            }
            Ok(Publication::Superseded) => Err(SourceError::unavailable(
                "another process has taken over the refresh, before the refresh token was presented",
            )),
            Err(error) => Err(error.into_source_error("the refresh token of the login cannot be stored")),
        }
    }

    /// Returns the refresh token to present. `None` if the credential is used.
    pub(super) fn next(
        &self,
        credential: &Credential,
        now: Instant,
    ) -> Result<Option<SecretString>, SourceError> {
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
        let is_doubted = !state.known.chain.doubted_for(now).is_zero();
        let is_doubtful = !std::mem::take(&mut state.asks_again) && is_doubted;
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
        if is_doubted {
            state.known.chain.presented();
        }
        Ok(next)
    }

    /// Records a token that was granted, for the refresh token that was presented or for the credential.
    pub(super) fn granted(
        &self,
        presented: Option<&SecretString>,
        token: Token,
        credential: Credential,
    ) -> Token {
        let mut state = self.state();
        let next = token.refresh_token().map(SecretString::from);
        let has_next = next.is_some();
        match presented {
            Some(presented) if !state.known.chain.is_next(presented) => return token,
            Some(_) => {
                let Known { version, chain, .. } = &mut state.known;
                chain.granted(next, *version);
            }
            // A login has begun since.
            None if state.is_login => return token,
            None => state.known.chain = Chain { refresh_token: next, ..Chain::default() },
        }
        // RFC 6749 §6: without another one, it is kept.
        let token = match state.known.chain.refresh_token.clone().filter(|_| !has_next) {
            Some(kept) => token.with_refresh_token(kept),
            None => token,
        };
        // Without a store, only the exchange of a login outlives its refresh.
        state.known.token = Some(token.clone()).filter(|_| state.is_login || self.store.is_some());
        state.known.credential = shared(credential);
        state.is_unstored = self.store.is_some();
        state.reset();
        state.asks_again = false;
        token
    }

    /// Whether a refresh token is not presented again after this error.
    pub(super) fn is_over(&self, error: &SourceError) -> bool {
        match error.fate() {
            Fate::Rejected | Fate::Doubtful => true,
            _ if self.is_login() => false,
            Fate::Unclear => self.state().unclear >= MAX_UNCLEAR && error.retry_after().is_none(),
            // The endpoint may take no refresh token. If the options are wrong, the exchange of the credential says so.
            Fate::Unspent => error.kind() == SourceErrorKind::Configuration,
        }
    }

    /// Records that the exchange of a refresh token has failed. If another refresh token or the credential is used then,
    /// returns the login that is used.
    pub(super) fn failed(
        &self,
        presented: &SecretString,
        credential: &Credential,
        mut error: SourceError,
        asked_at: Instant,
    ) -> Result<Option<String>, SourceError> {
        let is_login = self.is_login();
        let is_over = self.is_over(&error);
        let mut state = self.state();
        if !state.known.chain.is_next(presented) {
            // What the store has was taken up meanwhile.
            return if is_over { Ok(None) } else { Err(error) };
        }
        let (now, next) = (Instant::now(), error.take_next_refresh_token());
        let is_replaced = next.is_some();
        if is_replaced {
            let Known { version, chain, .. } = &mut state.known;
            chain.granted(next, *version);
            state.is_unstored = self.store.is_some();
            state.unclear = 0;
        }
        match error.fate() {
            fate @ (Fate::Rejected | Fate::Doubtful) if is_login && !is_replaced => {
                let is_doubtful = fate == Fate::Doubtful;
                let chain = &mut state.known.chain;
                let id = chain.id().unwrap_or_default().to_owned();
                let has_fallen_back = !is_doubtful && chain.fall_back(credential.holder());
                match chain.login.as_mut().filter(|_| has_fallen_back) {
                    Some(login) => login.replaces(id),
                    None => chain.judge(is_doubtful.then_some(now + DOUBT)),
                }
                let used = chain.id().map(str::to_owned);
                state.is_unstored = self.store.is_some();
                if has_fallen_back {
                    state.changed();
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
            fate => {
                state.unclear -= u32::from(fate == Fate::Unspent && state.unclear > 0);
                if !error.is_transient() && fate == Fate::Unclear && !is_replaced {
                    error = error.of_kind(SourceErrorKind::InvalidResponse);
                }
                if is_login {
                    let more = state.more();
                    // From the first answer that was lost on: the refresh token may be spent since, and a server accepts it
                    // again for a short time only.
                    let is_lost = fate == Fate::Unclear && !error.facts.is_answer;
                    let failing = more.failing.filter(|failing| failing.is_lost || !is_lost);
                    let failing = failing.unwrap_or(Failing { since: asked_at, is_lost });
                    let lasted = now - failing.since;
                    let pause = (lasted / 10).min(MAX_PAUSE);
                    more.failing = Some(failing);
                    if error.is_transient() {
                        let pause = error.retry_after().unwrap_or_default().max(pause);
                        error = error.with_retry_after(pause);
                    } else if failing.is_lost && lasted < MAX_PAUSE {
                        // Not only after the cool-down: the server accepts the refresh token again for a short time.
                        error = error.with_retry_after(pause);
                    }
                }
                Err(error)
            }
        }
    }
}
