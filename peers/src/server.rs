//! The servers: one [`AuthServer`] for all peers, and a metadata server in front of it for google-cloud-auth.

use std::time::Duration;

use axum::{Router, extract::State, response::IntoResponse, routing::get};
use bytes::Bytes;
use http::{
    Response, StatusCode,
    header::{CONTENT_TYPE, WWW_AUTHENTICATE},
};
use tokio::net::TcpListener;
use tower_bearer_testing::{AuthServer, Fault, Route};

use crate::{
    BoxError,
    peer::{DUE, Setup},
};

/// How long the token endpoint takes for a response in most scenarios.
pub const LATENCY: Duration = Duration::from_millis(500);

pub async fn start(lifetime: Duration) -> Result<AuthServer, BoxError> {
    Ok(AuthServer::builder().token_lifetime(lifetime).start().await?)
}

pub async fn setup(server: &AuthServer, ahead: Option<Duration>) -> Result<Setup, BoxError> {
    let token_endpoint = server.token_endpoint();
    let (client_id, client_secret) = (server.client_id(), server.client_secret());
    let metadata = Metadata {
        client: reqwest::Client::builder().no_proxy().build()?,
        token_endpoint: token_endpoint.clone(),
        client_id: client_id.clone(),
        client_secret: client_secret.clone(),
    };
    Ok(Setup {
        metadata: metadata.serve().await?,
        token_endpoint,
        api: server.uri().to_string(),
        client_id,
        client_secret,
        refresh_token: None,
        login: server.log_in(),
        state: None,
        ahead,
        due: DUE,
    })
}

/// The number of requests to the token endpoint, where no fault but a delay was injected.
pub fn posts(server: &AuthServer) -> u64 {
    let counters = server.counters();
    counters.client_credentials_grants
        + counters.oauth_refresh_grants
        + counters.rejected_clients
        + counters.rejected_oauth_grants
}

/// Lets the token endpoint take [`LATENCY`].
pub fn slow(server: &AuthServer) {
    server.inject_always(Route::OAuthToken, Fault::Delay(LATENCY));
}

/// A 401 that says that the token is not valid (RFC 6750 §3.1).
pub fn challenge() -> Fault {
    let mut response = Response::new(Bytes::new());
    *response.status_mut() = StatusCode::UNAUTHORIZED;
    let value = "Bearer error=\"invalid_token\"".parse().expect("a header value");
    response.headers_mut().insert(WWW_AUTHENTICATE, value);
    Fault::Answer(response)
}

/// The metadata server of a virtual machine at Google. It forwards to the token endpoint, where requests are counted.
#[derive(Clone)]
struct Metadata {
    client: reqwest::Client,
    token_endpoint: String,
    client_id: String,
    client_secret: String,
}

impl Metadata {
    async fn serve(self) -> Result<String, BoxError> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let url = format!("http://{}", listener.local_addr()?);
        let path = "/computeMetadata/v1/instance/service-accounts/default/token";
        let router = Router::new().route(path, get(Self::token)).with_state(self);
        tokio::spawn(async move { axum::serve(listener, router).await });
        Ok(url)
    }

    async fn token(State(metadata): State<Self>) -> impl IntoResponse {
        let grant = [("grant_type", "client_credentials")];
        let request = metadata.client.post(&metadata.token_endpoint).form(&grant);
        let request = request.basic_auth(&metadata.client_id, Some(&metadata.client_secret));
        let Ok(response) = request.send().await else { return StatusCode::BAD_GATEWAY.into_response() };
        let status = response.status();
        let Ok(body) = response.bytes().await else { return StatusCode::BAD_GATEWAY.into_response() };
        (status, [(CONTENT_TYPE, "application/json")], body).into_response()
    }
}
