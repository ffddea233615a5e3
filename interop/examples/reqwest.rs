//! A reqwest client with a token that is refreshed automatically.
//!
//! ```text
//! cargo run -p tower-bearer-interop --example reqwest
//! ```
//!
//! Shows the layer around a `reqwest::Client`, which keeps its proxies, redirects and TLS. Requests and responses are
//! those of `http`; requests can also be built with reqwest's builder. The API is a simulated api.video in this
//! process.

use tower::{BoxError, Layer, ServiceExt};
use tower_bearer::{ApiVideo, BearerAuthLayer, ReqwestService, TokenProvider, testing::AuthServer};

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let api = AuthServer::start().await?;
    let provider = TokenProvider::new(ApiVideo::new(api.api_key()).base_url(api.uri()));
    let client = BearerAuthLayer::with_provider(provider)
        .replay_with(1 << 20, reqwest::Body::wrap)
        .layer(ReqwestService::new(reqwest::Client::new()));

    let video = r#"{"title": "A film"}"#;
    let request = http::Request::post(format!("{}videos", api.uri())).body(reqwest::Body::from(video))?;
    println!("{}", client.clone().oneshot(request).await?.status());
    api.revoke_access_tokens();
    println!("the token is revoked");
    let request = http::Request::get(format!("{}videos", api.uri())).body(reqwest::Body::default())?;
    // Convert the response to reqwest's own type.
    let answer = reqwest::Response::from(client.oneshot(request).await?);
    println!("{}: {}", answer.status(), answer.text().await?);
    let counters = api.counters();
    println!(
        "{} calls were challenged and retried, after {} refreshes",
        counters.challenged, counters.refresh_grants
    );
    Ok(())
}
