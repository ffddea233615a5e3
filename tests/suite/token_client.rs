//! [`TokenClient`] as a source of one's own uses it: its options, its rules for URLs, and what it returns.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::Channel;
use tokio::{
    sync::oneshot,
    time::{Instant, advance, sleep},
};
use tower_bearer::{
    BoxError, Error, RefreshReason, SourceError, SourceErrorKind, TokenClient, TokenProvider, TokenRequest,
    TokenSource, source_fn,
};

use crate::support::chain;

/// A client whose endpoint responds with this, and the headers of each request.
fn answered(status: u16, body: &'static str) -> (TokenClient, Arc<Mutex<Vec<HeaderMap>>>) {
    let seen = Arc::<Mutex<Vec<HeaderMap>>>::default();
    let service = tower::service_fn({
        let seen = Arc::clone(&seen);
        move |request: Request<String>| {
            seen.lock().unwrap().push(request.headers().clone());
            async move { Ok::<_, BoxError>(Response::builder().status(status).body(body.to_owned())?) }
        }
    });
    (TokenClient::with_service(service), seen)
}

const URL: &str = "https://auth.example/token";

/// A source of one's own asks a token endpoint, as in the documentation.
#[tokio::test]
async fn source_takes_six_lines() {
    let (client, seen) = answered(200, r#"{"access_token":"a","expires_in":60,"refresh_token":"r"}"#);
    let source = source_fn(move |_| {
        let client = client.clone();
        async move { client.post_json(URL, r#"{"key":"your-key"}"#).await?.token() }
    });
    let token = TokenProvider::new(source).token().await.unwrap();
    assert_eq!((token.access_token(), token.refresh_token()), ("a", Some("r")));
    assert!(token.remaining().unwrap() <= Duration::from_secs(60));
    let headers = &seen.lock().unwrap()[0];
    for (name, value) in [
        ("content-type", "application/json"),
        ("accept", "application/json"),
        ("accept-encoding", "identity"),
        ("user-agent", concat!("tower-bearer/", env!("CARGO_PKG_VERSION"))),
    ] {
        assert_eq!(headers[name], value);
    }
}

/// A token endpoint of one's own source responds in another form, and its status says what that means.
#[tokio::test]
async fn status_is_classified_and_body_is_readable() {
    let (client, _) = answered(201, r#"{"auth":{"client_token":"vault"}}"#);
    let response = client.post_json(URL, "{}").await.unwrap();
    assert_eq!((response.status().as_u16(), response.headers().len()), (201, 0));
    assert_eq!(response.body(), br#"{"auth":{"client_token":"vault"}}"#);
    let error = response.token().unwrap_err();
    assert_eq!(
        error.to_string(),
        "the response of https://auth.example/token has no access_token that is a text (HTTP 201, no content type)"
    );
    assert!(!format!("{response:?}").contains("vault"));

    for (status, body, kind) in [
        (401, r#"{"canary":1}"#, SourceErrorKind::Rejected),
        (401, "canary", SourceErrorKind::InvalidResponse),
        (404, "canary", SourceErrorKind::Configuration),
        (503, "canary", SourceErrorKind::Unavailable),
    ] {
        let (client, _) = answered(status, body);
        let error = client.post_json("https://auth.example/token?canary", "canary").await.unwrap_err();
        assert_eq!(error.kind(), kind);
        let shown = format!("{} {error:?}", chain(&error));
        assert!(shown.contains(URL) && !shown.contains("canary"), "{shown}");
    }
}

/// The body of an error does not come within the deadline: its status decides.
#[tokio::test(start_paused = true)]
async fn slow_body_does_not_hide_status() {
    for (status, kind) in [
        (401, SourceErrorKind::InvalidResponse),
        (404, SourceErrorKind::Configuration),
        (200, SourceErrorKind::Unavailable),
    ] {
        let service = tower::service_fn(move |_: Request<String>| async move {
            let (sender, body) = Channel::<Bytes, BoxError>::new(1);
            // The body does not end.
            tokio::spawn(async move {
                let _sender = sender;
                std::future::pending::<()>().await
            });
            Ok::<_, BoxError>(Response::builder().status(status).body(body)?)
        });
        let error = error_of(&TokenClient::with_service(service), URL).await;
        assert_eq!(error.kind(), kind, "{error}");
        assert_eq!(error.is_timeout(), status == 200, "{error}");
    }
}

/// A process is stopped during an exchange, and goes on after the deadline. The response has arrived meanwhile.
#[tokio::test(start_paused = true)]
async fn response_is_read_after_stop() {
    let second = Duration::from_secs(1);
    let exchange = |status, takes, content: &'static str| async move {
        let service = tower::service_fn(move |_: Request<String>| async move {
            let (head, response) = oneshot::channel();
            // As the task of a connection, which may be polled after the exchange.
            tokio::spawn(async move {
                sleep(takes).await;
                let (mut body, read) = Channel::<Bytes, BoxError>::new(1);
                let _ = head.send(Response::builder().status(status).body(read));
                tokio::task::yield_now().await;
                let _ = body.send_data(content.into()).await;
            });
            Ok::<_, BoxError>(response.await??)
        });
        let client = TokenClient::with_service(service).timeout(10 * second);
        let exchange = tokio::spawn(async move { client.post_json(URL, "{}").await });
        sleep(second).await;
        advance(60 * second).await;
        let resumed = Instant::now();
        let result = exchange.await.unwrap();
        assert!(resumed.elapsed() <= 2 * second);
        result
    };
    for takes in [5, 30] {
        let response = exchange(200, takes * second, r#"{"access_token":"a"}"#).await.unwrap();
        assert_eq!(response.token().unwrap().access_token(), "a", "{takes}");
        let error = exchange(400, takes * second, r#"{"error":"invalid_grant"}"#).await.unwrap_err();
        assert_eq!(error.kind(), SourceErrorKind::Rejected, "{error}");
    }
    // A silent peer does not hold up the exchange.
    assert!(exchange(200, 3600 * second, "").await.unwrap_err().is_timeout());
}

/// The token endpoint is silent: the deadline counts for a process that was not stopped.
#[tokio::test(start_paused = true)]
async fn silent_endpoint_ends_exchange_at_deadline() {
    let service =
        tower::service_fn(|_: Request<String>| std::future::pending::<Result<Response<String>, BoxError>>());
    let begun = Instant::now();
    assert!(error_of(&TokenClient::with_service(service), URL).await.is_timeout());
    assert_eq!(begun.elapsed(), Duration::from_secs(10));
}

async fn error_of(client: &TokenClient, url: &str) -> SourceError {
    client.post_json(url, "canary").await.unwrap_err()
}

/// An option or a URL of a source of one's own is not valid.
#[tokio::test]
async fn invalid_option_is_error_of_each_exchange() {
    let client = || answered(200, "{}").0;
    let reserved = "header must have a valid name, other than ";
    for (client, expected) in [
        (client().timeout(Duration::ZERO), "timeout must be > 0 and <= 1h, got 0s"),
        (client().timeout(Duration::MAX), "timeout must be > 0 and <= 1h"),
        (client().header("accept-encoding", "canary"), reserved),
        (client().header("Content-Type", "canary"), reserved),
        (client().header("content-length", "canary"), reserved),
        (client().header("host", "canary"), reserved),
        (client().header("", "canary"), reserved),
        (client().header("a b", "canary"), reserved),
        (client().header("x", "canary\n"), "and a value without a line break, got the name \"x\""),
        (
            client().header("x", "canary\r\ny: z").header("z", "a"),
            "header must have a valid name, other than ",
        ),
    ] {
        let error = error_of(&client, URL).await;
        assert_eq!(error.kind(), SourceErrorKind::Configuration);
        let shown = format!("{error} {error:?} {client:?}");
        assert!(shown.contains(expected) && !shown.contains("canary"), "{shown}");
    }
    for (url, expected) in [
        ("", "the URL must have a scheme and a host"),
        ("auth.example/token", "the URL must have a scheme and a host"),
        ("/token", "the URL must have a scheme and a host"),
        ("https://canary:canary@auth.example/", "the URL must not have a user name"),
        (
            "http://auth.example/?canary",
            "the URL must not be plaintext http except on loopback, got http://auth.example: use https, or allow plaintext",
        ),
        ("ftp://auth.example", "the URL must be https or http, got ftp://auth.example"),
        ("https://auth.example:99999/", "the URL must have a port of at most 65535"),
        ("https://auth.example/ canary", "the URL must have a scheme and a host"),
    ] {
        let error = error_of(&client(), url).await;
        assert_eq!(error.kind(), SourceErrorKind::Configuration);
        assert!(
            error.to_string().starts_with(expected) && !error.to_string().contains("canary"),
            "{url}: {error}"
        );
    }
    for url in ["http://localhost:1/", "http://127.0.0.1/", "https://AUTH.example/?x"] {
        client().post_json(url, "").await.unwrap();
    }
    client().allow_plaintext().post_json("http://sidecar/", "").await.unwrap();
}

/// An option replaces what is sent otherwise, but not what a source sends.
#[tokio::test]
async fn header_of_request_has_precedence() {
    let (client, seen) = answered(200, "{}");
    let client = client
        .header("user-agent", "first")
        .header("User-Agent", "mine/1")
        .header("authorization", "Basic eA==");
    client.post_json(URL, "").await.unwrap();
    let request = Request::post(URL).header("authorization", "Basic eQ==").header("accept-encoding", "gzip");
    client.send(request.body(String::new()).unwrap()).await.unwrap();
    let seen = seen.lock().unwrap();
    let values = |name: &str| -> Vec<_> {
        seen.iter().map(|headers| headers[name].to_str().unwrap().to_owned()).collect()
    };
    assert_eq!(values("user-agent"), ["mine/1", "mine/1"]);
    assert_eq!(values("authorization"), ["Basic eA==", "Basic eQ=="]);
    assert_eq!(values("accept-encoding"), ["identity", "identity"]);
    assert!(seen[0]["authorization"].is_sensitive() && seen[0]["user-agent"].is_sensitive());
}

/// The crate has no default client, and a source is given none.
#[cfg(not(feature = "default-client"))]
#[tokio::test]
async fn missing_client_is_typed_error() {
    use tower_bearer::{
        OAuth2,
        oauth2::{ClientAuth, Server},
    };

    let source =
        || OAuth2::client_credentials(Server::issuer("https://auth.example"), ClientAuth::public("id"));
    let expected = "the source must have an HTTP client: give it one, or enable the feature default-client";
    let error = TokenProvider::builder(source()).build().unwrap_err();
    assert!(error.to_string().ends_with(expected), "{error}");
    assert!(matches!(error, Error::Source(error) if error.kind() == SourceErrorKind::Configuration));
    assert_eq!(error_of(&TokenClient::new(), URL).await.to_string(), expected);
    let error = source().fetch(&TokenRequest::new(RefreshReason::Missing)).await.unwrap_err();
    assert_eq!(error.to_string(), expected);
    let (client, _) = answered(
        200,
        r#"{"issuer":"https://auth.example","token_endpoint":"https://auth.example/token","access_token":"a"}"#,
    );
    let provider = TokenProvider::builder(source().with_client(client)).build().unwrap();
    assert_eq!(provider.token().await.unwrap().access_token(), "a");
}

/// An error that no exchange has made has no facts about one.
#[tokio::test]
async fn other_errors_say_nothing_of_exchange() {
    let source = source_fn(|_| async { Err(SourceError::unavailable("sealed")) });
    let error = source.fetch(&TokenRequest::new(RefreshReason::Missing)).await.unwrap_err();
    assert!(!error.is_timeout() && !error.is_connect() && !error.is_unsent());
    let error = Error::from(error);
    assert!(error.is_transient() && !error.is_timeout() && !error.is_connect());
    assert!(Error::TimedOut(Duration::from_secs(1)).is_timeout());
    let (client, _) = answered(200, "{}");
    let source = source_fn(move |_| {
        let client = client.clone();
        async move { client.post_json("http://auth.example", "").await?.token() }
    });
    assert!(!TokenProvider::new(source).token().await.unwrap_err().is_connect());
}
