//! What each step changes.

use super::{
    actions::Action,
    check::{Lease, Mutant},
    fleet::{Answer, At, Fleet, Known, Process, Publisher},
};

impl Lease {
    /// Takes a step. Panics if it is not [`possible`](Self::possible).
    pub(crate) fn take(&self, fleet: &mut Fleet, action: Action) {
        use Action::*;
        match action {
            LeaseEnds => fleet.store.lease = None,
            LeaseEndsEarly => {
                fleet.store.lease = None;
                fleet.left.early -= 1;
                fleet.left.total -= 1;
            }
            Outage | OutageEarly => {
                let left = &mut fleet.left;
                let kind = if action == Outage { &mut left.outages } else { &mut left.early };
                (*kind, left.total) = (*kind - 1, left.total - 1);
                fleet.store.lease = None;
                fleet.processes.iter_mut().for_each(outage);
            }
            RecordLost => {
                (fleet.store.record, fleet.store.lease) = (fleet.store.previous, None);
                fleet.left.rollbacks -= 1;
                fleet.left.total -= 1;
            }
            Age => {
                fleet.left.expiries -= 1;
                fleet.endpoint.expiring = fleet.endpoint.granted;
                fleet
                    .processes
                    .iter_mut()
                    .for_each(|process| process.is_expiring = process.access_token != 0);
            }
            Expire => expire(fleet),
            GraceEnds => fleet.endpoint.last = None,
            Read(index)
            | ReadFails(index)
            | TakeLease(index)
            | LeaseFails(index)
            | GrantLost(index)
            | ReadUnderLease(index)
            | ReadUnderLeaseFails(index)
            | Present(index)
            | MarkFails(index)
            | MarkLost(index)
            | Serve(index)
            | RequestLost(index)
            | AnswerLost(index)
            | Receive(index)
            | ReceiveAndReadFails(index)
            | Publish(index)
            | PublishFails(index)
            | PublicationLost(index)
            | Release(index)
            | ReleaseFails(index)
            | PublishLater(index)
            | LeaseToPublish(index)
            | PublicationLostLater(index)
            | MarkWaited(index)
            | MarkWaitedEarly(index)
            | Crash(index)
            | CrashAfterRequest(index)
            | Restart(index)
            | Begin(index) => {
                let mut process = std::mem::take(&mut fleet.processes[index]);
                self.take_by(fleet, &mut process, action);
                fleet.processes[index] = process;
            }
        }
    }

