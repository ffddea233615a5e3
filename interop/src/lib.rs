//! What the tests and the examples share: who issues tokens, who checks them, and what a revocation must come to.

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
use tower_bearer::{
    SourceError, Token, TokenRequest, TokenSource,
    testing::{AuthServer, Counters},
};

/// How many calls meet a revoked token at once.
pub const CALLS: usize = 200;

/// Issues tokens, revokes them, and knows which is good: a token source, and what a server checks by.
#[derive(Clone, Debug, Default)]
pub struct Issuer(Arc<Mutex<Issued>>);

#[derive(Debug, Default)]
struct Issued {
    good: Option<String>,
    count: u64,
    refused: u64,
}

impl Issuer {
    fn issued(&self) -> MutexGuard<'_, Issued> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many tokens were issued.
    pub fn count(&self) -> u64 {
        self.issued().count
    }

    /// How many requests came with no token, or another than the good one.
    pub fn rejected(&self) -> u64 {
        self.issued().refused
    }

    /// The token that was issued last is good no more.
    pub fn revoke(&self) {
        self.issued().good = None;
    }

    /// Whether a request with these headers may pass.
    pub fn accepts(&self, headers: &HeaderMap) -> bool {
        let token = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
        let mut issued = self.issued();
        let good = token.is_some() && token == issued.good.as_deref();
        issued.refused += u64::from(!good);
        good
    }
}

impl TokenSource for Issuer {
    async fn fetch(&self, request: &TokenRequest<'_>) -> Result<Token, SourceError> {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let mut issued = self.issued();
        issued.count += 1;
        let token = format!("token-{}", issued.count);
        issued.good = Some(token.clone());
        Ok(Token::builder(token).expires_in(Duration::from_secs(3600)).build()?)
    }
}

/// Serves `router` on loopback; requests without the issuer's good token are answered 401 (RFC 6750 §3).
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
    // Read on behind the answer: a connection that is closed on unread bytes is reset, and the answer with it.
    tokio::spawn(request.into_body().into_data_stream().for_each(async |_| {}));
    let challenge = [(WWW_AUTHENTICATE, "Bearer error=\"invalid_token\"")];
    (StatusCode::UNAUTHORIZED, challenge, "who are you?").into_response()
}

/// Calls once, revokes the token, and calls 200 times at once: all succeed, and one refresh heals them.
///
/// # Panics
///
/// If more than one was needed, or none.
pub async fn one_refresh_heals<F>(issuer: &Issuer, call: impl Fn(usize) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    call(0).await;
    let (issued, refused) = (issuer.count(), issuer.refused());
    issuer.revoke();
    all_at_once(call).await;
    assert_eq!(issuer.count(), issued + 1, "tokens issued after the revocation");
    assert!(issuer.refused() > refused, "no call met the revoked token");
}

/// The same, with the auth server as issuer: each call lists the videos once.
///
/// # Panics
///
/// As [`one_refresh_heals`].
pub async fn one_refresh_heals_api_video<F>(server: &AuthServer, call: impl Fn(usize) -> F) -> Counters
where
    F: Future<Output = ()> + Send + 'static,
{
    call(0).await;
    server.revoke_access_tokens();
    all_at_once(call).await;
    let counters = server.counters();
    assert_eq!((counters.api_key_grants, counters.refresh_grants), (1, 1), "{counters:?}");
    assert_eq!(counters.videos_listed, CALLS as u64 + 1);
    assert!(counters.challenged > 0, "no call met the revoked token");
    counters
}

/// Makes 200 calls at once.
///
/// # Panics
///
/// If one of them does.
pub async fn all_at_once<F>(call: impl Fn(usize) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let calls: Vec<_> = (0..CALLS).map(|number| tokio::spawn(call(number))).collect();
    for call in calls {
        call.await.expect("a call failed");
    }
}

/// The page `guide::recipes` of the crate's documentation, tested where its peers are dependencies.
#[cfg(doctest)]
#[doc = include_str!("../../src/guide/recipes.md")]
struct Recipes;
