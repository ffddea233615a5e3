//! [`Lease`]: the model for stateright, its properties, and the search for cycles.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
    time::Instant,
};

use stateright::{Checker, Model, Property};

use super::{
    actions::Action,
    fleet::{At, Faults, Fleet, Process, Reuse},
};

/// The protocol of a lease, with what may happen.
#[derive(Clone, Debug)]
pub(crate) struct Lease {
    pub(crate) processes: usize,
    pub(crate) reuse: Reuse,
    pub(crate) faults: Faults,
    pub(crate) properties: &'static [&'static str],
    /// Whether the processes are sorted. Not for a path that is shown.
    pub(crate) sorts: bool,
    /// Which rule is broken.
    pub(crate) mutant: Option<Mutant>,
}

/// A protocol that lacks one rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mutant {
    IgnoresLease,
    PublishesWithoutFence,
    AdoptsOlderRecord,
    OrdersByVersion,
    RestartPresentsSeed,
    ReadsOnce,
    IgnoresMark,
    LostAnswerEndsLogin,
    LeaseNeverEnds,
    TrustsMarkedToken,
}

pub(crate) const ONE_AT_A_TIME: &str = "a refresh token is presented by one process at a time";
pub(crate) const NEVER_SPENT: &str = "no spent refresh token is presented";
pub(crate) const NEWEST_STAYS: &str = "no record replaces a newer one";
pub(crate) const ENDS_WELL: &str = "every process ends with a token, or with 'login required'";
pub(crate) const KEEPS_LOGIN: &str = "the login is never lost";

/// A fence that no run needs: a run that gets there does not end.
const MAX_FENCE: u8 = 60;

impl Lease {
    fn is_terminal(&self, fleet: &Fleet) -> bool {
        let mut actions = Vec::new();
        self.possible(fleet, &mut actions);
        actions.is_empty()
    }

    fn has(&self, property: &str, fleet: &Fleet) -> bool {
        match property {
            ONE_AT_A_TIME => {
                let mut presented = 0_u32;
                fleet.presented().all(|token| {
                    let is_other = presented & (1 << token) == 0;
                    presented |= 1 << token;
                    is_other
                })
            }
            NEVER_SPENT => !fleet.seen.spent_presented,
            NEWEST_STAYS => !fleet.seen.newer_replaced,
            ENDS_WELL => {
                let is_served = |process: &Process| {
                    process.at == At::Idle && (process.access_token != 0 || process.has_ended())
                };
                let is_endless = fleet.store.fence >= MAX_FENCE;
                !is_endless && (fleet.processes.iter().all(is_served) || !self.is_terminal(fleet))
            }
            KEEPS_LOGIN => {
                let all_have = fleet.processes.iter().all(|process| process.access_token != 0);
                (all_have && fleet.has_login()) || !self.is_terminal(fleet)
            }
            property => unreachable!("{property}"),
        }
    }
}

impl Model for Lease {
    type State = Fleet;
    type Action = Action;

    fn init_states(&self) -> Vec<Fleet> {
        vec![Fleet::new(self.processes, self.faults)]
    }

    fn actions(&self, fleet: &Fleet, actions: &mut Vec<Action>) {
        // Not behind a violation: the checker would go on, and report the last one.
        if self.sorts || self.properties.iter().all(|property| self.has(property, fleet)) {
            self.possible(fleet, actions);
        }
    }

    fn next_state(&self, fleet: &Fleet, action: Action) -> Option<Fleet> {
        let mut next = fleet.clone();
        self.take(&mut next, action);
        if self.sorts {
            next.processes.sort_unstable();
        }
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        type Holds = fn(&Lease, &Fleet) -> bool;
        const ALL: [(&str, Holds); 5] = [
            (ONE_AT_A_TIME, |model, fleet| model.has(ONE_AT_A_TIME, fleet)),
            (NEVER_SPENT, |model, fleet| model.has(NEVER_SPENT, fleet)),
            (NEWEST_STAYS, |model, fleet| model.has(NEWEST_STAYS, fleet)),
            (ENDS_WELL, |model, fleet| model.has(ENDS_WELL, fleet)),
            (KEEPS_LOGIN, |model, fleet| model.has(KEEPS_LOGIN, fleet)),
        ];
        let checked = ALL.iter().filter(|(name, _)| self.properties.contains(name));
        checked.map(|(name, holds)| Property::always(name, *holds)).collect()
    }
}

/// Checks that these properties hold in all states.
pub(crate) fn holds(name: &str, model: &Lease, properties: &'static [&'static str]) {
    let begun = Instant::now();
    let model = Lease { properties, ..model.clone() };
    let checked = model.checker().threads(2).spawn_bfs().join();
    println!("{name}: {} states, {:?}", checked.unique_state_count(), begun.elapsed());
    if let Some((property, path)) = checked.discoveries().into_iter().next() {
        panic!("{name}: {property:?} is violated after {:?}", path.into_actions());
    }
}

/// Checks that this property is violated.
pub(crate) fn finds(name: &str, model: &Lease, property: &'static [&'static str; 1]) {
    let model = Lease { properties: property, sorts: false, ..model.clone() };
    let checked = model.checker().spawn_bfs().join();
    let Some(path) = checked.discovery(property[0]) else { panic!("{name}: nothing violates {property:?}") };
    println!("{name}: {property:?} is violated after {:?}", path.into_actions());
}

/// Checks that no state leads back to itself: then every run ends, and the properties of the last states are those of every
/// run.
pub(crate) fn ends(name: &str, model: &Lease) {
    let mut is_done = HashMap::new();
    let mut path: Vec<(u64, Vec<Fleet>)> = Vec::new();
    let enter = |fleet: Fleet, is_done: &mut HashMap<u64, bool>| {
        let mut id = DefaultHasher::new();
        fleet.hash(&mut id);
        let id = id.finish();
        match is_done.get(&id) {
            Some(true) => None,
            Some(false) => panic!("{name}: a run goes on endlessly: {fleet:#?}"),
            None => {
                is_done.insert(id, false);
                Some((id, model.next_states(&fleet)))
            }
        }
    };
    for fleet in model.init_states() {
        path.extend(enter(fleet, &mut is_done));
    }
    while let Some((id, next)) = path.last_mut() {
        match next.pop() {
            Some(fleet) => path.extend(enter(fleet, &mut is_done)),
            None => {
                is_done.insert(*id, true);
                path.pop();
            }
        }
    }
    println!("{name}: {} states, no cycle", is_done.len());
}
