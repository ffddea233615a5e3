//! [`decide`]: what a caller's need leads to. Every rule about the start of a refresh is here.
//!
//! 1. **One refresh.** At most one refresh runs. A need joins it, unless it has not ended by its deadline: then
//!    another starts in its place.
//! 2. **A token that works is used.** Nobody waits for the refresh of an expiring token, but for three: who starts a
//!    refresh on a runtime that may end with the call, who cannot be sent again after a challenge, and who needs a token for
//!    longer.
//! 3. **One failure.** Until its end, callers get a permanent failure at once. After a transient one they wait for the
//!    next attempt.
//! 4. **One pace for challenges.** See [`pace`](super::pace).
//!
//! A function of what is passed in: it reads no clock and takes no lock, and nothing in here is random.

use std::time::Duration;

use tokio::time::Instant;

use super::state::State;
use crate::challenge::Challenge;
use crate::error::Error;
use crate::source::RefreshReason;
use crate::token::{Token, TokenId};

/// Why a caller asks, and so which tokens it can use.
#[derive(Clone, Debug)]
pub(crate) enum Need {
    /// Any token that works.
    Any,
    /// As `Any`, of a request that cannot be sent again: if a challenge has started a refresh, the token after it.
    Settled,
    /// As `Any`, in the background: nobody waits.
    Background,
    /// A token that is valid for at least so long.
    Lasting(Duration),
    /// Any token but this one, which the API has challenged.
    Other {
        than: TokenId,
        /// What the API asks for.
        challenge: Option<Challenge>,
        /// Whether the program itself asks, and not the layer.
        by_program: bool,
    },
}

/// What a decision is based on besides the state.
pub(super) struct Snapshot<'a> {
    /// The current token, which may have expired.
    pub(super) current: Option<&'a Token>,
    /// The generation of the newest token that the API has accepted.
    pub(super) accepted: u32,
    /// The revision of the source's credential.
    pub(super) revision: u64,
    pub(super) refresh_timeout: Duration,
    /// Whether a refresh can start: there is a runtime.
    pub(super) has_runtime: bool,
    /// Whether the runtime may end with the call that starts a refresh, and a refresh that ends with it loses a login.
    pub(super) may_lose_login: bool,
}

/// Whether a token is valid for at least `least`, or was not when the source gave it: then that has none that is.
fn lasts(token: &Token, least: Duration, state: &State, now: Instant) -> bool {
    let lasts_from =
        |from: Instant| from.checked_add(least).is_some_and(|until| token.ends_at() >= Some(until));
    let never_did = state.is_from_source && !state.published_at.is_some_and(lasts_from);
    token.ends_at().is_none() || lasts_from(now) || never_did
}

/// What a need leads to.
#[derive(Debug)]
pub(super) enum Decision {
    /// The current token is used.
    Use(Token),
    /// The current token is used, although it is challenged: the pace of challenges allows no refresh.
    LeaveAlone(Token),
    /// There is no token, for this reason.
    Fail(Error),
    /// The running refresh brings the token, which the caller needs for this reason.
    Join(RefreshReason),
    /// A refresh starts, for this reason.
    Start {
        reason: RefreshReason,
        /// The token that the caller uses meanwhile. `None` if the caller waits.
        meanwhile: Option<Token>,
        /// Whether it may be lost if the caller does not wait.
        may_be_lost: bool,
    },
}

pub(super) fn decide(need: &Need, state: &State, seen: &Snapshot<'_>, now: Instant) -> Decision {
    use RefreshReason::{Challenged, Expired, Expiring, Missing};

    let (reason, current) = match (need, seen.current) {
        (_, None) => (Missing, None),
        (_, Some(token)) if token.is_expired(now) => (Expired, None),
        (Need::Other { than, .. }, Some(token)) if token.id() != *than => {
            return Decision::Use(token.clone());
        }
        (Need::Other { .. }, Some(token)) => (Challenged, Some(token)),
        (Need::Lasting(least), Some(token)) if !lasts(token, *least, state, now) => (Expired, Some(token)),
        (_, Some(token)) if token.is_fresh(now) => return Decision::Use(token.clone()),
        (_, Some(token)) => (Expiring, Some(token)),
    };
    // A challenged token is no answer to its challenge.
    let works = current.filter(|_| reason == Expiring);
    let running = state.running.as_ref();
    let is_challenged = running.is_some_and(|refresh| refresh.current_reason.get() == Challenged);
    // While the source fails, one endpoint that challenges every token would hold up the requests to the others.
    let settles = is_challenged && state.failure.is_none() && matches!(need, Need::Settled);
    let meanwhile = works.filter(|_| !settles);
    if running.is_some_and(|refresh| now <= refresh.deadline) {
        return meanwhile.map_or(Decision::Join(reason), |token| Decision::Use(token.clone()));
    }
    if let Some(refusal) = refusal(need, reason, current, state, seen, now) {
        return refusal;
    }
    let may_be_lost = state.is_interrupted || seen.may_lose_login;
    // One in place of a late one that a challenge has started counts as that.
    let reason = if is_challenged { Challenged } else { reason };
    Decision::Start { reason, meanwhile: meanwhile.filter(|_| !may_be_lost).cloned(), may_be_lost }
}

/// What follows if no refresh may start. `None` if one may.
fn refusal(
    need: &Need,
    reason: RefreshReason,
    current: Option<&Token>,
    state: &State,
    seen: &Snapshot<'_>,
    now: Instant,
) -> Option<Decision> {
    let fail = |error| match current {
        Some(token) if reason == RefreshReason::Expiring => Some(Decision::Use(token.clone())),
        _ => Some(Decision::Fail(error)),
    };
    if state.shut_down {
        return fail(Error::ShutDown);
    }
    if let Some(failure) = &state.failure {
        let waits = failure.error.is_transient() && now < failure.not_before;
        // A refresh could only wait for its own timeout: it would have no time to ask.
        let time_to_ask = (seen.refresh_timeout / 2).min(Duration::from_secs(1));
        let is_too_long = waits && failure.not_before + time_to_ask > now + seen.refresh_timeout;
        let is_background = waits && reason == RefreshReason::Expiring;
        if failure.is_final(now, seen.revision) || is_too_long || is_background {
            return fail(failure.error.clone());
        }
    }
    if let (RefreshReason::Challenged, Need::Other { than, by_program, .. }) = (reason, need) {
        let is_good = *by_program || than.generation == seen.accepted;
        if state.pace.as_ref().is_some_and(|pace| !pace.allows(now, is_good)) {
            return current.cloned().map(Decision::LeaveAlone);
        }
    }
    if let (Some(token), RefreshReason::Expired) = (current, reason) {
        // One that works, but not for long enough.
        if state.pace.as_ref().is_some_and(|pace| !pace.allows(now, true)) {
            return Some(Decision::Use(token.clone()));
        }
    }
    if seen.has_runtime { None } else { fail(Error::NoRuntime) }
}
