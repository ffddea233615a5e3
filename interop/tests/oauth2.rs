//! `OAuth2` with a real authorization server, and an API that checks its tokens.
//!
//! Needs `node` 20 or newer, and `npm ci` in `servers`.

use std::{process::Stdio, time::Duration};

use bytes::Bytes;
use http::{Request, StatusCode, header::WWW_AUTHENTICATE};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    process::{Child, Command},
    time::Instant,
};
use tower::{Layer, ServiceExt};
use tower_bearer::{
    BearerAuth, BearerAuthLayer, Error, OAuth2, SourceErrorKind, TokenClient, TokenProvider,
    oauth2::{self, ClientAuth, SigningKey},
};
use tower_bearer_interop::CALLS;

type Http = Client<HttpConnector, Full<Bytes>>;

// Each of these characters must be form-encoded before it goes into Basic (RFC 6749 §2.3.1).
const CLIENT: &str = "a client: 1%+";
const SECRET: &str = "100%+a:b c%2Bd/e=&";
/// A public client.
const APP: &str = "app";
const RESOURCE: &str = "https://api.example";

/// The authorization server and its API, in a process that ends with this value.
struct Server {
    url: String,
    port: u16,
    process: Child,
}

impl Server {
    async fn start() -> Self {
        Self::start_at(0).await
    }

    async fn start_at(port: u16) -> Self {
        let mut process = Command::new("node")
            .args([concat!(env!("CARGO_MANIFEST_DIR"), "/servers/oidc_provider.mjs"), &port.to_string()])
            // It ends when this pipe is closed, even if this process is killed.
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("node 20 or newer");
        let mut line = String::new();
        BufReader::new(process.stdout.as_mut().unwrap()).read_line(&mut line).await.unwrap();
        let Ok(started) = serde_json::from_str::<Value>(&line) else {
            let mut error = String::new();
            process.stderr.take().unwrap().read_to_string(&mut error).await.unwrap();
            panic!("the server did not start (`npm ci` in interop/servers installs it): {error}");
        };
        let port = started["port"].as_u64().unwrap().try_into().unwrap();
        Self { url: format!("http://127.0.0.1:{port}"), port, process }
    }

    async fn stop(mut self) -> u16 {
        self.process.kill().await.unwrap();
        self.port
    }

    fn endpoint(&self) -> oauth2::Server {
        oauth2::Server::token_endpoint(format!("{}/token", self.url))
    }

    /// Runs a command of `oidc_provider.mjs`.
    async fn run(&self, command: &str, parameters: &[(&str, &str)]) -> Value {
        let url = reqwest::Url::parse_with_params(&format!("{}/test/{command}", self.url), parameters);
        reqwest::get(url.unwrap()).await.unwrap().json().await.unwrap()
    }

    /// Returns a refresh token of a new login.
    async fn login(&self, client: &str) -> String {
        self.run("login", &[("client_id", client)]).await.as_str().unwrap().to_owned()
    }

    /// Revokes all access tokens.
    async fn revoke(&self) {
        self.run("revoke", &[]).await;
    }

    /// Returns the number of requests to `route`, by grant or status.
    async fn requests(&self, route: &str) -> Value {
        self.run("counts", &[]).await[route].take()
    }

    async fn token_requests(&self) -> Value {
        self.requests("token").await
    }

    fn caller(&self, source: &OAuth2) -> Caller {
        self.caller_of(TokenProvider::new(source.clone()))
    }

    /// A caller whose cool-down is longer than any test.
    fn cautious_caller(&self, source: &OAuth2) -> Caller {
        let hour = Duration::from_secs(60 * 60);
        self.caller_of(TokenProvider::builder(source.clone()).cool_down(hour, hour).build().unwrap())
    }

    fn caller_of(&self, provider: TokenProvider) -> Caller {
        let service = BearerAuthLayer::with_provider(provider.clone())
            .layer(Client::builder(TokioExecutor::new()).build_http());
        Caller { provider, service, api: format!("{}/api", self.url) }
    }

