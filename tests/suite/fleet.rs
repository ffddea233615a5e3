//! Processes that share a store share one token. Tests the protocol of `TokenStore` on a paused clock.

use std::time::Duration;

use tokio::time::{Instant, advance, sleep};
use tower_bearer::{
    Error, Freshness, RetryPolicy, SourceErrorKind, Token, TokenProvider,
    store::{Lease, Publication, Record, Role, StoreError, StoreErrorKind, TokenStore},
};
use tower_bearer_store::{EncryptedStore, EncryptionKeys};

use crate::support::{
    self, SECOND,
    fleet::{Endpoint, Health, MINUTE, MemoryStore, POST, Stop, record_text},
};

/// Waits until the token is expiring, whatever its jitter.
async fn until_expiring(provider: &TokenProvider) {
    while provider.status().freshness == Freshness::Fresh {
        sleep(SECOND / 10).await;
    }
}

/// Refreshes the expiring token, and waits for the end of the refresh.
async fn refresh_when_expiring(provider: &TokenProvider) -> Token {
    until_expiring(provider).await;
    provider.token().await.unwrap();
    until_idle(provider).await;
    provider.current().unwrap()
}

async fn until_idle(provider: &TokenProvider) {
    while provider.status().refreshing {
        sleep(Duration::from_millis(10)).await;
    }
}

/// Sixteen processes refresh at the same expiry.
#[tokio::test(start_paused = true)]
async fn sixteen_processes_post_once_per_expiry() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    let processes: Vec<_> = (0..16).map(|_| endpoint.process(&store).build().unwrap()).collect();
    let started: Vec<_> = processes
        .iter()
        .map(|process| {
            let process = process.clone();
            tokio::spawn(async move { process.token().await.unwrap().access_token().to_owned() })
        })
        .collect();
    for process in started {
        assert_eq!(process.await.unwrap(), "access-1");
    }
    assert_eq!(endpoint.grants().posts(), 1);

    for expiry in 1..=20 {
        // All processes keep sending requests.
        let posts = endpoint.grants().posts();
        while endpoint.grants().posts() == posts {
            for process in &processes {
                process.token().await.unwrap();
            }
            sleep(SECOND / 20).await;
        }
        sleep(10 * SECOND).await;
        for process in &processes {
            process.token().await.unwrap();
            until_idle(process).await;
            let current = process.current().unwrap();
            assert_eq!(current.access_token(), format!("access-{}", expiry + 1));
        }
        let grants = endpoint.grants();
        assert_eq!((grants.refreshes, grants.posts()), (expiry, expiry + 1));
    }
}

/// A reader starts before the publisher has a token.
#[tokio::test(start_paused = true)]
async fn reader_waits_one_lease() {
    for lease in [Duration::from_millis(100), SECOND, 10 * SECOND] {
        let reader = TokenProvider::reader(MemoryStore::default()).lease(lease);
        let reader = reader.retry(RetryPolicy::new().max_retries(0)).build().unwrap();
        let begun = Instant::now();
        reader.token().await.unwrap_err();
        assert_eq!(begun.elapsed().as_millis(), lease.as_millis());
    }
}

/// Several processes refresh at the same expiry: nearly all of them get the token from the record, and only read until
/// it is there.
#[tokio::test(start_paused = true)]
async fn store_is_used_four_times_per_process() {
    const PROCESSES: u64 = 500;
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    let processes: Vec<_> = (0..PROCESSES).map(|_| endpoint.process(&store).build().unwrap()).collect();
    for expiry in 1..=3 {
        store.change(|kept| kept.operations = 0);
        let started: Vec<_> = processes
            .iter()
            .map(|process| {
                let process = process.clone();
                tokio::spawn(async move { process.token().await.unwrap() })
            })
            .collect();
        for process in started {
            process.await.unwrap();
        }
        assert_eq!(endpoint.grants().posts(), expiry);
        // Read, ask for the lease, read twice. The one that refreshes also publishes.
        let operations = store.kept().operations;
        assert!(operations <= 4 * PROCESSES + 1, "{operations}");
        sleep(MINUTE).await;
    }
}

/// The process that holds the lease dies, and the others wait for its end.
#[tokio::test(start_paused = true)]
async fn lease_is_taken_within_a_second_of_its_end() {
    const LEASE: Duration = Duration::from_secs(10);
    for offset in 0..200 {
        let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
        endpoint.change(|grants| grants.takes = Some(Duration::ZERO));
        let process = endpoint.process(&store).lease(LEASE).build().unwrap();
        let _of_the_dead = store.lease(LEASE).await.unwrap().unwrap();
        let end = Instant::now() + LEASE;
        sleep(offset * SECOND / 200).await;
        process.token().await.unwrap();
        let late = Instant::now() - end;
        assert!(late <= SECOND, "{late:?}");
    }
}

/// A process waits for an exchange of nearly five leases.
#[tokio::test(start_paused = true)]
async fn short_lease_waits_for_long_exchange() {
    for (lease, exchange) in [(100, 450), (400, 1_900), (1_000, 4_500)] {
        for _ in 0..50 {
            let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
            endpoint.change(|grants| grants.takes = Some(Duration::from_millis(exchange)));
            let build = || endpoint.process(&store).lease(Duration::from_millis(lease)).build().unwrap();
            let (first, second) = (build(), build());
            let first = tokio::spawn(async move { first.token().await.unwrap() });
            sleep(Duration::from_millis(1)).await;
            second.token().await.unwrap();
            first.await.unwrap();
            assert_eq!(endpoint.grants().posts(), 1, "lease {lease} ms, exchange {exchange} ms");
        }
    }
}

/// Another process publishes between the first read and the lease.
#[tokio::test(start_paused = true)]
async fn reads_record_again_under_lease() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    store.change(|kept| {
        kept.before_lease = Some(Record::new(7, record_text("elsewhere", "def")).expires_in(MINUTE))
    });
    let token = endpoint.process(&store).build().unwrap().token().await.unwrap();
    assert_eq!((token.access_token(), endpoint.grants().posts()), ("elsewhere", 0));
    // The lease was released.
    assert!(store.lease(SECOND).await.unwrap().is_some());
}

/// The token of four processes is revoked: 200 requests are challenged at once in each of them.
#[tokio::test(start_paused = true)]
async fn fleet_renews_challenged_token_once() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    let processes: Vec<_> = (0..4).map(|_| endpoint.process(&store).build().unwrap()).collect();
    let mut refreshes = Vec::new();
    for process in &processes {
        let token = process.token().await.unwrap();
        for _ in 0..200 {
            let (process, token) = (process.clone(), token.clone());
            refreshes.push(tokio::spawn(async move { process.refresh(&token).await.unwrap() }));
        }
    }
    for refresh in refreshes {
        assert_eq!(refresh.await.unwrap().access_token(), "access-2");
    }
    assert_eq!(endpoint.grants().posts(), 2);
}

