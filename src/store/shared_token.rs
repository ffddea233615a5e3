//! [`SharedToken`]: a provider's access to its store. It limits the time of each operation, and later publishes a token
//! that could not be stored.

use std::{
    convert::Infallible,
    future::{Future, pending},
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::future::{Either, select};
use tokio::{
    task::JoinHandle,
    time::{Instant, MissedTickBehavior, interval_at, sleep, sleep_until, timeout},
};

use super::{
    DynTokenStore, Extension, Lease, Publication, Record, Role, StoreError, StoreErrorKind,
    health::{Health, Operation},
};
use crate::{
    error::SourceError,
    observability::{self, Reporter},
    retry::Backoff,
    token::{LEAST_LIFE, Token},
};

/// The time limit of one operation of a store.
const OPERATION_TIMEOUT: Duration = Duration::from_secs(2);

/// The delay between two attempts to publish a token later, min and max.
const PUBLISH_BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(30));

/// The delay between two attempts to publish a token while its callers wait, min and max.
const WAITING_BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(500));

/// A store that grants no lease for this many lease lengths counts as failed: it is unlikely that so many holders in a
/// row have died.
const MAX_LEASE_WAIT: u32 = 5;

/// Neither lock is held while the other is taken, or across an await: no order between them is needed, and the provider
/// never waits for the store while it waits for a lock.
pub(super) struct SharedToken {
    store: Arc<dyn DynTokenStore>,
    pub(super) role: Role,
    /// Whether the source must not be asked while the store fails.
    pub(super) is_needed: bool,
    pub(super) lease: Duration,
    pub(super) reporter: Reporter,
    pub(super) health: Health,
    unpublished: Mutex<Unpublished>,
    /// The total time spent waiting for a lease since the last lease or adopted token. It carries over from one
    /// refresh to the next.
    lease_wait: Mutex<Duration>,
}

#[derive(Default)]
struct Unpublished {
    /// The token that still has to be stored. Never older than the token that the provider got last.
    token: Option<Token>,
    /// When the newest token was requested or adopted.
    newest: Option<Instant>,
    /// The version of the record that this process stored last. A token that is stored later has it, but the provider's
    /// copy does not.
    stored_version: u64,
    /// The task that publishes it. `None`, or finished, if there is none.
    task: Option<JoinHandle<()>>,
}

impl SharedToken {
    pub(super) fn new(
        store: Arc<dyn DynTokenStore>,
        role: Role,
        is_needed: bool,
        lease: Duration,
        reporter: Reporter,
    ) -> Self {
        Self {
            store,
            role,
            is_needed,
            lease,
            health: Health::new(reporter.clone()),
            reporter,
            unpublished: Mutex::default(),
            lease_wait: Mutex::default(),
        }
    }

    fn unpublished(&self) -> MutexGuard<'_, Unpublished> {
        self.unpublished.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lease_wait(&self) -> MutexGuard<'_, Duration> {
        self.lease_wait.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the token of a refresh that timed out before the provider got its token.
    pub(super) fn unpublished_token(self: &Arc<Self>, previous: Option<&Token>) -> Option<Token> {
        let unpublished = self.unpublished().token.clone()?;
        let is_another = previous.is_none_or(|previous| !previous.has_same_access_token(&unpublished));
        let works = !unpublished.0.is_expired(Instant::now() + LEAST_LIFE);
        (is_another && works).then(|| {
            self.publish_later();
            unpublished
        })
    }

    /// Returns the stored token. A record that cannot be read counts as none, unless its refresh token is needed.
    pub(super) async fn load(&self) -> Result<Option<Token>, StoreError> {
        let loaded_at = Instant::now();
        let found = with_timeout(self.store.load()).await;
        let found = found.and_then(|record| record.map(|record| record.token(loaded_at)).transpose());
        match &found {
            Err(error) if error.kind() == StoreErrorKind::InvalidRecord && !self.is_needed => {
                self.health.succeeded(Operation::Load);
                let is_news = self.health.record_is_valid(false);
                self.reporter.invalid_record(error, is_news);
                return Ok(None);
            }
            Err(error) => self.health.failed(Operation::Load, error),
            Ok(token) => {
                self.health.succeeded(Operation::Load);
                if token.is_some() {
                    self.health.record_is_valid(true);
                }
            }
        }
        found
    }

