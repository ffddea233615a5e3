//! [`TokenProviderBuilder`]: the options of a provider, checked together.

#[cfg(feature = "store")]
use std::sync::Arc;
use std::{fmt, time::Duration};

#[cfg(feature = "store")]
use super::settings::Fleet;
use super::{TokenProvider, refresh_ahead::RefreshAhead, settings::Settings};
use crate::{error::Error, retry::RetryPolicy, source::TokenSource};
#[cfg(feature = "store")]
use crate::{
    observability::Reporter,
    store::{DynTokenStore, Role, SharedSource, TokenStore},
};

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
    /// [`shutdown`](TokenProvider::shutdown). If its runtime ends while handles live on elsewhere, the next refresh starts
    /// it anew.
    pub fn keep_fresh(mut self, keep_fresh: bool) -> Self {
        self.settings.keep_fresh = keep_fresh;
        self
    }

    /// Sets how long one whole refresh may take, its retries included. Default: 30 s.
    ///
    /// No caller waits longer for one. If its runtime is not driven any more, it is abandoned after this time
    /// ([`TokenProvider`](TokenProvider#refreshes)).
    pub fn refresh_timeout(mut self, timeout: Duration) -> Self {
        self.settings.refresh_timeout = timeout;
        self
    }

    /// Sets how a transient failure of the source is tried again within a refresh. Default: twice, 100 ms to 5 s.
    ///
    /// A source's own wish (`Retry-After`) is followed, up to a minute, and the backoff added to it, so that clients that
    /// were told one date do not all come at it. The backoff goes on from one failed refresh to the next.
    pub fn retry(mut self, policy: RetryPolicy) -> Self {
        self.settings.retry = policy;
        self
    }

    /// Sets the pause after a permanent failure, and between two refreshes that challenges start. Default: 1 s, doubling
    /// to 60 s.
    ///
    /// During it every caller gets the error of a rejected credential at once, and an API that challenges even the newest
    /// token starts no further refresh.
    ///
    /// After a refresh that a challenge started, what the API does with the new token decides how long the pause is:
    ///
    /// | the new token | the pause |
    /// |---|---|
    /// | the request that started the refresh succeeds with it | none: a further challenge is a further revocation. After ten in a row, one per `min` |
    /// | another challenged request does, the first one has no answer yet | `min` |
    /// | the API accepts it, but no request that was challenged before has succeeded: some endpoint refuses every token | 5 s, or the bound that is nearest to it |
    /// | nothing has succeeded with it | doubles from `min`, or from those 5 s once the API has accepted any token |
    ///
    /// A success is a 2xx answer to a request that the layer has sent. A refresh that fails starts no pause: its backoff spaces
    /// the attempts ([`retry`](Self::retry)).
    pub fn cool_down(mut self, min: Duration, max: Duration) -> Self {
        self.settings.cool_down = (min, max);
        self
    }

    /// Shares the token with every other process that uses this store. Default: each process is for itself.
    ///
    /// Any number of processes then cost the auth endpoint one call per expiry; [`TokenStore`] tells how, and what
    /// happens when the store fails. The source must be the same in all of them, with the same credential.
    ///
    /// Without a store, each process that uses one api.video key spends refresh tokens that the others' renewals have
    /// ended: see [`ApiVideo`](crate::ApiVideo#method.key_only).
    #[cfg(feature = "store")]
    #[cfg_attr(docsrs, doc(cfg(feature = "store")))]
    pub fn store(mut self, store: impl TokenStore) -> Self {
        self.settings.fleet.store = Some(Arc::new(store));
        self
    }

    /// Sets what this process does for the token that it shares. Default: [`Role::Member`].
    #[cfg(feature = "store")]
    #[cfg_attr(docsrs, doc(cfg(feature = "store")))]
    pub fn role(mut self, role: Role) -> Self {
        self.settings.fleet.role = role;
        self
    }

    /// Sets for how long the lease of a process that renews the token lasts. Default: 10 s.
    ///
    /// The process extends its lease while it asks its source, so that an exchange may take longer. If it is killed, it
    /// holds up the others for this long at most. The others give the store up after five leases without a turn: set it
    /// to at least a fifth of the longest exchange. With a store that cannot extend a lease
    /// ([`TokenStore::extend`]), set it to more than the longest exchange: a longer one costs a refused refresh and an
    /// authentication.
    #[cfg(feature = "store")]
    #[cfg_attr(docsrs, doc(cfg(feature = "store")))]
    pub fn lease(mut self, length: Duration) -> Self {
        self.settings.fleet.lease = length;
        self
    }

    /// Builds the provider. Nothing is fetched before the first request, unless it is to
    /// [keep fresh](Self::keep_fresh).
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if the refresh timeout is zero or more than an hour; the cool-down's least length is
    /// zero, more than its most, or its most is more than an hour; the name is empty; a lease would last less than 100
    /// ms or more than an hour; a publisher or a reader has no store.
    pub fn build(self) -> Result<TokenProvider, Error> {
        let Self { source, settings } = self;
        settings.check()?;
        #[cfg(feature = "store")]
        if let Some(store) = settings.fleet.store.clone() {
            store.validate()?;
            return Ok(Self::build_shared(source, store, settings));
        }
        Ok(TokenProvider::with_settings(Box::new(source), settings))
    }

    #[cfg(feature = "store")]
    fn build_shared(source: T, store: Arc<dyn DynTokenStore>, mut settings: Settings) -> TokenProvider {
        let Fleet { role, lease, .. } = settings.fleet;
        match role {
            Role::Member => {}
            Role::Publisher => settings.keep_fresh = true,
            // The publisher renews the token as it begins to age; then there is something to find.
            Role::Reader => settings.refresh_ahead = settings.refresh_ahead.halved(),
        }
        let source = SharedSource::new(source, store, role, lease, Reporter::new(&settings.name));
        TokenProvider::with_settings(Box::new(source), settings)
    }
}

impl<T> fmt::Debug for TokenProviderBuilder<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenProviderBuilder").field("settings", &self.settings).finish_non_exhaustive()
    }
}
