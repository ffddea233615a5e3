//! A body that cannot be cloned, sent by tower's `ServiceExt`. With method syntax, the compiler only reports that trait
//! bounds are not satisfied. With function syntax it names the remedy, as README.md says.

use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::combinators::UnsyncBoxBody;
use hyper_util::client::legacy::{Client, connect::HttpConnector};
use tower::{ServiceBuilder, ServiceExt};
use tower_bearer::{BearerAuth, BearerAuthLayer, BoxError};

type Body = UnsyncBoxBody<Bytes, BoxError>;
type HttpClient = Client<HttpConnector, Body>;

struct AppState {
    client: BearerAuth<HttpClient>,
}

fn field(state: &AppState, request: Request<Body>) {
    let _ = ServiceExt::oneshot(state.client.clone(), request);
}

fn field_made_ready(state: &mut AppState) {
    let _ = ServiceExt::ready(&mut state.client);
}

fn built(layer: BearerAuthLayer, client: HttpClient, request: Request<Body>) {
    let service = ServiceBuilder::new().timeout(Duration::from_secs(1)).layer(layer).service(client);
    let _ = ServiceExt::oneshot(service, request);
}

fn main() {}
