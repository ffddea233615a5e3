//! What happens on a 401, and what does not.

mod support;

use std::{convert::Infallible, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, header::AUTHORIZATION};
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use support::{Act, Api, REFUSED, Source, get, ours};
use tokio::task::JoinSet;
use tower::{Layer, Service, ServiceExt};
use tower_bearer::{
    ApiVideo, BearerAuthLayer, BoxError, Error, Existing, RetryPolicy, SourceError, TokenProvider, challenge,
    testing::{AuthServer, Fault, Route},
};

/// An API that accepts only the second token, and a layer whose provider has the first.
async fn revoked_once() -> (Api, Arc<Source>, BearerAuthLayer) {
    let (api, source) = (Api::default(), Source::new());
    api.accept("access-2");
    let layer = BearerAuthLayer::with_provider(TokenProvider::new(Arc::clone(&source)));
    layer.provider().token().await.unwrap();
    (api, source, layer)
}

#[tokio::test(start_paused = true)]
async fn a_refused_request_is_sent_again_with_a_new_token() {
    let (api, source, layer) = revoked_once().await;
    let response = layer.layer(api.service()).oneshot(get()).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(api.tokens(), ["access-1", "access-2"]);
    assert_eq!(source.fetches(), 2);
}

#[tokio::test(start_paused = true)]
async fn the_first_request_obtains_the_token_it_needs() {
    let (api, source) = (Api::default(), Source::new());
    api.accept("access-1");
    let layer = BearerAuthLayer::with_provider(TokenProvider::new(Arc::clone(&source)));
    let response = layer.layer(api.service()).oneshot(get()).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(api.tokens(), ["access-1"]);
}

#[tokio::test(start_paused = true)]
async fn the_first_retry_with_a_new_token_waits_for_nothing_but_the_token() {
    let (api, _, layer) = revoked_once().await;
    let begun = tokio::time::Instant::now();
    layer.layer(api.service()).oneshot(get()).await.unwrap();
    assert_eq!(begun.elapsed(), Duration::from_secs(1), "more than the source's own second");
}

/// Row 33.
#[tokio::test(start_paused = true)]
async fn a_request_is_never_sent_without_a_token() {
    let source = Source::new().then(Act::Fail(SourceError::refused("the key was refused")));
    let api = Api::default();
    let layer = BearerAuthLayer::with_provider(TokenProvider::new(source));
    let error = layer.layer(api.service()).oneshot(get()).await.unwrap_err();
    assert!(matches!(ours(&error), Error::Source(_)));
    assert!(support::chain(&*error).contains("the key was refused"));
    assert_eq!(api.requests(), 0);
}

/// Row 35.
#[tokio::test(start_paused = true)]
async fn an_api_that_refuses_for_ever_costs_one_flight_per_cool_down_and_its_last_401_is_the_answer() {
    let (api, source) = (Api::default(), Source::new());
    let layer = BearerAuthLayer::with_provider(TokenProvider::new(Arc::clone(&source)));
    let mut requests = JoinSet::new();
    for _ in 0..200 {
        requests.spawn(layer.layer(api.service()).oneshot(get()));
    }
    for response in requests.join_all().await {
        let response = response.unwrap();
        assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
        assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), REFUSED);
    }
    // The first token, one more for the first challenge. Each request is sent again with that; beyond it the budget
    // allows 10 a second for 10 s, and a fifth of 400 challenges.
    assert_eq!(source.fetches(), 2);
    assert!((400..=400 + 100 + 80).contains(&api.requests()), "{}", api.requests());

    // For a minute more, a request a second: the cool-down doubles from one flight to the next.
    for _ in 0..60 {
        layer.layer(api.service()).oneshot(get()).await.unwrap();
        tokio::time::advance(Duration::from_secs(1)).await;
    }
    assert!(source.fetches() <= 2 + 7, "{}", source.fetches());
}

/// Row 35.
#[tokio::test(start_paused = true)]
async fn a_request_is_sent_at_most_once_more_than_its_retries() {
    for max_retries in 0..=4 {
        let (api, source) = (Api::default(), Source::new());
        let policy = RetryPolicy::new().max_retries(max_retries);
        let layer = BearerAuthLayer::with_provider(TokenProvider::new(source)).retry(policy);
        let response = layer.layer(api.service()).oneshot(get()).await.unwrap();
        assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
        assert_eq!(api.requests() as u32, 1 + max_retries);
    }
}

