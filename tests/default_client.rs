//! TLS of the default client: a feature makes roots and cryptography available, and only a call chooses them.
//!
//! The test server's certificate is the only root in the file that `SSL_CERT_FILE` names. The operating system's roots
//! are read once per process, so the grants run in a child process that has this variable.
#![cfg(feature = "native-roots")]

mod support;

use std::{env, net::TcpListener, process::Command};

use base64::{Engine, prelude::BASE64_STANDARD};
use rustls::{NamedGroup, crypto::CryptoProvider, server::Acceptor};
use support::folder::Folder;
use tower_bearer::{
    ApiVideo, BoxError, RefreshReason, TokenClient, TokenProvider, TokenRequest, TokenSource,
    tls::{Cryptography, Roots},
};
use tower_bearer_testing::AuthServer;

const SERVER: &str = "TOWER_BEARER_TEST_SERVER";
const API_KEY: &str = "TOWER_BEARER_TEST_API_KEY";

/// Both grants with the system's roots, after an attempt without them. Runs in the child process.
async fn grants(server: String, api_key: String) -> Result<(), BoxError> {
    let source = ApiVideo::new(api_key).base_url(server.parse()?);
    for untrusting in [source.clone(), source.clone().with_client(TokenClient::new().roots(Roots::WebPki))] {
        let error = untrusting.fetch(&TokenRequest::new(RefreshReason::Missing)).await.unwrap_err();
        assert!(error.is_transient(), "{error:?}");
        assert!(format!("{error:?}").contains("UnknownIssuer"), "{error:?}");
    }
    let provider = TokenProvider::new(source.with_client(TokenClient::new().roots(Roots::Native)));
    let first = provider.token().await?;
    let second = provider.refresh(&first).await?;
    assert_eq!(second.generation(), 2);
    Ok(())
}

/// A feature alone makes the default client trust the operating system's roots.
#[tokio::test]
async fn roots_are_chosen_by_call() -> Result<(), BoxError> {
    if let Ok(server) = env::var(SERVER) {
        return grants(server, env::var(API_KEY)?).await;
    }
    let server = AuthServer::builder().tls(true).start().await?;
    let certificate = server.certificate().ok_or("the server has no certificate")?;
    let pem = format!(
        "-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n",
        BASE64_STANDARD.encode(certificate)
    );
    let folder = Folder::new();
    let roots = folder.0.join("roots.pem");
    std::fs::write(&roots, pem)?;
    let mut grants = Command::new(env::current_exe()?);
    grants.args(["--exact", "roots_are_chosen_by_call"]);
    grants.env("SSL_CERT_FILE", &roots).env(SERVER, server.uri().to_string()).env(API_KEY, server.api_key());
    let output = tokio::task::spawn_blocking(move || grants.output()).await??;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    let counters = server.counters();
    assert_eq!((counters.api_key_grants, counters.refresh_grants), (1, 1));
    // One connection for each exchange, by HTTP/1.1.
    assert_eq!((counters.connections, counters.http2_requests), (4, 0));
    Ok(())
}

/// A feature alone changes the cryptography of the default client: the groups for key exchange in the ClientHello show
/// which one it uses.
#[tokio::test]
async fn cryptography_is_chosen_by_call() -> Result<(), BoxError> {
    let ring = groups_of(&rustls::crypto::ring::default_provider());
    let source = ApiVideo::new("key");
    assert_eq!(offered_by(source.clone()).await?, ring);
    assert_eq!(
        offered_by(source.clone().with_client(TokenClient::new().cryptography(Cryptography::Ring))).await?,
        ring
    );
    #[cfg(feature = "aws-lc-rs")]
    {
        let offered =
            offered_by(source.with_client(TokenClient::new().cryptography(Cryptography::AwsLcRs))).await?;
        assert!(offered.contains(&NamedGroup::X25519MLKEM768) && offered != ring, "{offered:?}");
    }
    Ok(())
}

fn groups_of(provider: &CryptoProvider) -> Vec<NamedGroup> {
    provider.kx_groups.iter().map(|group| group.name()).collect()
}

/// Returns the groups for key exchange that the default client of `source` offers.
async fn offered_by(source: ApiVideo) -> Result<Vec<NamedGroup>, BoxError> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let base_url = format!("https://{}", listener.local_addr()?).parse()?;
    let hello = tokio::task::spawn_blocking(move || -> Result<_, BoxError> {
        let (mut stream, _) = listener.accept()?;
        let mut acceptor = Acceptor::default();
        loop {
            acceptor.read_tls(&mut stream)?;
            if let Some(accepted) = acceptor.accept().map_err(|(error, _)| error)? {
                let hello = accepted.client_hello();
                return Ok(hello.named_groups().ok_or("the client offers no groups")?.to_vec());
            }
        }
    });
    let source = source.base_url(base_url);
    // The server ends the connection after the ClientHello.
    assert!(source.fetch(&TokenRequest::new(RefreshReason::Missing)).await.is_err());
    hello.await?
}
