//! What the layer does on a 401, and which responses it passes through.
#![cfg(feature = "default-client")]

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{
    HeaderValue, Request, Response, StatusCode,
    header::{AUTHORIZATION, WWW_AUTHENTICATE},
};
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use tokio::task::JoinSet;
use tower::{Layer, Service, ServiceExt};
use tower_bearer::{
    ApiVideo, BearerAuthLayer, BoxError, Error, ExistingAuthorization, RetryPolicy, SourceError, Token,
    TokenClient, challenge, source_fn,
};
use tower_bearer_testing::{AuthServer, Fault, Route};

use crate::support::{self, Act, Api, CHALLENGED, Scene, Source, get, get_videos, ours, scene, scene_of};

/// An API that accepts only the second token, and a layer whose provider has the first.
async fn revoked_once() -> (Api, Arc<Source>, BearerAuthLayer) {
    let Scene { api, source, layer, .. } = scene().accept(["access-2"]).with_token().await;
    (api, source, layer)
}

/// The token is revoked: the request is retried with a new one.
#[tokio::test(start_paused = true)]
async fn retries_challenge_with_new_token() {
    let (api, source, layer) = revoked_once().await;
    let response = layer.layer(api.service()).oneshot(get()).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(api.tokens(), ["access-1", "access-2"]);
    assert_eq!(source.fetches(), 2);
}

/// The first request finds no token.
#[tokio::test(start_paused = true)]
async fn first_request_obtains_token() {
    let Scene { api, layer, .. } = scene().accept(["access-1"]).build();
    let response = layer.layer(api.service()).oneshot(get()).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(api.tokens(), ["access-1"]);
}

/// The first retry waits for a backoff.
#[tokio::test(start_paused = true)]
async fn first_retry_has_no_backoff() {
    let (api, _, layer) = revoked_once().await;
    let start = tokio::time::Instant::now();
    layer.layer(api.service()).oneshot(get()).await.unwrap();
    assert_eq!(start.elapsed(), Duration::from_secs(1), "the first retry waited for a backoff");
}

/// The source fails: no request is sent without a token.
#[tokio::test(start_paused = true)]
async fn never_sends_without_token() {
    let Scene { api, layer, .. } =
        scene().then(Act::Fail(SourceError::rejected("the key was rejected"))).build();
    let error = layer.layer(api.service()).oneshot(get()).await.unwrap_err();
    assert!(matches!(ours(&error), Error::Source(_)));
    assert!(support::chain(&*error).contains("the key was rejected"));
    assert_eq!(api.requests(), 0);
}

/// The API responds with 401 to every token, and to 200 requests at once.
#[tokio::test(start_paused = true)]
async fn burst_of_401s_costs_one_refresh() {
    let Scene { api, source, layer, .. } = scene().build();
    let mut requests = JoinSet::new();
    for _ in 0..200 {
        requests.spawn(layer.layer(api.service()).oneshot(get()));
    }
    for response in requests.join_all().await {
        let response = response.unwrap();
        assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
        assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), CHALLENGED);
    }
    // One fetch for the first token and one for the first challenge. The first retry with a newer token does not use
    // the budget. For other retries the budget allows 10 per second for 10 s, and a fifth of 400 challenges.
    assert_eq!(source.fetches(), 2);
    assert!((400..=400 + 100 + 80).contains(&api.requests()), "{}", api.requests());

    // One request per second for another minute. The cool-down doubles with each refresh.
    for _ in 0..60 {
        layer.layer(api.service()).oneshot(get()).await.unwrap();
        tokio::time::advance(Duration::from_secs(1)).await;
    }
    assert!(source.fetches() <= 2 + 7, "{}", source.fetches());
}

/// The API responds with 401 to every token: `max_retries` bounds the requests.
#[tokio::test(start_paused = true)]
async fn max_retries_bounds_requests() {
    for max_retries in 0..=4 {
        let policy = RetryPolicy::new().max_retries(max_retries);
        let Scene { api, service, .. } = scene().layer(|layer| layer.retry(policy)).build();
        let response = service.oneshot(get()).await.unwrap();
        assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
        assert_eq!(api.requests() as u32, 1 + max_retries);
    }
}

/// The API challenges a token that was just issued.
#[tokio::test(start_paused = true)]
async fn lagging_api_is_retried_after_backoff() {
    let Scene { api, source, layer, .. } = scene().with_token().await;
    let start = tokio::time::Instant::now();
    let request = tokio::spawn(layer.layer(api.service()).oneshot(get()));
    // The refresh takes a second. The backoff of 100 ms is not over yet.
    tokio::time::sleep(Duration::from_millis(1050)).await;
    assert_eq!(api.tokens(), ["access-1", "access-2"]);
    api.accept("access-2");
    assert_eq!(request.await.unwrap().unwrap().status(), StatusCode::OK);
    assert!(start.elapsed() >= Duration::from_millis(1100));
    assert_eq!((api.requests(), source.fetches()), (3, 2));
}

