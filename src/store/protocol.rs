//! [`SharedSource`]: a source that uses the store first and asks the real source only if it has to. It implements the
//! protocol of [`TokenStore`](super::TokenStore).

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, sleep, sleep_until};

use super::{
    DynTokenStore, Lease, Publication, Role, StoreError, StoreErrorKind,
    shared_token::{SharedToken, usable},
};
use crate::{
    detached::detached,
    error::SourceError,
    observability::Reporter,
    origins::AllowedOrigins,
    retry::Backoff,
    source::{
        Asked, Asking, Check, DynTokenSource, Fetch, RefreshReason, StoreOutage, TokenRequest, TokenSource,
    },
    token::Token,
};

/// The delay between two reads while another process is about to publish, min and max.
const POLL_BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));

/// A process that was refused the lease asks for it again after half of this time to all of it, or after an eighth to a
/// quarter of the lease's length if that is less. Until then it only reads: a fleet of thousands asks at one moment, and
/// nearly all of them get the token from the record.
const LEASE_PAUSE: Duration = Duration::from_secs(1);

/// The source of a provider whose processes share a store.
pub(crate) struct SharedSource<T> {
    source: Arc<T>,
    shared: Arc<SharedToken>,
}

impl<T> Clone for SharedSource<T> {
    fn clone(&self) -> Self {
        Self { source: Arc::clone(&self.source), shared: Arc::clone(&self.shared) }
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
        let shared = SharedToken::new(store, role, source.needs_store(), lease, reporter);
        Self { source: Arc::new(source), shared: Arc::new(shared) }
    }

    async fn token(&self, request: &TokenRequest<'_>, asking: Asking<'_>) -> Result<Token, SourceError> {
        let previous = request.previous();
        if let Some(token) = self.shared.unpublished_token(previous) {
            return Ok(token);
        }
        if self.shared.role == Role::Reader {
            return self.wait_for_publisher(previous, asking).await;
        }
        match self.refresh_with_store(request, asking).await {
            Ok(result) => result,
            Err(error) => self.refresh_without_store(request, asking, error).await,
        }
    }

    /// Steps 1 to 7. The outer error means that the source was not asked, because the store has failed.
    async fn refresh_with_store(
        &self,
        request: &TokenRequest<'_>,
        asking: Asking<'_>,
    ) -> Result<Result<Token, SourceError>, StoreError> {
        let previous = request.previous();
        let mut polls = Backoff::between(POLL_BACKOFF);
        let pause = LEASE_PAUSE.min(self.shared.lease / 4);
        let mut pauses = Backoff::between((pause / 2, pause));
        let mut next_lease_at = Instant::now();
        let mut waited = Duration::ZERO;
        loop {
            if let Some(token) = self.shared.newer(previous).await? {
                return Ok(Ok(self.shared.adopt(token)));
            }
            // After the read: the wait has not been too long if it has brought the token.
            self.shared.record_lease_wait(std::mem::take(&mut waited))?;
            let leased_at = Instant::now();
            let lease = if leased_at < next_lease_at { None } else { self.shared.lease().await? };
            let Some(lease) = lease else {
                self.shared.reporter.waiting_for_lease();
                let now = Instant::now();
                if next_lease_at <= leased_at {
                    next_lease_at = now + pauses.next_delay();
                }
                waited = polls.next_delay().min(next_lease_at - now);
                sleep(waited).await;
                continue;
            };
            // Under the lease: the previous holder may have published since the first read.
            let found = match self.shared.load().await {
                Ok(found) => found,
                Err(error) => {
                    self.shared.release_in_background(lease);
                    return Err(error);
                }
            };
            if let Some(token) = usable(&found, previous) {
                self.shared.release(lease).await;
                return Ok(Ok(self.shared.adopt(token)));
            }
            if leased_at.elapsed() > self.shared.lease / 2 {
                self.shared.release(lease).await;
                self.shared.record_lease_wait(leased_at.elapsed())?;
                continue;
            }
            self.shared.reset_lease_wait();
            // Even if its access token has expired, the newest record has the only refresh token that still works.
            let version = previous.map_or(0, Token::record_version);
            let base = found.filter(|found| found.record_version() > version);
            let request = request.replacing(base.as_ref().or(previous));
            asking(Asked::Source);
            if self.shared.is_needed {
                // Otherwise the lease would end while the source is still asked: another process would present the same
                // refresh token.
                let (shared, request) = (self.clone(), request.into_owned());
                let asked = detached(async move { shared.ask_and_publish(&request, lease).await }).await;
                return Ok(asked.and_then(|token| token));
            }
            return Ok(self.ask_and_publish(&request, lease).await);
        }
    }

