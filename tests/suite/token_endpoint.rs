//! One exchange with a token endpoint, over real sockets: nothing of an earlier exchange makes a later one fail, and what a
//! request has is the same for each source.

#![cfg(feature = "default-client")]

mod token_server;

use std::{sync::Arc, thread, time::Duration};

use http::{Request, Response, header::ACCEPT_ENCODING};
use hyper::body::Incoming;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    runtime::{Builder, Runtime},
    time::timeout,
};
use tower::service_fn;
use tower_bearer::{
    ApiVideo, BoxError, OAuth2, RefreshReason, RetryPolicy, SourceError, SourceErrorKind, Token, TokenClient,
    TokenProvider, TokenRequest, TokenSource,
    oauth2::{ClientAuth, Server},
    source_fn,
    tls::Roots,
};
use tower_bearer_testing::AuthServer;

use self::token_server::TokenServer;
use crate::support::{self, chain};

const TOKEN: &str = r#"{"access_token":"a","token_type":"Bearer","expires_in":3600,"refresh_token":"r"}"#;

/// More than any exchange here takes, and less than a timeout of the client.
const LIMIT: Duration = Duration::from_secs(5);

/// Responds with metadata, or with a token.
fn grants(request: &Request<Incoming>) -> Response<String> {
    Response::new(match request.uri().path() {
        path if path.starts_with("/.well-known/") => {
            let host = request.headers().get("host").map_or("", |host| host.to_str().unwrap());
            format!(r#"{{"issuer":"https://{host}","token_endpoint":"https://{host}/token"}}"#)
        }
        _ => TOKEN.to_owned(),
    })
}

async fn fetch(source: impl TokenSource) -> Result<Token, SourceError> {
    source.fetch(&TokenRequest::new(RefreshReason::Missing)).await
}

fn client(server: &TokenServer) -> TokenClient {
    let client = TokenClient::new().timeout(LIMIT / 2);
    if server.pem.is_empty() { client } else { client.roots(Roots::Pem(server.pem.clone())) }
}

fn api_video(server: &TokenServer) -> ApiVideo {
    ApiVideo::new("key").base_url(server.uri().parse().unwrap()).with_client(client(server))
}

fn by_client(server: Server, client: TokenClient) -> OAuth2 {
    OAuth2::client_credentials(server, ClientAuth::basic("id", "secret")).with_client(client)
}

fn oauth2(server: &TokenServer) -> OAuth2 {
    by_client(Server::token_endpoint(format!("{}/token", server.uri())), client(server))
}

/// A connection to the token endpoint dies without FIN or RST, and new ones work.
#[tokio::test]
async fn next_attempt_uses_new_connection() {
    for alpn in [&["h2", "http/1.1"][..], &["http/1.1"]] {
        let server = TokenServer::start(alpn, grants).await;
        let by_issuer = |url| by_client(Server::issuer(url), client(&server));
        let (api_video, oauth2, metadata) = (api_video(&server), oauth2(&server), by_issuer(server.uri()));
        for _ in 0..3 {
            timeout(LIMIT, async {
                fetch(api_video.clone()).await.unwrap();
                fetch(oauth2.clone()).await.unwrap();
                fetch(metadata.clone()).await.unwrap();
                // Reads the metadata again.
                fetch(by_issuer(server.uri())).await.unwrap();
            })
            .await
            .unwrap();
            server.kill_connections();
        }
        assert_eq!(server.connections(), server.paths().len());
    }
}

/// A connection dies during the exchange of a login.
#[tokio::test]
async fn dead_connection_costs_one_attempt() {
    let server = TokenServer::start(&["http/1.1"], grants).await;
    let hangs = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = hangs.local_addr().unwrap();
    let behind = server.address;
    // The first connection is accepted, and dies. Later ones are forwarded.
    tokio::spawn(async move {
        let _dead = hangs.accept().await.unwrap();
        loop {
            let (mut inbound, _) = hangs.accept().await.unwrap();
            tokio::spawn(async move {
                let mut outbound = tokio::net::TcpStream::connect(behind).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut inbound, &mut outbound).await;
            });
        }
    });
    let client = client(&server).timeout(Duration::from_millis(300));
    let endpoint = Server::token_endpoint(format!("https://{address}/token"));
    let source = OAuth2::login(endpoint, ClientAuth::public("id")).with_client(client);
    let retry = RetryPolicy::new().backoff(Duration::from_millis(1), Duration::from_millis(2));
    let provider = TokenProvider::builder(source).login("seed").retry(retry).build().unwrap();
    timeout(LIMIT, provider.token()).await.unwrap().unwrap();
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// The runtime of an earlier exchange is not driven any more, during an exchange or after it.
#[test]
fn exchange_needs_only_its_runtime() {
    let (sender, receiver) = std::sync::mpsc::channel();
    thread::spawn(move || {
        runtime().block_on(async {
            sender.send(TokenServer::start(&["h2", "http/1.1"], grants).await).unwrap();
            std::future::pending::<()>().await;
        });
    });
    let server = receiver.recv().unwrap();
    let metadata = by_client(Server::issuer(server.uri()), client(&server));
    let (api_video, oauth2) = (api_video(&server), oauth2(&server));
    let all = || {
        let (api_video, oauth2, metadata) = (api_video.clone(), oauth2.clone(), metadata.clone());
        async move {
            fetch(api_video).await.unwrap();
            fetch(oauth2).await.unwrap();
            fetch(metadata).await.unwrap();
        }
    };
    let first = runtime();
    // Is polled once, which leaves the metadata half read, and each exchange half done.
    first.block_on(async {
        tokio::spawn(fetch(metadata.clone()));
        tokio::spawn(fetch(api_video.clone()));
        tokio::spawn(fetch(oauth2.clone()));
        tokio::task::yield_now().await;
        tokio::task::yield_now().await;
    });
    runtime().block_on(async { timeout(LIMIT, all()).await.unwrap() });
    // Has connections, if any are kept, when it is not driven any more.
    first.block_on(all());
    runtime().block_on(async { timeout(LIMIT, all()).await.unwrap() });
    // A login has one exchange at a time. The one before is given up if its runtime is not driven for some seconds.
    let endpoint = Server::token_endpoint(format!("{}/token", server.uri()));
    let login = OAuth2::login(endpoint, ClientAuth::public("id")).with_client(client(&server));
    let limit = Duration::from_millis(500);
    let login = TokenProvider::builder(login).login("seed").refresh_timeout(limit).build().unwrap();
    first.block_on(async {
        let login = login.clone();
        tokio::spawn(async move { login.token().await });
        tokio::task::yield_now().await;
        tokio::task::yield_now().await;
    });
    runtime().block_on(async { timeout(3 * LIMIT, until_ok(&login)).await.unwrap() });
}

/// Asks until there is a token: a refresh that waits for the exchange of another runtime may time out.
async fn until_ok(provider: &TokenProvider) {
    while provider.token().await.is_err() {}
}

/// An exchange of a login whose runtime was not driven is given up. If the runtime goes on, it sends nothing.
#[test]
fn given_up_exchange_sends_nothing() {
    let driven = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    for polls in [0, 2, 4] {
        let server = driven.block_on(AuthServer::start()).unwrap();
        let client = TokenClient::new().timeout(LIMIT / 2);
        let auth = ClientAuth::public(server.client_id());
        let login = OAuth2::login(Server::issuer(server.issuer()), auth).with_client(client);
        let limit = Duration::from_millis(500);
        let login =
            TokenProvider::builder(login).login(server.log_in()).refresh_timeout(limit).build().unwrap();
        let stalled = runtime();
        stalled.block_on(async {
            // The last handle is dropped: the exchange is in a task of its own.
            let mut fetching = Box::pin(login.token());
            for _ in 0..=polls {
                let _ =
                    std::future::poll_fn(|cx| std::task::Poll::Ready(fetching.as_mut().poll(cx).is_ready()))
                        .await;
                tokio::task::yield_now().await;
            }
        });
        driven.block_on(async {
            let both = async { tokio::join!(until_ok(&login), until_ok(&login)) };
            timeout(3 * LIMIT, both).await.unwrap();
        });
        stalled.block_on(async { tokio::time::sleep(Duration::from_millis(300)).await });
        login.invalidate();
        driven.block_on(login.token()).unwrap();
        let counters = server.counters();
        assert_eq!((counters.reused_refresh_tokens, counters.rejected_oauth_grants), (0, 0), "{polls}");
    }
}

/// The deadline of an exchange has passed when its runtime goes on.
#[test]
fn late_exchange_sends_nothing() {
    let driven = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let server = driven.block_on(AuthServer::start()).unwrap();
    let client = TokenClient::new().timeout(Duration::from_millis(200));
    let source = ApiVideo::new(server.api_key()).base_url(server.uri()).with_client(client);
    let stalled = runtime();
    let fetching = stalled.spawn(fetch(source));
    stalled.block_on(tokio::task::yield_now());
    thread::sleep(Duration::from_millis(300));
    assert!(stalled.block_on(fetching).unwrap().unwrap_err().is_timeout());
    assert_eq!(server.counters().api_key_grants, 0);
}

/// A server compresses unless told otherwise, and a firewall asks for a `User-Agent`.
#[tokio::test]
async fn each_request_has_headers_of_exchange() {
    let server = TokenServer::start(&["http/1.1"], |request| {
        let header = |name: &str| request.headers().get(name).map(|value| value.to_str().unwrap());
        if header("user-agent").is_none_or(|agent| !agent.starts_with("tower-bearer/")) {
            return Response::builder().status(403).body("<html>".to_owned()).unwrap();
        }
        let answer = grants(request);
        match header(ACCEPT_ENCODING.as_str()) {
            Some("identity") => answer,
            _ => Response::builder().header("content-encoding", "gzip").body(answer.into_body()).unwrap(),
        }
    })
    .await;
    let further =
        |client: TokenClient| client.header("x-tenant", "acme").header("accept", "application/vnd.x+json");
    fetch(api_video(&server).with_client(further(client(&server)))).await.unwrap();
    fetch(by_client(Server::issuer(server.uri()), further(client(&server)))).await.unwrap();
    let url = format!("{}/token", server.uri());
    further(client(&server)).post_json(&url, "{}").await.unwrap().token().unwrap();
    let requests = server.requests.lock().unwrap();
    let paths: Vec<_> = requests.iter().map(|(path, _)| path.as_str()).collect();
    assert_eq!(paths, ["/auth/api-key", "/.well-known/oauth-authorization-server", "/token", "/token"]);
    for (path, headers) in requests.iter() {
        assert_eq!(
            (&headers["x-tenant"], &headers["accept"]),
            (&"acme".parse().unwrap(), &"application/vnd.x+json".parse().unwrap()),
            "{path}"
        );
    }
    assert_eq!(requests[2].1["authorization"], "Basic aWQ6c2VjcmV0");
}

/// A token endpoint speaks HTTP/2 only, which needs a client of the user's.
#[tokio::test]
async fn http2_only_endpoint_is_reached_by_users_client() {
    let server = TokenServer::start(&["h2"], grants).await;
    let error = fetch(oauth2(&server)).await.unwrap_err();
    assert_eq!(error.kind(), SourceErrorKind::Unavailable, "{error}");

    let certificate = pem_to_der(&server.pem);
    let http2 = TokenClient::with_service(support::https::<String>(&certificate));
    fetch(oauth2(&server).with_client(http2.clone())).await.unwrap();
    fetch(api_video(&server).with_client(http2)).await.unwrap();
}

fn pem_to_der(pem: &str) -> Vec<u8> {
    use rustls::pki_types::{CertificateDer, pem::PemObject};
    CertificateDer::from_pem_slice(pem.as_bytes()).unwrap().to_vec()
}

/// Each exchange over TLS makes a full handshake: clones of one client share the TLS sessions.
#[tokio::test]
async fn tls_sessions_are_resumed() {
    let server = TokenServer::start(&["http/1.1"], grants).await;
    let client = client(&server);
    for _ in 0..3 {
        fetch(oauth2(&server).with_client(client.clone())).await.unwrap();
    }
    assert_eq!((server.connections(), server.resumed.load(std::sync::atomic::Ordering::SeqCst)), (3, 2));
}

/// Roots that are not valid are an error of `build`, and of each exchange.
#[tokio::test]
async fn invalid_roots_are_error_of_build() {
    for pem in ["", "/etc/ssl/ca.pem", "-----BEGIN CERTIFICATE-----\nx"] {
        let client = TokenClient::new().roots(Roots::Pem(pem.to_owned()));
        let source = by_client(Server::issuer("https://127.0.0.1:1"), client.clone());
        let built = TokenProvider::builder(source).build().unwrap_err();
        let expected = "the default client cannot set up TLS: the roots must be the text of valid certificates in PEM, not a path";
        assert!(built.to_string().ends_with(expected), "{built}");
        for _ in 0..2 {
            let error = client.post_json("https://127.0.0.1:1/", "").await.unwrap_err();
            assert_eq!(
                (error.kind(), error.to_string().as_str()),
                (SourceErrorKind::Configuration, expected)
            );
        }
    }
}

/// The token endpoint is slow, or down: the error says which, and whether the request was sent.
#[tokio::test]
async fn error_says_what_is_known_of_exchange() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = silent.local_addr().unwrap();
    let closing = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let closes = closing.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = closing.accept().await.unwrap();
            let _ = stream.read(&mut [0; 1024]).await;
        }
    });
    let tls = TokenServer::start(&["http/1.1"], grants).await;
    let ready =
        TokenServer::start(&[], |_| Response::builder().status(503).body(String::new()).unwrap()).await;
    // URL, timeout, connect, unsent
    for (url, expected) in [
        (format!("http://{address}"), (true, false, false)),
        (format!("https://{address}"), (true, true, true)),
        ("http://127.0.0.1:1".to_owned(), (false, true, true)),
        ("https://unknown.invalid".to_owned(), (false, true, true)),
        (tls.uri(), (false, true, true)),
        (format!("http://{closes}"), (false, false, false)),
        (ready.uri(), (false, false, false)),
    ] {
        let client = TokenClient::new().timeout(Duration::from_millis(300));
        let source = ApiVideo::new("key").base_url(url.parse().unwrap()).with_client(client.clone());
        let by_client = by_client(Server::token_endpoint(url.clone()), client.clone());
        let by_issuer = self::by_client(Server::issuer(url.clone()), client.clone());
        for error in [
            fetch(source).await.unwrap_err(),
            fetch(by_client).await.unwrap_err(),
            client.post_json(&url, "{}").await.unwrap_err(),
        ] {
            assert_eq!((error.is_timeout(), error.is_connect(), error.is_unsent()), expected, "{error}");
            assert_eq!(error.kind(), SourceErrorKind::Unavailable, "{error}");
        }
        // The credential is not sent before the metadata is known.
        let error = fetch(by_issuer).await.unwrap_err();
        assert_eq!(
            (error.is_timeout(), error.is_connect(), error.is_unsent()),
            (expected.0, expected.1, true),
            "{error}"
        );
    }
}

