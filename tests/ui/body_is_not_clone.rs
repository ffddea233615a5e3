//! A body that cannot be cloned, under the default strategy.

use std::convert::Infallible;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use tower::{Layer, Service, service_fn};
use tower_bearer::{BearerAuthLayer, TokenProvider, TokenSource};

type Body = UnsyncBoxBody<Bytes, Infallible>;

fn layered(source: impl TokenSource, request: Request<Body>) {
    let client = service_fn(|_: Request<Body>| async { Ok::<_, Infallible>(Response::new(String::new())) });
    let mut service = BearerAuthLayer::with_provider(TokenProvider::new(source)).layer(client);
    let _ = Service::call(&mut service, request);
}

fn main() {}