/// A request that cannot be sent again is challenged.
#[tokio::test(start_paused = true)]
async fn no_replay_401_refreshes_in_background() {
    let (api, source, layer) = revoked_once().await;
    let service = layer.no_replay().layer(api.service());
    let start = tokio::time::Instant::now();
    let response = service.clone().oneshot(get()).await.unwrap();
    assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), CHALLENGED);
    assert_eq!(start.elapsed(), Duration::ZERO, "the request waited for the refresh");
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(service.oneshot(get()).await.unwrap().status(), StatusCode::OK);
    assert_eq!((api.requests(), source.fetches()), (2, 2));
}

/// A refresh fails after a challenge: the caller gets the 401.
#[tokio::test(start_paused = true)]
async fn failed_refresh_returns_401() {
    let Scene { api, service, .. } =
        scene().then(Act::Live(Duration::from_secs(60))).then(Act::Fail(SourceError::rejected("no"))).build();
    let response = service.clone().oneshot(get()).await.unwrap();
    assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), CHALLENGED);
    // The next request still gets the old token, which may work again.
    api.accept("access-1");
    assert_eq!(service.oneshot(get()).await.unwrap().status(), StatusCode::OK);
}

fn source(server: &AuthServer) -> ApiVideo {
    ApiVideo::new(server.api_key()).base_url(server.uri())
}

/// A 401 with a small body costs its connection.
#[tokio::test]
async fn retry_reuses_connection_of_small_401() {
    let server = AuthServer::start().await.unwrap();
    let client = TokenClient::with_service(support::http1::<String>());
    let service = scene_of(source(&server).with_client(client)).build().layer.layer(support::http1());
    for _ in 0..2 {
        let response = service.clone().oneshot(get_videos(&server)).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        response.into_body().collect().await.unwrap();
        server.revoke_access_tokens();
    }
    let counters = server.counters();
    assert_eq!((counters.challenged, counters.refresh_grants), (1, 1));
    // One connection to the auth endpoints, one to the API.
    assert_eq!(counters.connections, 2);
}

/// A 401 has an endless body.
#[tokio::test(start_paused = true)]
async fn endless_401_body_is_dropped() {
    // The endless body has full frames, empty frames, or no frame at all.
    for (frame, wait) in
        [(&[b'x'; 1024][..], Duration::ZERO), (&[], Duration::ZERO), (&[], Duration::from_millis(100))]
    {
        let (_, _, layer) = revoked_once().await;
        let service = tower::service_fn(move |request: Request<Empty<Bytes>>| async move {
            if request.headers()[AUTHORIZATION] == "Bearer access-2" {
                return Ok(Response::new(None));
            }
            let mut response = Response::new(Some(frame));
            *response.status_mut() = StatusCode::UNAUTHORIZED;
            Ok::<_, Infallible>(response)
        });
        let service = service.map_response(move |response: Response<Option<&'static [u8]>>| {
            response.map(|frame| {
                let hangs = !wait.is_zero();
                StreamBody::new(Endless { frame: frame.map(Bytes::from_static), hangs })
            })
        });
        let start = tokio::time::Instant::now();
        let response = layer.layer(service).oneshot(get()).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        assert!(start.elapsed() <= Duration::from_secs(1) + wait, "{:?}", start.elapsed());
    }
}

/// A body that repeats one frame without an end. If it `hangs`, no frame arrives. Without a frame, the body ends at
/// once.
struct Endless {
    frame: Option<Bytes>,
    hangs: bool,
}

impl futures_core::Stream for Endless {
    type Item = Result<http_body::Frame<Bytes>, Infallible>;

    fn poll_next(
        self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        if self.hangs && self.frame.is_some() {
            return std::task::Poll::Pending;
        }
        std::task::Poll::Ready(self.frame.clone().map(|frame| Ok(http_body::Frame::data(frame))))
    }
}

/// The API responds with 403, 407, 419, 440 or `insufficient_scope`, which another token does not change.
#[tokio::test(start_paused = true)]
async fn passes_through_non_challenges() {
    let insufficient = Some("Bearer error=\"insufficient_scope\"");
    for (status, www_authenticate) in
        [(403, None), (407, None), (419, None), (440, None), (401, insufficient), (400, None), (503, None)]
    {
        let (_, source, layer) = revoked_once().await;
        let service = tower::service_fn(move |_: Request<Empty<Bytes>>| async move {
            let mut response = Response::builder().status(status);
            if let Some(value) = www_authenticate {
                response = response.header("www-authenticate", value);
            }
            response.body(Full::<Bytes>::from("unchanged")).map_err(BoxError::from)
        });
        let response = layer.layer(service).oneshot(get()).await.unwrap();
        assert_eq!(response.status(), status);
        assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "unchanged");
        tokio::time::sleep(Duration::from_secs(10)).await;
        assert_eq!(source.fetches(), 1, "{status}");
    }
}

