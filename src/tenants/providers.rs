//! [`TokenProviders`]: the providers by their key, made when they are used first.

use std::{
    borrow::Borrow,
    cell::Cell,
    fmt,
    hash::{Hash, RandomState},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use futures_util::future::join_all;
use quick_cache::{
    OptionsBuilder, UnitWeighter,
    sync::{Cache, GuardResult},
};
use tokio::task::AbortHandle;

use super::{
    builder::TokenProvidersBuilder,
    eviction,
    tenant::{Pinned, Tenant},
};
use crate::{
    error::{BoxError, Error, SourceError},
    observability::Reporter,
    provider::{Group, Status, TokenProvider, TokenProviderBuilder},
    source::{TokenSource, source_fn},
};

/// How many providers a part of the cache has at least: a part with fewer would often be full before the others.
const LEAST_PER_PART: usize = 1000;

/// Makes the provider of a key, in a group.
pub(super) type Make<K> = Box<dyn Fn(&K, &Group) -> Result<TokenProvider, Error> + Send + Sync>;

/// Token providers by key: one for each tenant, made when it is used first.
///
/// A cheap handle: clones share the providers. [`tenants`](crate::tenants) describes how they are used, and when one is
/// evicted.
///
/// ```
/// # async fn run() -> Result<(), tower_bearer::Error> {
/// use tower_bearer::{BoxError, OAuth2, TokenProvider, TokenProviders, oauth2::{ClientAuth, Server}};
///
/// // One HTTP client for the token requests of all tenants.
/// let template = OAuth2::client_credentials(
///     Server::token_endpoint("https://login.example/token"),
///     ClientAuth::basic("your-client-id", "your-client-secret"),
/// );
/// let providers = TokenProviders::new(move |tenant: &String| {
///     let source = template.clone().audience(format!("https://{tenant}.api.example"));
///     Ok::<_, BoxError>(TokenProvider::builder(source).name(tenant))
/// });
/// let provider = providers.get("acme")?;
/// assert!(provider.current().is_none());
/// assert_eq!(providers.len(), 1);
/// # Ok(())
/// # }
/// # tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(run()).unwrap();
/// ```
///
/// # The factory
///
/// The factory returns the builder of a key's provider, or an error of its own, which the request gets as
/// [`Error::Factory`]. It is called once for concurrent first uses of a key, and again if it failed, after the provider was
/// evicted, or after [`remove`](Self::remove).
///
/// Threads that need the provider wait for it: the factory must not block. A credential that has to be loaded is loaded by
/// the source, such as one of [`source_fn`](crate::source_fn). The factory must not call [`get`](Self::get) for a key that
/// has no provider, of this group or another, since both could wait for each other: that is [`Error::Factory`], too.
///
/// `Clone`, `Eq`, `Hash` and `Drop` of a key may run under a lock of the group: they must not panic, and not use the group.
///
/// The builder's name is shown in events. Its error is shown in events and to the caller. Neither must contain a secret.
///
/// # Shutdown
///
/// When the last handle is dropped, those in layers and services included, all providers are dropped, as with
/// [`TokenProvider`]. [`shutdown`](Self::shutdown) also waits for the refreshes that run.
pub struct TokenProviders<K> {
    shared: Arc<Shared<K>>,
}

pub(super) struct Shared<K> {
    make: Make<K>,
    group: Group,
    pub(super) cache: Cache<K, Arc<Tenant>, UnitWeighter, RandomState, Pinned>,
    max_providers: usize,
    pub(super) idle_timeout: Option<Duration>,
    /// Counts the periods by which idle time is measured: a use reads no clock.
    pub(super) period: AtomicU32,
    /// Whether there are more providers than the bound.
    exceeds: AtomicBool,
    /// How many idle providers could not be evicted in the last period.
    pub(super) kept: AtomicUsize,
    /// The task that evicts idle providers.
    pub(super) eviction: Mutex<Option<AbortHandle>>,
    is_shut_down: AtomicBool,
    /// Reports what has no tenant. It never has a token.
    nobody: TokenProvider,
}

impl<K> Drop for Shared<K> {
    fn drop(&mut self) {
        if let Some(task) = self.eviction.get_mut().unwrap_or_else(PoisonError::into_inner) {
            task.abort();
        }
        self.nobody.reporter().providers(0, false);
    }
}

impl<K> TokenProviders<K>
where
    K: Clone + Eq + Hash + Send + Sync + 'static,
{
    /// Makes a group with the default options, and this factory.
    pub fn new<F, T, E>(make: F) -> Self
    where
        F: Fn(&K) -> Result<TokenProviderBuilder<T>, E> + Send + Sync + 'static,
        T: TokenSource,
        E: Into<BoxError>,
    {
        Self::with_options(Self::builder(make))
    }

    /// Starts to build a group with other options.
    pub fn builder<F, T, E>(make: F) -> TokenProvidersBuilder<K>
    where
        F: Fn(&K) -> Result<TokenProviderBuilder<T>, E> + Send + Sync + 'static,
        T: TokenSource,
        E: Into<BoxError>,
    {
        TokenProvidersBuilder::new(Box::new(move |key, group| {
            let builder = make(key).map_err(|error| Error::Factory(error.into().into()))?;
            builder.member_of(group).build().map_err(|error| Error::Factory(Arc::new(error)))
        }))
    }

    pub(super) fn with_options(options: TokenProvidersBuilder<K>) -> Self {
        let TokenProvidersBuilder { make, name, max_providers, idle_timeout, metrics_by_provider } = options;
        let threads = thread::available_parallelism().map_or(1, usize::from);
        let parts = (max_providers / LEAST_PER_PART).clamp(1, 4 * threads);
        // The cache has a power of two of them, and would round the bound of each up.
        let parts = 1 << parts.ilog2();
        let capacity = max_providers - max_providers % parts;
        let options = OptionsBuilder::new()
            .shards(parts)
            .estimated_items_capacity(capacity)
            .weight_capacity(capacity as u64)
            .build();
        // Fails only without the two capacities.
        let Ok(options) = options else { unreachable!("both capacities are set") };
        let source = source_fn(|_| async { Err(SourceError::configuration("the request has no tenant")) });
        let group = Group { name, is_label: !metrics_by_provider };
        let nobody = TokenProvider::reporting_for(&group, source);
        Self {
            shared: Arc::new(Shared {
                make,
                group,
                cache: Cache::with_options(options, UnitWeighter, RandomState::new(), Pinned),
                max_providers,
                idle_timeout,
                period: AtomicU32::new(0),
                exceeds: AtomicBool::new(false),
                kept: AtomicUsize::new(0),
                eviction: Mutex::default(),
                is_shut_down: AtomicBool::new(false),
                nobody,
            }),
        }
    }

    /// Returns the provider of a key. Makes it if there is none.
    ///
    /// The key need not be cloned for a provider that exists.
    ///
    /// # Errors
    ///
    /// [`Error::Factory`] if the factory failed, or called this for a key without a provider, or with the error of
    /// [`TokenProviderBuilder::build`]. [`Error::ShutDown`] after [`shutdown`](Self::shutdown), for a key without a provider.
    pub fn get<Q>(&self, key: &Q) -> Result<TokenProvider, Error>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ToOwned<Owned = K> + ?Sized,
    {
        self.tenant(key).map(|tenant| tenant.provider.clone())
    }

    #[inline]
    pub(super) fn tenant<Q>(&self, key: &Q) -> Result<Arc<Tenant>, Error>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ToOwned<Owned = K> + ?Sized,
    {
        match self.shared.cache.get(key) {
            Some(tenant) => {
                tenant.used(self.shared.period.load(Ordering::Relaxed));
                Ok(tenant)
            }
            None => self.make(key),
        }
    }

    /// Makes the provider of a key, unless another thread has, or does.
    #[cold]
    fn make<Q>(&self, key: &Q) -> Result<Arc<Tenant>, Error>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ToOwned<Owned = K> + ?Sized,
    {
        let shared = &self.shared;
        // Entered before this waits for another thread: that may be this one, or wait for this one.
        let entered = Entered::new().ok_or_else(|| {
            Error::Factory(Arc::from(BoxError::from(
                "the factory must not call TokenProviders::get for a key without a provider",
            )))
        })?;
        let guard = match shared.cache.get_value_or_guard(key, None) {
            GuardResult::Guard(guard) => guard,
            GuardResult::Value(tenant) => return Ok(tenant),
            // Without a timeout, there is none.
            GuardResult::Timeout => return Err(Error::Interrupted),
        };
        if shared.is_shut_down.load(Ordering::Relaxed) {
            return Err(Error::ShutDown);
        }
        let provider = (shared.make)(&key.to_owned(), &shared.group)?;
        drop(entered);
        let tenant = Arc::new(Tenant::new(provider, shared.period.load(Ordering::Relaxed)));
        let mut evicted = Vec::new();
        // Fails if the key was removed meanwhile: then only the requests that began before use this provider.
        let _ = guard.insert_with_lifecycle(Arc::clone(&tenant), &mut evicted);
        if shared.is_shut_down.load(Ordering::Relaxed) {
            tenant.provider.begin_shutdown();
            shared.cache.remove(key);
            return Err(Error::ShutDown);
        }
        shared.nobody.end_failures();
        for (_, tenant) in &evicted {
            shared.report_eviction(tenant, "capacity");
        }
        shared.report_number();
        eviction::start(shared);
        Ok(tenant)
    }

    /// Removes the provider of a key, such as at a tenant's logout, and returns it.
    ///
    /// Requests that have it use it to their end, and so do its other handles, unless it is
    /// [shut down](TokenProvider::shutdown). The next use of the key calls the factory.
    ///
    /// A record in a store stays there: the next provider that uses the store continues with its token, also if another user
    /// has logged in. Give each login a [namespace](crate::store::NamespacedStore) of its own.
    pub fn remove<Q>(&self, key: &Q) -> Option<TokenProvider>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ?Sized,
    {
        let (_, tenant) = self.shared.cache.remove(key)?;
        self.shared.report_number();
        Some(tenant.provider.clone())
    }

    /// Returns the number of providers.
    pub fn len(&self) -> usize {
        self.shared.cache.len()
    }

    /// Returns whether there is no provider.
    pub fn is_empty(&self) -> bool {
        self.shared.cache.is_empty()
    }

    /// Returns the number of providers that have been idle for too long, and are kept because only this process has their
    /// refresh token. It is counted eight times in each [idle timeout](TokenProvidersBuilder::idle_timeout).
    ///
    /// See [what is not evicted](crate::tenants#how-many-and-for-how-long).
    pub fn kept(&self) -> usize {
        self.shared.kept.load(Ordering::Relaxed)
    }

    /// Returns the keys and the status of their providers, in no order. It is no use of a provider.
    ///
    /// Providers that are made or removed meanwhile may be missing.
    pub fn statuses(&self) -> impl Iterator<Item = (K, Status)> + '_ {
        self.shared.cache.iter().map(|(key, tenant)| (key, tenant.provider.status()))
    }

    /// Shuts all providers down, as [`TokenProvider::shutdown`] does, and waits for their refreshes. No provider is made any
    /// more.
    ///
    /// # Cancel safety
    ///
    /// If the future was polled once, all providers are shut down.
    pub async fn shutdown(&self) {
        self.shared.is_shut_down.store(true, Ordering::Relaxed);
        let providers: Vec<_> = self.shared.cache.iter().map(|(_, tenant)| tenant.provider.clone()).collect();
        join_all(providers.iter().map(TokenProvider::shutdown)).await;
    }

    /// The provider of a request without a tenant, under whose name such requests are reported.
    pub(super) fn nobody(&self) -> &TokenProvider {
        &self.shared.nobody
    }
}

