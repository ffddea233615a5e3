//! [`Memory`]: what a process knows of its refresh tokens, and of the exchange that runs.

use std::sync::Weak;

use futures_util::future::Shared;
use tokio::{sync::oneshot, time::Instant};

use crate::chain::{Known, Seed};
use crate::error::SourceError;
use crate::token::Token;

#[derive(Default)]
pub(super) struct Memory {
    pub(super) known: Known,
    /// How many answers in a row did not say what became of the refresh token. It matters only without a login: then the
    /// credential is used after some. An answer that says it, and another refresh token, count from 0 again.
    pub(super) unclear: u32,
    /// Whether the store does not have what is known. Each answer that changes it sets this, each publication clears it.
    pub(super) is_unstored: bool,
    /// Whether the refresh tokens are those of a user's login. Never cleared.
    pub(super) is_login: bool,
    /// Whether a doubtful refresh token is presented with the next attempt: the program has asked for it.
    pub(super) asks_again: bool,
    /// Whether the record that was read last is of another credential, or its token is: then it is not used, which is
    /// reported once in a row.
    pub(super) is_foreign: bool,
    /// Made when it is needed: most providers have neither a login nor a store.
    pub(super) more: Option<Box<More>>,
}

/// What only a login, or a store that fails, needs.
#[derive(Default)]
pub(super) struct More {
    /// The refresh tokens of logins that have not begun, the newest last.
    pub(super) pending: Vec<Seed>,
    /// The record of another credential's login that was read last. Cleared by the next one that is read, and when a login
    /// begins.
    pub(super) foreign: Option<Known>,
    /// The token that was known when the program set another one.
    pub(super) taken: Option<Token>,
    /// The version of the record in which this process has marked its refresh token as presented.
    pub(super) marked: u64,
    /// Cleared by a token, or another refresh token, as are the next two.
    pub(super) failing: Option<Failing>,
    /// Why a user has to log in.
    pub(super) verdict: Option<SourceError>,
    /// The error of an exchange that has outlived its refresh, and until when it holds.
    pub(super) untaken: Option<(SourceError, Instant)>,
    /// The version of the record whose refresh token another process presents, and since when that is known.
    pub(super) seen_mark: Option<(u64, Instant)>,
    /// Whether the store granted no lease because it has failed. Cleared by the next lease.
    pub(super) cannot_write: bool,
    /// Cleared at its end, and when it is given up.
    pub(super) exchange: Option<Running>,
    pub(super) exchanges: u32,
    /// How often another login was given, or was used.
    pub(super) changes: u32,
    /// Alive as long as the task that publishes what is known.
    pub(super) publisher: Weak<()>,
}

impl Memory {
    pub(super) fn more(&mut self) -> &mut More {
        self.more.get_or_insert_default()
    }

    /// The newest login that has not begun.
    pub(super) fn pending(&self) -> Option<&Seed> {
        self.more.as_ref()?.pending.last()
    }

    /// Replaces what is known.
    pub(super) fn replace(&mut self, known: Known) {
        if known.chain.id() != self.known.chain.id() {
            self.changed();
        }
        self.known = known;
    }

    /// Records that another login was given, or is used.
    pub(super) fn changed(&mut self) {
        let more = self.more();
        more.changes = more.changes.wrapping_add(1);
    }

    pub(super) fn exchange(&self) -> Option<&Running> {
        self.more.as_ref()?.exchange.as_ref()
    }

    /// Why a record's login is used, if that is another one than before.
    pub(super) fn change(&self, found: &Known) -> Option<&'static str> {
        let (known, found) = (self.known.chain.id(), found.chain.id());
        let reason = if known.is_some() { "another process has begun it" } else { "it is in the store" };
        (found.is_some() && found != known).then_some(reason)
    }

    /// Ends what was counted: there is a token, or another refresh token.
    pub(super) fn reset(&mut self) {
        self.unclear = 0;
        if let Some(more) = &mut self.more {
            (more.failing, more.verdict, more.untaken) = (None, None, None);
        }
    }
}

/// The outage of the source so far, for one refresh token.
#[derive(Clone, Copy)]
pub(super) struct Failing {
    pub(super) since: Instant,
    /// Whether an answer was lost.
    pub(super) is_lost: bool,
}

/// The exchange of a login that is running.
pub(super) struct Running {
    pub(super) number: u32,
    /// It counts as driven by its runtime until then.
    pub(super) alive_until: Instant,
    pub(super) ended: Shared<oneshot::Receiver<()>>,
}
