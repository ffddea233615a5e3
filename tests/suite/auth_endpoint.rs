//! Faults of the auth endpoint, over real sockets: each ends in a token or in a typed error with the reason.

#![cfg(feature = "default-client")]

use std::{
    convert::Infallible,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, StreamBody};
use tower::{Layer, ServiceExt};
use tower_bearer::{
    ApiVideo, BearerAuthLayer, Error, RetryPolicy, SourceErrorKind, Token, TokenClient, TokenProvider,
};
use tower_bearer_testing::{AuthServer, Counters, Fault, Route};

use crate::support::{self, chain};

/// A provider with a short backoff. Its source has a short timeout, so that a test waits only for the fault.
fn impatient(source: ApiVideo) -> TokenProvider {
    let retry = RetryPolicy::new().backoff(Duration::from_millis(1), Duration::from_millis(2));
    TokenProvider::builder(source).retry(retry).build().unwrap()
}

fn source(server: &AuthServer) -> ApiVideo {
    let client = TokenClient::new().timeout(Duration::from_millis(500));
    ApiVideo::new(server.api_key()).base_url(server.uri()).with_client(client)
}

async fn started() -> (AuthServer, TokenProvider) {
    let server = AuthServer::start().await.unwrap();
    let provider = impatient(source(&server));
    (server, provider)
}

/// A server, a provider, and the provider's first token.
async fn authenticated() -> (AuthServer, TokenProvider, Token) {
    let (server, provider) = started().await;
    let token = provider.token().await.unwrap();
    (server, provider, token)
}

/// API key grants, refresh grants, rejected keys, rejected refresh tokens.
fn grants(counters: Counters) -> [u64; 4] {
    [
        counters.api_key_grants,
        counters.refresh_grants,
        counters.rejected_api_keys,
        counters.rejected_refresh_tokens,
    ]
}

fn kind(error: &Error) -> SourceErrorKind {
    match error {
        Error::Source(error) => error.kind(),
        other => panic!("not the source's: {other:?}"),
    }
}

fn answer(status: u16, headers: &[(&str, &str)], body: impl Into<Bytes>) -> Fault {
    let builder = Response::builder().status(status);
    let builder = headers.iter().fold(builder, |builder, (name, value)| builder.header(*name, *value));
    Fault::Answer(builder.body(body.into()).unwrap())
}

/// The API key is sent although there is a refresh token.
#[tokio::test]
async fn renews_with_refresh_token_not_key() {
    let server = AuthServer::start().await.unwrap();
    let instant = Duration::from_nanos(1);
    let provider = TokenProvider::builder(source(&server)).cool_down(instant, instant).build().unwrap();
    let mut token = provider.token().await.unwrap();
    for generation in 2..=4 {
        token = provider.refresh(&token).await.unwrap();
        assert_eq!(token.generation(), generation);
    }
    assert_eq!(grants(server.counters()), [1, 3, 0, 0]);
    // The default client negotiates HTTP/2 in the TLS handshake, which is missing here.
    assert_eq!(server.counters().http2_requests, 0);
}

/// The auth endpoint responds with 5xx, 408 or 429.
#[tokio::test]
async fn a_transient_status_is_tried_again() {
    for status in [500, 502, 503, 504, 408, 429] {
        let (server, provider) = started().await;
        let fault = || answer(status, &[("retry-after", "0")], "");
        (0..2).for_each(|_| server.inject(Route::ApiKeyGrant, fault()));
        provider.token().await.unwrap();

        (0..3).for_each(|_| server.inject(Route::ApiKeyGrant, fault()));
        let error = impatient(source(&server)).token().await.unwrap_err();
        assert_eq!(kind(&error), SourceErrorKind::Unavailable);
        assert!(chain(&error).contains(&status.to_string()), "{}", chain(&error));
    }
}

/// The auth endpoint asks for a delay that is longer than a refresh may take.
#[tokio::test]
async fn too_long_retry_after_fails_at_once() {
    let server = AuthServer::builder().rate_limit(0).start().await.unwrap();
    let limit = Duration::from_secs(5);
    let provider = TokenProvider::builder(source(&server)).refresh_timeout(limit).build().unwrap();
    let error = provider.token().await.unwrap_err();
    let Error::Source(error) = error else { panic!("{error:?}") };
    // `X-RateLimit-Retry-After`, up to a minute: more than the refresh has.
    assert!(error.retry_after().is_some_and(|delay| delay > limit), "{error:?}");
    assert_eq!(server.counters().rate_limited, 1);
}

