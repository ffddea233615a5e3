//! [`PendingRequest`]: what is kept of a request until its response arrives, and how a retry is made of it.

use std::time::Duration;

use http::{Request, Response};

use super::shared::Via;
use crate::{
    challenge::Challenge,
    config::Config,
    provider::{Need, Part},
    replay::{Head, Replay},
    retry::Backoff,
    select::SelectProvider,
    token::{Token, TokenId},
};

/// What is kept of a request until its response arrives.
pub(super) struct PendingRequest<Head, Spare> {
    /// The token that it was sent with last. `None` if the layer added no token.
    pub(super) token: Option<TokenId>,
    /// `None` if it cannot, or will not, be sent again. One field, so that `NoReplay`'s takes no space and no time.
    kept: Option<(Head, Spare)>,
    /// `None` until the request is sent again. Boxed, since most requests never are.
    retries: Option<Box<Retries>>,
}

/// Why a challenged request is not sent again: the caller gets the challenge.
#[derive(Clone, Copy)]
pub(super) enum NotRetried {
    /// All retries were used.
    Retries,
    /// The body cannot be sent again.
    Body,
    /// There is no other token.
    Token,
    /// The retry budget is spent.
    Budget,
}

impl NotRetried {
    /// As events and metrics show it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Retries => "retries_exhausted",
            Self::Body => "body_not_replayable",
            Self::Token => "no_token",
            Self::Budget => "budget_exhausted",
        }
    }
}

struct Retries {
    /// How often the request has been sent again.
    count: u32,
    backoff: Backoff,
    /// The part that the request had in the refresh that brought its token, if it was challenged before that.
    part: Part,
}

impl<H: Head, Spare> PendingRequest<H, Spare> {
    #[inline]
    pub(super) fn new(token: Option<TokenId>, kept: Option<(H, Spare)>) -> Self {
        Self { token, kept, retries: None }
    }

    /// Stops the body of the running attempt where it is, if the request may be sent again.
    pub(super) fn hold<R, P, B>(&self, options: &Config<R, P>) -> Result<(), NotRetried>
    where
        R: Replay<B, Head = H, Spare = Spare>,
    {
        if self.retries() >= options.retry.retries() {
            return Err(NotRetried::Retries);
        }
        match &self.kept {
            Some((_, spare)) if options.replay.hold(spare) => Ok(()),
            _ => Err(NotRetried::Body),
        }
    }

    /// How often the request has been sent again.
    pub(super) fn retries(&self) -> u32 {
        self.retries.as_ref().map_or(0, |retries| retries.count)
    }

    fn part(&self) -> Part {
        self.retries.as_ref().map_or(Part::None, |retries| retries.part)
    }

    /// What the request needs after a challenge to its token.
    pub(super) fn need(&self, token: TokenId, waits: bool, challenge: Option<Challenge>) -> Need {
        Need::OtherThan { token, part: self.part(), waits, challenge }
    }

    /// Keeps the request no longer: an attempt that was stopped continues, and nothing more is recorded.
    pub(super) fn give_up(&mut self) {
        self.kept = None;
    }

    /// Records that the request is sent with `token`. `renewed`: after a challenge, the token that the refresh brought,
    /// and the part that the request had in it.
    pub(super) fn send(&mut self, token: TokenId, renewed: Option<(TokenId, Part)>) {
        // The response tells about that refresh only if the request carries the token that it brought.
        let of_this = renewed.filter(|(renewed, _)| *renewed == token && self.token != Some(token));
        if let Some(retries) = &mut self.retries {
            retries.part = of_this.map_or(Part::None, |(_, part)| part);
        }
        self.token = Some(token);
    }

    /// Returns the token that a response challenges. `None` if the response goes to the caller.
    // Every response comes this way: a call would cost more than what it does.
    #[inline(always)]
    pub(super) fn challenged_by<S, R, P: SelectProvider, ResBody>(
        &mut self,
        via: &Via<S, R, P>,
        response: &Response<ResBody>,
    ) -> Option<TokenId> {
        if let Some(token) = self.token {
            if via.options.challenge.matches(response) && !via.is_foreign(response) {
                return Some(token);
            }
            // Known for most tokens: this comparison is all that the happy path pays for the evidence.
            if !via.provider().is_accepted(token) {
                learn_from(via, token, Part::None, response);
            }
        }
        // Recording stops here: the caller may read the response's body while the request's body is still being sent.
        self.give_up();
        None
    }

    /// As [`challenged_by`](Self::challenged_by), for the response to a retry, which also tells whether the refresh has
    /// healed the request.
    #[cold]
    pub(super) fn challenged_again_by<S, R, P: SelectProvider, ResBody>(
        &mut self,
        via: &Via<S, R, P>,
        response: &Response<ResBody>,
    ) -> Option<TokenId> {
        let challenged = self.challenged_by(via, response);
        if let (None, Some(token)) = (challenged, self.token) {
            learn_from(via, token, self.part(), response);
        }
        challenged
    }

    /// Makes the retry, without a token, and returns how long to wait first. `token` is the provider's answer to the
    /// challenge.
    pub(super) fn again<S, R, P: SelectProvider, B>(
        &mut self,
        via: &Via<S, R, P>,
        token: &Token,
    ) -> Result<(Request<R::Body>, Duration), NotRetried>
    where
        R: Replay<B, Head = H, Spare = Spare>,
    {
        let options = &via.options;
        // The first retry with another token does not wait and takes nothing from the budget.
        let free = self.retries.is_none() && self.token != Some(token.id());
        if !free && !options.retry.withdraw(via.budgets()) {
            return Err(NotRetried::Budget);
        }
        let (head, spare) = self.kept.take().ok_or(NotRetried::Body)?;
        let (body, spare) = options.replay.again(spare).ok_or(NotRetried::Body)?;
        let request = head.request(body);
        self.kept = spare.map(|spare| (head, spare));
        let retries = self.retries.get_or_insert_with(|| {
            Box::new(Retries { count: 0, backoff: options.retry.make_backoff(), part: Part::None })
        });
        retries.count += 1;
        let delay = if free { Duration::ZERO } else { retries.backoff.next_delay() };
        Ok((request, delay))
    }
}

/// Records a success: the API accepts the token, and the refresh in which the request had this `part` has healed it.
#[cold]
fn learn_from<S, R, P: SelectProvider, ResBody>(
    via: &Via<S, R, P>,
    token: TokenId,
    part: Part,
    response: &Response<ResBody>,
) {
    if response.status().is_success() && !via.is_foreign(response) {
        via.provider().accept(token);
        if part != Part::None {
            via.provider().healed(token, part);
        }
    }
}
