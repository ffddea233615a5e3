//! A gateway through which browsers and curl use api.video without the API key.
//!
//! ```text
//! cargo run --example axum_gateway            # then open the URL that it prints
//! curl http://127.0.0.1:8080/videos
//! ```
//!
//! It shows the layer below an axum `Router`. Bodies stream in both directions. Hop-by-hop headers and the client's own
//! `Authorization` are removed. An error becomes a 502. Every client of a gateway may do what the API key allows: this one
//! listens on loopback.
//!
//! The API is the crate's test server in this process. Its tokens live for 30 s, and it checks the token again at the end
//! of an upload. The page polls `/status` for the state of the token. `POST /revoke` revokes all tokens, for the page's
//! button: the gateway sends the chunk of the upload that gets a 401 again, with the next token.

use std::{env, sync::Arc, time::Duration};

use axum::{
    Router,
    error_handling::HandleErrorLayer,
    extract::Request,
    response::{Html, IntoResponse},
    routing::{get, post},
};
use http::{
    HeaderMap, HeaderName, Response, StatusCode, Uri, Version,
    header::{
        AUTHORIZATION, CACHE_CONTROL, CONNECTION, CONTENT_TYPE, COOKIE, HOST, PROXY_AUTHORIZATION, TE,
        TRANSFER_ENCODING, UPGRADE,
    },
};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tower::{BoxError, ServiceBuilder};
use tower_bearer::{ApiVideo, BearerAuthLayer, ExistingAuthorization, TokenProvider};
use tower_bearer_testing::AuthServer;

/// The lifetime of a token of the test server.
const TOKEN_LIFETIME: Duration = Duration::from_secs(30);

/// The maximum number of bytes of a request that is kept for a retry. The page uploads a file in chunks of half of it.
const KEPT: usize = 16 << 20;

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let api = AuthServer::builder().token_lifetime(TOKEN_LIFETIME).check_after_body(true).start().await?;
    let api = Arc::new(api);
    let source = ApiVideo::new(api.api_key()).base_url(api.uri());
    let provider = TokenProvider::builder(source).keep_fresh(true).build()?;
    let port = match env::args().nth(1).map(|port| port.parse()) {
        None => 8080,
        Some(Ok(port)) => port,
        Some(Err(_)) => return Err("usage: axum_gateway [PORT]".into()),
    };
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", port)).await?;
    println!("http://{}/", listener.local_addr()?);
    let stopped = async { _ = tokio::signal::ctrl_c().await };
    let router = gateway(provider.clone(), api.uri()).merge(demonstration(provider.clone(), api));
    axum::serve(listener, router).with_graceful_shutdown(stopped).await?;
    provider.shutdown().await;
    Ok(())
}

/// Returns a router with the page at `/`, which forwards every other request to `api`.
pub fn gateway(provider: TokenProvider, api: Uri) -> Router {
    let client = ServiceBuilder::new()
        .layer(HandleErrorLayer::new(|error: BoxError| async move {
            (StatusCode::BAD_GATEWAY, error.to_string())
        }))
        .map_request(move |request| forward(request, &api))
        .map_response(backward)
        .layer(
            BearerAuthLayer::with_provider(provider)
                .buffered(KEPT)
                .existing_authorization(ExistingAuthorization::Replace),
        )
        .service(Client::builder(TokioExecutor::new()).build_http());
    Router::new().route("/", get(Html(include_str!("axum_gateway.html")))).fallback_service(client)
}

/// Returns the routes that only the demonstration has: the state of the token, and the revocation of all tokens.
pub fn demonstration(provider: TokenProvider, api: Arc<AuthServer>) -> Router {
    let server = Arc::clone(&api);
    let status = get(async move || {
        let status = provider.status();
        let json = serde_json::json!({
            "generation": status.generation,
            "seconds_left": status.remaining.map(|remaining| remaining.as_secs()),
            "challenged": server.counters().challenged,
        });
        ([(CONTENT_TYPE, "application/json"), (CACHE_CONTROL, "no-store")], json.to_string()).into_response()
    });
    let revoke = post(async move || {
        api.revoke_access_tokens();
        StatusCode::NO_CONTENT
    });
    Router::new().route("/status", status).route("/revoke", revoke)
}

/// Turns the client's request into one of the gateway's own.
fn forward(mut request: Request, api: &Uri) -> Request {
    let mut uri = api.clone().into_parts();
    uri.path_and_query = request.uri().path_and_query().cloned();
    *request.uri_mut() = Uri::from_parts(uri).unwrap_or_else(|_| api.clone());
    *request.version_mut() = Version::HTTP_11;
    let headers = request.headers_mut();
    remove_hop_by_hop(headers);
    // These are meant for the gateway, not for the API.
    for name in [HOST, AUTHORIZATION, COOKIE] {
        headers.remove(name);
    }
    request
}

fn backward<B>(mut response: Response<B>) -> Response<B> {
    remove_hop_by_hop(response.headers_mut());
    response
}

/// Removes the headers that are meant for one connection (RFC 9110 §7.6.1).
fn remove_hop_by_hop(headers: &mut HeaderMap) {
    let connection: Vec<_> = headers.get_all(CONNECTION).iter().cloned().collect();
    for name in connection.iter().filter_map(|value| value.to_str().ok()).flat_map(|names| names.split(',')) {
        headers.remove(name.trim());
    }
    let keep_alive = HeaderName::from_static("keep-alive");
    let proxy = HeaderName::from_static("proxy-connection");
    for name in [CONNECTION, keep_alive, proxy, PROXY_AUTHORIZATION, TE, TRANSFER_ENCODING, UPGRADE] {
        headers.remove(name);
    }
}