/// The auth endpoint hangs, or sends its response very slowly.
#[tokio::test]
async fn deadline_ends_hanging_exchange() {
    for fault in [Fault::Hang, Fault::Drip(Duration::from_millis(100))] {
        let (server, provider) = started().await;
        (0..3).for_each(|_| server.inject(Route::ApiKeyGrant, fault.clone()));
        let error = provider.token().await.unwrap_err();
        assert_eq!(kind(&error), SourceErrorKind::Unavailable);
        assert!(chain(&error).contains("within 500ms"), "{}", chain(&error));
        provider.token().await.unwrap();
    }
}

/// The connection is reset after the refresh token was sent: it is presented once more, then the key.
#[tokio::test]
async fn lost_refresh_retries_once_then_key() {
    // Reset before the request was processed: the second attempt succeeds.
    let (server, provider, token) = authenticated().await;
    server.inject(Route::RefreshGrant, Fault::Reset);
    provider.refresh(&token).await.unwrap();
    assert_eq!(grants(server.counters()), [1, 1, 0, 0]);

    // Processed, and the response lost: the second attempt is rejected, and the key is used.
    let (server, provider, token) = authenticated().await;
    server.inject(Route::RefreshGrant, Fault::LoseAnswer);
    provider.refresh(&token).await.unwrap();
    assert_eq!(grants(server.counters()), [2, 1, 0, 1]);

    // Every response is lost: there is no third attempt.
    let (server, provider, token) = authenticated().await;
    server.inject_always(Route::RefreshGrant, Fault::Reset);
    provider.refresh(&token).await.unwrap();
    assert_eq!(grants(server.counters()), [2, 0, 0, 0]);
    assert_eq!(server.counters().faults, 2);
}

/// The connection is reset after the key was sent.
#[tokio::test]
async fn a_lost_answer_to_the_key_is_tried_again() {
    let (server, provider) = started().await;
    server.inject(Route::ApiKeyGrant, Fault::LoseAnswer);
    server.inject(Route::ApiKeyGrant, Fault::Truncate);
    provider.token().await.unwrap();
    assert_eq!(grants(server.counters()), [3, 0, 0, 0]);
}

/// The refresh ends while its refresh token is presented, which may be spent.
#[tokio::test]
async fn dropped_refresh_counts_as_lost() {
    let server = AuthServer::start().await.unwrap();
    let retry = RetryPolicy::new().max_retries(0);
    let provider = TokenProvider::builder(source(&server))
        .refresh_timeout(Duration::from_millis(300))
        .retry(retry)
        .build()
        .unwrap();
    let token = provider.token().await.unwrap();
    server.inject_always(Route::RefreshGrant, Fault::Hang);
    for _ in 0..2 {
        assert!(matches!(provider.refresh(&token).await, Err(Error::TimedOut(_))));
    }
    provider.refresh(&token).await.unwrap();
    assert_eq!(grants(server.counters()), [2, 0, 0, 0]);
}

/// The response of the auth endpoint is endless.
#[tokio::test]
async fn reads_at_most_64_kib_of_answer() {
    let chunk = Bytes::from(vec![b'x'; 16 * 1024]);
    let polled_on = Arc::new(AtomicBool::new(false));
    let client = tower::service_fn({
        let polled_on = Arc::clone(&polled_on);
        move |_: Request<String>| {
            let (chunk, polled_on) = (chunk.clone(), Arc::clone(&polled_on));
            let mut chunks = 0;
            let endless = std::iter::from_fn(move || {
                chunks += 1;
                if chunks > 5 {
                    polled_on.store(true, Ordering::SeqCst);
                }
                Some(Ok::<_, Infallible>(http_body::Frame::data(chunk.clone())))
            });
            async { Ok::<_, Infallible>(Response::new(StreamBody::new(support::iterated(endless)))) }
        }
    });
    let provider = impatient(ApiVideo::new("key").with_client(TokenClient::with_service(client)));
    let error = provider.token().await.unwrap_err();
    assert!(chain(&error).contains("longer than 65536 bytes"), "{}", chain(&error));
    assert!(!polled_on.load(Ordering::SeqCst), "read on beyond the bound");
}

