//! [`Client`]: the HTTP client of a source.
//!
//! The default one is hyper-util's over rustls, with HTTP/2 if the server offers it.

use std::{
    io,
    sync::{Arc, OnceLock},
    time::Duration,
};

use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client as HyperClient, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};

use super::{
    endpoint::{Endpoint, ReportingBody},
    tls::{Cryptography, Roots},
};
use crate::error::SourceError;

/// Requests to a token endpoint are rare. A peer may close a connection that is idle for longer without notice.
const IDLE_TIMEOUT: Duration = Duration::from_secs(15);

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The HTTP client of a source.
#[derive(Clone)]
pub(crate) enum Client {
    Default(DefaultClient),
    /// The user's.
    Given(Endpoint),
}

/// The options of the default client, and the client. Clones share the client.
#[derive(Clone, Default)]
pub(crate) struct DefaultClient {
    roots: Roots,
    cryptography: Cryptography,
    /// Made by the first exchange, because loading root certificates takes time.
    made: Arc<OnceLock<Result<Endpoint, SourceError>>>,
}

impl Client {
    /// Sets the roots of the default client. A client of the user's does not change.
    pub(crate) fn set_roots(&mut self, roots: Roots) {
        if let Self::Default(client) = self {
            *client = DefaultClient { roots, cryptography: client.cryptography, made: Arc::default() };
        }
    }

    /// Sets the cryptography of the default client. A client of the user's does not change.
    pub(crate) fn set_cryptography(&mut self, cryptography: Cryptography) {
        if let Self::Default(client) = self {
            *client = DefaultClient { roots: client.roots, cryptography, made: Arc::default() };
        }
    }

    /// Returns the client, which is made if this is the first call.
    ///
    /// # Errors
    ///
    /// A configuration error if the default client's TLS cannot be set up, such as without a root certificate.
    pub(crate) fn endpoint(&self) -> Result<Endpoint, SourceError> {
        match self {
            Self::Given(endpoint) => Ok(endpoint.clone()),
            Self::Default(client) => client.endpoint(),
        }
    }
}

impl Default for Client {
    fn default() -> Self {
        Self::Default(DefaultClient::default())
    }
}

impl DefaultClient {
    fn endpoint(&self) -> Result<Endpoint, SourceError> {
        let make = || match default_client(self.roots, self.cryptography) {
            Ok(client) => Ok(Endpoint::reporting(client)),
            Err(error) => {
                Err(SourceError::configuration(format!("the default client cannot set up TLS: {error}")))
            }
        };
        self.made.get_or_init(make).clone()
    }
}

fn default_client(
    roots: Roots,
    cryptography: Cryptography,
) -> io::Result<HyperClient<HttpsConnector<HttpConnector>, ReportingBody>> {
    // Passed explicitly: the client neither needs nor changes the process's default provider.
    let provider = match cryptography {
        Cryptography::Ring => rustls::crypto::ring::default_provider(),
        #[cfg(feature = "aws-lc-rs")]
        Cryptography::AwsLcRs => rustls::crypto::aws_lc_rs::default_provider(),
    };
    let connector = HttpsConnectorBuilder::new();
    let connector = match roots {
        Roots::WebPki => connector.with_provider_and_webpki_roots(provider).map_err(io::Error::other)?,
        #[cfg(feature = "native-roots")]
        Roots::Native => connector.with_provider_and_native_roots(provider)?,
    };

    let mut tcp = HttpConnector::new();
    tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
    tcp.set_nodelay(true);
    // The TLS connector above it checks the scheme. With this set, the TCP connector would fail for `https`.
    tcp.enforce_http(false);
    Ok(HyperClient::builder(TokioExecutor::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(IDLE_TIMEOUT)
        .build(connector.https_or_http().enable_all_versions().wrap_connector(tcp)))
}
