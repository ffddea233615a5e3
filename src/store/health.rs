//! [`Health`]: whether the store can be used, as its operations show. [`StoreStatus`]: what a provider's status says of
//! it.

use std::mem;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::{Role, StoreError};
use crate::observability::Reporter;

/// Whether a provider's store can be used, in [`Status::store`](crate::Status#structfield.store).
///
/// An outage begins when an operation fails, and ends when each kind of operation that failed works again:
///
/// - a read, with the next read;
/// - a lease that was not granted or extended because of an error, with the next one that is. That another process has
///   the lease does not show that the store can be written;
/// - a lease that was not granted within five lease lengths, when it is granted, or a token is adopted;
/// - the release of a lease, with the next release;
/// - a token that could not be stored, when it has been stored, or another process has stored a newer one.
///
/// A token that is stored ends the failures of reads and leases, too. A store that can be read but not written can
/// therefore be used by a reader, and not by a member or a publisher. An invalid record is not a failure of the store,
/// except for a user's [login](crate::TokenProviderBuilder::login).
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct StoreStatus {
    /// How long the outage has lasted. `None` if there is none.
    pub failing_for: Option<Duration>,
    /// The newest failure of the outage. `None` if there is none.
    pub error: Option<StoreError>,
}

impl StoreStatus {
    /// Returns whether there is no outage. Before the first use of the store, there is none.
    pub fn is_usable(&self) -> bool {
        self.failing_for.is_none()
    }
}

/// What can fail, until the same succeeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Load = 1,
    Lease = 2,
    /// The wait for a lease that another process has.
    Wait = 4,
    Release = 8,
    /// Its success ends the failures of all that is needed for it.
    Publish = 16,
}

impl Operation {
    /// The operations that are known to work if this one does.
    fn shown(self) -> u8 {
        match self {
            Self::Publish => Self::Publish as u8 | Self::Load as u8 | Self::Lease as u8 | Self::Wait as u8,
            other => other as u8,
        }
    }
}

/// What the operations of a store have shown.
pub(crate) struct Health {
    reporter: Reporter,
    /// Nothing else is locked while it is held, and no foreign code runs: neither a subscriber nor the drop of an error.
    state: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    outage: Option<Outage>,
    /// Whether this process has leased and released, or published.
    has_written: bool,
    /// Whether the record that was read last is invalid.
    has_invalid_record: bool,
}

struct Outage {
    since: Instant,
    failures: u64,
    error: StoreError,
    /// The operations that fail, as bits.
    failing: u8,
}

impl Health {
    pub(super) fn new(reporter: Reporter) -> Self {
        reporter.register_store();
        Self { reporter, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, Seen> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records the result of an operation.
    pub(super) fn record<T>(&self, operation: Operation, result: &Result<T, StoreError>) {
        match result {
            Ok(_) => self.succeeded(operation),
            Err(error) => self.failed(operation, error),
        }
    }

    pub(super) fn failed(&self, operation: Operation, error: &StoreError) {
        let begin = || Outage { since: Instant::now(), failures: 0, error: error.clone(), failing: 0 };
        let (is_first, _dropped_unlocked) = {
            let mut state = self.state();
            let is_first = state.outage.is_none();
            let outage = state.outage.get_or_insert_with(begin);
            outage.failures += 1;
            outage.failing |= operation as u8;
            (is_first, mem::replace(&mut outage.error, error.clone()))
        };
        if is_first {
            self.report_gauge();
            self.reporter.store_failing(error);
        }
    }

    pub(super) fn succeeded(&self, operation: Operation) {
        self.state().has_written |= matches!(operation, Operation::Release | Operation::Publish);
        self.end(operation.shown());
    }

    /// Records that no token has to be stored any more, because another process has stored a newer one.
    pub(crate) fn nothing_to_publish(&self) {
        self.end(Operation::Publish as u8);
    }

    /// Ends the failures of these operations.
    fn end(&self, operations: u8) {
        let ended = {
            let mut state = self.state();
            if let Some(outage) = &mut state.outage {
                outage.failing &= !operations;
            }
            state.outage.take_if(|outage| outage.failing == 0)
        };
        if let Some(Outage { since, failures, .. }) = ended {
            self.report_gauge();
            self.reporter.store_recovered(since.elapsed(), failures);
        }
    }

    /// Sets the gauge to what is known now.
    fn report_gauge(&self) {
        loop {
            let is_failing = self.is_failing();
            self.reporter.store_usable(!is_failing);
            // Otherwise the value that was read first could be set last.
            if self.is_failing() == is_failing {
                return;
            }
        }
    }

    /// Records whether the record that was read is valid. Returns true if it is the first invalid one in a row.
    pub(super) fn record_is_valid(&self, is_valid: bool) -> bool {
        let was_invalid = mem::replace(&mut self.state().has_invalid_record, !is_valid);
        !is_valid && !was_invalid
    }

    /// Whether something fails, or it is not known that a process of this role can write.
    pub(crate) fn needs_check(&self, role: Role) -> bool {
        let state = self.state();
        state.outage.is_some() || (role != Role::Reader && !state.has_written)
    }

    pub(crate) fn is_failing(&self) -> bool {
        self.state().outage.is_some()
    }

    pub(crate) fn status(&self) -> StoreStatus {
        let state = self.state();
        let outage = state.outage.as_ref().map(|outage| (outage.since.elapsed(), outage.error.clone()));
        let (failing_for, error) = outage.unzip();
        StoreStatus { failing_for, error }
    }
}
