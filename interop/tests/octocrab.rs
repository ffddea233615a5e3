//! octocrab: pages of a small server that imitates GitHub.

use std::{collections::HashMap, sync::Arc};

use axum::{Json, Router, extract::Query, response::IntoResponse, routing::get};
use http::Uri;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use octocrab::{
    AuthState, OctoBody, Octocrab, OctocrabBuilder, Page, service::middleware::base_uri::BaseUriLayer,
};
use serde::{Deserialize, Serialize};
use tower_bearer::{BearerAuthLayer, TokenProvider};
use tower_bearer_interop::{Issuer, recovers_with_one_refresh, serve};

#[derive(Debug, Deserialize, Serialize)]
struct Issue {
    number: u32,
}

const PAGES: u32 = 3;
const PER_PAGE: u32 = 10;

/// One page, with a link to the next (RFC 8288).
async fn issues(headers: http::HeaderMap, Query(query): Query<HashMap<String, u32>>) -> impl IntoResponse {
    let page = query.get("page").copied().unwrap_or(1);
    let host = headers["host"].to_str().unwrap();
    let link = |page, rel| format!("<http://{host}/issues?page={page}>; rel=\"{rel}\"");
    let links = if page < PAGES { link(page + 1, "next") } else { link(1, "first") };
    let first = (page - 1) * PER_PAGE + 1;
    let issues: Vec<_> = (first..first + PER_PAGE).map(|number| Issue { number }).collect();
    ([("link", links)], Json(issues))
}

async fn octocrab(issuer: &Issuer) -> Octocrab {
    let address = serve(Router::new().route("/issues", get(issues)), issuer).await;
    let layer = BearerAuthLayer::with_provider(TokenProvider::new(issuer.clone()))
        .replay_with(1 << 20, OctoBody::new);
    OctocrabBuilder::new_empty()
        .with_service(Client::builder(TokioExecutor::new()).build_http::<OctoBody>())
        .with_layer(&layer)
        // Outside of `BearerAuthLayer`, which then gets complete URIs.
        .with_layer(&BaseUriLayer::new(format!("http://{address}").parse::<Uri>().unwrap()))
        .with_auth(AuthState::None)
        .build()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_recover() {
    let issuer = Issuer::default();
    let octocrab = Arc::new(octocrab(&issuer).await);
    recovers_with_one_refresh(&issuer, |_| {
        let octocrab = Arc::clone(&octocrab);
        async move {
            let page: Page<Issue> = octocrab.get("/issues", None::<&()>).await.unwrap();
            assert_eq!(page.items.len(), PER_PAGE as usize);
        }
    })
    .await;
}

#[tokio::test]
async fn revocation_between_pages_loses_none() {
    let issuer = Issuer::default();
    let octocrab = octocrab(&issuer).await;
    let first: Page<Issue> = octocrab.get("/issues", None::<&()>).await.unwrap();
    issuer.revoke();
    let all = octocrab.all_pages(first).await.unwrap();
    let numbers: Vec<_> = all.iter().map(|issue| issue.number).collect();
    assert_eq!(numbers, (1..=PAGES * PER_PAGE).collect::<Vec<_>>());
    assert_eq!(issuer.count(), 2);
}
