//! [`Health`]: whether the store can be used, as its operations show; and [`StoreStatus`], what a provider's status says
//! of it.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use super::{StoreError, StoreErrorKind};
use crate::observability::Reporter;

/// Whether a provider's store can be used, in [`Status::store`](crate::Status#structfield.store).
///
/// A store that can be read but not written cannot be used by a member or a publisher: it counts as failing until a
/// lease or a publication succeeds.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct StoreStatus {
    /// For how long the store has failed. `None` if it can be used, or has not been used yet.
    pub failing_for: Option<Duration>,
    /// Why the newest operation that failed did so. `None` if the store can be used.
    pub error: Option<StoreError>,
}

impl StoreStatus {
    /// Whether the store can be used, as far as is known.
    pub fn is_usable(&self) -> bool {
        self.failing_for.is_none()
    }
}

/// What an operation needs of the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    Write,
}

/// What the operations of a store have shown. Its lock is a leaf: nothing else is locked or called while it is held.
pub(super) struct Health {
    reporter: Reporter,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Whether any operation has succeeded or failed.
    is_known: bool,
    outage: Option<Outage>,
    /// Whether the record that was read last is invalid.
    has_invalid_record: bool,
}

struct Outage {
    since: Instant,
    failures: u64,
    error: StoreError,
    /// What fails. The outage lasts until both have succeeded.
    reads: bool,
    writes: bool,
}

impl Health {
    pub(super) fn new(reporter: Reporter) -> Self {
        Self { reporter, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records the result of an operation. An invalid record is not a failure of the store.
    pub(super) fn record<T>(&self, access: Access, result: &Result<T, StoreError>) {
        match result {
            Err(error) if error.kind() != StoreErrorKind::InvalidRecord => self.failed(access, error),
            _ => self.succeeded(access),
        }
    }

    fn failed(&self, access: Access, error: &StoreError) {
        let is_first = {
            let mut state = self.state();
            state.is_known = true;
            let is_first = state.outage.is_none();
            let outage = state.outage.get_or_insert_with(|| Outage {
                since: Instant::now(),
                failures: 0,
                error: error.clone(),
                reads: false,
                writes: false,
            });
            outage.failures += 1;
            outage.error = error.clone();
            match access {
                Access::Read => outage.reads = true,
                Access::Write => outage.writes = true,
            }
            is_first
        };
        if is_first {
            self.reporter.store_failing(error);
        }
    }

    fn succeeded(&self, access: Access) {
        let (is_first, ended) = {
            let mut state = self.state();
            let is_first = !std::mem::replace(&mut state.is_known, true);
            if let Some(outage) = &mut state.outage {
                match access {
                    Access::Read => outage.reads = false,
                    Access::Write => outage.writes = false,
                }
            }
            (is_first, state.outage.take_if(|outage| !outage.reads && !outage.writes))
        };
        if let Some(Outage { since, failures, .. }) = ended {
            self.reporter.store_recovered(since.elapsed(), failures);
        } else if is_first {
            self.reporter.store_usable(true);
        }
    }

    /// Records whether the record that was read is valid. Returns true if it is the first invalid one in a row.
    pub(super) fn record_is_valid(&self, is_valid: bool) -> bool {
        !is_valid & !std::mem::replace(&mut self.state().has_invalid_record, !is_valid)
    }

    pub(super) fn is_failing(&self) -> bool {
        self.state().outage.is_some()
    }

    pub(super) fn status(&self) -> StoreStatus {
        let state = self.state();
        let outage = state.outage.as_ref();
        StoreStatus {
            failing_for: outage.map(|outage| outage.since.elapsed()),
            error: outage.map(|outage| outage.error.clone()),
        }
    }
}
