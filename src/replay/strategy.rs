//! [`Replay`]: what a strategy for sending a body again does.

use http::Request;
use tower_service::Service;

use super::KeepHead;

pub(super) mod sealed {
    /// Prevents implementations of [`Replay`](super::Replay) in other crates.
    pub trait Sealed {}
}

/// Sends a request body of type `B` again: the bound on [`BearerAuthLayer`](crate::BearerAuthLayer)'s parameter.
///
/// The strategies are [`Cloned`](super::Cloned) (the default), [`Buffered`](super::Buffered), [`ReplayWith`](super::ReplayWith),
/// [`CloneWith`](super::CloneWith) and [`NoReplay`](super::NoReplay). The
/// layer's methods choose one. This trait is sealed: no other type can implement it.
///
/// If a strategy does not support a body, write a method of tower's `ServiceExt` as a function, such as
/// `ServiceExt::oneshot(client, request)` or `ServiceExt::ready(&mut client)`: the compiler then names the remedy. With
/// method syntax it only reports that trait bounds are not satisfied, without the messages of the traits.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot send a request body of type `{B}` twice",
    label = "this body cannot be sent again after a 401 by `{Self}`",
    note = "the default strategy, `Cloned`, needs a body that is `Clone`",
    note = "for any other body, pick one on the layer: `.buffered(limit)` if the inner service takes any body, \
            `.replay_with(limit, InnerBody::new)` if it has a body type of its own, `.clone_with(InnerBody::try_clone)` \
            if its body can be cloned by a function, or `.no_replay()`"
)]
pub trait Replay<B>: sealed::Sealed + Clone {
    /// The request body of the inner service.
    type Body;

    /// What is kept to send the body again. It is dropped as soon as the body will not be sent again, which frees what
    /// was recorded.
    #[doc(hidden)]
    type Spare;

    /// What is kept of the request besides its body: its head, or nothing if no body is ever sent again.
    #[doc(hidden)]
    type Head: KeepHead;

    /// Starts the first attempt. Without a spare, the body is not sent again.
    #[doc(hidden)]
    fn begin(&self, body: B) -> (Self::Body, Option<Self::Spare>);

    /// Starts the first attempt of a whole request on `service`, which is ready.
    ///
    /// A strategy that does not change the body overrides it to pass the request on as it is: taking a request apart
    /// and putting it together again is a considerable part of a request's cost.
    #[doc(hidden)]
    #[inline]
    fn call<S>(&self, service: &mut S, request: Request<B>) -> (S::Future, Option<Self::Spare>)
    where
        S: Service<Request<Self::Body>>,
    {
        let (head, body) = request.into_parts();
        let (body, spare) = self.begin(body);
        (service.call(Request::from_parts(head, body)), spare)
    }

    /// Pauses the running attempt, and returns whether the body can be sent again. Dropping the spare resumes the
    /// attempt.
    ///
    /// Default: the attempt is not paused and the body can be sent again.
    #[doc(hidden)]
    fn hold(&self, spare: &Self::Spare) -> bool {
        let _ = spare;
        true
    }

    /// Ends the pause of the running attempt, and the attempt itself if it `ends`.
    #[doc(hidden)]
    fn release(&self, spare: &Self::Spare, ends: bool) {
        let _ = (spare, ends);
    }

    /// Starts another attempt and ends the previous one; `None` if the body cannot be sent again.
    #[doc(hidden)]
    fn again(&self, spare: Self::Spare) -> Option<(Self::Body, Option<Self::Spare>)>;
}
