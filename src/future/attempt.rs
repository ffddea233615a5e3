//! [`Attempt`]: what is kept of a request while its answer is awaited, and how it becomes the next attempt.

use std::{pin::Pin, time::Duration};

use http::{Request, Response};
use tokio::time::{Sleep, sleep};

use super::shared::Shared;
use crate::{
    authorization::authorize,
    observability::NotSentAgain,
    options::{Existing, Options},
    replay::{Head, Replay},
    retry::Backoff,
    token::{Token, TokenId},
};

/// How long to wait before a retry.
pub(super) type Delay = Pin<Box<Sleep>>;

/// What is kept of a request while its answer is awaited.
pub(super) struct Attempt<Spare> {
    /// The token that it was sent with; `None` for one that has none of ours.
    pub(super) token: Option<TokenId>,
    /// `None` if it cannot, or will not, be sent again. One field, so that `NoReplay`'s takes no room and no time.
    kept: Option<(Head, Spare)>,
    retries: u32,
    backoff: Option<Box<Backoff>>,
}

impl<Spare> Attempt<Spare> {
    #[inline]
    pub(super) fn new(token: Option<TokenId>, kept: Option<(Head, Spare)>) -> Self {
        Self { token, kept, retries: 0, backoff: None }
    }

    /// Holds the attempt under way where it is, if the request may be sent once more.
    pub(super) fn hold<R, B>(&self, options: &Options<R>) -> Result<(), NotSentAgain>
    where
        R: Replay<B, Spare = Spare>,
    {
        if self.retries >= options.retry.retries() {
            return Err(NotSentAgain::Retries);
        }
        match &self.kept {
            Some((_, spare)) if options.replay.hold(spare) => Ok(()),
            _ => Err(NotSentAgain::Body),
        }
    }

    /// How often the request has been sent again.
    pub(super) fn retries(&self) -> u32 {
        self.retries
    }

    /// The request is not sent again: an attempt that was held goes on, and nothing more is recorded.
    pub(super) fn give_up(&mut self) {
        self.kept = None;
    }

    /// The token that an answer refuses; `None` if the answer is the caller's.
    #[inline]
    pub(super) fn refused_by<S, R, ResBody>(
        &mut self,
        shared: &Shared<S, R>,
        response: &Response<ResBody>,
    ) -> Option<TokenId> {
        let refused = self.token.filter(|_| shared.options.challenge.matches(response));
        if refused.is_none() {
            // Recording stops here: an answer's body may be read while the request's is still being sent.
            self.give_up();
        }
        refused
    }

    /// The request once more, with `token`, and how long to wait first.
    pub(super) fn again<R, B>(
        &mut self,
        options: &Options<R>,
        token: Token,
    ) -> Result<(Request<R::Body>, Option<Delay>), NotSentAgain>
    where
        R: Replay<B, Spare = Spare>,
    {
        // The first retry with a token that the API has not seen refused waits for nothing, and costs nothing.
        let free = self.retries == 0 && self.token != Some(token.id());
        if !free && !options.retry.withdraw() {
            return Err(NotSentAgain::Budget);
        }
        let (head, spare) = self.kept.take().ok_or(NotSentAgain::Body)?;
        let (body, spare) = options.replay.again(spare).ok_or(NotSentAgain::Body)?;
        let mut request = head.request(body);
        // The header had room for a token before.
        authorize(request.headers_mut(), token.header_value(), Existing::Replace)
            .map_err(|_| NotSentAgain::Token)?;
        self.kept = spare.map(|spare| (head, spare));
        self.retries += 1;
        self.token = Some(token.id());
        let backoff = self.backoff.get_or_insert_with(|| Box::new(options.retry.make_backoff()));
        let delay = if free { Duration::ZERO } else { backoff.next_delay() };
        options.provider.reporter().sent_again(token.id(), self.retries, delay);
        Ok((request, (!free).then(|| Box::pin(sleep(delay)))))
    }
}
