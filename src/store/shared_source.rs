//! [`SharedSource`]: a source that asks the store first, and what it obtains is everybody's; the protocol of
//! [`TokenStore`](super::TokenStore).

use std::{
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    task::JoinHandle,
    time::{Instant, sleep, sleep_until, timeout},
};

use super::{DynTokenStore, Lease, Publication, Record, Role};
use crate::{
    error::{SourceError, StoreError},
    observability::{self, Reporter},
    retry::{Backoff, RetryPolicy},
    scope::Scope,
    source::{DynTokenSource, Fetch, TokenSource},
    token::{LEAST_LIFE, Token},
};

/// The most that one operation of a store may take.
const OPERATION: Duration = Duration::from_secs(2);

/// Between two looks at a store in which another is about to publish, at least and at most.
const LOOK_AGAIN: (Duration, Duration) = (Duration::from_millis(25), Duration::from_millis(500));

/// Between two attempts to publish what could not be published at once.
const PUBLISH_AGAIN: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(30));

/// The source of a provider whose processes share a store.
pub(crate) struct SharedSource<T> {
    source: T,
    role: Role,
    shared: Arc<Shared>,
}

/// What outlives one fetch.
struct Shared {
    store: Arc<dyn DynTokenStore>,
    lease: Duration,
    reporter: Reporter,
    unpublished: Mutex<Unpublished>,
}

#[derive(Default)]
struct Unpublished {
    /// The token that the store should have, and does not have yet.
    token: Option<Token>,
    /// Tries to publish it.
    task: Option<JoinHandle<()>>,
}

/// Why there is no token.
enum Failure {
    Source(SourceError),
    Store(StoreError),
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl From<SourceError> for Failure {
    fn from(error: SourceError) -> Self {
        Self::Source(error)
    }
}

impl<T: TokenSource> SharedSource<T> {
    pub(crate) fn new(
        source: T,
        store: Arc<dyn DynTokenStore>,
        role: Role,
        lease: Duration,
        reporter: Reporter,
    ) -> Self {
        Self {
            source,
            role,
            shared: Arc::new(Shared { store, lease, reporter, unpublished: Mutex::default() }),
        }
    }

    async fn token(&self, previous: Option<&Token>, urgent: bool) -> Result<Token, SourceError> {
        if let Some(token) = self.shared.left_behind(previous) {
            return Ok(token);
        }
        if self.role == Role::Reader {
            return self.wait_for_publisher(previous).await;
        }
        match self.share(previous).await {
            Ok(token) => Ok(token),
            Err(Failure::Source(error)) => Err(error),
            Err(Failure::Store(error)) => self.go_alone(previous, urgent, error).await,
        }
    }

    /// Steps 1 to 7.
    async fn share(&self, previous: Option<&Token>) -> Result<Token, Failure> {
        let Shared { lease: length, reporter, .. } = &*self.shared;
        let begun = Instant::now();
        let mut look_again = backoff(LOOK_AGAIN);
        loop {
            if let Some(token) = self.shared.newer(previous).await? {
                return Ok(self.shared.adopt(token));
            }
            // No lease lasts for longer, and each that gives one back has published: this store does not do what it has to.
            if begun.elapsed() > *length * 2 {
                return Err(StoreError::unavailable(format!(
                    "no lease was to be had within {:?}",
                    *length * 2
                ))
                .into());
            }
            let asked = Instant::now();
            let Some(lease) = self.shared.lease().await? else {
                reporter.waiting_for_lease();
                sleep(look_again.next_delay()).await;
                continue;
            };
            let found = match self.shared.load().await {
                Ok(found) => found,
                Err(error) => {
                    self.shared.release_behind(lease);
                    return Err(error.into());
                }
            };
            if let Some(token) = usable(&found, previous) {
                self.shared.release(lease).await;
                return Ok(self.shared.adopt(token));
            }
            if asked.elapsed() > *length / 2 {
                self.shared.release(lease).await;
                continue;
            }
            // Whatever has become of its access token, the newest record has the refresh token that counts.
            let base = found.filter(|found| is_newer(found, previous));
            return self.renew(base.as_ref().or(previous), lease).await;
        }
    }

