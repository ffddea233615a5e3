//! [`TokenProviders`]: the providers by their key, made when they are used first.
//!
//! The cache evicts whatever it likes, under its lock. An evicted provider that is used, or with which something would be
//! lost, is parked: it is found again by its key, and dropped once nothing needs it. What is idle is evicted by those who
//! use the group, without a task.

use std::{
    borrow::Borrow,
    cell::{Cell, RefCell},
    collections::HashMap,
    fmt,
    hash::{Hash, RandomState},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
};

use futures_util::future::join_all;
use quick_cache::{
    Lifecycle, OptionsBuilder, UnitWeighter,
    sync::{Cache, GuardResult},
};
use tokio::time::Instant;

use super::builder::{Make, TokenProvidersBuilder};
use crate::{
    error::{BoxError, Error, SourceError},
    observability::{Reporter, millis},
    provider::{Group, Status, TokenProvider, TokenProviderBuilder},
    source::{TokenSource, source_fn},
};

/// How many providers a part of the cache has at least: a part with fewer would often be full before the others.
const LEAST_PER_PART: usize = 1000;

/// How many providers are parked before those that nothing needs any more are looked for.
const LEAST_PARKED: usize = 16;

/// The time of a provider that is being inserted.
const BEING_INSERTED: u64 = u64::MAX;

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
    shared: Arc<Shared<K>>,
}

struct Shared<K> {
    make: Make<K>,
    group: Arc<Group>,
    cache: Cache<K, TokenProvider, UnitWeighter, RandomState, Park<K>>,
    /// The evicted providers that are used, or with which something would be lost.
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

/// Evicted providers, until nothing needs them.
struct Parked<K> {
    providers: HashMap<K, TokenProvider>,
    /// With so many, all are looked at: each insertion pays for few of them.
    sweep_at: usize,
}

/// Parks what the cache evicts, under its lock: a use of the key finds it here. Its user drops what nothing needs without
/// the lock, since the drop of a source is foreign code.
struct Park<K>(Arc<Mutex<Parked<K>>>);

impl<K> Clone for Park<K> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<K> Park<K> {
    fn lock(&self) -> MutexGuard<'_, Parked<K>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Clone + Eq + Hash> Lifecycle<K, TokenProvider> for Park<K> {
    /// The keys of what was evicted, and what was parked under them before.
    type RequestState = Vec<(K, Option<TokenProvider>)>;

    /// The cache would prefer to evict what is new.
    fn is_pinned(&self, _: &K, provider: &TokenProvider) -> bool {
        provider.used_at().load(Ordering::Relaxed) == BEING_INSERTED
    }

