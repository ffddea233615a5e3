//! [`DefaultClient`]: hyper-util's client over rustls, with a connection for each exchange.

use std::{
    convert::Infallible,
    io,
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::Request;
use http_body::{Body, Frame, SizeHint};
use http_body_util::Full;
use hyper_rustls::{ConfigBuilderExt, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, pem::PemObject},
};
use tower::ServiceExt;

use super::{
    tls::{Cryptography, Roots},
    transport::{Sent, Transport},
};
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
        let client = client.map_request(|request: Request<String>| {
            let sent = request.extensions().get::<Sent>().cloned().unwrap_or_default();
            request.map(|body| ReportingBody { body: body.into(), sent })
        });
        Ok(Transport::new(client, true))
    }
}

fn parsed(pem: &str) -> io::Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem.as_bytes()) {
        let certificate = certificate.map_err(|_| io::Error::other("Roots::Pem is not valid PEM"))?;
        roots.add(certificate).map_err(io::Error::other)?;
    }
    let is_empty = roots.is_empty().then(|| io::Error::other("Roots::Pem has no certificate"));
    is_empty.map_or(Ok(roots), Err)
}

/// A request body that sets [`Sent`] when it is used. A connection uses the body once it is established, so that a TLS
/// handshake that hangs sends nothing.
struct ReportingBody {
    body: Full<Bytes>,
    sent: Sent,
}

impl Body for ReportingBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.sent.set(true);
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        // An empty body is not polled.
        self.sent.set(true);
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
