//! [`PendingRequest`]: what is kept of a request until its response arrives, and how a retry is made of it.

use std::time::Duration;

use http::{Request, Response};
use tokio::time::{Instant, Sleep};

use super::shared::Via;
use crate::layer_options::LayerOptions;
use crate::origin_hash::OriginHash;
use crate::provider::Need;
use crate::replay::{KeepHead, Replay};
use crate::retry::Backoff;
use crate::token::Token;

/// What is kept of a request until its response arrives.
pub(super) struct PendingRequest<K> {
    /// The generation of the token that it was sent with last. 0 if the layer added no token.
    pub(super) token: u32,
    /// Where it was sent.
    origin: OriginHash,
    /// Its head and its body. `None` if it cannot, or will not, be sent again. One field, so that `NoReplay`'s takes no
    /// space and no time.
    kept: Option<K>,
    /// `None` until the request is sent again. Boxed, since most requests never are.
    retries: Option<Box<Retries>>,
}

/// A request to be sent, or sent again, with the token that is current then.
pub(super) struct Unsent<Req> {
    pub(super) request: Req,
    /// How long a retry waits first.
    pub(super) delay: Duration,
    /// Ends that time.
    pub(super) backoff: Option<Sleep>,
}

/// Why a challenged request is not sent again: the caller gets the challenge. As events and metrics show it.
pub(super) type NotRetried = &'static str;

/// All retries were used.
const RETRIES: NotRetried = "retries_exhausted";
/// The body cannot be sent again.
pub(super) const BODY: NotRetried = "body_not_replayable";
/// There is no other token.
pub(super) const NO_TOKEN: NotRetried = "no_token";
/// The retry budget is spent.
const BUDGET: NotRetried = "budget_exhausted";
/// There is no tokio runtime, whose timer the backoff needs.
const NO_RUNTIME: NotRetried = "no_runtime";

struct Retries {
    /// How often the request has been sent again.
    count: u32,
    backoff: Backoff,
}

impl<K> PendingRequest<K> {
    #[inline]
    pub(super) fn new(token: u32, origin: OriginHash, kept: Option<K>) -> Self {
        Self { token, origin, kept, retries: None }
    }

    /// The number of [`Retries`] so far.
    pub(super) fn retries(&self) -> u32 {
        self.retries.as_ref().map_or(0, |retries| retries.count)
    }

    /// What the request needs for its next attempt.
    pub(super) fn need(&self, options: &LayerOptions) -> Need {
        let is_sent_again = self.kept.is_some() && self.retries() < options.retry.retries();
        if is_sent_again { Need::Any } else { Need::Settled }
    }

    /// Keeps the request no longer: an attempt that was stopped continues, and nothing more is recorded.
    pub(super) fn give_up(&mut self) {
        self.kept = None;
    }

    /// Whether a response challenges the token. Otherwise it goes to the caller.
    // Every response comes this way: a call would cost more than what it does.
    #[inline(always)]
    pub(super) fn is_challenged_by<S, R, ResBody>(
        &mut self,
        via: &Via<S, R>,
        response: &Response<ResBody>,
    ) -> bool {
        if self.token != 0 {
            if via.options.challenge.matches(response) && !via.is_foreign(response, self.origin) {
                return true;
            }
            // Known for most tokens: this comparison is all that the happy path pays for the evidence.
            if !via.provider().core().is_accepted(self.token) {
                self.learn_from(via, response);
            }
        }
        // Recording stops here: the caller may read the response's body while the request's body is still being sent.
        self.give_up();
        false
    }

    /// Records a success: the API accepts the token.
    #[cold]
    fn learn_from<S, R, ResBody>(&self, via: &Via<S, R>, response: &Response<ResBody>) {
        if response.status().is_success() && !via.is_foreign(response, self.origin) {
            via.provider().core().accept(self.token);
        }
    }
}

impl<H: KeepHead, Spare> PendingRequest<(H, Spare)> {
    /// Stops the body of the running attempt where it is, if the request may be sent again.
    ///
    /// It is [released](Self::release) before long.
    pub(super) fn hold<S, R, B>(&self, via: &Via<S, R>) -> Result<(), NotRetried>
    where
        R: Replay<B, Head = H, Spare = Spare>,
    {
        if self.retries() >= via.options.retry.retries() {
            return Err(RETRIES);
        }
        match &self.kept {
            Some((_, spare)) if via.replay.hold(spare) => Ok(()),
            _ => Err(BODY),
        }
    }

    /// Holds the body of the running attempt no longer. If the attempt `ends`, its next poll is an error; else it continues.
    pub(super) fn release<S, R, B>(&self, via: &Via<S, R>, ends: bool)
    where
        R: Replay<B, Head = H, Spare = Spare>,
    {
        if let Some((_, spare)) = &self.kept {
            via.replay.release(spare, ends);
        }
    }

    /// Makes the retry, without a token. `token` is the provider's answer to the challenge. Without the challenge, nothing
    /// but the retry is left for the caller: neither the budget nor a missing timer prevents it.
    pub(super) fn again<S, R, B>(
        &mut self,
        via: &Via<S, R>,
        token: &Token,
        has_challenge: bool,
    ) -> Result<Unsent<Request<R::Body>>, NotRetried>
    where
        R: Replay<B, Head = H, Spare = Spare>,
    {
        let (options, generation) = (&via.options, token.id().generation);
        // The first retry with another token does not wait and takes nothing from the budget.
        let is_free = self.retries.is_none() && self.token != generation;
        let budget = via.provider().core().retry_budget().filter(|_| !is_free && has_challenge);
        if budget.is_some_and(|budget| !budget.withdraw()) {
            return Err(BUDGET);
        }
        let retries = self
            .retries
            .get_or_insert_with(|| Box::new(Retries { count: 0, backoff: options.retry.make_backoff() }));
        retries.count = retries.count.saturating_add(1);
        let (mut delay, mut backoff) = (Duration::ZERO, None);
        if !is_free {
            let now = Instant::now();
            let is_last = retries.count >= options.retry.retries();
            let settled_at = via.provider().core().settled_at(generation).filter(|_| is_last);
            let lag = settled_at.map_or(Duration::ZERO, |at| at.saturating_duration_since(now));
            delay = lag + retries.backoff.next_delay();
            match via.provider().core().timer(now + delay) {
                None if has_challenge => return Err(NO_RUNTIME),
                timer => backoff = timer,
            }
        }
        let (head, spare) = self.kept.take().ok_or(BODY)?;
        let (body, spare) = via.replay.again(spare).ok_or(BODY)?;
        let request = head.request(body);
        self.kept = spare.map(|spare| (head, spare));
        Ok(Unsent { request, delay, backoff })
    }
}
