//! [`Action`]: the steps of the protocol and the faults, and which are possible in a state.

use super::{
    check::{Lease, Mutant},
    fleet::{Answer, At, Endpoint, Faults, Fleet, Process, Publisher, Reuse},
};

/// A step of the process with this index, or of what is around the processes. A fault uses up one of [`Faults`].
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub(crate) enum Action {
    /// `with_store` reads the record: `newest`, `is_presented_by_another`.
    Read(usize),
    ReadFails(usize),
    /// `lease_or_wait`: the store grants the lease.
    TakeLease(usize),
    LeaseFails(usize),
    /// The lease is granted, but the answer is lost.
    GrantLost(usize),
    /// `with_store` reads again: `adopt_if_newer`, `take_up`, `compare_with`.
    ReadUnderLease(usize),
    ReadUnderLeaseFails(usize),
    /// `prepare` and `mark`; then the request is sent (`ask`).
    Present(usize),
    MarkFails(usize),
    /// The mark is stored, but the answer is lost.
    MarkLost(usize),
    /// The endpoint processes the request.
    Serve(usize),
    RequestLost(usize),
    AnswerLost(usize),
    /// `granted`, or `is_over`, a read and `failed`.
    Receive(usize),
    /// The answer is a rejection, and the read before it counts fails.
    ReceiveAndReadFails(usize),
    /// `publish_under`: what the exchange has changed.
    Publish(usize),
    /// For as long as `publish_for_a_lease` tries.
    PublishFails(usize),
    /// The record is stored, but the answer is lost.
    PublicationLost(usize),
    Release(usize),
    ReleaseFails(usize),
    /// `publish_later`: under the lease of the exchange, or one of its own (`publish_unless_newer`).
    PublishLater(usize),
    LeaseToPublish(usize),
    PublicationLostLater(usize),
    /// `PUBLISH_GRACE` has passed, and no process is about to store something.
    MarkWaited(usize),
    MarkWaitedEarly(usize),
    /// The lease of a process that was killed, or that has given it up.
    LeaseEnds,
    LeaseEndsEarly,
    /// No operation of the store works for longer than a lease.
    Outage,
    /// The same, while a process asks the endpoint.
    OutageEarly,
    RecordLost,
    /// All access tokens of now are about to expire.
    Age,
    /// They expire.
    Expire,
    /// The endpoint does not accept the refresh token that was spent last any more.
    GraceEnds,
    /// A need of a process whose access token is about to expire.
    Begin(usize),
    Crash(usize),
    /// Killed after the endpoint has processed its request.
    CrashAfterRequest(usize),
    Restart(usize),
}

/// What a read before the lease says.
#[derive(PartialEq, Eq)]
enum Found {
    Usable,
    Presented(u8),
    Other,
}

impl Lease {
    fn found(&self, fleet: &Fleet, process: &Process) -> Found {
        let mut process = process.clone();
        if self.newest(&mut process, fleet.store.record) {
            Found::Usable
        } else if self.is_presented_by_another(&mut process, fleet.store.record) {
            Found::Presented(process.seen_mark.unwrap_or_default().0)
        } else {
            Found::Other
        }
    }

    /// Whether a read leads on. A process whose login has ended fails fast until another one has stored something newer.
    fn reads(&self, fleet: &Fleet, process: &Process) -> bool {
        let found = || self.found(fleet, process);
        match process.at {
            At::Idle if process.has_ended() => {
                let record = fleet.store.record.as_ref();
                record.is_some_and(|record| !self.is_newer(process.known, record))
            }
            At::Idle => process.needs(),
            At::Asks => found() != Found::Other,
            At::Waits => found() != Found::Presented(process.seen_mark.unwrap_or_default().0),
            _ => false,
        }
    }

