//! Servers for the pages of the guide whose recipes need SDKs, and the tests of these pages.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use axum::{
    Form, Json, Router,
    extract::{Path, Request, State},
    middleware::{Next, from_fn_with_state},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use azure_core::http::{AsyncRawResponse, HttpClient, Request as AzureRequest, Transport, Url};
use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use http::{HeaderMap, Method, StatusCode, header::AUTHORIZATION};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
    trace_service_server::{TraceService, TraceServiceServer},
};
use ring::{
    digest::{SHA256, digest},
    signature::{ECDSA_P256_SHA256_FIXED, UnparsedPublicKey},
};
use rmcp::{
    ErrorData, RoleServer, ServerHandler,
    model::{
        CallToolRequestParams, CallToolResponse, CallToolResult, ContentBlock, ServerCapabilities,
        ServerConfig,
    },
    service::RequestContext,
    transport::{StreamableHttpService, streamable_http_server::session::local::LocalSessionManager},
};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tower_bearer::{
    OAuth2, TokenProvider,
    oauth2::{ClientAuth, Server},
};
use tower_bearer_testing::AuthServer;

/// Serves `router` at a free port of loopback, and returns the URL without a slash at its end.
async fn serve(router: Router) -> String {
    let (listener, url) = listen().await;
    tokio::spawn(async move { axum::serve(listener, router).await });
    url
}

async fn listen() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    (listener, url)
}

fn credentials<'a>(headers: &'a HeaderMap, scheme: &str) -> Option<&'a str> {
    headers.get(AUTHORIZATION)?.to_str().ok()?.strip_prefix(scheme)?.strip_prefix(' ')
}

/// An authorization server and an API with DPoP (RFC 9449). Both ask for a nonce. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct DPoPServer(Arc<Mutex<Bound>>);

#[derive(Debug, Default)]
struct Bound {
    tokens: u64,
    nonce: u64,
    /// The public key of the newest token.
    key: Value,
    seen_jtis: Vec<Value>,
}

impl DPoPServer {
    /// Serves at the URL that is returned: the token endpoint at `/token`, the API at `/widgets`.
    pub async fn start(&self) -> String {
        let router = Router::new()
            .route("/token", post(bound_token))
            .route("/widgets", get(widgets))
            .with_state(self.clone());
        serve(router).await
    }

    /// Replaces the nonce that proofs must have.
    pub fn change_nonce(&self) {
        self.bound().nonce += 1;
    }

    /// Returns the number of issued tokens.
    pub fn tokens(&self) -> u64 {
        self.bound().tokens
    }

    fn bound(&self) -> MutexGuard<'_, Bound> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Bound {
    fn nonce(&self) -> String {
        format!("nonce-{}", self.nonce)
    }

    /// Checks the proof of a request (RFC 9449 §4.3). Returns its key, or the code of the error.
    fn key_of_proof(
        &mut self,
        headers: &HeaderMap,
        method: &Method,
        path: &str,
        token: Option<&str>,
    ) -> Result<Value, &'static str> {
        let proof = headers.get("dpop").and_then(|proof| proof.to_str().ok()).and_then(verified_proof);
        let (key, claims) = proof.ok_or("invalid_dpop_proof")?;
        let host = headers.get("host").and_then(|host| host.to_str().ok()).unwrap_or_default();
        let hash = token.map(|token| BASE64_URL_SAFE_NO_PAD.encode(digest(&SHA256, token.as_bytes())));
        let is_valid = claims["htm"] == method.as_str()
            && claims["htu"] == format!("http://{host}{path}")
            && claims["ath"].as_str() == hash.as_deref()
            && !self.seen_jtis.contains(&claims["jti"]);
        if !is_valid {
            return Err("invalid_dpop_proof");
        }
        self.seen_jtis.push(claims["jti"].clone());
        if claims["nonce"] == self.nonce() { Ok(key) } else { Err("use_dpop_nonce") }
    }
}

/// Verifies a proof with the key in its header. Returns the key and the claims.
fn verified_proof(jwt: &str) -> Option<(Value, Value)> {
    let decode = |part: &str| BASE64_URL_SAFE_NO_PAD.decode(part).ok();
    let (signed, signature) = jwt.rsplit_once('.')?;
    let (header, claims) = signed.split_once('.')?;
    let header: Value = serde_json::from_slice(&decode(header)?).ok()?;
    if header["typ"] != "dpop+jwt" || header["alg"] != "ES256" {
        return None;
    }
    let key = &header["jwk"];
    let point = [vec![4], decode(key["x"].as_str()?)?, decode(key["y"].as_str()?)?].concat();
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point)
        .verify(signed.as_bytes(), &decode(signature)?)
        .ok()?;
    Some((key.clone(), serde_json::from_slice(&decode(claims)?).ok()?))
}