    /// Steps 5 to 7.
    async fn ask_and_publish(&self, request: &TokenRequest<'_>, lease: Lease) -> Result<Token, SourceError> {
        let requested_at = Instant::now();
        let token = match self.shared.extending(&lease, self.ask(request, &lease)).await {
            Ok(Answer::Source(token)) => token,
            Ok(Answer::Store(token)) => {
                self.shared.release(lease).await;
                return Ok(self.shared.adopt(token));
            }
            Err(error) => {
                self.store_replacement(request, &lease).await;
                self.shared.release(lease).await;
                return Err(error);
            }
        };
        // Before the first await, because the refresh may time out at any of them. Otherwise the token would be lost,
        // and with it the only refresh token that works.
        let token = token.with_record_version(request.previous().map_or(0, Token::record_version));
        self.shared.set_unpublished(&token, requested_at);
        let published = if self.shared.is_needed {
            self.shared.publish_for_a_lease(&token, &lease).await
        } else {
            self.shared.publish(&token, &lease).await
        };
        match published {
            Ok(Publication::Stored) => {
                let token = self.shared.published(token, lease.fence());
                self.shared.release(lease).await;
                Ok(token)
            }
            Ok(Publication::Superseded) => {
                self.shared.reporter.superseded();
                // If the newer lease's token is stored already, only its refresh token still works.
                if let Ok(Some(newer)) = self.shared.newer(Some(&token)).await {
                    return Ok(self.shared.adopt(newer));
                }
                self.shared.publish_later();
                Ok(token)
            }
            Err(error) => {
                self.shared.reporter.not_stored(&error);
                if self.shared.is_needed {
                    self.shared.keep_publishing(token.clone(), lease);
                } else {
                    self.shared.release_in_background(lease);
                    self.shared.publish_later();
                }
                Ok(token)
            }
        }
    }

    /// Stores the refresh token that the source presents next, if a response without a usable token has replaced that of
    /// the request.
    async fn store_replacement(&self, request: &TokenRequest<'_>, lease: &Lease) {
        let asked = request.previous().and_then(Token::refresh_token);
        let seed = if self.shared.is_needed { self.source.seed() } else { None };
        if let Some(seed) = seed.filter(|seed| seed.refresh_token() != asked) {
            // The store has reported a failure. The source remembers the refresh token.
            let _ = self.shared.store_seed(&seed, lease).await;
        }
    }

    /// Asks the source with the refresh token, then reads the store again, then asks with the credential.
    async fn ask(&self, request: &TokenRequest<'_>, lease: &Lease) -> Result<Answer, SourceError> {
        if let Some(base) = request.previous() {
            if let Some(token) = self.source.renew(request).await? {
                return Ok(Answer::Source(token));
            }
            if let Ok(Some(token)) = self.shared.newer(Some(base)).await {
                return Ok(Answer::Store(token));
            }
        }
        let mut rejected: Option<Token> = None;
        while let Some(seed) = self.source.seed() {
            // A source that returns the same one again would be asked forever.
            if rejected.is_some_and(|rejected| rejected.refresh_token() == seed.refresh_token()) {
                break;
            }
            self.shared.store_seed(&seed, lease).await?;
            if let Some(token) = self.source.renew(&request.replacing(Some(&seed))).await? {
                return Ok(Answer::Source(token));
            }
            rejected = Some(seed);
        }
        TokenSource::fetch(&*self.source, &request.replacing(None)).await.map(Answer::Source)
    }