    fn take_by(&self, fleet: &mut Fleet, process: &mut Process, action: Action) {
        use Action::*;
        let left = &mut fleet.left;
        match action {
            ReadFails(_)
            | LeaseFails(_)
            | GrantLost(_)
            | ReadUnderLeaseFails(_)
            | MarkFails(_)
            | MarkLost(_)
            | ReceiveAndReadFails(_)
            | PublishFails(_)
            | PublicationLost(_)
            | ReleaseFails(_)
            | PublicationLostLater(_) => (left.store, left.total) = (left.store - 1, left.total - 1),
            RequestLost(_) | AnswerLost(_) => (left.lost, left.total) = (left.lost - 1, left.total - 1),
            MarkWaitedEarly(_) => (left.early, left.total) = (left.early - 1, left.total - 1),
            Crash(_) | CrashAfterRequest(_) => {
                (left.crashes, left.total) = (left.crashes - 1, left.total - 1)
            }
            _ => {}
        }
        let record = fleet.store.record;
        match (action, process.at) {
            (Read(_), _) => {
                process.at = if self.newest(process, record) {
                    At::Idle
                } else if self.is_presented_by_another(process, record) {
                    At::Waits
                } else {
                    At::Asks
                }
            }
            (MarkWaited(_) | MarkWaitedEarly(_), _) => {
                process.seen_mark = process.seen_mark.map(|(version, _)| (version, true));
                process.at = At::Idle;
            }
            (ReadFails(_), _) => (process.at, process.seen_mark) = (At::Idle, None),
            (TakeLease(_), _) => process.at = At::Leased(lease(fleet)),
            (LeaseFails(_) | GrantLost(_), _) => {
                if matches!(action, GrantLost(_)) {
                    lease(fleet);
                }
                (process.at, process.seen_mark, process.cannot_write) = (At::Idle, None, true);
            }
            (ReadUnderLeaseFails(_), At::Leased(fence)) => {
                (process.at, process.seen_mark) = (At::Releases(fence), None);
            }
            (ReadUnderLease(_), At::Leased(fence)) => self.read_under_lease(process, record, fence),
            (Present(_) | MarkFails(_) | MarkLost(_), At::Read(fence)) => {
                self.mark(fleet, process, fence, action);
            }
            (Serve(_), At::Sent(fence, presented)) => {
                let answer = fleet.present(presented, self.reuse);
                process.at = At::Answered(fence, presented, answer);
            }
            (RequestLost(_), At::Sent(fence, presented)) => {
                process.at = At::Answered(fence, presented, Answer::Lost);
            }
            (AnswerLost(_), At::Sent(fence, presented)) => {
                let answer = fleet.present(presented, self.reuse);
                fleet.seen.grant_lost |= answer != Answer::Rejected;
                process.at = At::Answered(fence, presented, Answer::Lost);
            }
            (Receive(_) | ReceiveAndReadFails(_), At::Answered(fence, _, answer)) => {
                let record = record.filter(|_| matches!(action, Receive(_)));
                self.receive(process, record, fence, answer, fleet.endpoint.expired);
            }
            (Publish(_) | PublishFails(_) | PublicationLost(_), At::Publishes(fence)) => {
                self.publish(fleet, process, fence, action);
            }
            (Release(_), At::Releases(fence)) => {
                release(fleet, fence);
                process.at = At::Idle;
            }
            (ReleaseFails(_), _) => process.at = At::Idle,
            (LeaseToPublish(_), _) => {
                process.publisher =
                    if process.is_unstored { Publisher::Leased(lease(fleet)) } else { Publisher::None };
            }
            (PublishLater(_) | PublicationLostLater(_), _) => self.publish_later(fleet, process, action),
            (Crash(_) | CrashAfterRequest(_), at) => {
                let is_granted = match (action, at) {
                    (CrashAfterRequest(_), At::Sent(_, presented)) => {
                        fleet.present(presented, self.reuse) != Answer::Rejected
                    }
                    (_, At::Answered(_, _, Answer::Granted(_))) => true,
                    _ => process.is_unstored && !process.has_ended(),
                };
                fleet.seen.grant_lost |= is_granted;
                *process = super::fleet::Process { at: At::Down, ..Default::default() };
            }
            (Begin(_), _) => process.refreshes = true,
            (Restart(_), _) => {
                process.at = At::Idle;
                if self.mutant == Some(Mutant::RestartPresentsSeed) {
                    process.known = Some(Known { granted_at: 100, ..Known::SEED });
                }
            }
            (action, at) => unreachable!("{action:?} at {at:?}"),
        }
    }

    fn read_under_lease(&self, process: &mut Process, record: Option<Known>, fence: u8) {
        let reads_again = self.mutant != Some(Mutant::ReadsOnce);
        let record = record.filter(|_| reads_again || process.known.is_none());
        process.at = At::Releases(fence);
        if self.adopt(process, record) {
            return;
        }
        if std::mem::take(&mut process.cannot_write) {
            process.seen_mark = None;
        }
        if self.is_presented_by_another(process, record) {
            return;
        }
        if let Some(record) = &record {
            self.take_up(process, record);
        }
        // `compare_with`
        if let Some(known) = process.known.filter(|_| reads_again) {
            process.is_unstored |= record.is_none_or(|record| record.version != known.version);
        }
        process.at = At::Read(fence);
    }

    fn mark(&self, fleet: &mut Fleet, process: &mut Process, fence: u8, action: Action) {
        let known = process.known.unwrap_or(Known::SEED);
        process.at = if process.is_unstored { At::Publishes(fence) } else { At::Releases(fence) };
        let Some(presented) = known.refresh_token else { return };
        let is_marked = process.known.is_some() && !process.is_unstored && known.version == process.marked;
        if !(is_marked && known.is_presented) {
            let marked = Known { is_presented: true, ..known };
            let is_stored =
                !matches!(action, Action::MarkFails(_)) && fleet.publish(marked, fence, self.checks_fence());
            if !is_stored || matches!(action, Action::MarkLost(_)) {
                return;
            }
            process.known = Some(Known { version: fence, ..marked });
            (process.marked, process.is_unstored) = (fence, false);
        }
        process.at = At::Sent(fence, presented);
    }