async fn bound_token(
    State(server): State<DPoPServer>,
    headers: HeaderMap,
    Form(form): Form<HashMap<String, String>>,
) -> Response {
    let mut bound = server.bound();
    let nonce = [("dpop-nonce", bound.nonce())];
    let error = |status, code| (status, nonce.clone(), Json(json!({ "error": code }))).into_response();
    if form.get("client_secret").is_none_or(|secret| secret != "your-client-secret") {
        return error(StatusCode::UNAUTHORIZED, "invalid_client");
    }
    match bound.key_of_proof(&headers, &Method::POST, "/token", None) {
        Err(code) => error(StatusCode::BAD_REQUEST, code),
        Ok(key) => {
            bound.key = key;
            bound.tokens += 1;
            let token = format!("token-{}", bound.tokens);
            let token = json!({ "access_token": token, "token_type": "DPoP", "expires_in": 3600 });
            (nonce, Json(token)).into_response()
        }
    }
}

async fn widgets(State(server): State<DPoPServer>, headers: HeaderMap) -> Response {
    let mut bound = server.bound();
    let nonce = ("dpop-nonce", bound.nonce());
    let newest = format!("token-{}", bound.tokens);
    let checked = match credentials(&headers, "DPoP") {
        Some(token) if token == newest => bound
            .key_of_proof(&headers, &Method::GET, "/widgets", Some(token))
            .and_then(|key| if key == bound.key { Ok(()) } else { Err("invalid_token") }),
        _ => Err("invalid_token"),
    };
    match checked {
        Ok(()) => ([nonce], "widgets").into_response(),
        Err(code) => {
            let challenge = ("www-authenticate", format!("DPoP error=\"{code}\", algs=\"ES256\""));
            (StatusCode::UNAUTHORIZED, [nonce, challenge]).into_response()
        }
    }
}

/// Serves the metadata server of a virtual machine at Google, and returns its URL.
pub async fn google_metadata() -> String {
    serve(
        Router::new()
            .route("/computeMetadata/v1/instance/service-accounts/default/token", get(machine_token)),
    )
    .await
}

async fn machine_token(headers: HeaderMap) -> Response {
    if headers.get("metadata-flavor").is_none_or(|flavor| flavor != "Google") {
        return StatusCode::FORBIDDEN.into_response();
    }
    let token = json!({ "access_token": "ya29.c.machine", "expires_in": 3599, "token_type": "Bearer" });
    Json(token).into_response()
}

/// A transport of azure_core to an Entra ID on loopback. The credentials of azure_identity take only `https`.
///
/// # Panics
///
/// If the client cannot be made.
pub async fn entra() -> Transport {
    let url = serve(Router::new().route("/{tenant}/oauth2/v2.0/token", post(entra_token))).await;
    let client = reqwest::Client::builder().no_proxy().build().expect("a client");
    Transport::new(Arc::new(Loopback { url: url.parse().expect("a URL"), client }))
}

#[derive(Debug)]
struct Loopback {
    url: Url,
    client: reqwest::Client,
}

#[async_trait::async_trait]
impl HttpClient for Loopback {
    async fn execute_request(&self, request: &AzureRequest) -> azure_core::Result<AsyncRawResponse> {
        let mut request = request.clone();
        let path = request.url().path().to_owned();
        *request.url_mut() = self.url.clone();
        request.url_mut().set_path(&path);
        self.client.execute_request(&request).await
    }
}

async fn entra_token(Path(tenant): Path<String>, Form(form): Form<HashMap<String, String>>) -> Response {
    let has = |name, value: &str| form.get(name).is_some_and(|given| given == value);
    let is_valid = tenant == "your-tenant-id"
        && has("grant_type", "client_credentials")
        && has("client_id", "your-client-id")
        && has("client_secret", "your-client-secret")
        && has("scope", "https://vault.azure.net/.default");
    if !is_valid {
        return (StatusCode::UNAUTHORIZED, Json(json!({ "error": "invalid_client" }))).into_response();
    }
    Json(json!({ "token_type": "Bearer", "expires_in": 3599, "access_token": "eyJ0eXAi.azure" }))
        .into_response()
}

/// A collector of OTLP over gRPC. Clones share what it has received.
#[derive(Clone, Debug, Default)]
pub struct Collector(Arc<Mutex<Vec<Exported>>>);

/// One request to a [`Collector`].
#[derive(Clone, Debug)]
pub struct Exported {
    /// The bearer token.
    pub token: Option<String>,
    /// The names of the spans.
    pub spans: Vec<String>,
}

impl Collector {
    /// Serves at the URL that is returned.
    pub async fn start(&self) -> String {
        let (listener, url) = listen().await;
        let service = TraceServiceServer::new(self.clone());
        let server = tonic::transport::Server::builder().add_service(service);
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        url
    }

