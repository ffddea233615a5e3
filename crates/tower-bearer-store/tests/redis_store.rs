//! `RedisStore` with a real Redis, which must be installed: see `support/redis_server.rs`.
#![cfg(all(unix, feature = "redis"))]

#[path = "../../../tests/support/processes.rs"]
mod processes;
#[path = "../../../tests/support/proxy.rs"]
mod proxy;
#[path = "../../../tests/support/redis_server.rs"]
mod redis_server;
#[path = "../../../tests/support/mod.rs"]
mod support;

use std::{
    hash::{BuildHasher, Hasher, RandomState},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use futures_util::{StreamExt, future::join_all, stream};
use processes::Process;
use proxy::Proxy;
use rcgen::{CertifiedKey, generate_simple_self_signed};
use redis_server::RedisServer;
use support::folder::Folder;
use tokio::time::{Instant, sleep, timeout};
use tower_bearer::{
    ApiVideo, Error, OAuth2, RetryPolicy, SourceError, StaticToken, Token, TokenProvider, TokenRequest,
    TokenSource,
    oauth2::{ClientAuth, Server},
    store::{Extension, Lease, NamespacedStore, Publication, Record, StoreErrorKind, TokenStore},
};
use tower_bearer_store::{EncryptedStore, EncryptionKeys, RedisStore};
use tower_bearer_testing::{AuthServer, Fault, Route};

const MINUTE: Duration = Duration::from_secs(60);
const KEY: &str = "tower-bearer:{videos}:record";

fn store(redis: &RedisServer) -> RedisStore {
    RedisStore::new(&redis.url(), "videos").unwrap()
}

/// Builds a provider that shares the token in `store`.
fn process(server: &AuthServer, store: impl TokenStore) -> TokenProvider {
    let source = ApiVideo::new(server.api_key()).base_url(server.uri());
    let retry = RetryPolicy::new().backoff(Duration::from_millis(1), Duration::from_millis(5));
    TokenProvider::builder(source).store(store).retry(retry).build().unwrap()
}

async fn lease(store: &RedisStore) -> Lease {
    store.lease(MINUTE).await.unwrap().expect("a lease")
}

async fn publish(store: &RedisStore, text: &str) -> u64 {
    let lease = lease(store).await;
    let record = Record::new(lease.fence(), text).expires_in(MINUTE);
    assert_eq!(store.publish(&lease, record).await.unwrap(), Publication::Stored);
    let fence = lease.fence();
    store.release(lease).await.unwrap();
    fence
}

/// Waits until there is a record.
async fn stored(store: &RedisStore) -> Record {
    loop {
        if let Ok(Some(record)) = store.load().await {
            return record;
        }
        sleep(Duration::from_millis(20)).await;
    }
}

/// A stored record is loaded after a part of its lifetime.
#[tokio::test]
async fn loads_record_with_remaining_life() {
    let redis = RedisServer::start().await;
    let store = store(&redis);
    assert!(store.load().await.unwrap().is_none());
    let first = publish(&store, "first").await;
    let second = publish(&store, "\"second\" – ünïcode").await;
    assert!(second > first);
    let record = store.load().await.unwrap().unwrap();
    assert_eq!((record.version(), record.text()), (second, "\"second\" – ünïcode"));
    assert!(record.lifetime().unwrap() <= MINUTE && record.lifetime().unwrap() > MINUTE / 2);

    let lease = lease(&store).await;
    store.publish(&lease, Record::new(lease.fence(), "endless")).await.unwrap();
    assert_eq!(store.load().await.unwrap().unwrap().lifetime(), None);
    let spent = Record::new(lease.fence(), "spent").expires_in(Duration::ZERO);
    store.publish(&lease, spent).await.unwrap();
    assert_eq!(store.load().await.unwrap().unwrap().lifetime(), Some(Duration::ZERO));
}

/// The time until Redis deletes the record; `None` if it does not.
async fn retention(redis: &RedisServer, key: &str) -> Option<Duration> {
    let left: i64 = redis.run(&["PTTL", key]).await.parse().unwrap();
    assert!(left > -2, "{key} is missing");
    u64::try_from(left).ok().map(Duration::from_millis)
}

/// A login is idle for months, or has no known lifetime.
#[tokio::test]
async fn needed_record_is_kept() {
    let redis = RedisServer::start().await;
    let day = 24 * 60 * MINUTE;
    let thirty_days = |left: Option<Duration>| left.is_some_and(|left| left > 29 * day && left <= 31 * day);
    let store = store(&redis);
    // A lease alone is no record.
    store.release(lease(&store).await).await.unwrap();
    assert!(thirty_days(retention(&redis, KEY).await));
    publish(&store, "with a lifetime").await;
    assert!(thirty_days(retention(&redis, KEY).await));
    let held = lease(&store).await;
    store.publish(&held, Record::new(held.fence(), "without a lifetime")).await.unwrap();
    assert_eq!(retention(&redis, KEY).await, None);
    store.release(held).await.unwrap();
    // The next lease does not end that.
    let held = lease(&store).await;
    assert_eq!(retention(&redis, KEY).await, None);
    store.release(held).await.unwrap();
    publish(&store, "with a lifetime again").await;
    assert!(thirty_days(retention(&redis, KEY).await));
    let server = AuthServer::builder().client("id", "secret").start().await.unwrap();
    for namespace in ["plain", "encrypted"] {
        let store = store.for_namespace(namespace);
        let keys = EncryptionKeys::new("1", &[7; 32]).unwrap();
        let provider = match namespace {
            "plain" => login(&server, store, &server.log_in()),
            _ => login(&server, EncryptedStore::new(store, keys), &server.log_in()),
        };
        let token = provider.token().await.unwrap();
        let key = format!("tower-bearer:{{{namespace}}}:record");
        assert_eq!(retention(&redis, &key).await, None, "{namespace}");
        provider.refresh(&token).await.unwrap();
        assert_eq!(retention(&redis, &key).await, None, "{namespace}");
    }
    // A client's own credential gets another token at any time.
    let client = process(&server, store.for_namespace("client"));
    client.token().await.unwrap();
    assert!(thirty_days(retention(&redis, "tower-bearer:{client}:record").await));
}

/// A slow publication must not lengthen the stored lifetime.
#[tokio::test]
async fn slow_publication_keeps_lifetime() {
    let redis = RedisServer::start().await;
    let store = store(&redis).timeouts(MINUTE, MINUTE);
    let lease = lease(&store).await;
    let pause = Duration::from_millis(300);
    redis.stop();
    let (published, ()) =
        tokio::join!(store.publish(&lease, Record::new(lease.fence(), "text").expires_in(MINUTE)), async {
            sleep(pause).await;
            redis.resume();
        });
    assert_eq!(published.unwrap(), Publication::Stored);
    let left = store.load().await.unwrap().unwrap().lifetime().unwrap();
    assert!(left <= MINUTE - pause / 2, "{left:?}");
}

/// A lease is never released: it ends by itself, and a process that no longer has it cannot release it.
#[tokio::test]
async fn lease_is_exclusive_until_its_end() {
    let redis = RedisServer::start().await;
    let (one, other) = (store(&redis), store(&redis));
    let held = lease(&one).await;
    assert!(other.lease(MINUTE).await.unwrap().is_none());
    one.release(held).await.unwrap();
    let mine = one.lease(Duration::from_millis(50)).await.unwrap().unwrap();
    let theirs = loop {
        if let Some(lease) = other.lease(MINUTE).await.unwrap() {
            break lease;
        }
        sleep(Duration::from_millis(5)).await;
    };
    // Its fence is superseded.
    let stale = Record::new(mine.fence(), "stale");
    assert_eq!(one.publish(&mine, stale).await.unwrap(), Publication::Superseded);
    one.release(mine).await.unwrap();
    assert!(one.lease(MINUTE).await.unwrap().is_none());
    other.release(theirs).await.unwrap();
    assert!(one.lease(MINUTE).await.unwrap().is_some());
}

/// An exchange takes longer than its lease, which is extended until another process has the next one.
#[tokio::test]
async fn lease_extends_until_next_is_given() {
    let redis = RedisServer::start().await;
    let keys = EncryptionKeys::new("1", &[7; 32]).unwrap();
    // Through every wrapper that forwards it.
    let (one, other) = (Arc::new(EncryptedStore::new(store(&redis), keys)), store(&redis));
    let short = Duration::from_millis(200);
    let held = one.lease(short).await.unwrap().unwrap();
    assert_eq!(one.extend(&held, MINUTE).await.unwrap(), Extension::Extended);
    sleep(short * 2).await;
    assert!(other.lease(MINUTE).await.unwrap().is_none());
    assert_eq!(one.extend(&held, short).await.unwrap(), Extension::Extended);
    sleep(short * 2).await;
    assert_eq!(one.extend(&held, MINUTE).await.unwrap(), Extension::Expired);
    let newer = other.lease(MINUTE).await.unwrap().unwrap();
    assert_eq!(one.extend(&held, short).await.unwrap(), Extension::Expired);
    let left: u64 = redis.run(&["PTTL", "tower-bearer:{videos}:lease"]).await.parse().unwrap();
    assert!(left > 1000, "the newer lease has {left} ms left");
    let fence = newer.fence();
    other.release(newer).await.unwrap();
    assert_eq!(other.extend(&Lease::new(fence), MINUTE).await.unwrap(), Extension::Expired);
    assert!(one.lease(MINUTE).await.unwrap().is_some());
}

/// Redis is flushed, or a failover loses the last write: a lease that Redis has forgotten is still superseded.
#[tokio::test]
async fn fences_grow_after_flush() {
    let redis = RedisServer::start().await;
    let store = store(&redis);
    let forgotten = lease(&store).await;
    redis.run(&["FLUSHALL"]).await;
    // No lease was granted since.
    let record = Record::new(forgotten.fence(), "kept");
    assert_eq!(store.publish(&forgotten, record).await.unwrap(), Publication::Stored);
    redis.run(&["FLUSHALL"]).await;
    let newer = lease(&store).await;
    assert!(newer.fence() > forgotten.fence());
    let stale = Record::new(forgotten.fence(), "stale");
    assert_eq!(store.publish(&forgotten, stale).await.unwrap(), Publication::Superseded);
}

/// Four processes start, or find their token revoked, at one moment.
#[tokio::test]
async fn four_processes_share_one_token() {
    let redis = RedisServer::start().await;
    processes::four_processes_share_one_token("one_of_many", &redis.url()).await;
}

/// Runs a worker process if the environment says so; otherwise does nothing.
#[test]
fn one_of_many() {
    processes::work(|url| RedisStore::new(url, "videos").unwrap());
}

/// Two processes with the login of a user are killed at random moments of a hundred rotations. The server has a grace
/// period: a refresh token whose response was lost with its process is presented again.
#[tokio::test]
async fn killed_processes_keep_login() {
    let random = |below: u64| RandomState::new().build_hasher().finish() % below;
    let redis = RedisServer::start().await;
    let server =
        AuthServer::builder().client("id", "secret").refresh_token_grace(MINUTE).start().await.unwrap();
    let seed = server.log_in();
    let start = || Process::start_with("one_of_two", &redis.url(), &server, &seed);
    let mut processes = [start(), start()];
    let mut kills = 0;
    while server.counters().oauth_refresh_grants < 100 || kills < 20 {
        if random(3) == 0 {
            // Before the server has processed the request, while it sends the response, or at any other moment.
            match random(3) {
                0 => server.inject(Route::OAuthToken, Fault::Delay(Duration::from_millis(20))),
                1 => server.inject(Route::OAuthToken, Fault::Drip(Duration::from_millis(1))),
                _ => {}
            }
            let killed = &mut processes[usize::from(random(2) == 0)];
            killed.send("refresh").await;
            sleep(Duration::from_millis(random(60))).await;
            killed.child.kill().await.unwrap();
            *killed = start();
            kills += 1;
        }
        for process in &mut processes {
            process.send("refresh").await;
        }
        for process in &mut processes {
            assert_eq!(process.response().await, "200", "after {kills} kills");
        }
    }
    let counters = server.counters();
    assert_eq!((counters.reused_refresh_tokens, counters.rejected_oauth_grants), (0, 0), "{kills} kills");
    assert_eq!(processes[0].request().await, "200");
}

/// Runs a worker process if the environment says so; otherwise does nothing.
#[test]
fn one_of_two() {
    let source = |url: &str, _: &str| {
        OAuth2::login(Server::token_endpoint(format!("{url}oauth/token")), ClientAuth::public("id"))
    };
    let lease = Duration::from_millis(500);
    processes::work_with(
        |url| RedisStore::new(url, "login").unwrap(),
        source,
        |builder, seed| builder.login(seed).lease(lease),
    );
}

/// Two namespaces, or two prefixes, are independent, and a cluster keeps the keys of one namespace on one node.
#[tokio::test]
async fn isolates_namespaces_in_one_slot_each() {
    let folder = Folder::new();
    let nodes = folder.0.join("nodes");
    let cluster = ["--cluster-enabled", "yes", "--cluster-config-file", nodes.to_str().unwrap()];
    let redis = RedisServer::with(&cluster).await;
    redis.run(&["CLUSTER", "ADDSLOTSRANGE", "0", "16383"]).await;
    let state = || redis.run(&["CLUSTER", "INFO"]);
    while !state().await.contains("cluster_state:ok") {
        sleep(Duration::from_millis(20)).await;
    }
    let videos = store(&redis);
    let other = RedisStore::new(&redis.url(), "other").unwrap();
    let prefixed = RedisStore::new(&redis.url(), "videos").unwrap().key_prefix("mine:");
    let _held = lease(&videos).await;
    publish(&other, "other").await;
    publish(&prefixed, "prefixed").await;
    assert!(videos.load().await.unwrap().is_none());
    assert_eq!(other.load().await.unwrap().unwrap().text(), "other");
    assert_eq!(prefixed.load().await.unwrap().unwrap().text(), "prefixed");
    let keys = redis.run(&["KEYS", "*"]).await;
    let mut keys: Vec<_> = keys.lines().collect();
    keys.sort();
    assert_eq!(
        keys,
        ["mine:{videos}:record", "tower-bearer:{other}:record", "tower-bearer:{videos}:lease", KEY]
    );
}

/// Returns how many connections the server has accepted since it started, without those of this function.
async fn connections(redis: &RedisServer, calls: &mut u32) -> u32 {
    *calls += 1;
    let stats = redis.run(&["INFO", "stats"]).await;
    let accepted = stats.lines().find_map(|line| line.strip_prefix("total_connections_received:")).unwrap();
    accepted.trim().parse::<u32>().unwrap() - *calls
}

/// A tenant's credential: its tokens have the tenant's name, and a number.
struct Tenant(String, AtomicU32);

impl TokenSource for Tenant {
    async fn fetch(&self, _: &TokenRequest<'_>) -> Result<Token, SourceError> {
        let Self(name, fetches) = self;
        let number = fetches.fetch_add(1, Ordering::Relaxed) + 1;
        Ok(Token::builder(format!("{name}-{number}")).expires_in(60 * MINUTE).build()?)
    }
}

/// The stores of ten thousand tenants open a connection each.
#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_namespaces_use_one_connection() {
    assert!(size_of::<RedisStore>() <= 40);
    let redis = RedisServer::start().await;
    let mut calls = 0;
    let before = connections(&redis, &mut calls).await;
    let base = Arc::new(store(&redis).timeouts(MINUTE, MINUTE));
    let tenant = |number: usize| format!("tenant-{number}");
    let handles: Vec<_> = (0..10_000).map(|number| base.for_namespace(tenant(number))).collect();

    // The first operations start together, on several threads.
    let first = handles[..1000].iter().cloned();
    let first = join_all(first.map(|handle| tokio::spawn(async move { handle.load().await }))).await;
    assert!(first.into_iter().all(|loaded| loaded.unwrap().unwrap().is_none()));

    // 200 tenants, each with a provider whose token is refreshed, and another process that only reads it.
    let refreshed = |number: usize| number % 50 == 0;
    let tokens = stream::iter((0..10_000).filter(|number| refreshed(*number))).map(|number| {
        let (name, store) = (tenant(number), Arc::clone(&handles[number]));
        async move {
            let source = Tenant(name.clone(), AtomicU32::new(0));
            let provider = TokenProvider::builder(source).store(Arc::clone(&store)).build().unwrap();
            let token = provider.token().await.unwrap();
            provider.refresh(&token).await.unwrap();
            assert!(provider.status().store.unwrap().is_usable());
            let reader = TokenProvider::reader(store).build().unwrap();
            assert_eq!(reader.token().await.unwrap().access_token(), format!("{name}-2"));
        }
    });
    assert_eq!(tokens.buffer_unordered(50).count().await, 200);

    let loads = stream::iter(handles.iter().enumerate());
    let loads = loads.map(|(number, handle)| async move { (number, handle.load().await.unwrap()) });
    let records: Vec<_> = loads.buffer_unordered(100).collect().await;
    assert_eq!(records.len(), 10_000);
    for (number, record) in records {
        let own = format!("\"{}-2\"", tenant(number));
        assert_eq!(record.is_some(), refreshed(number), "{number}");
        assert!(record.is_none_or(|record| record.text().contains(&own)), "{number}");
    }
    assert_eq!(connections(&redis, &mut calls).await - before, 1);
    let clients = redis.run(&["CLIENT", "LIST"]).await;
    assert_eq!(clients.lines().filter(|client| !client.contains("cmd=client")).count(), 1, "{clients}");
}