/// The process that holds the lease dies before its POST.
#[tokio::test(start_paused = true)]
async fn death_before_post_costs_one_lease() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    endpoint.change(|grants| grants.takes = Some(Duration::ZERO));
    let _never_released = store.lease(10 * SECOND).await.unwrap().unwrap();
    let begun = Instant::now();
    let token = endpoint.process(&store).build().unwrap().token().await.unwrap();
    assert_eq!(token.access_token(), "access-1");
    // The lease is taken within a second of its end. The POST takes no time.
    assert!((10 * SECOND..=11 * SECOND).contains(&begun.elapsed()), "{:?}", begun.elapsed());
    assert_eq!(endpoint.grants().posts(), 1);
}

/// The process that holds the lease dies after its POST.
#[tokio::test(start_paused = true)]
async fn death_after_post_costs_one_key_grant() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    let process = endpoint.process(&store).build().unwrap();
    let token = process.token().await.unwrap();
    // Another process uses the refresh token and dies before it publishes.
    let _never_released = store.lease(10 * SECOND).await.unwrap().unwrap();
    endpoint.authenticate_elsewhere();
    let next = process.refresh(&token).await.unwrap();
    assert_eq!(next.access_token(), "access-3");
    let grants = endpoint.grants();
    assert_eq!((grants.refreshes, grants.rejected, grants.authentications), (0, 1, 2));
    assert_eq!(store.kept().published, 2);
}

/// The process that holds the lease pauses, and resumes when another one has refreshed the token.
#[tokio::test(start_paused = true)]
async fn paused_holder_adopts_newer_token() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    let build = || endpoint.process(&store).lease(2 * SECOND).build().unwrap();
    let (paused, other) = (build(), build());
    let first = paused.token().await.unwrap();
    other.token().await.unwrap();

    endpoint.change(|grants| grants.delays.push_back(15 * SECOND));
    let refresh = tokio::spawn({
        let (paused, first) = (paused.clone(), first.clone());
        async move { paused.refresh(&first).await.unwrap() }
    });
    sleep(SECOND).await;
    // The endpoint has processed its POST, so the refresh token is used up.
    let token = other.refresh(&other.current().unwrap()).await.unwrap();
    assert_eq!(token.access_token(), "access-3");
    assert_eq!(refresh.await.unwrap().access_token(), "access-3");
    assert_eq!((store.kept().published, store.kept().superseded), (2, 1));
    let grants = endpoint.grants();
    assert_eq!((grants.refreshes, grants.rejected, grants.authentications), (1, 1, 2));
}

/// The token endpoint is slower than the lease: an exchange of 5 s under leases of 2 s.
#[tokio::test(start_paused = true)]
async fn slow_endpoint_posts_once_per_expiry() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    endpoint.change(|grants| grants.takes = Some(5 * SECOND));
    let processes: Vec<_> =
        (0..8).map(|_| endpoint.process(&store).lease(2 * SECOND).build().unwrap()).collect();
    for expiry in 0..5 {
        let asked: Vec<_> = processes
            .iter()
            .map(|process| {
                let process = process.clone();
                tokio::spawn(async move { process.token().await.unwrap() })
            })
            .collect();
        for asked in asked {
            assert_eq!(asked.await.unwrap().access_token(), format!("access-{}", expiry + 1));
        }
        let grants = endpoint.grants();
        assert_eq!((grants.refreshes, grants.rejected, grants.authentications), (expiry, 0, 1));
        sleep(2 * MINUTE).await;
    }
    assert_eq!(endpoint.grants().presented_twice, 0);
}

/// A rejected refresh token and then the credential take 8 s under a lease of 2 s.
#[tokio::test(start_paused = true)]
async fn lease_extends_for_both_exchanges() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    let build = || endpoint.process(&store).lease(2 * SECOND).build().unwrap();
    let (process, other) = (build(), build());
    let (first, same) = (process.token().await.unwrap(), other.token().await.unwrap());
    endpoint.authenticate_elsewhere();
    endpoint.change(|grants| grants.takes = Some(4 * SECOND));
    let (renewed, adopted) = tokio::join!(process.refresh(&first), other.refresh(&same));
    assert_eq!(renewed.unwrap().access_token(), adopted.unwrap().access_token());
    let grants = endpoint.grants();
    assert_eq!((grants.refreshes, grants.rejected, grants.authentications), (0, 1, 2));
}

/// The process that holds the lease dies after it has extended it.
#[tokio::test(start_paused = true)]
async fn death_after_extension_costs_one_lease() {
    let (endpoint, store, stop) = (Endpoint::default(), MemoryStore::default(), Stop::default());
    endpoint.change(|grants| grants.takes = Some(9 * SECOND));
    let holder = endpoint.process_with(&store, &stop).lease(3 * SECOND).build().unwrap();
    tokio::spawn(async move { holder.token().await });
    sleep(5 * SECOND + SECOND / 2).await;
    // The last extension was half a second ago. There is no further one.
    assert_eq!(store.kept().extended, 5);
    stop.stop_for(60 * MINUTE);
    endpoint.change(|grants| grants.takes = None);
    let died = Instant::now();
    endpoint.process(&store).lease(3 * SECOND).build().unwrap().token().await.unwrap();
    assert!((2 * SECOND..=3 * SECOND + SECOND / 2).contains(&died.elapsed()), "{:?}", died.elapsed());
}

/// The store cannot extend leases, and the token endpoint is slower than the lease.
#[tokio::test(start_paused = true)]
async fn lease_without_extension_expires() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    store.change(|kept| kept.cannot_extend = true);
    let build = || endpoint.process(&store).lease(2 * SECOND).build().unwrap();
    let (slow, other) = (build(), build());
    let first = slow.token().await.unwrap();
    other.token().await.unwrap();
    endpoint.change(|grants| grants.takes = Some(5 * SECOND));
    let slow = tokio::spawn(async move { slow.refresh(&first).await.unwrap() });
    sleep(SECOND).await;
    let token = other.refresh(&other.current().unwrap()).await.unwrap();
    assert_eq!(token.access_token(), "access-3");
    slow.await.unwrap();
    let grants = endpoint.grants();
    assert_eq!((grants.refreshes, grants.rejected, grants.presented_twice), (1, 1, 1));
    assert_eq!((store.kept().superseded, store.kept().extended, store.kept().not_extended), (1, 0, 0));
}