    fn on_evict(&self, evicted: &mut Self::RequestState, key: K, provider: TokenProvider) {
        let before = self.lock().providers.insert(key.clone(), provider);
        evicted.push((key, before));
    }
}

impl<K> Drop for Shared<K> {
    fn drop(&mut self) {
        self.nobody.reporter().providers(0);
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

    fn with_options(options: TokenProvidersBuilder<K>) -> Self {
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
        let parked = Parked { providers: HashMap::new(), sweep_at: LEAST_PARKED };
        let parked = Park(Arc::new(Mutex::new(parked)));
        let shared = Arc::new_cyclic(|shared: &Weak<Shared<K>>| {
            let of_group = Weak::clone(shared);
            let evict_idle = move || {
                if let Some(shared) = of_group.upgrade() {
                    shared.evict_idle(shared.now());
                }
            };
            let evict_idle = Arc::new(evict_idle);
            let group = Arc::new(Group { name, is_label: !metrics_by_provider, evict_idle });
            Shared {
                nobody: TokenProvider::reporting_for(&group, source),
                make,
                group,
                cache: Cache::with_options(options, UnitWeighter, RandomState::new(), parked.clone()),
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
        let text = "the factory must not call TokenProviders::get for a key without a provider";
        let entered = Entered::new().ok_or_else(|| Error::Factory(Arc::from(BoxError::from(text))))?;
        let guard = match shared.cache.get_value_or_guard(key, None) {
            GuardResult::Guard(guard) => guard,
            GuardResult::Value(provider) => return Ok(provider),
            // Without a timeout, there is none.
            GuardResult::Timeout => return Err(Error::Interrupted),
        };
        let parked = shared.parked.lock().providers.remove(key);
        let is_shut_down = shared.is_shut_down.load(Ordering::Relaxed);
        let provider = match parked {
            Some(provider) => provider,
            None if is_shut_down => return Err(Error::ShutDown),
            None => (shared.make)(&key.to_owned(), &shared.group)?,
        };
        drop(entered);
        provider.used_at().store(BEING_INSERTED, Ordering::Relaxed);
        let mut evicted = Vec::new();
        // Fails if the key was removed meanwhile: then only the requests that began before use this provider.
        let _ = guard.insert_with_lifecycle(provider.clone(), &mut evicted);
        provider.used_at().store(shared.now(), Ordering::Relaxed);
        if !is_shut_down && shared.is_shut_down.load(Ordering::Relaxed) {
            provider.core().shut_down();
            shared.cache.remove(key);
            return Err(Error::ShutDown);
        }
        shared.reporter().made();
        shared.evicted(evicted, "capacity");
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
        let parked = self.shared.parked.lock().providers.remove(key);
        let provider = cached.or(parked)?;
        self.shared.report_number();
        Some(provider)
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

impl<K> TokenProvidersBuilder<K>
where
    K: Clone + Eq + Hash + Send + Sync + 'static,
{
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

impl<K> Shared<K> {
    /// Reports what concerns the whole group.
    fn reporter(&self) -> &Reporter {
        self.nobody.reporter()
    }

    /// The time since the group was made, in milliseconds.
    #[inline]
    fn now(&self) -> u64 {
        millis(self.begun.elapsed())
    }
}

impl<K> Shared<K>
where
    K: Clone + Eq + Hash,
{
    fn number(&self) -> usize {
        self.cache.len() + self.parked.lock().providers.len()
    }

    fn all(&self) -> HashMap<K, TokenProvider> {
        // One that is parked meanwhile is there once.
        let mut all: HashMap<_, _> = self.cache.iter().collect();
        all.extend(self.parked.lock().providers.clone());
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
        let evicted = RefCell::default();
        // The cache has one handle.
        self.cache.retain(|key, provider| {
            if provider.has_other_handles() {
                provider.used_at().store(now, Ordering::Relaxed);
            }
            let is_idle = provider.used_at().load(Ordering::Relaxed).saturating_add(self.idle_timeout) <= now;
            if is_idle {
                self.parked.on_evict(&mut evicted.borrow_mut(), key.clone(), provider.clone());
            }
            !is_idle
        });
        self.parked.lock().sweep_at = 0;
        // If none was idle, those that are dropped were evicted before.
        let reason = if evicted.borrow().is_empty() { "capacity" } else { "idle" };
        self.evicted(evicted.into_inner(), reason);
    }

    /// Drops the evicted providers that nobody uses and with which nothing would be lost, and now and then those that were
    /// parked and are not needed any more.
    fn evicted(&self, evicted: Vec<(K, Option<TokenProvider>)>, reason: &'static str) {
        let (mut keys, before): (Vec<_>, Vec<_>) = evicted.into_iter().unzip();
        drop(before);
        let mut dropped = Vec::new();
        {
            let mut parked = self.parked.lock();
            let is_due = parked.providers.len() >= parked.sweep_at;
            if is_due {
                keys = parked.providers.keys().cloned().collect();
            }
            for key in keys {
                let is_needed = |provider: &TokenProvider| provider.has_other_handles() || provider.is_busy();
                if parked.providers.get(&key).is_some_and(|provider| !is_needed(provider)) {
                    dropped.extend(parked.providers.remove_entry(&key));
                }
            }
            if is_due {
                parked.sweep_at = LEAST_PARKED.max(2 * parked.providers.len());
            }
        }
        for (_, provider) in &dropped {
            provider.reporter().evicted(reason);
            self.reporter().count("tower_bearer_evictions_total", &[("reason", reason)]);
        }
        self.report_number();
    }

    /// Reports the number of providers, and when it begins to exceed the bound.
    fn report_number(&self) {
        let number = self.number();
        let exceeds = number > self.max_providers;
        let is_news = self.exceeds.swap(exceeds, Ordering::Relaxed) != exceeds && exceeds;
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