/// The lease of one tenant holds up the others.
#[tokio::test]
async fn lease_of_one_namespace_blocks_no_other() {
    let redis = RedisServer::start().await;
    let base = store(&redis);
    let (one, other) = (base.for_namespace("one"), base.for_namespace("other"));
    // A namespace replaces the one before, and names the same record wherever its handle is from.
    let same = [other.for_namespace("one"), RedisStore::new(&redis.url(), "one").unwrap()];
    let held = lease(&one).await;
    publish(&other, "other").await;
    publish(&base, "base").await;
    for same in &same {
        assert_eq!(same.namespace(), "one");
        assert!(same.lease(MINUTE).await.unwrap().is_none());
    }
    one.publish(&held, Record::new(held.fence(), "one")).await.unwrap();
    for (store, text) in
        [(&base, "base"), (&other, "other"), (&one, "one"), (&same[0], "one"), (&same[1], "one")]
    {
        assert_eq!(store.load().await.unwrap().unwrap().text(), text);
    }
}

/// An option of one handle changes another handle of the same store.
#[tokio::test]
async fn setter_of_one_handle_changes_no_other() {
    let redis = RedisServer::start().await;
    let mut calls = 0;
    let base = store(&redis).timeouts(MINUTE, MINUTE);
    let plain = base.for_namespace("tenant");
    publish(&plain, "plain").await;
    let before = connections(&redis, &mut calls).await;

    // Another prefix needs no other connection.
    let prefixed = base.for_namespace("tenant").key_prefix("mine:");
    publish(&prefixed, "prefixed").await;
    assert_eq!(plain.load().await.unwrap().unwrap().text(), "plain");
    assert_eq!(prefixed.for_namespace("tenant").load().await.unwrap().unwrap().text(), "prefixed");
    assert_eq!(connections(&redis, &mut calls).await - before, 0);

    let hasty = plain.for_namespace("tenant").timeouts(MINUTE, Duration::from_millis(500));
    // Handles made from it share its options, and its connection.
    let hasty_too = hasty.for_namespace("another");
    assert_eq!(hasty.load().await.unwrap().unwrap().text(), "plain");
    assert!(hasty_too.load().await.unwrap().is_none());
    assert_eq!(connections(&redis, &mut calls).await - before, 1);
    redis.stop();
    let (patient, base_too, ()) = tokio::join!(plain.load(), base.load(), async {
        let (hasty, hasty_too) = tokio::join!(hasty.load(), hasty_too.load());
        assert!(hasty.is_err() && hasty_too.is_err());
        redis.resume();
    });
    assert_eq!(patient.unwrap().unwrap().text(), "plain");
    assert!(base_too.unwrap().is_none());

    let invalid = base.for_namespace("tenant").root_certificates("no certificate");
    assert!(invalid.validate().is_err());
    assert!(base.validate().is_ok() && plain.validate().is_ok());
}

