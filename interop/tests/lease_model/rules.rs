//! What a process makes of a record: the rules of `src/chain.rs` and `src/login/with_store.rs`.

use super::{
    check::{Lease, Mutant},
    fleet::{Known, Process, Publisher},
};

impl Lease {
    pub(crate) fn checks_fence(&self) -> bool {
        self.mutant != Some(Mutant::PublishesWithoutFence)
    }

    /// `Known::is_newer_than`.
    pub(crate) fn is_newer(&self, known: Option<Known>, found: &Known) -> bool {
        let Some(known) = known else { return false };
        match self.mutant {
            Some(Mutant::AdoptsOlderRecord) => false,
            Some(Mutant::OrdersByVersion) => found.version <= known.version,
            _ => found.order() <= known.order(),
        }
    }

    /// `Login::take_up`.
    pub(crate) fn take_up(&self, process: &mut Process, found: &Known) -> bool {
        if self.is_newer(process.known, found) {
            return false;
        }
        (process.known, process.is_unstored) = (Some(*found), false);
        true
    }

    /// `Login::adopt_if_newer`.
    pub(crate) fn adopt(&self, process: &mut Process, found: Option<Known>) -> bool {
        let usable =
            found.filter(|found| found.access_token != 0 && found.access_token != process.access_token);
        let Some(found) = usable.filter(|found| self.take_up(process, found)) else { return false };
        process
            .serve(found.access_token, found.is_presented && self.mutant != Some(Mutant::TrustsMarkedToken));
        true
    }

    /// `Login::is_presented_by_another`.
    pub(crate) fn is_presented_by_another(&self, process: &mut Process, found: Option<Known>) -> bool {
        let Some(found) = found.filter(|found| found.is_presented) else { return false };
        if self.mutant == Some(Mutant::IgnoresMark) {
            return false;
        }
        let seen = process.seen_mark.filter(|(version, _)| *version == found.version);
        let (version, is_over) = *process.seen_mark.insert(seen.unwrap_or((found.version, false)));
        version != process.marked && !is_over
    }

    /// `Login::newest`.
    pub(crate) fn newest(&self, process: &mut Process, found: Option<Known>) -> bool {
        if self.adopt(process, found) {
            return true;
        }
        let stands = |known: &Known| found.is_none_or(|found| self.is_newer(Some(*known), &found));
        let untaken = |known: &Known| known.access_token != 0 && known.access_token != process.access_token;
        let Some(known) = process.known.filter(|known| untaken(known) && stands(known)) else { return false };
        process
            .serve(known.access_token, known.is_presented && self.mutant != Some(Mutant::TrustsMarkedToken));
        process.is_unstored |= found.is_none_or(|found| found.version != known.version);
        if process.is_unstored && process.publisher == Publisher::None {
            process.publisher = Publisher::Waits;
        }
        true
    }
}