/// The error of an HTTP client quotes the exchange.
#[tokio::test]
async fn text_of_foreign_error_is_not_shown() {
    // GOAWAY with debug data (RFC 9113 §6.8).
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
                stream.write_all(&settings).await.unwrap();
                let _ = stream.read(&mut [0; 4096]).await;
                tokio::time::sleep(Duration::from_millis(50)).await;
                let debug = b"canary";
                let mut frame = vec![0, 0, 8 + debug.len() as u8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2];
                frame.extend_from_slice(debug);
                stream.write_all(&frame).await.unwrap();
                let _ = stream.read(&mut [0; 4096]).await;
            });
        }
    });
    let quoting = service_fn(|request: Request<String>| async move {
        let text = format!("{} {} {:?}", request.uri(), request.body(), request.headers());
        Err::<Response<String>, BoxError>(std::io::Error::other(text).into())
    });
    let canary = |client: TokenClient| async move {
        let source = ApiVideo::new("canary-key").base_url(url.parse().unwrap()).with_client(client.clone());
        let endpoint = Server::token_endpoint(format!("{url}/?canary"));
        let oauth2 = OAuth2::client_credentials(endpoint, ClientAuth::post("id", "canary"))
            .with_client(client.clone());
        let request =
            Request::post(format!("{url}/?canary")).header("x", "canary").body("canary".into()).unwrap();
        for error in [
            fetch(source).await.unwrap_err(),
            fetch(oauth2).await.unwrap_err(),
            client.send(request).await.unwrap_err(),
        ] {
            assert!(error.is_transient() && !error.is_unsent(), "{error:?}");
            let shown = format!("{} {error:?}", chain(&error));
            assert!(!shown.contains("canary"), "{shown}");
        }
    };
    canary.clone()(TokenClient::with_service(support::http2::<String>())).await;
    canary(TokenClient::with_service(quoting)).await;
}

