//! [`TokenProviders`]: the providers by their key, made when they are used first.
//!
//! The cache evicts whatever it likes, under its lock. An evicted provider that is used, or with which something would be
//! lost, is parked: it is found again by its key, and dropped once nothing needs it. What is idle is evicted by those who
//! use the group, without a task.

use std::borrow::Borrow;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use futures_util::future::join_all;
use quick_cache::sync::GuardResult;
use tokio::time::Instant;

use super::builder::{Make, TokenProvidersBuilder};
use super::cache;
use super::cache::{BEING_INSERTED, Evictions, Park, ProviderCache};
use crate::debug::debug_fields;
use crate::error::{BoxError, Error, SourceError};
use crate::observability::{GroupReport, Reporter, millis};
use crate::provider::{Group, Status, TokenProvider, TokenProviderBuilder};
use crate::source::{TokenSource, source_fn};

/// Token providers by key: one for each tenant, made when it is used first.
///
/// A cheap handle: clones share the providers. [`tenants`](crate::tenants) describes how they are used, and when one is
/// evicted.
///
/// ```
/// # async fn run() -> Result<(), tower_bearer::Error> {
/// use tower_bearer::{BoxError, OAuth2, TokenProvider, TokenProviders, oauth2::{ClientAuth, Server}};
///
/// // All tenants are accounts of one client: clones share its secret.
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
    shared: Arc<Members<K>>,
}

struct Members<K> {
    make: Make<K>,
    group: Arc<Group>,
    cache: ProviderCache<K>,
    parked: Park<K>,
    max_providers: usize,
    /// In milliseconds, as all times of the group.
    idle_timeout: u64,
    begun: Instant,
    /// When idle providers are evicted next.
    next_eviction: AtomicU64,
    /// Whether there are more providers than the bound.
    exceeds: AtomicBool,
    is_shut_down: AtomicBool,
    /// Reports what has no tenant. It never has a token.
    nobody: TokenProvider,
}

impl<K> Drop for Members<K> {
    fn drop(&mut self) {
        self.nobody.reporter().providers(0);
    }
}

impl<K: Clone + Eq + Hash + Send + Sync + 'static> TokenProviders<K> {
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

    fn with_options(options: TokenProvidersBuilder<K>) -> Self {
        let TokenProvidersBuilder { make, name, max_providers, idle_timeout, metrics_by_provider } = options;
        let (cache, parked) = cache::cache(max_providers);
        let source = source_fn(|_| async { Err(SourceError::configuration("the request has no tenant")) });
        let shared = Arc::new_cyclic(|shared: &Weak<Members<K>>| {
            let shared = Weak::clone(shared);
            let evict_idle =
                Arc::new(move || shared.upgrade().iter().for_each(|shared| shared.evict_idle(shared.now())));
            let report = Arc::new(GroupReport::new(name, !metrics_by_provider));
            let group = Arc::new(Group { report, evict_idle });
            Members {
                nobody: TokenProvider::reporting_for(&group, source),
                make,
                group,
                cache,
                parked,
                max_providers,
                idle_timeout: idle_timeout.map_or(u64::MAX, millis),
                begun: Instant::now(),
                next_eviction: AtomicU64::new(0),
                exceeds: AtomicBool::new(false),
                is_shut_down: AtomicBool::new(false),
            }
        });
        Self { shared }
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
        let now = self.shared.now();
        let found = self.shared.cache.get(key);
        let provider = found.map_or_else(|| self.make(key), Ok)?;
        provider.used_at().store(now, Ordering::Relaxed);
        self.shared.evict_idle(now);
        Ok(provider)
    }

    /// Makes the provider of a key, unless another thread has, or does.
    #[cold]
    fn make<Q>(&self, key: &Q) -> Result<TokenProvider, Error>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ToOwned<Owned = K> + ?Sized,
    {
        let shared = &self.shared;
        // Entered before this waits for another thread: that may be this one, or wait for this one.
        if IS_MAKING.replace(true) {
            let text = "the factory must not ask its own group for a key without a provider";
            return Err(Error::Factory(Arc::from(BoxError::from(text))));
        }
        let making = Making;
        let guard = match shared.cache.get_value_or_guard(key, None) {
            GuardResult::Guard(guard) => guard,
            GuardResult::Value(provider) => return Ok(provider),
            // Without a timeout, there is none.
            GuardResult::Timeout => return Err(Error::Interrupted),
        };
        let parked = shared.parked.lock().providers.remove(key);
        let is_shut_down = shared.is_shut_down.load(Ordering::Relaxed);
        let provider = match parked {
            Some((provider, _)) => provider,
            None if is_shut_down => return Err(Error::ShutDown),
            None => (shared.make)(&key.to_owned(), &shared.group)?,
        };
        drop(making);
        provider.used_at().store(BEING_INSERTED, Ordering::Relaxed);
        let mut evictions = Evictions::default();
        // Fails if the key was removed meanwhile: then only the requests that began before use this provider.
        let _ = guard.insert_with_lifecycle(provider.clone(), &mut evictions);
        provider.used_at().store(shared.now(), Ordering::Relaxed);
        if !is_shut_down && shared.is_shut_down.load(Ordering::Relaxed) {
            provider.core().shut_down();
            shared.cache.remove(key);
            return Err(Error::ShutDown);
        }
        shared.reporter().made();
        shared.drop_unneeded(evictions, false);
        Ok(provider)
    }

    /// Removes the provider of a key, such as at a tenant's logout, and returns it.
    ///
    /// Requests that have it use it to their end, and so do its other handles, unless it is
    /// [shut down](TokenProvider::shutdown). The next use of the key calls the factory.
    ///
    /// A record in a store stays there, and the next provider that uses the store continues with its login. If the key may
    /// then be another user's, give each login a [namespace](crate::store::NamespacedStore) of its own.
    pub fn remove<Q>(&self, key: &Q) -> Option<TokenProvider>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ?Sized,
    {
        let cached = self.shared.cache.remove(key).map(|(_, provider)| provider);
        let parked = self.shared.parked.lock().providers.remove(key).map(|(provider, _)| provider);
        cached.or(parked).inspect(|_| self.shared.report_number())
    }

    /// Returns the number of providers, those included that are kept beyond the bound.
    pub fn len(&self) -> usize {
        self.shared.sweep(self.shared.now());
        self.shared.number()
    }

    /// Returns whether there is no provider.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the keys and the status of their providers, in no order. It is no use of a provider.
    ///
    /// Providers that are made or removed meanwhile may be missing.
    pub fn statuses(&self) -> impl Iterator<Item = (K, Status)> + '_ {
        self.shared.sweep(self.shared.now());
        // Not lazily: a handle would be a use.
        let all = self.shared.all().into_iter().map(|(key, provider)| (key, provider.status()));
        all.collect::<Vec<_>>().into_iter()
    }

    /// Shuts all providers down, as [`TokenProvider::shutdown`] does, and waits for their refreshes. No provider is made any
    /// more.
    ///
    /// # Cancel safety
    ///
    /// If the future was polled once, all providers are shut down.
    pub async fn shutdown(&self) {
        self.shared.is_shut_down.store(true, Ordering::Relaxed);
        let providers = self.shared.all();
        join_all(providers.values().map(TokenProvider::shutdown)).await;
    }

    /// The provider of a request without a tenant, under whose name such requests are reported.
    pub(crate) fn nobody(&self) -> &TokenProvider {
        &self.shared.nobody
    }
}