/// A process that was stopped for longer than its lease resumes, and does not extend the newer lease.
#[tokio::test(start_paused = true)]
async fn superseded_lease_is_not_extended() {
    let (endpoint, store, stop) = (Endpoint::default(), MemoryStore::default(), Stop::default());
    endpoint.change(|grants| grants.takes = Some(20 * SECOND));
    let stopped = endpoint.process_with(&store, &stop).lease(3 * SECOND).build().unwrap();
    stop.stop_for(4 * SECOND + SECOND / 2);
    let stopped = tokio::spawn(async move { stopped.token().await.unwrap() });
    sleep(SECOND * 7 / 2).await;
    // No process extends this lease.
    let newer = store.lease(5 * SECOND).await.unwrap().unwrap();
    sleep(6 * SECOND).await;
    assert_eq!((store.kept().extended, store.kept().not_extended), (0, 1));
    assert!(store.lease(MINUTE).await.unwrap().unwrap().fence() > newer.fence());
    stopped.await.unwrap();
    assert_eq!(store.kept().not_extended, 1);
}

/// The store fails when a lease is extended: a lease of 6 s leaves time for another attempt.
#[tokio::test(start_paused = true)]
async fn failed_extension_is_retried() {
    for health in [Health::Down, Health::ReadOnly, Health::Slow] {
        let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
        endpoint.change(|grants| grants.takes = Some(9 * SECOND));
        let build = || endpoint.process(&store).lease(6 * SECOND).build().unwrap();
        let (holder, other) = (build(), build());
        let holder = tokio::spawn(async move { holder.token().await.unwrap() });
        sleep(SECOND).await;
        store.set(health);
        sleep(2 * SECOND).await;
        store.set(Health::Good);
        let token = other.token().await.unwrap();
        assert_eq!(token.access_token(), holder.await.unwrap().access_token(), "{health:?}");
        assert_eq!(endpoint.grants().posts(), 1, "{health:?}");
    }
}

/// The time between the lease and the POST counts towards the lease.
#[tokio::test(start_paused = true)]
async fn nearly_expired_lease_is_not_used() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    store.change(|kept| kept.lease_takes.push_back(SECOND + SECOND / 10));
    let process = endpoint.process(&store).lease(2 * SECOND).build().unwrap();
    process.token().await.unwrap();
    assert_eq!((store.kept().leases, endpoint.grants().posts()), (2, 1));
}

/// The leases of a store never end: the wait for one is bounded.
#[tokio::test(start_paused = true)]
async fn lease_wait_times_out() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    let _never_released = store.lease(60 * MINUTE).await.unwrap().unwrap();
    let process = endpoint.process(&store).lease(2 * SECOND).build().unwrap();
    let begun = Instant::now();
    assert_eq!(process.token().await.unwrap().access_token(), "access-1");
    assert!((10 * SECOND..12 * SECOND).contains(&begun.elapsed()), "{:?}", begun.elapsed());

    // A store so slow that its leases have nearly ended when they are granted.
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    store.change(|kept| kept.lease_takes.extend([SECOND + SECOND / 2; 100]));
    let process = endpoint.process(&store).lease(2 * SECOND).build().unwrap();
    assert_eq!(process.token().await.unwrap().access_token(), "access-1");
    assert_eq!(endpoint.grants().posts(), 1);
}

/// A token cannot be stored in two outages in a row. The record that the first left is this process's own.
#[tokio::test(start_paused = true)]
async fn stores_token_after_each_outage() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    let process = endpoint.process(&store).build().unwrap();
    process.token().await.unwrap();
    for number in 2..=4 {
        store.set(Health::Down);
        process.invalidate();
        assert_eq!(process.token().await.unwrap().access_token(), format!("access-{number}"));
        store.set(Health::Good);
        sleep(MINUTE / 2).await;
        let (record, _) = store.kept().record.unwrap();
        assert!(record.text().contains(&format!("access-{number}")), "{number}");
    }
}

/// A store that can only be read cannot be used, until it can be written again.
#[tokio::test(start_paused = true)]
async fn status_says_why_store_fails() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    let process = endpoint.process(&store).build().unwrap();
    let reader = TokenProvider::reader(store.clone()).build().unwrap();
    assert!(process.status().store.unwrap().is_usable(), "not used yet");
    assert!(TokenProvider::new(endpoint.clone()).status().store.is_none(), "no store");
    process.token().await.unwrap();
    assert!(process.status().store.unwrap().is_usable());

    let outages = [
        (Health::ReadOnly, "read-only"),
        (Health::Down, "down"),
        (Health::Slow, "did not respond within 2s"),
        (Health::Forgetful, "forgets its records"),
    ];
    for (health, why) in outages {
        store.set(health);
        process.invalidate();
        process.token().await.unwrap();
        let failing = process.status().store.unwrap();
        assert!(!failing.is_usable(), "{health:?}");
        assert!(failing.error.unwrap().to_string().contains(why), "{health:?}");
        let begun = failing.failing_for.unwrap();
        sleep(MINUTE).await;
        let failing_for = process.status().store.unwrap().failing_for.unwrap();
        assert_eq!(failing_for, begun + MINUTE, "{health:?}: since the first failure");
        store.set(Health::Good);
        // The token is stored later, which shows that the store works again.
        sleep(MINUTE).await;
        let status = process.status().store.unwrap();
        assert!(status.is_usable() && status.error.is_none(), "{health:?}: {status:?}");
    }

    // A reader only has to read.
    process.invalidate();
    process.token().await.unwrap();
    store.set(Health::ReadOnly);
    reader.token().await.unwrap();
    assert!(reader.status().store.unwrap().is_usable());
}

/// The store is set up wrongly, and `ready` does not find it.
#[tokio::test(start_paused = true)]
async fn ready_checks_the_store() {
    // It comes up while `ready` waits.
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    store.set(Health::Down);
    let process = endpoint.process(&store).build().unwrap();
    let up = async {
        sleep(5 * SECOND).await;
        store.set(Health::Good);
    };
    let (ready, ()) = tokio::join!(process.ready(), up);
    assert_eq!(ready.unwrap().access_token(), "access-1");
    assert_eq!(endpoint.grants().posts(), 1);
    // The store is known to work: no further operation.
    let loads = store.kept().loads;
    process.ready().await.unwrap();
    assert_eq!(store.kept().loads, loads);

    // It stays down, or cannot be written.
    for health in [Health::Down, Health::ReadOnly, Health::Forgetful] {
        let store = MemoryStore::default();
        store.set(health);
        let process = Endpoint::default().process(&store).refresh_timeout(20 * SECOND).build().unwrap();
        let begun = Instant::now();
        let error = process.ready().await.unwrap_err();
        assert!(matches!(error, Error::Store(_)) && error.is_transient(), "{error:?}");
        assert!(error.to_string().starts_with("the token store cannot be used: the store "), "{error}");
        assert!((17 * SECOND..=21 * SECOND).contains(&begun.elapsed()), "{:?}", begun.elapsed());
        // Requests do not need the store.
        assert!(process.token().await.is_ok());
    }
}

