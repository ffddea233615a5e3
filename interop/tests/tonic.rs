//! tonic: unary and streaming calls to a tonic server that checks the token.

use std::net::SocketAddr;

use tokio_stream::wrappers::TcpListenerStream;
use tonic::{
    Code, Status,
    body::Body,
    service::interceptor::InterceptedService,
    transport::{Channel, Server},
};
use tonic_health::{
    ServingStatus,
    pb::{HealthCheckRequest, health_client::HealthClient},
    server::HealthReporter,
};
use tower::Layer;
use tower_bearer::{BearerAuth, BearerAuthLayer, TokenProvider, challenge, replay::ReplayWith};
use tower_bearer_interop::{Issuer, recovers_with_one_refresh};

/// A health service that checks the token and responds with HTTP 200 and `grpc-status: 16` if it is invalid.
async fn server(issuer: &Issuer) -> (SocketAddr, HealthReporter) {
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_service_status("videos", ServingStatus::Serving).await;
    let issuer = issuer.clone();
    let checked = InterceptedService::new(health, move |request: tonic::Request<()>| {
        match issuer.accepts(&request.metadata().clone().into_headers()) {
            true => Ok(request),
            false => Err(Status::unauthenticated("who are you?")),
        }
    });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serving =
        Server::builder().add_service(checked).serve_with_incoming(TcpListenerStream::new(listener));
    tokio::spawn(serving);
    (address, reporter)
}

fn client(address: SocketAddr, issuer: &Issuer) -> HealthClient<BearerAuth<Channel, ReplayWith<Body, Body>>> {
    let channel = Channel::from_shared(format!("http://{address}")).unwrap().connect_lazy();
    let layer = BearerAuthLayer::with_provider(TokenProvider::new(issuer.clone()))
        .challenge(challenge::grpc)
        .replay_with(64 * 1024, Body::new);
    HealthClient::new(layer.layer(channel))
}

fn videos() -> HealthCheckRequest {
    HealthCheckRequest { service: "videos".into() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unary_calls_recover() {
    let issuer = Issuer::default();
    let (address, _reporter) = server(&issuer).await;
    let client = client(address, &issuer);
    recovers_with_one_refresh(&issuer, |_| {
        let mut client = client.clone();
        async move {
            let answer = client.check(videos()).await.unwrap().into_inner();
            assert_eq!(answer.status, ServingStatus::Serving as i32);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_recover_and_survive_revocation() {
    let issuer = Issuer::default();
    let (address, reporter) = server(&issuer).await;
    let mut client = client(address, &issuer);
    let mut before = client.watch(videos()).await.unwrap().into_inner();
    assert_eq!(before.message().await.unwrap().unwrap().status, ServingStatus::Serving as i32);
    recovers_with_one_refresh(&issuer, |_| {
        let mut client = client.clone();
        async move {
            let mut changes = client.watch(videos()).await.unwrap().into_inner();
            let status = changes.message().await.unwrap().unwrap().status;
            assert_eq!(status, ServingStatus::Serving as i32);
        }
    })
    .await;
    reporter.set_service_status("videos", ServingStatus::NotServing).await;
    assert_eq!(before.message().await.unwrap().unwrap().status, ServingStatus::NotServing as i32);
}

/// An error unrelated to the token reaches the caller unchanged.
#[tokio::test]
async fn another_status_is_no_challenge() {
    let issuer = Issuer::default();
    let (address, _reporter) = server(&issuer).await;
    let mut client = client(address, &issuer);
    let unknown = HealthCheckRequest { service: "nobody".into() };
    assert_eq!(client.check(unknown).await.unwrap_err().code(), Code::NotFound);
    assert_eq!((issuer.count(), issuer.challenged()), (1, 0));
}
