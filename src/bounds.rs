//! What the layer requires of the service that it wraps, as traits whose compiler messages name the remedy.

use http::{Request, Response};
use http_body::Body;
use tower_service::Service;

use crate::error::BoxError;

/// A service whose clone can send a retry: any that is `Clone`. Implemented for all of them; it exists for the
/// compiler's message where it is missing.
#[diagnostic::on_unimplemented(
    message = "`BearerAuthLayer` cannot wrap `{Self}`, which is not `Clone`",
    label = "a retry is sent on a clone of this service",
    note = "put a buffer between the two, which makes any service `Clone`: \
            `ServiceBuilder::new().layer(bearer).buffer(1024).service(inner)`, or `tower::buffer::BufferLayer`"
)]
pub trait CloneService: Clone {}

#[diagnostic::do_not_recommend]
impl<S: Clone> CloneService for S {}

/// A service of HTTP requests with a body of type `B`: any that takes `http::Request<B>` and returns `http::Response`.
/// Implemented for all of them; it exists for the compiler's message where it is missing.
#[diagnostic::on_unimplemented(
    message = "`BearerAuth` cannot send requests with a body of type `{B}` to `{Self}`",
    label = "this inner service takes another body, or does not answer with `http::Response`",
    note = "`.buffered(limit)` gives the inner service a `ReplayBody`: if it has a body type of its own, use \
            `.replay_with(limit, InnerBody::new)` instead",
    note = "layers that change the request's or the answer's type go outside of `BearerAuthLayer`: above it in a \
            `ServiceBuilder`"
)]
pub trait HttpService<B>:
    Service<Request<B>, Response = Response<<Self as HttpService<B>>::ResBody>, Error: Into<BoxError>>
{
    /// The body of its responses.
    type ResBody: Body;
}

#[diagnostic::do_not_recommend]
impl<S, B, ResBody> HttpService<B> for S
where
    S: Service<Request<B>, Response = Response<ResBody>, Error: Into<BoxError>>,
    ResBody: Body,
{
    type ResBody = ResBody;
}
