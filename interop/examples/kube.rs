//! A kube client with kube's default stack and a token that is refreshed automatically.
//!
//! ```text
//! cargo run -p tower-bearer-interop --example kube
//! ```
//!
//! Shows the layer on kube's `ClientBuilder`. A buffer makes the inner stack `Clone`, and `Body::try_clone` replays
//! kube's bodies. In a cluster the source would be a
//! `TokenFile::new("/var/run/secrets/kubernetes.io/serviceaccount/token")`. The API server runs in this process.

use axum::{Json, Router, routing::get};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{
    Api, Config,
    api::{ListParams, Patch, PatchParams},
    client::{Body, ClientBuilder},
};
use serde_json::{Value, json};
use tower::{BoxError, buffer::BufferLayer};
use tower_bearer::{BearerAuthLayer, TokenProvider};
use tower_bearer_interop::{Issuer, serve};

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let issuer = Issuer::default();
    let config = Config::new(server(&issuer).await.parse()?);

    let layer = BearerAuthLayer::with_provider(TokenProvider::new(issuer.clone()));
    let client = ClientBuilder::try_from(config)?
        .with_layer(&BufferLayer::new(1024))
        .with_layer(&layer.clone_with(Body::try_clone))
        .build();

    let config_maps: Api<ConfigMap> = Api::default_namespaced(client);
    println!("list:  {} config maps", config_maps.list(&ListParams::default()).await?.items.len());
    issuer.revoke();
    println!("       the token is revoked");
    let patch = Patch::Merge(json!({ "data": { "colour": "red" } }));
    let patched = config_maps.patch("first", &PatchParams::default(), &patch).await?;
    println!("patch: {:?}", patched.data.unwrap_or_default());
    println!(
        "{} tokens were issued, {} calls were challenged and retried",
        issuer.count(),
        issuer.challenged()
    );
    Ok(())
}

/// A minimal API server for this example.
async fn server(issuer: &Issuer) -> String {
    let config_map = |data: Value| json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "first" }, "data": data });
    let list = json!({
        "apiVersion": "v1", "kind": "ConfigMapList", "metadata": {}, "items": [config_map(json!({}))]
    });
    let path = "/api/v1/namespaces/default/configmaps";
    let router = Router::new().route(path, get(async || Json(list))).route(
        &format!("{path}/first"),
        axum::routing::patch(async move |body: String| {
            let patch: Value = serde_json::from_str(&body).unwrap_or_default();
            Json(config_map(patch["data"].clone()))
        }),
    );
    format!("http://{}", serve(router, issuer).await)
}