/// Redis is down, and loses its data.
#[tokio::test]
async fn redis_outage_delays_only_publication() {
    let mut redis = RedisServer::start().await;
    let server = AuthServer::start().await.unwrap();
    let provider = process(&server, store(&redis));
    let token = provider.token().await.unwrap();
    redis.kill();
    assert_eq!(provider.refresh(&token).await.unwrap().generation(), 2);
    let error = store(&redis).load().await.unwrap_err();
    assert!(error.kind() == StoreErrorKind::Unavailable, "{error:?}");
    redis.restart().await;
    let record = stored(&store(&redis)).await;
    assert!(record.text().contains(provider.current().unwrap().access_token()));
    assert_eq!((server.counters().refresh_grants, server.counters().api_key_grants), (1, 1));
}

/// What the handles of one credential see of a Redis behind a proxy.
fn behind(proxy: &Proxy) -> RedisStore {
    RedisStore::new(&proxy.url(), "videos").unwrap()
}

/// How long a store may fail after its server works again.
const HEALS_WITHIN: Duration = Duration::from_secs(5);

/// Leases, publishes and loads until all of it works.
async fn heals(case: &str, store: &RedisStore) {
    let deadline = Instant::now() + HEALS_WITHIN;
    loop {
        let works = async {
            let Some(lease) = store.lease(MINUTE).await? else { return Ok(None) };
            let record = Record::new(lease.fence(), case);
            store.publish(&lease, record).await?;
            store.release(lease).await?;
            store.load().await
        };
        match works.await {
            Ok(Some(record)) if record.text() == case => return,
            last => assert!(Instant::now() < deadline, "{case}: {last:?}"),
        }
        sleep(Duration::from_millis(50)).await;
    }
}

