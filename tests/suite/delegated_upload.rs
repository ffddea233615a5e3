//! Delegated uploads over real sockets: an upload token is created with the provider's token, and used without it.

#![cfg(feature = "default-client")]

use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Full};
use tower::{Layer, ServiceExt};
use tower_bearer::{ApiVideo, BearerAuthLayer, Error, NoBearer, SourceErrorKind, TokenProvider, UploadToken};
use tower_bearer_testing::{AuthServer, Fault, Route};

use crate::support::{chain, http1};

const TTL: Duration = Duration::from_secs(600);

fn source(server: &AuthServer) -> (ApiVideo, TokenProvider) {
    let source = ApiVideo::new(server.api_key()).base_url(server.uri());
    (source.clone(), TokenProvider::new(source))
}

fn upload(server: &AuthServer, token: &UploadToken) -> Request<Full<Bytes>> {
    let uri = format!("{}upload?token={}", server.uri(), token.token());
    Request::post(uri).body(Full::from("a video")).unwrap()
}

/// A delegated upload needs no bearer token, until its upload token expires.
#[tokio::test]
async fn uploads_without_bearer_until_expiry() {
    let server = AuthServer::builder().reject_bearer_at_upload(true).start().await.unwrap();
    let (source, provider) = source(&server);
    let token = source.upload_token(&provider, TTL - Duration::from_millis(1)).await.unwrap();
    assert_eq!(token.ttl(), TTL, "rounded up to whole seconds");

    // The client has the layer, which adds a bearer token to every other request.
    let client = BearerAuthLayer::with_provider(provider.clone()).layer(http1());
    let answer = client.clone().oneshot(upload(&server, &token)).await.unwrap();
    assert_eq!(answer.status(), StatusCode::BAD_REQUEST, "the endpoint rejects a bearer token");
    let mut request = upload(&server, &token);
    request.extensions_mut().insert(NoBearer);
    let answer = client.clone().oneshot(request.clone()).await.unwrap();
    assert_eq!(answer.status(), StatusCode::CREATED);
    answer.into_body().collect().await.unwrap();

    tokio::time::pause();
    tokio::time::advance(TTL).await;
    tokio::time::resume();
    let answer = client.oneshot(request).await.unwrap();
    assert_eq!(answer.status(), StatusCode::UNAUTHORIZED);
    let counters = server.counters();
    assert_eq!(
        (counters.upload_tokens, counters.delegated_uploads, counters.rejected_upload_tokens),
        (1, 1, 1)
    );
    assert_eq!(provider.status().refreshes, 1, "its 401 is not a challenge of the provider's token");
    assert_eq!((server.uploads().len(), server.uploads()[0].bytes), (1, 7));
}

/// The bearer token is revoked when an upload token is requested.
#[tokio::test]
async fn creating_upload_token_heals() {
    let server = AuthServer::start().await.unwrap();
    let (source, provider) = source(&server);
    provider.token().await.unwrap();
    server.revoke_access_tokens();
    source.upload_token(&provider, TTL).await.unwrap();
    let counters = server.counters();
    assert_eq!((counters.challenged, counters.refresh_grants, counters.upload_tokens), (1, 1, 1));
}

/// An upload token cannot be had, or appears in an error or in `Debug`.
#[tokio::test]
async fn typed_errors_show_no_upload_token() {
    let server = AuthServer::start().await.unwrap();
    let (source, provider) = source(&server);
    for ttl in [Duration::ZERO, Duration::from_secs(1 << 31), Duration::MAX] {
        let error = source.upload_token(&provider, ttl).await.unwrap_err();
        assert!(matches!(error, Error::InvalidOption(_)), "{ttl:?}: {error:?}");
    }
    let answer = |body: &'static str| Fault::Answer(http::Response::new(Bytes::from_static(body.as_bytes())));
    for (fault, kind) in [
        (Fault::Status(StatusCode::FORBIDDEN), SourceErrorKind::Rejected),
        (Fault::Status(StatusCode::SERVICE_UNAVAILABLE), SourceErrorKind::Unavailable),
        (Fault::Reset, SourceErrorKind::Unavailable),
        (Fault::Truncate, SourceErrorKind::Unavailable),
        (Fault::Status(StatusCode::NOT_FOUND), SourceErrorKind::Configuration),
        (Fault::Status(StatusCode::BAD_REQUEST), SourceErrorKind::InvalidResponse),
        (answer("canary, and no JSON"), SourceErrorKind::InvalidResponse),
        (answer(r#"{"token": ""}"#), SourceErrorKind::InvalidResponse),
        (answer(r#"{"ttl": "canary"}"#), SourceErrorKind::InvalidResponse),
    ] {
        server.inject(Route::Api, fault.clone());
        let error = source.upload_token(&provider, TTL).await.unwrap_err();
        let Error::Source(source) = &error else { panic!("{fault:?}: {error:?}") };
        assert_eq!(source.kind(), kind, "{fault:?}: {error:?}");
        assert!(!format!("{}{error:?}", chain(&error)).contains("canary"), "{error:?}");
    }
    let mut wait = http::Response::new(Bytes::new());
    *wait.status_mut() = StatusCode::TOO_MANY_REQUESTS;
    wait.headers_mut().insert("retry-after", http::HeaderValue::from_static("7"));
    server.inject(Route::Api, Fault::Answer(wait));
    let error = source.upload_token(&provider, TTL).await.unwrap_err();
    let Error::Source(limited) = &error else { panic!("{error:?}") };
    assert_eq!(limited.retry_after(), Some(Duration::from_secs(7)));
    let wrong_key = ApiVideo::new("another-key").base_url(server.uri());
    let error = source.upload_token(&TokenProvider::new(wrong_key), TTL).await.unwrap_err();
    assert!(
        matches!(&error, Error::Source(source) if source.kind() == SourceErrorKind::Rejected),
        "{error:?}"
    );

    let token = source.upload_token(&provider, TTL).await.unwrap();
    assert!(!format!("{token:?}").contains(token.token()));
}
