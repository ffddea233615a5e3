//! [`TokenProviderBuilder`]: the options of a provider, checked together.

use std::{fmt, time::Duration};

use super::{TokenProvider, flight::Settings};
use crate::{error::Error, retry::RetryPolicy, source::TokenSource};

const HOUR: Duration = Duration::from_secs(60 * 60);

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

    /// Sets how long one whole flight may take, its retries included. Default: 30 s.
    pub fn refresh_timeout(mut self, timeout: Duration) -> Self {
        self.settings.refresh_timeout = timeout;
        self
    }

    /// Sets how a transient failure of the source is tried again within a flight. Default: twice, 100 ms to 5 s.
    ///
    /// A source's own wish (`Retry-After`) is followed where it is longer, up to a minute. The backoff goes on from one
    /// failed flight to the next, so that a source that is down is not asked more often than the longest delay says.
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

    /// Builds the provider. Nothing is fetched before the first request.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if the refresh timeout is zero or more than an hour, or the cool-down's least length is
    /// zero, more than its most, or its most is more than an hour.
    pub fn build(self) -> Result<TokenProvider, Error> {
        let Settings { refresh_timeout, cool_down: (min, max), .. } = self.settings;
        if refresh_timeout.is_zero() || refresh_timeout > HOUR {
            return Err(Error::InvalidOption(
                "refresh_timeout is more than zero, and at most an hour".into(),
            ));
        }
        if min.is_zero() || min > max || max > HOUR {
            return Err(Error::InvalidOption(
                "cool_down's least is more than zero and at most its most, which is at most an hour".into(),
            ));
        }
        Ok(TokenProvider::with_settings(self.source, self.settings))
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            refresh_timeout: Duration::from_secs(30),
            retry: RetryPolicy::new(),
            cool_down: (Duration::from_secs(1), Duration::from_secs(60)),
        }
    }
}

impl<T> fmt::Debug for TokenProviderBuilder<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenProviderBuilder").field("settings", &self.settings).finish_non_exhaustive()
    }
}
