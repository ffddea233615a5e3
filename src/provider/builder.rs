//! [`TokenProviderBuilder`]: the options of a provider.

#[cfg(feature = "store")]
use std::sync::Arc;
use std::{fmt, time::Duration};

#[cfg(feature = "tenants")]
use super::config::Group;
use super::{TokenProvider, config::Config, refresh_ahead::RefreshAhead};
#[cfg(feature = "store")]
use crate::store::{Role, SharedSource, TokenStore};
use crate::{error::Error, retry::RetryPolicy, source::TokenSource};

/// Builds a [`TokenProvider`]; see [`TokenProvider::builder`].
///
/// The setters accept any value; [`build`](Self::build) checks all of them.
#[must_use = "a builder does nothing until `build` is called"]
pub struct TokenProviderBuilder<T> {
    source: T,
    config: Config,
}

impl<T: TokenSource> TokenProviderBuilder<T> {
    pub(super) fn new(source: T) -> Self {
        Self { source, config: Config::default() }
    }

    /// Names the provider in events and metrics ([`observability`](crate::observability)). Default: `default`. At least
    /// one character.
    ///
    /// The name is shown as it is: it must not contain a secret.
    pub fn name(mut self, name: impl AsRef<str>) -> Self {
        self.config.name = Some(name.as_ref().into());
        self
    }

    /// Makes the provider one of a group.
    #[cfg(feature = "tenants")]
    pub(crate) fn member_of(mut self, group: &Group) -> Self {
        self.config.group = Some(group.clone());
        self
    }

    /// Sets how long before its expiry a token is replaced in the background. Default: [`RefreshAhead::new`].
    pub fn refresh_ahead(mut self, ahead: RefreshAhead) -> Self {
        self.config.refresh_ahead = ahead;
        self
    }

    /// Sets whether the token is refreshed even if no request is sent. Default: no.
    ///
    /// A background task obtains the first token as soon as it runs, and the next one as soon as the current one is
    /// expiring. No failure ends the task: it asks a source that is down again after the backoff, and a source that
    /// rejects the credential after each cool-down, or within a second of the credential's replacement. Once a minute
    /// it compares the clocks, and replaces a token that expired while the machine was suspended, when the monotonic
    /// clock stands still.
    ///
    /// The task starts in [`build`](Self::build) if that is called within a tokio runtime, else with the first request
    /// that waits for a token. It ends with the provider's last handle, or by [`shutdown`](TokenProvider::shutdown). If
    /// its runtime ends while handles live on another runtime, the next refresh starts the task again.
    pub fn keep_fresh(mut self, keep_fresh: bool) -> Self {
        self.config.keep_fresh = keep_fresh;
        self
    }

    /// Sets how long one refresh may take, its retries included. Default: 30 s. More than zero, at most an hour.
    ///
    /// No caller waits longer for a refresh. If nobody drives the refresh's runtime any more, it is abandoned after
    /// this time ([`TokenProvider`](TokenProvider#refreshes)).
    pub fn refresh_timeout(mut self, timeout: Duration) -> Self {
        self.config.refresh_timeout = timeout;
        self
    }

    /// Sets how a refresh retries after a transient failure of the source. Default: two retries, 100 ms to 5 s of
    /// backoff.
    ///
    /// A source's `Retry-After` is followed, up to a minute, and the backoff is added to it, so that clients that got
    /// the same date do not all return at that date. The backoff continues from one failed refresh to the next.
    pub fn retry(mut self, policy: RetryPolicy) -> Self {
        self.config.retry = policy;
        self
    }

    /// Sets the pause after a permanent failure, and between two refreshes that challenges start. Default: 1 s,
    /// doubling to 60 s. `min` must be more than zero and at most `max`, and `max` at most an hour.
    ///
    /// During the pause after a rejected credential every caller gets its error at once. During the pause between
    /// challenges, an API that challenges even the newest token starts no further refresh.
    ///
    /// After a refresh that a challenge started, the responses of the API to the new token decide how long the pause
    /// is:
    ///
    /// | the new token | the pause |
    /// |---|---|
    /// | the request that started the refresh succeeds with it | none: a further challenge is a further revocation. After ten in a row, one per `min` |
    /// | another challenged request succeeds, the first one has no response yet | `min` |
    /// | the API accepts it, but no challenged request has succeeded: some endpoint rejects every token | 5 s, or the nearest bound |
    /// | nothing has succeeded with it | doubles from `min`, or from those 5 s once the API has accepted any token |
    ///
    /// A success is a 2xx response to a request that the layer has sent. A refresh that fails starts no pause: its
    /// backoff spaces the attempts ([`retry`](Self::retry)).
    pub fn cool_down(mut self, min: Duration, max: Duration) -> Self {
        self.config.cool_down = (min, max);
        self
    }

    /// Shares the token with every other process that uses this store. Default: each process has its own token.
    ///
    /// Any number of processes then cost the auth endpoint one call per expiry; [`TokenStore`] documents how, and what
    /// happens when the store fails. The source must be the same in all of them, with the same credential.
    ///
    /// Without a store, processes that use one api.video key invalidate each other's refresh tokens: see
    /// [`ApiVideo`](crate::ApiVideo#method.key_only).
    #[cfg(feature = "store")]
    #[cfg_attr(docsrs, doc(cfg(feature = "store")))]
    pub fn store(mut self, store: impl TokenStore) -> Self {
        self.config.store = Some(Arc::new(store));
        self
    }

    /// Sets what this process does for the token that it shares. Default: [`Role::Member`]. Every other role needs a
    /// [`store`](Self::store).
    #[cfg(feature = "store")]
    #[cfg_attr(docsrs, doc(cfg(feature = "store")))]
    pub fn role(mut self, role: Role) -> Self {
        self.config.role = role;
        self
    }

    /// Sets how long the lease of a process that renews the token lasts. Default: 10 s. From 100 ms to an hour.
    ///
    /// The process extends its lease while it asks its source, so that an exchange may take longer. If the process is
    /// killed, another one refreshes at most a second after the end of the lease. If a process gets no lease for
    /// five lease lengths, the store counts as failed ([`TokenStore`]): set the lease to at least a fifth of the longest exchange. With a store that cannot extend a lease
    /// ([`TokenStore::extend`]), set it to more than the longest exchange: a longer one costs a rejected refresh and an
    /// authentication, or a user's login.
    #[cfg(feature = "store")]
    #[cfg_attr(docsrs, doc(cfg(feature = "store")))]
    pub fn lease(mut self, length: Duration) -> Self {
        self.config.lease = length;
        self
    }

    /// Builds the provider. Nothing is fetched before the first request, unless the provider is to
    /// [keep fresh](Self::keep_fresh).
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if an option is out of its range, or a publisher or a reader has no store; the message names the
    /// option, its value and the accepted range; the store's options included. [`Error::Source`] if the source is set
    /// up wrongly ([`TokenSource::validate`]).
    pub fn build(self) -> Result<TokenProvider, Error> {
        let Self { source, config } = self;
        config.validate()?;
        if !config.is_reader() {
            source.validate()?;
        }
        #[cfg(feature = "store")]
        if let Some(store) = config.store.clone() {
            store.validate()?;
            let source = SharedSource::new(source, store, config.role, config.lease, config.reporter());
            return Ok(TokenProvider::with_config(Box::new(source), config.shared()));
        }
        Ok(TokenProvider::with_config(Box::new(source), config))
    }
}

impl<T> fmt::Debug for TokenProviderBuilder<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenProviderBuilder").field("config", &self.config).finish_non_exhaustive()
    }
}
