//! Processes that share a store share one token: the protocol of `TokenStore`, with the clock paused.

#[path = "support/fleet.rs"]
mod fleet;

use std::time::Duration;

use fleet::{Endpoint, Health, MINUTE, MemoryStore, POST, Stop, record_text};
use tokio::time::{Instant, advance, sleep};
use tower_bearer::{
    Error, Freshness, SourceErrorKind, Token, TokenProvider,
    store::{
        EncryptedStore, EncryptionKeys, Lease, Publication, Record, Role, StoreError, StoreErrorKind,
        TokenStore,
    },
};

const SECOND: Duration = Duration::from_secs(1);

/// Long enough for the jitter of any token's ageing.
async fn until_expiring(provider: &TokenProvider) {
    while provider.status().freshness == Freshness::Fresh {
        sleep(SECOND / 10).await;
    }
}

/// Has the ageing token renewed, and waits for the refresh's end.
async fn renew(provider: &TokenProvider) -> Token {
    until_expiring(provider).await;
    provider.token().await.unwrap();
    at_rest(provider).await;
    provider.current().unwrap()
}

async fn at_rest(provider: &TokenProvider) {
    while provider.status().refreshing {
        sleep(Duration::from_millis(10)).await;
    }
}

/// Row 54.
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
        // All of them send requests all the time.
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
            at_rest(process).await;
            let current = process.current().unwrap();
            assert_eq!(current.access_token(), format!("access-{}", expiry + 1));
        }
        let grants = endpoint.grants();
        assert_eq!((grants.refreshes, grants.posts()), (expiry, expiry + 1));
    }
}

/// Row 54: what was read before the lease was taken may have been renewed since.
#[tokio::test(start_paused = true)]
async fn reads_record_again_under_lease() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    store.change(|kept| {
        kept.before_lease = Some(Record::new(7, record_text("elsewhere", "def")).expires_in(MINUTE))
    });
    let token = endpoint.process(&store).build().unwrap().token().await.unwrap();
    assert_eq!((token.access_token(), endpoint.grants().posts()), ("elsewhere", 0));
    // And the lease was given back.
    assert!(store.lease(SECOND).await.unwrap().is_some());
}

/// Row 54: 200 requests refused at once, in each of four processes.
#[tokio::test(start_paused = true)]
async fn fleet_renews_challenged_token_once() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    let processes: Vec<_> = (0..4).map(|_| endpoint.process(&store).build().unwrap()).collect();
    let mut refused = Vec::new();
    for process in &processes {
        let token = process.token().await.unwrap();
        for _ in 0..200 {
            let (process, token) = (process.clone(), token.clone());
            refused.push(tokio::spawn(async move { process.refresh(&token).await.unwrap() }));
        }
    }
    for refresh in refused {
        assert_eq!(refresh.await.unwrap().access_token(), "access-2");
    }
    assert_eq!(endpoint.grants().posts(), 2);
}

/// Row 55.
#[tokio::test(start_paused = true)]
async fn death_before_post_costs_one_lease() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    let _never_released = store.lease(10 * SECOND).await.unwrap().unwrap();
    let begun = Instant::now();
    let token = endpoint.process(&store).build().unwrap().token().await.unwrap();
    assert_eq!(token.access_token(), "access-1");
    assert!((10 * SECOND..11 * SECOND).contains(&begun.elapsed()), "{:?}", begun.elapsed());
    assert_eq!(endpoint.grants().posts(), 1);
}

/// Row 55.
#[tokio::test(start_paused = true)]
async fn death_after_post_costs_one_key_grant() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    let process = endpoint.process(&store).build().unwrap();
    let token = process.token().await.unwrap();
    // Another spends the refresh token, and dies with the answer.
    let _never_released = store.lease(10 * SECOND).await.unwrap().unwrap();
    endpoint.authenticate_elsewhere();
    let next = process.refresh(&token).await.unwrap();
    assert_eq!(next.access_token(), "access-3");
    let grants = endpoint.grants();
    assert_eq!((grants.refreshes, grants.refused, grants.authentications), (0, 1, 2));
    assert_eq!(store.kept().published, 2);
}

/// Row 55.
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
    // Its POST has been acted upon: the refresh token is spent.
    let token = other.refresh(&other.current().unwrap()).await.unwrap();
    assert_eq!(token.access_token(), "access-3");
    assert_eq!(refresh.await.unwrap().access_token(), "access-3");
    assert_eq!((store.kept().published, store.kept().superseded), (2, 1));
    let grants = endpoint.grants();
    assert_eq!((grants.refreshes, grants.refused, grants.authentications), (1, 1, 2));
}

