//! Logins in outages: of the authorization server, of the store, and while two programs or two configurations use one store.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{
    runtime::Builder,
    sync::Notify,
    time::{Instant, advance, sleep, timeout},
};
use tower_bearer::{
    OAuth2, Token, TokenProvider, TokenProviderBuilder,
    oauth2::{ClientAuth, Server},
    source_fn,
};

use crate::support::{
    fleet::{Chance, MINUTE, MemoryStore},
    log::Record,
    logins::{Act, Auth, SECOND, refreshing, stored, user, with_grace},
    runs,
};

/// A failover loses the lease of an exchange, and another process presents the same refresh token meanwhile.
#[tokio::test(start_paused = true)]
async fn mark_does_not_bury_granted() {
    let (auth, store) = with_grace(&["A"]);
    let (one, other) = (auth.process(&store, "A"), auth.process(&store, "A"));
    one.token().await.unwrap();
    other.token().await.unwrap();
    advance(MINUTE).await;
    refreshing(&one, &auth, SECOND * 8).await;
    store.lose_lease();
    auth.state().acts.extend([Act::Refused, Act::Answer(503, "text/plain", ""), Act::Refused]);
    let _ = other.token().await;
    sleep(SECOND * 40).await;
    for _ in 0..3 {
        one.token().await.unwrap();
        other.token().await.unwrap();
        advance(MINUTE).await;
    }
    assert!(auth.state().reused.is_empty(), "{:?}", auth.presented());
}

/// Failovers and unclear answers at random, for three processes that present the same refresh tokens.
#[tokio::test(start_paused = true)]
async fn failovers_and_unclear_answers_end_no_login() {
    for round in 0..runs(100) {
        let (auth, store) = with_grace(&["A"]);
        let processes: Vec<_> = (0..3).map(|_| auth.process(&store, "A")).collect();
        let mut random = Chance(round);
        let begun = Instant::now();
        while begun.elapsed() < MINUTE * 20 {
            let takes = Duration::from_millis(random.draw(9000));
            match random.draw(6) {
                0 => store.lose_lease(),
                1 => auth.state().acts.push_back(Act::Slow(takes)),
                2 => auth.state().acts.push_back(Act::SlowAnswer(takes / 3, 503, "")),
                3 => auth.state().acts.push_back(Act::Refused),
                _ => {}
            }
            let process = processes[random.draw(3) as usize].clone();
            tokio::spawn(async move { process.token().await });
            sleep(Duration::from_millis(random.draw(4000))).await;
        }
        assert!(auth.state().reused.is_empty(), "round {round}: {:?}", auth.presented());
    }
}

