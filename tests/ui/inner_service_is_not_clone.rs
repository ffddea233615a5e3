//! An inner service that is not `Clone`, such as tower's rate limit.

use std::{convert::Infallible, time::Duration};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use tower::{Layer, ServiceBuilder, service_fn};
use tower_bearer::{BearerAuthLayer, StaticToken, TokenProvider};

type Body = Full<Bytes>;

fn main() {
    let client = service_fn(|_: Request<Body>| async { Ok::<_, Infallible>(Response::new(String::new())) });
    let limited = ServiceBuilder::new().rate_limit(100, Duration::from_secs(1)).service(client);
    let provider = TokenProvider::new(StaticToken::new("abc"));
    let _ = BearerAuthLayer::with_provider(provider).layer(limited);
}