/// An ingress answers 404 for the first seconds, while the token endpoint starts.
#[tokio::test]
async fn ready_waits_for_endpoint_behind_ingress() {
    let started = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let server = TokenServer::start(&[], {
        let started = Arc::clone(&started);
        move |request| match started.load(std::sync::atomic::Ordering::SeqCst) {
            true => grants(request),
            false => Response::builder().status(404).body("default backend - 404".to_owned()).unwrap(),
        }
    })
    .await;
    let instant = Duration::from_millis(1);
    let build = |source| TokenProvider::builder(source).cool_down(instant, 10 * instant).build().unwrap();
    let own = {
        let (client, url) = (client(&server), server.uri());
        source_fn(move |_| {
            let (client, url) = (client.clone(), url.clone());
            async move { client.post_json(&url, "{}").await?.token() }
        })
    };
    let api_video =
        TokenProvider::builder(api_video(&server)).cool_down(instant, 10 * instant).build().unwrap();
    let own = TokenProvider::builder(own).cool_down(instant, 10 * instant).build().unwrap();
    for provider in [build(oauth2(&server)), api_video, own] {
        started.store(false, std::sync::atomic::Ordering::SeqCst);
        let (token, ()) = tokio::join!(timeout(LIMIT, provider.ready()), async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            assert!(provider.token().await.is_err());
            started.store(true, std::sync::atomic::Ordering::SeqCst);
        });
        token.unwrap().unwrap();
    }
    // The place of the metadata, too. The address of its issuer is another one.
    started.store(false, std::sync::atomic::Ordering::SeqCst);
    let provider = build(by_client(Server::issuer(server.uri()), client(&server)));
    assert!(timeout(LIMIT / 10, provider.ready()).await.is_err());
    // What no status says is wrong ends it at once.
    started.store(true, std::sync::atomic::Ordering::SeqCst);
    let provider = build(by_client(Server::issuer(server.uri()), client(&server)));
    timeout(LIMIT, provider.ready()).await.unwrap().unwrap_err();
    let provider = TokenProvider::new(ApiVideo::new(""));
    timeout(LIMIT, provider.ready()).await.unwrap().unwrap_err();
}
