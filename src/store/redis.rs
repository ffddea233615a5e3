//! [`RedisStore`]: one token for processes on any number of hosts, in Redis.

use std::{
    fmt,
    hash::{BuildHasher, RandomState},
    io,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use redis::{
    AsyncConnectionConfig, Client, ConnectionAddr, ErrorKind, FromRedisValue, RedisError, Script,
    ScriptInvocation, ServerErrorKind, TlsCertificates, aio::MultiplexedConnection,
};
use rustls::crypto::CryptoProvider;
use tokio::{
    sync::OnceCell,
    time::{Instant, timeout},
};

use super::{Extension, Lease, NamespacedStore, Publication, Record, StoreError, TokenStore};
use crate::{error::Error, observability::millis};

const CONNECTION_TIMEOUT: Duration = Duration::from_secs(1);
const RESPONSE_TIMEOUT: Duration = Duration::from_millis(500);
const MAX_TIMEOUT: Duration = Duration::from_secs(60);
const KEY_PREFIX: &str = "tower-bearer:";

/// How long Redis keeps a record after its token has expired, unless it is needed then.
const RETENTION: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// KEYS: the record, the lease. Returns the version, the remaining lifetime in ms or an empty string, and the text;
/// or nil.
///
/// The hash's field for the version is `generation`: renaming it would make existing records unreadable.
const LOAD: &str = r"
    local found = redis.call('HMGET', KEYS[1], 'generation', 'expires_at', 'text')
    if not found[1] or not found[3] then return false end
    local left, expires_at = found[2] or '', tonumber(found[2])
    if expires_at then
        local time = redis.call('TIME')
        left = string.format('%.0f', math.max(0, expires_at - (time[1] * 1000 + math.floor(time[2] / 1000))))
    end
    return {found[1], left, found[3]}
";

/// KEYS: the record, the lease. ARGV: the lease's length and the record's retention, in ms, and the lease's owner.
/// Returns the fence and Redis' time in ms; or nil.
///
/// The fence is based on the clock, so that it is greater than any fence that was lost in a flush or a failover. A
/// stored fence that is not a number, or is beyond the integers that Lua represents exactly, was not written by this
/// crate and is ignored. So is a lease without an expiry.
///
/// A lease of the same owner is granted again, with its fence: its grant did not arrive. The SET of a key that exists
/// has no effect, but makes a replica answer READONLY instead of reporting a lease of its former master.
const LEASE: &str = r"
    local time = redis.call('TIME')
    local newest = redis.call('HMGET', KEYS[1], 'fence', 'owner')
    local last = tonumber(newest[1]) or 0
    if not (last < 2 ^ 53) then last = 0 end
    local fence = string.format('%.0f', math.max(time[1] * 1000000 + time[2], last + 1))
    if redis.call('PTTL', KEYS[2]) >= 0 then
        if newest[2] ~= ARGV[3] or redis.call('GET', KEYS[2]) ~= newest[1] then
            redis.call('SET', KEYS[2], fence, 'NX')
            return false
        end
        fence = newest[1]
    end
    local kept = redis.call('PTTL', KEYS[1])
    redis.call('HSET', KEYS[1], 'fence', fence, 'owner', ARGV[3])
    if kept == -2 then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
    redis.call('SET', KEYS[2], fence, 'PX', ARGV[1])
    return {fence, string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))}
";

/// KEYS: the record, the lease. ARGV: the fence, the token's expiry in Redis' time in ms or an empty string, the
/// text, the retention in ms or an empty string. Returns whether the record is stored.
///
/// If the stored fence was lost, the record is stored, because no lease was granted since.
const PUBLISH: &str = r"
    local newest = tonumber(redis.call('HGET', KEYS[1], 'fence'))
    if newest and newest > tonumber(ARGV[1]) then return 0 end
    redis.call('HSET', KEYS[1], 'fence', ARGV[1], 'generation', ARGV[1], 'expires_at', ARGV[2], 'text', ARGV[3])
    if ARGV[4] == '' then redis.call('PERSIST', KEYS[1]) else redis.call('PEXPIRE', KEYS[1], ARGV[4]) end
    return 1
";