    /// Steps 5 to 7.
    async fn renew(&self, base: Option<&Token>, lease: Lease) -> Result<Token, Failure> {
        let token = match self.ask(base).await {
            Ok(Asked::Given(token)) => token,
            Ok(Asked::Found(token)) => {
                self.shared.release(lease).await;
                return Ok(self.shared.adopt(token));
            }
            Err(error) => {
                self.shared.release(lease).await;
                return Err(error.into());
            }
        };
        // Kept before the first await: this flight's time may be up at any of them.
        let token = token.recorded_as(base.map_or(0, Token::recorded));
        self.shared.keep(&token);
        match self.shared.publish(&token, &lease).await {
            Ok(Publication::Stored) => {
                let token = self.shared.published(token, lease.fence());
                self.shared.release(lease).await;
                Ok(token)
            }
            Ok(Publication::Superseded) => {
                self.shared.reporter.superseded();
                // The newer lease's token is the one whose refresh token lives, if it is there already.
                if let Ok(Some(newer)) = self.shared.newer(Some(&token)).await {
                    return Ok(self.shared.adopt(newer));
                }
                self.shared.publish_later();
                Ok(token)
            }
            Err(error) => {
                self.shared.reporter.not_stored(&error);
                self.shared.release_behind(lease);
                self.shared.publish_later();
                Ok(token)
            }
        }
    }

    /// Asks the source, and the store again before the credential is used.
    async fn ask(&self, base: Option<&Token>) -> Result<Asked, SourceError> {
        if let Some(base) = base {
            if let Some(token) = self.source.renew(base).await? {
                return Ok(Asked::Given(token));
            }
            if let Ok(Some(token)) = self.shared.newer(Some(base)).await {
                return Ok(Asked::Found(token));
            }
        }
        self.source.fetch(None).await.map(Asked::Given)
    }

    /// Asks the source without the store, unless there is time left to wait for the store.
    async fn go_alone(
        &self,
        previous: Option<&Token>,
        urgent: bool,
        error: StoreError,
    ) -> Result<Token, SourceError> {
        if !urgent && previous.is_some_and(|token| is_in_first_half_of_ageing(token, Instant::now())) {
            return Err(SourceError::unavailable(
                "the token store cannot be used, and the token that is there still works",
            )
            .with_cause(error));
        }
        self.shared.reporter.alone(&error);
        let token = self.source.fetch(previous).await?.recorded_as(previous.map_or(0, Token::recorded));
        self.shared.keep(&token);
        self.shared.publish_later();
        Ok(token)
    }

    /// A reader's part: looks until there is a newer token, or a lease's time is over.
    async fn wait_for_publisher(&self, previous: Option<&Token>) -> Result<Token, SourceError> {
        let deadline = Instant::now() + self.shared.lease;
        let mut look_again = backoff(LOOK_AGAIN);
        loop {
            let looked = self.shared.newer(previous).await;
            if let Ok(Some(token)) = looked {
                return Ok(self.shared.adopt(token).without_refresh_token());
            }
            let next = Instant::now() + look_again.next_delay();
            if next > deadline {
                let error = SourceError::unavailable("no publisher has stored a newer token yet");
                return Err(match looked {
                    Err(cause) => error.with_cause(cause),
                    Ok(_) => error,
                });
            }
            sleep_until(next).await;
        }
    }
}

impl<T: TokenSource> DynTokenSource for SharedSource<T> {
    fn fetch<'a>(&'a self, previous: Option<&'a Token>, urgent: bool) -> Fetch<'a> {
        Box::pin(self.token(previous, urgent))
    }

    fn revision(&self) -> u64 {
        self.source.revision()
    }

