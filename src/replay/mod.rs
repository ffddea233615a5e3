//! Sends a request again after a 401: [`Replay`], with one strategy per kind of body.
//!
//! # Which strategy
//!
//! | what is wrapped | what to add | sent again |
//! |---|---|---|
//! | a client whose body is `Clone` (`Full<Bytes>`, `Empty`, `String`) | nothing: [`Cloned`] | always |
//! | hyper-util's or reqwest's client, with any body | [`.buffered(limit)`](crate::BearerAuthLayer::buffered) | up to the limit |
//! | a service with a body type of its own, such as tonic's or octocrab's | [`.replay_with(limit, tonic::body::Body::new)`](crate::BearerAuthLayer::replay_with) | up to the limit |
//! | a body that knows how to clone itself, such as kube's | [`.clone_with(Body::try_clone)`](crate::BearerAuthLayer::clone_with) | as the body allows |
//! | anything | [`.no_replay()`](crate::BearerAuthLayer::no_replay) | never |
//!
//! A body whose clones share their read position, such as octocrab's, is `Clone`, but [`Cloned`] cannot replay it.
//!
//! # What is sent again
//!
//! Method, URI, version, headers (repeated names in order, sensitive marks kept), extensions, and the body with its
//! trailers.

mod body;
mod kept_head;
mod recording;
mod strategies;
mod strategy;

pub use self::body::{ReplayBody, Superseded};
pub(crate) use self::kept_head::KeepHead;
pub use self::strategies::{Buffered, CloneWith, Cloned, NoReplay, ReplayWith};
pub use self::strategy::Replay;
