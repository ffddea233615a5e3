//! Two SDKs share one provider, and so one token.
//!
//! ```text
//! cargo run -p tower-bearer-interop --example shared_provider
//! ```
//!
//! Shows that different layers, around octocrab and around reqwest, share one token, one refresh and one status. With
//! one provider each, they would invalidate each other's refresh tokens. The server runs in this process.

use axum::{Json, Router, routing::get};
use http::Uri;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use octocrab::{AuthState, OctoBody, OctocrabBuilder, service::middleware::base_uri::BaseUriLayer};
use serde_json::{Value, json};
use tower::{BoxError, Layer, ServiceExt};
use tower_bearer::{BearerAuthLayer, ReqwestService, TokenProvider};
use tower_bearer_interop::{Issuer, serve};

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let issuer = Issuer::default();
    let user = get(async || Json(json!({ "login": "octocat" })));
    let server: Uri =
        format!("http://{}", serve(Router::new().route("/user", user), &issuer).await).parse()?;

    let provider = TokenProvider::builder(issuer.clone()).name("shared").keep_fresh(true).build()?;
    let layer = BearerAuthLayer::with_provider(provider.clone());
    let octocrab = OctocrabBuilder::new_empty()
        .with_service(Client::builder(TokioExecutor::new()).build_http::<OctoBody>())
        .with_layer(&layer.clone().replay_with(1 << 20, OctoBody::new))
        .with_layer(&BaseUriLayer::new(server.clone()))
        .with_auth(AuthState::None)
        .build()?;
    let reqwest =
        layer.replay_with(1 << 20, reqwest::Body::wrap).layer(ReqwestService::new(reqwest::Client::new()));

    for round in 1..=2 {
        let by_octocrab = octocrab.get::<Value, _, _>("/user", None::<&()>);
        let request = http::Request::get(format!("{server}user")).body(reqwest::Body::default())?;
        let by_reqwest = reqwest.clone().oneshot(request);
        let (by_octocrab, by_reqwest) = tokio::join!(by_octocrab, by_reqwest);
        println!("round {round}: octocrab {}, reqwest {}", by_octocrab?["login"], by_reqwest?.status());
        println!("         token {}, {} issued", provider.status().generation, issuer.count());
        if round == 1 {
            println!("         the token is revoked");
            issuer.revoke();
        }
    }
    provider.shutdown().await;
    // The first token, and one after the revocation that both SDKs have noticed.
    if issuer.count() == 2 { Ok(()) } else { Err("the two did not share".into()) }
}
