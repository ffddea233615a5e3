//! Request extensions select the token of one request: none, or a given one.

use http::{HeaderValue, Request, StatusCode, header::AUTHORIZATION};
use http_body_util::{BodyExt, Empty};
use tower::{Layer, ServiceExt};
use tower_bearer::{AllowedOrigins, ExistingAuthorization, NoBearer, Token, UseToken};

use crate::support::{CHALLENGED, Scene, get, scene};

type Body = Empty<bytes::Bytes>;

fn delegated() -> UseToken {
    UseToken(Token::builder("delegated").build().unwrap())
}

fn with(extension: impl Clone + Send + Sync + 'static) -> Request<Body> {
    let mut request = get();
    request.extensions_mut().insert(extension);
    request
}

/// A request that needs no token is sent unchanged.
#[tokio::test(start_paused = true)]
async fn no_bearer_request_goes_unchanged() {
    let Scene { api, source, service, .. } = scene().build();
    // Before there is a token, and afterwards.
    for _ in 0..2 {
        let answer = service.clone().oneshot(with(NoBearer)).await.unwrap();
        assert_eq!(answer.status(), StatusCode::UNAUTHORIZED);
        let mut own = with(NoBearer);
        own.headers_mut().insert(AUTHORIZATION, HeaderValue::from_static("Basic abc"));
        let answer = service.clone().oneshot(own).await.unwrap();
        assert_eq!(answer.into_body().collect().await.unwrap().to_bytes(), CHALLENGED);
        api.accept("access-1");
        let answer = service.clone().oneshot(get()).await.unwrap();
        assert_eq!(answer.status(), StatusCode::OK);
    }
    let sent: Vec<_> = api.headers().iter().map(|headers| headers.get(AUTHORIZATION).cloned()).collect();
    assert_eq!(sent[0], None);
    assert_eq!(sent[1].as_ref().unwrap(), "Basic abc");
    assert_eq!(sent[3], None);
    assert_eq!(source.fetches(), 1);
}

/// A request has a token in its extensions, which the API challenges.
#[tokio::test(start_paused = true)]
async fn own_token_causes_no_refresh() {
    let Scene { api, source, service, .. } = scene().build();
    let answer = service.clone().oneshot(with(delegated())).await.unwrap();
    assert_eq!(answer.status(), StatusCode::UNAUTHORIZED);
    api.accept("delegated");
    assert_eq!(service.clone().oneshot(with(delegated())).await.unwrap().status(), StatusCode::OK);
    assert_eq!(api.tokens(), ["delegated", "delegated"]);
    assert!(api.headers().iter().all(|headers| headers[AUTHORIZATION].is_sensitive()));
    assert_eq!(source.fetches(), 0);
    // Other extensions have no effect.
    api.accept("access-1");
    assert_eq!(service.oneshot(with(7_u8)).await.unwrap().status(), StatusCode::OK);
    assert_eq!(api.tokens().last().unwrap(), "access-1");
}

/// A request with a token in its extensions goes to an origin that is not allowed.
#[tokio::test(start_paused = true)]
async fn own_token_follows_layer_rules() {
    let Scene { api, layer, .. } = scene().build();
    let mut own = with(delegated());
    own.headers_mut().insert(AUTHORIZATION, HeaderValue::from_static("Basic abc"));

    // A request that already has the header.
    layer.clone().layer(api.service()).oneshot(own.clone()).await.unwrap();
    layer
        .clone()
        .existing_authorization(ExistingAuthorization::Replace)
        .layer(api.service())
        .oneshot(own)
        .await
        .unwrap();
    // A request to another origin.
    let mut other = with(delegated());
    *other.uri_mut() = "https://elsewhere.example/".parse().unwrap();
    let scoped = layer.clone().allowed_origins(AllowedOrigins::origins(["https://api.example"]).unwrap());
    scoped.layer(api.service()).oneshot(other).await.unwrap();
    // With both extensions, no token is added.
    let mut neither = with(delegated());
    neither.extensions_mut().insert(NoBearer);
    layer.layer(api.service()).oneshot(neither).await.unwrap();

    let sent: Vec<_> = api.headers().iter().map(|headers| headers.get(AUTHORIZATION).cloned()).collect();
    assert_eq!(
        sent,
        [
            Some(HeaderValue::from_static("Basic abc")),
            Some(HeaderValue::from_static("Bearer delegated")),
            None,
            None
        ]
    );
}
