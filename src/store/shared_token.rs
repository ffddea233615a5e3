//! [`SharedToken`]: the token as the store has it, and the one that the store is still to have.

use std::{
    convert::Infallible,
    future::{Future, pending},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    task::JoinHandle,
    time::{Instant, MissedTickBehavior, interval_at, sleep, timeout},
};

use super::{DynTokenStore, Extension, Lease, Publication, Record};
use crate::{
    error::StoreError,
    observability::{self, Reporter},
    retry::{Backoff, RetryPolicy},
    token::{LEAST_LIFE, Token},
};

/// The most that one operation of a store may take.
const OPERATION: Duration = Duration::from_secs(2);

/// Between two attempts to publish what could not be published at once.
const PUBLISH_AGAIN: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(30));

/// A store that has had no lease to give for as long as so many of them last does not do what it has to: it is not
/// likely that so many holders in a row have died.
const PATIENCE: u32 = 5;

pub(super) struct SharedToken {
    store: Arc<dyn DynTokenStore>,
    pub(super) lease: Duration,
    pub(super) reporter: Reporter,
    unpublished: Mutex<Unpublished>,
    /// How long a lease has been waited for in vain, from one refresh to the next.
    waited: Mutex<Duration>,
}

#[derive(Default)]
struct Unpublished {
    /// The token that the store should have, and does not have yet. Never an older one than was given to the provider.
    token: Option<Token>,
    /// When the newest token was asked for, or adopted.
    newest: Option<Instant>,
    /// Tries to publish it.
    task: Option<JoinHandle<()>>,
}

impl SharedToken {
    pub(super) fn new(store: Arc<dyn DynTokenStore>, lease: Duration, reporter: Reporter) -> Self {
        Self { store, lease, reporter, unpublished: Mutex::default(), waited: Mutex::default() }
    }

    fn unpublished(&self) -> MutexGuard<'_, Unpublished> {
        self.unpublished.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The token of a refresh whose time was up before it could be handed over.
    pub(super) fn unpublished_token(self: &Arc<Self>, previous: Option<&Token>) -> Option<Token> {
        let unpublished = self.unpublished().token.clone()?;
        let is_another = previous.is_none_or(|previous| !previous.has_same_access_token(&unpublished));
        let works = !unpublished.0.is_expired(Instant::now() + LEAST_LIFE);
        (is_another && works).then(|| {
            self.publish_later();
            unpublished
        })
    }

