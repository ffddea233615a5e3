//! [`Fault`]: what a test makes the server do wrong, and the queue of what is still to come.

use std::{collections::VecDeque, time::Duration};

use bytes::Bytes;
use http::{Response, StatusCode};

/// Which kind of request a fault, or a count, is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Route {
    /// `POST /auth/api-key`
    ApiKeyGrant,
    /// `POST /auth/refresh`
    RefreshGrant,
    /// Everything else: the API itself.
    Api,
}

/// What goes wrong with one request.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Fault {
    /// Answers this status without acting on the request.
    Status(StatusCode),
    /// Answers just this without acting on the request.
    Answer(Response<Bytes>),
    /// Waits, then acts on the request and answers as ever.
    Delay(Duration),
    /// Never answers, and does not act on the request.
    Hang,
    /// Resets the connection without acting on the request.
    Reset,
    /// Acts on the request, then resets the connection: the answer is lost.
    LoseAnswer,
    /// Acts on the request, then breaks the connection in the middle of the answer's body.
    Truncate,
    /// Acts on the request, then sends the answer's body a byte at a time, with this pause before each.
    Drip(Duration),
}

/// The faults that are still to come, by route.
#[derive(Debug, Default)]
pub(super) struct Faults {
    once: VecDeque<(Route, Fault)>,
    always: Vec<(Route, Fault)>,
}

impl Faults {
    pub(super) fn push(&mut self, route: Route, fault: Fault) {
        self.once.push_back((route, fault));
    }

    pub(super) fn set(&mut self, route: Route, fault: Fault) {
        self.always.retain(|(of, _)| *of != route);
        self.always.push((route, fault));
    }

    pub(super) fn clear(&mut self) {
        self.once.clear();
        self.always.clear();
    }

    /// The fault for a request to `route`: the first queued, else the lasting one.
    pub(super) fn next(&mut self, route: Route) -> Option<Fault> {
        if let Some(queued) = self.once.iter().position(|(of, _)| *of == route) {
            return self.once.remove(queued).map(|(_, fault)| fault);
        }
        self.always.iter().find(|(of, _)| *of == route).map(|(_, fault)| fault.clone())
    }
}
