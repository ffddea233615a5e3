//! What is stored, when: under the lease of an exchange, or later in the background.
//!
//! | function | publishes | lease |
//! |---|---|---|
//! | [`Login::ask_and_publish`] | what an exchange has changed | that of the exchange |
//! | [`Login::publish_under`] | what is known; for a login for one lease length | a given one |
//! | [`Login::publish_unless_newer`] | what is known, unless the store has something newer | one that it takes |
//! | [`Login::publish_later`] | what is known, in a task, until the store has it | a given one, then new ones |

use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::time::sleep;

use super::Login;
use crate::chain::Known;
use crate::error::{SourceError, StoreError};
use crate::observability;
use crate::retry::Backoff;
use crate::source::TokenRequest;
use crate::store::{Lease, Publication, StoreAccess};
use crate::token::Token;

/// The delay between two attempts to publish a token later, min and max.
const PUBLISH_BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(3));

impl Login {
    /// Asks the source, and stores what that changes.
    pub(super) async fn ask_and_publish(
        self: &Arc<Self>,
        request: &TokenRequest<'_>,
        lease: Option<Lease>,
    ) -> Result<Token, SourceError> {
        let (Some(store), Some(lease)) = (&self.store, lease) else { return self.ask(request, None).await };
        let answer = store.extending(&lease, self.ask(request, Some((store, &lease)))).await;
        if !self.state().is_unstored {
            store.release(lease).await;
            return answer;
        }
        match self.publish_under(store, lease).await {
            Ok(Publication::Stored) => {}
            Ok(Publication::Superseded) => {
                store.reporter.superseded();
                // If the newer lease's token is stored already, only its refresh token still works.
                let found = self.load(store).await.unwrap_or_default();
                if let Some(token) = self.adopt_if_newer(store, &found, answer.as_ref().ok()) {
                    return Ok(token);
                }
                self.publish_later(None);
            }
            Err((error, lease)) => {
                store.reporter.not_stored(&error);
                // A process that got the lease of a login would present the refresh token that is spent.
                let (kept, released) =
                    if self.is_login() { (Some(lease), None) } else { (None, Some(lease)) };
                self.release_later(released);
                self.publish_later(kept);
            }
        }
        answer
    }

    /// The store has lost what this process knows, if its record is another one.
    pub(super) fn compare_with(&self, found: &Option<Known>) {
        let mut state = self.state();
        let is_lost = match found {
            Some(found) => found.version != state.known.version,
            None => !state.is_foreign,
        };
        state.is_unstored |= is_lost && state.known.chain.login.is_some();
    }

    /// Stores what is known in the background, if the store has lost it.
    pub(super) fn store_again(self: &Arc<Self>, found: &Option<Known>) {
        self.compare_with(found);
        if self.state().is_unstored {
            self.publish_later(None);
        }
    }

    /// Records that the store has this, and so all that is known unless that has changed meanwhile.
    pub(super) fn stored(&self, stored: &Known, version: u64) {
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
    pub(super) fn publish_later(self: &Arc<Self>, lease: Option<Lease>) {
        let alive = Arc::new(());
        {
            let mut state = self.state();
            if lease.is_none() && state.more().publisher.strong_count() > 0 {
                return;
            }
            state.more().publisher = Arc::downgrade(&alive);
        }
        let (login, mut lease) = (Arc::downgrade(self), lease);
        let publish = async move {
            let _alive = alive;
            let mut delays = Backoff::between(PUBLISH_BACKOFF);
            loop {
                if lease.is_none() {
                    sleep(delays.next_delay()).await;
                }
                let Some(login) = login.upgrade() else { return };
                let Some(store) = &login.store else { return };
                {
                    let mut state = login.state();
                    if !state.is_unstored {
                        // In the same critical section as the check: otherwise `publish_later` could find this task running
                        // after it has decided to end.
                        state.more().publisher = Weak::new();
                        return;
                    }
                }
                let published = match lease.take() {
                    Some(kept) => login
                        .publish_under(store, kept)
                        .await
                        .map(drop)
                        .map_err(|(error, lease)| (error, Some(lease))),
                    None => login.publish_unless_newer(store).await.map_err(|error| (error, None)),
                };
                if let Err((error, kept)) = published {
                    store.reporter.not_stored(&error);
                    lease = kept;
                }
            }
        };
        tokio::spawn(observability::within(observability::current_span(), publish));
    }

    /// Publishes what is known under a lease, which is returned if the store fails: for a login, after a lease length.
    async fn publish_under(
        &self,
        store: &StoreAccess,
        lease: Lease,
    ) -> Result<Publication, (StoreError, Lease)> {
        let known = self.state().known.clone();
        let published = match self.is_login() {
            true => store.publish_for_a_lease(&known, &lease).await,
            false => store.publish(&known, &lease).await,
        };
        match published {
            Ok(Publication::Stored) => {
                self.stored(&known, lease.fence());
                store.release(lease).await;
                Ok(Publication::Stored)
            }
            // A newer lease exists: there is none to release.
            Ok(superseded) => Ok(superseded),
            Err(error) => Err((error, lease)),
        }
    }

    /// Publishes what is known, unless there is a newer record or another process has the lease.
    pub(super) async fn publish_unless_newer(&self, store: &StoreAccess) -> Result<(), StoreError> {
        // Without the lease at first, which a record of somebody else's login does not need.
        self.load(store).await?;
        let Some(lease) = store.lease().await? else { return Ok(()) };
        let published = async {
            let found = self.load(store).await?;
            let is_newer = found.is_some_and(|found| self.take_up(&found, false));
            let (known, is_unstored) = {
                let state = self.state();
                (state.known.clone(), state.is_unstored)
            };
            if is_newer && !is_unstored {
                store.health.nothing_to_publish();
                return Ok(());
            }
            if store.publish(&known, &lease).await? == Publication::Stored {
                self.stored(&known, lease.fence());
            }
            Ok(())
        };
        let published = published.await;
        store.release(lease).await;
        published
    }

    /// Releases the lease in the background, so that callers do not wait for a store that has just failed.
    pub(super) fn release_later(self: &Arc<Self>, lease: Option<Lease>) {
        let (login, Some(lease)) = (Arc::clone(self), lease) else { return };
        tokio::spawn(async move {
            if let Some(store) = &login.store {
                store.release(lease).await;
            }
        });
    }
}
