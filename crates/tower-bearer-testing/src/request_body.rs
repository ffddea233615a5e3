//! [`RequestBody`]: the body of a request to the API, whose token can be checked again at the body's end.

use std::{
    fmt,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

use super::{credential::Credential, routes::Server};
use crate::BoxError;

/// The body of a request to a service of [`api`](crate::AuthServerBuilder::api).
///
/// # Errors
///
/// A frame is an error if the connection breaks, or if the token is no longer valid at the end of the body
/// ([`check_after_body`](crate::AuthServerBuilder::check_after_body)).
pub struct RequestBody {
    body: Incoming,
    /// `None` if the token is not checked, or was checked.
    check: Option<Check>,
}

/// The check of a token at the end of the body.
struct Check {
    server: Server,
    credential: Credential,
    failed: CheckFailed,
}

/// Whether the check at the end of a body has failed.
#[derive(Clone, Default)]
pub(super) struct CheckFailed(Arc<AtomicBool>);

impl CheckFailed {
    pub(super) fn get(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

impl RequestBody {
    pub(super) fn unchecked(body: Incoming) -> Self {
        Self { body, check: None }
    }

    /// Returns a body at whose end the credential must still be valid. A request without a body needs no further check.
    pub(super) fn checked(body: Incoming, server: &Server, credential: Credential) -> (Self, CheckFailed) {
        let failed = CheckFailed::default();
        let check = Check { server: server.clone(), credential, failed: failed.clone() };
        let check = (!body.is_end_stream()).then_some(check);
        (Self { body, check }, failed)
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        // A reader that knows the length may not ask for the end after the last bytes.
        let ends = match &frame {
            Some(Ok(_)) => self.body.is_end_stream() || self.body.size_hint().exact() == Some(0),
            Some(Err(_)) => false,
            None => true,
        };
        let check = if ends { self.check.take() } else { None };
        if let Some(check) = check {
            if check.server.authority().account_with_credential(&check.credential).is_none() {
                check.failed.0.store(true, Ordering::Release);
                return Poll::Ready(Some(Err(
                    "the access token expired or was revoked during the request".into()
                )));
            }
        }
        Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        self.check.is_none() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Omits the content and the token.
impl fmt::Debug for RequestBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RequestBody").field("check_after_body", &self.check.is_some()).finish_non_exhaustive()
    }
}
