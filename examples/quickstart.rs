//! Sends a thousand concurrent requests and revokes every token in the middle. All get a 200, after one refresh.
//!
//! ```text
//! cargo run --example quickstart                    # no key, no network: the crate's test server, on loopback
//! cargo run --example quickstart -- --api-key KEY   # lists the videos of your sandbox account (or API_VIDEO_KEY)
//! ```

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{Request, StatusCode, Uri};
use http_body_util::{BodyExt, Empty};
use hyper_rustls::HttpsConnectorBuilder;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use indicatif::{ProgressBar, ProgressStyle};
use tokio::task::JoinSet;
use tower::{Service, ServiceBuilder, ServiceExt};
use tower_bearer::{ApiVideo, BearerAuthLayer, BoxError, TokenProvider};
use tower_bearer_testing::AuthServer;

const REQUESTS: usize = 1000;

#[tokio::main]
async fn main() -> Result<ExitCode, BoxError> {
    let mut arguments = std::env::args().skip(1);
    let api_key = match (arguments.next().as_deref(), arguments.next()) {
        (Some("--api-key"), Some(key)) => Some(key),
        (None, _) => std::env::var("API_VIDEO_KEY").ok().filter(|key| !key.is_empty()),
        _ => {
            eprintln!("usage: quickstart [--api-key KEY]");
            return Ok(ExitCode::from(2));
        }
    };
    match api_key {
        Some(key) => {
            let source = ApiVideo::sandbox(key);
            let api = source.api_base();
            let (status, body) = list_videos(client(source)?, &api).await?;
            println!("{status}\n{}", String::from_utf8_lossy(&body));
            Ok(if status == StatusCode::OK { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        None => revoke_in_the_middle().await,
    }
}

/// Returns the layer over hyper-util's client, which is all that an application needs.
fn client(
    source: ApiVideo,
) -> Result<
    impl Service<
        Request<Empty<Bytes>>,
        Response = http::Response<hyper::body::Incoming>,
        Error = BoxError,
        Future: Send,
    > + Clone,
    BoxError,
> {
    let https = HttpsConnectorBuilder::new()
        .with_provider_and_webpki_roots(rustls::crypto::ring::default_provider())?
        .https_or_http()
        .enable_all_versions()
        .build();
    Ok(ServiceBuilder::new()
        .layer(BearerAuthLayer::with_provider(TokenProvider::new(source)))
        .service(Client::builder(TokioExecutor::new()).http2_only(true).build(https)))
}

async fn list_videos(
    client: impl Service<
        Request<Empty<Bytes>>,
        Response = http::Response<hyper::body::Incoming>,
        Error = BoxError,
    >,
    api: &Uri,
) -> Result<(StatusCode, Bytes), BoxError> {
    let request = Request::get(format!("{}videos", api)).body(Empty::new())?;
    let response = client.oneshot(request).await?;
    Ok((response.status(), response.into_body().collect().await?.to_bytes()))
}

async fn revoke_in_the_middle() -> Result<ExitCode, BoxError> {
    let server = AuthServer::start().await?;
    let client = client(ApiVideo::new(server.api_key()).base_url(server.uri()))?;
    println!("{REQUESTS} concurrent requests to {}; every token is revoked after half of them", server.uri());

    let progress = ProgressBar::new(REQUESTS as u64)
        .with_style(ProgressStyle::with_template("{bar:50} {pos}/{len} answered, {per_sec}")?);
    let mut requests = JoinSet::new();
    for _ in 0..REQUESTS {
        let (client, api) = (client.clone(), server.uri());
        requests.spawn(async move {
            let begun = Instant::now();
            let status = list_videos(client, &api).await.map(|(status, _)| status);
            (status, begun.elapsed())
        });
    }
    let (mut answered_200, mut slowest) = (0, Duration::ZERO);
    for answered in 1..=REQUESTS {
        let Some(result) = requests.join_next().await else { break };
        let (status, took) = result?;
        match status {
            Ok(StatusCode::OK) => answered_200 += 1,
            Ok(status) => progress.suspend(|| println!("a request was answered {status}")),
            Err(error) => progress.suspend(|| println!("a request failed: {error}")),
        }
        slowest = slowest.max(took);
        progress.inc(1);
        if answered == REQUESTS / 2 {
            server.revoke_access_tokens();
        }
    }
    progress.finish();

    let counters = server.counters();
    println!("answered 200        {answered_200} of {REQUESTS}");
    println!("401s healed         {}", counters.challenged);
    println!("POST /auth/api-key  {}", counters.api_key_grants + counters.rejected_api_keys);
    println!("POST /auth/refresh  {}", counters.refresh_grants + counters.rejected_refresh_tokens);
    println!("TCP connections     {}", counters.connections);
    println!("slowest request     {slowest:.1?}");
    // Each of these is a request whose first response was a 401.
    println!(
        "Without the layer, {} of these requests would have failed with HTTP 401: each would have had to be sent again by \
         its caller, and each caller could have spent the refresh token.",
        counters.challenged
    );
    let as_promised =
        answered_200 == REQUESTS && counters.api_key_grants == 1 && counters.refresh_grants == 1;
    Ok(if as_promised { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
