//! The task that evicts idle providers.

use std::{
    hash::Hash,
    sync::{Arc, PoisonError, Weak, atomic::Ordering},
    time::Duration,
};

use tokio::{runtime::Handle, task::yield_now, time::sleep};

use super::{
    providers::Shared,
    tenant::{Tenant, is_in_use, is_pinned},
};

/// How many periods an idle timeout has.
const PERIODS: u32 = 8;

/// How many providers are looked at before other tasks get their turn.
const BATCH: usize = 256;

/// Starts the task, if providers are to be evicted and none runs.
pub(super) fn start<K>(shared: &Arc<Shared<K>>)
where
    K: Clone + Eq + Hash + Send + Sync + 'static,
{
    let (Some(timeout), Ok(runtime)) = (shared.idle_timeout, Handle::try_current()) else { return };
    let mut task = shared.eviction.lock().unwrap_or_else(PoisonError::into_inner);
    if task.as_ref().is_none_or(|task| task.is_finished()) {
        *task = Some(runtime.spawn(run(Arc::downgrade(shared), timeout / PERIODS)).abort_handle());
    }
}

/// Runs until the last handle is dropped, which aborts it.
async fn run<K>(shared: Weak<Shared<K>>, period: Duration)
where
    K: Clone + Eq + Hash + Send + Sync + 'static,
{
    loop {
        sleep(period).await;
        let Some(shared) = shared.upgrade() else { return };
        evict_idle(&shared).await;
    }
}

/// Begins the next period, and evicts the providers that were not used in the last [`PERIODS`].
async fn evict_idle<K>(shared: &Shared<K>)
where
    K: Clone + Eq + Hash + Send + Sync + 'static,
{
    let period = shared.period.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
    let mut kept = 0;
    for (number, (key, tenant)) in shared.cache.iter().enumerate() {
        if number % BATCH == BATCH - 1 {
            yield_now().await;
        }
        // The cache has one reference, and this task another.
        if is_in_use(&tenant, 2) {
            tenant.used(period);
        }
        let is_idle = tenant.idle_periods(period) > PERIODS;
        let is_kept = is_idle && tenant.provider.holds_only_copy();
        kept += usize::from(is_kept);
        if tenant.set_kept(is_kept) && is_kept {
            tenant.provider.reporter().kept();
        }
        if !is_idle || is_kept {
            continue;
        }
        drop(tenant);
        let is_idle = |tenant: &Arc<Tenant>| tenant.idle_periods(period) > PERIODS && !is_pinned(tenant, 1);
        if let Some((_, tenant)) = shared.cache.remove_if(&key, is_idle) {
            shared.report_eviction(&tenant, "idle");
        }
    }
    shared.report_number();
    let was_kept = shared.kept.swap(kept, Ordering::Relaxed);
    shared.reporter().providers_kept(kept, kept > 0 && was_kept == 0);
}
