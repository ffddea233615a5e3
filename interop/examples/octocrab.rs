//! An octocrab client whose token is refreshed between two pages.
//!
//! ```text
//! cargo run -p tower-bearer-interop --example octocrab
//! ```
//!
//! Shows the layer on octocrab's builder, inside its `BaseUriLayer`. Clones of an octocrab body share their read
//! position, so a clone cannot replay the body: `replay_with` records it instead. The server runs in this process.

use std::collections::HashMap;

use axum::{Json, Router, extract::Query, http::HeaderMap, routing::get};
use http::Uri;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use octocrab::{AuthState, OctoBody, OctocrabBuilder, Page, service::middleware::base_uri::BaseUriLayer};
use serde_json::{Value, json};
use tower::BoxError;
use tower_bearer::{BearerAuthLayer, TokenProvider};
use tower_bearer_interop::{Issuer, serve};

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let issuer = Issuer::default();
    let server = serve(Router::new().route("/issues", get(issues)), &issuer).await;

    let layer = BearerAuthLayer::with_provider(TokenProvider::new(issuer.clone()));
    let octocrab = OctocrabBuilder::new_empty()
        .with_service(Client::builder(TokioExecutor::new()).build_http::<OctoBody>())
        .with_layer(&layer.replay_with(1 << 20, OctoBody::new))
        .with_layer(&BaseUriLayer::new(format!("http://{server}").parse::<Uri>()?))
        .with_auth(AuthState::None)
        .build()?;

    let first: Page<Value> = octocrab.get("/issues", None::<&()>).await?;
    println!("the first page: {} issues", first.items.len());
    issuer.revoke();
    println!("the token is revoked");
    let all = octocrab.all_pages(first).await?;
    println!("all pages:      {} issues", all.len());
    println!(
        "{} tokens were issued, {} calls were challenged and retried",
        issuer.count(),
        issuer.challenged()
    );
    Ok(())
}

/// Three pages of ten issues, each with a link to the next.
async fn issues(
    headers: HeaderMap,
    Query(query): Query<HashMap<String, u32>>,
) -> ([(&'static str, String); 1], Json<Value>) {
    let page = query.get("page").copied().unwrap_or(1);
    let host = headers.get("host").and_then(|host| host.to_str().ok()).unwrap_or_default();
    let (to, rel) = if page < 3 { (page + 1, "next") } else { (1, "first") };
    let issues: Vec<_> = (1..=10).map(|number| json!({ "number": (page - 1) * 10 + number })).collect();
    ([("link", format!("<http://{host}/issues?page={to}>; rel=\"{rel}\""))], Json(issues.into()))
}