    /// Returns the stored token, if it can be adopted in place of `previous`.
    pub(super) async fn newer(&self, previous: Option<&Token>) -> Result<Option<Token>, StoreError> {
        Ok(usable(&self.load().await?, previous))
    }

    /// During an outage, a process that only adopts tokens would never learn that the store can be written again: it is
    /// checked in the background.
    pub(super) fn adopt(self: &Arc<Self>, token: Token) -> Token {
        {
            let mut unpublished = self.unpublished();
            (unpublished.token, unpublished.newest) = (None, Some(Instant::now()));
        }
        self.health.nothing_to_publish();
        self.reset_lease_wait();
        if self.health.is_failing() {
            let shared = Arc::clone(self);
            // The operations record its result.
            let check = async move { _ = shared.check().await };
            tokio::spawn(observability::within(observability::current_span(), check));
        }
        self.reporter.adopted(token.record_version());
        token
    }

    /// Remembers `token`, requested at `requested_at`, as unpublished.
    ///
    /// An abandoned refresh may call this after its successor did. Its token is older and must not replace the newer
    /// one.
    pub(super) fn set_unpublished(&self, token: &Token, requested_at: Instant) {
        let mut unpublished = self.unpublished();
        if unpublished.newest <= Some(requested_at) {
            (unpublished.token, unpublished.newest) = (Some(token.clone()), Some(requested_at));
        }
    }

    /// Adds to the time spent waiting for a lease.
    ///
    /// Fails if the sum exceeds its limit. The sum then starts again, so that the next refresh tries the store again.
    pub(super) fn record_lease_wait(&self, wait: Duration) -> Result<(), StoreError> {
        let mut waited = self.lease_wait();
        *waited += wait;
        let max = self.lease * MAX_LEASE_WAIT;
        if *waited <= max {
            return Ok(());
        }
        *waited = Duration::ZERO;
        drop(waited);
        let error = StoreError::unavailable(format!("timed out waiting for the lease after {max:?}"));
        self.health.failed(Operation::Wait, &error);
        Err(error)
    }

    /// Resets the time spent waiting, after a lease or a newer token was obtained.
    pub(super) fn reset_lease_wait(&self) {
        *self.lease_wait() = Duration::ZERO;
        self.health.succeeded(Operation::Wait);
    }

    pub(super) async fn lease(&self) -> Result<Option<Lease>, StoreError> {
        let leased = with_timeout(self.store.lease(self.lease)).await;
        match &leased {
            Ok(Some(_)) => self.health.succeeded(Operation::Lease),
            // Another process has it, which does not show that the store can be written.
            Ok(None) => {}
            Err(error) => self.health.failed(Operation::Lease, error),
        }
        leased
    }

    /// Checks that the store can be read, and written unless this is a reader. A publication that has failed is repeated
    /// in the background, and fails the check until it succeeds.
    pub(super) async fn check(&self) -> Result<(), StoreError> {
        self.load().await?;
        if self.role != Role::Reader {
            if let Some(lease) = self.lease().await? {
                self.reset_lease_wait();
                self.release(lease).await;
            }
        }
        match self.health.outage() {
            Some((_, error)) => Err(error),
            None => Ok(()),
        }
    }

    /// Does `future`, and extends the lease meanwhile.
    ///
    /// Both run in one task, so that the lease is extended only while that runs. A refresh that was dropped, or whose
    /// process was killed or stopped, extends nothing.
    pub(super) async fn extending<T>(&self, lease: &Lease, future: impl Future<Output = T>) -> T {
        match select(pin!(future), pin!(self.keep_extending(lease))).await {
            Either::Left((output, _)) => output,
            Either::Right((never, _)) => match never {},
        }
    }

