//! A gateway: browsers and curl talk to api.video through it, and none of them has the API key.
//!
//! ```text
//! cargo run --example axum_gateway            # then open the page that it names
//! curl http://127.0.0.1:8080/videos
//! ```
//!
//! It shows the layer beneath an axum `Router`: bodies stream both ways, headers that are meant for one connection end
//! there, a client's own `Authorization` goes no further, and what prevented an answer is a 502. The API is a server of
//! api.video's kind in this process. Whoever reaches a gateway may do what its key may: this one listens on loopback.

use std::env;

use axum::{Router, error_handling::HandleErrorLayer, extract::Request, response::Html, routing::get};
use http::{
    HeaderMap, HeaderName, Response, StatusCode, Uri, Version,
    header::{AUTHORIZATION, CONNECTION, COOKIE, HOST, PROXY_AUTHORIZATION, TE, TRANSFER_ENCODING, UPGRADE},
};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tower::{BoxError, ServiceBuilder};
use tower_bearer::{ApiVideo, BearerAuthLayer, ExistingAuthorization, TokenProvider, testing::AuthServer};

/// As much of an upload as is kept, to send it again with another token.
const KEPT: usize = 16 << 20;

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let api = AuthServer::start().await?;
    let source = ApiVideo::new(api.api_key()).base_url(api.uri());
    let provider = TokenProvider::builder(source).keep_fresh(true).build()?;
    let port = env::args().nth(1).map_or(Ok(8080), |port| port.parse())?;
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", port)).await?;
    println!("http://{}/", listener.local_addr()?);
    let stopped = async { _ = tokio::signal::ctrl_c().await };
    axum::serve(listener, gateway(provider.clone(), api.uri())).with_graceful_shutdown(stopped).await?;
    provider.shutdown().await;
    Ok(())
}

/// The page at `/`; all else goes to `api`.
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

/// The client's request as the gateway's own.
fn forward(mut request: Request, api: &Uri) -> Request {
    let mut uri = api.clone().into_parts();
    uri.path_and_query = request.uri().path_and_query().cloned();
    *request.uri_mut() = Uri::from_parts(uri).unwrap_or_else(|_| api.clone());
    *request.version_mut() = Version::HTTP_11;
    let headers = request.headers_mut();
    remove_hop_by_hop(headers);
    // Whom the client speaks to, and by what right, is between the two of them.
    for name in [HOST, AUTHORIZATION, COOKIE] {
        headers.remove(name);
    }
    request
}

fn backward<B>(mut response: Response<B>) -> Response<B> {
    remove_hop_by_hop(response.headers_mut());
    response
}

/// Removes what is meant for one connection (RFC 9110 §7.6.1).
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
