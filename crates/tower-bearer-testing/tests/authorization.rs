//! The authorization endpoint, and the grant for its codes.

use bytes::Bytes;
use http::{Request, StatusCode, header::LOCATION};
use http_body_util::{BodyExt, Full};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::Value;
use tower_bearer_testing::AuthServer;

// RFC 7636, appendix B.
const VERIFIER: &str = "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk";
const CHALLENGE: &str = "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM";
const REDIRECT: &str = "http://127.0.0.1:9/callback?from=server";

type Fields<'a> = &'a [(&'a str, &'a str)];

fn client() -> Client<HttpConnector, Full<Bytes>> {
    Client::builder(TokioExecutor::new()).build_http()
}

fn form(fields: Fields<'_>) -> String {
    form_urlencoded::Serializer::new(String::new()).extend_pairs(fields).finish()
}

/// Asks for a code. Returns the status, and the parameters of the redirect.
async fn authorize(server: &AuthServer, fields: Fields<'_>) -> (StatusCode, Vec<(String, String)>) {
    let uri = format!("{}/oauth/authorize?{}", server.issuer(), form(fields));
    let request = Request::get(uri).body(Full::<Bytes>::default()).unwrap();
    let response = client().request(request).await.unwrap();
    let location = response.headers().get(LOCATION).map(|location| location.to_str().unwrap().to_owned());
    let query = location.as_deref().and_then(|location| location.strip_prefix(REDIRECT)).unwrap_or_default();
    (
        response.status(),
        form_urlencoded::parse(query.trim_start_matches('&').as_bytes()).into_owned().collect(),
    )
}

async fn token(server: &AuthServer, fields: Fields<'_>) -> Value {
    let request = Request::post(format!("{}/oauth/token", server.issuer()))
        .header("content-type", "application/x-www-form-urlencoded")
        .body(Full::from(form(fields)))
        .unwrap();
    let response = client().request(request).await.unwrap();
    serde_json::from_slice(&response.into_body().collect().await.unwrap().to_bytes()).unwrap()
}

async fn refresh(server: &AuthServer, refresh_token: &str) -> Value {
    let id = server.client_id();
    token(server, &[("grant_type", "refresh_token"), ("client_id", &*id), ("refresh_token", refresh_token)])
        .await
}

fn value<'a>(fields: &'a [(String, String)], name: &str) -> Option<&'a str> {
    fields.iter().find(|(of, _)| of == name).map(|(_, value)| value.as_str())
}

/// A code begins a login, once, and only with its verifier and its redirect URI.
#[tokio::test]
async fn code_begins_login() {
    let server = AuthServer::start().await.unwrap();
    let id = server.client_id();
    let asked = [
        ("response_type", "code"),
        ("client_id", &*id),
        ("redirect_uri", REDIRECT),
        ("code_challenge", CHALLENGE),
        ("code_challenge_method", "S256"),
        ("state", "a b&c"),
    ];
    for (verifier, redirect_uri, is_good) in
        [(VERIFIER, REDIRECT, true), ("another", REDIRECT, false), (VERIFIER, "http://127.0.0.1:9/", false)]
    {
        let (status, answer) = authorize(&server, &asked).await;
        assert_eq!(status, StatusCode::FOUND);
        assert_eq!(value(&answer, "state"), Some("a b&c"));
        assert_eq!(value(&answer, "iss"), Some(&*server.issuer()));
        let exchange = [
            ("grant_type", "authorization_code"),
            ("client_id", &*id),
            ("code", value(&answer, "code").unwrap()),
            ("redirect_uri", redirect_uri),
            ("code_verifier", verifier),
        ];
        let granted = token(&server, &exchange).await;
        assert_eq!(granted["error"], if is_good { Value::Null } else { "invalid_grant".into() });
        let Some(refresh_token) = granted["refresh_token"].as_str() else { continue };
        let refreshed = refresh(&server, refresh_token).await;
        let next = refreshed["refresh_token"].as_str().unwrap();
        assert_eq!(token(&server, &exchange).await["error"], "invalid_grant", "a code is valid once");
        assert_eq!(refresh(&server, next).await["error"], "invalid_grant", "its login has ended");
    }
    let counters = server.counters();
    assert_eq!((counters.authorization_code_grants, counters.oauth_refresh_grants), (1, 1));
    assert!(
        server.token_requests().iter().flatten().all(|(name, _)| name != "code" && name != "code_verifier")
    );
}

/// An error is sent to a redirect URI on loopback only, and only for the server's client.
#[tokio::test]
async fn redirects_only_to_loopback() {
    let server = AuthServer::start().await.unwrap();
    let id = server.client_id();
    for (client, redirect_uri, method, error) in [
        (&*id, REDIRECT, "plain", Some("invalid_request")),
        (&*id, REDIRECT, "", Some("invalid_request")),
        ("another", REDIRECT, "S256", None),
        (&*id, "http://login.example/", "S256", None),
        (&*id, "custom:callback", "S256", None),
        (&*id, "http://127.0.0.1:9/callback#fragment", "S256", None),
        (&*id, "http://login.example@127.0.0.1:9/", "S256", None),
        (&*id, "http://127.0.0.1:99999/", "S256", None),
        (&*id, "", "S256", None),
    ] {
        let asked = [
            ("response_type", "code"),
            ("client_id", client),
            ("redirect_uri", redirect_uri),
            ("code_challenge", CHALLENGE),
            ("code_challenge_method", method),
        ];
        let (status, answer) = authorize(&server, &asked).await;
        let expected = if error.is_some() { StatusCode::FOUND } else { StatusCode::BAD_REQUEST };
        assert_eq!((status, value(&answer, "error")), (expected, error), "{client} {redirect_uri} {method}");
    }
}
