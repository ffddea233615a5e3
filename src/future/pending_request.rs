//! [`PendingRequest`]: what is kept of a request while its answer is awaited, and how it becomes the next attempt.

use std::time::Duration;

use http::{Request, Response};

use super::shared::Shared;
use crate::{
    config::Config,
    observability::NotSentAgain,
    provider::{Challenged, Part},
    replay::{Replay, RequestHead},
    retry::Backoff,
    token::{Token, TokenId},
};

/// What is kept of a request while its answer is awaited.
pub(super) struct PendingRequest<Spare> {
    /// The token that it was sent with last; `None` for one that the layer gave no token.
    pub(super) token: Option<TokenId>,
    /// `None` if it cannot, or will not, be sent again. One field, so that `NoReplay`'s takes no room and no time.
    kept: Option<(RequestHead, Spare)>,
    /// `None` for a request that was not sent again, which nearly all are: so the rest takes little room.
    retries: Option<Box<Retries>>,
}

struct Retries {
    /// How often the request has been sent again.
    count: u32,
    backoff: Backoff,
    /// What part the request has in the refresh that gave it its token, if it was challenged before that.
    part: Part,
}

impl<Spare> PendingRequest<Spare> {
    #[inline]
    pub(super) fn new(token: Option<TokenId>, kept: Option<(RequestHead, Spare)>) -> Self {
        Self { token, kept, retries: None }
    }

    /// Holds the attempt under way where it is, if the request may be sent once more.
    pub(super) fn hold<R, B>(&self, options: &Config<R>) -> Result<(), NotSentAgain>
    where
        R: Replay<B, Spare = Spare>,
    {
        if self.retries() >= options.retry.retries() {
            return Err(NotSentAgain::Retries);
        }
        match &self.kept {
            Some((_, spare)) if options.replay.hold(spare) => Ok(()),
            _ => Err(NotSentAgain::Body),
        }
    }

    /// How often the request has been sent again.
    pub(super) fn retries(&self) -> u32 {
        self.retries.as_ref().map_or(0, |retries| retries.count)
    }

    fn part(&self) -> Part {
        self.retries.as_ref().map_or(Part::None, |retries| retries.part)
    }

    /// The challenge to the token that the request was sent with.
    pub(super) fn challenged(&self, token: TokenId, waits: bool) -> Challenged {
        Challenged { token, part: self.part(), waits }
    }

    /// The request is not sent again: an attempt that was held goes on, and nothing more is recorded.
    pub(super) fn give_up(&mut self) {
        self.kept = None;
    }

    /// The request is sent with `token`; after a challenge, it took this part in the refresh for the token `renewed`.
    pub(super) fn send(&mut self, token: TokenId, renewed: Option<(TokenId, Part)>) {
        // Neither the token that it was challenged with, nor one that is newer still, says anything of that refresh.
        let of_this = renewed.filter(|(renewed, _)| *renewed == token && self.token != Some(token));
        if let Some(retries) = &mut self.retries {
            retries.part = of_this.map_or(Part::None, |(_, part)| part);
        }
        self.token = Some(token);
    }

    /// The token that an answer challenges; `None` if the answer is the caller's.
    // Every answer comes this way: as a call, it would cost more than what it does.
    #[inline(always)]
    pub(super) fn challenged_by<S, R, ResBody>(
        &mut self,
        shared: &Shared<S, R>,
        response: &Response<ResBody>,
    ) -> Option<TokenId> {
        if let Some(token) = self.token {
            if shared.options.challenge.matches(response) && !shared.is_foreign(response) {
                return Some(token);
            }
            // Of most tokens it is known: this is all that the happy path pays for the evidence.
            if !shared.options.provider.is_accepted(token) {
                learn_from(shared, token, Part::None, response);
            }
        }
        // Recording stops here: an answer's body may be read while the request's is still being sent.
        self.give_up();
        None
    }

    /// As [`challenged_by`](Self::challenged_by), for the answer to a retry: it says as well whether a refresh has healed the
    /// request.
    #[cold]
    pub(super) fn challenged_again_by<S, R, ResBody>(
        &mut self,
        shared: &Shared<S, R>,
        response: &Response<ResBody>,
    ) -> Option<TokenId> {
        let refused = self.challenged_by(shared, response);
        if let (None, Some(token)) = (refused, self.token) {
            learn_from(shared, token, self.part(), response);
        }
        refused
    }

    /// The request once more, without a token, and how long to wait first; `token` is the provider's answer to its
    /// challenge.
    pub(super) fn again<R, B>(
        &mut self,
        options: &Config<R>,
        token: &Token,
    ) -> Result<(Request<R::Body>, Duration), NotSentAgain>
    where
        R: Replay<B, Spare = Spare>,
    {
        // The first retry with a token that the API has not seen refused waits for nothing, and costs nothing.
        let free = self.retries.is_none() && self.token != Some(token.id());
        if !free && !options.retry.withdraw() {
            return Err(NotSentAgain::Budget);
        }
        let (head, spare) = self.kept.take().ok_or(NotSentAgain::Body)?;
        let (body, spare) = options.replay.again(spare).ok_or(NotSentAgain::Body)?;
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

/// A success is evidence that the API accepts its token, and that the refresh in which the request took `part` has healed it.
#[cold]
fn learn_from<S, R, ResBody>(
    shared: &Shared<S, R>,
    token: TokenId,
    part: Part,
    response: &Response<ResBody>,
) {
    if response.status().is_success() && !shared.is_foreign(response) {
        shared.options.provider.accept(token);
        if part != Part::None {
            shared.options.provider.healed(token, part);
        }
    }
}
