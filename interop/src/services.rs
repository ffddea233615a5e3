//! The token endpoints of some services, as their documentation describes them, for the page `guide::oauth2`.
//!
//! Each function serves on loopback and returns the URL, without a slash at its end.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    time::{Duration, SystemTime},
};

use axum::{
    Form, Json, Router,
    extract::{Path, State},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use base64::{Engine, prelude::*};
use http::{
    HeaderMap, StatusCode,
    header::{AUTHORIZATION, USER_AGENT},
};
use ring::signature::{KeyPair, RSA_PKCS1_2048_8192_SHA256, RsaKeyPair, UnparsedPublicKey};
use serde_json::{Value, json};

/// The private key whose JWTs the services trust. It is used nowhere else.
pub const PRIVATE_KEY: &str = include_str!("test_key.pem");

/// The parameters of a token request.
type Parameters = Form<HashMap<String, String>>;

type Answer = Result<Json<Value>, (StatusCode, Json<Value>)>;

fn error<T>(status: StatusCode, code: &str) -> Result<T, (StatusCode, Json<Value>)> {
    Err((status, Json(json!({ "error": code }))))
}

/// Serves `router` at a free port of loopback.
///
/// # Panics
///
/// If there is none.
pub async fn serve(router: Router) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move { axum::serve(listener, router).await });
    format!("http://{address}")
}

/// GitHub's API: installation `7` of the app whose client ID is `Iv23liTower`.
pub async fn github() -> String {
    serve(Router::new().route("/app/installations/{id}/access_tokens", post(installation_token))).await
}

