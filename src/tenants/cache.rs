//! [`Park`]: what the cache of providers evicts, until nothing needs it.

use std::collections::HashMap;
use std::hash::{Hash, RandomState};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use quick_cache::{Lifecycle, OptionsBuilder, UnitWeighter};

use crate::provider::TokenProvider;

/// How many providers a part of the cache has at least: a part with fewer would often be full before the others.
const LEAST_PER_PART: usize = 1000;

/// How many providers are parked before those that nothing needs any more are looked for.
const LEAST_PARKED: usize = 16;

/// The time of a provider that is being inserted.
pub(super) const BEING_INSERTED: u64 = u64::MAX;

pub(super) type ProviderCache<K> =
    quick_cache::sync::Cache<K, TokenProvider, UnitWeighter, RandomState, Park<K>>;

/// A provider, and why it was evicted.
type Evicted = (TokenProvider, &'static str);

/// What is dropped without a lock, since the drop of a source is foreign code: the evicted providers that nothing needs, and
/// those that others have replaced in the [`Park`].
pub(super) type Evictions<K> = (Vec<(K, Evicted)>, Vec<Evicted>);

/// The evicted providers that are used, or with which something would be lost. A use of the key finds them here. Clones
/// share them.
#[derive(Clone)]
pub(super) struct Park<K>(Arc<Mutex<Parked<K>>>);

pub(super) struct Parked<K> {
    pub(super) providers: HashMap<K, Evicted>,
    /// With so many, all are looked at: each insertion pays for few of them.
    sweep_at: usize,
}

/// Makes the cache, and what it evicts to.
pub(super) fn cache<K: Clone + Eq + Hash>(max_providers: usize) -> (ProviderCache<K>, Park<K>) {
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
    let parked = Parked { providers: HashMap::new(), sweep_at: LEAST_PARKED };
    let park = Park(Arc::new(Mutex::new(parked)));
    (ProviderCache::with_options(options, UnitWeighter, RandomState::new(), park.clone()), park)
}

impl<K: Clone + Eq + Hash> Park<K> {
    pub(super) fn lock(&self) -> MutexGuard<'_, Parked<K>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Parks a provider that the cache evicts, under its lock, unless nothing needs it.
    pub(super) fn evict(&self, evictions: &mut Evictions<K>, key: K, evicted: Evicted, is_needed: bool) {
        if is_needed {
            evictions.1.extend(self.lock().providers.insert(key, evicted));
        } else {
            evictions.0.push((key, evicted));
        }
    }

    /// Takes the parked providers that nothing needs any more, if this `sweeps` or there are many.
    pub(super) fn take_unneeded(&self, sweeps: bool) -> Vec<(K, Evicted)> {
        let mut parked = self.lock();
        if !sweeps && parked.providers.len() < parked.sweep_at {
            return Vec::new();
        }
        let unneeded = parked.providers.iter().filter(|(_, (provider, _))| !is_needed(provider));
        let keys: Vec<_> = unneeded.map(|(key, _)| key.clone()).collect();
        let taken = keys.iter().filter_map(|key| parked.providers.remove_entry(key)).collect();
        parked.sweep_at = LEAST_PARKED.max(2 * parked.providers.len());
        taken
    }
}

/// Whether somebody uses the provider whose only other handle this is, or something would be lost with it.
fn is_needed(provider: &TokenProvider) -> bool {
    provider.has_other_handles() || provider.is_busy()
}

impl<K: Clone + Eq + Hash> Lifecycle<K, TokenProvider> for Park<K> {
    type RequestState = Evictions<K>;

    /// The cache would prefer to evict what is new.
    fn is_pinned(&self, _: &K, provider: &TokenProvider) -> bool {
        provider.used_at().load(Ordering::Relaxed) == BEING_INSERTED
    }

    fn on_evict(&self, evictions: &mut Evictions<K>, key: K, provider: TokenProvider) {
        let is_needed = is_needed(&provider);
        self.evict(evictions, key, (provider, "capacity"), is_needed);
    }
}
