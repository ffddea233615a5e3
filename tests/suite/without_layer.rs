//! A provider for clients that are no tower services: `with_token`, `token_for`, `set`, and what an error has inside.

use std::cell::{Cell, RefCell};

use http::StatusCode;
use tokio::time::{Instant, advance, sleep};
use tower::ServiceExt;
use tower_bearer::{
    Error, Freshness, SourceError, StaticToken, Token, TokenProvider, TokenProviders, source_fn,
    store::{StoreError, StoreErrorKind},
};

use crate::support::{Act, HOUR, MILLISECOND, MINUTE, SECOND, Scene, Source, fleet, get, log::Record, scene};

const CHALLENGED: u16 = 401;

fn is_challenge(status: &u16) -> bool {
    *status == CHALLENGED
}

/// Sends by a client without the layer, to an API that accepts these tokens.
async fn send(provider: &TokenProvider, accepted: &[&str]) -> (Result<u16, Error>, Vec<String>) {
    let sent = RefCell::new(Vec::new());
    let answer = |token: Token| {
        sent.borrow_mut().push(token.access_token().to_owned());
        let is_accepted = accepted.contains(&token.access_token());
        async move { if is_accepted { 200 } else { CHALLENGED } }
    };
    let status = provider.with_token(answer, is_challenge).await;
    (status, sent.into_inner())
}

/// The token of a client without the layer is revoked.
#[tokio::test(start_paused = true)]
async fn with_token_sends_again() {
    let Scene { provider, source, .. } = scene().living(HOUR).build();
    let (status, sent) = send(&provider, &["access-1"]).await;
    assert_eq!((status.unwrap(), sent.len()), (200, 1));
    let begun = Instant::now();
    let (status, sent) = send(&provider, &["access-2"]).await;
    assert_eq!((status.unwrap(), sent), (200, ["access-1", "access-2"].map(str::to_owned).to_vec()));
    // The fetch takes a second, and the first retry does not wait.
    assert_eq!((begun.elapsed(), source.fetches()), (SECOND, 2));
}

/// A client without the layer sends to an API that accepts no token, or the source fails.
#[tokio::test(start_paused = true)]
async fn with_token_is_bounded() {
    let Scene { provider, source, .. } = scene().living(HOUR).build();
    let (status, sent) = send(&provider, &[]).await;
    assert_eq!((status.unwrap(), sent.len()), (CHALLENGED, 3));
    // The caller gets the API's answer, not the failure.
    source.next(Act::Fail(SourceError::rejected("the key was rejected")));
    let (status, sent) = send(&provider, &[]).await;
    assert_eq!((status.unwrap(), sent.len()), (CHALLENGED, 1));
    // Without a token there is nothing to send.
    let failing = TokenProvider::new(Source::new().then(Act::Fail(SourceError::rejected("no such key"))));
    let (status, sent) = send(&failing, &[]).await;
    assert!(matches!(status, Err(Error::Source(_))) && sent.is_empty(), "{status:?}");
    // The retry budget is that of the provider.
    let broke = TokenProvider::builder(Source::new()).retry_budget(SECOND, 0, 0.0).build().unwrap();
    let (status, sent) = send(&broke, &[]).await;
    assert_eq!((status.unwrap(), sent.len()), (CHALLENGED, 2), "the first retry is free");
}

/// The API revokes the token every 150 ms, and clients without the layer send at that pace.
#[tokio::test(start_paused = true)]
async fn with_token_heals_frequent_revocations() {
    let Scene { provider, api, .. } = scene().living(HOUR).with_token().await;
    for round in 1..=8 {
        api.revoke_all();
        api.accept(&format!("access-{}", round + 1));
        let answer = |token: Token| {
            let response =
                api.answer(&[("authorization".parse().unwrap(), token.header_value())].into_iter().collect());
            async move { response.status() }
        };
        let status = provider.with_token(answer, |status| *status == StatusCode::UNAUTHORIZED).await;
        assert_eq!(status.unwrap(), StatusCode::OK, "round {round}");
        advance(150 * MILLISECOND).await;
    }
}

