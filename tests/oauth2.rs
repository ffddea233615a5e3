//! [`OAuth2`]: what each grant sends, what a response of the token endpoint means, and which refresh token is presented.
#![cfg(feature = "oauth2-jwt")]

mod support;

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, UNIX_EPOCH},
};

use base64::{
    Engine,
    prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD},
};
use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Method, Request, Response,
    header::{AUTHORIZATION, WWW_AUTHENTICATE},
};
use http_body_util::{Empty, Full};
use support::chain;
use tokio::time::{advance, sleep};
use tower::{Layer, ServiceExt};
use tower_bearer::{
    BearerAuthLayer, BoxError, Error, OAuth2, RefreshReason, SourceError, SourceErrorKind, StaticToken,
    Token, TokenProvider, TokenRequest, TokenSource,
    challenge::Challenge,
    oauth2::{Assertion, ClientAuth, Server, SigningKey},
    source_fn,
    testing::AuthServer,
};

use SourceErrorKind::{Configuration, InvalidResponse, LoginRequired, Rejected, Unavailable};

const TOKEN_ENDPOINT: &str = "https://login.example/token";

/// What the token endpoint does with one request.
#[derive(Clone)]
enum Act {
    Answer(u16, Vec<(&'static str, &'static str)>, Bytes),
    /// The connection cannot be made.
    Refuse,
    /// The connection breaks after the request.
    Lose,
    Hang,
    /// The next act, after this time.
    Late(Duration),
}

/// A token endpoint in memory, which follows a script. It grants `access-1`, `access-2` and so on after the last act.
#[derive(Clone, Default)]
struct Endpoint(Arc<Mutex<Script>>);

#[derive(Default)]
struct Script {
    acts: VecDeque<Act>,
    requests: Vec<Request<String>>,
    granted: u32,
}

impl Endpoint {
    fn script(&self) -> MutexGuard<'_, Script> {
        self.0.lock().unwrap()
    }

    fn then(self, act: Act) -> Self {
        self.script().acts.push_back(act);
        self
    }

    /// Responds to the next request with this status and body.
    fn responds(self, status: u16, body: impl Into<Bytes>) -> Self {
        self.then(Act::Answer(status, Vec::new(), body.into()))
    }

    fn serve(&self, source: OAuth2) -> OAuth2 {
        let endpoint = self.clone();
        source.with_client(tower::service_fn(move |request| {
            let endpoint = endpoint.clone();
            async move { endpoint.answer(request).await }
        }))
    }

    fn next(&self) -> Act {
        let mut script = self.script();
        script.acts.pop_front().unwrap_or_else(|| {
            script.granted += 1;
            let number = script.granted;
            let body = format!(
                r#"{{"access_token":"access-{number}","token_type":"Bearer","expires_in":3600,"refresh_token":"refresh-{number}"}}"#
            );
            Act::Answer(200, Vec::new(), body.into())
        })
    }

    async fn answer(&self, request: Request<String>) -> Result<Response<Full<Bytes>>, BoxError> {
        self.script().requests.push(request);
        let mut act = self.next();
        if let Act::Late(delay) = act {
            sleep(delay).await;
            act = self.next();
        }
        match act {
            Act::Late(_) => unreachable!(),
            Act::Answer(status, headers, body) => {
                let mut response = Response::builder().status(status);
                for (name, value) in headers {
                    response = response.header(name, value);
                }
                Ok(response.body(Full::new(body))?)
            }
            Act::Refuse => Err(io::Error::from(io::ErrorKind::ConnectionRefused).into()),
            Act::Lose => Err(io::Error::from(io::ErrorKind::ConnectionReset).into()),
            Act::Hang => std::future::pending().await,
        }
    }

    fn requests(&self) -> usize {
        self.script().requests.len()
    }

    /// The fields of each request, sorted.
    fn forms(&self) -> Vec<Vec<(String, String)>> {
        let fields = |request: &Request<String>| {
            let mut fields: Vec<_> = form_urlencoded::parse(request.body().as_bytes()).into_owned().collect();
            fields.sort();
            fields
        };
        self.script().requests.iter().map(fields).collect()
    }

    /// The value of this field in each request.
    fn values(&self, name: &str) -> Vec<String> {
        let value = |form: Vec<(String, String)>| {
            form.into_iter().find(|(key, _)| key == name).map(|(_, value)| value)
        };
        self.forms().into_iter().filter_map(value).collect()
    }

    fn header(&self, name: &str) -> Option<HeaderValue> {
        self.script().requests.last().and_then(|request| request.headers().get(name).cloned())
    }
}

fn server() -> Server {
    Server::token_endpoint(TOKEN_ENDPOINT)
}

fn client() -> ClientAuth {
    ClientAuth::basic("id", "canary-secret")
}

fn by_client(endpoint: &Endpoint) -> OAuth2 {
    endpoint.serve(OAuth2::client_credentials(server(), client()))
}

fn by_refresh_token(endpoint: &Endpoint) -> OAuth2 {
    endpoint.serve(OAuth2::refresh_token(server(), ClientAuth::public("id"), "seed"))
}

async fn fetch(source: &OAuth2) -> Result<Token, SourceError> {
    source.fetch(&TokenRequest::new(RefreshReason::Missing)).await
}

async fn renewed(source: &OAuth2, previous: &Token) -> Result<Token, SourceError> {
    source.fetch(&TokenRequest::new(RefreshReason::Expired).with_previous(previous.clone())).await
}

