//! [`RedisStore`]: one token for the processes of many hosts, in Redis.

use std::{
    fmt,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use redis::{
    Client, ConnectionAddr, ErrorKind, FromRedisValue, IntoConnectionInfo, RedisError, Script,
    ScriptInvocation, TlsCertificates,
    aio::{ConnectionManager, ConnectionManagerConfig},
};
use rustls::crypto::CryptoProvider;
use tokio::time::Instant;

use super::{Extension, Lease, Publication, Record, TokenStore};
use crate::{
    error::{Error, StoreError},
    observability::millis,
};

const CONNECTION_TIMEOUT: Duration = Duration::from_secs(1);
const RESPONSE_TIMEOUT: Duration = Duration::from_millis(500);
const KEY_PREFIX: &str = "tower-bearer:";

/// How long Redis keeps a record that nobody renews any more.
const RETENTION: Duration = Duration::from_secs(30 * 24 * 60 * 60);

const FAILED: &str = "Redis did not do what it was asked to";

/// KEYS: the record, the lease. Returns the generation, the life that is left in ms or nothing, and the text.
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

/// KEYS: the record, the lease. ARGV: the lease's length and the record's retention, in ms. Returns the fence, and
/// Redis' time in ms; or nothing.
///
/// The fence goes by the clock, so that it is greater than any that was forgotten in a flush or a failover. One that is
/// no number, or greater than Lua's numbers are exact, is none that was given out here; nor is a lease without an end.
const LEASE: &str = r"
    if redis.call('PTTL', KEYS[2]) >= 0 then return false end
    local time = redis.call('TIME')
    local last = tonumber(redis.call('HGET', KEYS[1], 'fence')) or 0
    if not (last < 2 ^ 53) then last = 0 end
    local fence = string.format('%.0f', math.max(time[1] * 1000000 + time[2], last + 1))
    redis.call('HSET', KEYS[1], 'fence', fence)
    if redis.call('PTTL', KEYS[1]) < 0 then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
    redis.call('SET', KEYS[2], fence, 'PX', ARGV[1])
    return {fence, string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))}
";

/// KEYS: the record, the lease. ARGV: the fence, when the token expires by Redis' time in ms or nothing, the text, the
/// retention in ms. Returns whether the record is stored.
///
/// Where the fence was forgotten, nobody has had a lease since.
const PUBLISH: &str = r"
    local newest = tonumber(redis.call('HGET', KEYS[1], 'fence'))
    if newest and newest > tonumber(ARGV[1]) then return 0 end
    redis.call('HSET', KEYS[1], 'fence', ARGV[1], 'generation', ARGV[1], 'expires_at', ARGV[2], 'text', ARGV[3])
    redis.call('PEXPIRE', KEYS[1], ARGV[4])
    return 1
";

/// KEYS: the record, the lease. ARGV: the fence, the lease's length in ms. Returns whether the lease is extended.
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

/// The token in Redis 5 or newer, or what speaks its protocol, for the processes of any number of hosts.
///
/// ```
/// use tower_bearer::{ApiVideo, RedisStore, Role, TokenProvider};
///
/// # async fn run() -> Result<(), tower_bearer::Error> {
/// let store = RedisStore::new("rediss://user:password@redis.example:6380/0", "api.video")?;
/// let provider = TokenProvider::builder(ApiVideo::new("your API key")).store(store).build()?;
/// # Ok(())
/// # }
/// ```
///
/// # What it keeps
///
/// A hash with the record and the newest fence, and a string that is the lease and ends with it; both keys begin with
/// `tower-bearer:{namespace}:`, so that a cluster has them on one node. Five short scripts use them, each in one step.
/// All times are Redis' own: the hosts' clocks need not agree. A record is forgotten thirty days after its token has
/// expired.
///
/// The token is readable for whoever can read these keys: [`EncryptedStore`](crate::EncryptedStore) has it encrypted
/// (feature `encryption`). Its users, members and publishers first, then readers, need no more rights than
///
/// ```text
/// ~tower-bearer:* +eval +evalsha +script|load +hset +hget +hmget +set +get +del +pttl +pexpire +time +ping
/// ~tower-bearer:* +eval +evalsha +script|load +hmget +time +ping
/// ```
///
/// # When Redis forgets
///
/// A flush, a restart without persistence, an eviction: the next renewal finds nothing, and goes on from the process's
/// own refresh token. A failover to a replica that had not yet heard of the last write: if that was a lease, two
/// processes may have one each, of which the newer fence is the greater, since it goes by the clock; if it was a
/// record, the next holder finds the one before, whose refresh token is spent, and authenticates once. Nothing but
/// calls is lost: see [`TokenStore`](crate::TokenStore#what-makes-it-right).
///
/// # Connections
///
/// One, made when it is first needed, and again whenever it is lost, by redis-rs' `ConnectionManager`. In a cluster,
/// name the node that has the keys, or a proxy: redirections are not followed. `rediss://` is TLS by rustls, whose
/// process-wide default cryptography is used; where the program has installed none, this crate's is installed when it
/// connects.
pub struct RedisStore {
    namespace: String,
    prefix: String,
    client: Client,
    connection_timeout: Duration,
    response_timeout: Duration,
    /// Made within the runtime that needs it.
    connection: Mutex<Option<ConnectionManager>>,
    scripts: Scripts,
}