/// The answer to one attempt holds a connection while the next one waits.
#[tokio::test(start_paused = true)]
async fn with_token_drops_answer_before_retry() {
    struct Held<'a>(&'a Cell<u32>);

    impl Drop for Held<'_> {
        fn drop(&mut self) {
            self.0.set(self.0.get() - 1);
        }
    }

    let held = Cell::new(0);
    let Scene { provider, .. } = scene().build();
    let answer = |_: Token| {
        assert_eq!(held.get(), 0);
        held.set(1);
        let answer = Held(&held);
        async { answer }
    };
    provider.with_token(answer, |_| true).await.unwrap();
}

/// A caller needs a token for longer than the current one lives.
#[tokio::test(start_paused = true)]
async fn token_for_lasts_long_enough() {
    let Scene { provider, source, .. } = scene().living(HOUR).with_token().await;
    assert_eq!(provider.token_for(50 * MINUTE).await.unwrap().generation(), 1);
    advance(20 * MINUTE).await;
    assert_eq!(provider.token_for(30 * MINUTE).await.unwrap().generation(), 1);
    assert_eq!(provider.token_for(50 * MINUTE).await.unwrap().generation(), 2);
    // Nobody else waits for it.
    advance(20 * MINUTE).await;
    let (lasting, any) = tokio::join!(provider.token_for(50 * MINUTE), provider.token());
    assert_eq!((lasting.unwrap().generation(), any.unwrap().generation()), (3, 2));
    // A failure takes no token away.
    advance(20 * MINUTE).await;
    source.next(Act::Fail(SourceError::rejected("the key was rejected")));
    assert!(provider.token_for(50 * MINUTE).await.is_err());
    assert_eq!(provider.token().await.unwrap().generation(), 3);
}

/// The tokens of a source never live as long as a caller needs, or a caller asks at a high rate.
#[tokio::test(start_paused = true)]
async fn token_for_is_bounded() {
    let Scene { provider, source, .. } = scene().living(MINUTE).with_token().await;
    for least in [HOUR, std::time::Duration::MAX] {
        assert_eq!(provider.token_for(least).await.unwrap().generation(), 1);
    }
    assert_eq!(source.fetches(), 1);
    // Each token is just too old.
    let begun = Instant::now();
    for _ in 0..60 {
        sleep(SECOND).await;
        assert!(provider.token_for(MINUTE - 500 * MILLISECOND).await.is_ok());
    }
    let most = 1 + 10 + begun.elapsed().as_secs() / 5 + 1;
    assert!((10..=most).contains(&source.fetches()), "{} of {most}", source.fetches());
    let endless = TokenProvider::new(StaticToken::new("access"));
    assert!(endless.token_for(HOUR).await.is_ok(), "a token without a lifetime lasts");
}

/// There is a token before the first refresh.
#[tokio::test(start_paused = true)]
async fn initial_token_is_used_first() {
    let initial = Token::builder("access-0").refresh_token("refresh-0").expires_in(HOUR).build().unwrap();
    let Scene { provider, api, service, source, .. } =
        scene().accept(["access-0"]).provider(|builder| builder.initial(initial)).build();
    assert_eq!(service.clone().oneshot(get()).await.unwrap().status(), StatusCode::OK);
    let token = provider.current().unwrap();
    assert_eq!((token.access_token(), token.generation(), token.refresh_token()), ("access-0", 1, None));
    assert_eq!(source.fetches(), 0);
    api.revoke_all();
    api.accept("access-1");
    assert_eq!(service.oneshot(get()).await.unwrap().status(), StatusCode::OK);
    assert_eq!(*source.previous.lock().unwrap(), [Some(1)]);
}

