//! [`SharedSource`]: a source that asks the store first, and what it obtains is everybody's; the protocol of
//! [`TokenStore`](super::TokenStore).

use std::{future::poll_fn, pin::pin, sync::Arc, task::Poll, time::Duration};

use tokio::time::{Instant, sleep, sleep_until};

use super::{
    DynTokenStore, Lease, Publication, Role,
    shared_token::{SharedToken, backoff, is_newer, usable},
};
use crate::{
    error::{SourceError, StoreError},
    observability::Reporter,
    origins::AllowedOrigins,
    source::{DynTokenSource, Fetch, RefreshReason, TokenRequest, TokenSource},
    token::Token,
};

/// Between two looks at a store in which another is about to publish, at least and at most.
const LOOK_AGAIN: (Duration, Duration) = (Duration::from_millis(25), Duration::from_millis(500));

/// The source of a provider whose processes share a store.
pub(crate) struct SharedSource<T> {
    source: T,
    role: Role,
    shared: Arc<SharedToken>,
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
        Self { source, role, shared: Arc::new(SharedToken::new(store, lease, reporter)) }
    }

    async fn token(&self, request: &TokenRequest<'_>) -> Result<Token, SourceError> {
        let previous = request.previous();
        if let Some(token) = self.shared.unpublished_token(previous) {
            return Ok(token);
        }
        if self.role == Role::Reader {
            return self.wait_for_publisher(previous).await;
        }
        match self.share(request).await {
            Ok(token) => Ok(token),
            Err(Failure::Source(error)) => Err(error),
            Err(Failure::Store(error)) => self.refresh_without_store(request, error).await,
        }
    }

    /// Steps 1 to 7.
    async fn share(&self, request: &TokenRequest<'_>) -> Result<Token, Failure> {
        let previous = request.previous();
        let SharedToken { lease: length, reporter, .. } = &*self.shared;
        let mut look_again = backoff(LOOK_AGAIN);
        loop {
            if let Some(token) = self.shared.newer(previous).await? {
                return Ok(self.shared.adopt(token));
            }
            let asked = Instant::now();
            let Some(lease) = self.shared.lease().await? else {
                reporter.waiting_for_lease();
                let delay = look_again.next_delay();
                sleep(delay).await;
                self.shared.record_lease_wait(delay)?;
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
                self.shared.record_lease_wait(asked.elapsed())?;
                continue;
            }
            self.shared.forget_waiting();
            // Whatever has become of its access token, the newest record has the refresh token that counts.
            let base = found.filter(|found| is_newer(found, previous));
            return self.renew(&request.replacing(base.as_ref().or(previous)), lease).await;
        }
    }

    /// Steps 5 to 7.
    async fn renew(&self, request: &TokenRequest<'_>, lease: Lease) -> Result<Token, Failure> {
        let asked_at = Instant::now();
        let token = match self.ask_under(&lease, request).await {
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
        // Kept before the first await: this refresh's time may be up at any of them.
        let token = token.recorded_as(request.previous().map_or(0, Token::recorded));
        self.shared.keep(&token, asked_at);
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

    /// As [`ask`](Self::ask); extends the lease meanwhile.
    ///
    /// Both are one task: a process that is killed or stopped extends no lease.
    async fn ask_under(&self, lease: &Lease, request: &TokenRequest<'_>) -> Result<Asked, SourceError> {
        let (mut asked, mut kept) = (pin!(self.ask(request)), pin!(self.shared.keep_lease(lease)));
        poll_fn(|cx| {
            if let Poll::Ready(asked) = asked.as_mut().poll(cx) {
                return Poll::Ready(asked);
            }
            kept.as_mut().poll(cx).map(|never| match never {})
        })
        .await
    }

    /// Asks the source, and the store again before the credential is used.
    async fn ask(&self, request: &TokenRequest<'_>) -> Result<Asked, SourceError> {
        if let Some(base) = request.previous() {
            if let Some(token) = self.source.renew(request).await? {
                return Ok(Asked::Given(token));
            }
            if let Ok(Some(token)) = self.shared.newer(Some(base)).await {
                return Ok(Asked::Found(token));
            }
        }
        self.source.fetch(&request.replacing(None)).await.map(Asked::Given)
    }

    /// Asks the source without the store, unless there is time left to wait for the store.
    async fn refresh_without_store(
        &self,
        request: &TokenRequest<'_>,
        error: StoreError,
    ) -> Result<Token, SourceError> {
        let previous = request.previous();
        // Looked at as late as this: a caller that cannot use the token may have joined since.
        if request.reason() == RefreshReason::Expiring
            && previous.is_some_and(|token| is_in_first_half_of_expiring(token, Instant::now()))
        {
            return Err(SourceError::unavailable(
                "the token store cannot be used, and the token that is there still works",
            )
            .with_cause(error));
        }
        self.shared.reporter.alone(&error);
        let asked_at = Instant::now();
        let token = self.source.fetch(request).await?.recorded_as(previous.map_or(0, Token::recorded));
        self.shared.keep(&token, asked_at);
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
    fn fetch<'a>(&'a self, request: &'a TokenRequest<'_>) -> Fetch<'a> {
        Box::pin(self.token(request))
    }

    fn revision(&self) -> u64 {
        self.source.revision()
    }

    fn allowed_origins(&self) -> AllowedOrigins {
        self.source.allowed_origins()
    }
}

/// What came of asking.
enum Asked {
    /// The source gave it.
    Given(Token),
    /// Another process has published it.
    Found(Token),
}

/// The source of those who have no credential.
pub(crate) struct NoSource;

impl TokenSource for NoSource {
    async fn fetch(&self, _: &TokenRequest<'_>) -> Result<Token, SourceError> {
        Err(SourceError::configuration(
            "a reader has no credential: give it a store, and the role of a reader",
        ))
    }
}

fn is_in_first_half_of_expiring(token: &Token, now: Instant) -> bool {
    let (Some(refresh_at), Some(expires_at)) = (token.refresh_at(), token.expires_at()) else { return false };
    now < refresh_at + expires_at.saturating_duration_since(refresh_at) / 2
}