    /// Returns what was received until now.
    pub fn received(&self) -> Vec<Exported> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        let token = credentials(request.metadata().as_ref(), "Bearer").map(str::to_owned);
        let spans = request.into_inner().resource_spans.into_iter().flat_map(|resource| resource.scope_spans);
        let spans = spans.flat_map(|scope| scope.spans).map(|span| span.name).collect();
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(Exported { token, spans });
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

/// Serves the bucket `films` of Google Cloud Storage with the object `a.mp4`, and returns its URL.
///
/// `token` returns the token that a request must have.
pub async fn bucket(token: impl Fn() -> Option<String> + Clone + Send + Sync + 'static) -> String {
    let object = async move |Path(object): Path<String>, headers: HeaderMap| {
        let valid = token();
        if valid.is_none() || credentials(&headers, "Bearer") != valid.as_deref() {
            return StatusCode::UNAUTHORIZED.into_response();
        }
        if object != "a.mp4" {
            return StatusCode::NOT_FOUND.into_response();
        }
        let headers = [("etag", "\"1\""), ("last-modified", "Thu, 26 Nov 2026 12:00:00 GMT")];
        (headers, "moving pictures").into_response()
    };
    serve(Router::new().route("/films/{object}", get(object))).await
}

/// Starts a test server. Returns a provider of tokens for its API, too.
///
/// # Panics
///
/// If the server cannot listen on a port.
pub async fn api() -> (AuthServer, TokenProvider) {
    let server = AuthServer::start().await.expect("a server");
    let login = Server::token_endpoint(server.token_endpoint());
    let source =
        OAuth2::client_credentials(login, ClientAuth::basic(server.client_id(), server.client_secret()));
    (server, TokenProvider::new(source))
}

/// Serves an MCP server with the tool `film`, and returns its URL.
///
/// A request must have a bearer token that the API of the test server `issuer` accepts.
///
/// # Panics
///
/// If no HTTP client can be made.
pub async fn mcp_server(issuer: String) -> String {
    let sessions = Arc::<LocalSessionManager>::default();
    let service = StreamableHttpService::new(|| Ok(Films), sessions, Default::default());
    serve_checked(Router::new().nest_service("/mcp", service), issuer).await + "/mcp"
}

/// Serves what accepts the handshake of a WebSocket, and returns its URL.
///
/// A handshake must have a bearer token that the API of the test server `issuer` accepts.
///
/// # Panics
///
/// If no HTTP client can be made.
pub async fn events(issuer: String) -> String {
    let handshake = async |headers: HeaderMap| {
        let key = headers.get("sec-websocket-key").map(|key| derive_accept_key(key.as_bytes()));
        let accept = ("sec-websocket-accept", key.unwrap_or_default());
        let upgrade = [("connection", "upgrade"), ("upgrade", "websocket")];
        (StatusCode::SWITCHING_PROTOCOLS, upgrade, [accept])
    };
    let url = serve_checked(Router::new().route("/events", get(handshake)), issuer).await;
    url.replacen("http", "ws", 1) + "/events"
}

async fn serve_checked(router: Router, issuer: String) -> String {
    install_cryptography();
    let api = reqwest::Client::builder().no_proxy().build().expect("a client");
    serve(router.layer(from_fn_with_state((api, issuer), check_token))).await
}

/// Forwards a request if the API accepts its token.
async fn check_token(
    State((api, issuer)): State<(reqwest::Client, String)>,
    request: Request,
    next: Next,
) -> Response {
    let token = credentials(request.headers(), "Bearer").unwrap_or_default();
    let accepted = api.get(format!("{issuer}/videos")).bearer_auth(token).send().await;
    match accepted.map(|response| response.status()) {
        Ok(StatusCode::OK) => next.run(request).await,
        Ok(StatusCode::UNAUTHORIZED) => {
            let challenge = ("www-authenticate", "Bearer error=\"invalid_token\"");
            (StatusCode::UNAUTHORIZED, [challenge]).into_response()
        }
        _ => StatusCode::BAD_GATEWAY.into_response(),
    }
}

struct Films;

impl ServerHandler for Films {
    fn get_info(&self) -> ServerConfig {
        ServerConfig::new(ServerCapabilities::builder().enable_tools().build())
    }

    async fn call_tool(
        &self,
        request: CallToolRequestParams,
        _: RequestContext<RoleServer>,
    ) -> Result<CallToolResponse, ErrorData> {
        if request.name != "film" {
            return Err(ErrorData::invalid_params("there is no such tool", None));
        }
        Ok(CallToolResult::success(vec![ContentBlock::text("moving pictures")]).into())
    }
}

/// Installs ring as the cryptography of rustls: reqwest has none of its own in this workspace.
pub fn install_cryptography() {
    // An error says that it is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// The second part of the page `guide::without_tower` of the crate's documentation.
#[cfg(doctest)]
#[doc = include_str!("../../../src/guide/without_tower_clients.md")]
struct WithoutTower;

/// The page `guide::mcp` of the crate's documentation.
#[cfg(doctest)]
#[doc = include_str!("../../../src/guide/mcp.md")]
struct Mcp;

/// The second part of the page `guide::oauth2` of the crate's documentation.
#[cfg(doctest)]
#[doc = include_str!("../../../src/guide/oauth2_sdks.md")]
struct OAuth2Sdks;