/// Redis is silent, demoted, loading, or rejects the handshake or the password for a time, which leaves a connection
/// that never works again.
#[tokio::test]
async fn heals_after_every_kind_of_failure() {
    let (first, second) = tokio::join!(RedisServer::start(), RedisServer::start());
    let silent = Proxy::start(first.port).await;
    let proxy = Proxy::start(silent.port).await;
    let base = behind(&proxy);
    let store = base.for_namespace("videos");
    heals("at first", &store).await;

    // The old connection stays silent, as that of a peer that has lost its power.
    silent.freeze();
    let error = store.load().await.unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Unavailable, "{error:?}");
    proxy.switch(first.port);
    heals("a silent peer", &store).await;

    proxy.close_all();
    heals("a lost connection", &store).await;

    for reply in [
        "-LOADING Redis is loading the dataset in memory",
        "-MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
        "-CLUSTERDOWN The cluster is down",
        "-READONLY You can't write against a read only replica.",
        "-ERR max number of clients reached",
        "-NOAUTH Authentication required.",
        "+WHAT",
        "what",
    ] {
        for url in
            [proxy.url(), format!("{}/1", proxy.url()), format!("redis://:canary@127.0.0.1:{}", proxy.port)]
        {
            let store = RedisStore::new(&url, "videos").unwrap();
            proxy.reply(Some(reply));
            assert!(store.lease(MINUTE).await.is_err(), "{reply}");
            proxy.reply(None);
            first
                .run(&["CONFIG", "SET", "requirepass", if url.contains("canary") { "canary" } else { "" }])
                .await;
            heals(reply, &store).await;
            first.cli(&["-a", "canary", "CONFIG", "SET", "requirepass", ""]).await;
        }
    }

    let with_password =
        RedisStore::new(&format!("redis://:canary@127.0.0.1:{}", proxy.port), "videos").unwrap();
    first.run(&["CONFIG", "SET", "requirepass", "another"]).await;
    let error = with_password.load().await.unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Configuration, "{error:?}");
    first.cli(&["-a", "another", "CONFIG", "SET", "requirepass", "canary"]).await;
    heals("a wrong password", &with_password).await;
    first.cli(&["-a", "canary", "CONFIG", "SET", "requirepass", ""]).await;

    // The old master is demoted. Its connections stay open.
    heals("before the failover", &store).await;
    let _left_on_old_master = first.run(&["SET", "tower-bearer:{videos}:lease", "1", "PX", "60000"]).await;
    first.run(&["REPLICAOF", "127.0.0.1", "1"]).await;
    proxy.switch(second.port);
    heals("a failover", &store).await;
    assert_eq!(second.run(&["HGET", KEY, "text"]).await, "a failover");
    heals("a failover, seen by another handle", &base).await;
}