/// Row 7.
#[tokio::test(start_paused = true)]
async fn an_api_that_lags_behind_a_new_token_is_asked_once_more_after_a_backoff() {
    let (api, source) = (Api::default(), Source::new());
    let layer = BearerAuthLayer::with_provider(TokenProvider::new(Arc::clone(&source)));
    layer.provider().token().await.unwrap();
    let begun = tokio::time::Instant::now();
    let request = tokio::spawn(layer.layer(api.service()).oneshot(get()));
    // The flight's second, then a moment before the backoff of 100 ms is over.
    tokio::time::sleep(Duration::from_millis(1050)).await;
    assert_eq!(api.tokens(), ["access-1", "access-2"]);
    api.accept("access-2");
    assert_eq!(request.await.unwrap().unwrap().status(), StatusCode::OK);
    assert!(begun.elapsed() >= Duration::from_millis(1100));
    assert_eq!((api.requests(), source.fetches()), (3, 2));
}

/// Row 36.
#[tokio::test(start_paused = true)]
async fn a_401_to_a_request_that_cannot_be_sent_again_reaches_the_caller_and_the_refresh_runs_behind() {
    let (api, source, layer) = revoked_once().await;
    let service = layer.no_replay().layer(api.service());
    let begun = tokio::time::Instant::now();
    let response = service.clone().oneshot(get()).await.unwrap();
    assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), REFUSED);
    assert_eq!(begun.elapsed(), Duration::ZERO, "it waited for the refresh");
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(service.oneshot(get()).await.unwrap().status(), StatusCode::OK);
    assert_eq!((api.requests(), source.fetches()), (2, 2));
}

/// Row 32.
#[tokio::test(start_paused = true)]
async fn a_refresh_that_fails_leaves_the_401_as_the_answer() {
    let source = Source::new().then(Act::Live(Duration::from_secs(60)));
    let source = source.then(Act::Fail(SourceError::refused("no")));
    let api = Api::default();
    let layer = BearerAuthLayer::with_provider(TokenProvider::new(source));
    let service = layer.layer(api.service());
    let response = service.clone().oneshot(get()).await.unwrap();
    assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), REFUSED);
    // The token may still work, for the next request.
    api.accept("access-1");
    assert_eq!(service.oneshot(get()).await.unwrap().status(), StatusCode::OK);
}

/// Row 37.
#[tokio::test]
async fn a_small_401_leaves_its_connection_to_the_retry() {
    let server = AuthServer::start().await.unwrap();
    let client = support::http1();
    let source =
        ApiVideo::new(server.api_key()).base_url(server.uri()).with_client(support::http1::<String>());
    let layer = BearerAuthLayer::with_provider(TokenProvider::new(source));
    let service = layer.layer(client);
    for _ in 0..2 {
        let request = Request::get(format!("{}videos", server.uri())).body(Empty::<Bytes>::new()).unwrap();
        let response = service.clone().oneshot(request).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        response.into_body().collect().await.unwrap();
        server.revoke_access_tokens();
    }
    let counters = server.counters();
    assert_eq!((counters.challenged, counters.refresh_grants), (1, 1));
    // One to the auth endpoints, one to the API.
    assert_eq!(counters.connections, 2);
}

/// Row 37.
#[tokio::test(start_paused = true)]
async fn an_endless_401_is_drained_up_to_its_bounds_and_dropped() {
    // How the endless body comes: at once, in empty frames, or never.
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
        let begun = tokio::time::Instant::now();
        let response = layer.layer(service).oneshot(get()).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(begun.elapsed(), Duration::from_secs(1) + wait);
    }
}

/// The same frame for ever; or nothing, for ever.
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

/// Row 38.
#[tokio::test(start_paused = true)]
async fn what_another_token_would_not_help_is_an_answer() {
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
            response.body(Full::<Bytes>::from("as it was")).map_err(BoxError::from)
        });
        let response = layer.layer(service).oneshot(get()).await.unwrap();
        assert_eq!(response.status(), status);
        assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "as it was");
        tokio::time::sleep(Duration::from_secs(10)).await;
        assert_eq!(source.fetches(), 1, "{status}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_predicate_of_ones_own_says_what_is_a_challenge() {
    let (_, source, layer) = revoked_once().await;
    let service = tower::service_fn(|request: Request<Empty<Bytes>>| async move {
        let good = request.headers()[AUTHORIZATION] == "Bearer access-2";
        let response = Response::builder().header("grpc-status", if good { "0" } else { "16" });
        response.body(Full::<Bytes>::default()).map_err(BoxError::from)
    });
    let response = layer.challenge(challenge::grpc).layer(service).oneshot(get()).await.unwrap();
    assert_eq!(response.headers()["grpc-status"], "0");
    assert_eq!(source.fetches(), 2);
}

