//! [`TokenProviderBuilder`]: the options of a provider, checked together.

use std::{fmt, time::Duration};

use super::{TokenProvider, refresh_ahead::RefreshAhead, settings::Settings};
use crate::{error::Error, retry::RetryPolicy, source::TokenSource};

/// Builds a [`TokenProvider`]; see [`TokenProvider::builder`].
#[must_use = "a builder does nothing until `build` is called"]
pub struct TokenProviderBuilder<T> {
    source: T,
    settings: Settings,
}

impl<T: TokenSource> TokenProviderBuilder<T> {
    pub(super) fn new(source: T) -> Self {
        Self { source, settings: Settings::default() }
    }

    /// Names the provider in events and metrics ([`observability`](crate::observability)). Default: `default`.
    ///
    /// The name is shown as it is: it must hold no secret.
    pub fn name(mut self, name: impl AsRef<str>) -> Self {
        self.settings.name = name.as_ref().into();
        self
    }

    /// Sets how long before its expiry a token is renewed behind the callers' backs. Default: [`RefreshAhead::new`].
    pub fn refresh_ahead(mut self, ahead: RefreshAhead) -> Self {
        self.settings.refresh_ahead = ahead;
        self
    }

    /// Sets whether the token is renewed even while nobody asks for it. Default: no.
    ///
    /// A task obtains the first token as soon as it runs, and each next one as the current one begins to age. It outlives
    /// every failure: a source that is down is asked again by the backoff, a refused credential after each cool-down, or
    /// within a second of its replacement. Once a minute it compares the clocks, and renews a token that a machine's
    /// suspension has outlived, although the monotonic clock stood still meanwhile.
    ///
    /// The task starts in [`build`](Self::build) if that is called within a tokio runtime, else with the first request
    /// that waits for a token. It ends with the provider's last handle, or by
    /// [`shutdown`](TokenProvider::shutdown). If its runtime ends while handles live on elsewhere, the next flight starts
    /// it anew.
    pub fn keep_fresh(mut self, keep_fresh: bool) -> Self {
        self.settings.keep_fresh = keep_fresh;
        self
    }

    /// Sets how long one whole flight may take, its retries included. Default: 30 s.
    pub fn refresh_timeout(mut self, timeout: Duration) -> Self {
        self.settings.refresh_timeout = timeout;
        self
    }

    /// Sets how a transient failure of the source is tried again within a flight. Default: twice, 100 ms to 5 s.
    ///
    /// A source's own wish (`Retry-After`) is followed, up to a minute, and the backoff added to it, so that clients that
    /// were told one date do not all come at it. The backoff goes on from one failed flight to the next.
    pub fn retry(mut self, policy: RetryPolicy) -> Self {
        self.settings.retry = policy;
        self
    }

    /// Sets the pause after a permanent failure, and between two flights that challenges cause. Default: 1 s, doubling
    /// to 60 s.
    ///
    /// During it a refused credential is told to every caller at once, and an API that refuses even the newest token
    /// causes no further flight.
    pub fn cool_down(mut self, min: Duration, max: Duration) -> Self {
        self.settings.cool_down = (min, max);
        self
    }

    /// Builds the provider. Nothing is fetched before the first request, unless it is to
    /// [keep fresh](Self::keep_fresh).
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if the refresh timeout is zero or more than an hour; the cool-down's least length is zero,
    /// more than its most, or its most is more than an hour; the name is empty.
    pub fn build(self) -> Result<TokenProvider, Error> {
        self.settings.check()?;
        Ok(TokenProvider::with_settings(self.source, self.settings))
    }
}

impl<T> fmt::Debug for TokenProviderBuilder<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenProviderBuilder").field("settings", &self.settings).finish_non_exhaustive()
    }
}
