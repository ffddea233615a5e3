//! The strategies for sending a body again, one type each. [`BearerAuthLayer`](crate::BearerAuthLayer)'s methods
//! select one.

use std::convert::Infallible;

use http::Request;
use http_body::Body;
use tower_service::Service;

use super::Replay;
use super::body::{ReplayBody, Rewind};
use super::kept_head::KeptHead;
use super::strategy::sealed::Sealed;
use crate::{debug::debug_fields, error::BoxError};

impl Sealed for Cloned {}
impl Sealed for Buffered {}
impl<B: Body, W> Sealed for ReplayWith<B, W> {}
impl<B> Sealed for CloneWith<B> {}
impl Sealed for NoReplay {}

/// Clones the body before it is sent. This is the default. The body type does not change.
///
/// For a body in memory (`Full<Bytes>`, `String`, `Empty`) a clone shares or copies the bytes, without a limit.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cloned;

// Without it, the compiler reports that the body is not `Clone`, but no remedy.
#[diagnostic::do_not_recommend]
impl<B: Clone> Replay<B> for Cloned {
    type Body = B;
    type Spare = B;
    type Head = KeptHead;

    fn begin(&self, body: B) -> (B, Option<B>) {
        (body.clone(), Some(body))
    }

    #[inline]
    fn call<S: Service<Request<B>>>(&self, service: &mut S, request: Request<B>) -> (S::Future, Option<B>) {
        let spare = request.body().clone();
        (service.call(request), Some(spare))
    }

    fn again(&self, spare: B) -> Option<(B, Option<B>)> {
        Some((spare.clone(), Some(spare)))
    }
}

/// Records the body while it is sent, up to a limit. See
/// [`BearerAuthLayer::buffered`](crate::BearerAuthLayer::buffered).
#[derive(Clone, Copy, Debug)]
pub struct Buffered {
    pub(crate) limit: usize,
}

impl<B> Replay<B> for Buffered
where
    B: Body,
    B::Error: Into<BoxError>,
{
    type Body = ReplayBody<B>;
    type Spare = Rewind<B>;
    type Head = KeptHead;

    fn begin(&self, body: B) -> (ReplayBody<B>, Option<Rewind<B>>) {
        ReplayBody::record(body, self.limit)
    }

    fn hold(&self, spare: &Rewind<B>) -> bool {
        spare.hold()
    }

    fn release(&self, spare: &Rewind<B>, ends: bool) {
        spare.release(ends);
    }

    fn again(&self, spare: Rewind<B>) -> Option<(ReplayBody<B>, Option<Rewind<B>>)> {
        let body = spare.rewind()?;
        Some((body, Some(spare)))
    }
}

/// As [`Buffered`], for an inner service with its own body type. See
/// [`BearerAuthLayer::replay_with`](crate::BearerAuthLayer::replay_with).
///
/// `B` is the body of a request, and `W` that of the inner service.
pub struct ReplayWith<B: Body, W> {
    pub(crate) buffered: Buffered,
    pub(crate) wrap: fn(ReplayBody<B>) -> W,
}

impl<B: Body, W> Clone for ReplayWith<B, W> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Body, W> Copy for ReplayWith<B, W> {}

impl<B, W> Replay<B> for ReplayWith<B, W>
where
    B: Body,
    B::Error: Into<BoxError>,
{
    type Body = W;
    type Spare = Rewind<B>;
    type Head = KeptHead;

    fn begin(&self, body: B) -> (W, Option<Rewind<B>>) {
        let (body, spare) = self.buffered.begin(body);
        ((self.wrap)(body), spare)
    }

    fn hold(&self, spare: &Rewind<B>) -> bool {
        spare.hold()
    }

    fn release(&self, spare: &Rewind<B>, ends: bool) {
        spare.release(ends);
    }

    fn again(&self, spare: Rewind<B>) -> Option<(W, Option<Rewind<B>>)> {
        let (body, spare) = self.buffered.again(spare)?;
        Some(((self.wrap)(body), spare))
    }
}

debug_fields!(ReplayWith<B: Body, W> |it| { limit: it.buffered.limit });

/// Clones the body with a function. See [`BearerAuthLayer::clone_with`](crate::BearerAuthLayer::clone_with).
pub struct CloneWith<B> {
    pub(crate) clone: fn(&B) -> Option<B>,
}

impl<B> Clone for CloneWith<B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B> Copy for CloneWith<B> {}

impl<B> Replay<B> for CloneWith<B> {
    type Body = B;
    type Spare = B;
    type Head = KeptHead;

    fn begin(&self, body: B) -> (B, Option<B>) {
        let spare = (self.clone)(&body);
        (body, spare)
    }

    fn again(&self, spare: B) -> Option<(B, Option<B>)> {
        Some(self.begin(spare))
    }
}

debug_fields!(CloneWith<B> |_| {});

/// Never sends a request again. See [`BearerAuthLayer::no_replay`](crate::BearerAuthLayer::no_replay).
#[derive(Clone, Copy, Debug, Default)]
pub struct NoReplay;

impl<B> Replay<B> for NoReplay {
    type Body = B;
    type Spare = Infallible;
    type Head = Infallible;

    fn begin(&self, body: B) -> (B, Option<Infallible>) {
        (body, None)
    }

    #[inline]
    fn call<S>(&self, service: &mut S, request: Request<B>) -> (S::Future, Option<Infallible>)
    where
        S: Service<Request<B>>,
    {
        (service.call(request), None)
    }

    fn again(&self, spare: Infallible) -> Option<(B, Option<Infallible>)> {
        match spare {}
    }
}
