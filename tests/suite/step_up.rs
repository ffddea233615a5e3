//! The source gets the parameters of the challenge, such as claims or `acr_values` (RFC 6750 §3, RFC 9470).

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{Router, http::header::WWW_AUTHENTICATE, response::IntoResponse};
use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode, header::AUTHORIZATION};
use http_body_util::{Empty, Full};
use tokio::time::sleep;
use tower::{Layer, ServiceExt, service_fn};
use tower_bearer::{
    BearerAuthLayer, BoxError, RefreshReason, SourceError, Token, TokenProvider, TokenRequest,
    challenge::Challenge, source_fn,
};

use crate::support::{http1, scene_of};

const CLAIMS: &str = r#"Bearer realm="", error="insufficient_claims", claims="eyJhY2Nlc3NfdG9rZW4iOnt9fQ==""#;
const ACR: &str =
    r#"Bearer error="insufficient_user_authentication", acr_values="urn:gold urn:silver", max_age=5"#;

type Seen = Arc<Mutex<Vec<(RefreshReason, Option<Challenge>)>>>;

/// A layer whose source takes `delay` per fetch and records the reason and the challenge. Its tokens are `access-1`,
/// `access-2` and so on.
fn layer(seen: &Seen, delay: Duration) -> BearerAuthLayer {
    let seen = Arc::clone(seen);
    let source = source_fn(move |request: TokenRequest<'static>| {
        let seen = Arc::clone(&seen);
        async move {
            let number = {
                let mut seen = seen.lock().unwrap();
                seen.push((request.reason(), request.challenge().cloned()));
                seen.len()
            };
            sleep(delay).await;
            Ok::<_, SourceError>(Token::builder(format!("access-{number}")).build()?)
        }
    });
    // Without a cool-down, a challenge of a new token starts the next refresh at once.
    let instant = Duration::from_nanos(1);
    scene_of(source).provider(|builder| builder.cool_down(instant, instant)).build().layer
}

fn carries(headers: &HeaderMap, token: &str) -> bool {
    headers.get(AUTHORIZATION).is_some_and(|value| value.as_bytes() == format!("Bearer {token}").as_bytes())
}

/// An API requires further claims, and then a stronger authentication.
#[tokio::test]
async fn source_gets_challenge_parameters() {
    let api = Router::new().fallback(|headers: HeaderMap| async move {
        match () {
            () if carries(&headers, "access-1") => {
                (StatusCode::UNAUTHORIZED, [(WWW_AUTHENTICATE, CLAIMS)]).into_response()
            }
            () if carries(&headers, "access-2") => {
                (StatusCode::UNAUTHORIZED, [(WWW_AUTHENTICATE, ACR)]).into_response()
            }
            () => StatusCode::OK.into_response(),
        }
    });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let uri = format!("http://{}/", listener.local_addr().unwrap());
    let server = tokio::spawn(async move { axum::serve(listener, api).await });

    let seen = Seen::default();
    let client = layer(&seen, Duration::ZERO).layer(http1());
    let request = Request::get(&uri).body(Empty::<Bytes>::new()).unwrap();
    assert_eq!(client.oneshot(request).await.unwrap().status(), StatusCode::OK);
    server.abort();

    let seen = seen.lock().unwrap();
    assert_eq!(seen[0], (RefreshReason::Missing, None));
    let (reason, claims) = &seen[1];
    let claims = claims.as_ref().unwrap();
    assert_eq!(*reason, RefreshReason::Challenged);
    assert_eq!(claims.error(), Some("insufficient_claims"));
    assert_eq!(claims.claims(), Some("eyJhY2Nlc3NfdG9rZW4iOnt9fQ=="));
    let (reason, acr) = &seen[2];
    let acr = acr.as_ref().unwrap();
    assert_eq!(*reason, RefreshReason::Challenged);
    assert_eq!(acr.error(), Some("insufficient_user_authentication"));
    assert_eq!(acr.acr_values(), Some("urn:gold urn:silver"));
    assert_eq!(acr.max_age(), Some(Duration::from_secs(5)));
}

/// Two paths challenge one token with different parameters. The second request joins the refresh of the first one.
#[tokio::test(start_paused = true)]
async fn joiners_do_not_change_challenge() {
    let seen = Seen::default();
    let layer = layer(&seen, Duration::from_secs(1));
    layer.provider().token().await.unwrap();
    let service = layer.layer(service_fn(|request: Request<Empty<Bytes>>| async move {
        if carries(request.headers(), "access-2") {
            return Ok::<_, BoxError>(Response::new(Full::<Bytes>::default()));
        }
        let value = if request.uri().path() == "/first" { CLAIMS } else { ACR };
        // The second request is challenged while the refresh of the first one runs.
        if request.uri().path() == "/second" {
            sleep(Duration::from_millis(500)).await;
        }
        let response = Response::builder().status(StatusCode::UNAUTHORIZED).header(WWW_AUTHENTICATE, value);
        Ok(response.body(Full::default())?)
    }));
    let send = |path: &str| {
        let request = Request::get(format!("https://api.example{path}")).body(Empty::new()).unwrap();
        tokio::spawn(service.clone().oneshot(request))
    };
    let (first, second) = (send("/first"), send("/second"));
    assert_eq!(first.await.unwrap().unwrap().status(), StatusCode::OK);
    assert_eq!(second.await.unwrap().unwrap().status(), StatusCode::OK);

    let seen = seen.lock().unwrap();
    assert_eq!(seen.len(), 2);
    assert_eq!(seen[1].1.as_ref().unwrap().claims(), Some("eyJhY2Nlc3NfdG9rZW4iOnt9fQ=="));
}

/// A refresh starts because the token is expiring. A caller that joins after the expiry changes its reason.
#[tokio::test(start_paused = true)]
async fn joiner_raises_reason() {
    let reasons = Arc::new(Mutex::new(Vec::new()));
    let provider = TokenProvider::new(source_fn({
        let reasons = Arc::clone(&reasons);
        move |request: TokenRequest<'static>| {
            let reasons = Arc::clone(&reasons);
            async move {
                let first_reason = request.reason();
                sleep(Duration::from_secs(20)).await;
                reasons.lock().unwrap().push((first_reason, request.reason()));
                Ok::<_, SourceError>(Token::builder("abc").expires_in(Duration::from_secs(100)).build()?)
            }
        }
    }));
    provider.token().await.unwrap();
    // The source is slow, so the token is expiring from 40 s before its expiry.
    sleep(Duration::from_secs(85)).await;
    provider.token().await.unwrap();
    sleep(Duration::from_secs(16)).await;
    provider.token().await.unwrap();
    let reasons = reasons.lock().unwrap().clone();
    assert_eq!(
        reasons,
        [(RefreshReason::Missing, RefreshReason::Missing), (RefreshReason::Expiring, RefreshReason::Expired)]
    );
}