    /// The token that is stored; one that cannot be read counts as none.
    pub(super) async fn load(&self) -> Result<Option<Token>, StoreError> {
        let loaded_at = Instant::now();
        let found = match within(self.store.load()).await {
            Ok(None) => return Ok(None),
            Ok(Some(record)) => record.token(loaded_at),
            Err(error) => Err(error),
        };
        match found {
            Ok(token) => Ok(Some(token)),
            Err(error @ StoreError::InvalidRecord(_)) => {
                self.reporter.invalid_record(&error);
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// The token that is stored, if it may be adopted in the place of `previous`.
    pub(super) async fn newer(&self, previous: Option<&Token>) -> Result<Option<Token>, StoreError> {
        Ok(usable(&self.load().await?, previous))
    }

    pub(super) fn adopt(&self, token: Token) -> Token {
        {
            let mut unpublished = self.unpublished();
            (unpublished.token, unpublished.newest) = (None, Some(Instant::now()));
        }
        self.forget_waiting();
        self.reporter.adopted(token.recorded());
        token
    }

    /// A refresh that was abandoned may come to this after its successor: it asked for its token before that did.
    pub(super) fn keep(&self, token: &Token, asked_at: Instant) {
        let mut unpublished = self.unpublished();
        if unpublished.newest <= Some(asked_at) {
            (unpublished.token, unpublished.newest) = (Some(token.clone()), Some(asked_at));
        }
    }

    /// A lease has been waited for in vain; fails if that has been so for too long.
    pub(super) fn record_lease_wait(&self, wait: Duration) -> Result<(), StoreError> {
        let mut waited = self.waited();
        *waited += wait;
        let most = self.lease * PATIENCE;
        if *waited <= most {
            return Ok(());
        }
        *waited = Duration::ZERO;
        Err(StoreError::unavailable(format!("no lease was to be had within {most:?}")))
    }

    /// There was a lease, or a newer token.
    pub(super) fn forget_waiting(&self) {
        *self.waited() = Duration::ZERO;
    }

    fn waited(&self) -> MutexGuard<'_, Duration> {
        self.waited.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) async fn lease(&self) -> Result<Option<Lease>, StoreError> {
        within(self.store.lease(self.lease)).await
    }

    /// Extends the lease every third of its length, until this is dropped. After one attempt that fails, the next comes
    /// before the lease ends.
    pub(super) async fn keep_lease(&self, lease: &Lease) -> Infallible {
        let third = self.lease / 3;
        let most = third.min(OPERATION);
        let mut thirds = interval_at(Instant::now() + third, third);
        thirds.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            thirds.tick().await;
            // An attempt that hangs takes no more than the time until the next.
            match timeout(most, self.store.extend(lease, self.lease)).await {
                Ok(Ok(Extension::Extended) | Err(_)) | Err(_) => {}
                // The fence still protects what is published.
                Ok(Ok(Extension::Expired | Extension::Unsupported)) => pending().await,
            }
        }
    }

    pub(super) async fn publish(&self, token: &Token, lease: &Lease) -> Result<Publication, StoreError> {
        within(self.store.publish(lease, Record::of(token, lease.fence()))).await
    }

    /// The token is stored under this fence.
    pub(super) fn published(&self, token: Token, fence: u64) -> Token {
        self.reporter.stored(fence);
        self.forget(&token);
        token.recorded_as(fence)
    }

    /// There is no need to publish `token` any more; another may have been obtained meanwhile.
    fn forget(&self, token: &Token) {
        self.unpublished().token.take_if(|unpublished| unpublished.has_same_access_token(token));
    }

    /// Nobody waits for it: a lease that is not given back ends by itself.
    pub(super) async fn release(&self, lease: Lease) {
        let _ = within(self.store.release(lease)).await;
    }

    /// As [`release`](Self::release), where somebody waits for something else, and the store has just failed.
    pub(super) fn release_behind(self: &Arc<Self>, lease: Lease) {
        let shared = Arc::clone(self);
        tokio::spawn(async move { shared.release(lease).await });
    }

    /// Sees to it that what is unpublished will be, by a task that ends with the provider.
    pub(super) fn publish_later(self: &Arc<Self>) {
        let mut unpublished = self.unpublished();
        if unpublished.task.as_ref().is_some_and(|task| !task.is_finished()) {
            return;
        }
        let shared = Arc::downgrade(self);
        let publish = async move {
            let mut publish_again = backoff(PUBLISH_AGAIN);
            loop {
                sleep(publish_again.next_delay()).await;
                let Some(shared) = shared.upgrade() else { return };
                let token = {
                    let mut unpublished = shared.unpublished();
                    let Some(token) = unpublished.token.clone() else {
                        // Under the lock: what comes to be unpublished later gets a task of its own.
                        unpublished.task = None;
                        return;
                    };
                    token
                };
                if let Err(error) = shared.publish_again(token).await {
                    shared.reporter.not_stored(&error);
                }
            }
        };
        unpublished.task = Some(tokio::spawn(observability::within(observability::current_span(), publish)));
    }

    /// Publishes `token`, unless a newer record is there, or another has the lease.
    async fn publish_again(&self, token: Token) -> Result<(), StoreError> {
        let Some(lease) = self.lease().await? else { return Ok(()) };
        let published = self.publish_under(&lease, token).await;
        self.release(lease).await;
        published
    }

    async fn publish_under(&self, lease: &Lease, token: Token) -> Result<(), StoreError> {
        match self.load().await? {
            // Another's, or this one, written when it seemed not to be.
            Some(found) if found.recorded() > token.recorded() => self.forget(&token),
            _ => {
                if self.publish(&token, lease).await? == Publication::Stored {
                    self.published(token, lease.fence());
                }
            }
        }
        Ok(())
    }
}

/// Whether `found` was published after `previous`.
pub(super) fn is_newer(found: &Token, previous: Option<&Token>) -> bool {
    previous.is_none_or(|previous| {
        found.recorded() > previous.recorded() && !found.has_same_access_token(previous)
    })
}

/// `found`, if it is newer than `previous` and has not expired.
pub(super) fn usable(found: &Option<Token>, previous: Option<&Token>) -> Option<Token> {
    let usable =
        |found: &&Token| is_newer(found, previous) && !found.0.is_expired(Instant::now() + LEAST_LIFE);
    found.as_ref().filter(usable).cloned()
}

pub(super) fn backoff((min, max): (Duration, Duration)) -> Backoff {
    // Both are in range.
    RetryPolicy::new().backoff(min, max).make_backoff()
}

/// One operation of a store, within its time.
async fn within<T>(operation: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
    timeout(OPERATION, operation).await.unwrap_or_else(|_| {
        Err(StoreError::unavailable(format!("the token store took longer than {OPERATION:?}")))
    })
}