/// Row 69: an exchange of 5 s under leases of 2 s.
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
        assert_eq!((grants.refreshes, grants.refused, grants.authentications), (expiry, 0, 1));
        sleep(2 * MINUTE).await;
    }
    assert_eq!(endpoint.grants().presented_twice, 0);
}

/// Row 69: a refresh token that is refused, and then the credential: 8 s under a lease of 2 s.
#[tokio::test(start_paused = true)]
async fn a_lease_is_extended_for_both_exchanges() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    let build = || endpoint.process(&store).lease(2 * SECOND).build().unwrap();
    let (process, other) = (build(), build());
    let (first, same) = (process.token().await.unwrap(), other.token().await.unwrap());
    endpoint.authenticate_elsewhere();
    endpoint.change(|grants| grants.takes = Some(4 * SECOND));
    let (renewed, adopted) = tokio::join!(process.refresh(&first), other.refresh(&same));
    assert_eq!(renewed.unwrap().access_token(), adopted.unwrap().access_token());
    let grants = endpoint.grants();
    assert_eq!((grants.refreshes, grants.refused, grants.authentications), (0, 1, 2));
}

/// Row 69.
#[tokio::test(start_paused = true)]
async fn death_after_extension_costs_one_lease() {
    let (endpoint, store, stop) = (Endpoint::default(), MemoryStore::default(), Stop::default());
    endpoint.change(|grants| grants.takes = Some(9 * SECOND));
    let holder = endpoint.process_with(&store, &stop).lease(3 * SECOND).build().unwrap();
    tokio::spawn(async move { holder.token().await });
    sleep(5 * SECOND + SECOND / 2).await;
    // The lease was extended half a second ago, and is not extended any more.
    assert_eq!(store.kept().extended, 5);
    stop.stop_for(60 * MINUTE);
    endpoint.change(|grants| grants.takes = None);
    let died = Instant::now();
    endpoint.process(&store).lease(3 * SECOND).build().unwrap().token().await.unwrap();
    assert!((2 * SECOND..=3 * SECOND + SECOND / 2).contains(&died.elapsed()), "{:?}", died.elapsed());
}

/// Row 69: as before there were extensions.
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
    assert_eq!((grants.refreshes, grants.refused, grants.presented_twice), (1, 1, 1));
    assert_eq!((store.kept().superseded, store.kept().extended, store.kept().not_extended), (1, 0, 0));
}

/// Row 69: one that was stopped for longer than its lease goes on, and the newer lease is not its to extend.
#[tokio::test(start_paused = true)]
async fn a_superseded_lease_is_not_extended() {
    let (endpoint, store, stop) = (Endpoint::default(), MemoryStore::default(), Stop::default());
    endpoint.change(|grants| grants.takes = Some(20 * SECOND));
    let stopped = endpoint.process_with(&store, &stop).lease(3 * SECOND).build().unwrap();
    stop.stop_for(4 * SECOND + SECOND / 2);
    let stopped = tokio::spawn(async move { stopped.token().await.unwrap() });
    sleep(SECOND * 7 / 2).await;
    // Nobody extends this one.
    let newer = store.lease(5 * SECOND).await.unwrap().unwrap();
    sleep(6 * SECOND).await;
    assert_eq!((store.kept().extended, store.kept().not_extended), (0, 1));
    assert!(store.lease(MINUTE).await.unwrap().unwrap().fence() > newer.fence());
    stopped.await.unwrap();
    assert_eq!(store.kept().not_extended, 1);
}

/// Row 69: within a lease of 6 s there is time for another attempt.
#[tokio::test(start_paused = true)]
async fn an_extension_that_fails_is_tried_again() {
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

/// Row 55: the time between the lease and the POST counts.
#[tokio::test(start_paused = true)]
async fn nearly_expired_lease_is_not_used() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    store.change(|kept| kept.lease_takes.push_back(SECOND + SECOND / 10));
    let process = endpoint.process(&store).lease(2 * SECOND).build().unwrap();
    process.token().await.unwrap();
    assert_eq!((store.kept().leases, endpoint.grants().posts()), (2, 1));
}

/// Row 60, and a store whose leases never end: nobody waits for ever.
#[tokio::test(start_paused = true)]
async fn lease_wait_times_out() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    let _never_released = store.lease(60 * MINUTE).await.unwrap().unwrap();
    let process = endpoint.process(&store).lease(2 * SECOND).build().unwrap();
    let begun = Instant::now();
    assert_eq!(process.token().await.unwrap().access_token(), "access-1");
    assert!((10 * SECOND..12 * SECOND).contains(&begun.elapsed()), "{:?}", begun.elapsed());

    // One that is so slow that nothing is ever left of its leases.
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    store.change(|kept| kept.lease_takes.extend([SECOND + SECOND / 2; 100]));
    let process = endpoint.process(&store).lease(2 * SECOND).build().unwrap();
    assert_eq!(process.token().await.unwrap().access_token(), "access-1");
    assert_eq!(endpoint.grants().posts(), 1);
}

