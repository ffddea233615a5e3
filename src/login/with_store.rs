//! The protocol of a store: which token of another process is used, who asks the source, and what is stored.

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, sleep, sleep_until};

use super::present::{OLD, STORED, shared};
use super::{Asked, Asking, Login};
use crate::chain::{Before, Chain, Known, PUBLISH_GRACE};
use crate::error::{SourceError, StoreError, StoreErrorKind};
use crate::retry::Backoff;
use crate::source::{Credential, RefreshReason, TokenRequest};
use crate::store::{POLL_BACKOFF, StoreAccess};
use crate::token::{LEAST_LIFE, Token};

/// A store that is set up wrongly is asked again after this: a server that starts may reject a password for a moment.
const HEALS_WITHIN: Duration = Duration::from_secs(3);

impl Login {
    /// The protocol of [`TokenStore`](crate::store::TokenStore). The outer error means that the store has failed before the
    /// lease was used: the refresh may go on without it. A refresh token that could not be marked as presented is an inner
    /// error, as an answer of the source is.
    pub(super) async fn with_store(
        self: &Arc<Self>,
        store: &StoreAccess,
        request: &TokenRequest<'_>,
        asking: Asking<'_>,
    ) -> Result<Result<Token, SourceError>, StoreError> {
        let previous = request.previous();
        let (mut polls, mut waited) = (store.polls(), Duration::ZERO);
        loop {
            let found = self.load(store).await?;
            if let Some(token) = self.newest(store, &found, previous) {
                return Ok(Ok(token));
            }
            // The process that presents it may be about to store what it was granted, if the store has failed meanwhile.
            if self.is_presented_by_another(&found) {
                sleep(polls.reads.next_delay()).await;
                continue;
            }
            let leased_at = Instant::now();
            let leased = store.lease_or_wait(&mut polls, &mut waited).await;
            if leased.is_err() {
                self.state().more().cannot_write = true;
            }
            let Some(lease) = leased? else { continue };
            // Under the lease: the previous holder may have published since the first read.
            let found = match self.load(store).await {
                Ok(found) => found,
                Err(error) => {
                    self.release_later(Some(lease));
                    return Err(error);
                }
            };
            if let Some(token) = self.adopt_if_newer(store, &found, previous) {
                store.release(lease).await;
                // A store may have taken its time.
                if token.is_expired(Instant::now() + LEAST_LIFE) {
                    continue;
                }
                return Ok(Ok(token));
            }
            if leased_at.elapsed() > store.length / 2 {
                store.release(lease).await;
                store.record_lease_wait(leased_at.elapsed())?;
                continue;
            }
            store.reset_lease_wait();
            // If the store could not be written, it waits anew: the other process could not, either.
            if let Some(more) = self.state().more.as_mut().filter(|more| more.cannot_write) {
                (more.cannot_write, more.seen_mark) = (false, None);
            }
            if self.is_presented_by_another(&found) {
                store.release(lease).await;
                continue;
            }
            // Even if its access token has expired, the newest record has the only refresh token that still works.
            if let Some(found) = &found {
                self.take_up(found, false);
            }
            self.compare_with(&found);
            asking(Asked::Source);
            return Ok(self.exchange(request, Some(lease)).await);
        }
    }