/// The connection to Redis belongs to a runtime that is not driven any more.
#[test]
fn heals_after_runtime_stops() {
    let build = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (idle, runtime) = (build(), build());
    let redis = runtime.block_on(RedisServer::start());
    let store = store(&redis);
    idle.block_on(heals("first runtime", &store));
    runtime.block_on(heals("second runtime", &store));
    // Nor does a connection that is being opened there block the others.
    let proxy = runtime.block_on(Proxy::start(redis.port));
    let store = Arc::new(behind(&proxy));
    idle.block_on(async {
        let store = Arc::clone(&store);
        tokio::spawn(async move { store.load().await });
        sleep(Duration::from_millis(50)).await;
    });
    runtime.block_on(heals("opened by the first runtime", &store));
}

/// The store's time limit is longer than the provider's: the operation is dropped before it has failed.
#[tokio::test]
async fn heals_after_dropped_operation() {
    let redis = RedisServer::start().await;
    let silent = Proxy::start(redis.port).await;
    let proxy = Proxy::start(silent.port).await;
    let store = behind(&proxy).timeouts(MINUTE, MINUTE);
    heals("at first", &store).await;
    silent.freeze();
    assert!(timeout(Duration::from_millis(100), store.load()).await.is_err());
    proxy.switch(redis.port);
    timeout(HEALS_WITHIN, heals("a dropped operation", &store)).await.unwrap();
}

/// Redis performs a command after its connection was given up: no lease is left that no process holds.
#[tokio::test]
async fn late_lease_is_found_again() {
    let redis = RedisServer::start().await;
    let proxy = Proxy::start(redis.port).await;
    let (one, other) = (behind(&proxy), store(&redis));
    heals("at first", &one).await;
    proxy.freeze();
    assert!(one.lease(MINUTE).await.is_err());
    proxy.thaw();
    // The late command is performed now.
    exists(&redis, &KEY.replace("record", "lease")).await;
    assert!(other.lease(MINUTE).await.unwrap().is_none());
    let found = lease(&one).await;
    // Two attempts of one handle still exclude each other, and the lease is a lease like any other.
    assert!(one.lease(MINUTE).await.unwrap().is_none());
    assert!(other.lease(MINUTE).await.unwrap().is_none());
    assert_eq!(one.extend(&found, MINUTE).await.unwrap(), Extension::Extended);
    let record = Record::new(found.fence(), "found");
    assert_eq!(one.publish(&found, record).await.unwrap(), Publication::Stored);
    one.release(found).await.unwrap();
    assert!(other.lease(MINUTE).await.unwrap().is_some());
}

/// A late command arrives while its successor holds the lease, and once more after that was released.
#[tokio::test]
async fn late_lease_supersedes_no_holder() {
    let redis = RedisServer::start().await;
    let (slow, fast) = (Proxy::start(redis.port).await, Proxy::start(redis.port).await);
    let front = Proxy::start(slow.port).await;
    let store = behind(&front);
    heals("at first", &store).await;
    for is_held in [true, false] {
        slow.freeze();
        assert!(store.lease(MINUTE).await.is_err());
        front.switch(fast.port);
        let held = lease(&store).await;
        let fence = held.fence();
        if !is_held {
            store.release(held).await.unwrap();
            slow.thaw();
            sleep(Duration::from_millis(200)).await;
            // Its lease is found again.
            assert!(lease(&store).await.fence() > fence);
            break;
        }
        slow.thaw();
        sleep(Duration::from_millis(200)).await;
        let record = Record::new(fence, "held");
        assert_eq!(store.publish(&held, record).await.unwrap(), Publication::Stored);
        store.release(held).await.unwrap();
        front.switch(slow.port);
        front.close_all();
        heals("in between", &store).await;
    }
}

/// Builds a provider with a user's login, whose refresh tokens work once.
fn login(server: &AuthServer, store: impl TokenStore, refresh_token: &str) -> TokenProvider {
    let endpoint = Server::token_endpoint(format!("{}oauth/token", server.uri()));
    let source = OAuth2::login(endpoint, ClientAuth::public("id"));
    let retry = RetryPolicy::new().backoff(Duration::from_millis(1), Duration::from_millis(5));
    TokenProvider::builder(source).login(refresh_token).store(store).retry(retry).build().unwrap()
}