/// Row 56.
#[tokio::test(start_paused = true)]
async fn adopts_only_newer_unexpired_record() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    // Expired: not adopted, but its refresh token is the one to spend.
    let elsewhere = endpoint.authenticate_elsewhere();
    store.put(&record_text("access-1", elsewhere.refresh_token().unwrap()), SECOND);
    advance(2 * SECOND).await;
    let process = endpoint.process(&store).build().unwrap();
    assert_eq!(process.token().await.unwrap().access_token(), "access-2");
    assert_eq!((endpoint.grants().refreshes, endpoint.grants().posts()), (1, 1));

    // As good as expired.
    store.put(&record_text("hardly", "def"), Duration::from_millis(50));
    let token = process.refresh(&process.current().unwrap()).await.unwrap();
    assert_ne!(token.access_token(), "hardly");

    // Older than its own, such as of a replica that was promoted: not adopted either.
    sleep(SECOND * 2).await;
    let stale = Record::new(1, record_text("stale", "def")).expires_in(MINUTE);
    store.change(|kept| kept.record = Some((stale, Instant::now())));
    let token = process.refresh(&token).await.unwrap();
    assert!(token.access_token().starts_with("access-"), "{}", token.access_token());

    // Newer, and good.
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

/// Row 28: the refresh token was refused because another has renewed the token meanwhile.
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
    // While the refresh is under way.
    sleep(POST / 2).await;
    store.put(&record_text("access-2", "refresh-2"), MINUTE);
    assert_eq!(refresh.await.unwrap().access_token(), "access-2");
    let grants = endpoint.grants();
    assert_eq!((grants.refused, grants.authentications), (1, 1));
}

/// Row 57: at the start, when nobody can wait.
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
        // Nothing is left to do.
        sleep(MINUTE).await;
        assert_eq!((store.kept().published, endpoint.grants().posts()), (1, 1), "{health:?}");
    }
}

/// Row 57: an outage that ends before half of the time ahead is over costs nothing; a longer one costs no request.
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
        assert!(error.is_transient() && error.to_string() == "no access token could be obtained");

        while process.current().unwrap().access_token() == "access-1" {
            process.token().await.unwrap();
            sleep(SECOND).await;
        }
        assert!(process.current().unwrap().remaining().unwrap() > 9 * MINUTE, "{health:?}");
        let grants = endpoint.grants();
        assert_eq!((grants.refreshes, grants.posts()), (1, 2), "{health:?}");
    }
}

/// Row 57.
#[tokio::test(start_paused = true)]
async fn flushed_store_costs_nothing() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    let (process, other) =
        (endpoint.process(&store).build().unwrap(), endpoint.process(&store).build().unwrap());
    process.token().await.unwrap();
    other.token().await.unwrap();
    store.flush();
    assert_eq!(renew(&process).await.access_token(), "access-2");
    assert_eq!(renew(&other).await.access_token(), "access-2");
    assert_eq!((endpoint.grants().refreshes, endpoint.grants().posts()), (1, 2));
}

/// Row 57: garbage, and schemas of other times.
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

/// Row 58.
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

    // And the next renewal goes on from there.
    assert_eq!(renew(&process).await.access_token(), "access-3");
    let grants = endpoint.grants();
    assert_eq!((grants.refreshes, grants.posts()), (2, 3));
}

/// Row 58: what another has published meanwhile is newer.
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
    assert_eq!(renew(&process).await.access_token(), "elsewhere");
}

/// Row 58: the refresh's time is up while the store takes its time over the new token.
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

/// Row 59.
#[tokio::test(start_paused = true)]
async fn key_use_elsewhere_costs_one_key_grant() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    let processes: Vec<_> = (0..8).map(|_| endpoint.process(&store).build().unwrap()).collect();
    for process in &processes {
        process.token().await.unwrap();
    }
    endpoint.authenticate_elsewhere();
    for process in &processes {
        assert_eq!(renew(process).await.access_token(), "access-3");
    }
    let grants = endpoint.grants();
    assert_eq!((grants.refreshes, grants.refused, grants.authentications), (0, 1, 2));
}

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
        // What it has no use for it does not keep.
        assert_eq!(token.refresh_token(), None);
        seen.push(token.access_token().to_owned());
        sleep(SECOND).await;
    }
    seen.dedup();
    assert!(seen.len() >= 10, "{seen:?}");
    let grants = endpoint.grants();
    assert_eq!((grants.authentications, grants.refused), (1, 0));
    assert_eq!(reader.status().failed_refreshes, 0);
}