/// The 401 has other challenges in the same field or in another one, no commas, UTF-8, or a syntax error before or after the
/// Bearer challenge: whether another token helps is read in all of them.
#[tokio::test(start_paused = true)]
async fn bearer_challenge_is_found_beside_others() {
    for fields in [
        &[r#"Bearer error="E", scope="a b""#][..],
        &[r#"Bearer realm="x" error="E" scope="a b""#],
        &[r#"Bearer realm=x, error=E, scope=a"#],
        &[r#"Bearer error="E", error_description="größer""#],
        &[r#"Basic realm="x", Bearer error="E""#],
        &[r#"Bearer error="E", Basic realm="x""#],
        &[r#"Basic realm="x""#, r#"Bearer error="E""#],
        &[r#"Bearer error="E""#, r#"Basic realm="x""#],
        &[r#"Newauth, Basic realm="x", Digest realm="x", qop="auth,auth-int""#, r#"Bearer error="E""#],
        &[r#"Negotiate YIIKjQ+/==, Bearer error="E""#],
        &[r#"Negotiate YIIKjQ+/=="#, "NTLM", r#"Bearer error="E""#],
        &[r#"Basic realm="x, Bearer error="E""#],
        &[r#"Bearer error="E", Basic realm="x"#],
        &[r#"= , @[], "a, Bearer error="E""#],
        &[r#"Bearer error="E", = , @[], "a"#],
        &[r#"Bearer realm="x", Bearer error="E""#],
    ] {
        for (error, fetches) in [("insufficient_scope", 1), ("invalid_request", 1), ("invalid_token", 2)] {
            let (_, source, layer) = revoked_once().await;
            let service = tower::service_fn(move |request: Request<Empty<Bytes>>| async move {
                let mut response = Response::new(Full::<Bytes>::default());
                if request.headers()[AUTHORIZATION] != "Bearer access-2" {
                    *response.status_mut() = StatusCode::UNAUTHORIZED;
                    for field in fields {
                        let field = HeaderValue::from_bytes(field.replace('E', error).as_bytes()).unwrap();
                        response.headers_mut().append(WWW_AUTHENTICATE, field);
                    }
                }
                Ok::<_, BoxError>(response)
            });
            let response = layer.layer(service).oneshot(get()).await.unwrap();
            assert_eq!(source.fetches(), fetches, "{fields:?}, {error}");
            assert_eq!(response.status(), if fetches == 1 { 401 } else { 200 }, "{fields:?}, {error}");
        }
    }
}

/// The API reports an invalid token in another way than by a 401.
#[tokio::test(start_paused = true)]
async fn custom_predicate_finds_challenge() {
    let (_, source, layer) = revoked_once().await;
    let service = tower::service_fn(|request: Request<Empty<Bytes>>| async move {
        let is_accepted = request.headers()[AUTHORIZATION] == "Bearer access-2";
        let response = Response::builder().header("grpc-status", if is_accepted { "0" } else { "16" });
        response.body(Full::<Bytes>::default()).map_err(BoxError::from)
    });
    let response = layer.challenge(challenge::grpc).layer(service).oneshot(get()).await.unwrap();
    assert_eq!(response.headers()["grpc-status"], "0");
    assert_eq!(source.fetches(), 2);
}

/// A request has its own token, which the API challenges.
#[tokio::test(start_paused = true)]
async fn own_authorization_causes_no_refresh() {
    for has_token in [true, false] {
        let Scene { api, source, layer, .. } = scene().build();
        if has_token {
            layer.provider().token().await.unwrap();
        }
        let mut request = get();
        request.headers_mut().insert(AUTHORIZATION, HeaderValue::from_static("Bearer mine"));
        let response = layer.layer(api.service()).oneshot(request).await.unwrap();
        assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
        tokio::time::sleep(Duration::from_secs(10)).await;
        assert_eq!(api.tokens(), ["mine"]);
        assert_eq!(source.fetches(), u64::from(has_token));
    }
}

/// A request has an `Authorization` header with another scheme, or with two values.
#[tokio::test(start_paused = true)]
async fn keeps_or_replaces_all_authorizations() {
    let (api, _, layer) = revoked_once().await;
    for existing in [ExistingAuthorization::Keep, ExistingAuthorization::Replace] {
        let mut request = get();
        request.headers_mut().append(AUTHORIZATION, HeaderValue::from_static("Basic one"));
        request.headers_mut().append(AUTHORIZATION, HeaderValue::from_static("Basic two"));
        layer.clone().existing_authorization(existing).layer(api.service()).oneshot(request).await.unwrap();
        let seen = api.headers().pop().unwrap();
        let seen: Vec<_> = seen.get_all(AUTHORIZATION).iter().collect();
        match existing {
            ExistingAuthorization::Keep => assert_eq!(seen, ["Basic one", "Basic two"]),
            _ => assert_eq!(seen, ["Bearer access-2"]),
        }
    }
}

/// The token has expired, and the source fails: no request is sent with it.
#[tokio::test(start_paused = true)]
async fn never_sends_expired_token() {
    let minute = Duration::from_secs(60);
    let Scene { api, service, .. } = scene()
        .then(Act::Live(minute))
        .then(Act::Fail(SourceError::rejected("no")))
        .accept(["access-1", "access-3"])
        .build();
    service.clone().oneshot(get()).await.unwrap();
    tokio::time::advance(minute).await;
    assert!(matches!(ours(&service.clone().oneshot(get()).await.unwrap_err()), Error::Source(_)));
    tokio::time::advance(minute).await;
    assert_eq!(service.oneshot(get()).await.unwrap().status(), StatusCode::OK);
    assert_eq!(api.tokens(), ["access-1", "access-3"]);
}

/// A request is sent while the token is expiring: it does not wait.
#[tokio::test(start_paused = true)]
async fn expiring_token_refreshes_in_background() {
    let minute = Duration::from_secs(60);
    let Scene { api, source, service, .. } =
        scene().then(Act::Live(minute)).then(Act::Live(minute)).accept(["access-1", "access-2"]).build();
    service.clone().oneshot(get()).await.unwrap();
    tokio::time::advance(Duration::from_secs(55)).await;
    let start = tokio::time::Instant::now();
    service.clone().oneshot(get()).await.unwrap();
    assert_eq!(start.elapsed(), Duration::ZERO, "the request waited for the refresh");
    tokio::time::sleep(Duration::from_secs(2)).await;
    service.oneshot(get()).await.unwrap();
    assert_eq!(api.tokens(), ["access-1", "access-1", "access-2"]);
    assert_eq!(source.fetches(), 2);
}

/// A request has its own token, which the layer replaces by an option.
#[tokio::test(start_paused = true)]
async fn replaces_authorization_if_asked() {
    for has_token in [true, false] {
        let Scene { api, layer, .. } = scene()
            .accept(["access-2"])
            .layer(|layer| layer.existing_authorization(ExistingAuthorization::Replace))
            .build();
        if has_token {
            layer.provider().token().await.unwrap();
        }
        let mut request = get();
        request.headers_mut().insert(AUTHORIZATION, HeaderValue::from_static("Bearer mine"));
        let response = layer.layer(api.service()).oneshot(request).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(api.tokens(), ["access-1", "access-2"]);
    }
}

/// A retry differs from the request, or its header is not marked sensitive.
#[tokio::test(start_paused = true)]
async fn retry_repeats_request_exactly() {
    let (_, _, layer) = revoked_once().await;
    let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
    let service = tower::service_fn({
        let seen = Arc::clone(&seen);
        move |request: Request<Full<Bytes>>| {
            let seen = Arc::clone(&seen);
            async move {
                let is_accepted = request.headers()[AUTHORIZATION] == "Bearer access-2";
                let (head, body) = request.into_parts();
                let body = body.collect().await?.to_bytes();
                seen.lock().unwrap().push((head, body));
                let status = if is_accepted { StatusCode::OK } else { StatusCode::UNAUTHORIZED };
                Ok::<_, Infallible>(Response::builder().status(status).body(Empty::<Bytes>::new()).unwrap())
            }
        }
    });
    let mut request = Request::patch("https://api.example/videos/vi1?a=b%20c")
        .version(http::Version::HTTP_2)
        .header("x-repeated", "1")
        .header("x-latin", HeaderValue::from_bytes(b"caf\xe9").unwrap())
        .header("x-repeated", "2")
        .header("x-secret", "s")
        .extension(42_u8)
        .body(Full::<Bytes>::from("the body"))
        .unwrap();
    request.headers_mut().get_mut("x-secret").unwrap().set_sensitive(true);
    layer.layer(service).oneshot(request).await.unwrap();
    let seen = seen.lock().unwrap();
    assert_eq!(seen.len(), 2);
    for (attempt, (head, body)) in seen.iter().enumerate() {
        assert_eq!(head.method, "PATCH");
        assert_eq!(head.uri, "https://api.example/videos/vi1?a=b%20c");
        assert_eq!(head.version, http::Version::HTTP_2);
        assert_eq!(head.extensions.get::<u8>(), Some(&42));
        assert_eq!(head.headers.get_all("x-repeated").iter().collect::<Vec<_>>(), ["1", "2"]);
        assert_eq!(head.headers["x-latin"].as_bytes(), b"caf\xe9");
        assert!(head.headers["x-secret"].is_sensitive());
        assert!(head.headers[AUTHORIZATION].is_sensitive());
        assert_eq!(head.headers[AUTHORIZATION], format!("Bearer access-{}", attempt + 1));
        assert_eq!(head.headers.len(), 5);
        assert_eq!(body, "the body");
    }
}

/// A thousand requests are challenged at once: retries must not multiply the load.
#[tokio::test(start_paused = true)]
async fn retry_budget_bounds_load() {
    let Scene { api, service, .. } = scene().build();
    // The API challenges the first token, and then the second one.
    service.clone().oneshot(get()).await.unwrap();
    let before = api.requests();
    let mut requests = JoinSet::new();
    for _ in 0..1000 {
        requests.spawn(service.clone().oneshot(get()));
    }
    requests.join_all().await;
    let sent = api.requests() - before;
    // The budget allows 10 retries per second for 10 s, and a fifth of all challenges, those of retries included.
    assert!(sent <= 1000 + 375, "{sent}");
}

/// The inner service fails.
#[tokio::test(start_paused = true)]
async fn inner_error_is_not_retried() {
    let (_, source, layer) = revoked_once().await;
    let service = tower::service_fn(|_: Request<Empty<Bytes>>| async {
        Err::<Response<Empty<Bytes>>, _>(std::io::Error::other("the connection was reset"))
    });
    let error = layer.layer(service).oneshot(get()).await.unwrap_err();
    assert_eq!(error.downcast_ref::<std::io::Error>().unwrap().to_string(), "the connection was reset");
    assert_eq!(source.fetches(), 1);
}

/// A request has as many headers as its map can hold.
#[tokio::test(start_paused = true)]
async fn too_many_headers_is_typed_error() {
    let (api, _, layer) = revoked_once().await;
    let mut request = get();
    for name in 0.. {
        let name = http::HeaderName::try_from(format!("x-{name}")).unwrap();
        if request.headers_mut().try_insert(name, HeaderValue::from_static("")).is_err() {
            break;
        }
    }
    let error = layer.layer(api.service()).oneshot(request).await.unwrap_err();
    assert!(matches!(ours(&error), Error::TooManyHeaders));
}

/// The limit of `buffered` is zero.
#[tokio::test(start_paused = true)]
async fn zero_replay_limit_is_typed_error() {
    let (api, _, layer) = revoked_once().await;
    let mut service = layer.clone().buffered(0).layer(api.service());
    let error = service.ready().await.unwrap().call(get()).await.unwrap_err();
    assert!(matches!(ours(&error), Error::InvalidOption(_)));
    assert!(error.to_string().contains("turn the replay off"));
    // A later call replaces the limit.
    assert!(layer.buffered(0).buffered(1).layer(api.service()).oneshot(get()).await.is_ok());
}

/// 200 requests are challenged at once over real sockets: HTTP/1.1, HTTP/2, and TLS with the protocol that ALPN
/// selects.
#[tokio::test]
async fn two_hundred_401s_cost_one_refresh() {
    for (tls, http2) in [(false, false), (false, true), (true, false)] {
        let server = AuthServer::builder().tls(tls).start().await.unwrap();
        let mut source = source(&server);
        if let Some(certificate) = server.certificate() {
            source = source.with_client(TokenClient::with_service(support::https::<String>(certificate)));
        }
        let layer = scene_of(source).with_token().await.layer;
        server.revoke_access_tokens();
        let client = match (server.certificate(), http2) {
            (Some(certificate), _) => tower::util::BoxCloneService::new(support::https(certificate)),
            (None, true) => tower::util::BoxCloneService::new(support::http2()),
            (None, false) => tower::util::BoxCloneService::new(support::http1()),
        };
        let service = layer.layer(client);
        let mut requests = JoinSet::new();
        for _ in 0..200 {
            requests.spawn(service.clone().oneshot(get_videos(&server)));
        }
        for response in requests.join_all().await {
            assert_eq!(response.unwrap().status(), StatusCode::OK);
        }
        let counters = server.counters();
        assert_eq!((counters.api_key_grants, counters.refresh_grants), (1, 1));
        assert_eq!(counters.accepted, 200);
    }
}

/// A grant revokes all earlier tokens, or none. The request succeeds in both cases.
#[tokio::test]
async fn heals_if_grant_revokes_or_not() {
    for revoke in [false, true] {
        let server = AuthServer::builder().revoke_previous(revoke).start().await.unwrap();
        let service = scene_of(source(&server)).build().layer.layer(support::http1());
        let get = || get_videos(&server);
        assert_eq!(service.clone().oneshot(get()).await.unwrap().status(), StatusCode::OK);
        server.revoke_access_tokens();
        server.inject(Route::RefreshGrant, Fault::LoseAnswer);
        assert_eq!(service.clone().oneshot(get()).await.unwrap().status(), StatusCode::OK);
        assert_eq!(server.counters().api_key_grants, 2);
    }
}

/// An API with two endpoints: `/y` accepts valid tokens, and `/x` challenges every token.
#[derive(Clone)]
struct TwoEndpoints {
    source: Arc<Source>,
    /// The newest revoked token. All tokens before it are revoked too.
    revoked: Arc<AtomicU64>,
    /// Whether a grant revokes all earlier tokens as soon as the endpoint gets its request.
    grant_revokes: bool,
}

impl TwoEndpoints {
    fn new(grant_revokes: bool) -> (Self, BearerAuthLayer) {
        let Scene { source, layer, .. } = scene().build();
        (Self { source, revoked: Arc::default(), grant_revokes }, layer)
    }

    fn revoke(&self) {
        self.revoked.store(self.source.fetches(), Ordering::SeqCst);
    }

    fn status(&self, request: &Request<Empty<Bytes>>) -> StatusCode {
        let token = request.headers()[AUTHORIZATION].to_str().unwrap().rsplit('-').next().unwrap();
        let token: u64 = token.parse().unwrap();
        let is_revoked = token <= self.revoked.load(Ordering::SeqCst)
            || (self.grant_revokes && token < self.source.fetches());
        match request.uri().path() {
            "/y" if !is_revoked => StatusCode::OK,
            _ => StatusCode::UNAUTHORIZED,
        }
    }

    /// Responds after 20 ms.
    fn service(
        &self,
    ) -> impl Service<
        Request<Empty<Bytes>>,
        Response = Response<Empty<Bytes>>,
        Error = Infallible,
        Future: Future<Output = Result<Response<Empty<Bytes>>, Infallible>> + Send,
    > + Clone
    + Send
    + 'static {
        let api = self.clone();
        tower::service_fn(move |request: Request<Empty<Bytes>>| {
            let api = api.clone();
            async move {
                tokio::time::sleep(Duration::from_millis(20)).await;
                let mut response = Response::new(Empty::new());
                *response.status_mut() = api.status(&request);
                Ok(response)
            }
        })
    }
}

fn get_path(path: &str) -> Request<Empty<Bytes>> {
    Request::get(format!("https://api.example{path}")).body(Empty::new()).unwrap()
}

/// The token is revoked five times in a row, with successful requests in between.
#[tokio::test(start_paused = true)]
async fn five_revocations_in_a_row_all_heal() {
    for grant_revokes in [false, true] {
        let (api, layer) = TwoEndpoints::new(grant_revokes);
        let service = layer.layer(api.service());
        for revocations in 0..=5 {
            let mut requests = JoinSet::new();
            for _ in 0..300 {
                requests.spawn(service.clone().oneshot(get_path("/y")));
            }
            for response in requests.join_all().await {
                assert_eq!(response.unwrap().status(), StatusCode::OK, "after {revocations} revocations");
            }
            assert_eq!(api.source.fetches(), 1 + revocations);
            api.revoke();
        }
    }
}

/// The token is revoked five times in a row, over real sockets.
#[tokio::test]
async fn revocations_in_a_row_heal_over_sockets() {
    for revoke_previous in [false, true] {
        let server = AuthServer::builder().revoke_previous(revoke_previous).start().await.unwrap();
        let service = scene_of(source(&server)).build().layer.layer(support::http1());
        for _ in 0..=5 {
            let mut requests = JoinSet::new();
            for _ in 0..100 {
                requests.spawn(service.clone().oneshot(get_videos(&server)));
            }
            for response in requests.join_all().await {
                assert_eq!(response.unwrap().status(), StatusCode::OK);
            }
            server.revoke_access_tokens();
        }
        let counters = server.counters();
        assert_eq!((counters.api_key_grants, counters.refresh_grants), (1, 5));
    }
}

/// The token is revoked five times, 50 ms apart, while a request takes 10 ms, and a refresh 20 ms.
#[tokio::test(start_paused = true)]
async fn revocations_50_ms_apart_surface_no_401() {
    let millis = Duration::from_millis;
    let api = Api::default();
    let fetches = Arc::new(AtomicU64::new(0));
    let source = source_fn({
        let (api, fetches) = (api.clone(), Arc::clone(&fetches));
        move |_| {
            let (api, number) = (api.clone(), fetches.fetch_add(1, Ordering::SeqCst));
            async move {
                tokio::time::sleep(millis(20)).await;
                let access_token = format!("access-{number}");
                api.accept(&access_token);
                Ok(Token::builder(access_token).build()?)
            }
        }
    });
    let inner = api.service();
    let inner = tower::service_fn(move |request| {
        let inner = inner.clone();
        async move {
            tokio::time::sleep(millis(5)).await;
            let response = inner.oneshot(request).await;
            tokio::time::sleep(millis(5)).await;
            response
        }
    });
    let service = scene_of(source).build().layer.layer(inner);
    let start = tokio::time::Instant::now();
    let mut callers = JoinSet::new();
    for caller in 0..20 {
        let service = service.clone();
        callers.spawn(async move {
            tokio::time::sleep(millis(caller)).await;
            while start.elapsed() < millis(1000) {
                assert_eq!(service.clone().oneshot(get()).await.unwrap().status(), StatusCode::OK);
            }
        });
    }
    tokio::time::sleep(millis(200)).await;
    for _ in 0..5 {
        api.revoke_all();
        tokio::time::sleep(millis(50)).await;
    }
    callers.join_all().await;
    assert_eq!(fetches.load(Ordering::SeqCst), 1 + 5);
}

/// The token is revoked again after the request that started the refresh was slow, or was dropped.
///
/// If it is slow, the success of a joined request also shows that the token was revoked. If it was dropped, a
/// revocation cannot be distinguished from an endpoint that challenges every token, so the pause is longer.
#[tokio::test(start_paused = true)]
async fn heals_after_refresh_starter_is_gone() {
    for (is_dropped, pause) in [(false, 1), (true, 5)] {
        let (api, layer) = TwoEndpoints::new(false);
        let service = layer.layer(api.service());
        service.clone().oneshot(get_path("/y")).await.unwrap();
        api.revoke();
        // The retry of this service takes a minute.
        let slow = api.service();
        let slow = layer.layer(tower::service_fn(move |request: Request<Empty<Bytes>>| {
            let is_retry = request.headers()[AUTHORIZATION] == "Bearer access-2";
            let slow = slow.clone();
            async move {
                tokio::time::sleep(Duration::from_secs(if is_retry { 60 } else { 0 })).await;
                slow.oneshot(request).await
            }
        }));
        let starter = tokio::spawn(slow.oneshot(get_path("/y")));
        tokio::time::sleep(Duration::from_millis(100)).await;
        if is_dropped {
            starter.abort();
        }
        for revocations in 1..=3 {
            let response = service.clone().oneshot(get_path("/y")).await.unwrap();
            assert_eq!(response.status(), StatusCode::OK);
            assert_eq!(api.source.fetches(), 1 + revocations);
            if revocations == 1 {
                tokio::time::sleep(Duration::from_secs(pause)).await;
            }
            api.revoke();
        }
    }
}

/// One endpoint challenges every token, the others work.
#[tokio::test(start_paused = true)]
async fn failing_endpoint_spares_others() {
    let second = Duration::from_secs(1);
    for grant_revokes in [false, true] {
        for (is_retried, burst) in [(true, 1), (true, 30), (false, 1), (false, 30)] {
            let case = format!(
                "a grant revokes: {grant_revokes}, retried: {is_retried}, {burst} concurrent requests"
            );
            let (api, layer) = TwoEndpoints::new(grant_revokes);
            let x = layer.clone().retry(RetryPolicy::new().max_retries(if is_retried { 2 } else { 0 }));
            let (x, y) = (x.layer(api.service()), layer.layer(api.service()));
            y.clone().oneshot(get_path("/y")).await.unwrap();

            let start = tokio::time::Instant::now();
            let polling = tokio::spawn(async move {
                loop {
                    for _ in 0..burst {
                        tokio::spawn(x.clone().oneshot(get_path("/x")));
                    }
                    tokio::time::sleep(second).await;
                }
            });
            let mut challenged_since = None;
            let mut fetches = Vec::new();
            let mut revocations = 0;
            while start.elapsed() < 300 * second {
                let sent = tokio::time::Instant::now();
                let status = y.clone().oneshot(get_path("/y")).await.unwrap().status();
                match (status, challenged_since) {
                    (StatusCode::OK, _) => challenged_since = None,
                    (_, None) => challenged_since = Some(sent),
                    (_, Some(since)) => {
                        assert!(sent - since <= 5 * second, "{case}: {:?}", sent - since);
                    }
                }
                if fetches.last().is_none_or(|(count, _)| *count < api.source.fetches()) {
                    fetches.push((api.source.fetches(), sent));
                }
                // Once a minute, an accepted token is revoked.
                let is_due = revocations < 4 && start.elapsed() > 60 * second * (revocations + 1);
                if is_due && status == StatusCode::OK && !layer.provider().status().refreshing {
                    revocations += 1;
                    api.revoke();
                }
                tokio::time::sleep(second / 10).await;
            }
            polling.abort();
            assert_eq!(revocations, 4);
            // The first token, ten refreshes at once, and one per five seconds.
            assert!(api.source.fetches() <= 1 + 10 + 300 / 5, "{case}: {}", api.source.fetches());
            // Once the first ten are used, one every five seconds: the last half of the time shows it.
            let late = fetches.iter().filter(|(_, at)| *at - start > 150 * second).count();
            assert!(late <= 150 / 5 + 1, "{case}: {fetches:?}");
        }
    }
}

/// The API accepts no new token, though it has accepted an old one: the cool-down doubles with each refresh.
#[tokio::test(start_paused = true)]
async fn cool_down_doubles_despite_old_success() {
    let (api, layer) = TwoEndpoints::new(false);
    let service = layer.layer(api.service());
    assert_eq!(service.clone().oneshot(get_path("/y")).await.unwrap().status(), StatusCode::OK);
    let start = tokio::time::Instant::now();
    while start.elapsed() < Duration::from_secs(3600) {
        let response = service.clone().oneshot(get_path("/x")).await.unwrap();
        assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!((50..=68).contains(&api.source.fetches()), "{}", api.source.fetches());
}

/// The token is replaced while a retry waits.
#[tokio::test(start_paused = true)]
async fn retry_sends_current_token() {
    let Scene { api, provider, layer, .. } = scene().accept(["access-3"]).with_token().await;
    let limited = tower::limit::ConcurrencyLimit::new(api.service(), 1);
    let request = tokio::spawn(layer.layer(limited.clone()).oneshot(get()));
    while api.requests() == 0 {
        tokio::task::yield_now().await;
    }
    // The only permit is taken before the retry gets it, and held until another token is published.
    let mut held = limited;
    held.ready().await.unwrap();
    tokio::time::sleep(Duration::from_secs(3)).await;
    let second = provider.current().unwrap();
    assert_eq!(second.generation(), 2);
    provider.refresh(&second).await.unwrap();
    drop(held);
    assert_eq!(request.await.unwrap().unwrap().status(), StatusCode::OK);
    assert_eq!(api.tokens(), ["access-1", "access-3"]);
}

/// A token expires while its request waits for the service.
#[tokio::test(start_paused = true)]
async fn token_expired_before_ready_is_not_sent() {
    let second = Duration::from_secs(1);
    let Scene { api, layer, .. } = scene().living(10 * second).accept(["access-1", "access-2"]).build();
    let limited = tower::limit::ConcurrencyLimit::new(api.service(), 1);
    let mut service = layer.layer(limited.clone());
    let request = service.ready().await.unwrap().call(get());
    let mut held = limited;
    // The request waits for its token and has released the only permit.
    tokio::time::timeout(second, held.ready()).await.expect("the permit is held").unwrap();
    let request = tokio::spawn(request);
    tokio::time::sleep(20 * second).await;
    drop(held);
    assert_eq!(request.await.unwrap().unwrap().status(), StatusCode::OK);
    assert_eq!(api.tokens(), ["access-2"]);
}

/// The source and the layer share one client, which allows four concurrent requests.
#[tokio::test(start_paused = true)]
async fn waiting_for_token_holds_no_permit() {
    let client = tower::service_fn(|request: Request<String>| async move {
        tokio::time::sleep(Duration::from_millis(10)).await;
        let is_grant = request.uri().path() == "/auth/api-key";
        let body = if is_grant { r#"{"access_token": "abc", "expires_in": 3600}"# } else { "ok" };
        Ok::<_, Infallible>(Response::new(Full::<Bytes>::from(body)))
    });
    let client = tower::limit::ConcurrencyLimit::new(client, 4);
    let source = ApiVideo::new("key").with_client(TokenClient::with_service(client.clone()));
    let service = scene_of(source).build().layer.layer(client);
    let mut requests = JoinSet::new();
    for _ in 0..4 {
        let request = Request::get("https://ws.api.video/videos").body(String::new()).unwrap();
        requests.spawn(service.clone().oneshot(request));
    }
    for response in requests.join_all().await {
        assert_eq!(response.unwrap().status(), StatusCode::OK);
    }
}

/// The callers of an endpoint that challenges every token drop their requests before the refresh that they started
/// finishes.
#[tokio::test(start_paused = true)]
async fn dropped_starter_is_no_evidence() {
    let millis = Duration::from_millis;
    for period in [700, 1050, 1100, 1300] {
        let (api, layer) = TwoEndpoints::new(true);
        let service = layer.layer(api.service());
        service.clone().oneshot(get_path("/y")).await.unwrap();
        let x = service.clone();
        let polling = tokio::spawn(async move {
            loop {
                tokio::spawn(tokio::time::timeout(millis(500), x.clone().oneshot(get_path("/x"))));
                tokio::time::sleep(millis(period)).await;
            }
        });
        let start = tokio::time::Instant::now();
        while start.elapsed() < Duration::from_secs(300) {
            let response = service.clone().oneshot(get_path("/y")).await.unwrap();
            assert_eq!(response.status(), StatusCode::OK);
            tokio::time::sleep(millis(100)).await;
        }
        polling.abort();
        assert!(api.source.fetches() <= 1 + 10 + 300 / 5, "{}", api.source.fetches());
    }
}