/// KEYS: the record, the lease. ARGV: the fence, the lease's length in ms. Returns whether the lease was extended.
const EXTEND: &str = r"
    if redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end
    redis.call('PEXPIRE', KEYS[2], ARGV[2])
    return 1
";

/// KEYS: the record, the lease. ARGV: the fence.
const RELEASE: &str = r"
    if redis.call('GET', KEYS[2]) == ARGV[1] then redis.call('DEL', KEYS[2]) end
    return 1
";

/// Keeps the token in Redis 5 or newer, or a compatible server, for processes on any number of hosts.
///
/// ```
/// use tower_bearer::{ApiVideo, TokenProvider, store::RedisStore};
///
/// # async fn run() -> Result<(), tower_bearer::Error> {
/// let store = RedisStore::new("rediss://user:password@redis.example:6380/0", "api.video")?;
/// let provider = TokenProvider::builder(ApiVideo::new("your-api-key")).store(store).build()?;
/// # Ok(())
/// # }
/// ```
///
/// # Data in Redis
///
/// A hash contains the record and the newest fence. A string is the lease and expires with it. Both keys begin with
/// `tower-bearer:{namespace}:`, so that a cluster keeps them on one node. Five short scripts access them, each in one
/// step. All times are measured by Redis, so the clocks of the hosts need not agree. Redis deletes a record thirty
/// days after its token has expired. It keeps the record of a user's login, and that of a token without a known
/// lifetime: delete the keys of a credential that is no longer used.
///
/// Read access to these keys reveals the token. [`EncryptedStore`](super::EncryptedStore) encrypts it (feature
/// `encryption`). Members and publishers need the rights of the first line, readers those of the second:
///
/// ```text
/// ~tower-bearer:* +eval +evalsha +script|load +hset +hget +hmget +set +get +del +pttl +pexpire +persist +time +ping
/// ~tower-bearer:* +eval +evalsha +script|load +hmget +time +ping
/// ```
///
/// # Data loss
///
/// After a flush, a restart without persistence or an eviction, the next refresh finds no record and uses the
/// process's own refresh token. A failover to a replica may lose the last write. If that was a lease, two processes
/// may have a lease at once; the newer one has the greater fence, because fences are based on the clock. If it was a
/// record, the next holder finds the previous one, whose refresh token no longer works, and authenticates once. Data
/// loss costs only calls ([`TokenStore`](TokenStore#what-makes-it-right)), unless there is nothing to authenticate with: a
/// lost record of a user's [login](crate::TokenProviderBuilder::login) may cost it. Turn on persistence for it.
///
/// # Connections
///
/// The store uses one connection, opened on first use. If an operation fails or is dropped, the next one opens a new
/// connection, which resolves the host's name again: a peer may be silent, a former master read-only, or the runtime
/// that drives the connection stopped. An operation that fails at once on a connection that was open before is tried
/// once more on a new one. In a cluster, use the address of the node that has the keys, or of a proxy: redirections are
/// not followed.
///
/// Handles of [`for_namespace`](NamespacedStore::for_namespace) share this connection: ten thousand handles use one. A
/// handle takes 40 bytes and its namespace. [`timeouts`](Self::timeouts) and
/// [`root_certificates`](Self::root_certificates) on a handle do not change the others: the handle then opens a
/// connection of its own. In a cluster, the namespaces are on different nodes, so handles need a proxy.
///
/// ```
/// use tower_bearer::{ApiVideo, TokenProvider, store::{NamespacedStore, RedisStore}};
///
/// # fn run() -> Result<(), tower_bearer::Error> {
/// let store = RedisStore::new("rediss://user:password@redis.example:6380/0", "tenants")?;
/// let acme = TokenProvider::builder(ApiVideo::new("acme-api-key")).store(store.for_namespace("acme")).build()?;
/// let emca = TokenProvider::builder(ApiVideo::new("emca-api-key")).store(store.for_namespace("emca")).build()?;
/// # Ok(())
/// # }
/// # run().unwrap();
/// ```
///
/// `rediss://` is TLS by rustls with its process-wide default cryptography provider. If the program has installed
/// none, the store installs that of `ring` when it connects, whatever features are enabled.
pub struct RedisStore {
    namespace: Box<str>,
    options: Arc<Options>,
    /// Stores that share it have the same options, except for the prefix.
    connection: Arc<Newest>,
    /// The name under which this handle asks for the lease next; 0 for a new one.
    ///
    /// A command whose connection was given up may still be performed, and its lease would then be held by nobody. So
    /// the handle asks under the same name again until it gets the lease, and after it has released it. An operation that asks
    /// meanwhile takes another name: two leases of one handle exclude each other.
    owner: AtomicU64,
}

