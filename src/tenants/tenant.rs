//! [`Tenant`]: the provider of one key, and what is known of its use. [`Pinned`]: which tenants are not evicted.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU32, Ordering},
};

use quick_cache::Lifecycle;

use crate::{provider::TokenProvider, retry::Budgets};

/// The provider of one key, and what its requests share besides.
#[derive(Debug)]
pub struct Tenant {
    pub(crate) provider: TokenProvider,
    pub(crate) budgets: Budgets,
    /// The number of the last period in which it was used.
    used_in: AtomicU32,
    /// Whether it is counted as kept.
    is_kept: AtomicBool,
}

impl Tenant {
    pub(super) fn new(provider: TokenProvider, period: u32) -> Self {
        Self {
            provider,
            budgets: Budgets::default(),
            used_in: period.into(),
            is_kept: AtomicBool::new(false),
        }
    }

    /// Records a use. Only the first of a period writes, so that threads do not take the cache line from each other.
    #[inline]
    pub(super) fn used(&self, period: u32) {
        if self.used_in.load(Ordering::Relaxed) != period {
            self.used_in.store(period, Ordering::Relaxed);
        }
    }

    /// How many periods ago it was used last.
    pub(super) fn idle_periods(&self, period: u32) -> u32 {
        period.wrapping_sub(self.used_in.load(Ordering::Relaxed))
    }

    /// Records whether it is kept. Returns whether that is news.
    pub(super) fn set_kept(&self, is_kept: bool) -> bool {
        self.is_kept.swap(is_kept, Ordering::Relaxed) != is_kept
    }
}

/// Whether a request or a handle uses the tenant. `own`: how many references the caller and the cache have.
pub(super) fn is_in_use(tenant: &Arc<Tenant>, own: usize) -> bool {
    Arc::strong_count(tenant) > own || tenant.provider.has_other_handles()
}

/// Whether something would be lost with the tenant. `own`: as for [`is_in_use`].
pub(super) fn is_pinned(tenant: &Arc<Tenant>, own: usize) -> bool {
    is_in_use(tenant, own) || tenant.provider.is_refreshing() || tenant.provider.holds_only_copy()
}

/// Keeps the cache from evicting a tenant with which something would be lost.
#[derive(Clone, Debug)]
pub(super) struct Pinned;

impl<K> Lifecycle<K, Arc<Tenant>> for Pinned {
    /// What was evicted, to be dropped without the cache's lock: the drop of a source or a key is foreign code.
    type RequestState = Vec<(K, Arc<Tenant>)>;

    /// Runs under the cache's lock, which a use of the tenant needs as well: none can begin meanwhile.
    fn is_pinned(&self, _: &K, tenant: &Arc<Tenant>) -> bool {
        is_pinned(tenant, 1)
    }

    fn on_evict(&self, evicted: &mut Self::RequestState, key: K, tenant: Arc<Tenant>) {
        evicted.push((key, tenant));
    }
}
