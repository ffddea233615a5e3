//! Measures an exchange with a token endpoint over loopback TLS, by the default client, which has a connection for each
//! exchange, and by a client with a pool.
//!
//! ```text
//! cargo bench --bench exchange              # 1,000 exchanges of each
//! cargo bench --bench exchange -- --brief   # 50
//! ```

use std::time::{Duration, Instant};

use base64::{Engine, prelude::BASE64_STANDARD};
use hyper_rustls::HttpsConnectorBuilder;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use rustls::{ClientConfig, RootCertStore};
use tower_bearer::{BoxError, TokenClient, tls::Roots};
use tower_bearer_testing::AuthServer;

/// The clients take turns, so that what else the machine does is the same for each.
const BLOCK: u32 = 50;

/// A client whose connections are kept, as hyper-util's default is.
fn pooled(certificate: &[u8], http2: bool) -> Result<TokenClient, BoxError> {
    let mut roots = RootCertStore::empty();
    roots.add(certificate.to_vec().into())?;
    let provider = rustls::crypto::ring::default_provider();
    let config = ClientConfig::builder_with_provider(provider.into())
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let mut tcp = HttpConnector::new();
    tcp.set_nodelay(true);
    tcp.enforce_http(false);
    let connector = HttpsConnectorBuilder::new().with_tls_config(config).https_only();
    let connector = match http2 {
        true => connector.enable_http2().wrap_connector(tcp),
        false => connector.enable_http1().wrap_connector(tcp),
    };
    let client = Client::builder(TokioExecutor::new()).http2_only(http2).build::<_, String>(connector);
    Ok(TokenClient::with_service(client))
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<(), BoxError> {
    let brief = std::env::args().any(|arg| arg == "--brief");
    let exchanges = if brief { BLOCK } else { 1_000 };
    let server = AuthServer::builder().tls(true).start().await?;
    let certificate = server.certificate().ok_or("the server has no certificate")?;
    let encoded = BASE64_STANDARD.encode(certificate);
    let pem = format!("-----BEGIN CERTIFICATE-----\n{encoded}\n-----END CERTIFICATE-----\n");
    let clients = [
        ("default: a connection for each exchange", TokenClient::new().roots(Roots::Pem(pem))),
        ("HTTP/1.1 with a pool", pooled(certificate, false)?),
        ("HTTP/2 with a pool", pooled(certificate, true)?),
    ];
    let url = format!("{}auth/api-key", server.uri());
    let body = format!(r#"{{"apiKey":"{}"}}"#, server.api_key());
    let (mut times, mut connections) = (clients.each_ref().map(|_| Vec::new()), [0; 3]);
    for _ in 0..exchanges / BLOCK {
        for (number, (_, client)) in clients.iter().enumerate() {
            let before = server.counters().connections;
            for _ in 0..BLOCK {
                let begun = Instant::now();
                client.post_json(&url, body.as_str()).await?.token()?;
                times[number].push(begun.elapsed());
            }
            connections[number] += server.counters().connections - before;
        }
    }
    println!("{exchanges} exchanges of each client\n");
    println!("{:<40} {:>10} {:>10} {:>12}", "client", "median", "p99", "connections");
    for (number, (name, _)) in clients.iter().enumerate() {
        let times = &mut times[number];
        times.sort();
        let at = |share: usize| milliseconds(times[(times.len() - 1) * share / 100]);
        println!("{name:<40} {:>7.2} ms {:>7.2} ms {:>12}", at(50), at(99), connections[number]);
    }
    Ok(())
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
