//! [`RedisStore`]: one token for processes on any number of hosts, in Redis.
//!
//! [`scripts`] has what is run there, and [`connection`] how the store connects.

mod connection;
mod scripts;

use std::{
    fmt,
    hash::{BuildHasher, RandomState},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use redis::{ConnectionAddr, ErrorKind, FromRedisValue, RedisError, Script, ScriptInvocation};
use tokio::time::Instant;
use tower_bearer::{
    Error,
    store::{Extension, Lease, NamespacedStore, Publication, Record, StoreError, TokenStore},
};

use self::{
    connection::{Newest, Options, is_configuration, open},
    scripts::SCRIPTS,
};
use crate::{invalid, millis};

const CONNECTION_TIMEOUT: Duration = Duration::from_secs(1);
const RESPONSE_TIMEOUT: Duration = Duration::from_millis(500);
const MAX_TIMEOUT: Duration = Duration::from_secs(60);
const KEY_PREFIX: &str = "tower-bearer:";

/// How long Redis keeps a record after its token has expired, unless it is needed then.
const RETENTION: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// Keeps the token in Redis 5 or newer, or a compatible server, for processes on any number of hosts.
///
/// ```
/// use tower_bearer::{ApiVideo, TokenProvider};
/// use tower_bearer_store::RedisStore;
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
/// Read access to these keys reveals the token. [`EncryptedStore`](crate::EncryptedStore) encrypts it (feature
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
/// lost record of a user's [login](tower_bearer::TokenProviderBuilder::login) may cost it. Turn on persistence for it.
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
/// use tower_bearer::{ApiVideo, TokenProvider, store::NamespacedStore};
/// use tower_bearer_store::RedisStore;
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
            invalid(format!(
                "the URL of Redis must be redis://[[user]:password@]host[:port][/database], rediss:// for TLS, or \
                 redis+unix:///path, got {got}"
            ))
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

    async fn send<T: FromRedisValue>(&self, invocation: &ScriptInvocation<'_>) -> Result<T, RedisError> {
        self.options.send(&self.connection, invocation).await
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

fn check_namespace(namespace: &str) -> Result<(), Error> {
    let fits = |byte: u8| byte.is_ascii_graphic() && !b"{}".contains(&byte);
    if !(1..=200).contains(&namespace.len()) || !namespace.bytes().all(fits) {
        return Err(invalid(format!(
            "namespace must be 1 to 200 visible ASCII characters without {{ and }}, got {namespace:?}"
        )));
    }
    Ok(())
}

impl TokenStore for RedisStore {
    fn namespace(&self) -> &str {
        &self.namespace
    }

    fn validate(&self) -> Result<(), Error> {
        check_namespace(&self.namespace)?;
        let options = &self.options;
        if options.prefix.contains(['{', '}']) {
            let prefix = &options.prefix;
            return Err(invalid(format!(
                "the key prefix in Redis must not contain {{ or }}, got {prefix:?}"
            )));
        }
        for timeout in [options.connection_timeout, options.response_timeout] {
            if timeout.is_zero() || timeout > MAX_TIMEOUT {
                return Err(invalid(format!(
                    "the timeouts of Redis must be > 0 and <= {MAX_TIMEOUT:?}, got {timeout:?}"
                )));
            }
        }
        options.client().map_err(|_| {
            invalid("the root certificates of Redis must be PEM, and needs a rediss:// URL".to_owned())
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