/// Redis fails over while the token endpoint is asked, and the refresh token before is spent.
#[tokio::test]
async fn failover_during_exchange_keeps_login() {
    for keeps_connections in [true, false] {
        let (master, replica) = tokio::join!(RedisServer::start(), RedisServer::start());
        let proxy = Proxy::start(master.port).await;
        let server = AuthServer::builder().client("id", "secret").start().await.unwrap();
        let provider = login(&server, behind(&proxy), &server.log_in());
        let token = provider.token().await.unwrap();
        replica.run(&["REPLICAOF", "127.0.0.1", &master.port.to_string()]).await;
        exists(&replica, KEY).await;

        server.inject(Route::OAuthToken, Fault::Delay(Duration::from_secs(1)));
        let refresh = tokio::spawn({
            let (provider, token) = (provider.clone(), token.clone());
            async move { provider.refresh(&token).await }
        });
        exists(&replica, &KEY.replace("record", "lease")).await;
        proxy.switch(replica.port);
        replica.run(&["REPLICAOF", "NO", "ONE"]).await;
        master.run(&["REPLICAOF", "127.0.0.1", &replica.port.to_string()]).await;
        if !keeps_connections {
            proxy.close_all();
        }
        assert!(!refresh.is_finished(), "the exchange was over before the failover");
        let refreshed = refresh.await.unwrap().unwrap();

        let on_new_master = store(&replica);
        let is_stored = async {
            while !stored(&on_new_master).await.text().contains(refreshed.access_token()) {
                sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(HEALS_WITHIN, is_stored).await.expect("the new refresh token is not stored");
        // Another process goes on with it.
        let other = login(&server, on_new_master, "");
        let adopted = other.token().await.unwrap();
        assert_eq!(adopted.access_token(), refreshed.access_token());
        other.refresh(&adopted).await.unwrap();
        assert_eq!(server.counters().reused_refresh_tokens, 0);
    }
}

/// Waits until the server has this key.
async fn exists(redis: &RedisServer, key: &str) {
    let deadline = Instant::now() + MINUTE / 3;
    while redis.run(&["EXISTS", key]).await == "0" {
        assert!(Instant::now() < deadline, "{key} is missing");
        sleep(Duration::from_millis(5)).await;
    }
}

/// Redis is read-only, slow, or has a key of another type.
#[tokio::test]
async fn failing_redis_costs_no_token() {
    async fn run(redis: &RedisServer, command: &[&str]) {
        match command {
            ["stop"] => redis.stop(),
            ["resume"] => redis.resume(),
            command => drop(redis.run(command).await),
        }
    }

    let few = "min-replicas-to-write";
    for (case, spoil, mend) in [
        ("a replica", &["REPLICAOF", "127.0.0.1", "1"][..], &["REPLICAOF", "NO", "ONE"][..]),
        ("too few replicas", &["CONFIG", "SET", few, "1"], &["CONFIG", "SET", few, "0"]),
        ("no memory", &["CONFIG", "SET", "maxmemory", "1"], &["CONFIG", "SET", "maxmemory", "0"]),
        ("too slow", &["stop"], &["resume"]),
        ("another type", &["SET", KEY, "canary"], &["DEL", KEY]),
    ] {
        let redis = RedisServer::start().await;
        let server = AuthServer::start().await.unwrap();
        let store = || store(&redis).timeouts(Duration::from_secs(1), Duration::from_millis(50));
        run(&redis, spoil).await;
        let provider = process(&server, store());
        let token = provider.token().await.unwrap_or_else(|error| panic!("{case}: {error:?}"));
        let error = store().lease(MINUTE).await.unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::Unavailable, "{case}: {error:?}");
        assert!(!format!("{error:?}").contains("canary"), "{case}: {error:?}");
        run(&redis, mend).await;
        assert!(stored(&store()).await.text().contains(token.access_token()), "{case}");
        assert_eq!(server.counters().api_key_grants, 1, "{case}");
    }
}

/// The stored record cannot be read: it counts as absent and is overwritten.
#[tokio::test]
async fn foreign_values_are_overwritten() {
    let record = [
        ("text", "canary"),
        ("text", "\u{1}"),
        ("generation", "canary"),
        ("expires_at", "canary"),
        ("expires_at", "inf"),
    ];
    for (field, garbage) in record {
        let redis = RedisServer::start().await;
        let server = AuthServer::start().await.unwrap();
        process(&server, store(&redis)).token().await.unwrap();
        redis.run(&["HSET", KEY, field, garbage]).await;
        if field != "text" {
            let error = store(&redis).load().await.unwrap_err();
            assert_eq!(error.kind(), StoreErrorKind::InvalidRecord, "{field}: {error:?}");
        }
        let token = process(&server, store(&redis)).token().await.unwrap();
        assert_eq!(server.counters().api_key_grants, 2, "{field}");
        assert!(stored(&store(&redis)).await.text().contains(token.access_token()), "{field}");
    }

    let redis = RedisServer::start().await;
    let store = store(&redis);
    for (count, garbage) in ["canary", "", "-inf", "inf", "nan", "18446744073709551615"].iter().enumerate() {
        let fence = publish(&store, "before").await;
        redis.run(&["HSET", KEY, "fence", garbage]).await;
        let text = format!("after {count}");
        assert!(publish(&store, &text).await > fence, "{garbage}");
        assert_eq!(stored(&store).await.text(), text, "{garbage}");
    }

    let lease = KEY.replace("record", "lease");
    for leased in [&["SET", &lease, "canary"][..], &["HSET", &lease, "canary", "canary"]] {
        redis.run(leased).await;
        publish(&store, "the lease was foreign").await;
    }
}

/// Redis has a certificate that the program does not trust.
#[tokio::test]
async fn trusts_only_given_root_over_tls() {
    let CertifiedKey { cert, signing_key } = generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let folder = Folder::new();
    let (cert_file, key_file) = (folder.0.join("cert.pem"), folder.0.join("key.pem"));
    std::fs::write(&cert_file, cert.pem()).unwrap();
    std::fs::write(&key_file, signing_key.serialize_pem()).unwrap();
    let tls_port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let _redis = RedisServer::with(&[
        "--tls-port",
        &tls_port.to_string(),
        "--tls-cert-file",
        cert_file.to_str().unwrap(),
        "--tls-key-file",
        key_file.to_str().unwrap(),
        "--tls-auth-clients",
        "no",
    ])
    .await;
    let url = format!("rediss://127.0.0.1:{tls_port}");
    let store = RedisStore::new(&url, "videos").unwrap().root_certificates(cert.pem());
    publish(&store, "over TLS").await;
    assert_eq!(store.load().await.unwrap().unwrap().text(), "over TLS");
    // A server with an untrusted certificate is not queried.
    let error = RedisStore::new(&url, "videos").unwrap().load().await.unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Configuration, "{error:?}");
    let place = format!("Redis at 127.0.0.1:{tls_port}, namespace \"videos\": invalid peer certificate: ");
    assert!(error.to_string().starts_with(&place), "{error}");
}

/// The user of Redis has the documented rights only, and no output contains the password.
#[tokio::test]
async fn documented_acl_rights_suffice() {
    let redis = RedisServer::start().await;
    let documentation = include_str!("../src/redis/mod.rs");
    let mut rights = documentation.lines().filter_map(|line| line.strip_prefix("/// ~tower-bearer:* "));
    for user in ["bearer", "reader"] {
        let rights: Vec<_> = rights.next().unwrap().split(' ').collect();
        let user = ["ACL", "SETUSER", user, "on", ">canary-password", "~tower-bearer:*"];
        redis.run(&[&user, &rights[..]].concat()).await;
    }
    let url = |password: &str| format!("redis://bearer:{password}@127.0.0.1:{}", redis.port);
    let store = RedisStore::new(&url("canary-password"), "videos").unwrap();
    let lease = lease(&store).await;
    assert_eq!(store.extend(&lease, MINUTE).await.unwrap(), Extension::Extended);
    store.release(lease).await.unwrap();
    publish(&store, "text").await;
    assert_eq!(store.load().await.unwrap().unwrap().text(), "text");

    let url_of_reader = format!("redis://reader:canary-password@127.0.0.1:{}", redis.port);
    let reader = RedisStore::new(&url_of_reader, "videos").unwrap();
    assert_eq!(reader.load().await.unwrap().unwrap().text(), "text");
    assert!(reader.lease(MINUTE).await.is_err());

    let wrong = RedisStore::new(&url("canary-wrong"), "videos").unwrap();
    let error = wrong.load().await.unwrap_err();
    let unparsable = RedisStore::new("canary://user:canary@host", "videos").unwrap_err();
    let shown = format!("{store:?}{wrong:?}{error}{error:?}{unparsable}{unparsable:?}");
    assert!(!shown.contains("canary"), "{shown}");
    // A missing right is reported.
    redis.run(&["ACL", "SETUSER", "bearer", "-hset"]).await;
    let error = store.lease(MINUTE).await.unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Configuration, "{error}");
    assert!(error.to_string().contains("can't run this command"), "{error:?}");
}