    fn receive(&self, process: &mut Process, record: Option<Known>, fence: u8, answer: Answer, expired: u8) {
        let Some(known) = &mut process.known else { unreachable!() };
        match answer {
            Answer::Granted(token) => {
                let granted_at = known.version.max(known.granted_at + 1);
                known.refresh_token = Some(token);
                known.access_token = if token > expired { token } else { 0 };
                (known.granted_at, known.is_presented) = (granted_at, false);
                process.is_unstored = true;
            }
            Answer::Lost if self.mutant == Some(Mutant::LostAnswerEndsLogin) => {
                (known.refresh_token, known.is_presented, process.is_unstored) = (None, false, true);
            }
            Answer::Lost => {}
            Answer::Rejected => {
                if self.adopt(process, record) {
                    process.at = At::Releases(fence);
                    return;
                }
                if record.is_some_and(|record| self.take_up(process, &record)) {
                    process.at = At::Read(fence);
                    return;
                }
                let Some(known) = &mut process.known else { unreachable!() };
                (known.refresh_token, known.is_presented, process.is_unstored) = (None, false, true);
            }
        }
        process.at = if process.is_unstored { At::Publishes(fence) } else { At::Releases(fence) };
    }

    fn publish(&self, fleet: &mut Fleet, process: &mut Process, fence: u8, action: Action) {
        let Some(known) = &mut process.known else { unreachable!() };
        process.at = At::Idle;
        let fails = matches!(action, Action::PublishFails(_));
        let is_newest = !fails && fleet.publish(*known, fence, self.checks_fence());
        if fails || matches!(action, Action::PublicationLost(_)) {
            process.publisher = Publisher::Keeps(fence);
        } else if is_newest {
            (known.version, process.is_unstored, process.at) = (fence, false, At::Releases(fence));
        } else if !self.adopt(process, fleet.store.record) {
            process.publisher = Publisher::Waits;
        }
        publish_ends(process);
    }

    fn publish_later(&self, fleet: &mut Fleet, process: &mut Process, action: Action) {
        let is_lost = matches!(action, Action::PublicationLostLater(_));
        let (fence, is_kept) = match process.publisher {
            Publisher::Keeps(fence) => (fence, true),
            Publisher::Leased(fence) => (fence, false),
            Publisher::None | Publisher::Waits => unreachable!(),
        };
        process.publisher = Publisher::None;
        if let Some(record) = fleet.store.record.filter(|_| !is_kept) {
            self.take_up(process, &record);
        }
        let known = process.known.filter(|_| process.is_unstored);
        if let Some(known) = known {
            let is_stored = fleet.publish(known, fence, self.checks_fence());
            process.publisher = match (is_stored, is_lost) {
                (true, false) => {
                    process.known = Some(Known { version: fence, ..known });
                    process.is_unstored = false;
                    Publisher::None
                }
                (true, true) if is_kept => Publisher::Keeps(fence),
                _ => Publisher::Waits,
            };
        }
        if !matches!(process.publisher, Publisher::Keeps(_)) {
            release(fleet, fence);
        }
    }
}

/// The callers get what the exchange has brought, whether the store has it or not.
fn publish_ends(process: &mut Process) {
    match process.known {
        Some(Known { refresh_token: None, .. }) => process.refreshes = false,
        Some(Known { access_token, .. }) if access_token > process.access_token => {
            process.serve(access_token, false);
        }
        _ => {}
    }
}

/// The access tokens that were about to expire expire.
fn expire(fleet: &mut Fleet) {
    let expired = std::mem::take(&mut fleet.endpoint.expiring);
    fleet.endpoint.expired = expired;
    let known = fleet.processes.iter_mut().map(|process| &mut process.known);
    for known in known.chain([&mut fleet.store.record, &mut fleet.store.previous]).flatten() {
        known.access_token *= u8::from(known.access_token > expired);
    }
    for process in fleet.processes.iter_mut().filter(|process| process.access_token <= expired) {
        process.serve(0, false);
    }
}

/// What an outage does to a process: each operation that it tries has failed.
fn outage(process: &mut Process) {
    if let Publisher::Leased(_) = process.publisher {
        process.publisher = Publisher::Waits;
    }
    match process.at {
        At::Down | At::Sent(..) | At::Answered(..) => return,
        At::Publishes(fence) => {
            process.publisher = Publisher::Keeps(fence);
            publish_ends(process);
        }
        At::Idle if !process.needs() => return,
        _ => process.seen_mark = None,
    }
    process.at = At::Idle;
}

/// Grants the lease, and returns its fence.
fn lease(fleet: &mut Fleet) -> u8 {
    fleet.store.fence += 1;
    fleet.store.lease = Some(fleet.store.fence);
    fleet.store.fence
}

fn release(fleet: &mut Fleet, fence: u8) {
    fleet.store.lease.take_if(|lease| *lease == fence);
}
