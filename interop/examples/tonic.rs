//! A tonic client with a token that is refreshed automatically, for unary and streaming calls.
//!
//! ```text
//! cargo run -p tower-bearer-interop --example tonic
//! ```
//!
//! Shows the layer around a tonic `Channel`. gRPC responds with HTTP 200 and `grpc-status: 16`, so the challenge
//! predicate is `challenge::grpc`. The replayed body is wrapped as tonic's own. The server runs in this process.

use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Status, body::Body, service::interceptor::InterceptedService, transport};
use tonic_health::{
    ServingStatus,
    pb::{HealthCheckRequest, health_client::HealthClient},
};
use tower::{BoxError, Layer};
use tower_bearer::{BearerAuthLayer, TokenProvider, challenge};
use tower_bearer_interop::Issuer;

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let issuer = Issuer::default();
    let server = server(issuer.clone()).await?;

    let channel = transport::Channel::from_shared(server)?.connect().await?;
    let layer = BearerAuthLayer::with_provider(TokenProvider::new(issuer.clone()))
        .challenge(challenge::grpc)
        .replay_with(64 * 1024, Body::new);
    let mut client = HealthClient::new(layer.layer(channel));

    let videos = || HealthCheckRequest { service: "videos".into() };
    println!("unary:     {:?}", client.check(videos()).await?.into_inner().status());
    issuer.revoke();
    println!("           the token is revoked");
    let mut streaming = client.clone();
    let (unary, changes) = tokio::join!(client.check(videos()), streaming.watch(videos()));
    println!("unary:     {:?}", unary?.into_inner().status());
    let first = changes?.into_inner().message().await?.ok_or("the stream is at its end")?;
    println!("streaming: {:?}", first.status());
    println!(
        "{} tokens were issued, {} calls were challenged and retried",
        issuer.count(),
        issuer.challenged()
    );
    Ok(())
}

/// A health service that checks the token.
async fn server(issuer: Issuer) -> Result<String, BoxError> {
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_service_status("videos", ServingStatus::Serving).await;
    let checked = InterceptedService::new(health, move |request: Request<()>| {
        match issuer.accepts(&request.metadata().clone().into_headers()) {
            true => Ok(request),
            false => Err(Status::unauthenticated("who are you?")),
        }
    });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let incoming = TcpListenerStream::new(listener);
    tokio::spawn(transport::Server::builder().add_service(checked).serve_with_incoming(incoming));
    Ok(format!("http://{address}"))
}
