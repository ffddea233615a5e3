//! The default client for an auth endpoint: hyper-util's, over rustls, with HTTP/2 where the server offers it.

use std::time::Duration;

use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};

use super::endpoint::ReportingBody;
use crate::error::SourceError;

/// Auth endpoints are asked once in a while: a connection that was idle for longer may be gone without our knowing.
const IDLE_TIMEOUT: Duration = Duration::from_secs(15);

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

type DefaultClient = Client<HttpsConnector<HttpConnector>, ReportingBody>;

/// # Errors
///
/// A configuration error where the operating system has no root certificates (feature `native-roots`).
pub(super) fn default_client() -> Result<DefaultClient, SourceError> {
    // Named, so that the process's own default provider is neither needed nor disturbed.
    #[cfg(feature = "aws-lc-rs")]
    let crypto = rustls::crypto::aws_lc_rs::default_provider();
    #[cfg(not(feature = "aws-lc-rs"))]
    let crypto = rustls::crypto::ring::default_provider();

    let connector = HttpsConnectorBuilder::new();
    #[cfg(feature = "native-roots")]
    let connector = connector.with_provider_and_native_roots(crypto);
    #[cfg(not(feature = "native-roots"))]
    let connector = connector.with_provider_and_webpki_roots(crypto);

    let mut tcp = HttpConnector::new();
    tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
    tcp.set_nodelay(true);
    // The URI's scheme is the TLS connector's concern.
    tcp.enforce_http(false);
    let connector = connector
        .map_err(|error| {
            SourceError::configuration("the default client's TLS cannot be set up").with_cause(error)
        })?
        .https_or_http()
        .enable_all_versions()
        .wrap_connector(tcp);
    Ok(Client::builder(TokioExecutor::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(IDLE_TIMEOUT)
        .build(connector))
}