    /// A caller with the credential of `CLIENT`.
    fn client_caller(&self) -> Caller {
        self.caller(&OAuth2::client_credentials(self.endpoint(), ClientAuth::basic(CLIENT, SECRET)))
    }

    /// A source for logins of `APP`.
    fn app(&self) -> OAuth2 {
        OAuth2::login(self.endpoint(), ClientAuth::public(APP))
    }

    /// A caller with a new login of `APP`.
    async fn app_caller(&self) -> Caller {
        self.caller_of(TokenProvider::builder(self.app()).login(self.login(APP).await).build().unwrap())
    }
}

/// Calls the API.
#[derive(Clone)]
struct Caller {
    provider: TokenProvider,
    service: BearerAuth<Http>,
    api: String,
}

impl Caller {
    fn requiring(mut self, query: &str) -> Self {
        self.api = format!("{}?{query}", self.api);
        self
    }

    async fn response(self) -> Result<http::Response<Incoming>, Error> {
        let request = Request::get(&self.api).body(Full::default()).unwrap();
        self.service.oneshot(request).await.map_err(|error| *error.downcast().unwrap())
    }

    /// Calls `count` times at once.
    async fn calls(&self, count: usize) -> Vec<Result<StatusCode, Error>> {
        let calls: Vec<_> = (0..count).map(|_| tokio::spawn(self.clone().response())).collect();
        let mut results = Vec::new();
        for call in calls {
            results.push(call.await.unwrap().map(|response| response.status()));
        }
        results
    }

    /// Calls `count` times at once, and checks that all get this status.
    async fn get(&self, status: StatusCode, count: usize) {
        for result in self.calls(count).await {
            assert_eq!(result.unwrap(), status);
        }
    }

    async fn succeed(&self, count: usize) {
        self.get(StatusCode::OK, count).await;
    }

