//! [`OAuth2`]: what each grant sends, what a response of the token endpoint means, and which refresh token is presented.
#![cfg(all(feature = "oauth2-jwt", feature = "default-client"))]

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
use http_body_util::Full;
use tokio::time::{advance, sleep};
use tower::{Layer, ServiceExt};
use tower_bearer::{
    ApiVideo, BearerAuthLayer, BoxError, Credential, Error, OAuth2, RefreshReason, RetryPolicy, SourceError,
    SourceErrorKind, StaticToken, Token, TokenClient, TokenProvider, TokenRequest, TokenSource,
    challenge::Challenge,
    oauth2::{Assertion, ClientAuth, Server, SigningKey},
    source_fn,
};
use tower_bearer_testing::AuthServer;

use SourceErrorKind::{Configuration, InvalidResponse, LoginRequired, Rejected, Unavailable};

use crate::support::{self, chain};

const TOKEN_ENDPOINT: &str = "https://login.example/token";

/// What the token endpoint does with one request.
#[derive(Clone, Debug)]
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
    /// The response to all requests after the last act.
    always: Option<(u16, Bytes)>,
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

    /// Responds to all requests with this status and body.
    fn always(self, status: u16, body: impl Into<Bytes>) {
        self.script().always = Some((status, body.into()));
    }

    fn never(self) {
        self.script().always = None;
    }

    fn client(&self) -> TokenClient {
        let endpoint = self.clone();
        TokenClient::with_service(tower::service_fn(move |request| {
            let endpoint = endpoint.clone();
            async move { endpoint.answer(request).await }
        }))
    }

    fn serve(&self, source: OAuth2) -> OAuth2 {
        source.with_client(self.client())
    }

    fn next(&self) -> Act {
        let mut script = self.script();
        let always = script.always.clone().map(|(status, body)| Act::Answer(status, Vec::new(), body));
        script.acts.pop_front().or(always).unwrap_or_else(|| {
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
    endpoint.serve(OAuth2::login(server(), ClientAuth::public("id")))
}

/// A provider of a login, whose first refresh token is `seed`.
fn logged_in(endpoint: &Endpoint) -> TokenProvider {
    let retry = RetryPolicy::new().max_retries(0);
    TokenProvider::builder(by_refresh_token(endpoint)).login("seed").retry(retry).build().unwrap()
}

/// Obtains another token.
async fn another(provider: &TokenProvider) -> Result<Token, Error> {
    provider.invalidate();
    provider.token().await
}

async fn fetch(source: &impl TokenSource) -> Result<Token, SourceError> {
    let request = TokenRequest::new(RefreshReason::Missing);
    let is_login = format!("{:?}", source.credential()).contains("is_login: true");
    source.fetch(&if is_login { request.with_refresh_token("seed") } else { request }).await
}

async fn renewed(source: &OAuth2, previous: &Token) -> Result<Token, SourceError> {
    let request = TokenRequest::new(RefreshReason::Expired).with_previous(previous.clone());
    let is_login = format!("{source:?}").contains(r#"grant: "refresh_token""#);
    let refresh_token = previous.refresh_token().unwrap_or("seed");
    source.fetch(&if is_login { request.with_refresh_token(refresh_token) } else { request }).await
}

fn kind(error: &Error) -> SourceErrorKind {
    match error {
        Error::Source(error) => error.kind(),
        error => panic!("not of the source: {error}"),
    }
}

/// A token endpoint gives any answer that a client has to survive, and both sources read it in the same way.
#[tokio::test(start_paused = true)]
async fn each_answer_has_its_meaning() {
    const TOKEN: &str = r#""access_token":"abc""#;
    let lifetime = |expires_in: &str| format!(r#"{{{TOKEN},"expires_in":{expires_in}}}"#);
    let of_type = |token_type: &str| format!(r#"{{{TOKEN},"token_type":{token_type}}}"#);
    let with_error = |error: &str| format!(r#"{{{TOKEN},"error":{error}}}"#);
    let error =
        |code: &str| format!(r#"{{"error":"{code}","error_description":"canary","error_uri":"canary"}}"#);
    let secs = |secs| Some(Duration::from_secs(secs));
    let api_video = |endpoint: &Endpoint| ApiVideo::new("canary-key").with_client(endpoint.client());

    // The lifetime of the token.
    for (status, body, expected) in [
        (200, lifetime("3600"), secs(3600)),
        (201, lifetime("3600"), secs(3600)),
        (200, lifetime(r#""3600""#), secs(3600)),
        (200, lifetime(r#"" 3600 ""#), secs(3600)),
        (200, lifetime("3599.5"), Some(Duration::from_millis(3_599_500))),
        (200, lifetime("0"), None),
        (200, lifetime("-1"), None),
        (200, lifetime(r#""-inf""#), None),
        (200, lifetime(r#""NaN""#), None),
        (200, lifetime("0.05"), None),
        (200, lifetime(r#""""#), None),
        (200, lifetime(r#""soon""#), None),
        (200, lifetime("null"), None),
        (200, lifetime("true"), None),
        (200, lifetime("[3600]"), None),
        (200, format!("{{{TOKEN}}}"), None),
        (200, lifetime("9223372036854775808"), secs(10 * 365 * 24 * 3600)),
        (200, lifetime("1e300"), secs(10 * 365 * 24 * 3600)),
        (200, lifetime(r#""inf""#), secs(10 * 365 * 24 * 3600)),
        (200, of_type(r#""Bearer""#), None),
        (200, of_type(r#""bearer""#), None),
        (200, of_type(r#""BEARER""#), None),
        (200, of_type("null"), None),
        (200, of_type(r#""N_A","issued_token_type":"urn:ietf:params:oauth:token-type:jwt""#), None),
        (200, of_type(r#""BearerToken""#), None),
        (200, of_type(r#""""#), None),
        (200, of_type(r#"["Bearer"]"#), None),
        (200, of_type(r#"["DPoP", "Bearer"]"#), None),
        (200, of_type("[]"), None),
        (200, of_type(r#"{"type":"Bearer"}"#), None),
        (200, of_type("1"), None),
        (200, format!(r#"{{{TOKEN},"scope":["a","b"],"refresh_token":""}}"#), None),
        (200, format!(r#"{{{TOKEN},"refresh_token":null}}"#), None),
        (200, with_error("null"), None),
        (200, with_error(r#""""#), None),
        (200, with_error("false"), None),
        (200, with_error("0"), None),
        (200, with_error("0.0"), None),
        (200, with_error("[]"), None),
        (200, with_error("{}"), None),
        (200, with_error(r#""0""#), None),
        (200, with_error(r#"" none ""#), None),
        (200, "access_token=abc&error=0".to_owned(), None),
        (200, "access_token=abc&error=false".to_owned(), None),
        (
            200,
            r#"{"access_token":"canary","access_token":"abc","expires_in":1,"expires_in":7}"#.to_owned(),
            secs(7),
        ),
        (200, format!("\u{feff}{}", lifetime("7")), secs(7)),
        (200, "access_token=abc&token_type=bearer&expires_in=7&scope=a+b".to_owned(), secs(7)),
        (200, "\u{feff}access_token=abc&expires_in=".to_owned(), None),
    ] {
        let endpoint = Endpoint::default().responds(status, body.clone()).responds(status, body.clone());
        let token = fetch(&by_client(&endpoint)).await.unwrap_or_else(|error| panic!("{body}: {error}"));
        assert_eq!((token.access_token(), token.remaining()), ("abc", expected), "{body}");
        assert_eq!(token.refresh_token(), None, "{body}");
        let token = fetch(&api_video(&endpoint)).await.unwrap_or_else(|error| panic!("{body}: {error}"));
        assert_eq!((token.access_token(), token.remaining()), ("abc", expected.or(secs(3600))), "{body}");
    }

    // The kind of the error: of OAuth2, and of ApiVideo.
    let long = format!(r#"{{{TOKEN},"x":"{}"}}"#, "a".repeat(70 * 1024));
    let both = |kind| (kind, kind);
    for (status, body, expected) in [
        (200, of_type(r#""DPoP""#), both(InvalidResponse)),
        (200, of_type(r#""dpop""#), both(InvalidResponse)),
        (200, of_type(r#""PoP""#), both(InvalidResponse)),
        (200, of_type(r#""mac""#), both(InvalidResponse)),
        (200, of_type(r#"["DPoP"]"#), both(InvalidResponse)),
        (200, r#"{"access_token":"canary\r\nX: y"}"#.to_owned(), both(InvalidResponse)),
        (200, r#"{"access_token":""}"#.to_owned(), both(InvalidResponse)),
        (200, r#"{"access_token":["canary"]}"#.to_owned(), both(InvalidResponse)),
        (200, r#"{"access_token":null,"x":"canary"}"#.to_owned(), both(InvalidResponse)),
        (200, r#"{"token":"canary"}"#.to_owned(), both(InvalidResponse)),
        (200, r#"{"access_token":"canary""#.to_owned(), both(InvalidResponse)),
        (200, error("invalid_grant"), both(Rejected)),
        (200, error("invalid_scope"), both(Configuration)),
        (200, error("canary"), both(Rejected)),
        (200, with_error(r#""invalid_grant""#), both(InvalidResponse)),
        (200, with_error(r#"{"code":"canary"}"#), both(InvalidResponse)),
        (200, with_error("1"), both(InvalidResponse)),
        (200, with_error("true"), both(InvalidResponse)),
        (200, with_error(r#"["canary"]"#), both(InvalidResponse)),
        (200, "error=invalid_client&error_description=canary".to_owned(), both(Rejected)),
        (200, "<html>canary</html>".to_owned(), both(InvalidResponse)),
        (202, "<html>canary</html>".to_owned(), both(InvalidResponse)),
        (202, String::new(), both(InvalidResponse)),
        (200, String::new(), both(InvalidResponse)),
        (204, String::new(), both(InvalidResponse)),
        (200, "5".to_owned(), both(InvalidResponse)),
        (200, "null".to_owned(), both(InvalidResponse)),
        (200, r#""canary""#.to_owned(), both(InvalidResponse)),
        (200, long.clone(), both(InvalidResponse)),
        (400, error("invalid_grant"), both(Rejected)),
        (400, format!("\u{feff}{}", error("invalid_grant")), both(Rejected)),
        (400, "error=invalid_grant&error_description=canary".to_owned(), both(Rejected)),
        (401, error("invalid_client"), both(Rejected)),
        (400, error("unauthorized_client"), both(Rejected)),
        (403, error("access_denied"), both(Rejected)),
        (400, error("invalid_scope"), (Configuration, Rejected)),
        (400, error("invalid_target"), (Configuration, Rejected)),
        (400, error("invalid_request"), (Configuration, Rejected)),
        (400, error("unsupported_grant_type"), (Configuration, Rejected)),
        (400, error("use_dpop_nonce"), (Configuration, Rejected)),
        (400, error("interaction_required"), (LoginRequired, Rejected)),
        (400, error("temporarily_unavailable"), (Unavailable, Rejected)),
        (400, error("server_error"), (Unavailable, Rejected)),
        (400, error("slow_down"), (Unavailable, Rejected)),
        (400, error("canary"), both(Rejected)),
        (400, error("INVALID_GRANT"), both(Rejected)),
        (400, r#"{"error":""}"#.to_owned(), both(Rejected)),
        (400, r#"{"error":0}"#.to_owned(), both(Rejected)),
        (401, r#"{"message":"canary"}"#.to_owned(), both(Rejected)),
        (400, r#"{"errors":[{"errorType":"invalid_grant","message":"canary"}]}"#.to_owned(), both(Rejected)),
        (400, r#"{"code":"canary.refresh_token.expired"}"#.to_owned(), both(Rejected)),
        (401, String::new(), both(Rejected)),
        (403, String::new(), both(Rejected)),
        // No verdict on a credential.
        (400, "canary".to_owned(), both(InvalidResponse)),
        (401, "canary".to_owned(), both(InvalidResponse)),
        (403, "<html>canary</html>".to_owned(), both(InvalidResponse)),
        (403, "<?xml version='1.0'?><canary/>".to_owned(), both(InvalidResponse)),
        (403, "5".to_owned(), both(InvalidResponse)),
        (403, r#"["canary"]"#.to_owned(), both(InvalidResponse)),
        (403, r#"<a href="/?x=1&error=invalid_scope&canary">"#.to_owned(), both(InvalidResponse)),
        (200, r#"<a href="/?access_token=canary&expires_in=1">"#.to_owned(), both(InvalidResponse)),
        (
            400,
            format!(r#"{{"error":"invalid_grant","x":"{}"}}"#, "a".repeat(70 * 1024)),
            both(InvalidResponse),
        ),
        (404, "<html>canary</html>".to_owned(), both(Configuration)),
        (404, error("canary"), both(Configuration)),
        (302, String::new(), both(Configuration)),
        (405, String::new(), both(Configuration)),
        (410, String::new(), both(Configuration)),
        (418, error("canary"), both(Rejected)),
        (408, error("invalid_grant"), both(Unavailable)),
        (425, error("invalid_grant"), both(Unavailable)),
        (429, error("invalid_grant"), both(Unavailable)),
        (500, error("invalid_grant"), both(Unavailable)),
        (503, "<html>canary</html>".to_owned(), both(Unavailable)),
    ] {
        let endpoint = Endpoint::default().responds(status, body.clone()).responds(status, body.clone());
        let oauth2 = fetch(&by_client(&endpoint)).await.unwrap_err();
        let by_key = TokenRequest::new(RefreshReason::Missing);
        let api_video = api_video(&endpoint).fetch(&by_key).await.unwrap_err();
        assert_eq!((oauth2.kind(), api_video.kind()), expected, "{status} {body:.99}: {oauth2}, {api_video}");
        for (error, url) in [(oauth2, TOKEN_ENDPOINT), (api_video, "https://ws.api.video/auth/api-key")] {
            let shown = format!("{} {error:?}", chain(&error));
            assert!(!shown.to_lowercase().contains("canary"), "{shown}");
            assert!(shown.contains(url), "{shown}");
        }
    }
}

/// A token response has a byte that is not UTF-8, or a coding that is none.
#[tokio::test(start_paused = true)]
async fn readable_response_is_used() {
    let latin: &[u8] = b"{\"access_token\":\"abc\",\"name\":\"M\xfcller\"}";
    let endpoint = Endpoint::default().then(Act::Answer(200, Vec::new(), latin.into()));
    assert_eq!(fetch(&by_client(&endpoint)).await.unwrap().access_token(), "abc");
    let rejection: &[u8] = b"{\"error\":\"invalid_grant\",\"error_description\":\"Ung\xfcltig\"}";
    let endpoint = Endpoint::default().then(Act::Answer(400, Vec::new(), rejection.into()));
    assert_eq!(fetch(&by_client(&endpoint)).await.unwrap_err().kind(), Rejected);
    let token: &[u8] = br#"{"access_token":"abc"}"#;
    for (coding, is_used) in
        [("none", true), ("", true), ("utf-8", true), ("Identity", true), ("gzip", false), ("BR", false)]
    {
        let endpoint =
            Endpoint::default().then(Act::Answer(200, vec![("content-encoding", coding)], token.into()));
        assert_eq!(fetch(&by_client(&endpoint)).await.is_ok(), is_used, "{coding}");
    }
}

/// A firewall responds in place of the token endpoint, with a page, whose status and content type are shown.
#[tokio::test(start_paused = true)]
async fn page_of_firewall_is_no_verdict() {
    for (status, content_type, body) in [
        (403, "text/html; charset=UTF-8", "<!DOCTYPE html><html>Attention Required!</html>"),
        (401, "text/html", "<h1>Proxy login</h1>"),
        (400, "application/xml", "<Error><Code>AccessDenied</Code></Error>"),
        (202, "text/html", ""),
        (403, "text/html", ""),
    ] {
        let act = Act::Answer(status, vec![("content-type", content_type)], body.into());
        let endpoint = Endpoint::default();
        for source in [by_client(&endpoint), by_refresh_token(&endpoint)] {
            endpoint.clone().then(act.clone());
            let error = fetch(&source).await.unwrap_err();
            let expected = content_type.split(';').next().unwrap();
            assert_eq!(error.kind(), InvalidResponse, "{error}");
            assert!(error.to_string().contains(&format!("HTTP {status}")), "{error}");
            assert!(error.to_string().contains(expected), "{error}");
        }
        // A key is not rejected by it, and a refresh token is not given up for the key at once.
        let endpoint = Endpoint::default().responds(200, r#"{"access_token":"a","refresh_token":"r"}"#);
        let source = ApiVideo::new("key").with_client(endpoint.client());
        let provider =
            TokenProvider::builder(source).retry(RetryPolicy::new().max_retries(0)).build().unwrap();
        provider.token().await.unwrap();
        endpoint.clone().then(act.clone()).then(act.clone()).then(act.clone());
        for _ in 0..2 {
            assert_eq!(kind(&another(&provider).await.unwrap_err()), InvalidResponse);
        }
        let paths: Vec<_> =
            endpoint.script().requests.iter().map(|request| request.uri().path().to_owned()).collect();
        assert_eq!(paths[1..], ["/auth/refresh", "/auth/refresh", "/auth/api-key"]);
    }
}

/// AWS WAF asks a browser to solve a puzzle, with any status.
#[tokio::test(start_paused = true)]
async fn puzzle_of_firewall_is_no_verdict() {
    for status in [202, 403, 405] {
        let act = Act::Answer(status, vec![("x-amzn-waf-action", "captcha")], Bytes::new());
        let endpoint = Endpoint::default().then(act.clone()).then(act);
        let api_video = ApiVideo::new("key").with_client(endpoint.client());
        for error in [fetch(&by_client(&endpoint)).await.unwrap_err(), fetch(&api_video).await.unwrap_err()] {
            assert_eq!(error.kind(), InvalidResponse, "{error}");
        }
    }
}

/// A status that would be a rejection has `Retry-After`, as GitHub's 403 for a client that asks too often.
#[tokio::test(start_paused = true)]
async fn asked_delay_is_no_rejection() {
    for status in [400, 401, 403, 404, 409, 422] {
        for body in
            ["", r#"{"message":"You have exceeded a secondary rate limit"}"#, "<html>", r#"{"error":"x"}"#]
        {
            let act = Act::Answer(status, vec![("retry-after", "7")], body.into());
            let endpoint = Endpoint::default().then(act.clone()).then(act);
            let (oauth2, api_video) =
                (by_client(&endpoint), ApiVideo::new("key").with_client(endpoint.client()));
            for error in [fetch(&oauth2).await.unwrap_err(), fetch(&api_video).await.unwrap_err()] {
                assert_eq!(error.kind(), Unavailable, "{status} {body}: {error}");
                assert_eq!(error.retry_after(), Some(Duration::from_secs(7)));
            }
        }
    }
    // What a registered code says is clear.
    let act = Act::Answer(401, vec![("retry-after", "7")], r#"{"error":"invalid_client"}"#.into());
    let error = fetch(&by_client(&Endpoint::default().then(act))).await.unwrap_err();
    assert_eq!((error.kind(), error.retry_after()), (Rejected, None));
}

/// `expires_in` is zero, negative, or over when the response arrives.
#[tokio::test(start_paused = true)]
async fn lifetime_that_is_over_is_unknown() {
    let (second, minute) = (Duration::from_secs(1), Duration::from_secs(60));
    for (default, expected) in [(None, None), (Some(minute), Some(minute - 2 * second))] {
        let endpoint = Endpoint::default()
            .then(Act::Late(2 * second))
            .responds(200, r#"{"access_token":"a","expires_in":2}"#);
        let source = by_client(&endpoint);
        let source = default.into_iter().fold(source, OAuth2::default_lifetime);
        let provider = TokenProvider::new(source);
        assert_eq!(provider.token().await.unwrap().remaining(), expected);
        sleep(minute / 2).await;
        provider.token().await.unwrap();
        assert_eq!(endpoint.requests(), 1);
    }
}

/// A refresh token expires before the access token (`refresh_expires_in` of Keycloak, or `refresh_token_expires_in` of
/// GitHub).
#[tokio::test(start_paused = true)]
async fn refresh_token_is_presented_before_it_expires() {
    for (fields, refreshed) in [
        (r#""expires_in":3600,"refresh_expires_in":1800"#, true),
        (r#""expires_in":3600,"refresh_token_expires_in":"1800""#, true),
        (r#""refresh_expires_in":1800"#, true),
        (r#""expires_in":3600,"refresh_expires_in":0"#, false),
        (r#""expires_in":3600,"refresh_expires_in":15897600"#, false),
    ] {
        let endpoint = Endpoint::default();
        endpoint.clone().responds(200, format!(r#"{{"access_token":"a","refresh_token":"r",{fields}}}"#));
        let provider = logged_in(&endpoint);
        let first = provider.token().await.unwrap();
        sleep(Duration::from_secs(1600)).await;
        assert_eq!(provider.token().await.unwrap().access_token(), "a", "{fields}");
        sleep(Duration::from_secs(190)).await;
        assert_eq!(provider.token().await.unwrap().access_token() != "a", refreshed, "{fields}");
        // The access token has not lost its lifetime.
        assert!(first.remaining().is_none_or(|left| left > Duration::from_secs(1700)), "{first:?}");
    }
    // Another grant has no use for a refresh token.
    let endpoint = Endpoint::default().responds(
        200,
        r#"{"access_token":"a","refresh_token":"r","expires_in":3600,"refresh_expires_in":60}"#,
    );
    let provider = TokenProvider::new(by_client(&endpoint));
    provider.token().await.unwrap();
    sleep(Duration::from_secs(1800)).await;
    provider.token().await.unwrap();
    assert_eq!(endpoint.requests(), 1);
}

/// An error code is registered, unknown, or not a text.
#[tokio::test(start_paused = true)]
async fn registered_code_is_in_message() {
    let endpoint = Endpoint::default().responds(401, r#"{"error":"invalid_client"}"#);
    let error = fetch(&by_client(&endpoint)).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "https://login.example/token responded with HTTP 401 invalid_client: check the client's id and its secret; of an assertion, the key, the audience and the clock"
    );
}

/// An authorization server asks for a delay, with any status.
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

/// A request for client credentials has another form than RFC 6749 says.
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

/// A server expects the client's authentication in the body, or none.
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

/// The subject of an exchange, or an assertion, was replaced since the last exchange.
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

/// The subject of an exchange cannot be had.
#[tokio::test]
async fn failing_subject_is_not_exchanged() {
    let endpoint = Endpoint::default();
    let subject = source_fn(|_| async { Err(SourceError::unavailable("the file is missing")) });
    let source = endpoint.serve(OAuth2::jwt_bearer(server(), ClientAuth::none(), subject));
    assert_eq!(fetch(&source).await.unwrap_err().to_string(), "the file is missing");
    assert_eq!(endpoint.requests(), 0);
}

/// An API's challenge asks for claims or scopes, in each of the forms that it is sent in.
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

/// An option would override what a grant sends, or is not valid.
#[test]
fn invalid_options_are_errors_of_build() {
    let source = || OAuth2::client_credentials(server(), client());
    let timeout = |timeout| source().with_client(TokenClient::new().timeout(timeout));
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
            r#"scopes must have one scope in each value, of visible ASCII, got "a b": trim it, or split it"#,
        ),
        (source().resources([""]), "resources must not be empty or have a fragment"),
        (source().resources(["https://a.example/#b"]), "resources must not be empty or have a fragment"),
        (source().default_lifetime(Duration::ZERO), "default_lifetime must be > 0, got 0s"),
        (
            OAuth2::client_credentials(server(), ClientAuth::post("id", "canary\n")),
            "the client secret must not begin or end with white space or a control character: trim it",
        ),
        (timeout(Duration::MAX), "timeout must be > 0 and <= 1h"),
        (timeout(Duration::ZERO), "timeout must be > 0 and <= 1h, got 0s"),
        (OAuth2::client_credentials(server(), ClientAuth::public("")), "the client id must not be empty"),
        (OAuth2::client_credentials(Server::issuer("/"), client()), "the issuer must have a scheme"),
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
    for (refresh_token, expected) in [
        (
            "canary\n".to_owned(),
            "the refresh token must not begin or end with white space or a control character: trim it",
        ),
        ("canary".repeat(10_000), "the refresh token must be at most 16384 bytes long"),
    ] {
        let source = OAuth2::login(server(), client());
        let error = TokenProvider::builder(source).login(refresh_token).build().unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        assert!(!format!("{error:?}").contains("canary"), "{error:?}");
    }
}

/// A line break at the end of an id, a secret or a parameter was taken along.
#[test]
fn blank_at_end_of_text_is_error_of_build() {
    let key = || SigningKey::es256(&"x".repeat(10));
    let server = |url: &str| OAuth2::client_credentials(Server::token_endpoint(url), client());
    let source = || server(TOKEN_ENDPOINT);
    let by = |client| OAuth2::client_credentials(self::server(), client);
    let signed = |assertion: Assertion| OAuth2::jwt_bearer(self::server(), ClientAuth::none(), assertion);
    for blank in ["\n", "\r\n", " ", "\t", "\0", "\u{a0}"] {
        for text in [format!("canary{blank}"), format!("{blank}canary")] {
            for (source, option) in [
                (by(ClientAuth::public(&text)), "the client id"),
                (by(ClientAuth::basic(&text, "secret")), "the client id"),
                (by(ClientAuth::post("id", &text)), "the client secret"),
                (by(ClientAuth::basic_raw("id", &text)), "the client secret"),
                (by(ClientAuth::private_key_jwt(&text, key())), "the client id"),
                (server(&text), "the token endpoint"),
                (OAuth2::client_credentials(Server::issuer(&text), client()), "the issuer"),
                (source().scopes([&text]), "scopes must have one scope"),
                (source().resources([&text]), "resource"),
                (source().audience(&text), "audience"),
                (source().parameter("name", &text), "name"),
                (source().parameter(&text, "value"), "the name of a parameter"),
                (
                    OAuth2::token_exchange(self::server(), client(), StaticToken::new("a"))
                        .subject_token_type(&text),
                    "subject_token_type",
                ),
                (signed(Assertion::new(key()).issuer(&text)), "iss of the assertion"),
                (signed(Assertion::new(key()).audience(&text)), "aud of the assertion"),
                (signed(Assertion::new(key()).subject(&text)), "sub of the assertion"),
                (signed(Assertion::new(key()).claim("scope", &text)), "scope of the assertion"),
                (signed(Assertion::new(key()).claim(&text, "value")), "the name of a claim"),
                (signed(Assertion::new(key().key_id(&text))), "key_id of the assertion"),
            ] {
                let error = TokenProvider::builder(source.clone()).build().unwrap_err().to_string();
                assert!(error.contains(option) && error.contains("trim it"), "{error}");
                assert!(!error.contains("canary") || option.starts_with("scopes"), "{error}");
            }
        }
    }
    // Within a text, a line break may be meant.
    assert!(TokenProvider::builder(source().parameter("claims", "{\n}")).build().is_ok());
}

/// An API takes the ID token as the bearer token, for as long as it says.
#[tokio::test(start_paused = true)]
async fn id_token_may_be_bearer_token() {
    let jwt = |claims: &str| format!("e30.{}.c2ln", BASE64_URL_SAFE_NO_PAD.encode(claims));
    let now = UNIX_EPOCH.elapsed().unwrap().as_secs();
    for (claims, expected) in [
        (format!(r#"{{"iat":{now},"exp":{}}}"#, now + 600), Some(600)),
        (format!(r#"{{"exp":{}}}"#, now + 600), Some(600)),
        // The server's clock is early, by this one.
        (format!(r#"{{"iat":{},"exp":{}}}"#, now + 300, now + 900), Some(600)),
        (format!(r#"{{"iat":{now}.25,"exp":{}.75}}"#, now + 600), Some(600)),
        // It is from a cache of the server's.
        (format!(r#"{{"iat":{},"exp":{}}}"#, now - 300, now + 300), Some(300)),
        (r#"{"iat":1000,"exp":1600}"#.to_owned(), None),
        (r#"{"iat":1600,"exp":1000}"#.to_owned(), None),
        (r#"{"exp":1000}"#.to_owned(), None),
        (r#"{"sub":"canary"}"#.to_owned(), None),
        ("canary".to_owned(), None),
    ] {
        let id_token = jwt(&claims);
        let body =
            format!(r#"{{"access_token":"a","expires_in":60,"id_token":"{id_token}","refresh_token":"r"}}"#);
        let endpoint = Endpoint::default().responds(200, body.clone()).responds(200, body);
        let source = by_refresh_token(&endpoint).scopes(["openid"]).use_id_token(true);
        let token = fetch(&source).await.unwrap();
        assert_eq!(token.access_token(), id_token);
        let left = token.remaining().map(|left| left.as_secs());
        let is_expected = expected
            .map_or(left.is_none(), |most: u64| left.is_some_and(|left| (most - 30..=most).contains(&left)));
        assert!(is_expected, "{claims}: {left:?}");
        let source = source.use_id_token(false);
        assert_eq!(fetch(&source).await.unwrap().access_token(), "a");
    }
    // Its refresh token is kept, also if there is no ID token (OpenID Connect Core §12.2).
    let endpoint = Endpoint::default().responds(200, r#"{"access_token":"canary","refresh_token":"next"}"#);
    let source = by_refresh_token(&endpoint).use_id_token(true);
    let provider = TokenProvider::builder(source).login("seed").build().unwrap();
    let error = provider.token().await.unwrap_err();
    assert_eq!(kind(&error), Configuration);
    assert!(
        error.to_string().contains("ask for the scope openid") && !error.to_string().contains("canary"),
        "{error}"
    );
    let _ = provider.ready().await;
    assert_eq!(endpoint.values("refresh_token"), ["seed", "next"]);
}

/// The token of one exchange is the subject of the next, whatever its type is called.
#[tokio::test]
async fn token_of_exchange_may_be_exchanged() {
    let of_type = r#"{"access_token":"inner","token_type":"N_A","issued_token_type":"urn:ietf:params:oauth:token-type:jwt"}"#;
    let (first, second) = (Endpoint::default().responds(200, of_type), Endpoint::default());
    let inner = first.serve(OAuth2::token_exchange(server(), client(), StaticToken::new("subject")));
    let outer = second.serve(OAuth2::token_exchange(server(), client(), inner));
    assert_eq!(fetch(&outer).await.unwrap().access_token(), "access-1");
    assert_eq!(first.values("subject_token"), ["subject"]);
    assert_eq!(second.values("subject_token"), ["inner"]);
}

/// The response to a refresh token has no refresh token.
#[tokio::test(start_paused = true)]
async fn refresh_token_is_replaced_or_kept() {
    let endpoint = Endpoint::default();
    let provider = logged_in(&endpoint);
    provider.token().await.unwrap();
    assert_eq!(another(&provider).await.unwrap().refresh_token(), Some("refresh-2"));

    // A response without one, or with an empty one, does not end it, however often.
    for body in [r#"{"access_token":"a"}"#, r#"{"access_token":"b","refresh_token":""}"#] {
        for _ in 0..3 {
            endpoint.clone().responds(200, body);
            assert_eq!(another(&provider).await.unwrap().refresh_token(), Some("refresh-2"));
        }
    }
    another(&provider).await.unwrap();
    let mut expected = vec!["seed", "refresh-1"];
    expected.extend(["refresh-2"; 7]);
    assert_eq!(endpoint.values("refresh_token"), expected);
    assert_eq!(endpoint.values("client_id")[0], "id");
}

/// The response to a refresh token is lost, which may have spent it. It is presented again, with backoff and without a
/// limit on the count: only a verdict ends a login.
#[tokio::test(start_paused = true)]
async fn only_verdict_ends_login() {
    for lost in [
        Act::Lose,
        Act::Hang,
        Act::Refuse,
        Act::Answer(200, Vec::new(), Bytes::from_static(b"<html>")),
        Act::Answer(200, Vec::new(), Bytes::from_static(b"{}")),
        Act::Answer(200, Vec::new(), Bytes::from_static(br#"{"error":"canary","access_token":"a"}"#)),
        Act::Answer(503, Vec::new(), Bytes::new()),
        Act::Answer(429, Vec::new(), Bytes::new()),
        Act::Answer(403, Vec::new(), Bytes::from_static(b"<html>a firewall</html>")),
        // What may be a rejection cannot be read.
        Act::Answer(400, Vec::new(), Bytes::from("{".to_owned() + &"a".repeat(70 * 1024))),
    ] {
        let endpoint = Endpoint::default();
        let provider = logged_in(&endpoint);
        provider.token().await.unwrap();
        for _ in 0..20 {
            endpoint.clone().then(lost.clone());
            assert!(another(&provider).await.unwrap_err().is_transient(), "{lost:?}");
        }
        endpoint.script().acts.clear();
        // The pause may be longer than a refresh.
        sleep(Duration::from_secs(60)).await;
        assert_eq!(another(&provider).await.unwrap().refresh_token(), Some("refresh-2"), "{lost:?}");
        // A refused connection is no request.
        let presented = endpoint.values("refresh_token");
        assert!(presented[1..].iter().all(|refresh_token| refresh_token == "refresh-1"), "{presented:?}");
    }
}

/// In an outage of an hour, the refresh token is presented after a tenth of it so far, and once a minute at least.
#[tokio::test(start_paused = true)]
async fn outage_bounds_rate_of_presentations() {
    let endpoint = Endpoint::default();
    let provider = logged_in(&endpoint);
    provider.token().await.unwrap();
    let begun = tokio::time::Instant::now();
    let mut times = Vec::new();
    while begun.elapsed() < Duration::from_secs(3600) {
        let before = endpoint.requests();
        endpoint.clone().responds(503, "");
        another(&provider).await.unwrap_err();
        times.extend((endpoint.requests() > before).then(|| begun.elapsed().as_secs()));
        sleep(Duration::from_millis(100)).await;
    }
    assert!((60..110).contains(&times.len()), "{}", times.len());
    let gaps: Vec<_> = times.windows(2).map(|pair| (pair[0], pair[1] - pair[0])).collect();
    assert!(gaps.iter().all(|(at, gap)| *gap <= 67 && gap + 1 >= (at / 10).min(60)), "{gaps:?}");
}

/// A token endpoint gives any answer to a refresh token, which decides whether it is presented again.
#[tokio::test(start_paused = true)]
async fn each_answer_decides_about_refresh_token() {
    /// What is asked of the server in the hour after the answer, and how it begins.
    enum Follows {
        /// The login has ended.
        Ended,
        /// It is tried once a minute.
        Doubt,
        /// The client is rejected, or set up wrongly. The refresh token is kept.
        Client(SourceErrorKind),
        Outage,
    }
    use Follows::{Client, Doubt, Ended, Outage};

    for (status, body, follows) in [
        (400, r#"{"error":"invalid_grant"}"#, Ended),
        (401, r#"{"error":"invalid_grant"}"#, Ended),
        (500, r#"{"error":"invalid_grant"}"#, Ended),
        (200, r#"{"error":"bad_refresh_token"}"#, Ended),
        (400, r#"{"error":"bad_refresh_token"}"#, Ended),
        (200, r#"{"ok":false,"error":"invalid_refresh_token"}"#, Ended),
        (401, r#"{"code":"unauthorized.bad_refresh_token"}"#, Ended),
        (401, r#"{"error":"invalid_token"}"#, Ended),
        (403, r#"{"error":"refresh_token_expired"}"#, Ended),
        (400, r#"{"error":{"code":"REFRESH_TOKEN_REVOKED"}}"#, Ended),
        (400, r#"{"error":"Invalid Grant"}"#, Ended),
        (400, "error=invalid_grant", Ended),
        (200, r#"{"error":"invalid_code"}"#, Doubt),
        (400, r#"{"error":"invalid_request"}"#, Doubt),
        (400, r#"{"error":"Bad Request"}"#, Doubt),
        (401, r#"{"error":"Unauthorized"}"#, Doubt),
        (403, r#"{"error":"access_denied"}"#, Doubt),
        (401, "", Doubt),
        (403, "", Doubt),
        (400, "{}", Doubt),
        (422, r#"{"message":"no"}"#, Doubt),
        (400, r#"{"error":"inactive_user"}"#, Doubt),
        (400, r#"{"error":"mfa_required"}"#, Doubt),
        (400, r#"{"error":"interaction_required"}"#, Doubt),
        (403, r#"{"error":"unauthorized_client"}"#, Doubt),
        (400, r#"{"error":7}"#, Doubt),
        (401, r#"{"error":"deleted_client"}"#, Client(Rejected)),
        (200, r#"{"error":"incorrect_client_credentials"}"#, Client(Rejected)),
        (401, r#"{"error":"invalid_client"}"#, Client(Rejected)),
        (400, r#"{"error":"unauthorized_client"}"#, Client(Rejected)),
        (400, r#"{"error":"invalid_client_secret"}"#, Client(Rejected)),
        (400, r#"{"error":"invalid_scope"}"#, Client(Configuration)),
        (400, r#"{"error":"unsupported_grant_type"}"#, Client(Configuration)),
        (404, "", Client(Configuration)),
        (404, r#"{"error":"user_not_found"}"#, Doubt),
        (410, r#"{"message":"gone"}"#, Doubt),
        (403, r#"{"error":"unknown_client_session"}"#, Doubt),
        (400, r#"{"access_token":"","error":"invalid_grant"}"#, Ended),
        (400, r#"{"access_token":null,"code":"bad_refresh_token"}"#, Ended),
        (400, r#"{"code":400,"error_code":"refresh_token_not_found","msg":"canary"}"#, Ended),
        (400, r#"{"code":400,"error_code":"refresh_token_already_used"}"#, Ended),
        (400, r#"{"error":"invalidGrant"}"#, Ended),
        (400, r#"{"errorCode":"RefreshTokenExpired"}"#, Ended),
        (400, r#"{"errors":[{"code":"invalid_refresh_token"}]}"#, Ended),
        (400, r#"{"error":{"code":400,"message":"TOKEN_EXPIRED","status":"INVALID_ARGUMENT"}}"#, Ended),
        (400, r#"{"error":"token_revoked"}"#, Ended),
        (200, r#"{"success":false,"message":"invalid refresh token"}"#, Ended),
        (200, r#"{"errcode":40030,"errmsg":"invalid refresh_token"}"#, Ended),
        (200, r#"{"code":10012,"msg":"refresh token expired"}"#, Ended),
        (200, r#"{"success":false,"message":"try later"}"#, Outage),
        (400, r#"{"error":"invalid_grant_type"}"#, Doubt),
        (401, r#"{"error":"access_token_expired"}"#, Doubt),
        (401, r#"{"error":"Unauthorized","message":"Invalid token"}"#, Doubt),
        (401, r#"{"message":"The token has expired"}"#, Doubt),
        // A text about something else than the refresh token, or of a server that is down.
        (400, r#"{"error":"Could not process grant, try again"}"#, Doubt),
        (403, r#"{"error":"invalid_xsrf_token"}"#, Doubt),
        (400, r#"{"error":"unknown_token_format_requested"}"#, Doubt),
        (400, r#"{"error":"unknown_token_error"}"#, Doubt),
        (400, r#"{"error":"refresh_token_not_issued"}"#, Doubt),
        (400, r#"{"error":"no_valid_refresh_token"}"#, Doubt),
        (400, r#"{"message":"Something bad happened. Unknown token"}"#, Doubt),
        (429, r#"{"error":"refresh_token_used_too_often"}"#, Outage),
        (429, r#"{"error":"refresh_token_revoked"}"#, Outage),
        (500, r#"{"statusCode":500,"message":"Could not refresh token"}"#, Outage),
        (500, r#"{"error":"Something went wrong while refreshing the token"}"#, Outage),
        (500, r#"{"error":"unknown_token_error"}"#, Outage),
        (500, r#"{"error":"token_not_issued"}"#, Outage),
        (502, r#"{"error":{"message":"The token store could not be reached"}}"#, Outage),
        (503, r#"{"message":"Refresh token service is not available"}"#, Outage),
        (503, r#"{"error":"Token service not available"}"#, Outage),
        (503, r#"{"error":"Unknown error while issuing token"}"#, Outage),
        (503, r#"{"error":"grant_not_processed"}"#, Outage),
        (503, r#"{"message":"Invalid token"}"#, Outage),
        (504, r#"{"errors":[{"message":"Token endpoint did not respond"}]}"#, Outage),
        // A text that says no more than that the refresh token is not valid.
        (400, r#"{"__type":"NotAuthorizedException","message":"Invalid Refresh Token."}"#, Ended),
        (400, r#"{"__type":"NotAuthorizedException","message":"Refresh Token has been revoked"}"#, Ended),
        (400, r#"{"__type":"InvalidGrantException"}"#, Ended),
        (400, r#"{"error":"invalid_grant","error_description":"Token is not active"}"#, Ended),
        (
            400,
            r#"{"error":"bad_request","error_description":"The provided refresh token is no longer valid"}"#,
            Ended,
        ),
        (400, r#"{"message":"The refresh token is expired or revoked"}"#, Ended),
        (400, r#"{"message":"missing or unknown refresh token"}"#, Ended),
        (200, r#"{"ok":false,"error":"token_expired"}"#, Ended),
        // Fitbit, HubSpot, Strava and Twitch; a problem document (RFC 9457).
        (
            400,
            r#"{"errors":[{"errorType":"invalid_grant","message":"Refresh token invalid: canary"}],"success":false}"#,
            Ended,
        ),
        (
            401,
            r#"{"errors":[{"errorType":"invalid_client","message":"Client id invalid. Visit"}],"success":false}"#,
            Client(Rejected),
        ),
        (400, r#"{"status":"BAD_REFRESH_TOKEN","message":"missing or unknown refresh token"}"#, Ended),
        (400, r#"{"status":"BAD_CLIENT_ID","message":"missing or unknown client id"}"#, Client(Rejected)),
        (
            400,
            r#"{"status":"BAD_CLIENT_SECRET","message":"missing or invalid client secret"}"#,
            Client(Rejected),
        ),
        (
            400,
            r#"{"message":"Bad Request","errors":[{"resource":"RefreshToken","field":"refresh_token","code":"invalid"}]}"#,
            Ended,
        ),
        (
            400,
            r#"{"message":"Bad Request","errors":[{"resource":"Application","field":"client_id","code":"invalid"}]}"#,
            Client(Rejected),
        ),
        (400, r#"{"status":400,"message":"Invalid refresh token"}"#, Ended),
        (403, r#"{"status":403,"message":"invalid client secret"}"#, Client(Rejected)),
        (401, r#"{"title":"invalid_grant","status":401,"detail":"canary"}"#, Ended),
        (400, r#"{"code":"refresh_token.expired"}"#, Ended),
        (401, r#"{"error":"invalid_client: The client secret is wrong"}"#, Client(Rejected)),
        (200, r#"{"ok":false,"error":"bad_client_secret"}"#, Client(Rejected)),
        // A code has precedence over a text.
        (401, r#"{"detail":"Invalid token","title":"invalid_client"}"#, Client(Rejected)),
        (200, r#"{"error":"invalid_grant","refresh_token":"canary"}"#, Ended),
        (302, "", Client(Configuration)),
        // Glewlwyd.
        (400, "", Doubt),
        (400, "<html>", Outage),
        (401, "error code: 1010", Outage),
        (200, "[]", Outage),
        (200, "7", Outage),
        (200, r#"{"token_type":"Bearer"}"#, Outage),
        (200, r#"{"error":"invalid_grant","access_token":"a"}"#, Outage),
        (400, r#"{"error":"temporarily_unavailable"}"#, Outage),
        (503, r#"{"error":"invalid_client"}"#, Outage),
        (408, r#"{"error":"x"}"#, Outage),
        (425, "", Outage),
    ] {
        let endpoint = Endpoint::default();
        let provider = logged_in(&endpoint);
        provider.token().await.unwrap();
        endpoint.clone().always(status, body);
        let first = another(&provider).await.unwrap_err();
        let begun = tokio::time::Instant::now();
        while begun.elapsed() < Duration::from_secs(3600) {
            let error = provider.token().await.unwrap_err();
            assert_eq!(kind(&error), kind(&first), "{status} {body}");
            sleep(Duration::from_secs(15)).await;
        }
        let presented = endpoint.values("refresh_token").len() - 1;
        let (expected, count) = match follows {
            Ended => (LoginRequired, 1..=1),
            Doubt => (LoginRequired, 45..=61),
            Client(kind) => (kind, 45..=70),
            Outage => (kind(&first), 60..=120),
        };
        assert_eq!(kind(&first), expected, "{status} {body}");
        assert_eq!(first.is_transient(), matches!(follows, Outage), "{status} {body}: {first}");
        assert!(count.contains(&presented), "{status} {body}: {presented}");

        // What was not ended works again.
        endpoint.clone().never();
        if matches!(follows, Outage) {
            sleep(Duration::from_secs(60)).await;
        }
        let healed = provider.ready().await;
        match follows {
            Ended => assert_eq!(kind(&healed.unwrap_err()), LoginRequired, "{status} {body}"),
            _ => assert_eq!(healed.unwrap().refresh_token(), Some("refresh-2"), "{status} {body}"),
        }
    }
}

/// The caller is dropped during the exchange of a login, which goes on.
#[tokio::test(start_paused = true)]
async fn dropped_caller_loses_no_login() {
    let endpoint = Endpoint::default().then(Act::Late(Duration::from_secs(5)));
    let provider = logged_in(&endpoint);
    assert!(tokio::time::timeout(Duration::from_secs(1), provider.token()).await.is_err());
    provider.token().await.unwrap();
    assert_eq!(endpoint.values("refresh_token"), ["seed"]);
}

/// The refresh token is rejected, and nothing else gives a token: no request, and no POST, until the login.
#[tokio::test(start_paused = true)]
async fn rejected_refresh_token_requires_login() {
    let endpoint = Endpoint::default();
    let provider = logged_in(&endpoint);
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
    provider.log_in("login-2");
    assert_eq!(provider.token().await.unwrap().generation(), 2, "at once");
    assert_eq!(endpoint.values("refresh_token"), ["seed", "refresh-1", "login-2"]);
}

/// A program starts with an empty refresh token, or with one that was rejected, and a user logs in later.
#[tokio::test(start_paused = true)]
async fn login_may_come_later() {
    let endpoint = Endpoint::default();
    let provider = TokenProvider::builder(by_refresh_token(&endpoint)).login("").build().unwrap();
    assert_eq!(kind(&provider.token().await.unwrap_err()), LoginRequired);
    provider.log_in("");
    assert_eq!(kind(&provider.token().await.unwrap_err()), LoginRequired);
    assert_eq!(endpoint.requests(), 0);

    provider.log_in("login");
    endpoint.clone().responds(400, r#"{"error":"invalid_grant"}"#);
    assert_eq!(kind(&provider.token().await.unwrap_err()), LoginRequired);
    provider.log_in("login");
    assert_eq!(kind(&provider.ready().await.unwrap_err()), LoginRequired);
    assert_eq!(endpoint.requests(), 1);
    provider.log_in("login-2");
    provider.token().await.unwrap();

    provider.log_in("canary\n");
    let error = provider.token().await.unwrap_err();
    assert_eq!(kind(&error), Configuration);
    assert!(!format!("{error:?} {error}").contains("canary"));
    provider.log_in("login-3");
    provider.token().await.unwrap();
}

/// The access token of a response cannot be used, but the refresh token that came with it is the one that works.
#[tokio::test(start_paused = true)]
async fn refresh_token_of_unusable_response_is_kept() {
    let endpoint = Endpoint::default();
    let provider = logged_in(&endpoint);
    provider.token().await.unwrap();
    for (number, unusable) in [
        (1, r#""access_token":"a","token_type":"DPoP""#),
        (2, r#""access_token":"a\n""#),
        (3, r#""access_token":"a","error":"partial_scope""#),
    ] {
        endpoint.clone().responds(200, format!(r#"{{{unusable},"refresh_token":"next-{number}"}}"#));
        assert_eq!(kind(&another(&provider).await.unwrap_err()), InvalidResponse);
    }
    another(&provider).await.unwrap();
    assert_eq!(endpoint.values("refresh_token"), ["seed", "refresh-1", "next-1", "next-2", "next-3"]);
}

/// The server grants a refresh token that was spent before, or none, which keeps the old one.
#[tokio::test(start_paused = true)]
async fn refresh_token_may_be_granted_again() {
    let endpoint = Endpoint::default();
    let provider = logged_in(&endpoint);
    provider.token().await.unwrap();
    let mut expected = vec!["seed", "refresh-1"];
    for next in ["one", "two", "one", "two", "", "one"] {
        endpoint.clone().responds(200, format!(r#"{{"access_token":"a","refresh_token":"{next}"}}"#));
        another(&provider).await.unwrap();
        expected.push(if next.is_empty() { "two" } else { next });
    }
    another(&provider).await.unwrap();
    assert_eq!(endpoint.values("refresh_token"), expected);
}

/// A login is given once more while its refresh token is exchanged; then another one, whose user must not get the token
/// of the first.
#[tokio::test(start_paused = true)]
async fn login_during_exchange() {
    let endpoint = Endpoint::default().then(Act::Late(Duration::from_secs(1)));
    let provider = logged_in(&endpoint);
    let refreshing = || {
        let provider = provider.clone();
        tokio::spawn(async move { provider.token().await })
    };
    let waiting = refreshing();
    sleep(Duration::from_millis(500)).await;
    provider.log_in("seed");
    waiting.await.unwrap().unwrap();
    advance(Duration::from_secs(3600)).await;
    provider.token().await.unwrap();
    assert_eq!(endpoint.values("refresh_token"), ["seed", "refresh-1"]);

    for answer in [None, Some(r#"{"error":"invalid_grant"}"#), Some(r#"{"error":"x"}"#), Some("<html>")] {
        let endpoint = Endpoint::default();
        let provider = logged_in(&endpoint);
        provider.token().await.unwrap();
        endpoint.clone().then(Act::Late(Duration::from_secs(1)));
        if let Some(body) = answer {
            endpoint.clone().responds(400, body);
        }
        provider.invalidate();
        let waiting = tokio::spawn({
            let provider = provider.clone();
            async move { provider.token().await }
        });
        sleep(Duration::from_millis(500)).await;
        provider.log_in("login-2");
        let token = waiting.await.unwrap().unwrap();
        assert_eq!(endpoint.values("refresh_token")[2..], ["login-2"], "{answer:?}");
        assert_eq!(provider.token().await.unwrap().access_token(), token.access_token());
    }
}

/// A subject's revision is any number, such as a hash of its credential.
#[tokio::test]
async fn revision_of_subject_may_be_any_number() {
    struct Subject;

    impl TokenSource for Subject {
        async fn fetch(&self, _: &TokenRequest<'_>) -> Result<Token, SourceError> {
            Ok(Token::builder("subject").build()?)
        }

        fn credential(&self) -> Credential {
            Credential::default().with_revision(u64::MAX)
        }
    }
    let source = OAuth2::jwt_bearer(server(), client(), Subject);
    let before = source.credential();
    source.set_secret("new");
    assert_ne!(source.credential(), before);
}

/// A login replaces a refresh token and a token that still work: it may be another user's.
#[tokio::test(start_paused = true)]
async fn login_replaces_working_refresh_token() {
    let endpoint = Endpoint::default();
    let provider = logged_in(&endpoint);
    let first = provider.token().await.unwrap();
    provider.log_in("login-2");
    assert!(provider.current().is_none());
    let second = provider.token().await.unwrap();
    assert_ne!(first.access_token(), second.access_token());
    another(&provider).await.unwrap();
    assert_eq!(endpoint.values("refresh_token"), ["seed", "login-2", "refresh-2"]);
    // The first login is known, and is not used again.
    provider.log_in("seed");
    another(&provider).await.unwrap();
    assert_eq!(endpoint.values("refresh_token")[3..], ["refresh-3"]);
}

/// The client secret is rejected, and is replaced, which costs no refresh token.
#[tokio::test(start_paused = true)]
async fn new_secret_ends_rejection_at_once() {
    let endpoint = Endpoint::default();
    let source = endpoint.serve(OAuth2::login(server(), client()));
    let provider = TokenProvider::builder(source.clone()).login("seed").build().unwrap();
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

/// The metadata of an issuer are missing, broken, or of another issuer.
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
    let endpoint = Endpoint::default()
        .responds(503, "")
        .responds(404, "")
        .responds(404, "")
        .responds(200, found.clone());
    let source = endpoint.serve(issuer());
    assert_eq!(fetch(&source).await.unwrap_err().kind(), Unavailable);
    fetch(&source).await.unwrap();
    assert_eq!(uris(&endpoint), [OAUTH, OPENID, OAUTH, OPENID, TOKEN_ENDPOINT]);

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
        let endpoint = Endpoint::default().responds(200, body).responds(404, "");
        let error = fetch(&endpoint.serve(issuer())).await.unwrap_err();
        assert_eq!(error.kind(), Configuration, "{error}");
        assert!(error.to_string().contains(hint) && !error.to_string().contains("canary"), "{error}");
        assert_eq!(uris(&endpoint), [OAUTH, OPENID]);
    }
    // A clone with a weaker rule does not decide for this one.
    let plaintext = metadata("https://login.example/tenant", "http://login.example/token");
    let endpoint = Endpoint::default().responds(200, plaintext);
    let weak = issuer().with_client(endpoint.client().allow_plaintext());
    fetch(&weak).await.unwrap();
    let error = fetch(&endpoint.serve(weak)).await.unwrap_err();
    assert!(error.to_string().contains("must not be plaintext http"), "{error}");
    assert_eq!(endpoint.requests(), 2);

    let endpoint = Endpoint::default().responds(200, format!("\u{feff}{found}"));
    fetch(&endpoint.serve(issuer())).await.unwrap();
    let endpoint = Endpoint::default().responds(200, "<html>").responds(404, "");
    let error = fetch(&endpoint.serve(issuer())).await.unwrap_err();
    assert!(
        error.kind() == Configuration
            && error.to_string().contains("check the issuer https://login.example/tenant"),
        "{error}"
    );
}

/// The first place of the metadata fails in any way: one error names both places with their statuses.
#[tokio::test(start_paused = true)]
async fn second_place_has_metadata_if_first_fails() {
    let found = format!(r#"{{"issuer":"https://login.example","token_endpoint":"{TOKEN_ENDPOINT}"}}"#);
    let issuer = || OAuth2::client_credentials(Server::issuer("https://login.example"), client());
    let foreign = r#"{"issuer":"https://canary.example","token_endpoint":"https://canary.example/"}"#;
    let act = |status, body: &'static str| Act::Answer(status, Vec::new(), body.into());
    let long = "a".repeat(70 * 1024);
    for (first, shown, is_outage) in [
        (act(401, ""), "HTTP 401", false),
        (act(403, r#"{"error":"canary"}"#), "HTTP 403", false),
        (act(403, "<html>canary"), "HTTP 403", true),
        (act(404, ""), "HTTP 404", false),
        (act(302, ""), "HTTP 302", false),
        (act(418, ""), "HTTP 418", true),
        (act(429, ""), "HTTP 429", true),
        (act(500, ""), "HTTP 500", true),
        (act(504, ""), "HTTP 504", true),
        (act(200, ""), "HTTP 200", false),
        (act(200, "<html>canary"), "HTTP 200", false),
        (act(200, foreign), "is of another issuer", false),
        (act(200, r#"{"token_endpoint":"https://canary.example/"}"#), "is of another issuer", false),
        (act(200, r#"{"issuer":"https://login.example"}"#), "has no valid token_endpoint", false),
        (
            act(200, r#"{"issuer":"https://login.example","token_endpoint":7}"#),
            "has no valid token_endpoint",
            false,
        ),
        (Act::Answer(200, Vec::new(), long.into()), "is longer than", true),
        (Act::Refuse, "was not sent", true),
        (Act::Lose, "connection reset", true),
        (Act::Hang, "within 5s", true),
    ] {
        let endpoint = Endpoint::default().then(first.clone()).responds(200, found.clone());
        fetch(&endpoint.serve(issuer())).await.unwrap();
        assert_eq!(endpoint.requests(), 3, "{shown}");

        for (first, second) in [(first.clone(), act(404, "")), (act(404, ""), first)] {
            let endpoint = Endpoint::default().then(first).then(second);
            let error = fetch(&endpoint.serve(issuer())).await.unwrap_err();
            assert_eq!(error.kind(), if is_outage { Unavailable } else { Configuration }, "{error}");
            let text = error.to_string();
            assert!(text.contains(shown) && text.contains("HTTP 404") && !text.contains("canary"), "{text}");
            for place in ["oauth-authorization-server", "openid-configuration"] {
                assert!(text.contains(&format!("https://login.example/.well-known/{place}")), "{text}");
            }
        }
    }
    let asks = |delay| Act::Answer(503, vec![("retry-after", delay)], Bytes::new());
    let endpoint = Endpoint::default().then(asks("7")).then(asks("5"));
    let error = fetch(&endpoint.serve(issuer())).await.unwrap_err();
    assert_eq!(error.retry_after(), Some(Duration::from_secs(7)));
}

/// The token endpoint has moved, and the metadata says so.
#[tokio::test(start_paused = true)]
async fn moved_token_endpoint_is_found() {
    let names = |endpoint: &str| {
        let body = format!(
            r#"{{"issuer":"https://login.example","token_endpoint":"https://login.example/{endpoint}"}}"#
        );
        Act::Answer(200, Vec::new(), body.into())
    };
    let paths = |endpoint: &Endpoint| -> Vec<_> {
        let script = endpoint.script();
        script
            .requests
            .iter()
            .map(|request| request.uri().path().rsplit('/').next().unwrap().to_owned())
            .collect()
    };
    const OAUTH: &str = "oauth-authorization-server";
    let gone = |status| Act::Answer(status, Vec::new(), Bytes::new());
    for moved in [gone(404), gone(405), gone(410), Act::Refuse] {
        for by_login in [false, true] {
            let server = Server::issuer("https://login.example");
            let endpoint = Endpoint::default().then(names("old"));
            let source = endpoint.serve(match by_login {
                true => OAuth2::login(server, client()),
                false => OAuth2::client_credentials(server, client()),
            });
            let first = fetch(&source).await.unwrap();
            // At once, without a failure.
            endpoint.clone().then(moved.clone()).then(names("new"));
            renewed(&source, &first).await.unwrap();
            renewed(&source, &first).await.unwrap();
            assert_eq!(paths(&endpoint), [OAUTH, "old", "old", OAUTH, "new", "new"]);
        }
    }
    // It is where it was: the failure is that of the endpoint.
    let endpoint = Endpoint::default().then(names("token"));
    let source =
        endpoint.serve(OAuth2::client_credentials(Server::issuer("https://login.example"), client()));
    let first = fetch(&source).await.unwrap();
    endpoint.clone().then(gone(404)).then(names("token"));
    assert_eq!(renewed(&source, &first).await.unwrap_err().kind(), Configuration);
    endpoint.clone().then(gone(404)).then(gone(503)).then(gone(503));
    assert_eq!(renewed(&source, &first).await.unwrap_err().kind(), Configuration);
    renewed(&source, &first).await.unwrap();

    // After a day it is read again. If that fails, the old one is used, and it is read again after ten minutes.
    advance(Duration::from_secs(25 * 3600)).await;
    let before = endpoint.requests();
    endpoint.clone().then(Act::Hang).then(gone(404));
    let begun = tokio::time::Instant::now();
    renewed(&source, &first).await.unwrap();
    assert_eq!(begun.elapsed(), Duration::from_secs(5));
    renewed(&source, &first).await.unwrap();
    advance(Duration::from_secs(11 * 60)).await;
    endpoint.clone().then(names("new"));
    renewed(&source, &first).await.unwrap();
    renewed(&source, &first).await.unwrap();
    assert_eq!(
        paths(&endpoint)[before..],
        [OAUTH, "openid-configuration", "token", "token", OAUTH, "new", "new"]
    );
}

/// Each grant works over a real socket, with the metadata of the issuer, until the API accepts its token.
#[tokio::test]
async fn api_accepts_token_of_each_grant() {
    let server = AuthServer::start().await.unwrap();
    let issuer = || Server::issuer(server.issuer());
    let client = || ClientAuth::basic(server.client_id(), server.client_secret());
    let key = || SigningKey::es256(&server.signing_key());
    let assertion = || Assertion::new(key()).issuer("app").subject("user").audience(server.issuer());
    let login = OAuth2::login(issuer(), ClientAuth::public(server.client_id())).credential();
    for source in [
        OAuth2::login(issuer(), ClientAuth::public(server.client_id())),
        OAuth2::client_credentials(issuer(), client()),
        OAuth2::client_credentials(issuer(), ClientAuth::post(server.client_id(), server.client_secret())),
        OAuth2::client_credentials(issuer(), ClientAuth::private_key_jwt(server.client_id(), key())),
        OAuth2::client_credentials(
            Server::token_endpoint(server.token_endpoint()),
            ClientAuth::private_key_jwt(server.client_id(), key().key_id("1")),
        ),
        OAuth2::token_exchange(issuer(), client(), assertion()),
        OAuth2::jwt_bearer(issuer(), ClientAuth::none(), assertion()),
    ] {
        let provider = TokenProvider::builder(source.clone()).build().unwrap();
        if source.credential() == login {
            provider.log_in(server.log_in());
        }
        let service = BearerAuthLayer::with_provider(provider.clone()).layer(support::http1());
        // The second assertion is not the first one again, which the server would reject.
        for generation in 1..=2 {
            let response = service.clone().oneshot(support::get_videos(&server)).await.unwrap();
            assert_eq!(response.status(), 200, "{source:?}");
            assert_eq!(provider.status().generation, generation, "{source:?}");
            provider.invalidate();
        }
    }
    let counters = server.counters();
    assert_eq!((counters.rejected_clients, counters.rejected_oauth_grants), (0, 0));
    assert_eq!(counters.metadata_requests, 6);
}

/// An assertion is sent twice, or has other claims than its grant needs.
/// `crates/tower-bearer-testing/tests/auth_server.rs` and `interop` verify the signatures.
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
        assert!(issued < now && expires == issued + 60, "{claims}");
        assert!(
            token.remaining().unwrap() <= Duration::from_secs(expires.saturating_sub(now) + 1),
            "{claims}"
        );
        assert_eq!((&claims["iss"], &claims["scope"]), (&"app".into(), &"a b".into()));
        ids.push(claims["jti"].as_str().unwrap().to_owned());
    }
    assert!(ids[0] != ids[1] && ids[0].len() == 22, "{ids:?}");
}

/// A signing key is not valid: the error quotes nothing of it.
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
