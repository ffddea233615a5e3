//! What an outage writes to the log: a few lines, however long it lasts, with the count of what they stand for.
#![cfg(all(feature = "tracing", feature = "default-client"))]

use http::StatusCode;
use tokio::time::{advance, sleep};
use tower::ServiceExt;
use tower_bearer::{Error, Freshness, SourceError, Token, TokenProvider, source_fn, store::TokenStore};
use tracing::Level;

use crate::support::{
    self, Act, HOUR, SECOND, Scene, fleet, get,
    log::{Logged, Record},
    scene, scene_of,
};

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

/// The API challenges every token, and each request would be a line in the log.
#[tokio::test(start_paused = true)]
async fn constant_401_is_a_line_per_minute() {
    let (record, _guard) = Record::start();
    let Scene { source, provider, service, .. } = scene().living(HOUR).build();
    record.clear();
    for round in 0..2 {
        let requests = (0..100).map(|_| service.clone().oneshot(get()));
        for response in futures_util::future::join_all(requests).await {
            assert_eq!(response.unwrap().status(), StatusCode::UNAUTHORIZED);
        }
        let left_alone = "the API challenges new tokens too; not asking the source";
        let warnings: Vec<_> =
            lines(&record).into_iter().filter(|event| event.message == left_alone).collect();
        assert_eq!(warnings.len(), round + 1, "{:?}", levels_and_messages(&record));
        let debug = record.events().into_iter().filter(|event| event.message == left_alone).count();
        assert!(debug > 50 * (round + 1), "{debug}");
        // The next line has the number of those that it follows.
        let repeated = debug - warnings.len();
        assert!(warnings[round].fields["repeated"].parse::<usize>().unwrap() <= repeated);
        assert_eq!(warnings[round].fields["repeated"] != "0", round > 0);
        // Five seconds later another refresh may start, but that is no news.
        advance(SECOND * 5).await;
        assert_eq!(service.clone().oneshot(get()).await.unwrap().status(), StatusCode::UNAUTHORIZED);
        advance(SECOND * 60).await;
    }
    assert_eq!(provider.status().refreshes, source.fetches());
}

/// The API challenges the only token that a source has.
#[tokio::test(start_paused = true)]
async fn constant_401_of_one_token_is_brief() {
    let (record, _guard) = Record::start();
    let source = source_fn(|_| async { Ok(Token::builder("abc").build()?) });
    let Scene { api, provider, service, .. } = scene_of(source).accept(["abc"]).build();
    assert_eq!(service.clone().oneshot(get()).await.unwrap().status(), StatusCode::OK);
    api.revoke_all();
    record.clear();
    for _ in 0..60 {
        assert_eq!(service.clone().oneshot(get()).await.unwrap().status(), StatusCode::UNAUTHORIZED);
        sleep(SECOND).await;
    }
    assert!(provider.status().refreshes > 3);
    let again = "WARN source returned the challenged access token";
    let seen = levels_and_messages(&record);
    assert_eq!(seen.iter().filter(|line| *line == again).count(), 1, "{seen:#?}");
    assert!(seen.len() <= 3, "{seen:#?}");
}

/// The API challenges a token that the source had returned before, when the API accepted it.
#[tokio::test(start_paused = true)]
async fn challenged_token_again_is_news() {
    let (record, _guard) = Record::start();
    let source =
        source_fn(|_| async { Ok::<_, SourceError>(Token::builder("abc").expires_in(SECOND * 60).build()?) });
    let provider = TokenProvider::new(source);
    provider.token().await.unwrap();
    advance(SECOND * 58).await;
    provider.token().await.unwrap();
    sleep(SECOND).await;
    let token = provider.token().await.unwrap();
    assert_eq!(provider.status().refreshes, 2);
    provider.refresh(&token).await.unwrap();
    record.one_at("source returned the challenged access token", Level::WARN);
}

