//! A reqwest client with a token that is refreshed automatically.
//!
//! ```text
//! cargo run -p tower-bearer-interop --example reqwest
//! ```
//!
//! Shows the layer around a `reqwest::Client`, which keeps its proxies, redirects and TLS. reqwest's builder builds the
//! requests, and its methods read the responses. The API is a simulated api.video in this process.

use serde_json::json;
use tower::{BoxError, ServiceBuilder};
use tower_bearer::{ApiVideo, BearerAuthLayer, ReqwestService, TokenProvider};
use tower_bearer_testing::AuthServer;

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let api = AuthServer::start().await?;
    let provider = TokenProvider::new(ApiVideo::new(api.api_key()).base_url(api.uri()));
    let http = reqwest::Client::new();
    let client = ServiceBuilder::new()
        .layer(BearerAuthLayer::with_provider(provider).buffered(1 << 20))
        .service(ReqwestService::new(http.clone()));

    let url = format!("{}videos", api.uri());
    let request = http.post(&url).json(&json!({ "title": "A film" })).build()?;
    println!("{}", client.execute(request).await?.status());
    api.revoke_access_tokens();
    println!("the token is revoked");
    let response = client.execute(http.get(&url).build()?).await?;
    println!("{}: {}", response.status(), response.text().await?);
    let counters = api.counters();
    println!(
        "{} calls were challenged and retried, after {} refreshes",
        counters.challenged, counters.refresh_grants
    );
    Ok(())
}