/// The password of Redis is wrong: `ready` says so at the start, and nothing else waits for it.
#[tokio::test]
async fn ready_finds_wrong_password() {
    let redis = RedisServer::start().await;
    redis.run(&["ACL", "SETUSER", "bearer", "on", ">canary-password", "~*", "+@all"]).await;
    redis.run(&["CONFIG", "SET", "requirepass", "canary-required"]).await;
    let server = AuthServer::start().await.unwrap();
    let rejected = "the server rejects the user name or the password";
    for (user, why) in [
        ("bearer:canary-wrong@", rejected),
        (":canary-wrong@", rejected),
        ("", "the server answers NOAUTH: Authentication required."),
        ("bearer:canary-password@", ""),
        (":canary-required@", ""),
    ] {
        let url = format!("redis://{user}127.0.0.1:{}", redis.port);
        let provider = process(&server, RedisStore::new(&url, "videos").unwrap());
        let ready = provider.ready().await;
        let status = provider.status().store.unwrap();
        if why.is_empty() {
            ready.unwrap();
            assert!(status.is_usable());
            continue;
        }
        let error = ready.unwrap_err();
        assert!(!error.is_transient() && !status.is_usable(), "{error:?}");
        let text = support::chain(&error);
        let place = format!("Redis at 127.0.0.1:{}, namespace \"videos\": ", redis.port);
        assert_eq!(text, format!("the token store cannot be used: {place}{why}"));
        assert!(!format!("{text}{error:?}{status:?}").contains("canary"), "{error:?}");
        assert_eq!(status.error.unwrap().kind(), StoreErrorKind::Configuration, "{why}");
        // A request does not need the store.
        assert!(provider.token().await.is_ok());
    }
}

/// Redis is down when the program starts: `ready` waits for it.
#[tokio::test]
async fn ready_waits_for_redis() {
    let mut redis = RedisServer::start().await;
    redis.kill();
    let server = AuthServer::start().await.unwrap();
    let provider = process(&server, store(&redis));
    provider.token().await.unwrap();
    assert!(!provider.status().store.unwrap().is_usable());
    let (ready, ()) = tokio::join!(provider.ready(), redis.restart());
    ready.unwrap();
    assert!(provider.status().store.unwrap().is_usable());
    assert!(stored(&store(&redis)).await.text().contains(provider.current().unwrap().access_token()));
    assert_eq!(server.counters().api_key_grants, 1);
}