/// A member that only adopts tokens does not know whether it can write, until `ready` has checked.
#[tokio::test(start_paused = true)]
async fn ready_finds_missing_right_to_write() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    store.put(&record_text("access-9", "def"), MINUTE);
    store.set(Health::ReadOnly);
    let build = || endpoint.process(&store).refresh_timeout(5 * SECOND);
    let error = build().build().unwrap().ready().await.unwrap_err();
    assert!(matches!(error, Error::Store(_)), "{error:?}");
    assert_eq!(
        TokenProvider::reader(store.clone()).build().unwrap().ready().await.unwrap().access_token(),
        "access-9"
    );
}

/// An operation of the store fails while others succeed: what has failed has to succeed before the store counts as
/// usable.
#[tokio::test(start_paused = true)]
async fn lasting_failure_is_one_outage() {
    // Leases work, publications do not.
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    store.set(Health::Forgetful);
    let process = endpoint.process(&store).build().unwrap();
    process.token().await.unwrap();
    let begun = process.status().store.unwrap().failing_for.unwrap();
    sleep(30 * SECOND).await;
    assert_eq!(process.status().store.unwrap().failing_for.unwrap(), begun + 30 * SECOND);
    // A lease that nobody releases.
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    let _never_released = store.lease(60 * MINUTE).await.unwrap().unwrap();
    let process = endpoint.process(&store).lease(2 * SECOND).build().unwrap();
    process.token().await.unwrap();
    let status = process.status().store.unwrap();
    assert!(status.error.unwrap().to_string().contains("timed out waiting for the lease"));
}

/// One read of the store fails between two that succeed.
#[tokio::test(start_paused = true)]
async fn publication_ends_store_failure() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    let process = endpoint.process(&store).build().unwrap();
    process.token().await.unwrap();
    endpoint.authenticate_elsewhere();
    // The refresh token is rejected, and the read before the credential is used fails.
    let token = process.current().unwrap();
    let refresh = tokio::spawn({
        let process = process.clone();
        async move { process.refresh(&token).await.unwrap() }
    });
    sleep(POST / 2).await;
    store.set(Health::Down);
    sleep(POST).await;
    store.set(Health::Good);
    refresh.await.unwrap();
    assert!(process.status().store.unwrap().is_usable());
}

/// `ready` is called outside of a runtime.
#[test]
fn ready_outside_of_a_runtime_is_an_error() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    store.set(Health::Down);
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let process = endpoint.process(&store).build().unwrap();
    runtime.block_on(process.token()).unwrap();
    let ready = futures_util::FutureExt::now_or_never(process.ready()).unwrap();
    assert!(matches!(ready, Err(Error::NoRuntime)));
}

/// The release of a lease finds a record that is invalid, which says nothing of the store.
#[tokio::test(start_paused = true)]
async fn invalid_record_at_release_is_no_outage() {
    struct Releases(MemoryStore);

    impl TokenStore for Releases {
        fn namespace(&self) -> &str {
            "releases"
        }

        async fn load(&self) -> Result<Option<Record>, StoreError> {
            self.0.load().await
        }

        async fn lease(&self, length: Duration) -> Result<Option<Lease>, StoreError> {
            self.0.lease(length).await
        }

        async fn publish(&self, lease: &Lease, record: Record) -> Result<Publication, StoreError> {
            self.0.publish(lease, record).await
        }

        async fn release(&self, lease: Lease) -> Result<(), StoreError> {
            self.0.release(lease).await?;
            Err(StoreError::invalid_record("it is another one's"))
        }
    }

    let store = Releases(MemoryStore::default());
    let process = TokenProvider::builder(Endpoint::default()).store(store).build().unwrap();
    assert_eq!(process.ready().await.unwrap().generation(), 1);
    assert!(process.status().store.unwrap().is_usable());
}

/// The drop of a store error's cause is foreign code, which may read the status.
#[test]
fn drop_of_store_error_is_no_deadlock() {
    use std::sync::{Arc, OnceLock};

    #[derive(Clone, Debug, thiserror::Error)]
    #[error("cause")]
    struct Cause(Arc<OnceLock<TokenProvider>>);

    impl Drop for Cause {
        fn drop(&mut self) {
            self.0.get().map(TokenProvider::status);
        }
    }

    struct Failing(Arc<OnceLock<TokenProvider>>);

    impl TokenStore for Failing {
        fn namespace(&self) -> &str {
            "failing"
        }

        async fn load(&self) -> Result<Option<Record>, StoreError> {
            Err(StoreError::unavailable("down").with_cause(Cause(Arc::clone(&self.0))))
        }

        async fn lease(&self, _: Duration) -> Result<Option<Lease>, StoreError> {
            Ok(None)
        }

        async fn publish(&self, _: &Lease, _: Record) -> Result<Publication, StoreError> {
            Ok(Publication::Stored)
        }

        async fn release(&self, _: Lease) -> Result<(), StoreError> {
            Ok(())
        }
    }

    let provider = Arc::new(OnceLock::new());
    let store = Failing(Arc::clone(&provider));
    let process = TokenProvider::builder(Endpoint::default()).store(store).build().unwrap();
    provider.set(process.clone()).unwrap();
    support::ends(async move {
        for _ in 0..3 {
            process.invalidate();
            process.token().await.unwrap();
        }
        until_expiring(&process).await;
        for _ in 0..3 {
            process.token().await.unwrap();
            sleep(SECOND).await;
        }
        assert!(!process.status().store.unwrap().is_usable());
    });
}

/// A caller of `ready` that is dropped during the check leaves no lease behind.
#[tokio::test(start_paused = true)]
async fn dropped_ready_leaves_no_lease() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    store.set(Health::Down);
    let process = endpoint.process(&store).build().unwrap();
    process.token().await.unwrap();
    // The check leases, which takes a second, and is then dropped.
    store.change(|kept| kept.lease_takes.push_back(SECOND));
    store.set(Health::Good);
    assert!(tokio::time::timeout(SECOND / 2, process.ready()).await.is_err());
    sleep(SECOND).await;
    assert!(store.lease(MINUTE).await.unwrap().is_some(), "the lease was released");
}

/// A reader has no publisher.
#[tokio::test(start_paused = true)]
async fn reader_says_what_is_missing() {
    let store = MemoryStore::default();
    let reader = || {
        TokenProvider::reader(store.clone())
            .lease(SECOND)
            .retry(tower_bearer::RetryPolicy::new().max_retries(0))
            .build()
            .unwrap()
    };
    let error = reader().token().await.unwrap_err().to_string();
    assert!(error.ends_with(": the store holds no token; is a publisher running?"), "{error}");
    store.put(&record_text("old", "def"), SECOND);
    advance(2 * SECOND).await;
    let error = reader().token().await.unwrap_err().to_string();
    assert!(error.ends_with(": no publisher has stored a newer token yet"), "{error}");
    store.set(Health::Down);
    let error = reader().token().await.unwrap_err();
    assert!(error.to_string().ends_with(": the token store cannot be used: the store is down"), "{error}");
}

