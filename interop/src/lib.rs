//! Helpers for the tests and the examples: an issuer of tokens, a server that checks them, and the check of a
//! revocation.

pub mod services;

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::{
    Router,
    extract::{Request, State},
    middleware::{self, Next},
    response::{IntoResponse, Response},
};
use futures_util::StreamExt;
use http::{
    HeaderMap, StatusCode,
    header::{AUTHORIZATION, WWW_AUTHENTICATE},
};
use tower_bearer::{SourceError, Token, TokenRequest, TokenSource};
use tower_bearer_testing::{AuthServer, Counters};

/// The number of calls that use a revoked token at once.
pub const CALLS: usize = 200;

/// Issues and revokes tokens. It is a token source, and a server checks tokens with it.
#[derive(Clone, Debug, Default)]
pub struct Issuer(Arc<Mutex<Issued>>);

#[derive(Debug, Default)]
struct Issued {
    valid: Option<String>,
    count: u64,
    challenged: u64,
}

impl Issuer {
    fn issued(&self) -> MutexGuard<'_, Issued> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the number of issued tokens.
    pub fn count(&self) -> u64 {
        self.issued().count
    }

    /// Returns the number of requests without the valid token.
    pub fn challenged(&self) -> u64 {
        self.issued().challenged
    }

    /// Revokes the token that was issued last.
    pub fn revoke(&self) {
        self.issued().valid = None;
    }

    /// Returns whether a request with these headers has the valid token.
    pub fn accepts(&self, headers: &HeaderMap) -> bool {
        let token = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
        let mut issued = self.issued();
        let is_valid = token.is_some() && token == issued.valid.as_deref();
        issued.challenged += u64::from(!is_valid);
        is_valid
    }
}

impl TokenSource for Issuer {
    async fn fetch(&self, _: &TokenRequest<'_>) -> Result<Token, SourceError> {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let mut issued = self.issued();
        issued.count += 1;
        let token = format!("token-{}", issued.count);
        issued.valid = Some(token.clone());
        Ok(Token::builder(token).expires_in(Duration::from_secs(3600)).build()?)
    }
}

/// Serves `router` on loopback. Requests without the issuer's valid token get a 401 (RFC 6750 §3).
pub async fn serve(router: Router, issuer: &Issuer) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("an address");
    let router = router.layer(middleware::from_fn_with_state(issuer.clone(), check));
    tokio::spawn(async move { axum::serve(listener, router).await });
    address
}

async fn check(State(issuer): State<Issuer>, request: Request, next: Next) -> Response {
    if issuer.accepts(request.headers()) {
        return next.run(request).await;
    }
    // Keep reading in the background: closing a connection with unread bytes resets it, and the response may be lost.
    tokio::spawn(request.into_body().into_data_stream().for_each(async |_| {}));
    let challenge = [(WWW_AUTHENTICATE, "Bearer error=\"invalid_token\"")];
    (StatusCode::UNAUTHORIZED, challenge, "who are you?").into_response()
}

/// Calls once, revokes the token, and calls 200 times at once. All calls succeed after one refresh.
///
/// # Panics
///
/// If there was not exactly one refresh.
pub async fn recovers_with_one_refresh<F>(issuer: &Issuer, call: impl Fn(usize) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    call(0).await;
    let (issued, challenged) = (issuer.count(), issuer.challenged());
    issuer.revoke();
    all_at_once(call).await;
    assert_eq!(issuer.count(), issued + 1, "tokens issued after the revocation");
    assert!(issuer.challenged() > challenged, "no call used the revoked token");
}

/// As [`recovers_with_one_refresh`], with the auth server as issuer. Each call lists the videos once.
///
/// # Panics
///
/// As [`recovers_with_one_refresh`].
pub async fn recovers_with_one_refresh_api_video<F>(
    server: &AuthServer,
    call: impl Fn(usize) -> F,
) -> Counters
where
    F: Future<Output = ()> + Send + 'static,
{
    call(0).await;
    server.revoke_access_tokens();
    all_at_once(call).await;
    let counters = server.counters();
    assert_eq!((counters.api_key_grants, counters.refresh_grants), (1, 1), "{counters:?}");
    assert_eq!(counters.videos_listed, CALLS as u64 + 1);
    assert!(counters.challenged > 0, "no call used the revoked token");
    counters
}

/// Runs 200 calls at once.
///
/// # Panics
///
/// If one of them panics.
pub async fn all_at_once<F>(call: impl Fn(usize) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let calls: Vec<_> = (0..CALLS).map(|number| tokio::spawn(call(number))).collect();
    for call in calls {
        call.await.expect("a call failed");
    }
}

/// The page `guide::recipes` of the crate's documentation. It is tested here because the peers are dependencies of this crate.
#[cfg(doctest)]
#[doc = include_str!("../../src/guide/recipes.md")]
struct Recipes;

/// The page `guide::without_tower`, for the same reason.
#[cfg(doctest)]
#[doc = include_str!("../../src/guide/without_tower.md")]
struct WithoutTower;

/// The page `guide::oauth2`, which is tested here for the same reason. The rest of the page is tested in `sdks`.
#[cfg(doctest)]
#[doc = include_str!("../../src/guide/oauth2.md")]
struct OAuth2;
