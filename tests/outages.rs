//! What an outage writes to the log: a few lines, however long it lasts, with the count of what they stand for.
#![cfg(all(feature = "api-video", feature = "tracing"))]

#[path = "support/fleet.rs"]
mod fleet;
#[path = "support/log.rs"]
mod log;
mod support;

use std::{sync::Arc, time::Duration};

use http::StatusCode;
use log::{Logged, Record};
use support::{Act, Api, Source, get};
use tokio::time::{advance, sleep};
use tower::{Layer, ServiceExt};
use tower_bearer::{BearerAuthLayer, Error, Freshness, SourceError, TokenProvider};
use tracing::Level;

const HOUR: Duration = Duration::from_secs(3600);
const SECOND: Duration = Duration::from_secs(1);

/// The lines that an operator sees.
fn lines(record: &Record) -> Vec<Logged> {
    let mut events = record.events();
    events.retain(|event| event.level <= Level::INFO);
    events
}

fn levels_and_messages(record: &Record) -> Vec<String> {
    lines(record).iter().map(|event| format!("{} {}", event.level, event.message)).collect()
}

fn down() -> Act {
    Act::Fail(SourceError::unavailable("the auth endpoint is down"))
}

/// Row 74.
#[tokio::test(start_paused = true)]
async fn constant_401_is_a_line_per_pause() {
    let api = Api::default();
    let source = Source::living(HOUR);
    let provider = TokenProvider::new(Arc::clone(&source));
    let service = BearerAuthLayer::with_provider(provider.clone()).layer(api.service());
    let (record, _guard) = Record::start();
    for round in 0..2 {
        let requests = (0..100).map(|_| service.clone().oneshot(get()));
        for response in futures_util::future::join_all(requests).await {
            assert_eq!(response.unwrap().status(), StatusCode::UNAUTHORIZED);
        }
        let left_alone = "newest token challenged; not asking the source";
        let warnings: Vec<_> =
            lines(&record).into_iter().filter(|event| event.message == left_alone).collect();
        assert_eq!(warnings.len(), round + 1, "{:?}", levels_and_messages(&record));
        let debug = record.events().into_iter().filter(|event| event.message == left_alone).count();
        assert!(debug > 50 * (round + 1), "{debug}");
        // The next line has the number of those that it follows.
        let repeated = debug - warnings.len();
        assert!(warnings[round].fields["repeated"].parse::<usize>().unwrap() <= repeated);
        assert_eq!(warnings[round].fields["repeated"] != "0", round > 0);
        advance(SECOND * 5).await;
    }
    // The first token, and one refresh for each of the two pauses.
    assert_eq!((provider.status().refreshes, source.fetches()), (3, 3));
}

/// Row 75.
#[tokio::test(start_paused = true)]
async fn retry_after_is_one_refresh() {
    let error = SourceError::unavailable("HTTP 429").with_retry_after(SECOND * 60);
    let source = Source::living(HOUR).then(Act::Fail(error));
    let provider = TokenProvider::new(Arc::clone(&source));
    let service = BearerAuthLayer::with_provider(provider.clone()).layer(Api::default().service());
    let (record, _guard) = Record::start();
    for _ in 0..200 {
        let error = service.clone().oneshot(get()).await.unwrap_err();
        assert_eq!(error.to_string(), "no access token could be obtained: HTTP 429");
    }
    let status = provider.status();
    assert_eq!((source.fetches(), status.refreshes, status.failed_refreshes), (1, 1, 1));
    let seen = levels_and_messages(&record);
    assert_eq!(seen.len(), 3, "{seen:#?}");
    assert!(seen[0].starts_with("WARN refresh failed (attempt 1 of 3), next try in 60"), "{seen:#?}");
    assert_eq!(
        seen[1..],
        ["WARN token refresh failed; no token is available", "ERROR request failed; no token is available"]
    );

    // Half of the delay later, a refresh can wait for the rest of it.
    advance(SECOND * 35).await;
    assert_eq!(provider.token().await.unwrap().generation(), 1);
    let recovered = record.one("token refresh recovered");
    assert_eq!((&*recovered.fields["failed_refreshes"], &*recovered.fields["failed_requests"]), ("1", "200"));
    assert_eq!(provider.status().refreshes, 2);
}