    pub(crate) fn possible(&self, fleet: &Fleet, actions: &mut Vec<Action>) {
        let Faults { total, expiries, .. } = fleet.left;
        let left = if total > 0 { fleet.left } else { Faults::default() };
        let leased = fleet.store.lease;
        let Endpoint { granted, expiring, last, .. } = fleet.endpoint;
        let asks = fleet.presented().next().is_some();
        // The time that a stopped process loses is less than an access token lives.
        let may_stop = self.faults.early + self.faults.rollbacks > 0;
        let works = fleet.processes.iter().any(|process| process.at.fence().is_some());
        let may_age = expiries > 0 && expiring == 0 && granted > 0;
        actions.extend((may_age && !(may_stop && works)).then_some(Action::Age));
        actions.extend((expiring > 0).then_some(Action::Expire));
        let stored = fleet.store.record.and_then(|record| record.refresh_token);
        let is_spent = stored.is_some_and(|stored| fleet.endpoint.has_spent(stored));
        let in_grace = self.reuse == Reuse::Grace && last.is_some();
        actions.extend((in_grace && is_spent && fleet.is_idle()).then_some(Action::GraceEnds));
        if let Some(lease) = leased {
            let is_extended = fleet.is_extended(lease);
            let never_ends = self.mutant == Some(Mutant::LeaseNeverEnds);
            actions.extend((!is_extended && !never_ends).then_some(Action::LeaseEnds));
            actions.extend((is_extended && left.early > 0).then_some(Action::LeaseEndsEarly));
        }
        actions.extend((!asks && left.outages > 0).then_some(Action::Outage));
        actions.extend((asks && left.early > 0).then_some(Action::OutageEarly));
        if left.rollbacks > 0 && fleet.store.record.is_some() {
            actions.push(Action::RecordLost);
        }
        for (index, process) in fleet.processes.iter().enumerate() {
            self.possible_for(fleet, index, process, left, actions);
        }
    }

    fn possible_for(
        &self,
        fleet: &Fleet,
        index: usize,
        process: &Process,
        left: Faults,
        actions: &mut Vec<Action>,
    ) {
        use Action::*;
        let is_free = fleet.store.lease.is_none() || self.mutant == Some(Mutant::IgnoresLease);
        let mut may = |is_possible: bool, step: fn(usize) -> Action| {
            if is_possible {
                actions.push(step(index));
            }
        };
        let store = left.store > 0;
        may(process.at == At::Down, Restart);
        may(process.at != At::Down && left.crashes > 0, Crash);
        let reads = self.reads(fleet, process);
        let expires = process.is_expiring && !process.refreshes && !process.has_ended();
        may(process.at == At::Idle && expires, Begin);
        may(reads, Read);
        may(reads && store, ReadFails);
        match process.at {
            At::Asks => {
                may(is_free, TakeLease);
                may(is_free && store, LeaseFails);
                may(is_free && store, GrantLost);
            }
            At::Waits => {
                let is_over = !fleet.is_about_to_store(index);
                may(is_over && !reads, MarkWaited);
                may(!is_over && !reads && left.early > 0, MarkWaitedEarly);
            }
            At::Leased(_) => {
                may(true, ReadUnderLease);
                may(store, ReadUnderLeaseFails);
            }
            At::Read(_) => {
                may(true, Present);
                may(store && !process.has_ended(), MarkFails);
                may(store && !process.has_ended(), MarkLost);
            }
            At::Sent(..) => {
                may(true, Serve);
                may(left.lost > 0, RequestLost);
                may(left.lost > 0, AnswerLost);
                may(left.crashes > 0, CrashAfterRequest);
            }
            At::Answered(_, _, answer) => {
                may(true, Receive);
                may(store && answer == Answer::Rejected, ReceiveAndReadFails);
            }
            At::Publishes(_) => {
                may(true, Publish);
                may(store, PublishFails);
                may(store, PublicationLost);
            }
            At::Releases(_) => {
                may(true, Release);
                may(store, ReleaseFails);
            }
            At::Down | At::Idle => {}
        }
        match process.publisher {
            Publisher::None => {}
            Publisher::Waits => may(is_free || !process.is_unstored, LeaseToPublish),
            Publisher::Keeps(_) | Publisher::Leased(_) => {
                may(true, PublishLater);
                may(store && process.is_unstored, PublicationLostLater);
            }
        }
    }
}
