//! [`StoreAccess`]: a provider's access to its store: each operation within a time limit, the wait for a lease, and its extension.

use std::convert::Infallible;
use std::future::{Future, pending};
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::{Either, select};
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep, sleep_until, timeout};

use super::health::{Health, Operation};
use super::{DynTokenStore, Extension, Lease, Publication, Record, Role, StoreError, StoreErrorKind};
use crate::{chain::Known, observability::Reporter, retry::Backoff};

/// The time limit of one operation of a store.
const OPERATION_TIMEOUT: Duration = Duration::from_secs(2);

/// The delay between two attempts to publish a token while its callers wait, min and max.
const WAITING_BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(500));

/// The delay between two reads while another process is about to publish, min and max.
pub(crate) const POLL_BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));

/// A process that was refused the lease asks for it again after half of this time to all of it, or after an eighth to a
/// quarter of the lease's length if that is less. Until then it only reads: a fleet of thousands asks at one moment, and
/// nearly all of them get the token from the record.
const LEASE_PAUSE: Duration = Duration::from_secs(1);

/// A store that grants no lease for this many lease lengths counts as failed: it is unlikely that so many holders in a
/// row have died.
const MAX_LEASE_WAIT: u32 = 5;

pub(crate) struct StoreAccess {
    store: Arc<dyn DynTokenStore>,
    pub(crate) role: Role,
    /// The length of a lease.
    pub(crate) length: Duration,
    pub(crate) reporter: Reporter,
    pub(crate) health: Health,
    /// The total time spent waiting for a lease since the last lease or adopted token. It carries over from one
    /// refresh to the next.
    lease_wait: Mutex<Duration>,
}

/// When a process that waits for a lease reads, and when it asks for the lease.
pub(crate) struct Polls {
    pub(crate) reads: Backoff,
    pauses: Backoff,
    next_lease_at: Instant,
}

impl StoreAccess {
    pub(crate) fn new(
        store: Arc<dyn DynTokenStore>,
        role: Role,
        length: Duration,
        reporter: Reporter,
    ) -> Self {
        let health = Health::new(reporter.clone());
        Self { store, role, length, health, reporter, lease_wait: Mutex::default() }
    }

    /// Returns what the record knows, if that passes `check`. `is_login`: whether its refresh token is needed. Otherwise a
    /// record that cannot be read counts as none.
    pub(crate) async fn load(
        &self,
        is_login: bool,
        check: impl FnOnce(&Known) -> Result<(), StoreError>,
    ) -> Result<Option<Known>, StoreError> {
        let loaded_at = Instant::now();
        let found = with_limit(OPERATION_TIMEOUT, self.store.load()).await;
        let found = found.and_then(|record| record.map(|record| record.known(loaded_at)).transpose());
        let found = found.and_then(|found| found.as_ref().map_or(Ok(()), check).map(|()| found));
        match &found {
            Err(error) if error.kind() == StoreErrorKind::InvalidRecord && !is_login => {
                self.health.succeeded(Operation::Load);
                self.reporter.invalid_record(error, self.health.record_is_valid(false));
                return Ok(None);
            }
            Err(error) => self.health.failed(Operation::Load, error),
            Ok(found) => {
                self.health.succeeded(Operation::Load);
                if found.is_some() {
                    self.health.record_is_valid(true);
                }
            }
        }
        found
    }

    /// Records that a token of another process is used.
    pub(crate) fn adopted(&self, version: u64) {
        self.health.nothing_to_publish();
        self.reset_lease_wait();
        self.reporter.adopted(version);
    }

    pub(crate) fn polls(&self) -> Polls {
        let pause = LEASE_PAUSE.min(self.length / 4);
        Polls {
            reads: Backoff::between(POLL_BACKOFF),
            pauses: Backoff::between((pause / 2, pause)),
            next_lease_at: Instant::now(),
        }
    }

    /// Asks for the lease, or waits until the next read. Fails if it was waited for too long.
    pub(crate) async fn lease_or_wait(
        &self,
        polls: &mut Polls,
        waited: &mut Duration,
    ) -> Result<Option<Lease>, StoreError> {
        // After the read: the wait has not been too long if it has brought the token.
        self.record_lease_wait(std::mem::take(waited))?;
        let asked_at = Instant::now();
        if asked_at >= polls.next_lease_at {
            if let Some(lease) = self.lease().await? {
                return Ok(Some(lease));
            }
            polls.next_lease_at = Instant::now() + polls.pauses.next_delay();
        }
        self.reporter.waiting_for_lease();
        *waited = polls.reads.next_delay().min(polls.next_lease_at.saturating_duration_since(Instant::now()));
        sleep(*waited).await;
        Ok(None)
    }