/// The record in the store is older than the token, or has expired.
#[tokio::test(start_paused = true)]
async fn adopts_only_newer_unexpired_record() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    // An expired record: its token is not adopted, but its refresh token is used.
    let elsewhere = endpoint.authenticate_elsewhere();
    store.put(&record_text("access-1", elsewhere.refresh_token().unwrap()), SECOND);
    advance(2 * SECOND).await;
    let process = endpoint.process(&store).build().unwrap();
    assert_eq!(process.token().await.unwrap().access_token(), "access-2");
    assert_eq!((endpoint.grants().refreshes, endpoint.grants().posts()), (1, 1));

    // A record that expires within a tenth of a second.
    store.put(&record_text("hardly", "def"), Duration::from_millis(50));
    let token = process.refresh(&process.current().unwrap()).await.unwrap();
    assert_ne!(token.access_token(), "hardly");

    // A record older than the process's own, for example from a promoted replica, is not adopted either.
    sleep(SECOND * 2).await;
    let stale = Record::new(1, record_text("stale", "def")).expires_in(MINUTE);
    store.change(|kept| kept.record = Some((stale, Instant::now())));
    let token = process.refresh(&token).await.unwrap();
    assert!(token.access_token().starts_with("access-"), "{}", token.access_token());

    // A newer record that has not expired is adopted.
    sleep(SECOND * 5).await;
    store.put(&record_text("newer", "def"), MINUTE);
    store.put(&record_text("newest", "def"), MINUTE);
    for _ in 0..100 {
        store.put(&record_text("newest", "def"), MINUTE);
    }
    let posts = endpoint.grants().posts();
    assert_eq!(process.refresh(&token).await.unwrap().access_token(), "newest");
    assert_eq!(endpoint.grants().posts(), posts);
}

/// The refresh token is rejected because another process has refreshed the token meanwhile.
#[tokio::test(start_paused = true)]
async fn rereads_store_before_key_grant() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    let process = endpoint.process(&store).build().unwrap();
    let token = process.token().await.unwrap();
    endpoint.authenticate_elsewhere();
    let refresh = tokio::spawn({
        let (process, token) = (process.clone(), token.clone());
        async move { process.refresh(&token).await.unwrap() }
    });
    // During the refresh.
    sleep(POST / 2).await;
    store.put(&record_text("access-2", "refresh-2"), MINUTE);
    assert_eq!(refresh.await.unwrap().access_token(), "access-2");
    let grants = endpoint.grants();
    assert_eq!((grants.rejected, grants.authentications), (1, 1));
}

/// The store is down at the start, when there is no token yet.
#[tokio::test(start_paused = true)]
async fn refreshes_without_store_then_publishes() {
    for health in [Health::Down, Health::Slow, Health::ReadOnly, Health::Forgetful] {
        let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
        store.set(health);
        let process = endpoint.process(&store).build().unwrap();
        let begun = Instant::now();
        assert_eq!(process.token().await.unwrap().access_token(), "access-1", "{health:?}");
        assert!(begun.elapsed() < 5 * SECOND, "{health:?}: {:?}", begun.elapsed());
        sleep(MINUTE / 2).await;
        assert!(store.kept().record.is_none(), "{health:?}");

        store.set(Health::Good);
        sleep(MINUTE + MINUTE / 2).await;
        assert_eq!(store.kept().published, 1, "{health:?}");
        let text = store.load().await.unwrap().unwrap().text().to_owned();
        assert_eq!(text, record_text("access-1", "refresh-1"), "{health:?}");
        // Nothing else is published or fetched.
        sleep(MINUTE).await;
        assert_eq!((store.kept().published, endpoint.grants().posts()), (1, 1), "{health:?}");
    }
}

/// The store is down while the token lives: an outage shorter than half of the time that refresh-ahead leaves costs
/// nothing, and a longer one fails no request.
#[tokio::test(start_paused = true)]
async fn live_token_waits_for_failing_store() {
    for health in [Health::Down, Health::Slow, Health::ReadOnly] {
        let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
        endpoint.change(|grants| grants.lifetime = Some(10 * MINUTE));
        let process = endpoint.process(&store).build().unwrap();
        process.token().await.unwrap();
        until_expiring(&process).await;
        store.set(health);
        for _ in 0..20 {
            assert_eq!(process.token().await.unwrap().access_token(), "access-1", "{health:?}");
            sleep(SECOND).await;
        }
        assert_eq!(endpoint.grants().posts(), 1, "{health:?}");
        let error = process.status().last_error.unwrap();
        let text = "no access token could be obtained: the token store cannot be used, and the current token still works: ";
        assert!(error.is_transient() && error.to_string().starts_with(text), "{error}");

        while process.current().unwrap().access_token() == "access-1" {
            process.token().await.unwrap();
            sleep(SECOND).await;
        }
        assert!(process.current().unwrap().remaining().unwrap() > 9 * MINUTE, "{health:?}");
        let grants = endpoint.grants();
        assert_eq!((grants.refreshes, grants.posts()), (1, 2), "{health:?}");
    }
}

/// The store is flushed.
#[tokio::test(start_paused = true)]
async fn flushed_store_costs_nothing() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    let (process, other) =
        (endpoint.process(&store).build().unwrap(), endpoint.process(&store).build().unwrap());
    process.token().await.unwrap();
    other.token().await.unwrap();
    store.flush();
    assert_eq!(refresh_when_expiring(&process).await.access_token(), "access-2");
    assert_eq!(refresh_when_expiring(&other).await.access_token(), "access-2");
    assert_eq!((endpoint.grants().refreshes, endpoint.grants().posts()), (1, 2));
}

/// The store contains garbage, or a record with another schema.
#[tokio::test(start_paused = true)]
async fn unreadable_record_is_replaced() {
    for text in [
        "",
        "garbage",
        "{}",
        r#"{"schema":0,"access_token":"canary"}"#,
        r#"{"schema":2,"access_token":"canary"}"#,
        r#"{"schema":1,"access_token":""}"#,
        "{\"schema\":1,\"access_token\":\"canary\\r\\n\"}",
        r#"{"schema":1,"access_token":"canary","refresh_token":""}"#,
    ] {
        let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
        store.put(text, MINUTE);
        let process = endpoint.process(&store).build().unwrap();
        assert_eq!(process.token().await.unwrap().access_token(), "access-1", "{text}");
        assert_eq!((store.kept().published, endpoint.grants().posts()), (1, 1), "{text}");
    }
}

