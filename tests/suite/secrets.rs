//! No secret is in anything that can be printed, nor in the table of an HTTP/2 connection.

#![cfg(feature = "default-client")]

use std::{
    convert::Infallible,
    fmt::Debug,
    net::Ipv4Addr,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use http::{Request, Response, StatusCode, Uri, header::AUTHORIZATION};
use http_body_util::{Empty, Full};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tower::{Layer, Service, ServiceExt};
use tower_bearer::{
    AllowedOrigins, ApiVideo, BearerAuthLayer, SourceError, Token, TokenClient, TokenProvider,
};
use tower_bearer_testing::AuthServer;

use crate::support::{self, get};

#[derive(Default)]
struct Shown(String);

impl Shown {
    fn add(&mut self, value: &dyn Debug) {
        self.0 += &format!("{value:?}{value:#?}");
    }
}

/// An error, an event or `Debug` contains a key or a token.
#[tokio::test(start_paused = true)]
async fn nothing_prints_key_or_token() {
    let answer = r#"{"access_token": "canary-access", "refresh_token": "canary-refresh"}"#;
    let auth = tower::service_fn(move |request: Request<String>| async move {
        let is_refresh = request.uri().path().ends_with("refresh");
        let status = if is_refresh { StatusCode::UNAUTHORIZED } else { StatusCode::OK };
        let answer = Response::builder().status(status).body(Full::<Bytes>::from(answer)).unwrap();
        Ok::<_, Infallible>(answer)
    });
    let source = ApiVideo::new("canary-key").with_client(TokenClient::with_service(auth));
    let mut shown = Shown::default();
    shown.add(&source);
    shown.add(&TokenProvider::builder(source.clone()));
    let provider = TokenProvider::new(source.clone());
    let token = provider.token().await.unwrap();
    assert_eq!((token.access_token(), token.refresh_token()), ("canary-access", Some("canary-refresh")));
    shown.add(&token);
    shown.add(&token.header_value());
    shown.add(&Token::builder("canary-access").refresh_token("canary-refresh"));
    shown.add(&provider);
    shown.add(&provider.status());

    let layer = BearerAuthLayer::with_provider(provider.clone()).allowed_origins(AllowedOrigins::https());
    shown.add(&layer);
    shown.add(&layer.clone().buffered(1));
    shown.add(&layer.clone().replay_with(1, |body: tower_bearer::replay::ReplayBody<Empty<Bytes>>| body));
    shown.add(&layer.clone().clone_with(|body: &Empty<Bytes>| Some(*body)));
    shown.add(&layer.clone().no_replay());
    #[derive(Clone, Debug)]
    struct Api;
    impl Service<Request<Empty<Bytes>>> for Api {
        type Response = Response<Empty<Bytes>>;
        type Error = String;
        type Future = std::future::Ready<Result<Self::Response, String>>;

        fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Self::Error>> {
            std::task::Poll::Ready(Ok(()))
        }

        fn call(&mut self, request: Request<Empty<Bytes>>) -> Self::Future {
            assert_eq!(request.headers()[AUTHORIZATION], "Bearer canary-access");
            // A client that logs would print this.
            std::future::ready(Err(format!("{request:?}")))
        }
    }
    let mut service = layer.layer(Api);
    shown.add(&service);
    shown.add(&service.call(get()));
    let error = service.oneshot(get()).await.unwrap_err();
    assert!(error.to_string().contains("authorization"));
    shown.add(&error);
    shown.0 += &support::chain(&*error);

    source.set_key("canary key");
    let invalid_key = provider.refresh(&token).await.unwrap_err();
    shown.add(&invalid_key);
    shown.0 += &support::chain(&invalid_key);
    shown.add(&SourceError::rejected("no").with_cause(invalid_key));
    assert!(!shown.0.contains("canary"), "{}", shown.0);
}

/// Returns the HEADERS frames that a client sent over HTTP/2 (RFC 9113 §4.1, §6.2), without padding and priority.
fn headers_frames(sent: &[u8]) -> Vec<&[u8]> {
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let mut rest = sent.strip_prefix(PREFACE).expect("an HTTP/2 client");
    let mut found = Vec::new();
    while let Some((head, after)) = rest.split_first_chunk::<9>() {
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let (payload, next) = after.split_at(length);
        if head[3] == 1 {
            assert_eq!(head[4] & (0x8 | 0x20), 0, "padding or priority");
            found.push(payload);
        }
        rest = next;
    }
    found
}

/// HTTP/2 indexes the header of a token, for the first attempt or for a retry.
#[tokio::test]
async fn http2_never_indexes_token() {
    let server = AuthServer::start().await.unwrap();
    // A proxy between the client and the server, which keeps the bytes that the client sends.
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let between: Uri = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
    let sent = Arc::new(Mutex::new(Vec::new()));
    let (kept, address) = (Arc::clone(&sent), server.uri().authority().unwrap().to_string());
    tokio::spawn(async move {
        let (client, _) = listener.accept().await.unwrap();
        let upstream = TcpStream::connect(address).await.unwrap();
        let (mut from_client, mut to_client) = client.into_split();
        let (mut from_upstream, mut to_upstream) = upstream.into_split();
        tokio::spawn(async move { tokio::io::copy(&mut from_upstream, &mut to_client).await });
        let mut buffer = [0; 4096];
        loop {
            let read = from_client.read(&mut buffer).await.unwrap();
            if read == 0 {
                break;
            }
            kept.lock().unwrap().extend_from_slice(&buffer[..read]);
            to_upstream.write_all(&buffer[..read]).await.unwrap();
        }
    });

    let provider = TokenProvider::new(ApiVideo::new(server.api_key()).base_url(server.uri()));
    let service = BearerAuthLayer::with_provider(provider)
        .allowed_origins(AllowedOrigins::https())
        .layer(support::http2::<Empty<Bytes>>());
    for _ in 0..2 {
        let request = Request::get(format!("{between}videos")).body(Empty::new()).unwrap();
        assert_eq!(service.clone().oneshot(request).await.unwrap().status(), StatusCode::OK);
        server.revoke_access_tokens();
    }
    let sent = sent.lock().unwrap();
    let frames = headers_frames(&sent);
    // A request, another that is challenged, and its retry.
    assert_eq!(frames.len(), 3);
    for frame in frames {
        // RFC 7541 §6.2.3: a literal that is never indexed, whose name is the static table's 23rd, `authorization`.
        assert!(frame.windows(2).any(|bytes| bytes == [0x1f, 23 - 15]), "{frame:x?}");
    }
}