/// A program with a wrong client and a wrong refresh token runs beside the one that is right.
#[tokio::test(start_paused = true)]
async fn wrong_configuration_beside_right_one() {
    let answers =
        [(401, ""), (401, r#"{"error":"invalid_client"}"#), (400, r#"{"error":"invalid_grant"}"#), (503, "")];
    for (status, body) in answers {
        for wrong_seed in ["A", "Aa"] {
            let (auth, store) = with_grace(&["A"]);
            let right = auth.process(&store, "A");
            right.token().await.unwrap();
            let rejects = Auth::new(&[]);
            rejects.state().always = Some(Act::Answer(status, "application/json", body));
            let wrong =
                TokenProvider::builder(rejects.source_of("idd")).login(wrong_seed).store(store.clone());
            let wrong = wrong.build().unwrap();
            let begun = Instant::now();
            while begun.elapsed() < MINUTE * 10 {
                wrong.token().await.unwrap_err();
                right.token().await.unwrap();
                sleep(SECOND * 5).await;
            }
            // It is corrected.
            drop((wrong, right));
            advance(MINUTE).await;
            auth.process(&store, "A").token().await.unwrap();
            assert!(auth.state().reused.is_empty(), "{status} {body}: {:?}", auth.presented());
        }
    }
}

/// A process with a wrong refresh token takes over the lease during the exchange of one that is right.
#[tokio::test(start_paused = true)]
async fn typing_error_beside_exchange() {
    let (auth, store) = with_grace(&["A"]);
    let right = auth.process(&store, "A");
    right.token().await.unwrap();
    advance(MINUTE).await;
    refreshing(&right, &auth, SECOND * 8).await;
    store.lose_lease();
    auth.state().acts.extend([Act::Refused, Act::Refused, Act::Refused]);
    let wrong = auth.process(&store, "Aa");
    let _ = wrong.token().await;
    sleep(SECOND * 50).await;
    for _ in 0..3 {
        right.token().await.unwrap();
        wrong.token().await.unwrap();
        advance(MINUTE).await;
    }
    assert!(auth.state().reused.is_empty(), "{:?}", auth.presented());
}

/// The server has another name in the configuration: the stored refresh token is not sent there, and the configured one
/// is spent.
#[tokio::test(start_paused = true)]
async fn other_name_of_server() {
    let (auth, store) = with_grace(&["A", "B"]);
    for _ in 0..2 {
        auth.process(&store, "A").token().await.unwrap();
        advance(MINUTE).await;
    }
    let presented = auth.presented().len();
    let server = Server::token_endpoint("https://login.example/token/");
    let source = OAuth2::login(server, ClientAuth::public("id")).with_client(auth.client());
    let renamed = TokenProvider::builder(source).login("A").store(store.clone()).build().unwrap();
    let error = renamed.token().await.unwrap_err();
    assert!(error.to_string().contains("was used with another server, client or key"), "{error}");
    assert_eq!(auth.presented().len(), presented);
    // Either way out works.
    auth.process(&store, "A").token().await.unwrap();
    renamed.log_in("B");
    assert_eq!(user(&renamed.ready().await.unwrap()), "B");
    assert!(auth.state().reused.is_empty());
}

/// An ingress answers in place of api.video while a user is logged in.
#[tokio::test(start_paused = true)]
async fn ingress_ends_no_login() {
    use tower_bearer::ApiVideo;
    for status in [302, 307, 404, 405, 410, 415] {
        for has_store in [false, true] {
            let (auth, store) = with_grace(&["A"]);
            let source = ApiVideo::new("key").with_client(auth.client());
            let mut builder = TokenProvider::builder(source).login("A");
            if has_store {
                builder = builder.store(store);
            }
            let provider = builder.build().unwrap();
            auth.state().acts.push_back(Act::Answer(status, "text/html", "<html>not here</html>"));
            provider.token().await.unwrap_err();
            sleep(MINUTE * 2).await;
            assert_eq!(user(&provider.token().await.unwrap()), "A", "{status}");
            assert_eq!(auth.presented(), ["A", "A"]);
        }
    }
}

/// The key is replaced while a user is logged in, and is restored.
#[tokio::test(start_paused = true)]
async fn other_key_does_not_end_login() {
    use tower_bearer::ApiVideo;
    for has_store in [false, true] {
        let (auth, store) = with_grace(&["A"]);
        let source = Arc::new(ApiVideo::new("key").with_client(auth.client()));
        let mut builder = TokenProvider::builder(Arc::clone(&source)).login("A");
        if has_store {
            builder = builder.store(store);
        }
        let provider = builder.build().unwrap();
        provider.token().await.unwrap();
        advance(MINUTE).await;
        source.set_key("other");
        let error = provider.token().await.unwrap_err();
        assert!(error.to_string().contains("was used with another server, client or key"), "{error}");
        advance(MINUTE).await;
        source.set_key("key");
        provider.token().await.unwrap();
        assert_eq!(auth.presented(), ["A", "r-A-1"]);
    }
}

/// An exchange of the credential, on a runtime that is not driven meanwhile, ends after a login has begun.
#[test]
fn late_token_of_credential_does_not_replace_login() {
    let presented: Arc<Mutex<Vec<Option<String>>>> = Arc::default();
    let gate = Arc::new(Notify::new());
    let (seen, opened) = (Arc::clone(&presented), Arc::clone(&gate));
    let source = source_fn(move |request| {
        let refresh_token = request.refresh_token().map(str::to_owned);
        let (seen, opened) = (Arc::clone(&seen), Arc::clone(&opened));
        async move {
            seen.lock().unwrap().push(refresh_token.clone());
            match refresh_token {
                None => {
                    opened.notified().await;
                    Ok(Token::builder("of-credential").build()?)
                }
                Some(old) => {
                    Ok(Token::builder(format!("of-{old}")).refresh_token(format!("{old}+")).build()?)
                }
            }
        }
    });
    let limit = Duration::from_millis(300);
    let provider = TokenProvider::builder(source).refresh_timeout(limit).build().unwrap();
    let runtime = || Builder::new_current_thread().enable_all().build().unwrap();
    let (stalled, driven) = (runtime(), runtime());
    stalled.block_on(async { timeout(limit / 6, provider.token()).await.unwrap_err() });
    std::thread::sleep(limit * 2);
    provider.log_in("B");
    let mut tokens = vec![driven.block_on(provider.token()).unwrap()];
    gate.notify_one();
    stalled.block_on(async { sleep(limit / 6).await });
    for _ in 0..2 {
        provider.invalidate();
        tokens.push(driven.block_on(provider.token()).unwrap());
    }
    let tokens: Vec<_> = tokens.iter().map(Token::access_token).collect();
    assert_eq!(tokens, ["of-B", "of-B+", "of-B++"]);
    let presented = presented.lock().unwrap();
    let presented: Vec<_> = presented.iter().map(|token| token.as_deref().unwrap_or_default()).collect();
    assert_eq!(presented, ["", "B", "B+", "B++"]);
}

/// An answer is lost at the end of an outage in which no refresh token was spent, and the server accepts a spent one
/// for 30 s.
#[tokio::test(start_paused = true)]
async fn lost_answer_late_in_outage_is_soon_asked_for_again() {
    let (refused, busy) = (Act::Refused, Act::Answer(503, "text/plain", ""));
    // An exchange has a time limit of 20 s.
    for lost in [Duration::from_millis(200), SECOND * 21] {
        for (outage, length) in [(&refused, 900), (&busy, 30), (&busy, 90), (&busy, 900)] {
            let (auth, _) = with_grace(&["A"]);
            let provider = auth.single("A");
            auth.state().always = Some(*outage);
            let begun = Instant::now();
            while begun.elapsed() < SECOND * length {
                provider.token().await.unwrap_err();
                sleep(SECOND).await;
            }
            auth.state().always = None;
            auth.state().acts.push_back(Act::Lost(lost));
            while provider.token().await.is_err() {
                sleep(SECOND).await;
                assert!(auth.state().reused.is_empty(), "{outage:?} for {length} s, {lost:?}");
            }
        }
    }
}

/// Each exchange of an outage ends after its refresh has. Its error still decides when the next one begins.
#[tokio::test(start_paused = true)]
async fn outage_bounds_rate_if_refresh_times_out_first() {
    let answers = [(503, ""), (429, ""), (401, r#"{"error":"invalid_client"}"#)];
    for (timeout, takes, has_store) in
        [(1, 2, false), (2, 3, false), (5, 6, true), (10, 11, false), (30, 40, true)]
    {
        for (status, body) in answers {
            let (auth, store) = with_grace(&["A"]);
            let mut builder = auth.builder("A").refresh_timeout(SECOND * timeout);
            if has_store {
                builder = builder.store(store);
            }
            let provider = builder.build().unwrap();
            auth.state().always = Some(Act::SlowAnswer(SECOND * takes, status, body));
            let begun = Instant::now();
            while begun.elapsed() < MINUTE * 60 {
                let _ = provider.token().await;
                sleep(SECOND * 2).await;
            }
            let presented = auth.presented().len();
            assert!(
                (20..150).contains(&presented),
                "{timeout} s, {takes} s, {status}: {presented} in an hour"
            );
        }
    }
}

/// A process ends while it presents a refresh token, and the next one has little time for a refresh.
#[tokio::test(start_paused = true)]
async fn short_refresh_timeout_after_restart() {
    let (auth, store) = with_grace(&["A"]);
    let process = || auth.builder("A").store(store.clone()).refresh_timeout(SECOND * 2).build().unwrap();
    let first = process();
    first.token().await.unwrap();
    advance(MINUTE).await;
    auth.state().always = Some(Act::Answer(503, "text/plain", ""));
    first.token().await.unwrap_err();
    drop(first);
    auth.state().always = None;
    sleep(MINUTE).await;
    let second = process();
    let begun = Instant::now();
    while second.token().await.is_err() {
        sleep(SECOND).await;
        assert!(begun.elapsed() < SECOND * 10, "{:?}", auth.presented());
    }
}

/// A program shuts down while the exchange of its login outlives the refresh.
#[tokio::test(start_paused = true)]
async fn shutdown_waits_for_exchange() {
    let (auth, store) = with_grace(&["A"]);
    let process = auth.builder("A").store(store.clone()).refresh_timeout(SECOND * 5).build().unwrap();
    process.token().await.unwrap();
    advance(MINUTE).await;
    auth.state().acts.push_back(Act::Slow(SECOND * 8));
    process.token().await.unwrap_err();
    process.shutdown().await;
    assert!(stored(&store).contains("r-A-2"), "{}", stored(&store));
}

/// A refresh token is doubtful while the access token works, for several processes.
#[tokio::test(start_paused = true)]
async fn fleet_tries_doubtful_refresh_token_once_a_minute_while_token_works() {
    let (auth, store) = with_grace(&["A"]);
    auth.state().lifetime = 36_000;
    let processes: Vec<_> = (0..8).map(|_| auth.process(&store, "A")).collect();
    for process in &processes {
        process.token().await.unwrap();
    }
    advance(SECOND * 33_000).await;
    auth.state().always = Some(Act::Answer(403, "application/json", ""));
    let begun = Instant::now();
    while begun.elapsed() < MINUTE * 20 {
        for process in &processes {
            process.token().await.unwrap();
        }
        sleep(SECOND * 5).await;
    }
    let presented = auth.presented().len() - 1;
    assert!((10..=21).contains(&presented), "{presented}");
}

fn exchange(subject: TokenProvider, sts: &Auth) -> TokenProviderBuilder<OAuth2> {
    let server = Server::token_endpoint("https://sts.example/token");
    TokenProvider::builder(
        OAuth2::token_exchange(server, ClientAuth::none(), subject).with_client(sts.client()),
    )
}

/// A login without a store is the subject of an exchange: its refresh token would be lost with its provider.
#[tokio::test(start_paused = true)]
async fn login_of_exchange_needs_store() {
    let (auth, store) = with_grace(&["A"]);
    let error = exchange(auth.single("A"), &auth).store(store.clone()).build().unwrap_err();
    assert!(error.to_string().contains("needs a store of its own"), "{error}");
    exchange(auth.process(&MemoryStore::default(), "A"), &auth).store(store).build().unwrap();
    // In a program whose login ends with it.
    exchange(auth.single("A"), &auth).build().unwrap();
}

/// A provider of a group without a store is given a login, and is idle.
#[cfg(feature = "tenants")]
#[tokio::test(start_paused = true)]
async fn eviction_does_not_lose_login_without_store() {
    use tower_bearer::{BoxError, TokenProviders};
    let (made, (auth, _)) = (
        source_fn(|request| {
            let token =
                request.refresh_token().map_or("of-credential".to_owned(), |token| format!("of-{token}"));
            async move { Ok(Token::builder(token).build()?) }
        }),
        with_grace(&["A"]),
    );
    let made = Arc::new(made);
    let providers =
        TokenProviders::builder(move |_: &u32| Ok::<_, BoxError>(TokenProvider::builder(Arc::clone(&made))));
    let providers = providers.idle_timeout(SECOND * 10).build().unwrap();
    providers.get(&0).unwrap().log_in("B");
    providers.get(&0).unwrap().token().await.unwrap();
    for key in 1..20 {
        sleep(SECOND * 5).await;
        providers.get(&key).unwrap();
    }
    assert_eq!(providers.get(&0).unwrap().token().await.unwrap().access_token(), "of-B");

    let build = move |_: &u32| Ok::<_, BoxError>(exchange(auth.single("A"), &auth));
    let providers = TokenProviders::builder(build).build().unwrap();
    let error = providers.get(&0).unwrap_err();
    assert!(error.to_string().contains("needs a store of its own"), "{error}");
}

/// Another process brings another login, whether or not its token still works, or has the only one.
#[tokio::test(start_paused = true)]
async fn login_of_another_process_has_line() {
    for is_expired in [false, true] {
        let (record, _guard) = Record::start();
        let lines = || -> Vec<_> {
            let logins = record.events().into_iter().filter(|event| event.message == "using a login");
            logins.map(|event| event.fields["reason"].clone()).collect()
        };
        let (auth, store) = with_grace(&["A", "B"]);
        let (one, other) = (auth.process(&store, "A"), auth.process(&store, "A"));
        one.token().await.unwrap();
        other.token().await.unwrap();
        advance(MINUTE).await;
        one.log_in("B");
        one.ready().await.unwrap();
        if is_expired {
            advance(MINUTE).await;
        }
        record.clear();
        assert_eq!(user(&other.token().await.unwrap()), "B");
        assert_eq!(lines(), ["another process has begun it"]);
        record.clear();
        auth.process(&store, "").token().await.unwrap();
        assert_eq!(lines(), ["it is in the store"]);
    }
}
