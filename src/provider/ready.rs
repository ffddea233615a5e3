//! [`TokenProvider::ready`]: the wait for the first token, and for the store, when a program starts.

use tokio::time::Instant;

use super::{TokenProvider, failure::PAUSE};
use crate::{error::Error, retry::Backoff, token::Token};

impl TokenProvider {
    /// Waits for the first token. Call it once, when the program starts. A health check reads [`status`](Self::status)
    /// instead.
    ///
    /// After a permanent failure, the source is asked again at once, and not only after the cool-down. If it fails each time,
    /// this waits for a second before the next time, and twice as long each time, up to a minute.
    ///
    /// Unlike [`token`](Self::token), which a failed refresh ends, this continues through transient failures until the
    /// [refresh timeout](crate::TokenProviderBuilder::refresh_timeout) is over, so that this program and the auth endpoint may start in any
    /// order. A permanent failure ends it at once, except for a status such as 404, with which an ingress responds while
    /// the endpoint behind it starts.
    ///
    /// If processes share a [store](crate::TokenProviderBuilder#method.store), this also checks that it can be used: a reader has
    /// to read it, a member and a publisher also to write it. Usually the first token has shown that already. Otherwise
    /// this reads, leases and releases, with backoff until the refresh timeout is over. A program that may start while
    /// its store is down calls [`token`](Self::token) instead, which needs the store only for a
    /// user's [login](crate::TokenProviderBuilder::login).
    ///
    /// The last refresh that this waits for may take another refresh timeout.
    ///
    /// # Errors
    ///
    /// As for [`token`](Self::token): the newest failure. [`Error::Store`] if the store cannot be used, at once if that is
    /// permanent.
    ///
    /// # Cancel safety
    ///
    /// As for [`token`](Self::token).
    pub async fn ready(&self) -> Result<Token, Error> {
        let core = self.core();
        let deadline = Instant::now() + core.config.refresh_timeout;
        if let Some(at) = core.ask_again().filter(|at| (Instant::now()..deadline).contains(at)) {
            core.is_shut_down_before(at).await;
        }
        loop {
            let error = match self.token().await {
                Ok(token) => {
                    self.store_ready(deadline).await?;
                    return Ok(token);
                }
                Err(error) if error.is_transient() || error.is_misplaced() => error,
                Err(error) => return Err(error),
            };
            if let Some(error) = core.store_error().filter(|error| !error.is_transient()) {
                return Err(error);
            }
            let soonest = Instant::now() + PAUSE;
            let next = core.state().retry_at().unwrap_or(soonest).max(soonest);
            if next >= deadline || core.is_shut_down_before(next).await {
                return Err(error);
            }
        }
    }

    /// Checks the store until it can be used, if that is not known.
    async fn store_ready(&self, deadline: Instant) -> Result<(), Error> {
        let core = self.core();
        let mut delays = Backoff::between((PAUSE, 20 * PAUSE));
        while core.login.store_needs_check() {
            tokio::runtime::Handle::try_current().map_err(|_| Error::NoRuntime)?;
            let error = match tokio::time::timeout_at(deadline, core.login.check_store()).await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(error)) => Error::Store(error),
                Err(_) => core.store_error().unwrap_or(Error::TimedOut(core.config.refresh_timeout)),
            };
            let next = Instant::now() + delays.next_delay();
            if !error.is_transient() || next >= deadline || core.is_shut_down_before(next).await {
                return Err(error);
            }
        }
        Ok(())
    }
}
