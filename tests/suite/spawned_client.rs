//! A task can be spawned that calls the client, with each strategy and each kind of inner service.

use std::{net::Ipv4Addr, time::Duration};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{Request, Response, StatusCode, header::AUTHORIZATION};
use http_body::Body;
use http_body_util::{BodyExt, Empty, Full, combinators::UnsyncBoxBody};
use hyper::{body::Incoming, server::conn::http1};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioIo,
};
use tokio::{net::TcpListener, time::timeout};
use tower::{Layer, Service, ServiceExt, buffer::Buffer, service_fn, util::BoxCloneService};
use tower_bearer::{
    BearerAuth, BearerAuthLayer, BoxError, StaticToken,
    replay::{NoReplay, ReplayBody, ReplayWith},
};

use crate::support;

const TEXT: &str = "the body";

type BoxBody = UnsyncBoxBody<Bytes, BoxError>;

fn boxed() -> BoxBody {
    Full::from(TEXT).map_err(|error| match error {}).boxed_unsync()
}

fn layer() -> BearerAuthLayer {
    support::scene_of(StaticToken::new("access-1")).build().layer
}

/// Responds with 200 to a request that has the token and the whole body.
async fn respond<B>(request: Request<B>) -> Result<Response<Empty<Bytes>>, BoxError>
where
    B: Body<Data: Send, Error: Into<BoxError>> + Send,
{
    let has_token = request.headers().get(AUTHORIZATION).is_some_and(|value| value == "Bearer access-1");
    let body = request.into_body().collect().await.map_err(Into::into)?.to_bytes();
    let status = if has_token && body == TEXT { StatusCode::OK } else { StatusCode::BAD_REQUEST };
    Ok(Response::builder().status(status).body(Empty::new())?)
}

/// As [`respond`], with the future that a service with a boxed future has.
fn respond_boxed<B>(request: Request<B>) -> BoxFuture<'static, Result<Response<Empty<Bytes>>, BoxError>>
where
    B: Body<Data: Send, Error: Into<BoxError>> + Send + 'static,
{
    Box::pin(respond(request))
}

/// Starts a server on loopback, and returns its URI.
async fn server() -> String {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let uri = format!("http://{}/", listener.local_addr().unwrap());
    tokio::spawn(async move {
        loop {
            let stream = TokioIo::new(listener.accept().await.unwrap().0);
            let service = hyper::service::service_fn(respond::<Incoming>);
            tokio::spawn(http1::Builder::new().serve_connection(stream, service));
        }
    });
    uri
}

/// Spawns a task that calls the client, and expects that it succeeds. A macro, since a function would not check the
/// concrete types.
macro_rules! expect_ok {
    ($client:expr, $uri:expr, $body:expr) => {{
        let mut client = $client;
        let request = Request::post($uri).body($body).unwrap();
        let task = tokio::spawn(async move { client.ready().await?.call(request).await });
        let response = timeout(Duration::from_secs(10), task).await.expect("hangs").unwrap().unwrap();
        assert_eq!(response.status(), StatusCode::OK);
    }};
}

/// Spawns calls of clients over each kind of inner service, which takes bodies of type `$inner`.
macro_rules! expect_all {
    ($layer:expr, $body:expr, $inner:ty) => {{
        let uri = "https://api.example/videos";
        expect_ok!($layer.layer(support::http1::<$inner>()), server().await, $body);
        expect_ok!($layer.layer(Buffer::new(service_fn(respond_boxed::<$inner>), 8)), uri, $body);
        expect_ok!($layer.layer(BoxCloneService::new(service_fn(respond::<$inner>))), uri, $body);
        expect_ok!($layer.layer(service_fn(respond::<$inner>)), uri, $body);
        let boxed = service_fn(|request: Request<$inner>| async { respond(request).await });
        expect_ok!($layer.layer(boxed), uri, $body);
    }};
}

/// A task is spawned that sends a body that is `Clone`.
#[tokio::test]
async fn cloned_bodies_can_be_spawned() {
    expect_all!(layer(), Full::<Bytes>::from(TEXT), Full<Bytes>);
}

/// A task is spawned that sends a buffered body.
#[tokio::test]
async fn buffered_bodies_can_be_spawned() {
    expect_all!(layer().buffered(1024), boxed(), ReplayBody<BoxBody>);
}

/// A task is spawned that sends a body that is wrapped in that of the inner service.
#[tokio::test]
async fn wrapped_bodies_can_be_spawned() {
    expect_all!(layer().replay_with(1024, |body: ReplayBody<BoxBody>| body.boxed_unsync()), boxed(), BoxBody);
}

/// A task is spawned that sends a body that a function clones.
#[tokio::test]
async fn bodies_of_clone_with_can_be_spawned() {
    expect_all!(layer().clone_with(|_: &BoxBody| Some(boxed())), boxed(), BoxBody);
}

/// A task is spawned that sends a body that cannot be sent again.
#[tokio::test]
async fn unreplayable_bodies_can_be_spawned() {
    expect_all!(layer().no_replay(), boxed(), BoxBody);
}

/// A library whose client is a field. Its users spawn its calls.
struct Sdk<R> {
    client: BearerAuth<Client<HttpConnector, BoxBody>, R>,
    uri: String,
}

impl Sdk<NoReplay> {
    async fn send(mut self) -> Result<StatusCode, BoxError> {
        let request = Request::post(&self.uri).body(boxed())?;
        Ok(self.client.ready().await?.call(request).await?.status())
    }
}

impl Sdk<ReplayWith<BoxBody, BoxBody>> {
    async fn send(mut self) -> Result<StatusCode, BoxError> {
        let request = Request::post(&self.uri).body(boxed())?;
        Ok(self.client.ready().await?.call(request).await?.status())
    }
}

/// A task is spawned that calls a library's client.
#[tokio::test]
async fn calls_of_library_can_be_spawned() {
    let uri = server().await;
    let sdk = Sdk { client: layer().no_replay().layer(support::http1()), uri: uri.clone() };
    assert_eq!(tokio::spawn(sdk.send()).await.unwrap().unwrap(), StatusCode::OK);
    let sdk = Sdk { client: layer().replay_with(1024, BodyExt::boxed_unsync).layer(support::http1()), uri };
    assert_eq!(tokio::spawn(sdk.send()).await.unwrap().unwrap(), StatusCode::OK);
}