    /// Extends the lease every third of its length until dropped. If one attempt fails, the next one still comes before
    /// the lease ends.
    async fn keep_extending(&self, lease: &Lease) -> Infallible {
        let third = self.lease / 3;
        // An attempt that hangs must not delay the next one.
        let max = third.min(OPERATION_TIMEOUT);
        let mut thirds = interval_at(Instant::now() + third, third);
        thirds.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            thirds.tick().await;
            match with_limit(max, self.store.extend(lease, self.lease)).await {
                Ok(Extension::Extended) => self.health.succeeded(Operation::Lease),
                Err(error) => self.health.failed(Operation::Lease, &error),
                // The source is still asked: the fence protects what is published.
                Ok(Extension::Expired | Extension::Unsupported) => pending().await,
            }
        }
    }

    pub(super) async fn publish(&self, token: &Token, lease: &Lease) -> Result<Publication, StoreError> {
        let published = with_timeout(self.store.publish(lease, Record::of(token, lease.fence()))).await;
        match &published {
            Ok(Publication::Stored) => self.health.succeeded(Operation::Publish),
            Ok(Publication::Superseded) => {}
            Err(error) => self.health.failed(Operation::Publish, error),
        }
        published
    }

    /// Does [`publish`](Self::publish), and tries again for one lease length if the store fails. The lease is extended
    /// meanwhile.
    pub(super) async fn publish_for_a_lease(
        &self,
        token: &Token,
        lease: &Lease,
    ) -> Result<Publication, StoreError> {
        let deadline = Instant::now() + self.lease;
        let mut delays = Backoff::between(WAITING_BACKOFF);
        let publish = async {
            loop {
                let published = self.publish(token, lease).await;
                let next = Instant::now() + delays.next_delay();
                if published.is_ok() || next > deadline {
                    return published;
                }
                sleep_until(next).await;
            }
        };
        self.extending(lease, publish).await
    }

    /// Publishes `token` in the background until it is stored, and keeps the lease until then: a process that got it would
    /// present the spent refresh token.
    pub(super) fn keep_publishing(self: &Arc<Self>, token: Token, lease: Lease) {
        let shared = Arc::downgrade(self);
        let publish = async move {
            while let Some(shared) = shared.upgrade() {
                match shared.publish_for_a_lease(&token, &lease).await {
                    Ok(Publication::Stored) => {
                        shared.published(token, lease.fence());
                        return shared.release(lease).await;
                    }
                    Ok(Publication::Superseded) => return shared.publish_later(),
                    Err(error) => shared.reporter.not_stored(&error),
                }
            }
        };
        tokio::spawn(observability::within(observability::current_span(), publish));
    }

    /// Stores the refresh token of a login, before it is presented: another process can then continue with it.
    pub(super) async fn store_seed(&self, seed: &Token, lease: &Lease) -> Result<(), SourceError> {
        match self.publish(seed, lease).await {
            Ok(Publication::Stored) => {
                // Otherwise a token that is stored later would take this record for a newer token of another process.
                self.unpublished().stored_version = lease.fence();
                Ok(())
            }
            Ok(Publication::Superseded) => Err(SourceError::unavailable(
                "another process has taken over the refresh, before the refresh token was presented",
            )),
            Err(error) => Err(error.into_source_error("the refresh token of the login cannot be stored")),
        }
    }

    /// Notes that the token is stored with this fence as its version.
    pub(super) fn published(&self, token: Token, fence: u64) -> Token {
        self.reporter.stored(fence);
        self.unpublished().stored_version = fence;
        self.remove_unpublished(&token);
        token.with_record_version(fence)
    }

    /// Whether there is a token that the store has not taken yet.
    pub(super) fn has_unpublished(&self) -> bool {
        self.unpublished().token.is_some()
    }

    /// Removes `token` from the unpublished ones. A refresh may have put another there meanwhile, which stays.
    fn remove_unpublished(&self, token: &Token) {
        self.unpublished().token.take_if(|unpublished| unpublished.has_same_access_token(token));
    }

    /// Releases the lease. A failure is only recorded, because the lease then ends by itself.
    pub(super) async fn release(&self, lease: Lease) {
        let released = with_timeout(self.store.release(lease)).await;
        self.health.record(Operation::Release, &released);
    }

    /// Releases the lease in the background, so that callers do not wait for a store that has just failed.
    pub(super) fn release_in_background(self: &Arc<Self>, lease: Lease) {
        let shared = Arc::clone(self);
        tokio::spawn(async move { shared.release(lease).await });
    }

    /// Starts a task that publishes the unpublished token, if none is running. The task ends with the provider.
    pub(super) fn publish_later(self: &Arc<Self>) {
        // Held until the new task is stored, otherwise two callers could each start one.
        let mut unpublished = self.unpublished();
        if unpublished.task.as_ref().is_some_and(|task| !task.is_finished()) {
            return;
        }
        let shared = Arc::downgrade(self);
        let publish = async move {
            let mut delays = Backoff::between(PUBLISH_BACKOFF);
            loop {
                sleep(delays.next_delay()).await;
                let Some(shared) = shared.upgrade() else { return };
                let token = {
                    let mut unpublished = shared.unpublished();
                    let Some(token) = unpublished.token.clone() else {
                        // In the same critical section as the check. Otherwise `publish_later` could find this task
                        // running after it has decided to end, and a token set in between would never be published.
                        unpublished.task = None;
                        return;
                    };
                    token
                };
                if let Err(error) = shared.publish_unless_newer(token).await {
                    shared.reporter.not_stored(&error);
                }
            }
        };
        unpublished.task = Some(tokio::spawn(observability::within(observability::current_span(), publish)));
    }

    /// Publishes `token`, unless there is a newer record or another process has the lease.
    async fn publish_unless_newer(&self, token: Token) -> Result<(), StoreError> {
        let Some(lease) = self.lease().await? else { return Ok(()) };
        let published = self.publish_under(&lease, token).await;
        self.release(lease).await;
        published
    }

    async fn publish_under(&self, lease: &Lease, token: Token) -> Result<(), StoreError> {
        let known = self.unpublished().stored_version.max(token.record_version());
        match self.load().await? {
            // Another process's token, or this one if an earlier attempt succeeded but reported an error.
            Some(found) if found.record_version() > known && !is_before(&found, &token) => {
                self.remove_unpublished(&token);
                if self.unpublished().token.is_none() {
                    self.health.nothing_to_publish();
                }
            }
            _ => {
                if self.publish(&token, lease).await? == Publication::Stored {
                    self.published(token, lease.fence());
                }
            }
        }
        Ok(())
    }
}