/// The body of an error cannot be read: its status still decides.
#[tokio::test]
async fn error_body_may_be_unreadable() {
    for headers in [&[][..], &[("content-encoding", "gzip")]] {
        let long = vec![b'x'; 200 * 1024];
        let (server, provider, token) = authenticated().await;
        let asked = [headers, &[("retry-after", "0")]].concat();
        server.inject(Route::RefreshGrant, answer(503, &asked, long.clone()));
        server.inject(Route::RefreshGrant, answer(400, headers, long.clone()));
        server.inject(Route::ApiKeyGrant, answer(429, &asked, long));
        provider.refresh(&token).await.unwrap();
        // 503: the refresh token again. 400: no verdict, but the second time, so the key. 429: the key again.
        assert_eq!(grants(server.counters()), [2, 0, 0, 0]);
        assert_eq!(server.counters().faults, 3);
    }
}

/// The response of the auth endpoint is compressed.
#[tokio::test]
async fn a_compressed_answer_is_not_unpacked() {
    let (server, provider) = started().await;
    server.inject_always(Route::ApiKeyGrant, answer(200, &[("content-encoding", "gzip")], "\x1f\u{8b}"));
    let error = provider.token().await.unwrap_err();
    assert!(chain(&error).contains("compressed"), "{}", chain(&error));
}

