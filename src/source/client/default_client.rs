//! [`DefaultClient`]: hyper-util's client over rustls, with a connection for each exchange.

use std::io;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use hyper_rustls::{ConfigBuilderExt, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::{HttpConnector, capture_connection};
use hyper_util::rt::TokioExecutor;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use tower::ServiceExt;

use super::tls::{Cryptography, Roots};
use super::transport::{Sent, Transport};
use crate::error::SourceError;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The options of the default client, and the client. Clones share the client, which holds no connection.
#[derive(Clone, Default)]
pub(super) struct DefaultClient {
    pub(super) roots: Roots,
    pub(super) cryptography: Cryptography,
    /// Made by the first exchange, because loading root certificates takes time. A failure is not remembered.
    made: Arc<OnceLock<Transport>>,
}

impl DefaultClient {
    pub(super) fn new(roots: Roots, cryptography: Cryptography) -> Self {
        Self { roots, cryptography, made: Arc::default() }
    }

    /// Returns the client, which is made unless one of the clones has made it.
    ///
    /// # Errors
    ///
    /// [`SourceError::configuration`] if TLS cannot be set up, such as without a root certificate.
    pub(super) fn transport(&self) -> Result<Transport, SourceError> {
        if let Some(made) = self.made.get() {
            return Ok(made.clone());
        }
        let made = self.make().map_err(|error| {
            SourceError::configuration(format!("the default client cannot set up TLS: {error}"))
        })?;
        Ok(self.made.get_or_init(|| made).clone())
    }

    fn make(&self) -> io::Result<Transport> {
        // Passed explicitly: the client neither needs nor changes the process's default provider.
        let provider = match self.cryptography {
            Cryptography::Ring => rustls::crypto::ring::default_provider(),
            #[cfg(feature = "aws-lc-rs")]
            Cryptography::AwsLcRs => rustls::crypto::aws_lc_rs::default_provider(),
        };
        let config = ClientConfig::builder_with_provider(provider.into())
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?;
        let config = match &self.roots {
            Roots::WebPki => config.with_webpki_roots(),
            #[cfg(feature = "native-roots")]
            Roots::Native => config.with_native_roots()?,
            Roots::Pem(pem) => config.with_root_certificates(parsed(pem)?),
        };
        let mut tcp = HttpConnector::new();
        tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
        tcp.set_nodelay(true);
        // The TLS connector above it checks the scheme. With this set, the TCP connector would fail for `https`.
        tcp.enforce_http(false);
        let https = HttpsConnectorBuilder::new().with_tls_config(config.with_no_client_auth());
        // No connection outlives its exchange. HTTP/2 would have nothing to share.
        let client = Client::builder(TokioExecutor::new())
            .pool_max_idle_per_host(0)
            .build(https.https_or_http().enable_http1().wrap_connector(tcp));
        let client = client.map_request(|mut request: Request<String>| {
            let captured = capture_connection(&mut request);
            if let Some(sent) = request.extensions().get::<Sent>() {
                sent.set(Some(Box::new(move || captured.connection_metadata().is_some())));
            }
            request.map(Full::<Bytes>::from)
        });
        Ok(Transport::new(client, true))
    }
}

/// Reads certificates, of which there is at least one.
fn parsed(pem: &str) -> io::Result<RootCertStore> {
    let invalid = || io::Error::other("the roots must be the text of valid certificates in PEM, not a path");
    let certificates = CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<Vec<_>, _>>();
    let mut roots = RootCertStore::empty();
    match roots.add_parsable_certificates(certificates.map_err(|_| invalid())?) {
        (1.., 0) => Ok(roots),
        _ => Err(invalid()),
    }
}