fn kind(error: &Error) -> SourceErrorKind {
    match error {
        Error::Source(error) => error.kind(),
        error => panic!("not of the source: {error}"),
    }
}

/// Rows 100 to 108: each answer of a token endpoint that a client has to survive, and what it means.
#[tokio::test(start_paused = true)]
async fn each_answer_has_its_meaning() {
    const TOKEN: &str = r#""access_token":"abc""#;
    let lifetime = |expires_in: &str| format!(r#"{{{TOKEN},"expires_in":{expires_in}}}"#);
    let of_type = |token_type: &str| format!(r#"{{{TOKEN},"token_type":{token_type}}}"#);
    let error =
        |code: &str| format!(r#"{{"error":"{code}","error_description":"canary","error_uri":"canary"}}"#);
    let secs = |secs| Some(Duration::from_secs(secs));

    // The lifetime of the token.
    for (status, body, expected) in [
        (200, lifetime("3600"), secs(3600)),
        (201, lifetime("3600"), secs(3600)),
        (200, lifetime(r#""3600""#), secs(3600)),
        (200, lifetime("3599.5"), Some(Duration::from_millis(3_599_500))),
        (200, lifetime("0"), secs(0)),
        (200, lifetime("-1"), secs(0)),
        (200, lifetime(r#""""#), None),
        (200, lifetime(r#""soon""#), None),
        (200, lifetime("null"), None),
        (200, lifetime("[3600]"), None),
        (200, format!("{{{TOKEN}}}"), None),
        (200, lifetime("9223372036854775808"), secs(10 * 365 * 24 * 3600)),
        (200, of_type(r#""Bearer""#), None),
        (200, of_type(r#""bearer""#), None),
        (200, of_type(r#""BEARER""#), None),
        (200, of_type("null"), None),
        (200, format!(r#"{{{TOKEN},"scope":["a","b"],"refresh_token":""}}"#), None),
        (200, format!(r#"{{{TOKEN},"error":null}}"#), None),
        (200, format!(r#"{{{TOKEN},"error":""}}"#), None),
        (200, format!(r#"{{{TOKEN},"error":false}}"#), None),
        (200, format!("\u{feff}{}", lifetime("7")), secs(7)),
        (200, "access_token=abc&token_type=bearer&expires_in=7&scope=a+b".to_owned(), secs(7)),
        (200, "\u{feff}access_token=abc&expires_in=".to_owned(), None),
    ] {
        let endpoint = Endpoint::default().responds(status, body.clone());
        let token = fetch(&by_client(&endpoint)).await.unwrap_or_else(|error| panic!("{body}: {error}"));
        assert_eq!((token.access_token(), token.remaining()), ("abc", expected), "{body}");
        assert_eq!(token.refresh_token(), None, "{body}");
    }

    // The kind of the error.
    let long = format!(r#"{{{TOKEN},"x":"{}"}}"#, "a".repeat(70 * 1024));
    for (status, body, expected) in [
        (200, of_type(r#""N_A""#), InvalidResponse),
        (200, of_type(r#""DPoP""#), InvalidResponse),
        (200, of_type(r#""mac""#), InvalidResponse),
        (200, r#"{"access_token":"canary\r\nX: y"}"#.to_owned(), InvalidResponse),
        (200, r#"{"access_token":""}"#.to_owned(), InvalidResponse),
        (200, r#"{"access_token":["canary"]}"#.to_owned(), InvalidResponse),
        (200, r#"{"token":"canary"}"#.to_owned(), InvalidResponse),
        (200, error("invalid_grant"), Rejected),
        (200, error("invalid_scope"), Configuration),
        (200, error("canary"), InvalidResponse),
        (200, format!(r#"{{{TOKEN},"error":"invalid_grant"}}"#), Rejected),
        (200, format!(r#"{{{TOKEN},"error":{{"code":"canary"}}}}"#), InvalidResponse),
        (200, "error=invalid_client&error_description=canary".to_owned(), Rejected),
        (200, "<html>canary</html>".to_owned(), InvalidResponse),
        (200, String::new(), InvalidResponse),
        (204, String::new(), InvalidResponse),
        (200, "5".to_owned(), InvalidResponse),
        (200, r#""canary""#.to_owned(), InvalidResponse),
        (200, long, InvalidResponse),
        (400, error("invalid_grant"), Rejected),
        (400, format!("\u{feff}{}", error("invalid_grant")), Rejected),
        (400, "error=invalid_grant&error_description=canary".to_owned(), Rejected),
        (401, error("invalid_client"), Rejected),
        (400, error("unauthorized_client"), Rejected),
        (403, error("access_denied"), Rejected),
        (400, error("invalid_scope"), Configuration),
        (400, error("invalid_target"), Configuration),
        (400, error("invalid_request"), Configuration),
        (400, error("unsupported_grant_type"), Configuration),
        (400, error("use_dpop_nonce"), Configuration),
        (400, error("interaction_required"), LoginRequired),
        (400, error("temporarily_unavailable"), Unavailable),
        (400, error("server_error"), Unavailable),
        (400, error("slow_down"), Unavailable),
        (400, error("canary"), InvalidResponse),
        (400, error("INVALID_GRANT"), InvalidResponse),
        (400, "canary".to_owned(), Rejected),
        (400, r#"{"error":""}"#.to_owned(), Rejected),
        (403, r#"<a href="/?x=1&error=invalid_scope&canary">"#.to_owned(), Rejected),
        (200, r#"<a href="/?access_token=canary&expires_in=1">"#.to_owned(), InvalidResponse),
        (400, format!(r#"{{"error":"invalid_grant","x":"{}"}}"#, "a".repeat(70 * 1024)), Rejected),
        (403, "<html>canary</html>".to_owned(), Rejected),
        (404, "<html>canary</html>".to_owned(), Configuration),
        (404, error("canary"), Configuration),
        (302, String::new(), Configuration),
        (405, String::new(), Configuration),
        (418, error("canary"), InvalidResponse),
        (408, error("invalid_grant"), Unavailable),
        (429, error("invalid_grant"), Unavailable),
        (500, error("invalid_grant"), Unavailable),
        (503, "<html>canary</html>".to_owned(), Unavailable),
    ] {
        let endpoint = Endpoint::default().responds(status, body.clone());
        let error = fetch(&by_client(&endpoint)).await.unwrap_err();
        assert_eq!(error.kind(), expected, "{status} {body:.99}: {error}");
        let shown = format!("{} {error:?}", chain(&error));
        assert!(!shown.to_lowercase().contains("canary"), "{shown}");
        assert!(shown.contains(TOKEN_ENDPOINT), "{shown}");
    }
}

/// Row 103.
#[tokio::test(start_paused = true)]
async fn registered_code_is_in_message() {
    let endpoint = Endpoint::default().responds(401, r#"{"error":"invalid_client"}"#);
    let error = fetch(&by_client(&endpoint)).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "https://login.example/token responded with HTTP 401 invalid_client: check the client's id and its secret; of an assertion, the key, the audience and the clock"
    );
}

/// Row 107.
#[tokio::test(start_paused = true)]
async fn retry_after_counts_for_each_transient_answer() {
    let body = Bytes::from_static(br#"{"error":"temporarily_unavailable"}"#);
    for status in [400, 429, 503] {
        let endpoint =
            Endpoint::default().then(Act::Answer(status, vec![("retry-after", "7")], body.clone()));
        let error = fetch(&by_client(&endpoint)).await.unwrap_err();
        assert_eq!(error.retry_after(), Some(Duration::from_secs(7)), "{status}");
    }
}

#[tokio::test]
async fn client_credentials_send_form_and_basic() {
    let endpoint = Endpoint::default();
    let source = by_client(&endpoint)
        .scopes(["read", "write"])
        .resources(["https://a.example", "https://b.example"])
        .audience("api")
        .parameter("tenant", "t&1");
    fetch(&source).await.unwrap();
    let expected = [
        ("audience", "api"),
        ("grant_type", "client_credentials"),
        ("resource", "https://a.example"),
        ("resource", "https://b.example"),
        ("scope", "read write"),
        ("tenant", "t&1"),
    ];
    assert_eq!(endpoint.forms()[0], expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
    let authorization = endpoint.header("authorization").unwrap();
    assert!(authorization.is_sensitive());
    assert_eq!(authorization, format!("Basic {}", BASE64_STANDARD.encode("id:canary-secret")).as_str());
    assert_eq!(endpoint.header("accept").unwrap(), "application/json");
    assert_eq!(endpoint.header("content-type").unwrap(), "application/x-www-form-urlencoded");
    let script = endpoint.script();
    assert_eq!(
        (script.requests[0].method(), script.requests[0].uri().to_string()),
        (&Method::POST, TOKEN_ENDPOINT.into())
    );
}

#[tokio::test]
async fn client_may_authenticate_in_body_or_not_at_all() {
    for (client, expected) in [
        (ClientAuth::post("id", "secret"), vec![("client_id", "id"), ("client_secret", "secret")]),
        (ClientAuth::public("id"), vec![("client_id", "id")]),
        (ClientAuth::none(), vec![]),
    ] {
        let endpoint = Endpoint::default();
        fetch(&endpoint.serve(OAuth2::client_credentials(server(), client))).await.unwrap();
        let mut fields = expected;
        fields.push(("grant_type", "client_credentials"));
        fields.sort_unstable();
        let fields: Vec<_> =
            fields.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        assert_eq!(endpoint.forms()[0], fields);
        assert_eq!(endpoint.header("authorization"), None);
    }
}

#[tokio::test]
async fn subject_and_assertion_are_asked_at_each_exchange() {
    let asked = Arc::new(Mutex::new(0));
    let next = move || {
        let asked = Arc::clone(&asked);
        source_fn(move |_| {
            let number = {
                *asked.lock().unwrap() += 1;
                *asked.lock().unwrap()
            };
            async move { Ok(Token::builder(format!("subject-{number}")).build()?) }
        })
    };
    let endpoint = Endpoint::default();
    let exchange = endpoint.serve(OAuth2::token_exchange(server(), ClientAuth::none(), next()));
    let first = fetch(&exchange).await.unwrap();
    assert_eq!(first.refresh_token(), None, "the subject works as long");
    renewed(&exchange, &first).await.unwrap();
    assert_eq!(endpoint.values("subject_token"), ["subject-1", "subject-2"]);
    assert_eq!(endpoint.values("subject_token_type")[0], "urn:ietf:params:oauth:token-type:jwt");
    assert_eq!(endpoint.values("grant_type")[0], "urn:ietf:params:oauth:grant-type:token-exchange");

    let endpoint = Endpoint::default();
    let access_token = "urn:ietf:params:oauth:token-type:access_token";
    let subject = StaticToken::new("fixed");
    let exchange = OAuth2::token_exchange(server(), client(), subject).subject_token_type(access_token);
    fetch(&endpoint.serve(exchange)).await.unwrap();
    assert_eq!(endpoint.values("subject_token_type"), [access_token]);

    let endpoint = Endpoint::default();
    let bearer = endpoint.serve(OAuth2::jwt_bearer(server(), ClientAuth::none(), next()));
    fetch(&bearer).await.unwrap();
    fetch(&bearer).await.unwrap();
    assert_eq!(endpoint.values("assertion"), ["subject-3", "subject-4"]);
    assert_eq!(endpoint.values("grant_type")[0], "urn:ietf:params:oauth:grant-type:jwt-bearer");
}

#[tokio::test]
async fn failing_subject_is_not_exchanged() {
    let endpoint = Endpoint::default();
    let subject = source_fn(|_| async { Err(SourceError::unavailable("the file is missing")) });
    let source = endpoint.serve(OAuth2::jwt_bearer(server(), ClientAuth::none(), subject));
    assert_eq!(fetch(&source).await.unwrap_err().to_string(), "the file is missing");
    assert_eq!(endpoint.requests(), 0);
}

/// What the API's challenge asks for, in both of the forms that it is sent in.
#[tokio::test]
async fn challenge_goes_into_request_only_if_followed() {
    let value = r#"Bearer error="insufficient_claims", claims="eyJhIjoxfQ==", acr_values="gold""#;
    let headers: HeaderMap = [(WWW_AUTHENTICATE, HeaderValue::from_static(value))].into_iter().collect();
    let request = TokenRequest::new(RefreshReason::Challenged)
        .with_challenge(Challenge::from_headers(&headers).unwrap());
    for follow in [false, true] {
        let endpoint = Endpoint::default();
        by_client(&endpoint).follow_challenge(follow).fetch(&request).await.unwrap();
        let expected: &[&str] = if follow { &[r#"{"a":1}"#] } else { &[] };
        assert_eq!(endpoint.values("claims"), expected);
        assert_eq!(endpoint.values("acr_values").len(), usize::from(follow));
    }
}

/// Row 120.
#[test]
fn invalid_options_are_errors_of_build() {
    let source = || OAuth2::client_credentials(server(), client());
    let parameter = "parameter must have a name that is not set otherwise, by the grant, by ClientAuth or by another option of OAuth2, got ";
    for (source, expected) in [
        (source().parameter("grant_type", "canary"), parameter),
        (source().parameter("client_secret", "canary"), parameter),
        (source().parameter("refresh_token", "canary"), parameter),
        (source().scopes(["a"]).parameter("scope", "canary"), parameter),
        (source().parameter("scope", "canary").scopes(["a"]), parameter),
        (source().resources(["a"]).parameter("resource", "canary"), parameter),
        (source().audience("a").parameter("audience", "canary"), parameter),
        (source().follow_challenge(true).parameter("claims", "canary"), parameter),
        (source().parameter("", "canary"), parameter),
        (
            OAuth2::client_credentials(server(), ClientAuth::post("id", "x"))
                .parameter("client_id", "canary"),
            parameter,
        ),
        (
            OAuth2::client_credentials(server(), ClientAuth::public("id")).parameter("client_id", "canary"),
            parameter,
        ),
        (source().scopes(["a", ""]), "scopes must have one scope in each value, of visible ASCII, got "),
        (
            source().scopes(["a b"]),
            r#"scopes must have one scope in each value, of visible ASCII, got "a b""#,
        ),
        (source().resources([""]), "resources must not be empty or have a fragment"),
        (source().resources(["https://a.example/#b"]), "resources must not be empty or have a fragment"),
        (source().default_lifetime(Duration::ZERO), "default_lifetime must be > 0, got 0s"),
        (
            OAuth2::client_credentials(server(), ClientAuth::post("id", "canary\n")),
            "the client secret must not have a control character",
        ),
        (
            OAuth2::refresh_token(server(), client(), "canary\n"),
            "the refresh token must not have a control character",
        ),
        (source().timeout(Duration::MAX), "timeout must be > 0 and <= 1h"),
        (source().timeout(Duration::ZERO), "timeout must be > 0 and <= 1h, got 0s"),
        (OAuth2::client_credentials(server(), ClientAuth::public("")), "the client id must not be empty"),
        (OAuth2::client_credentials(Server::issuer("/"), client()), "the issuer must have a scheme"),
        (
            OAuth2::refresh_token(server(), client(), "canary".repeat(10_000)),
            "the refresh token must be at most 16384 bytes long",
        ),
        (
            OAuth2::jwt_bearer(server(), client(), StaticToken::new("")),
            "the static token is not a valid access token",
        ),
    ] {
        let error = TokenProvider::builder(source.clone()).build().unwrap_err();
        assert!(matches!(&error, Error::Source(source) if source.kind() == Configuration), "{error:?}");
        assert!(error.to_string().contains(expected), "{error}");
        assert!(!format!("{error:?} {source:?}").contains("canary"), "{source:?}");
    }
    assert!(TokenProvider::builder(source().parameter("scope", "a")).build().is_ok());
}

/// Row 109.
#[tokio::test(start_paused = true)]
async fn refresh_token_is_replaced_or_kept() {
    let endpoint = Endpoint::default();
    let source = by_refresh_token(&endpoint);
    let first = fetch(&source).await.unwrap();
    let second = renewed(&source, &first).await.unwrap();
    assert_eq!(second.refresh_token(), Some("refresh-2"));

    // A response without one, or with an empty one, does not end it, however often.
    for body in [r#"{"access_token":"a"}"#, r#"{"access_token":"b","refresh_token":""}"#] {
        for _ in 0..3 {
            endpoint.clone().responds(200, body);
            let kept = renewed(&source, &second).await.unwrap();
            assert_eq!(kept.refresh_token(), Some("refresh-2"));
        }
    }
    renewed(&source, &second).await.unwrap();
    let mut expected = vec!["seed", "refresh-1"];
    expected.extend(["refresh-2"; 7]);
    assert_eq!(endpoint.values("refresh_token"), expected);
    assert_eq!(endpoint.values("client_id")[0], "id");
}

/// Row 110: presented once more, then it counts as spent.
#[tokio::test(start_paused = true)]
async fn lost_answer_presents_refresh_token_once_more() {
    for lost in [
        Act::Lose,
        Act::Answer(200, Vec::new(), Bytes::from_static(b"<html>")),
        Act::Answer(200, Vec::new(), Bytes::from_static(br#"{"error":"canary","access_token":"a"}"#)),
    ] {
        let endpoint = Endpoint::default();
        let source = by_refresh_token(&endpoint);
        let first = fetch(&source).await.unwrap();

        // The server has a grace period: it heals.
        endpoint.clone().then(lost.clone());
        assert!(renewed(&source, &first).await.unwrap_err().is_transient());
        let second = renewed(&source, &first).await.unwrap();
        assert_eq!(endpoint.values("refresh_token"), ["seed", "refresh-1", "refresh-1"]);

        // It has none.
        endpoint.clone().then(lost.clone()).then(lost);
        assert!(renewed(&source, &second).await.unwrap_err().is_transient());
        for _ in 0..3 {
            assert_eq!(renewed(&source, &second).await.unwrap_err().kind(), LoginRequired);
        }
        assert_eq!(endpoint.requests(), 5, "a spent refresh token is not presented");
    }
}

/// Row 110: the exchange is dropped, or its time is up.
#[tokio::test(start_paused = true)]
async fn dropped_exchange_counts_as_lost() {
    let endpoint = Endpoint::default().then(Act::Hang).then(Act::Hang);
    let source = by_refresh_token(&endpoint).timeout(Duration::from_secs(5));
    let dropped = tokio::time::timeout(Duration::from_secs(1), fetch(&source)).await;
    assert!(dropped.is_err());
    // Of two times the second is the last, so the error says what is left to do.
    assert_eq!(fetch(&source).await.unwrap_err().kind(), LoginRequired);
    assert_eq!(endpoint.values("refresh_token"), ["seed", "seed"]);
}

/// Row 111: what does not spend a refresh token is no reason to give it up, however often it happens.
#[tokio::test(start_paused = true)]
async fn unspent_refresh_token_is_presented_again() {
    let answer =
        |status, body: &'static str| Act::Answer(status, Vec::new(), Bytes::from_static(body.as_bytes()));
    for (act, expected) in [
        (Act::Refuse, Unavailable),
        (answer(503, ""), Unavailable),
        (answer(502, "<html>"), Unavailable),
        (answer(429, ""), Unavailable),
        (answer(408, ""), Unavailable),
        (answer(400, r#"{"error":"slow_down"}"#), Unavailable),
        (answer(401, r#"{"error":"invalid_client"}"#), Rejected),
        (answer(403, "<html>a firewall</html>"), Rejected),
        (answer(400, r#"{"error":"invalid_scope"}"#), Configuration),
        (answer(400, r#"{"error":"interaction_required"}"#), LoginRequired),
        (answer(404, ""), Configuration),
        (answer(200, r#"{"error":"incorrect_client_credentials"}"#), InvalidResponse),
        (answer(200, r#"{"error":"invalid_client"}"#), Rejected),
    ] {
        let endpoint = Endpoint::default();
        let source = by_refresh_token(&endpoint);
        let first = fetch(&source).await.unwrap();
        for _ in 0..4 {
            endpoint.clone().then(act.clone());
            assert_eq!(renewed(&source, &first).await.unwrap_err().kind(), expected);
        }
        assert_eq!(renewed(&source, &first).await.unwrap().refresh_token(), Some("refresh-2"));
        assert_eq!(endpoint.values("refresh_token")[1..], ["refresh-1"; 5]);
    }
}

/// Row 112: no request, and no POST, until the login.
#[tokio::test(start_paused = true)]
async fn rejected_refresh_token_requires_login() {
    let endpoint = Endpoint::default();
    let source = by_refresh_token(&endpoint);
    let provider = TokenProvider::new(source.clone());
    let first = provider.token().await.unwrap();

    endpoint.clone().responds(400, r#"{"error":"invalid_grant","error_description":"canary"}"#);
    let error = provider.refresh(&first).await.unwrap_err();
    assert_eq!(kind(&error), LoginRequired);
    assert!(error.to_string().contains("a user has to log in again"), "{error}");
    assert_eq!(provider.token().await.unwrap().generation(), 1, "a token that works is not taken away");

    advance(Duration::from_secs(3600)).await;
    for _ in 0..5 {
        assert_eq!(kind(&provider.token().await.unwrap_err()), LoginRequired);
        assert_eq!(kind(provider.status().last_error.as_ref().unwrap()), LoginRequired);
        sleep(Duration::from_secs(600)).await;
    }
    assert_eq!(endpoint.requests(), 2);

    assert_eq!(kind(&provider.token().await.unwrap_err()), LoginRequired);
    source.set_refresh_token("login-2");
    assert_eq!(provider.token().await.unwrap().generation(), 2, "at once");
    assert_eq!(endpoint.values("refresh_token"), ["seed", "refresh-1", "login-2"]);
}

/// Row 112: the same text may be set again, and an empty one is none.
#[tokio::test(start_paused = true)]
async fn login_may_set_any_refresh_token() {
    let endpoint = Endpoint::default();
    let source = endpoint.serve(OAuth2::refresh_token(server(), client(), ""));
    assert_eq!(fetch(&source).await.unwrap_err().kind(), LoginRequired);
    assert_eq!(endpoint.requests(), 0);

    source.set_refresh_token("login");
    endpoint.clone().responds(400, r#"{"error":"invalid_grant"}"#);
    assert_eq!(fetch(&source).await.unwrap_err().kind(), LoginRequired);
    assert_eq!(fetch(&source).await.unwrap_err().kind(), LoginRequired);
    assert_eq!(endpoint.requests(), 1);
    source.set_refresh_token("login");
    assert!(fetch(&source).await.is_ok());
}

/// Row 112: the rejection cannot be read, because its body is too long.
#[tokio::test(start_paused = true)]
async fn unreadable_rejection_presents_refresh_token_once_more() {
    let endpoint = Endpoint::default();
    let source = by_refresh_token(&endpoint);
    let first = fetch(&source).await.unwrap();
    let body = format!(r#"{{"error":"invalid_grant","x":"{}"}}"#, "a".repeat(70 * 1024));
    for expected in [Rejected, LoginRequired, LoginRequired] {
        endpoint.clone().responds(400, body.clone());
        assert_eq!(renewed(&source, &first).await.unwrap_err().kind(), expected);
    }
    assert_eq!(endpoint.values("refresh_token"), ["seed", "refresh-1", "refresh-1"]);
}

/// Row 127: the access token cannot be used, but the refresh token that came with it is the one that works.
#[tokio::test(start_paused = true)]
async fn refresh_token_of_unusable_response_is_kept() {
    let endpoint = Endpoint::default();
    let source = by_refresh_token(&endpoint);
    let first = fetch(&source).await.unwrap();
    for number in 1..=3 {
        let body = format!(r#"{{"access_token":"a","token_type":"DPoP","refresh_token":"next-{number}"}}"#);
        endpoint.clone().responds(200, body);
        assert_eq!(renewed(&source, &first).await.unwrap_err().kind(), InvalidResponse);
    }
    renewed(&source, &first).await.unwrap();
    assert_eq!(endpoint.values("refresh_token"), ["seed", "refresh-1", "next-1", "next-2", "next-3"]);
}

/// Row 127: the server grants a refresh token that was spent before.
#[tokio::test(start_paused = true)]
async fn refresh_token_may_be_granted_again() {
    let endpoint = Endpoint::default();
    let source = by_refresh_token(&endpoint);
    let mut token = fetch(&source).await.unwrap();
    let mut expected = vec!["seed", "refresh-1"];
    for next in ["one", "two", "one", "two", "one"] {
        endpoint.clone().responds(200, format!(r#"{{"access_token":"a","refresh_token":"{next}"}}"#));
        token = renewed(&source, &token).await.unwrap();
        expected.push(next);
    }
    renewed(&source, &token).await.unwrap();
    assert_eq!(endpoint.values("refresh_token"), expected);
}

/// Row 126: a login sets its refresh token once more while it is exchanged, and another one while that is rejected.
#[tokio::test(start_paused = true)]
async fn refresh_token_may_be_set_during_exchange() {
    let endpoint = Endpoint::default().then(Act::Late(Duration::from_secs(1)));
    let source = by_refresh_token(&endpoint);
    let provider = TokenProvider::new(source.clone());
    let refreshing = tokio::spawn({
        let provider = provider.clone();
        async move { provider.token().await }
    });
    sleep(Duration::from_millis(500)).await;
    source.set_refresh_token("seed");
    refreshing.await.unwrap().unwrap();
    advance(Duration::from_secs(3600)).await;
    provider.token().await.unwrap();
    assert_eq!(endpoint.values("refresh_token"), ["seed", "refresh-1"]);

    endpoint.clone().then(Act::Late(Duration::from_secs(1))).responds(400, r#"{"error":"invalid_grant"}"#);
    advance(Duration::from_secs(3600)).await;
    let refreshing = tokio::spawn({
        let provider = provider.clone();
        async move { provider.token().await }
    });
    sleep(Duration::from_millis(500)).await;
    source.set_refresh_token("login-2");
    refreshing.await.unwrap().unwrap();
    assert_eq!(endpoint.values("refresh_token")[2..], ["refresh-2", "login-2"]);
}

/// A subject's revision may be a hash of its credential.
#[tokio::test]
async fn revision_of_subject_may_be_any_number() {
    struct Subject;

    impl TokenSource for Subject {
        async fn fetch(&self, _: &TokenRequest<'_>) -> Result<Token, SourceError> {
            Ok(Token::builder("subject").build()?)
        }

        fn revision(&self) -> u64 {
            u64::MAX
        }
    }
    let source = OAuth2::jwt_bearer(server(), client(), Subject);
    let before = source.revision();
    source.set_secret("new");
    assert_ne!(source.revision(), before);
}

/// A login replaces a refresh token that still works: it may be another user's.
#[tokio::test(start_paused = true)]
async fn login_replaces_working_refresh_token() {
    let endpoint = Endpoint::default();
    let source = by_refresh_token(&endpoint);
    let first = fetch(&source).await.unwrap();
    source.clone().set_refresh_token("login-2");
    let second = renewed(&source, &first).await.unwrap();
    renewed(&source, &second).await.unwrap();
    assert_eq!(endpoint.values("refresh_token"), ["seed", "login-2", "refresh-2"]);
}

/// A rejected client secret ends with the new one, and costs no refresh token.
#[tokio::test(start_paused = true)]
async fn new_secret_ends_rejection_at_once() {
    let endpoint = Endpoint::default();
    let source = endpoint.serve(OAuth2::refresh_token(server(), client(), "seed"));
    let provider = TokenProvider::new(source.clone());
    endpoint.clone().responds(401, r#"{"error":"invalid_client"}"#);
    assert_eq!(kind(&provider.token().await.unwrap_err()), Rejected);
    assert_eq!(kind(&provider.token().await.unwrap_err()), Rejected);
    assert_eq!(endpoint.requests(), 1);

    source.set_secret("new");
    provider.token().await.unwrap();
    let expected = format!("Basic {}", BASE64_STANDARD.encode("id:new"));
    assert_eq!(endpoint.header(AUTHORIZATION.as_str()).unwrap(), expected.as_str());
    assert_eq!(endpoint.values("refresh_token"), ["seed", "seed"]);
}

/// Row 119: the metadata of an issuer: where it is looked for, that it is fetched once, and that it must be the issuer's.
#[tokio::test(start_paused = true)]
async fn issuer_metadata_names_token_endpoint() {
    let metadata =
        |issuer: &str, endpoint: &str| format!(r#"{{"issuer":"{issuer}","token_endpoint":"{endpoint}"}}"#);
    let found = metadata("https://login.example/tenant", TOKEN_ENDPOINT);
    let uris = |endpoint: &Endpoint| -> Vec<_> {
        endpoint.script().requests.iter().map(|request| request.uri().to_string()).collect()
    };
    const OAUTH: &str = "https://login.example/.well-known/oauth-authorization-server/tenant";
    const OPENID: &str = "https://login.example/tenant/.well-known/openid-configuration";
    let issuer = || OAuth2::client_credentials(Server::issuer("https://login.example/tenant"), client());

    let endpoint = Endpoint::default().responds(200, found.clone());
    let source = endpoint.serve(issuer());
    fetch(&source).await.unwrap();
    fetch(&source.clone()).await.unwrap();
    assert_eq!(uris(&endpoint), [OAUTH, TOKEN_ENDPOINT, TOKEN_ENDPOINT]);

    // An outage is not remembered, and the other place is used if there is nothing in the first.
    let endpoint = Endpoint::default().responds(503, "").responds(404, "").responds(200, found.clone());
    let source = endpoint.serve(issuer());
    assert_eq!(fetch(&source).await.unwrap_err().kind(), Unavailable);
    fetch(&source).await.unwrap();
    assert_eq!(uris(&endpoint), [OAUTH, OAUTH, OPENID, TOKEN_ENDPOINT]);

    for (body, hint) in [
        (metadata("https://login.example/tenant/", TOKEN_ENDPOINT), "is of another issuer"),
        (metadata("https://evil.example/canary", "https://evil.example/canary"), "is of another issuer"),
        (r#"{"issuer":"https://login.example/tenant"}"#.to_owned(), "has no valid token_endpoint"),
        (
            metadata("https://login.example/tenant", "https://login.example/token#x"),
            "has no valid token_endpoint",
        ),
        (
            metadata("https://login.example/tenant", "http://login.example/canary"),
            "must not be plaintext http",
        ),
    ] {
        let endpoint = Endpoint::default().responds(200, body);
        let error = fetch(&endpoint.serve(issuer())).await.unwrap_err();
        assert_eq!(error.kind(), Configuration, "{error}");
        assert!(error.to_string().contains(hint) && !error.to_string().contains("canary"), "{error}");
        assert_eq!(endpoint.requests(), 1);
    }
    // A clone with a weaker rule does not decide for this one.
    let plaintext = metadata("https://login.example/tenant", "http://login.example/token");
    let endpoint = Endpoint::default().responds(200, plaintext.clone());
    let strict = Server::issuer("https://login.example/tenant");
    let weak = OAuth2::client_credentials(strict.clone().allow_plaintext(), client());
    fetch(&endpoint.serve(weak)).await.unwrap();
    endpoint.clone().responds(200, plaintext);
    let error = fetch(&endpoint.serve(OAuth2::client_credentials(strict, client()))).await.unwrap_err();
    assert!(error.to_string().contains("must not be plaintext http"), "{error}");

    let endpoint = Endpoint::default().responds(200, format!("\u{feff}{found}"));
    fetch(&endpoint.serve(issuer())).await.unwrap();
    let endpoint = Endpoint::default().responds(200, "<html>").responds(404, "");
    let error = fetch(&endpoint.serve(issuer())).await.unwrap_err();
    assert!(error.kind() == Configuration && error.to_string().contains("has no metadata"), "{error}");
}

/// Each grant over a real socket, with the metadata of the issuer, until the API accepts its token.
#[tokio::test]
async fn api_accepts_token_of_each_grant() {
    let server = AuthServer::start().await.unwrap();
    let issuer = || Server::issuer(server.issuer());
    let client = || ClientAuth::basic(server.client_id(), server.client_secret());
    let key = || SigningKey::es256(&server.signing_key());
    let assertion = || Assertion::new(key()).issuer("app").subject("user").audience(server.issuer());
    for source in [
        OAuth2::client_credentials(issuer(), client()),
        OAuth2::client_credentials(issuer(), ClientAuth::post(server.client_id(), server.client_secret())),
        OAuth2::client_credentials(issuer(), ClientAuth::private_key_jwt(server.client_id(), key())),
        OAuth2::client_credentials(
            Server::token_endpoint(server.token_endpoint()),
            ClientAuth::private_key_jwt(server.client_id(), key().key_id("1")),
        ),
        OAuth2::refresh_token(issuer(), ClientAuth::public(server.client_id()), server.log_in()),
        OAuth2::token_exchange(issuer(), client(), assertion()),
        OAuth2::jwt_bearer(issuer(), ClientAuth::none(), assertion()),
    ] {
        let provider = TokenProvider::builder(source.clone()).build().unwrap();
        let service = BearerAuthLayer::with_provider(provider.clone()).layer(support::http1());
        // The second assertion is not the first one again, which the server would reject.
        for generation in 1..=2 {
            let request =
                Request::get(format!("{}videos", server.uri())).body(Empty::<Bytes>::new()).unwrap();
            let response = service.clone().oneshot(request).await.unwrap();
            assert_eq!(response.status(), 200, "{source:?}");
            assert_eq!(provider.status().generation, generation, "{source:?}");
            provider.invalidate();
        }
    }
    let counters = server.counters();
    assert_eq!((counters.rejected_clients, counters.rejected_oauth_grants), (0, 0));
    assert_eq!(counters.metadata_requests, 6);
}

#[tokio::test]
async fn sources_share_the_client_of_one() {
    let endpoint = Endpoint::default();
    let server = || Server::token_endpoint(TOKEN_ENDPOINT);
    let template =
        endpoint.serve(OAuth2::client_credentials(server(), ClientAuth::basic("template", "secret")));
    for id in ["first", "second"] {
        let client = ClientAuth::post(id, "secret");
        fetch(&OAuth2::client_credentials(server(), client).with_client_of(&template)).await.unwrap();
    }
    assert_eq!(endpoint.values("client_id"), ["first", "second"]);
}

/// Row 121: the claims and the header of an assertion, and a key of each kind. `tests/auth_server.rs` and `interop` verify the
/// signatures.
#[tokio::test]
async fn each_assertion_is_new() {
    let server = AuthServer::start().await.unwrap();
    let key = SigningKey::es256(&server.signing_key()).key_id("key-1");
    let assertion = Assertion::new(key).issuer("app").claim("scope", "a b").lifetime(Duration::from_secs(60));
    let decode = |part: &str| -> serde_json::Value {
        serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(part).unwrap()).unwrap()
    };
    let request = TokenRequest::new(RefreshReason::Missing);
    let mut ids = Vec::new();
    for _ in 0..2 {
        let token = assertion.fetch(&request).await.unwrap();
        let parts: Vec<_> = token.access_token().split('.').collect();
        assert_eq!(decode(parts[0]), serde_json::json!({ "typ": "JWT", "alg": "ES256", "kid": "key-1" }));
        let claims = decode(parts[1]);
        let now = UNIX_EPOCH.elapsed().unwrap().as_secs();
        let (issued, expires) = (claims["iat"].as_u64().unwrap(), claims["exp"].as_u64().unwrap());
        assert!(issued < now && expires <= now + 60 && expires > issued + 60, "{claims}");
        assert_eq!((&claims["iss"], &claims["scope"]), (&"app".into(), &"a b".into()));
        ids.push(claims["jti"].as_str().unwrap().to_owned());
    }
    assert!(ids[0] != ids[1] && ids[0].len() == 22, "{ids:?}");
}

#[test]
fn invalid_signing_key_error_quotes_nothing() {
    let pem = "-----BEGIN PRIVATE KEY-----\nY2FuYXJ5\n-----END PRIVATE KEY-----\n";
    for key in
        [SigningKey::es256(pem), SigningKey::rs256(pem), SigningKey::ed_dsa(pem), SigningKey::es256("canary")]
    {
        let source = OAuth2::client_credentials(server(), ClientAuth::private_key_jwt("id", key));
        let error = TokenProvider::builder(source.clone()).build().unwrap_err();
        assert!(error.to_string().contains("the signing key must be a private key for "), "{error}");
        let shown = format!("{error} {error:?} {source:?}");
        assert!(!shown.contains("canary") && !shown.contains("Y2FuYXJ5"), "{shown}");
    }
    let days = Assertion::new(SigningKey::es256("")).lifetime(Duration::from_secs(2 * 24 * 3600));
    assert!(
        days.validate().unwrap_err().to_string().contains("lifetime must be >= 1s and <= 1d, got 172800s")
    );
}