/// The auth endpoint asks for a delay that is longer than a refresh may take.
#[tokio::test(start_paused = true)]
async fn retry_after_is_one_refresh() {
    let (record, _guard) = Record::start();
    let error = SourceError::unavailable("HTTP 429").with_retry_after(SECOND * 60);
    let Scene { source, provider, service, .. } = scene().living(HOUR).then(Act::Fail(error)).build();
    record.clear();
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

/// An outage lasts for hours: the log's level says what callers notice of it.
#[tokio::test(start_paused = true)]
async fn level_follows_impact_on_callers() {
    let (record, _guard) = Record::start();
    let scene = scene().living(HOUR).then(Act::Live(HOUR)).times(10_000, down).accept(["access-1"]);
    let Scene { source, provider, service, .. } = scene.with_token().await;
    record.clear();

    // The auth endpoint is down from three minutes before the expiry to an hour after it.
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

/// The credential is rejected, for hours.
#[tokio::test(start_paused = true)]
async fn rejection_is_reported_once() {
    let (record, _guard) = Record::start();
    let Scene { source, provider, service, .. } = scene().living(HOUR).with_token().await;
    (0..9).for_each(|_| source.next(Act::Fail(SourceError::rejected("the key was rejected"))));
    record.clear();
    advance(HOUR * 99 / 100).await;
    for _ in 0..10 {
        provider.token().await.unwrap();
        sleep(SECOND).await;
    }
    assert!(source.fetches() > 3, "several cool-downs");
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
    assert_eq!(levels_and_messages(&record).len(), 3, "one more cool-down is no news");
}

/// A login is required: one line while the token works, and one when requests fail.
#[tokio::test(start_paused = true)]
async fn required_login_is_reported_once() {
    let (record, _guard) = Record::start();
    let Scene { source, provider, service, .. } = scene().living(HOUR).with_token().await;
    (0..100)
        .for_each(|_| source.next(Act::Fail(SourceError::login_required("the refresh token was rejected"))));
    record.clear();
    advance(HOUR * 95 / 100).await;
    for _ in 0..100 {
        provider.token().await.unwrap();
        sleep(SECOND).await;
    }
    advance(HOUR).await;
    for _ in 0..10 {
        service.clone().oneshot(get()).await.unwrap_err();
        sleep(SECOND * 60).await;
    }
    assert!(source.fetches() > 10, "several cool-downs");
    let expected = [
        "WARN login required; the current token still works",
        "ERROR login required; failing requests",
        "ERROR request failed; no token is available",
    ];
    assert_eq!(levels_and_messages(&record), expected);
    let error = provider.status().last_error.unwrap();
    assert_eq!(error.to_string(), "no access token could be obtained: the refresh token was rejected");
}

/// The credential is rejected while no caller needs the token, so nothing fails.
#[tokio::test(start_paused = true)]
async fn rejection_without_requests_is_a_warning() {
    let (record, _guard) = Record::start();
    let scene = scene().times(1000, || Act::Fail(SourceError::rejected("the key was rejected")));
    record.clear();
    let Scene { source, provider, .. } = scene.provider(|builder| builder.keep_fresh(true)).build();
    sleep(10 * HOUR).await;
    assert!(source.fetches() > 500);
    assert_eq!(levels_and_messages(&record), ["WARN credential rejected; no token is available"]);
    provider.shutdown().await;
}

/// The reason of an outage changes.
#[tokio::test(start_paused = true)]
async fn another_reason_is_news() {
    let (record, _guard) = Record::start();
    let Scene { source, service, .. } = scene()
        .times(30, || Act::Fail(SourceError::unavailable("HTTP 503")))
        .times(30, || Act::Fail(SourceError::invalid_response("a login page")))
        .build();
    record.clear();
    while source.fetches() < 60 {
        service.clone().oneshot(get()).await.unwrap_err();
    }
    let seen = lines(&record);
    let about_page = seen.iter().filter(|event| event.fields["error"].contains("a login page")).count();
    assert_eq!((seen.len(), about_page), (6, 3), "{:#?}", levels_and_messages(&record));
}

/// One endpoint challenges the token, the others accept it, and refreshes fail.
#[tokio::test(start_paused = true)]
async fn alternating_failures_are_news_once() {
    let (record, _guard) = Record::start();
    let Scene { api, source, service, .. } = scene().living(2 * HOUR).accept(["access-1"]).build();
    assert_eq!(service.clone().oneshot(get()).await.unwrap().status(), StatusCode::OK);
    (0..10_000).for_each(|_| source.next(down()));
    advance(HOUR * 19 / 10).await;
    record.clear();
    for round in 0..10 {
        api.revoke_all();
        if round % 2 == 0 {
            api.accept("access-1");
        }
        service.clone().oneshot(get()).await.unwrap();
        sleep(SECOND * 30).await;
    }
    assert_eq!(lines(&record).len(), 3, "{:#?}", levels_and_messages(&record));
}

/// A caller has a shorter timeout than a refresh, while the auth endpoint hangs.
#[tokio::test(start_paused = true)]
async fn request_dropped_in_outage_has_failed() {
    let (record, _guard) = Record::start();
    let Scene { source, provider, service, .. } = scene().times(100, || Act::Hang).build();
    record.clear();
    for _ in 0..60 {
        let request = tokio::time::timeout(SECOND * 5, service.clone().oneshot(get()));
        assert!(request.await.is_err());
        sleep(SECOND * 55).await;
    }
    let failed = record.one_at("request failed; no token is available", Level::ERROR);
    assert_eq!((&*failed.fields["reason"], &*failed.fields["failed_requests"]), ("cancelled", "1"));
    source.clear();
    provider.token().await.unwrap();
    // The first was dropped before anything had failed.
    assert_eq!(record.one("token refresh recovered").fields["failed_requests"], "59");
}

/// A request learns of its failure when the outage is over.
#[tokio::test(start_paused = true)]
async fn late_failure_is_no_new_outage() {
    let (record, _guard) = Record::start();
    let Scene { provider, service, .. } =
        scene().living(HOUR).then(Act::Fail(SourceError::rejected("the key was rejected"))).build();
    let mut late = Box::pin(service.oneshot(get()));
    assert!(support::at_once(&mut late).is_none());
    sleep(SECOND * 5).await;
    provider.token().await.unwrap();
    record.clear();
    assert!(late.await.is_err());
    advance(HOUR).await;
    provider.token().await.unwrap();
    assert_eq!(levels_and_messages(&record), ["INFO token published"]);
}

/// A token that the API challenges does not work, even if it has not expired.
#[tokio::test(start_paused = true)]
async fn challenged_token_does_not_work() {
    let (record, _guard) = Record::start();
    let Scene { source, service, .. } = scene().living(HOUR).with_token().await;
    source.next(Act::Fail(SourceError::rejected("the key was rejected")));
    record.clear();
    assert_eq!(service.oneshot(get()).await.unwrap().status(), StatusCode::UNAUTHORIZED);
    let expected = ["ERROR credential rejected; the API challenges the current token"];
    assert_eq!(levels_and_messages(&record), expected);
}

/// A retry helps, or the program shuts down: neither is an outage.
#[tokio::test(start_paused = true)]
async fn healed_attempt_is_no_outage() {
    let (record, _guard) = Record::start();
    let Scene { provider, service, .. } = scene().living(HOUR).then(down()).build();
    record.clear();
    provider.token().await.unwrap();
    assert_eq!(lines(&record).len(), 2, "the failed attempt, and the token: {:?}", lines(&record));
    provider.shutdown().await;
    advance(HOUR).await;
    let error = service.oneshot(get()).await.unwrap_err();
    assert!(matches!(support::ours(&error), Error::ShutDown));
    assert!(lines(&record).iter().all(|event| event.level > Level::ERROR));
}

/// Another process has refreshed the token, and it looks like a refresh of this one.
#[tokio::test(start_paused = true)]
async fn adoption_is_no_refresh() {
    let (record, _guard) = Record::start();
    let (endpoint, store) = (fleet::Endpoint::default(), fleet::MemoryStore::default());
    let build = || endpoint.process(&store).build().unwrap();
    let (first, second) = (build(), build());
    first.token().await.unwrap();
    record.clear();
    second.token().await.unwrap();
    let events = record.events();
    assert!(events.iter().any(|event| event.message.starts_with("adopted ")), "{events:?}");
    assert!(!events.iter().any(|event| event.message == "asking the token source"), "{events:?}");
    assert_eq!((first.status().refreshes, second.status().refreshes), (1, 0));
}

/// A reader fails: its failures are in the status as in the log.
#[tokio::test(start_paused = true)]
async fn reader_counts_its_failures() {
    let (record, _guard) = Record::start();
    let store = fleet::MemoryStore::default();
    let reader = TokenProvider::reader(store.clone()).build().unwrap();
    record.clear();
    for _ in 0..3 {
        reader.token().await.unwrap_err();
    }
    store.put(&fleet::record_text("access-1", "def"), HOUR);
    reader.token().await.unwrap();
    let failed = record.one("token refresh recovered").fields["failed_refreshes"].clone();
    let status = reader.status();
    assert_eq!((&*failed, status.refreshes, status.failed_refreshes), ("3", 3, 3));
    assert!(!record.events().iter().any(|event| event.message == "asking the token source"));
}

/// A store leases and forgets its records, or a lease is never released: that is one outage, not one per attempt to
/// store the token.
#[tokio::test(start_paused = true)]
async fn failing_store_is_two_lines() {
    let (record, _guard) = Record::start();
    for case in ["forgetful", "leased"] {
        let (endpoint, store) = (fleet::Endpoint::default(), fleet::MemoryStore::default());
        let process = endpoint.process(&store).lease(SECOND).build().unwrap();
        let first = process.token().await.unwrap();
        record.clear();
        let held = match case {
            "forgetful" => {
                store.set(fleet::Health::Forgetful);
                None
            }
            _ => Some(store.lease(HOUR).await.unwrap().unwrap()),
        };
        let second = process.refresh(&first).await.unwrap();
        sleep(50 * SECOND).await;
        process.refresh(&second).await.unwrap();
        let failing = process.status().store.unwrap();
        assert!(failing.failing_for > Some(49 * SECOND), "{case}: {failing:?}");
        store.set(fleet::Health::Good);
        if let Some(lease) = held {
            store.release(lease).await.unwrap();
        }
        sleep(50 * SECOND).await;
        assert!(process.status().store.unwrap().is_usable(), "{case}");
        let of_the_store: Vec<_> =
            levels_and_messages(&record).into_iter().filter(|line| line.contains("token store")).collect();
        assert_eq!(
            of_the_store,
            ["WARN token store cannot be used", "INFO token store can be used again"],
            "{case}"
        );
    }
}