/// Two clocks at one moment, so that it does not matter how long an answer, or a request, was on its way.
struct Clocks {
    redis_ms: u64,
    /// Not before that: a token's life is shorter in Redis than it is, if anything.
    answered_at: Instant,
}

impl Clocks {
    /// Redis' time when `left` has passed from now on.
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

impl RedisStore {
    /// The store at `url` (`redis://`, `rediss://` for TLS, or `redis+unix://`), with the record of the credential that
    /// `namespace` tells from others.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if `url` is none that redis-rs knows, or the namespace is not 1 to 200 visible ASCII
    /// characters without braces.
    pub fn new(url: &str, namespace: impl Into<String>) -> Result<Self, Error> {
        let namespace = namespace.into();
        let fits = |byte: u8| byte.is_ascii_graphic() && !b"{}".contains(&byte);
        if !(1..=200).contains(&namespace.len()) || !namespace.bytes().all(fits) {
            return Err(Error::InvalidOption(
                "a namespace is 1 to 200 visible ASCII characters other than { and }".into(),
            ));
        }
        // Without redis-rs' own message: the URL has a password in it.
        let client = Client::open(url).map_err(|_| {
            Error::InvalidOption("the URL is no redis://, rediss:// or redis+unix:// URL".into())
        })?;
        Ok(Self {
            namespace,
            prefix: KEY_PREFIX.into(),
            client,
            connection_timeout: CONNECTION_TIMEOUT,
            response_timeout: RESPONSE_TIMEOUT,
            connection: Mutex::default(),
            scripts: Scripts {
                load: Script::new(LOAD),
                lease: Script::new(LEASE),
                extend: Script::new(EXTEND),
                publish: Script::new(PUBLISH),
                release: Script::new(RELEASE),
            },
        })
    }

    /// Sets what the names of the keys begin with. Default: `tower-bearer:`.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if it has a brace, which would tell a cluster another node.
    pub fn key_prefix(mut self, prefix: impl Into<String>) -> Result<Self, Error> {
        self.prefix = prefix.into();
        if self.prefix.contains(['{', '}']) {
            return Err(Error::InvalidOption("a key prefix has no braces".into()));
        }
        Ok(self)
    }

    /// Sets how long a connection may take to be made, and Redis to answer. Default: 1 s and 500 ms.
    ///
    /// An operation that takes longer than two seconds in all counts as failed, whatever these are.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if one of them is zero or more than a minute.
    pub fn timeouts(mut self, connection: Duration, response: Duration) -> Result<Self, Error> {
        for timeout in [connection, response] {
            if timeout.is_zero() || timeout > Duration::from_secs(60) {
                return Err(Error::InvalidOption("Redis is waited for up to a minute".into()));
            }
        }
        (self.connection_timeout, self.response_timeout) = (connection, response);
        Ok(self)
    }

    /// Trusts just these root certificates, in PEM. Default: the operating system's.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if the URL is not `rediss://`, or the certificates cannot be read.
    pub fn root_certificates(mut self, pem: impl Into<Vec<u8>>) -> Result<Self, Error> {
        let certificates = TlsCertificates { client_tls: None, root_cert: Some(pem.into()) };
        let connection = self.client.get_connection_info().clone();
        self.client = connection
            .into_connection_info()
            .and_then(|connection| Client::build_with_tls(connection, certificates))
            .map_err(|_| Error::InvalidOption("root certificates are PEM, and for a rediss:// URL".into()))?;
        Ok(self)
    }

    /// The connection; it is made when a script is first run.
    fn connection(&self) -> Result<ConnectionManager, StoreError> {
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(connection) = &*connection {
            return Ok(connection.clone());
        }
        if matches!(self.client.get_connection_info().addr(), ConnectionAddr::TcpTls { .. })
            && CryptoProvider::get_default().is_none()
        {
            #[cfg(feature = "aws-lc-rs")]
            let provider = rustls::crypto::aws_lc_rs::default_provider();
            #[cfg(not(feature = "aws-lc-rs"))]
            let provider = rustls::crypto::ring::default_provider();
            // If another was faster, that is as good.
            let _ = provider.install_default();
        }
        // Whoever uses the store waits, and tries again, by the provider's own backoff.
        let config = ConnectionManagerConfig::new()
            .set_number_of_retries(0)
            .set_connection_timeout(Some(self.connection_timeout))
            .set_response_timeout(Some(self.response_timeout));
        let made = ConnectionManager::new_lazy_with_config(self.client.clone(), config).map_err(failed)?;
        Ok(connection.insert(made).clone())
    }