/// A token cannot be stored.
#[tokio::test(start_paused = true)]
async fn unpublished_token_is_stored_later() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    let process = endpoint.process(&store).build().unwrap();
    let first = process.token().await.unwrap();
    store.set(Health::Forgetful);
    let second = process.refresh(&first).await.unwrap();
    assert_eq!((second.access_token(), store.kept().published), ("access-2", 1));
    store.set(Health::Good);
    sleep(MINUTE / 2).await;
    assert_eq!(store.load().await.unwrap().unwrap().text(), record_text("access-2", "refresh-2"));

    // The next refresh uses the published record.
    assert_eq!(refresh_when_expiring(&process).await.access_token(), "access-3");
    let grants = endpoint.grants();
    assert_eq!((grants.refreshes, grants.posts()), (2, 3));
}

/// A token cannot be stored, and another process has published a newer record meanwhile.
#[tokio::test(start_paused = true)]
async fn unpublished_token_yields_to_newer() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    let process = endpoint.process(&store).build().unwrap();
    let first = process.token().await.unwrap();
    store.set(Health::Down);
    process.refresh(&first).await.unwrap();
    store.put(&record_text("elsewhere", "def"), 10 * MINUTE);
    store.set(Health::Good);
    sleep(MINUTE / 2).await;
    assert_eq!(
        (store.kept().published, store.load().await.unwrap().unwrap().text().contains("elsewhere")),
        (1, true)
    );
    assert_eq!(refresh_when_expiring(&process).await.access_token(), "elsewhere");
}

/// The refresh times out while the new token is being stored.
#[tokio::test(start_paused = true)]
async fn timeout_while_storing_loses_no_token() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    let process = endpoint.process(&store).refresh_timeout(SECOND).build().unwrap();
    store.change(|kept| kept.publication_takes = MINUTE);
    assert!(matches!(process.token().await, Err(Error::TimedOut(_))));
    sleep(SECOND).await;
    assert_eq!(process.token().await.unwrap().access_token(), "access-1");
    assert_eq!(endpoint.grants().posts(), 1);
}

/// Another client authenticates with the same key.
#[tokio::test(start_paused = true)]
async fn key_use_elsewhere_costs_one_key_grant() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    let processes: Vec<_> = (0..8).map(|_| endpoint.process(&store).build().unwrap()).collect();
    for process in &processes {
        process.token().await.unwrap();
    }
    endpoint.authenticate_elsewhere();
    for process in &processes {
        assert_eq!(refresh_when_expiring(process).await.access_token(), "access-3");
    }
    let grants = endpoint.grants();
    assert_eq!((grants.refreshes, grants.rejected, grants.authentications), (0, 1, 2));
}

/// A publisher keeps readers, which have no credential, supplied with tokens.
#[tokio::test(start_paused = true)]
async fn publisher_keeps_readers_fresh() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    let reader = TokenProvider::reader(store.clone()).build().unwrap();
    let early = tokio::spawn({
        let reader = reader.clone();
        async move { reader.ready().await.unwrap() }
    });
    sleep(5 * SECOND).await;
    let _publisher = endpoint.process(&store).role(Role::Publisher).build().unwrap();
    assert_eq!(early.await.unwrap().access_token(), "access-1");

    let mut seen = Vec::new();
    for _ in 0..600 {
        let token = reader.token().await.unwrap();
        assert!(!token.remaining().unwrap().is_zero());
        // A reader keeps no refresh token.
        assert_eq!(token.refresh_token(), None);
        seen.push(token.access_token().to_owned());
        sleep(SECOND).await;
    }
    seen.dedup();
    assert!(seen.len() >= 10, "{seen:?}");
    let grants = endpoint.grants();
    assert_eq!((grants.authentications, grants.rejected), (1, 0));
    assert_eq!(reader.status().failed_refreshes, 0);
}

/// The token of a reader is challenged: it waits for the publisher's next one.
#[tokio::test(start_paused = true)]
async fn challenged_reader_awaits_publisher() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    store.put(&record_text("challenged", "def"), 10 * MINUTE);
    let retry = tower_bearer::RetryPolicy::new().max_retries(0);
    let reader = TokenProvider::reader(store.clone()).lease(5 * SECOND).retry(retry).build().unwrap();
    let challenged = reader.token().await.unwrap();
    let begun = Instant::now();
    let error = reader.refresh(&challenged).await.unwrap_err();
    assert!((4 * SECOND..=5 * SECOND).contains(&begun.elapsed()), "{:?}", begun.elapsed());
    let Error::Source(error) = error else { panic!("{error:?}") };
    assert_eq!(error.kind(), SourceErrorKind::Unavailable);
    // The token is kept: another endpoint may still accept it.
    assert_eq!(reader.current().unwrap().access_token(), "challenged");

    sleep(MINUTE).await;
    let waiting = tokio::spawn(async move { reader.refresh(&challenged).await.unwrap() });
    sleep(2 * SECOND).await;
    store.put(&record_text("renewed", "def"), MINUTE);
    assert_eq!(waiting.await.unwrap().access_token(), "renewed");
    assert_eq!((endpoint.grants().posts(), store.kept().leases), (0, 0));
}

/// The last handle of a provider with an unpublished token is dropped.
#[tokio::test(start_paused = true)]
async fn last_drop_stops_publication() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    store.set(Health::Down);
    let process = endpoint.process(&store).build().unwrap();
    process.token().await.unwrap();
    drop(process);
    store.set(Health::Good);
    sleep(10 * MINUTE).await;
    assert_eq!((store.kept().leases, store.kept().published), (0, 0));
}

/// An option of a shared token is out of its range.
#[test]
fn invalid_options_are_errors() {
    let store = MemoryStore::default;
    let builder = || TokenProvider::builder(Endpoint::default());
    for (name, built) in [
        ("a publisher without a store", builder().role(Role::Publisher).build()),
        ("a reader without a store", builder().role(Role::Reader).build()),
        ("a short lease", builder().store(store()).lease(Duration::from_millis(99)).build()),
        ("a long lease", builder().store(store()).lease(61 * MINUTE).build()),
    ] {
        assert!(matches!(built, Err(Error::InvalidOption(_))), "{name}");
    }
    for role in [Role::Member, Role::Publisher] {
        let built = TokenProvider::reader(store()).role(role).build();
        assert!(matches!(built, Err(Error::Source(_))), "{role:?} without a credential");
    }
    for id in ["", "a b", "a:b", "ä", &"a".repeat(65)] {
        assert!(EncryptionKeys::new(id, &[0; 32]).is_err(), "{id}");
    }
    for id in ["a", "a b"] {
        let keys = EncryptionKeys::new("a", &[0; 32]).unwrap().and_open_with(id, &[1; 32]);
        let built = builder().store(EncryptedStore::new(store(), keys)).build();
        assert!(matches!(built, Err(Error::InvalidOption(_))), "{id}");
    }
}