    /// Asks the source without the store, unless there is time left to wait for the store.
    async fn refresh_without_store(
        &self,
        request: &TokenRequest<'_>,
        asking: Asking<'_>,
        error: StoreError,
    ) -> Result<Token, SourceError> {
        let previous = request.previous();
        // The reason is read only now, because a caller that cannot use the token may have joined since.
        if request.reason() == RefreshReason::Expiring
            && previous.is_some_and(|token| is_in_first_half_of_expiring(token, Instant::now()))
        {
            return Err(
                error.into_source_error("the token store cannot be used, and the current token still works")
            );
        }
        if self.shared.is_needed {
            let text =
                "the token store cannot be used, and the refresh token must not be presented without it";
            return Err(match error.kind() {
                StoreErrorKind::Unavailable => error.into_source_error(text),
                // Only an operator can correct it.
                _ => SourceError::configuration(format!("{text}: {error}")),
            });
        }
        self.shared.reporter.without_store(&error);
        asking(Asked::Source);
        let requested_at = Instant::now();
        let token = TokenSource::fetch(&*self.source, request)
            .await?
            .with_record_version(previous.map_or(0, Token::record_version));
        self.shared.set_unpublished(&token, requested_at);
        self.shared.publish_later();
        Ok(token)
    }

    /// Polls the store, as a reader, until there is a newer token, one lease length has passed, or the store has failed
    /// permanently.
    async fn wait_for_publisher(
        &self,
        previous: Option<&Token>,
        asking: Asking<'_>,
    ) -> Result<Token, SourceError> {
        let deadline = Instant::now() + self.shared.lease;
        let mut polls = Backoff::between(POLL_BACKOFF);
        loop {
            let found = self.shared.load().await;
            if let Some(token) = found.as_ref().ok().and_then(|found| usable(found, previous)) {
                return Ok(self.shared.adopt(token).without_refresh_token());
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

impl<T: TokenSource> DynTokenSource for SharedSource<T> {
    fn fetch<'a>(&'a self, request: &'a TokenRequest<'_>, asking: Asking<'a>) -> Fetch<'a> {
        Box::pin(self.token(request, asking))
    }

    fn store_outage(&self) -> Option<StoreOutage> {
        Some(self.shared.health.outage())
    }

    fn is_login(&self) -> bool {
        self.shared.is_needed
    }

    fn has_unpublished_login(&self) -> bool {
        // An exchange that outlives its refresh has a clone of the source.
        let exchanges = Arc::strong_count(&self.source) > 1;
        self.shared.is_needed && (exchanges || self.shared.has_unpublished())
    }

    fn store_needs_check(&self) -> bool {
        self.shared.health.needs_check(self.shared.role)
    }

    fn check_store(&self) -> Check {
        let shared = Arc::clone(&self.shared);
        // In a task: if it were dropped between the lease and its release, the other processes would wait for the lease.
        let checked = tokio::spawn(async move { shared.check().await });
        Box::pin(async move {
            let interrupted =
                |_| Err(StoreError::unavailable("the check of the token store was interrupted"));
            checked.await.unwrap_or_else(interrupted)
        })
    }

    fn revision(&self) -> u64 {
        TokenSource::revision(&*self.source)
    }

    fn allowed_origins(&self) -> AllowedOrigins {
        TokenSource::allowed_origins(&*self.source)
    }
}

/// Where the token came from when the source was asked.
enum Answer {
    /// The source issued it.
    Source(Token),
    /// Another process has published it meanwhile.
    Store(Token),
}

/// The source of a provider without a credential, which [`TokenProvider::reader`](crate::TokenProvider::reader) makes.
#[derive(Debug)]
pub struct NoSource(());

impl NoSource {
    pub(crate) fn new() -> Self {
        Self(())
    }
}

impl TokenSource for NoSource {
    async fn fetch(&self, _: &TokenRequest<'_>) -> Result<Token, SourceError> {
        Err(no_credential())
    }

    /// Not called for a reader: no other role can do without a credential.
    fn validate(&self) -> Result<(), SourceError> {
        Err(no_credential())
    }
}

fn no_credential() -> SourceError {
    SourceError::configuration(
        "role must be Role::Reader without a credential: a reader uses the tokens in its store",
    )
}

fn is_in_first_half_of_expiring(token: &Token, now: Instant) -> bool {
    let (Some(refresh_at), Some(expires_at)) = (token.refresh_at(), token.expires_at()) else { return false };
    now < refresh_at + expires_at.saturating_duration_since(refresh_at) / 2
}
