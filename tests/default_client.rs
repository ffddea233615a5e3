//! The default client over TLS, to a server whose certificate is among the operating system's roots (`native-roots`).
//!
//! The roots come from the file that `SSL_CERT_FILE` names, so both grants are made in a process of their own.

#[path = "support/folder.rs"]
mod folder;

use std::{env, process::Command};

use base64::{Engine, prelude::BASE64_STANDARD};
use folder::Folder;
use tower_bearer::{ApiVideo, BoxError, TokenProvider, testing::AuthServer};

const SERVER: &str = "TOWER_BEARER_TEST_SERVER";
const API_KEY: &str = "TOWER_BEARER_TEST_API_KEY";

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    match env::var(SERVER) {
        Ok(server) => both_grants(server, env::var(API_KEY)?).await,
        Err(_) => {
            default_client_trusts_system_roots().await?;
            println!("1 passed, 0 failed");
            Ok(())
        }
    }
}

async fn both_grants(server: String, api_key: String) -> Result<(), BoxError> {
    let provider = TokenProvider::new(ApiVideo::new(api_key).base_url(server.parse()?));
    let first = provider.token().await?;
    let second = provider.refresh(&first).await?;
    assert_eq!(second.generation(), 2);
    Ok(())
}

async fn default_client_trusts_system_roots() -> Result<(), BoxError> {
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
    grants.env("SSL_CERT_FILE", &roots).env(SERVER, server.uri().to_string()).env(API_KEY, server.api_key());
    let output = tokio::task::spawn_blocking(move || grants.output()).await??;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let counters = server.counters();
    assert_eq!((counters.api_key_grants, counters.refresh_grants), (1, 1));
    // One connection for both: the client keeps it. HTTP/2, since the server offers it.
    assert_eq!((counters.connections, counters.http2_requests), (1, 2));
    Ok(())
}