    fn scope(&self) -> Scope {
        self.source.scope()
    }
}

/// What came of asking.
enum Asked {
    /// The source gave it.
    Given(Token),
    /// Another process has published it.
    Found(Token),
}

impl Shared {
    fn unpublished(&self) -> MutexGuard<'_, Unpublished> {
        self.unpublished.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The token of a flight whose time was up before it could be handed over.
    fn left_behind(self: &Arc<Self>, previous: Option<&Token>) -> Option<Token> {
        let unpublished = self.unpublished().token.clone()?;
        let is_another = previous.is_none_or(|previous| !previous.has_same_access_token(&unpublished));
        let works = !unpublished.0.is_expired(Instant::now() + LEAST_LIFE);
        (is_another && works).then(|| {
            self.publish_later();
            unpublished
        })
    }

    /// The token that is stored; one that cannot be read counts as none.
    async fn load(&self) -> Result<Option<Token>, StoreError> {
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
    async fn newer(&self, previous: Option<&Token>) -> Result<Option<Token>, StoreError> {
        Ok(usable(&self.load().await?, previous))
    }

    fn adopt(&self, token: Token) -> Token {
        self.unpublished().token = None;
        self.reporter.adopted(token.recorded());
        token
    }

    fn keep(&self, token: &Token) {
        self.unpublished().token = Some(token.clone());
    }

    async fn lease(&self) -> Result<Option<Lease>, StoreError> {
        within(self.store.lease(self.lease)).await
    }

    async fn publish(&self, token: &Token, lease: &Lease) -> Result<Publication, StoreError> {
        within(self.store.publish(lease, Record::of(token, lease.fence()))).await
    }

    /// The token is stored under this fence.
    fn published(&self, token: Token, fence: u64) -> Token {
        self.reporter.stored(fence);
        self.forget(&token);
        token.recorded_as(fence)
    }

    /// There is no need to publish `token` any more; another may have been obtained meanwhile.
    fn forget(&self, token: &Token) {
        self.unpublished().token.take_if(|unpublished| unpublished.has_same_access_token(token));
    }

    /// Nobody waits for it: a lease that is not given back ends by itself.
    async fn release(&self, lease: Lease) {
        let _ = within(self.store.release(lease)).await;
    }

    /// As [`release`](Self::release), where somebody waits for something else, and the store has just failed.
    fn release_behind(self: &Arc<Self>, lease: Lease) {
        let shared = Arc::clone(self);
        tokio::spawn(async move { shared.release(lease).await });
    }

    /// Sees to it that what is unpublished will be, by a task that ends with the provider.
    fn publish_later(self: &Arc<Self>) {
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

/// The source of those who have no credential.
pub(crate) struct NoSource;

impl TokenSource for NoSource {
    async fn fetch(&self, _: Option<&Token>) -> Result<Token, SourceError> {
        Err(SourceError::configuration(
            "a reader has no credential: give it a store, and the role of a reader",
        ))
    }
}

/// Whether `found` was published after `previous`.
fn is_newer(found: &Token, previous: Option<&Token>) -> bool {
    previous.is_none_or(|previous| {
        found.recorded() > previous.recorded() && !found.has_same_access_token(previous)
    })
}

/// `found`, if it is newer than `previous` and has not expired.
fn usable(found: &Option<Token>, previous: Option<&Token>) -> Option<Token> {
    let usable =
        |found: &&Token| is_newer(found, previous) && !found.0.is_expired(Instant::now() + LEAST_LIFE);
    found.as_ref().filter(usable).cloned()
}

fn is_in_first_half_of_ageing(token: &Token, now: Instant) -> bool {
    let (Some(ageing_at), Some(expires_at)) = (token.ageing_at(), token.expires_at()) else { return false };
    now < ageing_at + expires_at.saturating_duration_since(ageing_at) / 2
}

fn backoff((min, max): (Duration, Duration)) -> Backoff {
    // Both are in range.
    RetryPolicy::new().backoff(min, max).unwrap_or_default().make_backoff()
}

/// One operation of a store, within its time.
async fn within<T>(operation: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
    timeout(OPERATION, operation).await.unwrap_or_else(|_| {
        Err(StoreError::unavailable(format!("the token store took longer than {OPERATION:?}")))
    })
}