    /// A script with the two keys.
    fn invoke<'a>(&self, script: &'a Script) -> ScriptInvocation<'a> {
        let key = |name: &str| format!("{}{{{}}}:{name}", self.prefix, self.namespace);
        let mut invocation = script.prepare_invoke();
        invocation.key(key("record")).key(key("lease"));
        invocation
    }

    async fn run<T: FromRedisValue>(&self, invocation: &ScriptInvocation<'_>) -> Result<T, StoreError> {
        invocation.invoke_async(&mut self.connection()?).await.map_err(failed)
    }
}

impl TokenStore for RedisStore {
    fn namespace(&self) -> &str {
        &self.namespace
    }

    async fn load(&self) -> Result<Option<Record>, StoreError> {
        let loaded: Option<[Vec<u8>; 3]> = self.run(&self.invoke(&self.scripts.load)).await?;
        let Some(parts) = loaded else { return Ok(None) };
        read(parts)
            .map(Some)
            .ok_or_else(|| StoreError::InvalidRecord("the stored record is none of this crate's".into()))
    }

    async fn lease(&self, length: Duration) -> Result<Option<Lease>, StoreError> {
        let mut lease = self.invoke(&self.scripts.lease);
        lease.arg(millis(length)).arg(millis(RETENTION));
        let leased: Option<(u64, u64)> = self.run(&lease).await?;
        let answered_at = Instant::now();
        Ok(leased.map(|(fence, redis_ms)| Lease::new(fence).with_guard(Clocks { redis_ms, answered_at })))
    }

    async fn extend(&self, lease: &Lease, length: Duration) -> Result<Extension, StoreError> {
        let mut extend = self.invoke(&self.scripts.extend);
        extend.arg(lease.fence()).arg(millis(length));
        let extended: bool = self.run(&extend).await?;
        Ok(if extended { Extension::Extended } else { Extension::Expired })
    }

    async fn publish(&self, lease: &Lease, record: Record) -> Result<Publication, StoreError> {
        let clocks =
            lease.guard::<Clocks>().ok_or_else(|| StoreError::unavailable("the lease is not of Redis"))?;
        let expires_at = record.lifetime().map(|left| clocks.redis_ms_in(left));
        let retention = RETENTION.saturating_add(record.lifetime().unwrap_or_default());
        let mut publish = self.invoke(&self.scripts.publish);
        publish
            .arg(lease.fence())
            .arg(expires_at.map_or_else(String::new, |at| at.to_string()))
            .arg(record.text())
            .arg(millis(retention));
        // Of what Redis says to it, the code alone: the rest may quote what it was sent.
        let failed = |error: RedisError| match error.code() {
            Some(code) => StoreError::unavailable(format!("{FAILED}: it answered {code}")),
            None => failed(error),
        };
        let stored: bool = publish.invoke_async(&mut self.connection()?).await.map_err(failed)?;
        Ok(if stored { Publication::Stored } else { Publication::Superseded })
    }

    async fn release(&self, lease: Lease) -> Result<(), StoreError> {
        let mut release = self.invoke(&self.scripts.release);
        release.arg(lease.fence());
        self.run(&release).await
    }
}

/// The record of what `LOAD` returns.
fn read(parts: [Vec<u8>; 3]) -> Option<Record> {
    let [generation, left, text] = parts.map(|part| String::from_utf8(part).ok());
    let record = Record::new(generation?.parse().ok()?, text?);
    match left?.as_str() {
        "" => Some(record),
        left => Some(record.expires_in(Duration::from_millis(left.parse().ok()?))),
    }
}

fn failed(error: RedisError) -> StoreError {
    match error.kind() {
        // The error would quote it.
        ErrorKind::Parse | ErrorKind::UnexpectedReturnType => {
            StoreError::unavailable("what answers is no Redis")
        }
        _ => StoreError::unavailable(FAILED).with_cause(error),
    }
}

impl fmt::Debug for RedisStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The address alone: the rest of the connection's data has the password.
        f.debug_struct("RedisStore")
            .field("address", &self.client.get_connection_info().addr().to_string())
            .field("prefix", &self.prefix)
            .field("namespace", &self.namespace)
            .finish_non_exhaustive()
    }
}