fn keys(seals: u8) -> EncryptionKeys {
    EncryptionKeys::new(format!("key-{seals}"), &[seals; 32]).unwrap()
}

/// The same store under another namespace.
struct Elsewhere(MemoryStore);

impl TokenStore for Elsewhere {
    fn namespace(&self) -> &str {
        "elsewhere"
    }

    fn load(&self) -> impl Future<Output = Result<Option<Record>, StoreError>> + Send {
        self.0.load()
    }

    fn lease(&self, length: Duration) -> impl Future<Output = Result<Option<Lease>, StoreError>> + Send {
        self.0.lease(length)
    }

    fn publish(
        &self,
        lease: &Lease,
        record: Record,
    ) -> impl Future<Output = Result<Publication, StoreError>> + Send {
        self.0.publish(lease, record)
    }

    fn release(&self, lease: Lease) -> impl Future<Output = Result<(), StoreError>> + Send {
        self.0.release(lease)
    }
}

/// Loads the record and returns its decrypted text.
async fn decrypted(store: impl TokenStore) -> Result<String, StoreError> {
    store.load().await.map(|record| record.unwrap().text().to_owned())
}

/// An encrypted record has another key, or is in another place.
#[tokio::test(start_paused = true)]
async fn record_opens_only_with_key_in_place() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    let build = |keys| {
        let store = EncryptedStore::new(store.clone(), keys);
        TokenProvider::builder(endpoint.clone()).store(store).build().unwrap()
    };
    build(keys(1)).token().await.unwrap();
    assert_eq!(build(keys(1)).token().await.unwrap().access_token(), "access-1");

    let sealed = store.load().await.unwrap().unwrap();
    assert!(!sealed.text().contains("access"), "{}", sealed.text());
    assert!(decrypted(EncryptedStore::new(store.clone(), keys(1))).await.unwrap().contains("access-1"));
    let same_id = EncryptionKeys::new("key-1", &[9; 32]).unwrap();
    for (case, result) in [
        ("another key", decrypted(EncryptedStore::new(store.clone(), keys(2))).await),
        ("another key of the same id", decrypted(EncryptedStore::new(store.clone(), same_id)).await),
        ("another namespace", decrypted(EncryptedStore::new(Elsewhere(store.clone()), keys(1))).await),
    ] {
        assert_eq!(result.unwrap_err().kind(), StoreErrorKind::InvalidRecord, "{case}");
    }
    let text = sealed.text().to_owned();
    let changed = |at: usize| {
        let other = if text.as_bytes()[at] == b'A' { "B" } else { "A" };
        format!("{}{other}{}", &text[..at], &text[at + 1..])
    };
    let version = sealed.version();
    for (case, version, text) in [
        ("another version", version + 1, text.clone()),
        ("another nonce", version, changed(20)),
        ("another token", version, changed(text.len() / 2)),
        ("another format", version, changed(0)),
        ("another id", version, changed(9)),
        ("a part of it", version, text[..40].to_owned()),
        ("in the clear", version, record_text("canary", "canary")),
    ] {
        store.change(|kept| kept.record = Some((Record::new(version, text), Instant::now())));
        let error = decrypted(EncryptedStore::new(store.clone(), keys(1))).await.expect_err(case);
        assert_eq!(error.kind(), StoreErrorKind::InvalidRecord, "{case}: {error:?}");
        assert!(!format!("{error}{error:?}").contains("canary"), "{case}: {error:?}");
    }
    // A process that cannot decrypt the record ignores it, and replaces it with its own.
    assert_eq!(build(keys(1)).token().await.unwrap().access_token(), "access-2");
    assert!(decrypted(EncryptedStore::new(store.clone(), keys(1))).await.unwrap().contains("access-2"));
}

/// The encryption keys are rotated in one process after the other.
#[tokio::test(start_paused = true)]
async fn rotating_keys_costs_no_authentication() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    let build = |keys| {
        let store = EncryptedStore::new(store.clone(), keys);
        TokenProvider::builder(endpoint.clone()).store(store).build().unwrap()
    };
    let both = |seals: u8, opens: u8| keys(seals).and_open_with(format!("key-{opens}"), &[opens; 32]);
    let token = build(both(1, 2)).token().await.unwrap();
    let process = build(both(2, 1));
    assert_eq!(process.token().await.unwrap().access_token(), token.access_token());
    process.refresh(&process.current().unwrap()).await.unwrap();
    assert_eq!(build(both(1, 2)).token().await.unwrap().access_token(), "access-2");
    assert_eq!(build(keys(2)).token().await.unwrap().access_token(), "access-2");
    let grants = endpoint.grants();
    assert_eq!((grants.refreshes, grants.authentications), (1, 1));
    assert_eq!(format!("{:?}", both(2, 1)), r#"["key-2", "key-1"]"#);
}

/// A caller joins a background refresh that is not urgent, after a challenge.
#[tokio::test(start_paused = true)]
async fn challenge_makes_refresh_urgent() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    let process = endpoint.process(&store).build().unwrap();
    let token = process.token().await.unwrap();
    until_expiring(&process).await;
    store.set(Health::Down);
    // A background refresh has time to wait for the store …
    process.token().await.unwrap();
    sleep(POST / 10).await;
    assert!(process.status().refreshing && process.status().last_error.is_some());
    assert_eq!(endpoint.grants().posts(), 1);
    // … until the API challenges the current token.
    let next = process.refresh(&token).await.unwrap();
    assert_eq!((next.access_token(), process.status().refreshes), ("access-2", 2));
}

/// The token of an abandoned refresh arrives late, and there is a newer one.
#[test]
fn late_token_replaces_no_newer_one() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    let millis = Duration::from_millis;
    let provider = endpoint.process(&store).refresh_timeout(SECOND).lease(millis(300)).build().unwrap();
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (stalled, live) = (runtime(), runtime());
    // The token is granted, but the runtime stalls before the response arrives.
    let first = stalled.block_on(async {
        let token = provider.token().await.unwrap();
        endpoint.change(|grants| grants.delays.push_back(millis(300)));
        let mut refresh = std::pin::pin!(provider.refresh(&token));
        while endpoint.grants().posts() < 2 {
            let _ = tokio::time::timeout(millis(1), &mut refresh).await;
        }
        token.clone()
    });
    let newer = live.block_on(async {
        assert!(provider.refresh(&first).await.is_err());
        provider.refresh(&first).await.unwrap()
    });
    // The late refresh stalls again while it publishes.
    store.set(Health::Slow);
    stalled.block_on(async { sleep(millis(50)).await });
    store.set(Health::Good);
    assert_eq!(provider.current().unwrap().access_token(), newer.access_token());
    let next = live.block_on(async {
        sleep(millis(1100)).await;
        provider.refresh(&newer).await.unwrap()
    });
    assert_eq!((newer.access_token(), next.access_token()), ("access-3", "access-4"));
}