/// The program gets a token in another way while a refresh hangs, or fails.
#[tokio::test(start_paused = true)]
async fn set_token_reaches_those_who_wait() {
    let set = |provider: &TokenProvider, text: &str| provider.set(Token::builder(text).build().unwrap());
    let Scene { provider, .. } = scene().then(Act::Hang).build();
    let waiting = tokio::spawn({
        let provider = provider.clone();
        async move { provider.token().await }
    });
    sleep(SECOND).await;
    let begun = Instant::now();
    set(&provider, "set-1");
    assert_eq!(waiting.await.unwrap().unwrap().access_token(), "set-1");
    assert!(begun.elapsed() < SECOND);

    // The answer to a refresh that began before is older, and so is the end of its runtime.
    for act in [Act::Live(HOUR), Act::Panic, Act::Fail(SourceError::rejected("no such key"))] {
        let Scene { provider, .. } = scene().then(act).build();
        let waiting = tokio::spawn({
            let provider = provider.clone();
            async move { provider.token().await }
        });
        sleep(SECOND / 2).await;
        set(&provider, "set-2");
        assert_eq!(waiting.await.unwrap().unwrap().access_token(), "set-2");
        sleep(SECOND).await;
        let (current, status) = (provider.current().unwrap(), provider.status());
        assert_eq!((current.access_token(), status.generation, status.refreshing), ("set-2", 1, false));
        assert!(status.last_error.is_none() && status.freshness == Freshness::Fresh, "{status:?}");
    }
    // Also one that waits for its next attempt.
    let Scene { provider, source, .. } = scene().then(Act::Fail(SourceError::unavailable("down"))).build();
    let waiting = tokio::spawn({
        let provider = provider.clone();
        async move { provider.token().await }
    });
    sleep(1050 * MILLISECOND).await;
    set(&provider, "set-3");
    assert_eq!(waiting.await.unwrap().unwrap().access_token(), "set-3");
    sleep(MINUTE).await;
    assert_eq!((provider.current().unwrap().access_token(), source.fetches()), ("set-3", 1));

    // It ends a failure.
    let Scene { provider, .. } = scene().then(Act::Fail(SourceError::rejected("no such key"))).build();
    provider.token().await.unwrap_err();
    set(&provider, "set-4");
    assert_eq!(provider.token().await.unwrap().access_token(), "set-4");
    assert!(provider.status().last_error.is_none());
}

/// The program sets tokens beside a source that hangs: refreshes add up, or a shutdown does not wait for the running one.
#[tokio::test(start_paused = true)]
async fn set_starts_no_second_refresh() {
    let Scene { provider, source, .. } = scene().then(Act::Hang).build();
    for number in 0..100 {
        let waiting = tokio::spawn({
            let provider = provider.clone();
            async move { provider.token().await }
        });
        sleep(50 * MILLISECOND).await;
        let short = Token::builder(format!("set-{number}")).expires_in(150 * MILLISECOND).build().unwrap();
        provider.set(short);
        waiting.await.unwrap().unwrap();
        sleep(200 * MILLISECOND).await;
    }
    assert_eq!(source.fetches(), 1);

    let Scene { provider, .. } = scene().build();
    let waiting = tokio::spawn({
        let provider = provider.clone();
        async move { provider.token().await }
    });
    sleep(SECOND / 4).await;
    provider.set(Token::builder("set").build().unwrap());
    assert!(provider.status().refreshing);
    let begun = Instant::now();
    provider.shutdown().await;
    assert_eq!(begun.elapsed(), SECOND * 3 / 4);
    assert_eq!(waiting.await.unwrap().unwrap().access_token(), "set");
}

/// A caller cannot use the token that was set while a refresh was running.
#[tokio::test(start_paused = true)]
async fn source_is_asked_again_after_set() {
    let Scene { provider, source, .. } = scene().build();
    let waiting = tokio::spawn({
        let provider = provider.clone();
        async move { provider.token().await }
    });
    sleep(SECOND / 4).await;
    provider.set(Token::builder("set").build().unwrap());
    let set = waiting.await.unwrap().unwrap();
    let next = provider.refresh(&set).await.unwrap();
    // The answer to the first question is older than the token that was set.
    assert_eq!((next.access_token(), source.fetches()), ("access-2", 2));
    // The current token again changes nothing.
    let begun = Instant::now();
    let (refreshed, ()) = tokio::join!(provider.refresh(&next), async {
        sleep(SECOND / 4).await;
        provider.set(Token::builder("access-2").build().unwrap());
    });
    assert_eq!((refreshed.unwrap().access_token(), begun.elapsed()), ("access-3", SECOND));
}