/// The newest connection. The first operation opens it, and its task runs on that operation's runtime.
type Newest = ArcSwap<OnceCell<MultiplexedConnection>>;

#[derive(Clone)]
struct Options {
    prefix: String,
    client: Client,
    /// The PEM of the trusted roots; `None` for the operating system's.
    root_certificates: Option<Vec<u8>>,
    connection_timeout: Duration,
    response_timeout: Duration,
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

/// What a lease was granted with. An expiry computed from the two times does not depend on how long the answer, or a
/// later command, takes.
struct Granted {
    owner: u64,
    redis_ms: u64,
    /// Taken after the answer arrived, never before, so that a token may expire early in Redis but not late.
    answered_at: Instant,
}

impl Granted {
    /// Returns Redis' time when `left` has passed from now on.
    fn redis_ms_in(&self, left: Duration) -> u64 {
        self.redis_ms.saturating_add(millis(self.answered_at.elapsed().saturating_add(left)))
    }
}

struct Scripts {
    load: Script,
    lease: Script,
    extend: Script,
    publish: Script,
    release: Script,
}

static SCRIPTS: LazyLock<Scripts> = LazyLock::new(|| Scripts {
    load: Script::new(LOAD),
    lease: Script::new(LEASE),
    extend: Script::new(EXTEND),
    publish: Script::new(PUBLISH),
    release: Script::new(RELEASE),
});

impl RedisStore {
    /// Creates a store at `url` (`redis://`, `rediss://` for TLS, or `redis+unix://`) with the record of the credential
    /// named `namespace`.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if `url` has another scheme, no host, the port 0 or a database that is not a number, or
    /// if the namespace is not 1 to 200 visible ASCII characters without braces. The error shows `url` without its user
    /// name and password.
    pub fn new(url: &str, namespace: impl Into<String>) -> Result<Self, Error> {
        let namespace = namespace.into();
        check_namespace(&namespace)?;
        let client = open(url).map_err(|got| {
            Error::out_of_range(
                "RedisStore::new: url",
                "redis://[[user]:password@]host[:port][/database], rediss:// for TLS, or redis+unix:///path",
                got,
            )
        })?;
        let options = Options {
            prefix: KEY_PREFIX.into(),
            client,
            root_certificates: None,
            connection_timeout: CONNECTION_TIMEOUT,
            response_timeout: RESPONSE_TIMEOUT,
        };
        Ok(Self::with(namespace, Arc::new(options), Arc::default()))
    }

    fn with(namespace: String, options: Arc<Options>, connection: Arc<Newest>) -> Self {
        Self { namespace: namespace.into(), options, connection, owner: AtomicU64::new(0) }
    }

    /// Sets the prefix of the keys' names. Default: `tower-bearer:`.
    ///
    /// It must not contain a brace: a cluster would then choose the node by the prefix instead of the namespace.
    pub fn key_prefix(mut self, prefix: impl Into<String>) -> Self {
        Arc::make_mut(&mut self.options).prefix = prefix.into();
        self
    }

    /// Sets the time limits for opening a connection and for a response: > 0 and <= 1 min. Default: 1 s and 500 ms.
    ///
    /// Independently of them, a whole operation that takes more than two seconds counts as failed.
    pub fn timeouts(mut self, connection: Duration, response: Duration) -> Self {
        let options = self.options_of_connection();
        (options.connection_timeout, options.response_timeout) = (connection, response);
        self
    }

    /// Trusts only these root certificates, in PEM, for a `rediss://` URL. Default: those of the operating system.
    pub fn root_certificates(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.options_of_connection().root_certificates = Some(pem.into());
        self
    }

    /// Returns the options of the connection, to change them. The store no longer uses the connection that has the old
    /// ones, which handles may share.
    fn options_of_connection(&mut self) -> &mut Options {
        self.connection = Arc::default();
        Arc::make_mut(&mut self.options)
    }