/// A process that adopts the tokens of another does not have to write. It checks whether it could.
#[tokio::test(start_paused = true)]
async fn adoption_ends_an_outage() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    let process = endpoint.process(&store).build().unwrap();
    process.token().await.unwrap();
    until_expiring(&process).await;
    store.set(Health::ReadOnly);
    process.token().await.unwrap();
    until_idle(&process).await;
    assert!(!process.status().store.unwrap().is_usable());

    // It is still read-only when another process has stored a token; later it is not.
    for (health, is_usable) in [(Health::ReadOnly, false), (Health::Good, true)] {
        store.set(health);
        let elsewhere = format!("elsewhere-{health:?}");
        // Newer than each record of the process itself.
        let version = store.kept().record.unwrap().0.version() + 1000;
        let record = Record::new(version, record_text(&elsewhere, "def")).expires_in(MINUTE);
        store.change(|kept| kept.record = Some((record, Instant::now())));
        sleep(SECOND).await;
        let token = process.refresh(&process.current().unwrap()).await.unwrap();
        assert_eq!((token.access_token(), endpoint.grants().posts()), (&*elsewhere, 1));
        sleep(SECOND).await;
        assert_eq!(process.status().store.unwrap().is_usable(), is_usable, "{health:?}");
    }
}

/// The store fails while the source is asked: each operation counts.
#[tokio::test(start_paused = true)]
async fn failed_extension_is_an_outage() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    endpoint.change(|grants| grants.takes = Some(9 * SECOND));
    let process = endpoint.process(&store).lease(3 * SECOND).build().unwrap();
    tokio::spawn({
        let process = process.clone();
        async move { process.token().await }
    });
    sleep(SECOND / 2).await;
    store.set(Health::Down);
    sleep(SECOND).await;
    assert!(!process.status().store.unwrap().is_usable());
    store.set(Health::Good);
    sleep(SECOND).await;
    assert!(process.status().refreshing && process.status().store.unwrap().is_usable());
}

/// A store that is set up wrongly ends `ready` at once, whether or not there is a token.
#[tokio::test(start_paused = true)]
async fn ready_gives_up_wrong_store() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    store.set(Health::Misconfigured);
    for process in [endpoint.process(&store).build(), TokenProvider::reader(store.clone()).build()] {
        let begun = Instant::now();
        let error = process.unwrap().ready().await.unwrap_err();
        assert!(matches!(error, Error::Store(_)) && !error.is_transient(), "{error:?}");
        assert_eq!(error.to_string(), "the token store cannot be used: the password is wrong");
        assert!(begun.elapsed() < 2 * SECOND, "{:?}", begun.elapsed());
    }
}

/// A store whose operations hang is given up when the time is over, not two seconds later.
#[tokio::test(start_paused = true)]
async fn slow_check_ends_with_ready() {
    let store = MemoryStore::default();
    store.set(Health::Slow);
    let process = Endpoint::default().process(&store).refresh_timeout(3 * SECOND).build().unwrap();
    let begun = Instant::now();
    let error = process.ready().await.unwrap_err();
    assert!(error.to_string().ends_with("did not respond within 2s"), "{error}");
    assert!(begun.elapsed() <= 3 * SECOND, "{:?}", begun.elapsed());
}

/// The error of a store has the reason in its own text, and the cause once in its chain.
#[tokio::test(start_paused = true)]
async fn store_error_has_cause_once() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    let process = endpoint.process(&store).refresh_timeout(SECOND).build().unwrap();
    process.token().await.unwrap();
    until_expiring(&process).await;
    store.set(Health::Down);
    process.token().await.unwrap();
    until_idle(&process).await;
    let without = "no access token could be obtained: the token store cannot be used";
    for (error, text) in [
        (process.ready().await.unwrap_err(), "the token store cannot be used"),
        (process.status().last_error.unwrap(), &format!("{without}, and the current token still works")),
        (TokenProvider::reader(store).build().unwrap().token().await.unwrap_err(), without),
    ] {
        assert_eq!(error.to_string(), format!("{text}: the store is down"));
        assert_eq!(support::chain(&error), format!("{text}: the store is down: connection refused"));
    }
}

/// A restart with another account's key, or in another environment, does not use the token of the first; nor does a key
/// that replaces another one present its refresh token.
#[tokio::test(start_paused = true)]
async fn record_of_another_key_is_not_adopted() {
    use std::sync::{Arc, Mutex};

    use tower_bearer::{ApiVideo, TokenClient};

    let asked = Arc::<Mutex<Vec<String>>>::default();
    let auth = tower::service_fn({
        let asked = Arc::clone(&asked);
        move |request: http::Request<String>| {
            let secret = request.body().split('"').nth(3).unwrap().to_owned();
            asked.lock().unwrap().push(secret.clone());
            let body = format!(
                r#"{{"access_token":"of-{secret}","refresh_token":"{secret}-next","expires_in":3600}}"#
            );
            async move {
                Ok::<_, tower_bearer::BoxError>(http::Response::new(
                    http_body_util::Full::<bytes::Bytes>::from(body),
                ))
            }
        }
    });
    let client = TokenClient::with_service(auth);
    let store = MemoryStore::default();
    let process = |source: ApiVideo| {
        let builder = TokenProvider::builder(source.with_client(client.clone()));
        builder.store(store.clone()).build().unwrap()
    };
    let first = process(ApiVideo::new("key-1"));
    assert_eq!(first.token().await.unwrap().access_token(), "of-key-1");
    assert_eq!(process(ApiVideo::new("key-1")).token().await.unwrap().access_token(), "of-key-1");
    assert_eq!(process(ApiVideo::new("key-2")).token().await.unwrap().access_token(), "of-key-2");
    assert_eq!(process(ApiVideo::sandbox("key-2")).token().await.unwrap().access_token(), "of-key-2");
    assert_eq!(*asked.lock().unwrap(), ["key-1", "key-2", "key-2"]);

    // With and without a store.
    let source = ApiVideo::new("key-3").with_client(client.clone());
    for process in [process(source.clone()), TokenProvider::new(source.clone())] {
        source.set_key("key-3");
        process.token().await.unwrap();
        asked.lock().unwrap().clear();
        source.set_key("key-4");
        advance(MINUTE * 60).await;
        assert_eq!(process.token().await.unwrap().access_token(), "of-key-4");
        advance(MINUTE * 60).await;
        assert_eq!(process.token().await.unwrap().access_token(), "of-key-4-next");
        assert_eq!(*asked.lock().unwrap(), ["key-4", "key-4-next"]);
    }
}