/// Whether `found` has only a refresh token of the login of `token`, which was granted for it or for a later one.
fn is_before(found: &Token, token: &Token) -> bool {
    found.access_token().is_empty() && found.login().is_some() && found.login() == token.login()
}

/// Returns whether `found` was published after `previous`.
fn is_newer(found: &Token, previous: Option<&Token>) -> bool {
    previous.is_none_or(|previous| {
        found.record_version() > previous.record_version() && !found.has_same_access_token(previous)
    })
}

/// Returns `found`, if it is newer than `previous` and has not expired.
pub(super) fn usable(found: &Option<Token>, previous: Option<&Token>) -> Option<Token> {
    let usable =
        |found: &&Token| is_newer(found, previous) && !found.0.is_expired(Instant::now() + LEAST_LIFE);
    found.as_ref().filter(usable).cloned()
}

/// Applies [`OPERATION_TIMEOUT`] to one operation of a store.
async fn with_timeout<T>(operation: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
    with_limit(OPERATION_TIMEOUT, operation).await
}

async fn with_limit<T>(
    limit: Duration,
    operation: impl Future<Output = Result<T, StoreError>>,
) -> Result<T, StoreError> {
    timeout(limit, operation).await.unwrap_or_else(|_| {
        Err(StoreError::unavailable(format!("the token store did not respond within {limit:?}")))
    })
}