    fn address(&self) -> &ConnectionAddr {
        self.options.client.get_connection_info().addr()
    }

    /// Prepares a script with the two keys.
    fn invoke(&self, script: &'static Script) -> ScriptInvocation<'static> {
        let key = |name: &str| format!("{}{{{}}}:{name}", self.options.prefix, self.namespace);
        let mut invocation = script.prepare_invoke();
        invocation.key(key("record")).key(key("lease"));
        invocation
    }

    async fn run<T: FromRedisValue>(&self, invocation: &ScriptInvocation<'_>) -> Result<T, StoreError> {
        self.send(invocation).await.map_err(|error| self.failed(&error))
    }

    /// Runs a script. If that fails at once on a connection that was open before, it is run again on a new one, which
    /// may lead to another server. Each script may run twice.
    async fn send<T: FromRedisValue>(&self, invocation: &ScriptInvocation<'_>) -> Result<T, RedisError> {
        let mut is_second = false;
        loop {
            let newest = &*self.connection;
            let mut used = InUse { newest, connection: newest.load_full(), works: false };
            let was_open = used.connection.initialized();
            let result = async {
                // The connection may be opened by an operation whose runtime is not driven any more.
                let opened = used.connection.get_or_try_init(|| self.options.connect());
                let opened = timeout(self.options.connection_timeout, opened).await;
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

    /// Returns the error of an operation. Its text says where, and why. It has no source, so that a chain of sources
    /// shows the cause once.
    fn failed(&self, error: &RedisError) -> StoreError {
        match (error.kind(), error.code()) {
            // Without redis-rs' text, which would quote the response.
            (ErrorKind::Parse | ErrorKind::UnexpectedReturnType, _) => {
                self.error(error, "the server is not Redis")
            }
            (ErrorKind::AuthenticationFailed, _) => {
                self.error(error, "the server rejects the user name or the password")
            }
            (_, Some(code)) => {
                // The response to an unknown command quotes its arguments. Those of HELLO include the password.
                let detail = error.detail().and_then(|detail| detail.split(", with args").next());
                self.error(error, format_args!("the server answers {code}: {}", detail.unwrap_or_default()))
            }
            _ => self.error(error, error),
        }
    }

    fn error(&self, error: &RedisError, what: impl fmt::Display) -> StoreError {
        let text = format!("Redis at {}, namespace {:?}: {what}", self.address(), self.namespace);
        if is_configuration(error) { StoreError::configuration(text) } else { StoreError::unavailable(text) }
    }
}

impl Options {
    /// Creates the client that trusts the root certificates.
    fn client(&self) -> Result<Client, RedisError> {
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
}

fn check_namespace(namespace: &str) -> Result<(), Error> {
    let fits = |byte: u8| byte.is_ascii_graphic() && !b"{}".contains(&byte);
    if !(1..=200).contains(&namespace.len()) || !namespace.bytes().all(fits) {
        return Err(Error::InvalidOption(
            format!(
                "namespace must be 1 to 200 visible ASCII characters without {{ and }}, got {namespace:?}"
            )
            .into(),
        ));
    }
    Ok(())
}

/// Opens a client, which connects later. The error says what is wrong with the URL, without its user name and password.
fn open(url: &str) -> Result<Client, String> {
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

impl TokenStore for RedisStore {
    fn namespace(&self) -> &str {
        &self.namespace
    }

    fn validate(&self) -> Result<(), Error> {
        check_namespace(&self.namespace)?;
        let options = &self.options;
        if options.prefix.contains(['{', '}']) {
            return Err(Error::InvalidOption(
                format!("RedisStore::key_prefix must not contain {{ or }}, got {:?}", options.prefix).into(),
            ));
        }
        for timeout in [options.connection_timeout, options.response_timeout] {
            if timeout.is_zero() || timeout > MAX_TIMEOUT {
                return Err(Error::InvalidOption(
                    format!("RedisStore::timeouts must be > 0 and <= {MAX_TIMEOUT:?}, got {timeout:?}")
                        .into(),
                ));
            }
        }
        options.client().map_err(|_| {
            Error::InvalidOption(
                "RedisStore::root_certificates must be PEM, and needs a rediss:// URL".into(),
            )
        })?;
        Ok(())
    }

    async fn load(&self) -> Result<Option<Record>, StoreError> {
        let loaded: Option<[Vec<u8>; 3]> = self.run(&self.invoke(&SCRIPTS.load)).await?;
        let Some(parts) = loaded else { return Ok(None) };
        read(parts)
            .map(Some)
            .ok_or_else(|| StoreError::invalid_record("the stored record was not written by this crate"))
    }

    async fn lease(&self, length: Duration) -> Result<Option<Lease>, StoreError> {
        let mut lease = self.invoke(&SCRIPTS.lease);
        let owner = match self.owner.swap(0, Ordering::Relaxed) {
            0 => RandomState::new().hash_one(0).max(1),
            owner => owner,
        };
        lease.arg(millis(length)).arg(millis(RETENTION)).arg(owner);
        let leased: Result<Option<(u64, u64)>, _> = self.run(&lease).await;
        let answered_at = Instant::now();
        if let Ok(Some((fence, redis_ms))) = leased {
            return Ok(Some(Lease::new(fence).with_guard(Granted { owner, redis_ms, answered_at })));
        }
        self.owner.store(owner, Ordering::Relaxed);
        leased.map(|_| None)
    }

    async fn extend(&self, lease: &Lease, length: Duration) -> Result<Extension, StoreError> {
        let mut extend = self.invoke(&SCRIPTS.extend);
        extend.arg(lease.fence()).arg(millis(length));
        let extended: bool = self.run(&extend).await?;
        Ok(if extended { Extension::Extended } else { Extension::Expired })
    }

    async fn publish(&self, lease: &Lease, record: Record) -> Result<Publication, StoreError> {
        let granted = lease
            .guard::<Granted>()
            .ok_or_else(|| StoreError::unavailable("the lease was granted by another store"))?;
        let expires_at = record.lifetime().map(|left| granted.redis_ms_in(left));
        let retention = record.lifetime().filter(|_| !record.outlives_token());
        let retention = retention.map(|left| millis(RETENTION.saturating_add(left)));
        let or_empty = |number: Option<u64>| number.map_or_else(String::new, |number| number.to_string());
        let mut publish = self.invoke(&SCRIPTS.publish);
        publish.arg(lease.fence()).arg(or_empty(expires_at)).arg(record.text()).arg(or_empty(retention));
        // Only the error's code: the rest of the message may quote the record.
        let failed = |error: RedisError| match error.code() {
            Some(code) => self.error(&error, format_args!("the server answers {code}")),
            None => self.failed(&error),
        };
        let stored: bool = self.send(&publish).await.map_err(failed)?;
        Ok(if stored { Publication::Stored } else { Publication::Superseded })
    }

    async fn release(&self, lease: Lease) -> Result<(), StoreError> {
        let mut release = self.invoke(&SCRIPTS.release);
        release.arg(lease.fence());
        let () = self.run(&release).await?;
        // Not before: the command could release the next lease of the same owner.
        if let Some(granted) = lease.guard::<Granted>() {
            self.owner.store(granted.owner, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// Shares the connection, and the options.
impl NamespacedStore for RedisStore {
    fn for_namespace(&self, namespace: impl Into<String>) -> Self {
        Self::with(namespace.into(), Arc::clone(&self.options), Arc::clone(&self.connection))
    }
}

/// Parses the result of `LOAD`.
fn read(parts: [Vec<u8>; 3]) -> Option<Record> {
    let [version, left, text] = parts.map(|part| String::from_utf8(part).ok());
    let record = Record::new(version?.parse().ok()?, text?);
    match left?.as_str() {
        "" => Some(record),
        left => Some(record.expires_in(Duration::from_millis(left.parse().ok()?))),
    }
}

/// Whether only a change of the configuration helps: of the URL, of the user's rights, or of the trusted roots.
fn is_configuration(error: &RedisError) -> bool {
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

impl fmt::Debug for RedisStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Only the address: the rest of the connection info contains the password.
        f.debug_struct("RedisStore")
            .field("address", &self.address().to_string())
            .field("prefix", &self.options.prefix)
            .field("namespace", &self.namespace)
            .finish_non_exhaustive()
    }
}