#[tokio::test(start_paused = true)]
async fn challenged_reader_awaits_publisher() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    store.put(&record_text("refused", "def"), 10 * MINUTE);
    let retry = tower_bearer::RetryPolicy::new().max_retries(0);
    let reader = TokenProvider::reader(store.clone()).lease(5 * SECOND).retry(retry).build().unwrap();
    let refused = reader.token().await.unwrap();
    let begun = Instant::now();
    let error = reader.refresh(&refused).await.unwrap_err();
    assert!((4 * SECOND..=5 * SECOND).contains(&begun.elapsed()), "{:?}", begun.elapsed());
    let Error::Source(error) = error else { panic!("{error:?}") };
    assert_eq!(error.kind(), SourceErrorKind::Unavailable);
    // The token is still there: it may be of use elsewhere.
    assert_eq!(reader.current().unwrap().access_token(), "refused");

    sleep(MINUTE).await;
    let waiting = tokio::spawn(async move { reader.refresh(&refused).await.unwrap() });
    sleep(2 * SECOND).await;
    store.put(&record_text("renewed", "def"), MINUTE);
    assert_eq!(waiting.await.unwrap().access_token(), "renewed");
    assert_eq!((endpoint.grants().posts(), store.kept().leases), (0, 0));
}

/// Row 53: what is left to publish does not keep a provider alive.
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

#[test]
fn senseless_options_are_errors() {
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

/// A namespace of its own over the same store.
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

/// What `store` makes of what is there.
async fn opened(store: impl TokenStore) -> Result<String, StoreError> {
    store.load().await.map(|record| record.unwrap().text().to_owned())
}

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
    assert!(opened(EncryptedStore::new(store.clone(), keys(1))).await.unwrap().contains("access-1"));
    let same_id = EncryptionKeys::new("key-1", &[9; 32]).unwrap();
    for (case, opened) in [
        ("another key", opened(EncryptedStore::new(store.clone(), keys(2))).await),
        ("another key of the same id", opened(EncryptedStore::new(store.clone(), same_id)).await),
        ("another namespace", opened(EncryptedStore::new(Elsewhere(store.clone()), keys(1))).await),
    ] {
        assert_eq!(opened.unwrap_err().kind(), StoreErrorKind::InvalidRecord, "{case}");
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
        let error = opened(EncryptedStore::new(store.clone(), keys(1))).await.expect_err(case);
        assert_eq!(error.kind(), StoreErrorKind::InvalidRecord, "{case}: {error:?}");
        assert!(!format!("{error}{error:?}").contains("canary"), "{case}: {error:?}");
    }
    // Whoever cannot open it goes on as if there were none, and puts a record there that it can.
    assert_eq!(build(keys(1)).token().await.unwrap().access_token(), "access-2");
    assert!(opened(EncryptedStore::new(store.clone(), keys(1))).await.unwrap().contains("access-2"));
}

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

/// Row 70.
#[tokio::test(start_paused = true)]
async fn challenge_makes_refresh_urgent() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    let process = endpoint.process(&store).build().unwrap();
    let token = process.token().await.unwrap();
    until_expiring(&process).await;
    store.set(Health::Down);
    // In the background, there is time to wait for the store …
    process.token().await.unwrap();
    sleep(POST / 10).await;
    assert!(process.status().refreshing && process.status().last_error.is_some());
    assert_eq!(endpoint.grants().posts(), 1);
    // … until the API refuses the token that is there.
    let next = process.refresh(&token).await.unwrap();
    assert_eq!((next.access_token(), process.status().refreshes), ("access-2", 2));
}

/// Row 65: an abandoned refresh whose token was superseded leaves it to nobody.
#[test]
fn late_token_replaces_no_newer_one() {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    let millis = Duration::from_millis;
    let provider = endpoint.process(&store).refresh_timeout(SECOND).lease(millis(300)).build().unwrap();
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (stalled, live) = (runtime(), runtime());
    // Granted, and the answer is still on its way when the runtime stalls.
    let first = stalled.block_on(async {
        let token = provider.token().await.unwrap();
        endpoint.change(|grants| grants.delays.push_back(millis(100)));
        let _ = tokio::time::timeout(millis(250), provider.refresh(&token)).await;
        token
    });
    let newer = live.block_on(async {
        assert!(provider.refresh(&first).await.is_err());
        provider.refresh(&first).await.unwrap()
    });
    // The late refresh is cut off while it publishes.
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