/// The response of the auth endpoint is not a token response, has another `token_type`, or has a token with characters
/// outside of its grammar.
#[tokio::test]
async fn unusable_answer_is_transient_error() {
    let too_long = format!(r#"{{"access_token": "{}"}}"#, "canary".repeat(4000));
    for body in [
        "",
        "canary",
        "<html>canary</html>",
        r#"{"access_token": "canary"#,
        r#"{"access_token": "canary", "error": "x"}"#,
        r#"{"access_token": "canary", "token_type": "mac"}"#,
        r#"{"access_token": "canary canary"}"#,
        r#"{"access_token": "canary\r\nx: y"}"#,
        r#"{"access_token": "canaré"}"#,
        r#"{"access_token": ""}"#,
        &too_long,
    ] {
        let (server, provider) = started().await;
        (0..3).for_each(|_| server.inject(Route::ApiKeyGrant, answer(200, &[], body.to_owned())));
        let error = provider.token().await.unwrap_err();
        assert!(error.is_transient(), "{body}");
        let shown = format!("{} {error:?} {:?}", chain(&error), provider.status());
        assert!(!shown.contains("canar"), "{shown}");
        provider.token().await.unwrap();
    }
}

/// The token response has no refresh token.
#[tokio::test]
async fn no_refresh_token_falls_back_to_key() {
    let (server, provider) = started().await;
    server.inject(Route::ApiKeyGrant, answer(200, &[], r#"{"access_token": "abc", "expires_in": 3600}"#));
    let token = provider.token().await.unwrap();
    assert_eq!(token.refresh_token(), None);
    provider.refresh(&token).await.unwrap();
    assert_eq!(grants(server.counters()), [1, 0, 0, 0]);
}

/// The auth endpoint responds with a redirect, which would receive the key.
#[tokio::test]
async fn a_redirect_is_not_followed() {
    let elsewhere = AuthServer::start().await.unwrap();
    for status in [301, 302, 303, 307, 308] {
        let (server, provider) = started().await;
        let location = format!("{}auth/api-key", elsewhere.uri());
        server.inject(Route::ApiKeyGrant, answer(status, &[("location", &location)], ""));
        let error = provider.token().await.unwrap_err();
        assert_eq!(kind(&error), SourceErrorKind::Configuration);
        assert!(chain(&error).contains("redirect"), "{}", chain(&error));
    }
    assert_eq!(elsewhere.counters().connections, 0);
}

/// The auth endpoint rejects the refresh token: the key is sent once.
#[tokio::test]
async fn rejected_refresh_token_uses_key_once() {
    for status in [400, 401, 403] {
        let (server, provider, token) = authenticated().await;
        server.inject_always(Route::RefreshGrant, Fault::Status(StatusCode::from_u16(status).unwrap()));
        provider.refresh(&token).await.unwrap();
        assert_eq!(grants(server.counters()), [2, 0, 0, 0]);
        assert_eq!(server.counters().faults, 1);
    }
}

/// The auth endpoint rejects the refresh token and then the key: neither is sent again at once.
#[tokio::test]
async fn rejected_refresh_token_is_not_retried() {
    let (server, provider, token) = authenticated().await;
    server.revoke_refresh_token();
    (0..2).for_each(|_| server.inject(Route::ApiKeyGrant, Fault::Status(StatusCode::SERVICE_UNAVAILABLE)));
    provider.refresh(&token).await.unwrap();
    assert_eq!(grants(server.counters()), [2, 0, 0, 1]);
}

/// The auth endpoint rejects the API key, and the program gets a new one.
#[tokio::test]
async fn new_key_ends_rejected_key_error() {
    for status in [400, 401, 403] {
        let server = AuthServer::start().await.unwrap();
        let source = ApiVideo::new("wrong").base_url(server.uri());
        let provider = impatient(source.clone());
        if status != 400 {
            server.inject(Route::ApiKeyGrant, Fault::Status(StatusCode::from_u16(status).unwrap()));
        }
        for _ in 0..10 {
            let error = provider.token().await.unwrap_err();
            assert_eq!(kind(&error), SourceErrorKind::Rejected);
            assert!(chain(&error).contains(&status.to_string()), "{}", chain(&error));
        }
        let counters = server.counters();
        assert_eq!(counters.rejected_api_keys + counters.faults, 1);

        source.set_key(server.api_key());
        provider.token().await.unwrap();
    }
}

/// The API key is replaced, and the refresh token of the old one is still presented.
#[tokio::test]
async fn new_key_drops_old_refresh_token() {
    let server = AuthServer::start().await.unwrap();
    let source = source(&server);
    let provider = impatient(source.clone());
    let token = provider.token().await.unwrap();
    server.set_api_key("another-key");
    source.set_key("another-key");
    provider.refresh(&token).await.unwrap();
    assert_eq!(grants(server.counters()), [2, 0, 0, 0]);
}

/// The URL is not that of an auth endpoint.
#[tokio::test]
async fn wrong_address_is_configuration_error() {
    for status in [404, 405, 410, 415] {
        let (server, provider) = started().await;
        server.inject(Route::ApiKeyGrant, Fault::Status(StatusCode::from_u16(status).unwrap()));
        let error = provider.token().await.unwrap_err();
        assert_eq!(kind(&error), SourceErrorKind::Configuration);
        let shown = chain(&error);
        assert!(shown.contains(&format!("{}auth/api-key", server.uri())), "{shown}");
        assert!(!shown.contains(&server.api_key()), "{shown}");
    }
}

/// DNS or the connection fails: the error names the host.
#[tokio::test]
async fn unreachable_endpoint_error_names_host() {
    let closed = {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        listener.local_addr().unwrap()
    };
    for base_url in
        [format!("http://{closed}"), format!("https://{closed}"), "https://nowhere.invalid".into()]
    {
        let provider = impatient(ApiVideo::new("key").base_url(base_url.parse().unwrap()));
        let error = provider.token().await.unwrap_err();
        assert!(error.is_transient());
        let host = base_url.split("//").last().unwrap();
        assert!(chain(&error).contains(host), "{}", chain(&error));
    }
}

/// The connection fails before the refresh token is sent: it is not spent.
#[tokio::test]
async fn unsent_refresh_token_is_kept() {
    let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
    let client = tower::service_fn({
        let seen = Arc::clone(&seen);
        move |request: Request<String>| {
            let body = request.into_body();
            seen.lock().unwrap().push(body.split('"').nth(1).unwrap().to_owned());
            // The first call authenticates. All attempts of the next two refreshes fail to connect, and two of the
            // third.
            let fails = (2..=9).contains(&seen.lock().unwrap().len());
            async move {
                if fails {
                    return Err(std::io::Error::from(std::io::ErrorKind::ConnectionRefused));
                }
                Ok(Response::new(Full::<Bytes>::from(r#"{"access_token": "a", "refresh_token": "r"}"#)))
            }
        }
    });
    let provider = impatient(ApiVideo::new("key").with_client(TokenClient::with_service(client)));
    let token = provider.token().await.unwrap();
    for _ in 0..2 {
        assert!(provider.refresh(&token).await.unwrap_err().is_transient());
    }
    provider.refresh(&token).await.unwrap();
    let seen = seen.lock().unwrap();
    assert_eq!(seen.len(), 10);
    assert_eq!(seen[0], "apiKey");
    assert!(seen[1..].iter().all(|grant| grant == "refreshToken"), "{seen:?}");
}

/// The certificate of the auth endpoint is not trusted, or the TLS handshake hangs.
#[tokio::test]
async fn untrusted_certificate_is_transient() {
    let server = AuthServer::builder().tls(true).start().await.unwrap();
    let provider = impatient(source(&server));
    let error = provider.token().await.unwrap_err();
    assert!(error.is_transient());
    assert!(chain(&error).to_lowercase().contains("certificate"), "{}", chain(&error));
}

/// The key or the URL has a typing error: the error has a hint.
#[tokio::test]
async fn bad_input_error_has_hint() {
    let server = AuthServer::start().await.unwrap();
    for (source, hint) in [
        (ApiVideo::new("").base_url(server.uri()), "dashboard"),
        (ApiVideo::new("a b").base_url(server.uri()), "dashboard"),
        (ApiVideo::new("key").base_url("/auth".parse().unwrap()), "such as https://"),
        (ApiVideo::new("key").base_url("http://ws.api.video".parse().unwrap()), "use https"),
    ] {
        let error = TokenProvider::new(source).token().await.unwrap_err();
        assert_eq!(kind(&error), SourceErrorKind::Configuration);
        assert!(chain(&error).contains(hint), "{}", chain(&error));
    }
    assert_eq!(server.counters().connections, 0);

    let provider = |timeout, min, max| {
        TokenProvider::builder(ApiVideo::new("key")).refresh_timeout(timeout).cool_down(min, max).build()
    };
    let second = Duration::from_secs(1);
    assert!(provider(second, second, second).is_ok());
    for bad in [
        provider(Duration::ZERO, second, second),
        provider(Duration::MAX, second, second),
        provider(second, Duration::ZERO, second),
        provider(second, second * 2, second),
        provider(second, second, Duration::MAX),
    ] {
        assert!(matches!(bad, Err(Error::InvalidOption(_))));
    }
}

/// A request differs from those in api.video's documents.
#[tokio::test]
async fn the_requests_are_what_the_documents_show() {
    let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
    let client = tower::service_fn({
        let seen = Arc::clone(&seen);
        move |request: Request<String>| {
            seen.lock().unwrap().push(request);
            let body =
                r#"{"token_type": "Bearer", "expires_in": 3600, "access_token": "a", "refresh_token": "r"}"#;
            async move { Ok::<_, Infallible>(Response::new(Full::<Bytes>::from(body))) }
        }
    });
    let source =
        ApiVideo::new("the-key").with_client(TokenClient::with_service(client)).origin_app("my-app", "1.2");
    let provider = TokenProvider::new(source);
    let token = provider.token().await.unwrap();
    provider.refresh(&token).await.unwrap();
    let seen = seen.lock().unwrap();
    let shown: Vec<_> = seen
        .iter()
        .map(|request| format!("{} {} {}", request.method(), request.uri(), request.body()))
        .collect();
    assert_eq!(
        shown,
        [
            r#"POST https://ws.api.video/auth/api-key {"apiKey":"the-key"}"#,
            r#"POST https://ws.api.video/auth/refresh {"refreshToken":"r"}"#,
        ]
    );
    for request in seen.iter() {
        let header = |name: &str| request.headers().get(name).unwrap().to_str().unwrap();
        assert_eq!(header("content-type"), "application/json");
        assert_eq!(header("accept"), "application/json");
        assert_eq!(header("av-origin-app"), "my-app:1.2");
        assert!(header("av-origin-client").starts_with("tower-bearer:"));
        assert!(!request.headers().contains_key("authorization"));
    }
}

/// The server's certificate is trusted by the program's own client only, which uses HTTP/2 by ALPN.
#[tokio::test]
async fn custom_client_trusts_certificate() {
    let server = AuthServer::builder().tls(true).start().await.unwrap();
    let client = support::https(server.certificate().unwrap());
    let provider = impatient(source(&server).with_client(TokenClient::with_service(client)));
    let token = provider.token().await.unwrap();
    provider.refresh(&token).await.unwrap();
    assert_eq!(grants(server.counters()), [1, 1, 0, 0]);
    assert_eq!(server.counters().connections, 1);
}

/// No request is sent: the token is renewed with its refresh token nevertheless, like the cron job in api.video's
/// documents.
#[tokio::test]
async fn keep_fresh_and_shutdown_over_socket() {
    let server = AuthServer::builder().token_lifetime(Duration::from_secs(1)).start().await.unwrap();
    let provider = TokenProvider::builder(source(&server)).keep_fresh(true).build().unwrap();
    let mut changes = provider.subscribe();
    while changes.next().await.unwrap().generation < 3 {}
    provider.shutdown().await;
    let [api_key, refreshes, ..] = grants(server.counters());
    assert_eq!((api_key, refreshes), (1, 2));
}

/// A client that is wrapped in the layer that it serves waits for itself. The wait ends with an error.
#[tokio::test(start_paused = true)]
async fn recursive_client_is_no_deadlock() {
    static PROVIDER: OnceLock<TokenProvider> = OnceLock::new();

    let client = tower::service_fn(|request: Request<String>| async {
        let layer = BearerAuthLayer::with_provider(PROVIDER.get().unwrap().clone());
        let inner = tower::service_fn(|_: Request<String>| async {
            Ok::<_, Infallible>(Response::new(Full::<Bytes>::default()))
        });
        layer.layer(inner).oneshot(request).await
    });
    let provider = PROVIDER.get_or_init(|| {
        TokenProvider::new(ApiVideo::new("key").with_client(TokenClient::with_service(client)))
    });
    let begun = tokio::time::Instant::now();
    let error = provider.token().await.unwrap_err();
    assert!(error.is_transient(), "{error:?}");
    assert!(begun.elapsed() <= Duration::from_secs(30), "{:?}", begun.elapsed());
    assert!(!provider.status().refreshing);
}

/// The program has another HTTP client than the default one.
#[tokio::test]
async fn any_tower_service_may_be_the_client() {
    let server = AuthServer::start().await.unwrap();
    let client = tower::ServiceBuilder::new()
        .buffer(1)
        .timeout(Duration::from_secs(5))
        .map_response(|response: Response<hyper::body::Incoming>| response.map(BodyExt::boxed_unsync))
        .service(support::http1::<String>());
    impatient(source(&server).with_client(TokenClient::with_service(client))).token().await.unwrap();
}

/// Two processes with one key and without a store spend each other's refresh tokens, unless they use `key_only`.
#[tokio::test]
async fn key_only_spends_no_refresh_tokens() {
    for key_only in [false, true] {
        let server = AuthServer::start().await.unwrap();
        let processes = [(); 2].map(|()| {
            let source = ApiVideo::new(server.api_key()).base_url(server.uri());
            TokenProvider::new(if key_only { source.key_only() } else { source })
        });
        for _ in 0..4 {
            for process in &processes {
                process.invalidate();
                process.token().await.unwrap();
            }
        }
        let counters = server.counters();
        let refreshes = (counters.refresh_grants, counters.rejected_refresh_tokens);
        // Each renewal of one process ends the refresh token of the other.
        assert_eq!((refreshes, counters.api_key_grants), (if key_only { (0, 0) } else { (0, 6) }, 8));
    }
}

/// The refresh endpoint is broken, and the key's endpoint works.
#[tokio::test]
async fn broken_refresh_endpoint_uses_key() {
    // Every status below 500 is a rejection, and so is a redirect, which is not followed.
    for status in [302, 308, 402, 404, 405, 406, 409, 410, 415, 418, 422, 451] {
        let (server, provider, token) = authenticated().await;
        server.inject_always(Route::RefreshGrant, Fault::Status(StatusCode::from_u16(status).unwrap()));
        let token = provider.refresh(&token).await.unwrap_or_else(|error| panic!("{status}: {error:?}"));
        assert_eq!((grants(server.counters()), server.counters().faults), ([2, 0, 0, 0], 1), "{status}");
        assert_eq!(token.generation(), 2);
    }
    // After a server error, the refresh token may be spent: it is presented once more, then the key is used.
    for status in [500, 501, 502, 503, 504, 505, 520, 599] {
        let (server, provider, token) = authenticated().await;
        server.inject_always(Route::RefreshGrant, Fault::Status(StatusCode::from_u16(status).unwrap()));
        provider.refresh(&token).await.unwrap_or_else(|error| panic!("{status}: {error:?}"));
        assert_eq!((grants(server.counters()), server.counters().faults), ([2, 0, 0, 0], 2), "{status}");
    }
}

/// A gateway's error or the end of a refresh resets how often a refresh token was presented.
#[tokio::test]
async fn presents_refresh_token_twice_at_most() {
    for status in [502, 503, 504] {
        let status = Fault::Status(StatusCode::from_u16(status).unwrap());
        for faults in [[Fault::Reset, status.clone()], [status.clone(), Fault::Reset]] {
            let (server, provider, token) = authenticated().await;
            faults.into_iter().for_each(|fault| server.inject(Route::RefreshGrant, fault));
            provider.refresh(&token).await.unwrap();
            assert_eq!((grants(server.counters()), server.counters().faults), ([2, 0, 0, 0], 2));
        }
    }
    // One attempt per refresh.
    let server = AuthServer::start().await.unwrap();
    let retry = RetryPolicy::new().max_retries(0).backoff(Duration::from_millis(1), Duration::from_millis(2));
    let provider = TokenProvider::builder(source(&server)).retry(retry).build().unwrap();
    let token = provider.token().await.unwrap();
    server.inject_always(Route::RefreshGrant, Fault::Status(StatusCode::SERVICE_UNAVAILABLE));
    assert!(provider.refresh(&token).await.unwrap_err().is_transient());
    provider.refresh(&token).await.unwrap();
    assert_eq!((grants(server.counters()), server.counters().faults), ([2, 0, 0, 0], 2));
}

/// A response says that the request was not processed: it spends no refresh token.
#[tokio::test]
async fn a_rate_limit_spends_no_refresh_token() {
    for status in [408, 429] {
        let (server, provider, token) = authenticated().await;
        let fault = || answer(status, &[("retry-after", "0")], "");
        (0..8).for_each(|_| server.inject(Route::RefreshGrant, fault()));
        for _ in 0..2 {
            assert!(provider.refresh(&token).await.unwrap_err().is_transient());
        }
        provider.refresh(&token).await.unwrap();
        assert_eq!((grants(server.counters()), server.counters().faults), ([1, 1, 0, 0], 8));
    }
}

/// The refresh endpoint asks for a delay: the key is not sent before.
#[tokio::test]
async fn key_grant_honours_retry_after() {
    let server = AuthServer::start().await.unwrap();
    let limit = Duration::from_secs(2);
    let retry = RetryPolicy::new().backoff(Duration::from_millis(1), Duration::from_millis(2));
    let provider =
        TokenProvider::builder(source(&server)).refresh_timeout(limit).retry(retry).build().unwrap();
    let token = provider.token().await.unwrap();
    server.inject(Route::RefreshGrant, Fault::Reset);
    server.inject(Route::RefreshGrant, answer(503, &[("retry-after", "30")], ""));
    let error = provider.refresh(&token).await.unwrap_err();
    assert!(chain(&error).contains("503"), "{}", chain(&error));
    assert_eq!(grants(server.counters()), [1, 0, 0, 0]);
}

/// The refresh endpoint responds as a wrong address does: only the key's endpoint decides whether it is one.
#[tokio::test]
async fn key_endpoint_reports_wrong_address() {
    for status in [301, 404, 405, 410, 415] {
        let (server, provider, token) = authenticated().await;
        let fault = || Fault::Status(StatusCode::from_u16(status).unwrap());
        server.inject_always(Route::RefreshGrant, fault());
        server.inject_always(Route::ApiKeyGrant, fault());
        let error = provider.refresh(&token).await.unwrap_err();
        assert_eq!(kind(&error), SourceErrorKind::Configuration);
        assert!(chain(&error).contains("auth/api-key"), "{}", chain(&error));
        assert_eq!(server.counters().faults, 2);
    }
}

/// A client does not become ready, and a timeout ends the exchange or the refresh: nothing was sent, and nothing is
/// spent.
#[tokio::test(start_paused = true)]
async fn timeout_before_send_spends_nothing() {
    let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
    let client = tower::service_fn({
        let seen = Arc::clone(&seen);
        move |request: Request<String>| {
            seen.lock().unwrap().push(request.uri().path().to_owned());
            let body = r#"{"access_token": "a", "refresh_token": "r", "expires_in": 3600}"#;
            async move { Ok::<_, Infallible>(Response::new(Full::<Bytes>::from(body))) }
        }
    });
    let client = tower::limit::ConcurrencyLimit::new(client, 1);
    let second = Duration::from_secs(1);
    for (exchange, refresh) in [(second, 30 * second), (30 * second, second)] {
        seen.lock().unwrap().clear();
        let source =
            ApiVideo::new("key").with_client(TokenClient::with_service(client.clone()).timeout(exchange));
        let provider = TokenProvider::builder(source).refresh_timeout(refresh).build().unwrap();
        let token = provider.token().await.unwrap();
        let mut held = client.clone();
        held.ready().await.unwrap();
        for _ in 0..4 {
            let error = provider.refresh(&token).await.unwrap_err();
            assert!(error.is_transient(), "{error:?}");
        }
        drop(held);
        provider.refresh(&token).await.unwrap();
        assert_eq!(*seen.lock().unwrap(), ["/auth/api-key", "/auth/refresh"]);
    }
}

/// Returns the credentials that the auth endpoint gets, in order, and a client for it. `status` is the response to a
/// refresh token that was presented so many times.
#[allow(clippy::type_complexity)]
fn recorded(
    status: fn(&str, usize) -> u16,
) -> (
    Arc<std::sync::Mutex<Vec<String>>>,
    impl tower::Service<
        Request<String>,
        Response = Response<Full<Bytes>>,
        Error = Infallible,
        Future: Future<Output = Result<Response<Full<Bytes>>, Infallible>> + Send,
    > + Clone
    + Send
    + 'static,
) {
    let seen = Arc::<std::sync::Mutex<Vec<String>>>::default();
    let client = tower::service_fn({
        let seen = Arc::clone(&seen);
        move |request: Request<String>| {
            let mut seen = seen.lock().unwrap();
            let credential = request.body().split('"').nth(3).unwrap().to_owned();
            let times = seen.iter().filter(|presented| **presented == credential).count() + 1;
            let is_refresh = request.uri().path() == "/auth/refresh";
            let status = if is_refresh { status(&credential, times) } else { 200 };
            seen.push(credential);
            let number = seen.len();
            let body = format!(
                r#"{{"access_token": "a{number}", "refresh_token": "r{number}", "expires_in": 3600}}"#
            );
            let answer = Response::builder().status(status).body(Full::<Bytes>::from(body)).unwrap();
            async move { Ok::<_, Infallible>(answer) }
        }
    });
    (seen, client)
}

/// A refresh is abandoned during its backoff, and sends nothing when its runtime is driven again.
#[test]
fn abandoned_refresh_presents_nothing() {
    let (seen, client) = recorded(|refresh_token, times| match (refresh_token, times) {
        ("r1", 1) => 503,
        ("r1", _) => 400,
        _ => 200,
    });
    let (pause, limit) = (Duration::from_millis(300), Duration::from_secs(1));
    let provider =
        TokenProvider::builder(ApiVideo::new("key").with_client(TokenClient::with_service(client)))
            .retry(RetryPolicy::new().backoff(pause, pause))
            .refresh_timeout(limit)
            .build()
            .unwrap();
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (stalled, live) = (runtime(), runtime());
    let token = stalled.block_on(async {
        let token = provider.token().await.unwrap();
        let _ = tokio::time::timeout(Duration::from_millis(50), provider.refresh(&token)).await;
        token
    });
    live.block_on(async {
        assert!(provider.refresh(&token).await.is_err());
        provider.refresh(&token).await.unwrap();
        provider.invalidate();
        provider.token().await.unwrap();
    });
    let before = seen.lock().unwrap().clone();
    assert_eq!(before, ["key", "r1", "r1", "key", "r4"]);
    stalled.block_on(async { tokio::time::sleep(Duration::from_millis(50)).await });
    assert_eq!(*seen.lock().unwrap(), before);
}

/// Two providers that share a source reset each other's count of presentations.
#[tokio::test(start_paused = true)]
async fn clones_share_refresh_token_counts() {
    let (seen, client) = recorded(|_, _| 500);
    let source = ApiVideo::new("key").with_client(TokenClient::with_service(client));
    let build =
        || TokenProvider::builder(source.clone()).retry(RetryPolicy::new().max_retries(0)).build().unwrap();
    let (one, other) = (build(), build());
    for provider in [&one, &other] {
        provider.token().await.unwrap();
        provider.invalidate();
    }
    for _ in 0..4 {
        let _ = one.token().await;
        let _ = other.token().await;
    }
    assert_eq!(*seen.lock().unwrap(), ["key", "key", "r1", "r2", "r1", "key", "r2", "key"]);
}

/// The key is replaced in one clone of a source, and the others keep the old one.
#[tokio::test(start_paused = true)]
async fn new_key_applies_to_all_clones() {
    let (seen, client) = recorded(|_, _| 200);
    let source = ApiVideo::new("key1").with_client(TokenClient::with_service(client));
    let (one, other) = (TokenProvider::new(source.clone()), TokenProvider::new(source.clone()));
    one.token().await.unwrap();
    source.set_key("key2");
    other.token().await.unwrap();
    one.invalidate();
    one.token().await.unwrap();
    one.invalidate();
    one.token().await.unwrap();
    assert_eq!(*seen.lock().unwrap(), ["key1", "key2", "key2", "r3"]);
}