/// The program sets a token while a challenge is about to replace another one, and the API accepts it.
#[tokio::test(start_paused = true)]
async fn set_token_keeps_its_evidence() {
    let (record, _guard) = Record::start();
    let Scene { provider, api, service, .. } = scene().with_token().await;
    let challenged = tokio::spawn({
        let service = service.clone();
        async move { service.oneshot(get()).await.unwrap().status() }
    });
    sleep(SECOND / 2).await;
    api.accept("set");
    provider.set(Token::builder("set").build().unwrap());
    assert_eq!(challenged.await.unwrap(), StatusCode::OK);
    sleep(2 * SECOND).await;
    // Its own revocation heals at once: the API has accepted it.
    api.revoke_all();
    api.accept("access-3");
    assert_eq!(service.oneshot(get()).await.unwrap().status(), StatusCode::OK);
    let warnings = record.events().into_iter().filter(|event| event.level == tracing::Level::WARN);
    assert_eq!(warnings.count(), 0);
}

/// A set token is challenged, and the provider has an older one of a login or of a store.
#[tokio::test(start_paused = true)]
async fn challenged_set_token_asks_source() {
    for has_store in [false, true] {
        let number = Cell::new(0);
        let source = source_fn({
            let number = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(number.take()));
            move |_| {
                let number = number.fetch_add(1, std::sync::atomic::Ordering::SeqCst) + 1;
                async move {
                    let token =
                        Token::builder(format!("access-{number}")).refresh_token(format!("refresh-{number}"));
                    Ok(token.expires_in(HOUR).build()?)
                }
            }
        });
        let builder = TokenProvider::builder(source).login("refresh-0");
        let builder = if has_store { builder.store(fleet::MemoryStore::default()) } else { builder };
        let provider = builder.build().unwrap();
        assert_eq!(provider.token().await.unwrap().access_token(), "access-1");
        provider.set(Token::builder("set").build().unwrap());
        let set = provider.token().await.unwrap();
        let next = provider.refresh(&set).await.unwrap();
        assert_eq!(next.access_token(), "access-2", "with a store: {has_store}");
    }
}

/// A token that is set, or is there at the start, has expired.
#[tokio::test(start_paused = true)]
async fn expired_token_is_not_set() {
    let expired = || Token::builder("old").expires_at(std::time::SystemTime::UNIX_EPOCH).build().unwrap();
    let Scene { provider, .. } = scene().provider(|builder| builder.initial(expired())).build();
    assert_eq!(provider.token().await.unwrap().access_token(), "access-1");
    provider.set(expired());
    assert_eq!(provider.token().await.unwrap().access_token(), "access-1");
}

/// A user logs in while a client without the layer waits for its next attempt, or its tokens expire within a second.
#[tokio::test(start_paused = true)]
async fn with_token_sends_no_old_token() {
    let source = source_fn(|request| async move {
        let user = request.refresh_token().unwrap().split('-').next().unwrap().to_owned();
        let (access, next) = (format!("{user}-access"), format!("{user}-{}", request.reason() as u8));
        Ok(Token::builder(access).refresh_token(next).expires_in(300 * MILLISECOND).build()?)
    });
    let provider = TokenProvider::builder(source).login("alice-0").build().unwrap();
    let sent = RefCell::new(Vec::new());
    let answer = |token: Token| {
        assert!(!token.remaining().unwrap().is_zero(), "{token:?}");
        sent.borrow_mut().push(token.access_token().to_owned());
        if sent.borrow().len() == 2 {
            provider.log_in("bob-0");
        }
        async { CHALLENGED }
    };
    provider.with_token(answer, is_challenge).await.unwrap();
    assert_eq!(*sent.borrow(), ["alice-access", "alice-access", "bob-access"]);
}

