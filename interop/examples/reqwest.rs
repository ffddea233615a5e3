//! A reqwest client with a token that is refreshed automatically.
//!
//! ```text
//! cargo run -p tower-bearer-interop --example reqwest
//! ```
//!
//! Shows the layer around a `reqwest::Client`, which keeps its proxies, redirects and TLS. reqwest's builder builds the
//! requests, and its methods read the responses. The API is a simulated api.video in this process.

use serde_json::json;
use tower::{BoxError, Layer, ServiceExt};
use tower_bearer::{ApiVideo, BearerAuthLayer, ReqwestService, TokenProvider};
use tower_bearer_testing::AuthServer;

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let api = AuthServer::start().await?;
    let provider = TokenProvider::new(ApiVideo::new(api.api_key()).base_url(api.uri()));
    let reqwest = reqwest::Client::new();
    let client = BearerAuthLayer::with_provider(provider)
        .replay_with(1 << 20, reqwest::Body::wrap)
        .layer(ReqwestService::new(reqwest.clone()));

    let url = format!("{}videos", api.uri());
    let request = reqwest.post(&url).json(&json!({ "title": "A film" })).build()?;
    let request = http::Request::<reqwest::Body>::try_from(request)?;
    println!("{}", client.clone().oneshot(request).await?.status());
    api.revoke_access_tokens();
    println!("the token is revoked");
    let request = http::Request::<reqwest::Body>::try_from(reqwest.get(&url).build()?)?;
    let answer = reqwest::Response::from(client.oneshot(request).await?);
    println!("{}: {}", answer.status(), answer.text().await?);
    let counters = api.counters();
    println!(
        "{} calls were challenged and retried, after {} refreshes",
        counters.challenged, counters.refresh_grants
    );
    Ok(())
}
