//! [`Fault`]: what a test makes the server do wrong, and the queue of faults.

use std::{collections::VecDeque, time::Duration};

use bytes::Bytes;
use http::{Response, StatusCode};

/// The kind of request that a fault applies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Route {
    /// `POST /auth/api-key`
    ApiKeyGrant,
    /// `POST /auth/refresh`
    RefreshGrant,
    /// `GET /oauth/authorize`
    OAuthAuthorization,
    /// `POST /oauth/token`
    OAuthToken,
    /// `GET /.well-known/oauth-authorization-server`
    Metadata,
    /// Every other request: the API itself.
    Api,
}

/// What goes wrong with one request.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Fault {
    /// Responds with this status and does not process the request.
    Status(StatusCode),
    /// Responds with exactly this and does not process the request.
    Answer(Response<Bytes>),
    /// Waits, then processes the request normally.
    Delay(Duration),
    /// Never responds, and does not process the request.
    Hang,
    /// Resets the connection and does not process the request.
    Reset,
    /// Processes the request, then resets the connection, so that the response is lost.
    LoseAnswer,
    /// Processes the request, then breaks the connection in the middle of the response body.
    Truncate,
    /// Processes the request, then sends the response body one byte at a time, with this pause before each.
    Drip(Duration),
}

/// The faults for the next requests, by route.
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

    /// Returns the fault for a request to `route`: the first in the queue, else the permanent one.
    pub(super) fn next(&mut self, route: Route) -> Option<Fault> {
        if let Some(queued) = self.once.iter().position(|(of, _)| *of == route) {
            return self.once.remove(queued).map(|(_, fault)| fault);
        }
        self.always.iter().find(|(of, _)| *of == route).map(|(_, fault)| fault.clone())
    }
}
