//! `.buffered(limit)` over a service whose body type is its own.

use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use hyper_util::client::legacy::{Client, connect::HttpConnector};
use tower::{Layer, Service};
use tower_bearer::{BearerAuthLayer, TokenProvider};

type Body = Full<Bytes>;

/// As SDKs take their service.
fn sdk(_: impl Service<Request<Body>>) {}

fn send(provider: TokenProvider, client: Client<HttpConnector, Body>) {
    sdk(BearerAuthLayer::with_provider(provider).buffered(1024).layer(client));
}

fn main() {}