/// Row 76.
#[tokio::test(start_paused = true)]
async fn level_follows_impact_on_callers() {
    let api = Api::default();
    (1..100).for_each(|number| api.accept(&format!("access-{number}")));
    let source = Source::living(HOUR);
    let provider = TokenProvider::new(Arc::clone(&source));
    let service = BearerAuthLayer::with_provider(provider.clone()).layer(api.service());
    provider.token().await.unwrap();
    let (record, _guard) = Record::start();

    // The auth endpoint is down from three minutes before the expiry to an hour after it.
    (0..10_000).for_each(|_| source.next(down()));
    advance(HOUR - SECOND * 180).await;
    while provider.status().freshness != Freshness::Expired {
        assert_eq!(service.clone().oneshot(get()).await.unwrap().status(), StatusCode::OK);
        sleep(SECOND * 10).await;
    }
    let works = record.events().into_iter().find(|event| event.message.contains("still works")).unwrap();
    let works_for: u64 = works.fields["works_for_ms"].parse().unwrap();
    assert!((160_000..180_000).contains(&works_for), "{works_for}");
    for _ in 0..100 {
        service.clone().oneshot(get()).await.unwrap_err();
        sleep(SECOND * 30).await;
    }
    let attempts = source.fetches();
    assert!(attempts > 300, "{attempts}");
    let mut seen = levels_and_messages(&record);
    assert!(seen.remove(0).starts_with("WARN refresh failed (attempt 1 of 3), next try in "));
    let expected = [
        "WARN token refresh failed; the current token still works",
        "WARN token refresh failed; no token is available",
        "ERROR request failed; no token is available",
    ];
    assert_eq!(seen, expected);

    // It is up again: one line says so, with the counts.
    source.clear();
    provider.token().await.unwrap();
    let recovered = record.one("token refresh recovered");
    assert_eq!(recovered.level, Level::INFO);
    assert_eq!(recovered.fields["failed_requests"], "100");
    assert!(recovered.fields["lasted_ms"].parse::<u64>().unwrap() >= 3_000_000);
}

/// Row 76: a credential that is rejected.
#[tokio::test(start_paused = true)]
async fn rejection_is_a_line_per_cool_down() {
    let source = Source::living(HOUR);
    let provider = TokenProvider::new(Arc::clone(&source));
    let service = BearerAuthLayer::with_provider(provider.clone()).layer(Api::default().service());
    provider.token().await.unwrap();
    (0..3).for_each(|_| source.next(Act::Fail(SourceError::rejected("the key was rejected"))));
    let (record, _guard) = Record::start();
    advance(HOUR * 99 / 100).await;
    for _ in 0..100 {
        provider.token().await.unwrap();
        tokio::task::yield_now().await;
    }
    sleep(SECOND * 2).await;
    assert_eq!(levels_and_messages(&record), ["WARN credential rejected; the current token still works"]);
    advance(HOUR).await;
    for _ in 0..100 {
        service.clone().oneshot(get()).await.unwrap_err();
    }
    let seen = levels_and_messages(&record);
    let expected = [
        "ERROR credential rejected; failing requests until the cool-down ends",
        "ERROR request failed; no token is available",
    ];
    assert_eq!(seen[1..], expected);
    sleep(SECOND * 10).await;
    service.clone().oneshot(get()).await.unwrap_err();
    assert_eq!(levels_and_messages(&record).len(), 4, "one more cool-down");
}

/// Row 76: a token that the API challenges does not work, even if it has not expired.
#[tokio::test(start_paused = true)]
async fn challenged_token_does_not_work() {
    let api = Api::default();
    let source = Source::living(HOUR);
    let provider = TokenProvider::new(Arc::clone(&source));
    let service = BearerAuthLayer::with_provider(provider.clone()).layer(api.service());
    provider.token().await.unwrap();
    source.next(Act::Fail(SourceError::rejected("the key was rejected")));
    let (record, _guard) = Record::start();
    assert_eq!(service.oneshot(get()).await.unwrap().status(), StatusCode::UNAUTHORIZED);
    let expected = ["ERROR credential rejected; failing requests until the cool-down ends"];
    assert_eq!(levels_and_messages(&record), expected);
}

/// Row 76: a retry that helps is no outage, and a shutdown is none either.
#[tokio::test(start_paused = true)]
async fn healed_attempt_is_no_outage() {
    let source = Source::living(HOUR).then(down());
    let provider = TokenProvider::new(Arc::clone(&source));
    let service = BearerAuthLayer::with_provider(provider.clone()).layer(Api::default().service());
    let (record, _guard) = Record::start();
    provider.token().await.unwrap();
    assert_eq!(lines(&record).len(), 2, "the failed attempt, and the token: {:?}", lines(&record));
    provider.shutdown().await;
    advance(HOUR).await;
    let error = service.oneshot(get()).await.unwrap_err();
    assert!(matches!(support::ours(&error), Error::ShutDown));
    assert!(lines(&record).iter().all(|event| event.level > Level::ERROR));
}

/// Row 77.
#[tokio::test(start_paused = true)]
async fn adoption_is_no_refresh() {
    let (endpoint, store) = (fleet::Endpoint::default(), fleet::MemoryStore::default());
    let build = || endpoint.process(&store).build().unwrap();
    let (first, second) = (build(), build());
    first.token().await.unwrap();
    let (record, _guard) = Record::start();
    second.token().await.unwrap();
    let events = record.events();
    assert!(events.iter().any(|event| event.message.starts_with("adopted ")), "{events:?}");
    assert!(!events.iter().any(|event| event.message == "asking the token source"), "{events:?}");
    assert_eq!((first.status().refreshes, second.status().refreshes), (1, 0));
}
