//! Uploads a video with an upload token, which allows nothing else and expires.
//!
//! ```text
//! cargo run --example delegated_upload
//! ```
//!
//! It shows the two sides of api.video's delegated upload. The backend has the API key, and creates an upload token
//! through its provider, although its access token was revoked. The browser has only the upload token, and sends no
//! `Authorization` header: its client has the layer, and the request has the extension `NoBearer`. The API is the
//! crate's test server in this process, which rejects a bearer token at that endpoint.

use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Full};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tower::{Layer, ServiceExt};
use tower_bearer::{ApiVideo, BearerAuthLayer, BoxError, NoBearer, TokenProvider};
use tower_bearer_testing::AuthServer;

const TTL: Duration = Duration::from_secs(2);

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let api = AuthServer::builder().reject_bearer_at_upload(true).start().await?;

    // The backend.
    let api_video = ApiVideo::new(api.api_key()).base_url(api.uri());
    let provider = TokenProvider::new(api_video.clone());
    provider.ready().await?;
    api.revoke_access_tokens();
    let upload_token = api_video.upload_token(&provider, TTL).await?;
    println!("an upload token for {:?}: {upload_token:?}", upload_token.ttl());

    // The browser.
    let http = Client::builder(TokioExecutor::new()).build_http::<Full<Bytes>>();
    let client = BearerAuthLayer::with_provider(provider).layer(http);
    let uri = format!("{}upload?token={}", api_video.api_base(), upload_token.token());
    let upload = || Request::post(&uri).extension(NoBearer).body(Full::from("moving pictures"));
    let answer = client.clone().oneshot(upload()?).await?;
    println!("the upload:            {}", answer.status());
    answer.into_body().collect().await?;

    tokio::time::sleep(TTL).await;
    let late = client.oneshot(upload()?).await?;
    println!("after it has expired:  {}", late.status());

    let counters = api.counters();
    println!("401s healed            {}", counters.challenged);
    println!("delegated uploads      {}", counters.delegated_uploads);
    println!("bytes that arrived     {}", api.uploads().iter().map(|upload| upload.bytes).sum::<u64>());
    if counters.delegated_uploads == 1 && counters.rejected_upload_tokens == 1 {
        Ok(())
    } else {
        Err("no".into())
    }
}
