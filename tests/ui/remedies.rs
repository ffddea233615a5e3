//! The mistakes of the other files, each with its remedy. This file compiles.

use std::{convert::Infallible, time::Duration};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{Full, combinators::UnsyncBoxBody};
use hyper_util::client::legacy::{Client, connect::HttpConnector};
use tower::{Layer, Service, ServiceBuilder, service_fn};
use tower_bearer::{BearerAuthLayer, BoxError, TokenProvider, replay::ReplayBody};

type Body = Full<Bytes>;
type OneTimeBody = UnsyncBoxBody<Bytes, Infallible>;
type InnerBody = UnsyncBoxBody<Bytes, BoxError>;

fn body_is_not_clone(provider: TokenProvider, request: Request<OneTimeBody>) {
    let client = service_fn(|_: Request<ReplayBody<OneTimeBody>>| async {
        Ok::<_, Infallible>(Response::new(String::new()))
    });
    let mut service = BearerAuthLayer::with_provider(provider).buffered(1024).layer(client);
    let _ = Service::call(&mut service, request);
}

/// As SDKs take their service.
fn sdk(_: impl Service<Request<Body>>) {}

fn fixed_body_under_buffered(provider: TokenProvider, client: Client<HttpConnector, InnerBody>) {
    sdk(BearerAuthLayer::with_provider(provider).replay_with(1024, InnerBody::new).layer(client));
}

fn inner_service_is_not_clone(bearer: BearerAuthLayer) {
    let client = service_fn(|_: Request<Body>| async { Ok::<_, BoxError>(Response::new(String::new())) });
    let limited = ServiceBuilder::new().rate_limit(100, Duration::from_secs(1)).service(client);
    let _ = ServiceBuilder::new().layer(bearer).buffer(1024).service(limited);
}

fn wrong_layer_order(bearer: BearerAuthLayer) {
    let client = service_fn(|_: Request<Body>| async { Ok::<_, Infallible>(Response::new(String::new())) });
    let mut service = ServiceBuilder::new()
        .map_response(|response: Response<String>| response.status())
        .layer(bearer)
        .service(client);
    let _ = Service::call(&mut service, Request::new(Body::default()));
}

fn main() {}
