//! [`TokenProvidersBuilder`]: the options of a group, and their validation.

use std::{hash::Hash, sync::Arc, time::Duration};

use crate::debug::debug_fields;
use crate::error::{Error, Seconds};
use crate::provider::{Group, TokenProvider};

const MAX_PROVIDERS: usize = 10_000_000;
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Makes the provider of a key, in a group.
pub(super) type Make<K> = Box<dyn Fn(&K, &Arc<Group>) -> Result<TokenProvider, Error> + Send + Sync>;

/// Builds [`TokenProviders`](crate::TokenProviders); see
/// [`TokenProviders::builder`](crate::TokenProviders::builder).
///
/// The setters accept any value; [`build`](Self::build) checks all of them.
#[must_use = "a builder does nothing until `build` is called"]
pub struct TokenProvidersBuilder<K> {
    pub(super) make: Make<K>,
    pub(super) name: Arc<str>,
    pub(super) max_providers: usize,
    /// `None` for no limit.
    pub(super) idle_timeout: Option<Duration>,
    pub(super) metrics_by_provider: bool,
}

impl<K: Clone + Eq + Hash + Send + Sync + 'static> TokenProvidersBuilder<K> {
    pub(super) fn new(make: Make<K>) -> Self {
        Self {
            make,
            name: "default".into(),
            max_providers: 10_000,
            idle_timeout: Some(Duration::from_secs(60 * 60)),
            metrics_by_provider: false,
        }
    }

    /// Names the group in events and metrics. Default: `default`. At least one character.
    ///
    /// It is the label `provider` of the metrics of all its providers. A provider without a
    /// [name](crate::TokenProviderBuilder::name) has this one in events as well. The name is shown as it is: it must not
    /// contain a secret.
    pub fn name(mut self, name: impl AsRef<str>) -> Self {
        self.name = name.as_ref().into();
        self
    }

    /// Sets how many providers are kept. Default: 10,000. From 1 to 10 million.
    ///
    /// The providers that are rarely used are evicted first. Those with which something would be
    /// [lost](super#how-many-and-for-how-long) are kept beyond the bound. More than 1,000 are kept in several parts, each
    /// with its share of the bound, so that the first is evicted when about nine tenths are there.
    pub fn max_providers(mut self, max: usize) -> Self {
        self.max_providers = max;
        self
    }

    /// Sets for how long a provider is kept that is not used. Default: one hour. From 1 s to 30 days.
    ///
    /// It is evicted when the group is used within an eighth of this time after its end, or later: a
    /// [`get`](crate::TokenProviders::get), a request, [`len`](crate::TokenProviders::len) and a provider that is to
    /// [keep fresh](crate::TokenProviderBuilder::keep_fresh) evict what is idle. Each `get` and each request is a use of its
    /// provider, and a handle or a request that has the provider uses it all the time. The background refresh is none.
    pub fn idle_timeout(mut self, timeout: Duration) -> Self {
        self.idle_timeout = Some(timeout);
        self
    }

    /// Keeps providers however long they are not used. [`max_providers`](Self::max_providers) is then the only bound.
    pub fn without_idle_timeout(mut self) -> Self {
        self.idle_timeout = None;
        self
    }

    /// Sets whether the metrics of each provider have its own [name](crate::TokenProviderBuilder::name) as their label.
    /// Default: no, they have the group's.
    ///
    /// A recorder keeps a series for each label, also for a provider that was evicted: use this for a known, small number
    /// of tenants.
    pub fn metrics_by_provider(mut self, by_provider: bool) -> Self {
        self.metrics_by_provider = by_provider;
        self
    }

    pub(super) fn validate(&self) -> Result<(), Error> {
        let (max, timeout) = (self.max_providers, self.idle_timeout.unwrap_or(DAY));
        let text = format_args!("name must be at least one character long, got none");
        Error::check(!self.name.is_empty(), text)?;
        let text = format_args!("max_providers must be >= 1 and <= 10000000, got {max}");
        Error::check((1..=MAX_PROVIDERS).contains(&max), text)?;
        let text = format_args!("idle_timeout must be >= 1s and <= 30 days, got {}", Seconds(timeout));
        Error::check((Duration::from_secs(1)..=30 * DAY).contains(&timeout), text)
    }
}

debug_fields!(TokenProvidersBuilder<K> |it| {
    name: it.name,
    max_providers: it.max_providers,
    idle_timeout: it.idle_timeout
});
