//! How a request is sent again: [`Replay`] and its strategies for the body, `head` for the rest.
//!
//! # Which strategy
//!
//! | what is wrapped | what to add | sent again |
//! |---|---|---|
//! | a client whose body is `Clone` (`Full<Bytes>`, `Empty`, `String`) | nothing: [`Cloned`] | always |
//! | hyper-util's client with a streamed body | [`.buffered(limit)`](crate::BearerAuthLayer::buffered) | up to the limit |
//! | a service with a body type of its own, such as tonic's, octocrab's or reqwest's | [`.replay_with(limit, tonic::body::Body::new)`](crate::BearerAuthLayer::replay_with) | up to the limit |
//! | a body that knows how to clone itself, such as kube's | [`.clone_with(Body::try_clone)`](crate::BearerAuthLayer::clone_with) | as the body allows |
//! | anything | [`.no_replay()`](crate::BearerAuthLayer::no_replay) | never |
//!
//! A body whose clones share what has been read of it, such as octocrab's, is `Clone`, and of no use to [`Cloned`].
//!
//! # What is sent again
//!
//! Method, URI, version, headers (repeated names in order, sensitive marks kept), extensions, and the body with its
//! trailers.

mod body;
mod request_head;
mod strategies;

pub(crate) use self::request_head::RequestHead;
use http::Request;
use tower_service::Service;

pub use self::{
    body::{ReplayBody, Rewind, Superseded},
    strategies::{Buffered, CloneWith, Cloned, NoReplay, ReplayWith},
};

/// How a request body of type `B` is sent again: the bound that
/// [`BearerAuthLayer`](crate::BearerAuthLayer)'s parameter has to meet.
///
/// Its strategies are [`Cloned`] (the default), [`Buffered`], [`ReplayWith`], [`CloneWith`] and [`NoReplay`]; the
/// layer's methods choose one.
///
/// When a body does not fit, the compiler says so best where the call is written `Service::call(&mut service, request)`:
/// method syntax only says that there is no such method.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot send a request body of type `{B}` twice",
    label = "this body cannot be sent again after a 401 by `{Self}`",
    note = "the default strategy, `Cloned`, needs a body that is `Clone`",
    note = "for any other body, pick one on the layer: `.buffered(limit)` if the inner service takes any body, \
            `.replay_with(limit, InnerBody::new)` if it has a body type of its own, `.clone_with(InnerBody::try_clone)` \
            if its body can be cloned by a function, or `.no_replay()`"
)]
pub trait Replay<B>: Clone {
    /// The body that the inner service is sent.
    type Body;

    /// What is kept while an answer is awaited, to send the body again.
    ///
    /// It is dropped as soon as the body will not be sent again; what was recorded for it can then go.
    type Spare;

    /// Whether a body is ever sent again; if not, nothing else of the request is kept either. Default: yes.
    const REPLAYS: bool = true;

    /// Starts the first attempt. Without a spare the body is not sent again.
    fn begin(&self, body: B) -> (Self::Body, Option<Self::Spare>);

    /// Starts the first attempt of a whole request on `service`, which is ready.
    ///
    /// A strategy that leaves the body as it is hands the request on as it came: taking it apart and putting it together
    /// again is a good part of what a request pays.
    #[inline]
    fn call<S>(&self, service: &mut S, request: Request<B>) -> (S::Future, Option<Self::Spare>)
    where
        S: Service<Request<Self::Body>>,
    {
        let (head, body) = request.into_parts();
        let (body, spare) = self.begin(body);
        (service.call(Request::from_parts(head, body)), spare)
    }

    /// Stops the attempt under way where it is, if it still runs, and says whether the body can be sent again.
    ///
    /// Dropping the spare lets the attempt go on. Default: nothing is stopped, and it can be.
    fn hold(&self, spare: &Self::Spare) -> bool {
        let _ = spare;
        true
    }

    /// Starts another attempt, which ends the one before it; `None` if it cannot be done after all.
    fn again(&self, spare: Self::Spare) -> Option<(Self::Body, Option<Self::Spare>)>;
}
