//! A layer that makes another answer of the HTTP response, beneath ours instead of above it.

use std::convert::Infallible;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use tower::{Service, ServiceBuilder, service_fn};
use tower_bearer::{BearerAuthLayer, StaticToken, TokenProvider};

type Body = Full<Bytes>;

fn main() {
    let client = service_fn(|_: Request<Body>| async { Ok::<_, Infallible>(Response::new(String::new())) });
    let provider = TokenProvider::new(StaticToken::new("abc"));
    let mut service = ServiceBuilder::new()
        .layer(BearerAuthLayer::with_provider(provider))
        .map_response(|response: Response<String>| response.status())
        .service(client);
    let _ = Service::call(&mut service, Request::new(Body::default()));
}