    /// Calls 200 times at once, and checks that all fail with this error.
    async fn fail(&self, kind: SourceErrorKind, text: &str) {
        for result in self.calls(CALLS).await {
            let error = result.unwrap_err();
            assert!(matches!(&error, Error::Source(source) if source.kind() == kind), "{error:?}");
            assert!(error.to_string().contains(text), "{error}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn client_credentials_cold_and_revoked() {
    for client in [ClientAuth::basic(CLIENT, SECRET), ClientAuth::post("poster", SECRET)] {
        let server = Server::start().await;
        let caller = server.caller(&OAuth2::client_credentials(server.endpoint(), client));
        caller.succeed(CALLS).await;
        assert_eq!(server.token_requests().await, json!({"client_credentials": 1}));
        assert_eq!(server.requests("api").await, json!({"200": CALLS}));
        server.revoke().await;
        caller.succeed(CALLS).await;
        assert_eq!(server.token_requests().await, json!({"client_credentials": 2}));
        assert!(server.requests("api").await["401"].as_u64() > Some(0), "no call used the revoked token");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refresh_token_cold_and_revoked() {
    for (id, client) in [(APP, ClientAuth::public(APP)), (CLIENT, ClientAuth::basic(CLIENT, SECRET))] {
        let server = Server::start().await;
        let source = OAuth2::login(server.endpoint(), client);
        let provider = TokenProvider::builder(source).login(server.login(id).await).build().unwrap();
        let caller = server.caller_of(provider);
        caller.succeed(CALLS).await;
        assert_eq!(server.token_requests().await, json!({"refresh_token": 1}));
        server.revoke().await;
        caller.succeed(CALLS).await;
        assert_eq!(server.token_requests().await, json!({"refresh_token": 2}));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_rotations_without_reuse() {
    let server = Server::start().await;
    let caller = server.app_caller().await;
    for rotation in 1..=5 {
        caller.succeed(10).await;
        assert_eq!(server.token_requests().await, json!({"refresh_token": rotation}));
        server.revoke().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn insufficient_scope_reaches_the_caller() {
    let server = Server::start().await;
    let caller = server.client_caller();
    caller.succeed(1).await;
    for status in [StatusCode::FORBIDDEN, StatusCode::UNAUTHORIZED] {
        let caller = caller.clone().requiring(&format!("scope=admin&status={}", status.as_u16()));
        for _ in 0..5 {
            let response = caller.clone().response().await.unwrap();
            assert_eq!(response.status(), status);
            let challenge = r#"Bearer realm="api", error="insufficient_scope", scope="admin""#;
            assert_eq!(response.headers()[WWW_AUTHENTICATE], challenge);
        }
    }
    assert_eq!(server.requests("api").await, json!({"200": 1, "401": 5, "403": 5}), "nothing is sent again");
    assert_eq!(server.token_requests().await, json!({"client_credentials": 1}));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reuse_by_a_thief_needs_a_login() {
    let server = Server::start().await;
    let seed = server.login(APP).await;
    let with_seed = || {
        let hour = Duration::from_secs(60 * 60);
        let builder = TokenProvider::builder(server.app()).login(&seed).cool_down(hour, hour);
        server.caller_of(builder.build().unwrap())
    };
    let owner = with_seed();
    owner.succeed(1).await;

    let thief = with_seed();
    thief.fail(SourceErrorKind::LoginRequired, "a user has to log in").await;
    let mut expected = json!({
        "refresh_token": 1, "refresh_token invalid_grant": 1, "reuse": 1, "revoked family": 1,
    });
    assert_eq!(server.token_requests().await, expected);

    // The reuse has ended the owner's tokens, too. A refresh that fails takes no token away, so the API answers.
    owner.get(StatusCode::UNAUTHORIZED, CALLS).await;
    expected["refresh_token invalid_grant"] = 2.into();
    assert_eq!(server.token_requests().await, expected);
    owner.provider.invalidate();
    owner.fail(SourceErrorKind::LoginRequired, "a user has to log in").await;
    assert_eq!(server.token_requests().await, expected, "no request in the cool-down");
    // After it, a refresh token that was rejected is not presented.
    assert!(owner.provider.ready().await.is_err());
    assert_eq!(server.token_requests().await, expected);

    owner.provider.log_in(server.login(APP).await);
    owner.succeed(CALLS).await;
    expected["refresh_token"] = 2.into();
    assert_eq!(server.token_requests().await, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_secret_is_rejected_once() {
    let server = Server::start().await;
    let client = ClientAuth::basic(CLIENT, "another");
    let source = OAuth2::client_credentials(server.endpoint(), client);
    let caller = server.cautious_caller(&source);
    caller.fail(SourceErrorKind::Rejected, "invalid_client").await;
    let mut expected = json!({"client_credentials invalid_client": 1});
    assert_eq!(server.token_requests().await, expected);

    source.set_secret(SECRET);
    caller.succeed(CALLS).await;
    expected["client_credentials"] = 1.into();
    assert_eq!(server.token_requests().await, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropped_caller_does_not_end_the_exchange() {
    let server = Server::start().await;
    let caller = server.client_caller();
    server.run("hold", &[]).await;
    let dropped = tokio::spawn(caller.clone().response());
    server.run("held", &[]).await;
    dropped.abort();
    assert!(dropped.await.unwrap_err().is_cancelled());
    tokio::join!(caller.succeed(CALLS), server.run("release", &[]));
    assert_eq!(server.token_requests().await, json!({"client_credentials": 1}));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn server_down_is_unavailable() {
    let server = Server::start().await;
    let caller = server.client_caller();
    let port = server.stop().await;
    caller.fail(SourceErrorKind::Unavailable, "the request was not sent").await;

    let server = Server::start_at(port).await;
    caller.provider.ready().await.unwrap();
    caller.succeed(CALLS).await;
    assert_eq!(server.token_requests().await, json!({"client_credentials": 1}));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn callers_do_not_notice_expiries() {
    let server = Server::start().await;
    server.run("set", &[("lifetime", "4")]).await;
    let caller = server.client_caller();
    let end = Instant::now() + Duration::from_secs(13);
    while Instant::now() < end {
        caller.succeed(20).await;
    }
    // oidc-provider ends a token up to a second early, because it counts in whole seconds.
    let requests = server.token_requests().await["client_credentials"].as_u64().unwrap();
    assert!((4..=6).contains(&requests), "{requests}");
}

/// The server has processed the request, but its response is later than the deadline.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn late_answer_heals_within_the_grace() {
    const DEADLINE: Duration = Duration::from_millis(500);
    // In milliseconds.
    for (grace, heals) in [("0", false), ("100", false), ("30000", true)] {
        let server = Server::start().await;
        server.run("set", &[("grace", grace)]).await;
        let source = server.app().with_client(TokenClient::new().timeout(DEADLINE));
        let provider = TokenProvider::builder(source).login(server.login(APP).await).build().unwrap();
        let caller = server.caller_of(provider);
        server.run("hold", &[]).await;
        if heals {
            caller.succeed(CALLS).await;
            assert_eq!(server.token_requests().await, json!({"refresh_token": 2}));
            server.revoke().await;
            caller.succeed(CALLS).await;
            assert_eq!(server.token_requests().await, json!({"refresh_token": 3}));
        } else {
            caller.fail(SourceErrorKind::LoginRequired, "a user has to log in").await;
            let expected = json!({
                "refresh_token": 1, "refresh_token invalid_grant": 1, "reuse": 1, "revoked family": 1,
            });
            assert_eq!(server.token_requests().await, expected);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn private_key_jwt_metadata_resource_scope() {
    type NewKey = fn(&str) -> SigningKey;
    let keys: [(&str, NewKey); 3] =
        [("ES256", SigningKey::es256), ("RS256", SigningKey::rs256), ("EdDSA", SigningKey::ed_dsa)];
    let server = Server::start().await;
    for (number, (algorithm, new_key)) in keys.into_iter().enumerate() {
        let pem = server.run("register", &[("alg", algorithm)]).await;
        let key = new_key(pem.as_str().unwrap()).key_id(format!("key of {algorithm}"));
        let client = ClientAuth::private_key_jwt(algorithm, key);
        let source = OAuth2::client_credentials(oauth2::Server::issuer(&server.url), client)
            .scopes(["read", "write"])
            .resources([RESOURCE]);
        let caller = server.caller(&source).requiring(&format!("scope=write&audience={RESOURCE}"));
        caller.succeed(20).await;
        assert_eq!(server.token_requests().await, json!({"client_credentials": 2 * number + 1}));
        // The server accepts an assertion once.
        server.revoke().await;
        caller.succeed(20).await;
        assert_eq!(server.token_requests().await, json!({"client_credentials": 2 * number + 2}));
        let documents = json!({"oauth-authorization-server": number + 1});
        assert_eq!(server.requests("metadata").await, documents, "fetched once");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metadata_by_openid_discovery() {
    let server = Server::start().await;
    server.run("set", &[("rfc8414", "false")]).await;
    let issuer = oauth2::Server::issuer(&server.url);
    let source = OAuth2::client_credentials(issuer, ClientAuth::basic(CLIENT, SECRET));
    server.caller(&source).succeed(CALLS).await;
    let documents = json!({"oauth-authorization-server": 1, "openid-configuration": 1});
    assert_eq!(server.requests("metadata").await, documents);
    assert_eq!(server.token_requests().await, json!({"client_credentials": 1}));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreign_issuer_is_an_error() {
    let server = Server::start().await;
    // The issuer that the metadata names has the address instead of the name.
    let issuer = oauth2::Server::issuer(format!("http://localhost:{}", server.port));
    let source = OAuth2::client_credentials(issuer, ClientAuth::basic(CLIENT, SECRET));
    server.caller(&source).fail(SourceErrorKind::Configuration, "another issuer").await;
    assert_eq!(server.token_requests().await, json!({}));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn revocations_under_load_surface_no_401() {
    let server = Server::start().await;
    let caller = server.client_caller();
    caller.succeed(1).await;
    for revocation in 1..=5 {
        tokio::join!(caller.succeed(CALLS), server.revoke());
        // If the revocation was later than all of these calls, it shows now.
        caller.succeed(1).await;
        assert_eq!(server.token_requests().await, json!({"client_credentials": 1 + revocation}));
    }
}