/// Row 39.
#[tokio::test(start_paused = true)]
async fn a_callers_own_authorization_is_left_alone_and_its_401_triggers_nothing() {
    for has_token in [true, false] {
        let (api, source) = (Api::default(), Source::new());
        let layer = BearerAuthLayer::with_provider(TokenProvider::new(Arc::clone(&source)));
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

/// Row 39: whatever it is, and however often.
#[tokio::test(start_paused = true)]
async fn a_callers_own_authorizations_stay_as_many_and_in_their_order() {
    let (api, _, layer) = revoked_once().await;
    for existing in [Existing::Keep, Existing::Replace] {
        let mut request = get();
        request.headers_mut().append(AUTHORIZATION, HeaderValue::from_static("Basic one"));
        request.headers_mut().append(AUTHORIZATION, HeaderValue::from_static("Basic two"));
        layer.clone().existing_authorization(existing).layer(api.service()).oneshot(request).await.unwrap();
        let seen = api.headers().pop().unwrap();
        let seen: Vec<_> = seen.get_all(AUTHORIZATION).iter().collect();
        match existing {
            Existing::Keep => assert_eq!(seen, ["Basic one", "Basic two"]),
            Existing::Replace => assert_eq!(seen, ["Bearer access-2"]),
        }
    }
}

/// Row 33.
#[tokio::test(start_paused = true)]
async fn a_request_is_never_sent_with_an_expired_token() {
    let minute = Duration::from_secs(60);
    let source = Source::new().then(Act::Live(minute)).then(Act::Fail(SourceError::refused("no")));
    let api = Api::default();
    ["access-1", "access-3"].iter().for_each(|token| api.accept(token));
    let service = BearerAuthLayer::with_provider(TokenProvider::new(source)).layer(api.service());
    service.clone().oneshot(get()).await.unwrap();
    tokio::time::advance(minute).await;
    assert!(matches!(ours(&service.clone().oneshot(get()).await.unwrap_err()), Error::Source(_)));
    tokio::time::advance(minute).await;
    assert_eq!(service.oneshot(get()).await.unwrap().status(), StatusCode::OK);
    assert_eq!(api.tokens(), ["access-1", "access-3"]);
}

/// Row 2, through the layer.
#[tokio::test(start_paused = true)]
async fn an_ageing_token_is_used_and_renewed_behind_the_requests_back() {
    let minute = Duration::from_secs(60);
    let source = Source::new().then(Act::Live(minute)).then(Act::Live(minute));
    let api = Api::default();
    ["access-1", "access-2"].iter().for_each(|token| api.accept(token));
    let service =
        BearerAuthLayer::with_provider(TokenProvider::new(Arc::clone(&source))).layer(api.service());
    service.clone().oneshot(get()).await.unwrap();
    tokio::time::advance(Duration::from_secs(55)).await;
    let begun = tokio::time::Instant::now();
    service.clone().oneshot(get()).await.unwrap();
    assert_eq!(begun.elapsed(), Duration::ZERO, "it waited for the refresh");
    tokio::time::sleep(Duration::from_secs(2)).await;
    service.oneshot(get()).await.unwrap();
    assert_eq!(api.tokens(), ["access-1", "access-1", "access-2"]);
    assert_eq!(source.fetches(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_callers_own_authorization_is_replaced_on_request() {
    for has_token in [true, false] {
        let (api, source) = (Api::default(), Source::new());
        api.accept("access-2");
        let layer = BearerAuthLayer::with_provider(TokenProvider::new(source))
            .existing_authorization(Existing::Replace);
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

/// Rows 40 and 47.
#[tokio::test(start_paused = true)]
async fn a_retry_is_the_request_as_it_was() {
    let (_, _, layer) = revoked_once().await;
    let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
    let service = tower::service_fn({
        let seen = Arc::clone(&seen);
        move |request: Request<Full<Bytes>>| {
            let seen = Arc::clone(&seen);
            async move {
                let good = request.headers()[AUTHORIZATION] == "Bearer access-2";
                let (head, body) = request.into_parts();
                let body = body.collect().await?.to_bytes();
                seen.lock().unwrap().push((head, body));
                let status = if good { StatusCode::OK } else { StatusCode::UNAUTHORIZED };
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

/// Row 43.
#[tokio::test(start_paused = true)]
async fn a_storm_of_refusals_does_not_double_the_load() {
    let (api, source) = (Api::default(), Source::new());
    let layer = BearerAuthLayer::with_provider(TokenProvider::new(source));
    let service = layer.layer(api.service());
    // The new token that the first refusal fetches is refused as well.
    service.clone().oneshot(get()).await.unwrap();
    let before = api.requests();
    let mut requests = JoinSet::new();
    for _ in 0..1000 {
        requests.spawn(service.clone().oneshot(get()));
    }
    requests.join_all().await;
    let sent = api.requests() - before;
    // Retries: the reserve of 10 a second for 10 s, and a fifth of all that was challenged, the retries among them.
    assert!(sent <= 1000 + 375, "{sent}");
}

#[tokio::test(start_paused = true)]
async fn an_inner_error_is_the_callers_and_nothing_is_sent_again() {
    let (_, source, layer) = revoked_once().await;
    let service = tower::service_fn(|_: Request<Empty<Bytes>>| async {
        Err::<Response<Empty<Bytes>>, _>(std::io::Error::other("the cable is cut"))
    });
    let error = layer.layer(service).oneshot(get()).await.unwrap_err();
    assert_eq!(error.downcast_ref::<std::io::Error>().unwrap().to_string(), "the cable is cut");
    assert_eq!(source.fetches(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_request_without_room_for_a_header_is_a_typed_error() {
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

#[tokio::test(start_paused = true)]
async fn a_replay_limit_of_zero_is_a_typed_error() {
    let (api, _, layer) = revoked_once().await;
    let mut service = layer.clone().buffered(0).layer(api.service());
    let error = service.ready().await.unwrap().call(get()).await.unwrap_err();
    assert!(matches!(ours(&error), Error::InvalidOption(_)));
    assert!(error.to_string().contains("no_replay()"));
    // A choice made afterwards is another choice.
    assert!(layer.buffered(0).buffered(1).layer(api.service()).oneshot(get()).await.is_ok());
}

/// Over real sockets: HTTP/1.1, HTTP/2, and TLS with what ALPN chooses.
#[tokio::test]
async fn two_hundred_concurrent_requests_heal_a_revoked_token_with_one_refresh() {
    for (tls, http2) in [(false, false), (false, true), (true, false)] {
        let server = AuthServer::builder().tls(tls).start().await.unwrap();
        let source = ApiVideo::new(server.api_key()).base_url(server.uri());
        let provider = match server.certificate() {
            Some(certificate) => {
                TokenProvider::new(source.with_client(support::https::<String>(certificate)))
            }
            None => TokenProvider::new(source),
        };
        provider.token().await.unwrap();
        server.revoke_access_tokens();
        let layer = BearerAuthLayer::with_provider(provider);
        let client = match (server.certificate(), http2) {
            (Some(certificate), _) => tower::util::BoxCloneService::new(support::https(certificate)),
            (None, true) => tower::util::BoxCloneService::new(support::http2()),
            (None, false) => tower::util::BoxCloneService::new(support::http1()),
        };
        let service = layer.layer(client);
        let mut requests = JoinSet::new();
        for _ in 0..200 {
            let request =
                Request::get(format!("{}videos", server.uri())).body(Empty::<Bytes>::new()).unwrap();
            requests.spawn(service.clone().oneshot(request));
        }
        for response in requests.join_all().await {
            assert_eq!(response.unwrap().status(), StatusCode::OK);
        }
        let counters = server.counters();
        assert_eq!((counters.api_key_grants, counters.refresh_grants), (1, 1));
        assert_eq!(counters.accepted, 200);
    }
}

/// Every token that the server gave before is revoked by a grant, or none is: both heal.
#[tokio::test]
async fn it_does_not_matter_whether_a_grant_revokes_the_tokens_before_it() {
    for revoke in [false, true] {
        let server = AuthServer::builder().revoke_previous(revoke).start().await.unwrap();
        let source = ApiVideo::new(server.api_key()).base_url(server.uri());
        let service = BearerAuthLayer::with_provider(TokenProvider::new(source)).layer(support::http1());
        let get = || Request::get(format!("{}videos", server.uri())).body(Empty::<Bytes>::new()).unwrap();
        assert_eq!(service.clone().oneshot(get()).await.unwrap().status(), StatusCode::OK);
        server.revoke_access_tokens();
        server.inject(Route::RefreshGrant, Fault::LoseAnswer);
        assert_eq!(service.clone().oneshot(get()).await.unwrap().status(), StatusCode::OK);
        assert_eq!(server.counters().api_key_grants, 2);
    }
}