impl<K: Clone + Eq + Hash + Send + Sync + 'static> TokenProvidersBuilder<K> {
    /// Builds the group. No provider is made before its first use.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if an option is out of its range.
    pub fn build(self) -> Result<TokenProviders<K>, Error> {
        self.validate()?;
        Ok(TokenProviders::with_options(self))
    }
}

impl<K: Clone + Eq + Hash> Members<K> {
    /// Reports what concerns the whole group.
    fn reporter(&self) -> &Reporter {
        self.nobody.reporter()
    }

    /// The time since the group was made, in milliseconds.
    #[inline]
    fn now(&self) -> u64 {
        millis(self.begun.elapsed())
    }

    fn number(&self) -> usize {
        self.cache.len() + self.parked.lock().providers.len()
    }

    fn all(&self) -> HashMap<K, TokenProvider> {
        // One that is parked meanwhile is there once.
        let mut all: HashMap<_, _> = self.cache.iter().collect();
        let parked = self.parked.lock();
        all.extend(parked.providers.iter().map(|(key, (provider, _))| (key.clone(), provider.clone())));
        all
    }

    /// [Sweeps](Self::sweep), if that was not done in the last eighth of the idle timeout.
    #[inline]
    fn evict_idle(&self, now: u64) {
        if self.next_eviction.load(Ordering::Relaxed) <= now {
            self.sweep(now);
        }
    }

    /// Evicts the providers that have not been used for the idle timeout, and drops what nothing needs any more.
    #[cold]
    fn sweep(&self, now: u64) {
        // At least one: the timeout is at least a second.
        self.next_eviction.store(now + self.idle_timeout / 8, Ordering::Relaxed);
        let evictions = RefCell::default();
        // The cache has one handle.
        self.cache.retain(|key, provider| {
            if provider.has_other_handles() {
                provider.used_at().store(now, Ordering::Relaxed);
            }
            let is_idle = provider.used_at().load(Ordering::Relaxed).saturating_add(self.idle_timeout) <= now;
            if is_idle {
                let (mut evictions, evicted) = (evictions.borrow_mut(), (provider.clone(), "idle"));
                self.parked.evict(&mut evictions, key.clone(), evicted, provider.is_busy());
            }
            !is_idle
        });
        self.drop_unneeded(evictions.into_inner(), true);
    }

    /// Drops the evicted providers that nothing needs. Looks at all that are parked if this `sweeps`.
    fn drop_unneeded(&self, (mut dropped, _replaced): Evictions<K>, sweeps: bool) {
        dropped.extend(self.parked.take_unneeded(sweeps));
        for (_, (provider, reason)) in &dropped {
            // The event names the tenant, the metric the group.
            provider.reporter().evicted(reason);
            self.reporter().count("tower_bearer_evictions_total", &[("reason", reason)]);
        }
        self.report_number();
    }

    /// Reports the number of providers, and when it begins to exceed the bound.
    fn report_number(&self) {
        let number = self.number();
        let exceeds = number > self.max_providers;
        let is_news = !self.exceeds.swap(exceeds, Ordering::Relaxed) && exceeds;
        self.reporter().providers(number);
        if is_news {
            self.reporter().exceeds_bound(number);
        }
    }
}

impl<K> Clone for TokenProviders<K> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

// No key: a key may be a secret.
debug_fields!(TokenProviders<K> |it| { max_providers: it.shared.max_providers });

thread_local! {
    /// Whether this thread makes a provider.
    static IS_MAKING: Cell<bool> = const { Cell::new(false) };
}

/// Exists while this thread makes a provider.
struct Making;

impl Drop for Making {
    fn drop(&mut self) {
        IS_MAKING.set(false);
    }
}