    /// Returns what the record knows, if it belongs to this credential.
    pub(super) async fn load(&self, store: &StoreAccess) -> Result<Option<Known>, StoreError> {
        let found = store.load(self.is_login(), |found| self.check_owner(found)).await?;
        self.state().more.as_mut().map(|more| more.foreign.take());
        let Some(mut found) = found else {
            self.state().is_foreign = false;
            return Ok(None);
        };
        let credential = self.source.credential();
        let token = found.credential.as_deref().and_then(Credential::token);
        let is_other_token = token != credential.token() || credential.is_open();
        let is_foreign = found.holder() != credential.holder();
        let was_foreign = {
            let mut state = self.state();
            // What is published of another login comes from the newest record.
            state.known.renew_before(&found);
            std::mem::replace(&mut state.is_foreign, is_foreign || is_other_token)
        };
        if (is_foreign || is_other_token) && !was_foreign && !credential.is_open() {
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

    /// Fails if the record has a login that this process must not replace: it was given none.
    pub(super) fn check_owner(&self, found: &Known) -> Result<(), StoreError> {
        let credential = self.source.credential();
        if found.chain.login.is_none() {
            return Ok(());
        }
        let before = found.chain.before();
        let is_before = |before: &Before| before.holder.as_deref() == credential.holder();
        let is_ours = found.holder() == credential.holder() || before.is_some_and(is_before);
        let has_ended = found.chain.refresh_token.is_none() && before.is_none();
        let may_use = !credential.takes_no_login() && (is_ours || self.is_login());
        if may_use || (has_ended && !is_ours) {
            return Ok(());
        }
        Err(StoreError::configuration(
            "the record has a user's login, of another source, server, client or key: restore that in the configuration, \
             use another store, or delete the record",
        ))
    }

    /// Whether another process presents the refresh token of this record, or has just presented it.
    fn is_presented_by_another(&self, found: &Option<Known>) -> bool {
        let Some(found) = found.as_ref().filter(|found| found.chain.is_presented()) else { return false };
        let (mut state, now) = (self.state(), Instant::now());
        let more = state.more();
        let seen = more.seen_mark.filter(|(version, _)| *version == found.version);
        let (version, since) = *more.seen_mark.insert(seen.unwrap_or((found.version, now)));
        version != more.marked && now < since + PUBLISH_GRACE
    }

    /// Uses the token of a record, or one that no refresh has taken if that is newer.
    fn newest(
        self: &Arc<Self>,
        store: &StoreAccess,
        found: &Option<Known>,
        previous: Option<&Token>,
    ) -> Option<Token> {
        if let Some(token) = self.adopt_if_newer(store, found, previous) {
            return Some(token);
        }
        let stands = found.as_ref().is_none_or(|found| self.state().known.is_newer_than(found));
        let token = self.untaken(previous).filter(|_| stands)?;
        self.store_again(found);
        Some(token)
    }

    /// Uses the token of a record, if it is newer than `previous` and has not expired.
    pub(super) fn adopt_if_newer(
        self: &Arc<Self>,
        store: &StoreAccess,
        found: &Option<Known>,
        previous: Option<&Token>,
    ) -> Option<Token> {
        let found = found.as_ref()?;
        let token = found.token.clone().filter(|token| !token.is_expired(Instant::now() + LEAST_LIFE))?;
        let is_another = previous.is_none_or(|previous| !token.has_same_access_token(previous));
        if !is_another || !self.take_up(found, true) {
            return None;
        }
        store.adopted(found.version);
        if store.health.is_failing() {
            // A process that only adopts tokens would never learn that the store can be written again. The check goes on
            // without its future, and its operations record the result.
            drop(self.check_store());
        }
        Some(found.chain.renewable(token))
    }

    /// Continues with what a record knows, unless this process knows better. `adopts`: its token is used, so it must be one of
    /// the newest login that was given.
    pub(super) fn take_up(&self, found: &Known, adopts: bool) -> bool {
        let used = found.chain.id().unwrap_or_default();
        let reason = {
            let mut state = self.state();
            let given = state.more.as_ref().map_or(&[][..], |more| &more.pending);
            if state.known.is_newer_than(found) || (adopts && !found.chain.stands(given)) {
                return false;
            }
            // Otherwise the reason is reported when the login that was given begins.
            let mut reason = state.change(found).filter(|_| given.is_empty());
            // The same refresh token ends no outage.
            let is_same =
                found.chain.refresh_token.as_ref().is_some_and(|next| state.known.chain.is_next(next));
            let mut known = found.clone();
            // Its process did not know of the newest refresh token of the login before.
            state.is_unstored = known.renew_before(&state.known);
            state.replace(known);
            state.is_login |= found.chain.login.is_some();
            if adopts || !is_same {
                state.reset();
            }
            state.asks_again &= !adopts;
            if let Some(more) = state.more.as_mut().filter(|_| adopts) {
                let seed = std::mem::take(&mut more.pending).pop();
                reason = seed.map(|seed| if used == seed.id() { STORED } else { OLD }).or(reason);
            }
            reason
        };
        reason.into_iter().for_each(|reason| self.reporter.using_login(used, reason));
        true
    }

    /// Asks the source without the store, unless there is time left to wait for the store.
    pub(super) async fn without_store(
        self: &Arc<Self>,
        store: &StoreAccess,
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
                _ => SourceError::configuration(format!("{text}: {error}")).with_retry_after(HEALS_WITHIN),
            });
        }
        store.reporter.without_store(&error);
        asking(Asked::Source);
        let token = self.ask_and_publish(request, None).await?;
        self.publish_later(None);
        Ok(token)
    }

    /// Polls the store, as a reader, until there is a newer token, one lease length has passed, or the store has failed
    /// permanently.
    pub(super) async fn wait_for_publisher(
        self: &Arc<Self>,
        store: &StoreAccess,
        previous: Option<&Token>,
        asking: Asking<'_>,
    ) -> Result<Token, SourceError> {
        let deadline = Instant::now() + store.length;
        let mut polls = Backoff::between(POLL_BACKOFF);
        loop {
            let mut found = store.load(false, |_| Ok(())).await;
            // A reader keeps no refresh token.
            if let Ok(Some(Known { token, chain, .. })) = &mut found {
                *token = token.take().map(Token::without_refresh_token);
                *chain = Chain::default();
            }
            let usable = found.as_ref().ok().and_then(|found| self.newest(store, found, previous));
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
}

fn is_in_first_half_of_expiring(token: &Token, now: Instant) -> bool {
    let (Some(refresh_at), Some(expires_at)) = (token.refresh_at(), token.ends_at()) else { return false };
    now < refresh_at + expires_at.saturating_duration_since(refresh_at) / 2
}