    /// Adds to the time spent waiting for a lease.
    ///
    /// Fails if the sum exceeds its limit. The sum then starts again, so that the next refresh tries the store again.
    pub(crate) fn record_lease_wait(&self, wait: Duration) -> Result<(), StoreError> {
        let max = self.length * MAX_LEASE_WAIT;
        {
            let mut waited = self.lease_wait.lock().unwrap_or_else(PoisonError::into_inner);
            *waited += wait;
            if *waited <= max {
                return Ok(());
            }
            *waited = Duration::ZERO;
        }
        let error = StoreError::unavailable(format!("timed out waiting for the lease after {max:?}"));
        self.health.failed(Operation::Wait, &error);
        Err(error)
    }

    /// Resets the time spent waiting, after a lease or a newer token was obtained.
    pub(crate) fn reset_lease_wait(&self) {
        *self.lease_wait.lock().unwrap_or_else(PoisonError::into_inner) = Duration::ZERO;
        self.health.succeeded(Operation::Wait);
    }

    pub(crate) async fn lease(&self) -> Result<Option<Lease>, StoreError> {
        let leased = with_limit(OPERATION_TIMEOUT, self.store.lease(self.length)).await;
        // That another process has it does not show that the store can be written.
        if !matches!(leased, Ok(None)) {
            self.health.record(Operation::Lease, &leased);
        }
        leased
    }

    /// Checks that the store can be read, and written unless this is a reader. A publication that has failed is repeated
    /// in the background, and fails the check until it succeeds.
    pub(crate) async fn check(
        &self,
        is_login: bool,
        check: impl FnOnce(&Known) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        self.load(is_login, check).await?;
        if self.role != Role::Reader {
            if let Some(lease) = self.lease().await? {
                self.reset_lease_wait();
                self.release(lease).await;
            }
        }
        self.health.status().error.map_or(Ok(()), Err)
    }

    /// Does `future`, and extends the lease meanwhile.
    ///
    /// Both run in one task, so that the lease is extended only while that runs. A refresh that was dropped, or whose
    /// process was killed or stopped, extends nothing.
    pub(crate) async fn extending<T>(&self, lease: &Lease, future: impl Future<Output = T>) -> T {
        match select(pin!(future), pin!(self.keep_extending(lease))).await {
            Either::Left((output, _)) => output,
            Either::Right((never, _)) => match never {},
        }
    }

    /// Extends the lease every third of its length until dropped. If one attempt fails, the next one still comes before
    /// the lease ends.
    async fn keep_extending(&self, lease: &Lease) -> Infallible {
        let third = self.length / 3;
        // An attempt that hangs must not delay the next one.
        let max = third.min(OPERATION_TIMEOUT);
        let mut thirds = interval_at(Instant::now() + third, third);
        thirds.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            thirds.tick().await;
            match with_limit(max, self.store.extend(lease, self.length)).await {
                Ok(Extension::Extended) => self.health.succeeded(Operation::Lease),
                Err(error) => self.health.failed(Operation::Lease, &error),
                // The source is still asked: the fence protects what is published.
                Ok(Extension::Expired | Extension::Unsupported) => pending().await,
            }
        }
    }

    pub(crate) async fn publish(&self, known: &Known, lease: &Lease) -> Result<Publication, StoreError> {
        let record = Record::of(known, lease.fence());
        let published = with_limit(OPERATION_TIMEOUT, self.store.publish(lease, record)).await;
        match &published {
            Ok(Publication::Stored) => {
                self.health.succeeded(Operation::Publish);
                match known.chain.is_presented() {
                    true => self.reporter.marked(lease.fence()),
                    false => self.reporter.stored(lease.fence()),
                }
            }
            Ok(Publication::Superseded) => {}
            Err(error) => self.health.failed(Operation::Publish, error),
        }
        published
    }

    /// Does [`publish`](Self::publish), and tries again for one lease length if the store fails. The lease is extended
    /// meanwhile.
    pub(crate) async fn publish_for_a_lease(
        &self,
        known: &Known,
        lease: &Lease,
    ) -> Result<Publication, StoreError> {
        let deadline = Instant::now() + self.length;
        let mut delays = Backoff::between(WAITING_BACKOFF);
        let publish = async {
            loop {
                let published = self.publish(known, lease).await;
                let next = Instant::now() + delays.next_delay();
                if published.is_ok() || next > deadline {
                    return published;
                }
                sleep_until(next).await;
            }
        };
        self.extending(lease, publish).await
    }

    /// Releases the lease. A failure is only recorded, because the lease then ends by itself.
    pub(crate) async fn release(&self, lease: Lease) {
        let released = with_limit(OPERATION_TIMEOUT, self.store.release(lease)).await;
        match released {
            // It says nothing of the store.
            Err(error) if error.kind() == StoreErrorKind::InvalidRecord => {
                self.health.succeeded(Operation::Release);
            }
            released => self.health.record(Operation::Release, &released),
        }
    }
}

async fn with_limit<T>(
    limit: Duration,
    operation: impl Future<Output = Result<T, StoreError>>,
) -> Result<T, StoreError> {
    timeout(limit, operation).await.unwrap_or_else(|_| {
        Err(StoreError::unavailable(format!("the token store did not respond within {limit:?}")))
    })
}
