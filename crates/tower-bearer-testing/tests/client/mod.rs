//! Clients of the server, and the text of an error.

use std::sync::Arc;

use bytes::Bytes;
use http_body_util::Full;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use rustls::{ClientConfig, RootCertStore, crypto::ring::default_provider};

pub(crate) fn http1() -> Client<HttpConnector, Full<Bytes>> {
    Client::builder(TokioExecutor::new()).build_http()
}

/// Creates a TLS client that trusts only this certificate, and uses HTTP/2 if the server supports it.
pub(crate) fn https(certificate: &[u8]) -> Client<HttpsConnector<HttpConnector>, Full<Bytes>> {
    let mut roots = RootCertStore::empty();
    roots.add(certificate.to_vec().into()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connector =
        HttpsConnectorBuilder::new().with_tls_config(config).https_only().enable_all_versions().build();
    Client::builder(TokioExecutor::new()).build(connector)
}

/// Formats an error with its chain of sources.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let beneath = error.source().map(|source| format!(": {}", chain(source)));
    format!("{error}{}", beneath.unwrap_or_default())
}