/// Only a change of the configuration helps: `ready` does not wait for it.
#[tokio::test]
async fn ready_finds_wrong_configuration() {
    let redis = RedisServer::start().await;
    let documentation = include_str!("../src/redis/mod.rs");
    let rights = documentation.lines().filter_map(|line| line.strip_prefix("/// ~tower-bearer:* ")).nth(1);
    let rights: Vec<_> = rights.unwrap().split(' ').collect();
    let reader = ["ACL", "SETUSER", "reader", "on", ">canary", "~tower-bearer:*"];
    redis.run(&[&reader, &rights[..]].concat()).await;
    redis.run(&["ACL", "SETUSER", "keyless", "on", ">canary", "~other:*", "+@all"]).await;
    let server = AuthServer::start().await.unwrap();
    let port = redis.port;
    for (url, why) in [
        (format!("redis://reader:canary@127.0.0.1:{port}"), "can't run this command"),
        (format!("redis://keyless:canary@127.0.0.1:{port}"), "the server answers NOPERM: "),
        (format!("redis://127.0.0.1:{port}/99"), "the server answers ERR: DB index is out of range"),
        (format!("redis://:canary@127.0.0.1:{port}"), "rejects the user name or the password"),
    ] {
        let provider = process(&server, RedisStore::new(&url, "videos").unwrap());
        let error = provider.ready().await.unwrap_err();
        let text = support::chain(&error);
        assert!(
            matches!(&error, Error::Store(error) if error.kind() == StoreErrorKind::Configuration),
            "{text}"
        );
        assert!(text.contains(why) && !format!("{text}{error:?}").contains("canary"), "{text}");
    }
    // A reader needs no right to write.
    store(&redis).release(lease(&store(&redis)).await).await.unwrap();
    publish(&store(&redis), r#"{"schema":1,"access_token":"abc"}"#).await;
    let url = format!("redis://reader:canary@127.0.0.1:{port}");
    let reader = TokenProvider::reader(RedisStore::new(&url, "videos").unwrap()).build().unwrap();
    assert_eq!(reader.ready().await.unwrap().access_token(), "abc");
}

/// Redis quotes the arguments of a command that it does not know, which may be a password.
#[tokio::test]
async fn unknown_command_hides_password() {
    let redis = RedisServer::with(&["--rename-command", "HELLO", "another"]).await;
    let url = format!("redis://user:canary@127.0.0.1:{}/?protocol=resp3", redis.port);
    let error = RedisStore::new(&url, "videos").unwrap().load().await.unwrap_err();
    assert!(error.to_string().ends_with("the server answers ERR: unknown command 'HELLO'"), "{error}");
    assert!(!format!("{error:?}").contains("canary"), "{error:?}");
}

/// An error of Redis says where, and the cause once.
#[tokio::test]
async fn error_has_place_and_cause() {
    let store = RedisStore::new("redis://:canary@127.0.0.1:1/3", "videos").unwrap();
    let error = support::chain(&store.load().await.unwrap_err());
    assert!(error.starts_with("Redis at 127.0.0.1:1, namespace \"videos\": "), "{error}");
    assert_eq!(error.to_lowercase().matches("refused").count(), 1, "{error}");
    assert!(!error.contains("canary"), "{error}");
}

/// A stored token can be read by a person who has access to Redis.
#[tokio::test]
async fn record_can_be_encrypted() {
    let redis = RedisServer::start().await;
    let server = AuthServer::start().await.unwrap();
    let build = || {
        let keys = EncryptionKeys::new("1", &[7; 32]).unwrap();
        process(&server, EncryptedStore::new(store(&redis), keys))
    };
    let token = build().token().await.unwrap();
    assert_eq!(build().token().await.unwrap().access_token(), token.access_token());
    let text = redis.run(&["HGET", KEY, "text"]).await;
    assert!(text.starts_with("sealed-1:1:"), "{text}");
    assert_eq!(server.counters().api_key_grants, 1);
}

/// An encrypted record is copied to another namespace with the same keys.
#[tokio::test]
async fn encrypted_record_opens_only_in_its_namespace() {
    let redis = RedisServer::start().await;
    let keys = EncryptionKeys::new("1", &[7; 32]).unwrap();
    let base = EncryptedStore::new(store(&redis), keys);
    let (one, other) = (base.for_namespace("one"), base.for_namespace("other"));
    let held = one.lease(MINUTE).await.unwrap().unwrap();
    one.publish(&held, Record::new(held.fence(), "of one")).await.unwrap();
    redis.run(&["COPY", "tower-bearer:{one}:record", "tower-bearer:{other}:record"]).await;
    assert_eq!(base.for_namespace("one").load().await.unwrap().unwrap().text(), "of one");
    assert_eq!(other.load().await.unwrap_err().kind(), StoreErrorKind::InvalidRecord);
}

/// An option of the store is out of its range.
#[test]
fn out_of_range_options_are_errors() {
    let new = |url: &str, namespace: &str| RedisStore::new(url, namespace);
    let build = |store: RedisStore| TokenProvider::builder(StaticToken::new("abc")).store(store).build();
    let with_options =
        |set: fn(RedisStore) -> RedisStore| build(set(new("redis://127.0.0.1", "videos").unwrap()));
    let url = "redis://127.0.0.1";
    const SECOND: Duration = Duration::from_secs(1);
    let encode = "percent-encode the special characters of the password";
    let invalid = format!("an invalid URL with the scheme redis: check the host and the port, and {encode}");
    let early = format!("redis:// with @ after the host: {encode}");
    for (url, got) in [
        ("http://canary", "another scheme"),
        ("127.0.0.1:6379", "another scheme"),
        ("redis://user:canary@", &invalid),
        ("redis://user:canary/@redis.example", &invalid),
        ("redis://127.0.0.1:65536", &invalid),
        ("redis://canary#pass@redis.example", &early),
        ("redis://canary:12/pass@redis.example", &early),
        ("redis://", "redis://, which has no host"),
        ("redis:///1", "redis:///1, which has no host"),
        ("redis://:canary@127.0.0.1:0/1", "redis://127.0.0.1:0/1, whose port is 0"),
        ("rediss://u:canary@127.0.0.1/videos", "rediss://127.0.0.1/videos, whose database is not a number"),
        ("redis://127.0.0.1/-1", "redis://127.0.0.1/-1, whose database is not a number"),
        ("redis://0.0.0.0", "redis://0.0.0.0, which redis-rs rejects"),
        ("redis+unix:///redis?db=-1&pass=canary", "redis+unix:///redis, whose database is less than 0"),
        ("redis+unix:///redis?db=x&pass=canary@", "redis+unix:///redis, which redis-rs rejects"),
    ] {
        let error = new(url, "videos").expect_err(url).to_string();
        assert!(error.ends_with(&format!("or redis+unix:///path, got {got}")), "{url}: {error}");
        assert!(error.contains("URL of Redis must be redis://") && !error.contains("canary"), "{error}");
    }
    for url in
        ["redis://h", "rediss://:p%2F@h:1/15", "valkey://h/", "redis://[::1]:1", "unix:///redis?pass=a@b"]
    {
        new(url, "videos").unwrap_or_else(|error| panic!("{url}: {error}"));
    }
    for result in [
        new("http://127.0.0.1", "videos"),
        new("", "videos"),
        new(url, ""),
        new(url, "a b"),
        new(url, "{a}"),
        new(url, &"a".repeat(201)),
    ] {
        assert!(matches!(result, Err(Error::InvalidOption(_))), "{result:?}");
    }
    let base = new(url, "videos").unwrap();
    for namespace in ["", "a b", "{a}", "a}:record", "ä", &"a".repeat(201)] {
        let error = build(base.for_namespace(namespace)).unwrap_err();
        let text = "namespace must be 1 to 200 visible ASCII characters without { and }, got ";
        assert_eq!(error.to_string(), format!("invalid option: {text}{namespace:?}"));
        assert!(matches!(error, Error::InvalidOption(_)));
    }
    assert!(build(base.for_namespace("a".repeat(200))).is_ok());
    for result in [
        with_options(|store| store.key_prefix("{")),
        with_options(|store| store.timeouts(Duration::ZERO, SECOND)),
        with_options(|store| store.timeouts(SECOND, SECOND * 61)),
        with_options(|store| store.root_certificates("no certificate")),
        build(
            new("rediss://127.0.0.1", "videos")
                .unwrap()
                .root_certificates("-----BEGIN CERTIFICATE-----\n!\n"),
        ),
    ] {
        assert!(matches!(result, Err(Error::InvalidOption(_))), "{result:?}");
    }
}

/// The example `fleet` prints a secret.
#[test]
fn fleet_example_prints_no_secret() {
    let output = support::cargo()
        .args(["run", "--quiet", "-p", "tower-bearer-store", "--example", "fleet", "--all-features"])
        .output()
        .unwrap();
    let text =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    println!("{text}");
    assert!(output.status.success(), "{text}");
    assert!(text.contains("POSTs"), "{text}");
    for secret in ["eyJ0eXAiOiJKV1QifQ", "def50200", "test-key-"] {
        assert!(!text.contains(secret), "{text}");
    }
}