/// The current token does not come from the source, or the source is asked for other reasons.
#[tokio::test(start_paused = true)]
async fn token_for_asks_source_if_it_has_longer_ones() {
    let five_minutes = || Token::builder("initial").expires_in(5 * MINUTE).build().unwrap();
    let Scene { provider, .. } =
        scene().living(HOUR).provider(|builder| builder.initial(five_minutes())).build();
    assert_eq!(provider.token_for(30 * MINUTE).await.unwrap().access_token(), "access-1");
    provider.set(five_minutes());
    assert_eq!(provider.token_for(30 * MINUTE).await.unwrap().access_token(), "access-2");
    // Refreshes at the pace of the lifetimes take nothing from the bucket of challenges.
    let Scene { provider, .. } = scene().living(2 * SECOND).build();
    for _ in 0..30 {
        provider.token_for(std::time::Duration::ZERO).await.unwrap();
        sleep(2 * SECOND).await;
    }
    let token = provider.token().await.unwrap();
    assert_ne!(provider.refresh(&token).await.unwrap().generation(), token.generation());
    // That of a store may be too short.
    let store = std::sync::Arc::new(fleet::MemoryStore::default());
    let member =
        || TokenProvider::builder(Source::living(HOUR)).store(std::sync::Arc::clone(&store)).build().unwrap();
    member().token().await.unwrap();
    advance(50 * MINUTE).await;
    let left = member().token_for(30 * MINUTE).await.unwrap().remaining().unwrap();
    assert!(left > 30 * MINUTE, "{left:?}");
    // A reader waits for nobody.
    let store = std::sync::Arc::new(fleet::MemoryStore::default());
    let member = TokenProvider::builder(Source::living(20 * SECOND))
        .store(std::sync::Arc::clone(&store))
        .build()
        .unwrap();
    member.token().await.unwrap();
    let reader = TokenProvider::reader(store).build().unwrap();
    let token = reader.token().await.unwrap();
    assert_eq!(reader.token_for(HOUR).await.unwrap().generation(), token.generation());
}

/// An SDK has an error type of its own, and looks for what failed beneath it.
#[tokio::test(start_paused = true)]
async fn cause_is_found_by_type() {
    #[derive(Debug)]
    struct Refused;

    impl std::fmt::Display for Refused {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("refused")
        }
    }

    impl std::error::Error for Refused {}

    let source = SourceError::unavailable("down").with_cause(Refused);
    let error = Error::from(source.clone());
    assert!(error.cause_as::<Refused>().is_some() && error.cause_as::<Error>().is_some());
    assert_eq!(error.cause_as::<SourceError>().unwrap().to_string(), "down");
    assert!(error.cause_as::<std::io::Error>().is_none());
    let store = Error::Store(StoreError::unavailable("full").with_cause(Refused));
    assert_eq!(store.cause_as::<StoreError>().unwrap().kind(), StoreErrorKind::Unavailable);
    assert!(store.cause_as::<Refused>().is_some());
    let dropped = Error::ChallengeDropped(Some(std::sync::Arc::new(error)));
    assert!(dropped.cause_as::<Refused>().is_some());
    let made =
        TokenProviders::new(|_: &u8| Err::<tower_bearer::TokenProviderBuilder<StaticToken>, _>(Refused));
    assert!(made.get(&1).unwrap_err().cause_as::<Refused>().is_some());
    // The inner service's error is not in a box of another one.
    let inner = tower::service_fn(|_: http::Request<http_body_util::Empty<bytes::Bytes>>| async {
        Err::<http::Response<String>, tower_bearer::BoxError>(Box::new(Refused))
    });
    let layer = tower_bearer::BearerAuthLayer::with_provider(TokenProvider::new(StaticToken::new("abc")));
    let error = tower::Layer::layer(&layer, inner).oneshot(get()).await.unwrap_err();
    assert!(error.is::<Refused>(), "{error:?}");
}