async fn installation_token(Path(id): Path<u64>, headers: HeaderMap) -> Response {
    if !headers.contains_key(USER_AGENT) {
        return StatusCode::FORBIDDEN.into_response();
    }
    let Some(claims) = bearer(&headers).and_then(verified) else {
        return StatusCode::UNAUTHORIZED.into_response();
    };
    if claims["iss"] != "Iv23liTower" || lifetime(&claims) > 600 {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    if id != 7 {
        return StatusCode::NOT_FOUND.into_response();
    }
    let expires_at = jiff::Timestamp::now() + Duration::from_secs(3600);
    let answer = json!({ "token": "ghs_16C7e42F292c6912E7710c838347Ae178B4a", "expires_at": expires_at });
    (StatusCode::CREATED, Json(answer)).into_response()
}

/// Google's OAuth 2.0 server, with a service account.
pub async fn google() -> String {
    serve(Router::new().route("/token", post(service_account))).await
}

async fn service_account(headers: HeaderMap, Form(form): Parameters) -> Answer {
    if form.get("grant_type").map(String::as_str) != Some("urn:ietf:params:oauth:grant-type:jwt-bearer") {
        return error(StatusCode::BAD_REQUEST, "unsupported_grant_type");
    }
    let host = headers.get("host").and_then(|host| host.to_str().ok()).unwrap_or_default();
    let claims = form.get("assertion").and_then(|jwt| verified(jwt)).unwrap_or_default();
    let is_valid = claims["iss"] == "sender@project.iam.gserviceaccount.com"
        && claims["aud"] == format!("http://{host}/token")
        && lifetime(&claims) <= 3600;
    if !is_valid {
        return error(StatusCode::BAD_REQUEST, "invalid_grant");
    }
    if !claims["scope"].is_string() {
        return error(StatusCode::BAD_REQUEST, "invalid_scope");
    }
    Ok(Json(json!({ "access_token": "ya29.c.b0Aaek", "expires_in": 3599, "token_type": "Bearer" })))
}

/// Google's Security Token Service, which trusts the tokens of a cluster.
pub async fn google_sts() -> String {
    serve(Router::new().route("/v1/token", post(workload_identity))).await
}

async fn workload_identity(headers: HeaderMap, Form(form): Parameters) -> Answer {
    let has = |name: &str, value: &str| form.get(name).is_some_and(|given| given == value);
    let is_complete = !headers.contains_key(AUTHORIZATION)
        && has("grant_type", "urn:ietf:params:oauth:grant-type:token-exchange")
        && has("requested_token_type", "urn:ietf:params:oauth:token-type:access_token")
        && has("subject_token_type", "urn:ietf:params:oauth:token-type:jwt")
        && form.contains_key("scope");
    if !is_complete {
        return error(StatusCode::BAD_REQUEST, "invalid_request");
    }
    let claims = form.get("subject_token").and_then(|jwt| verified(jwt)).unwrap_or_default();
    let audience = form.get("audience").map(|audience| format!("https:{audience}"));
    if claims["sub"] != "system:serviceaccount:default:app" || claims["aud"].as_str() != audience.as_deref() {
        return error(StatusCode::BAD_REQUEST, "invalid_grant");
    }
    Ok(Json(json!({
        "access_token": "ya29.d.b0Aaek",
        "issued_token_type": "urn:ietf:params:oauth:token-type:access_token",
        "token_type": "Bearer",
        "expires_in": 3599,
    })))
}

/// Microsoft Entra ID, with the endpoints of versions 2 and 1.
pub async fn entra() -> String {
    let router = Router::new()
        .route("/{tenant}/oauth2/v2.0/token", post(entra_v2))
        .route("/{tenant}/oauth2/token", post(entra_v1));
    serve(router).await
}

async fn entra_v2(Form(form): Parameters) -> Answer {
    check_client(&form)?;
    if !form.get("scope").is_some_and(|scope| scope.ends_with("/.default")) {
        return error(StatusCode::BAD_REQUEST, "invalid_scope");
    }
    Ok(Json(json!({ "token_type": "Bearer", "expires_in": 3599, "access_token": "eyJ0eXAi.2" })))
}

async fn entra_v1(Form(form): Parameters) -> Answer {
    check_client(&form)?;
    let Some(resource) = form.get("resource") else {
        return error(StatusCode::BAD_REQUEST, "invalid_request");
    };
    Ok(Json(json!({
        "token_type": "Bearer",
        "expires_in": "3599",
        "ext_expires_in": "3599",
        "expires_on": "1788000000",
        "not_before": "1787996400",
        "resource": resource,
        "access_token": "eyJ0eXAi.1",
    })))
}

/// A Salesforce organization.
#[derive(Clone, Debug)]
pub struct Salesforce(&'static Sessions);

#[derive(Debug, Default)]
struct Sessions {
    issued: AtomicU64,
    is_expired: AtomicBool,
}

impl Salesforce {
    /// Serves the organization, and returns its URL and what [`expire`](Self::expire)s its sessions.
    pub async fn start() -> (String, Self) {
        let salesforce = Self(Box::leak(Box::default()));
        let router = Router::new()
            .route("/services/oauth2/token", post(session))
            .route("/services/data/v66.0/limits", get(limits))
            .with_state(salesforce.clone());
        (serve(router).await, salesforce)
    }

    /// Ends the session, as its timeout does.
    pub fn expire(&self) {
        self.0.is_expired.store(true, Relaxed);
    }

    /// Returns how many sessions were started.
    pub fn sessions(&self) -> u64 {
        self.0.issued.load(Relaxed)
    }

    fn access_token(&self) -> String {
        format!("00DR00000009GVP!AR8AQP{}", self.sessions())
    }
}

async fn session(State(salesforce): State<Salesforce>, Form(form): Parameters) -> Answer {
    check_client(&form)?;
    salesforce.0.issued.fetch_add(1, Relaxed);
    salesforce.0.is_expired.store(false, Relaxed);
    Ok(Json(json!({
        "access_token": salesforce.access_token(),
        "signature": "UVN2cmFuZG9t",
        "scope": "api",
        "instance_url": "https://mydomain.my.salesforce.com",
        "id": "https://login.salesforce.com/id/00DR00000009GVP/005R0000000HPR1",
        "token_type": "Bearer",
        "issued_at": "1788000000000",
    })))
}

async fn limits(State(salesforce): State<Salesforce>, headers: HeaderMap) -> Response {
    if salesforce.0.is_expired.load(Relaxed) || bearer(&headers) != Some(&*salesforce.access_token()) {
        let answer = json!([{ "message": "Session expired or invalid", "errorCode": "INVALID_SESSION_ID" }]);
        return (StatusCode::UNAUTHORIZED, [("www-authenticate", "Token")], Json(answer)).into_response();
    }
    Json(json!({ "DailyApiRequests": { "Max": 15000, "Remaining": 14998 } })).into_response()
}

/// Checks the grant, the client's ID and its secret, all in the form.
fn check_client(form: &HashMap<String, String>) -> Result<(), (StatusCode, Json<Value>)> {
    if form.get("grant_type").is_none_or(|grant| grant != "client_credentials") {
        return error(StatusCode::BAD_REQUEST, "unsupported_grant_type");
    }
    let has = |name, value: &str| form.get(name).is_some_and(|given| given == value);
    if !has("client_id", "your-client-id") || !has("client_secret", "your-client-secret") {
        return error(StatusCode::UNAUTHORIZED, "invalid_client");
    }
    Ok(())
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    headers.get(AUTHORIZATION)?.to_str().ok()?.strip_prefix("Bearer ")
}

/// Returns the claims of a JWT that [`PRIVATE_KEY`] has signed with RS256 and that is valid now.
fn verified(jwt: &str) -> Option<Value> {
    let decode = |part| BASE64_URL_SAFE_NO_PAD.decode(part).ok();
    let (signed, signature) = jwt.rsplit_once('.')?;
    let (header, claims) = signed.split_once('.')?;
    let header: Value = serde_json::from_slice(&decode(header)?).ok()?;
    if header["alg"] != "RS256" {
        return None;
    }
    let key: String = PRIVATE_KEY.lines().filter(|line| !line.starts_with("-----")).collect();
    let key = RsaKeyPair::from_pkcs8(&BASE64_STANDARD.decode(key).ok()?).ok()?;
    UnparsedPublicKey::new(&RSA_PKCS1_2048_8192_SHA256, key.public_key())
        .verify(signed.as_bytes(), &decode(signature)?)
        .ok()?;
    let claims: Value = serde_json::from_slice(&decode(claims)?).ok()?;
    let now = SystemTime::UNIX_EPOCH.elapsed().ok()?.as_secs();
    (claims["iat"].as_u64()? <= now && now < claims["exp"].as_u64()?).then_some(claims)
}

/// Returns the lifetime that the claims state, in seconds.
fn lifetime(claims: &Value) -> u64 {
    let seconds = |name| claims[name as &str].as_u64().unwrap_or_default();
    seconds("exp").saturating_sub(seconds("iat"))
}
