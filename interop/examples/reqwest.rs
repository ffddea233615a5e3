//! A reqwest client whose token is renewed.
//!
//! ```text
//! cargo run -p tower-bearer-interop --example reqwest
//! ```
//!
//! It shows the layer around a `reqwest::Client`, whose proxies, redirects and TLS stay as they are. Requests and answers
//! are `http`'s; reqwest's own builder makes them as well. The API is a server of api.video's kind in this process.

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
    // An answer as reqwest's own, with its methods.
    let answer = reqwest::Response::from(client.oneshot(request).await?);
    println!("{}: {}", answer.status(), answer.text().await?);
    let counters = api.counters();
    println!(
        "{} calls were refused and sent again, after {} refreshes",
        counters.challenged, counters.refresh_grants
    );
    Ok(())
}
