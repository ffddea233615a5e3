//! [`Options`] and [`InUse`]: how the store connects, and which connection an operation uses.

use std::{io, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use redis::{
    AsyncConnectionConfig, Client, ConnectionAddr, ErrorKind, FromRedisValue, RedisError, ScriptInvocation,
    ServerErrorKind, TlsCertificates, aio::MultiplexedConnection,
};
use rustls::crypto::CryptoProvider;
use tokio::{sync::OnceCell, time::timeout};

/// The newest connection. The first operation opens it, and its task runs on that operation's runtime.
pub(super) type Newest = ArcSwap<OnceCell<MultiplexedConnection>>;

#[derive(Clone)]
pub(super) struct Options {
    pub(super) prefix: String,
    pub(super) client: Client,
    /// The PEM of the trusted roots; `None` for the operating system's.
    pub(super) root_certificates: Option<Vec<u8>>,
    pub(super) connection_timeout: Duration,
    pub(super) response_timeout: Duration,
}

/// The connection that an operation uses. If the operation fails, or is dropped, the next one opens another connection.
///
/// The peer may be silent, demoted or gone, and the connection's runtime may not be driven any more. No error tells
/// these apart from a failure that another connection would not cure.
struct InUse<'a> {
    newest: &'a Newest,
    connection: Arc<OnceCell<MultiplexedConnection>>,
    works: bool,
}

impl Drop for InUse<'_> {
    fn drop(&mut self) {
        if !self.works {
            // Has no effect if another operation has replaced the connection already.
            self.newest.compare_and_swap(&self.connection, Arc::default());
        }
    }
}

impl Options {
    /// Creates the client that trusts the root certificates.
    pub(super) fn client(&self) -> Result<Client, RedisError> {
        let Some(pem) = &self.root_certificates else { return Ok(self.client.clone()) };
        let certificates = TlsCertificates { client_tls: None, root_cert: Some(pem.clone()) };
        Client::build_with_tls(self.client.get_connection_info().clone(), certificates)
    }

    async fn connect(&self) -> Result<MultiplexedConnection, RedisError> {
        let address = self.client.get_connection_info().addr();
        if matches!(address, ConnectionAddr::TcpTls { .. }) && CryptoProvider::get_default().is_none() {
            // An error means that another thread has installed one meanwhile, which is fine.
            let _ = rustls::crypto::ring::default_provider().install_default();
        }
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(self.connection_timeout))
            .set_response_timeout(Some(self.response_timeout));
        self.client()?.get_multiplexed_async_connection_with_config(&config).await
    }

    /// Runs a script on the newest connection. If that fails at once on a connection that was open before, it is run again on
    /// a new one, which may lead to another server. Each script may run twice.
    pub(super) async fn send<T: FromRedisValue>(
        &self,
        newest: &Newest,
        invocation: &ScriptInvocation<'_>,
    ) -> Result<T, RedisError> {
        let mut is_second = false;
        loop {
            let mut used = InUse { newest, connection: newest.load_full(), works: false };
            let was_open = used.connection.initialized();
            let result = async {
                // The connection may be opened by an operation whose runtime is not driven any more.
                let opened = used.connection.get_or_try_init(|| self.connect());
                let opened = timeout(self.connection_timeout, opened).await;
                let opened = opened.map_err(|_| RedisError::from(io::Error::from(io::ErrorKind::TimedOut)));
                invocation.invoke_async(&mut opened??.clone()).await
            };
            let result = result.await;
            used.works = result.is_ok();
            match result {
                Err(error) if was_open && !is_second && !error.is_timeout() => is_second = true,
                result => return result,
            }
        }
    }
}

/// Opens a client, which connects later. The error says what is wrong with the URL, without its user name and password.
pub(super) fn open(url: &str) -> Result<Client, String> {
    // Of a text that cannot be parsed, only a known scheme is shown: any other part may be a secret.
    let Some(parsed) = redis::parse_redis_url(url) else {
        let scheme = url.split_once("://").map_or("", |(scheme, _)| scheme);
        return Err(match scheme {
            "redis" | "rediss" | "redis+unix" | "unix" | "valkey" | "valkeys" | "valkey+unix" => format!(
                "an invalid URL with the scheme {scheme}: check the host and the port, and percent-encode the special \
                 characters of the password"
            ),
            _ => "another scheme".into(),
        });
    };
    let (scheme, path) = (parsed.scheme(), parsed.path());
    let host = parsed.host_str().unwrap_or_default();
    let has_host = !scheme.ends_with("unix");
    let after_host = [path, parsed.query().unwrap_or_default(), parsed.fragment().unwrap_or_default()];
    if has_host && after_host.iter().any(|part| part.contains('@')) {
        // A password with one of `/?#` ends the host early: the part before it would be shown as the host.
        return Err(format!(
            "{scheme}:// with @ after the host: percent-encode the special characters of the password"
        ));
    }
    let port = parsed.port().map(|port| format!(":{port}")).unwrap_or_default();
    let shown = format!("{scheme}://{host}{port}{path}");
    let database = path.trim_matches('/');
    if has_host && host.is_empty() {
        return Err(format!("{shown}, which has no host"));
    }
    if parsed.port() == Some(0) {
        return Err(format!("{shown}, whose port is 0"));
    }
    if has_host && !database.is_empty() && !database.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(format!("{shown}, whose database is not a number"));
    }
    // redis-rs' own message is dropped, because it may quote a part that is not shown here.
    match Client::open(url) {
        Ok(client) if client.get_connection_info().redis_settings().db() >= 0 => Ok(client),
        Ok(_) => Err(format!("{shown}, whose database is less than 0")),
        Err(_) => Err(format!("{shown}, which redis-rs rejects")),
    }
}

/// Whether only a change of the configuration helps: of the URL, of the user's rights, or of the trusted roots.
pub(super) fn is_configuration(error: &RedisError) -> bool {
    /// What has no code of its own. The first two are rights that a script lacks, before and since Redis 7.2.
    const DETAILS: [&str; 3] =
        ["The user executing the script can't", "ACL failure in script", "DB index is out of range"];

    matches!(
        error.kind(),
        ErrorKind::AuthenticationFailed
            | ErrorKind::InvalidClientConfig
            | ErrorKind::RESP3NotSupported
            | ErrorKind::Server(ServerErrorKind::NoPerm)
    ) || matches!(error.code(), Some("NOAUTH" | "NOPERM" | "WRONGPASS"))
        || error.detail().is_some_and(|detail| DETAILS.iter().any(|known| detail.contains(known)))
        // rustls' error, which redis-rs passes on within an I/O error.
        || (error.is_io_error() && error.to_string().starts_with("invalid peer certificate"))
}