impl<K> Shared<K> {
    /// Reports what concerns the whole group.
    pub(super) fn reporter(&self) -> &Reporter {
        self.nobody.reporter()
    }
}

impl<K> Shared<K>
where
    K: Eq + Hash,
{
    pub(super) fn report_eviction(&self, tenant: &Tenant, reason: &'static str) {
        tenant.provider.reporter().evicted(reason);
        self.reporter().count_eviction(reason);
    }

    /// Reports the number of providers, and when it begins to exceed the bound.
    pub(super) fn report_number(&self) {
        let number = self.cache.len();
        let exceeds = number > self.max_providers;
        let is_news = self.exceeds.swap(exceeds, Ordering::Relaxed) != exceeds && exceeds;
        self.reporter().providers(number, is_news);
    }
}

impl<K> Clone for TokenProviders<K> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

/// Shows no key: a key may be a secret.
impl<K> fmt::Debug for TokenProviders<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenProviders")
            .field("max_providers", &self.shared.max_providers)
            .finish_non_exhaustive()
    }
}

thread_local! {
    static IS_MAKING: Cell<bool> = const { Cell::new(false) };
}

/// Marks that this thread makes a provider.
struct Entered(());

impl Entered {
    /// `None` if this thread makes a provider already.
    fn new() -> Option<Self> {
        (!IS_MAKING.replace(true)).then_some(Self(()))
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        IS_MAKING.set(false);
    }
}
