//! Whose login is used: beside programs with another credential, after corrections, and in an exchange.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use tokio::time::{Instant, advance, sleep};
use tower_bearer::{
    ApiVideo, BoxError, OAuth2, StaticToken, Token, TokenClient, TokenProvider,
    oauth2::{ClientAuth, Server},
    source_fn,
};

use crate::support::{
    fleet::{self, Health, MINUTE, MemoryStore},
    log::Record,
    logins::{Act, Auth, SECOND, exchange, stored, user, with_grace},
    runs,
};

/// As the server, which also grants tokens for keys or the client's credentials: those of the user "key".
fn with_keys(auth: &Auth) -> TokenClient {
    let auth = auth.clone();
    TokenClient::with_service(tower::service_fn(move |request: Request<String>| {
        let auth = auth.clone();
        async move {
            if request.body().contains("efresh") {
                return auth.answer(request).await;
            }
            sleep(Duration::from_millis(200)).await;
            let n = {
                let mut state = auth.state();
                state.granted += 1;
                let n = state.granted;
                state.tokens.insert(format!("r-key-{n}"), ("key".to_owned(), None));
                n
            };
            let body =
                format!(r#"{{"access_token":"acc-key-{n}","refresh_token":"r-key-{n}","expires_in":60}}"#);
            Ok::<_, BoxError>(Response::new(Full::<Bytes>::from(body)))
        }
    }))
}

/// A program with the credential of a client finds the record of a login.
#[tokio::test(start_paused = true)]
async fn login_is_not_replaced_by_token_of_client() {
    let (auth, store) = with_grace(&["A"]);
    let one = auth.process(&store, "A");
    one.token().await.unwrap();
    drop(one);
    advance(MINUTE).await;
    let server = Server::token_endpoint("https://login.example/token");
    let source =
        OAuth2::client_credentials(server, ClientAuth::basic("id", "secret")).with_client(with_keys(&auth));
    let wrong = TokenProvider::builder(source).store(store.clone()).build().unwrap();
    let _ = wrong.token().await.map(|token| user(&token));
    drop(wrong);
    advance(MINUTE).await;
    let got = auth.process(&store, "A").token().await;
    assert!(
        got.is_ok() && auth.state().reused.is_empty(),
        "{got:?} {:?} {}",
        auth.presented(),
        stored(&store)
    );
}

/// A program with another key, and without a login, finds the record of one.
#[tokio::test(start_paused = true)]
async fn login_is_not_replaced_by_token_of_other_key() {
    let (auth, store) = with_grace(&["A"]);
    let source = |key: &str| ApiVideo::new(key).with_client(with_keys(&auth));
    let one = TokenProvider::builder(source("key")).store(store.clone()).login("A").build().unwrap();
    one.token().await.unwrap();
    drop(one);
    advance(MINUTE).await;
    let wrong = TokenProvider::builder(source("other")).store(store.clone()).build().unwrap();
    let _ = wrong.token().await.map(|token| user(&token));
    drop(wrong);
    advance(MINUTE).await;
    let one = TokenProvider::builder(source("key")).store(store.clone()).login("A").build().unwrap();
    let got = one.token().await;
    assert!(
        got.is_ok() && auth.state().reused.is_empty(),
        "{got:?} {:?} {}",
        auth.presented(),
        stored(&store)
    );
}

/// A program with the same key, and without refresh tokens, finds the record of a login.
#[tokio::test(start_paused = true)]
async fn login_is_not_replaced_by_token_of_its_key() {
    let (auth, store) = with_grace(&["A"]);
    let source = || ApiVideo::new("key").with_client(with_keys(&auth));
    let one = TokenProvider::builder(source()).store(store.clone()).login("A").build().unwrap();
    assert_eq!(user(&one.token().await.unwrap()), "A");
    drop(one);
    advance(MINUTE).await;
    let other = TokenProvider::builder(source().key_only()).store(store.clone()).build().unwrap();
    let _ = other.token().await.map(|token| user(&token));
    advance(MINUTE).await;
    let one = TokenProvider::builder(source()).store(store.clone()).login("A").build().unwrap();
    let got = one.token().await.map(|token| user(&token));
    assert_eq!(got.unwrap(), "A", "{}", stored(&store));
}

/// A login is given to a key without refresh tokens.
#[tokio::test(start_paused = true)]
async fn key_only_takes_no_login() {
    let (auth, _) = with_grace(&["A"]);
    let source = ApiVideo::new("key").key_only().with_client(with_keys(&auth));
    let error = TokenProvider::builder(source).login("A").build().unwrap_err();
    assert!(error.to_string().contains("takes no refresh token of a login"), "{error}");
}

/// A login is given to a token that does not change.
#[tokio::test(start_paused = true)]
async fn static_token_takes_no_login() {
    let error = TokenProvider::builder(StaticToken::new("static-static")).login("A").build().unwrap_err();
    assert!(error.to_string().contains("takes no refresh token of a login"), "{error}");
}

/// The key is another one for a moment, while a process stores the mark that it presents a refresh token.
#[tokio::test(start_paused = true)]
async fn key_changes_while_mark_is_stored() {
    let (auth, store) = with_grace(&["A"]);
    let source = Arc::new(ApiVideo::new("key").with_client(with_keys(&auth)));
    let provider =
        TokenProvider::builder(Arc::clone(&source)).store(store.clone()).login("A").build().unwrap();
    provider.token().await.unwrap();
    advance(MINUTE).await;
    store.change(|kept| kept.publication_takes = SECOND);
    let running = tokio::spawn({
        let provider = provider.clone();
        async move { provider.token().await }
    });
    sleep(SECOND / 2).await;
    source.set_key("other");
    let _ = running.await.unwrap();
    advance(MINUTE).await;
    source.set_key("key");
    for _ in 0..10 {
        if provider.token().await.is_ok() {
            return;
        }
        sleep(MINUTE).await;
    }
    let got = provider.ready().await;
    assert!(got.is_ok(), "{got:?} {:?}", auth.presented());
}

/// A source of one's own, whose account changes.
struct Own(OAuth2, Arc<AtomicBool>);

impl tower_bearer::TokenSource for Own {
    async fn fetch(
        &self,
        request: &tower_bearer::TokenRequest<'_>,
    ) -> Result<tower_bearer::Token, tower_bearer::SourceError> {
        self.0.fetch(request).await
    }

    fn credential(&self) -> tower_bearer::Credential {
        let account = if self.1.load(Ordering::SeqCst) { "other" } else { "one" };
        tower_bearer::Credential::new([account]).of_login()
    }
}

/// A configured login is rejected while the account is another one for a moment.
#[tokio::test(start_paused = true)]
async fn account_changes_during_rejection() {
    for changes in [false, true] {
        let (auth, store) = with_grace(&["A"]);
        let build = |seed: &str| {
            let is_other = Arc::new(AtomicBool::new(false));
            let source = Own(auth.source(), Arc::clone(&is_other));
            let provider = TokenProvider::builder(source).store(store.clone()).login(seed).build();
            (is_other, provider.unwrap())
        };
        let (_, right) = build("A");
        right.token().await.unwrap();
        drop(right);
        advance(MINUTE).await;
        let (is_other, wrong) = build("Aa");
        auth.state().acts.push_back(Act::SlowAnswer(SECOND, 400, r#"{"error":"invalid_grant"}"#));
        let running = tokio::spawn({
            let wrong = wrong.clone();
            async move { wrong.token().await }
        });
        // It may wait for the mark of the process before.
        sleep(SECOND / 2).await;
        is_other.store(changes, Ordering::SeqCst);
        let _ = running.await.unwrap();
        is_other.store(false, Ordering::SeqCst);
        sleep(MINUTE * 2).await;
        let got = wrong.ready().await;
        assert!(got.is_ok(), "{changes} {got:?} {:?} {}", auth.presented(), stored(&store));
    }
}

/// No refresh has taken a token, and a user has logged in to another process since.
#[tokio::test(start_paused = true)]
async fn untaken_token_is_not_one_of_login_before() {
    let (auth, store) = with_grace(&["A", "B"]);
    auth.state().lifetime = 3600;
    let one = auth.builder("A").store(store.clone()).refresh_timeout(SECOND * 2).build().unwrap();
    auth.state().acts.push_back(Act::Slow(SECOND * 5));
    one.token().await.unwrap_err();
    sleep(SECOND * 10).await;
    let other = auth.process(&store, "A");
    other.log_in("B");
    assert_eq!(user(&other.ready().await.unwrap()), "B");
    sleep(SECOND * 10).await;
    // Its next refresh.
    assert_eq!(user(&one.token().await.unwrap()), "B");
}

/// No refresh has taken a token, and another process has another login in its configuration since.
#[tokio::test(start_paused = true)]
async fn untaken_token_is_not_one_of_replaced_login() {
    let (auth, store) = with_grace(&["A", "C"]);
    auth.state().lifetime = 3600;
    let one = auth.builder("A").store(store.clone()).refresh_timeout(SECOND * 2).build().unwrap();
    auth.state().acts.push_back(Act::Slow(SECOND * 5));
    one.token().await.unwrap_err();
    sleep(SECOND * 10).await;
    let other = auth.process(&store, "C");
    assert_eq!(user(&other.ready().await.unwrap()), "C");
    assert_eq!(user(&one.ready().await.unwrap()), "C");
}

/// A token was exchanged for that of a login, another user logs in, and the program restarts.
#[tokio::test(start_paused = true)]
async fn exchange_for_login_that_is_in_store() {
    for seed in ["A", ""] {
        let (auth, store) = with_grace(&["A", "B"]);
        let subjects = MemoryStore::default();
        // The login command.
        let tool = auth.process(&subjects, "");
        tool.log_in("A");
        tool.ready().await.unwrap();
        // The program.
        let outer = exchange(auth.process(&subjects, seed)).store(store.clone()).build().unwrap();
        assert!(outer.token().await.unwrap().access_token().contains("-A-"));
        drop(outer);
        // Another user logs in; the program restarts.
        tool.log_in("B");
        tool.ready().await.unwrap();
        let outer = exchange(auth.process(&subjects, seed)).store(store.clone()).build().unwrap();
        let got = outer.token().await.unwrap();
        assert!(got.access_token().contains("-B-"), "{seed:?}: {}", got.access_token());
    }
}

/// A program that exchanges the token of a login restarts with the store of another user.
#[tokio::test(start_paused = true)]
async fn exchange_for_logins_of_two_stores() {
    let (auth, store) = with_grace(&["A", "B"]);
    let subjects = [MemoryStore::default(), MemoryStore::default()];
    for (user, store) in ["A", "B"].iter().zip(&subjects) {
        auth.process(store, user).token().await.unwrap();
    }
    advance(MINUTE).await;
    let outer = exchange(auth.process(&subjects[0], "")).store(store.clone()).build().unwrap();
    assert!(outer.token().await.unwrap().access_token().contains("-A-"));
    // A restart with another user's login.
    let outer = exchange(auth.process(&subjects[1], "")).store(store.clone()).build().unwrap();
    let got = outer.token().await.unwrap();
    assert!(got.access_token().contains("-B-"), "{}", got.access_token());
}

/// A program that exchanges the token of a login starts, and uses the stored token once it knows the login.
#[tokio::test(start_paused = true)]
async fn exchange_uses_stored_token_of_its_login() {
    let (auth, store) = with_grace(&["A"]);
    let subjects = MemoryStore::default();
    for stored in [None, Some(false), Some(true)] {
        let subject = auth.process(&subjects, "A");
        if stored == Some(true) {
            subject.ready().await.unwrap();
        }
        let outer = exchange(subject).store(store.clone()).build().unwrap();
        let left = outer.token().await.unwrap().remaining().unwrap();
        assert_eq!(left < SECOND * 3590, stored == Some(true), "{stored:?} {left:?}");
        advance(SECOND * 20).await;
    }
}

/// The login of an exchange's subject has ended, and a user logs in.
#[tokio::test(start_paused = true)]
async fn exchange_follows_login_at_once() {
    let (auth, _) = with_grace(&["A", "B"]);
    let subject = auth.single("A");
    let outer = exchange(subject.clone()).build().unwrap();
    auth.state().tokens.remove("A");
    for _ in 0..20 {
        outer.token().await.unwrap_err();
        sleep(SECOND * 20).await;
    }
    subject.log_in("B");
    subject.ready().await.unwrap();
    let begun = Instant::now();
    while outer.token().await.is_err() {
        sleep(SECOND).await;
    }
    assert!(begun.elapsed() < SECOND * 5, "{:?}", begun.elapsed());
}

/// As the server, which answers doubtfully to a refresh token that it does not know.
fn doubting(auth: &Auth) -> TokenClient {
    let auth = auth.clone();
    TokenClient::with_service(tower::service_fn(move |request: Request<String>| {
        let auth = auth.clone();
        async move {
            let fields: HashMap<String, String> =
                form_urlencoded::parse(request.body().as_bytes()).into_owned().collect();
            if !auth.state().tokens.contains_key(&fields["refresh_token"]) {
                auth.state().presented.push((Instant::now(), fields["refresh_token"].clone()));
                let answer = Response::builder().status(400).header("content-type", "application/json");
                return Ok::<_, BoxError>(answer.body(Full::<Bytes>::from(r#"{"error":"Bad Request"}"#))?);
            }
            auth.answer(request).await
        }
    }))
}

/// A configuration is corrected in one process after the other. The wrong refresh token was rejected doubtfully.
#[tokio::test(start_paused = true)]
async fn configuration_is_corrected_one_by_one() {
    let (auth, store) = with_grace(&["A"]);
    let process = |seed: &str| {
        let source =
            OAuth2::login(Server::token_endpoint("https://login.example/token"), ClientAuth::public("id"));
        TokenProvider::builder(source.with_client(doubting(&auth)))
            .login(seed)
            .store(store.clone())
            .build()
            .unwrap()
    };
    let right = process("A");
    right.token().await.unwrap();
    drop(right);
    advance(MINUTE).await;
    let (mut one, mut other) = (process("Aa"), process("Aa"));
    one.token().await.unwrap_err();
    other.token().await.unwrap_err();
    sleep(MINUTE).await;
    one = process("A");
    one.token().await.unwrap();
    for _ in 0..30 {
        let _ = other.token().await;
        let _ = one.token().await;
        sleep(SECOND * 7).await;
    }
    other = process("A");
    for _ in 0..200 {
        let _ = other.token().await;
        let _ = one.token().await;
        sleep(SECOND * 7).await;
    }
    let got = (one.token().await.is_ok(), other.token().await.is_ok());
    assert_eq!(
        got,
        (true, true),
        "{} {:?}",
        stored(&store),
        auth.presented().iter().rev().take(5).collect::<Vec<_>>()
    );
}

/// The login of another user is corrected in one process after the other, in an outage, at random delays.
#[tokio::test(start_paused = true)]
async fn other_user_is_corrected_one_by_one() {
    let mut wrong = Vec::new();
    for round in 0..20_u64 {
        let mut random = fleet::Chance(round);
        let (auth, store) = with_grace(&["A", "C"]);
        let right = auth.process(&store, "A");
        right.token().await.unwrap();
        drop(right);
        advance(MINUTE).await;
        auth.state().always = Some(Act::Answer(503, "text/plain", ""));
        let mut all: Vec<_> = (0..3).map(|_| auth.process(&store, "C")).collect();
        for process in &all {
            process.token().await.unwrap_err();
        }
        sleep(MINUTE).await;
        for one in 0..3 {
            all[one].shutdown().await;
            all[one] = auth.process(&store, "A");
            for _ in 0..random.draw(5) {
                for process in &all {
                    let process = process.clone();
                    tokio::spawn(async move { process.token().await });
                }
                sleep(Duration::from_millis(random.draw(20_000))).await;
            }
        }
        for _ in 0..round % 3 * 30 {
            for process in &all {
                let process = process.clone();
                tokio::spawn(async move { process.token().await });
            }
            sleep(Duration::from_millis(random.draw(20_000))).await;
        }
        auth.state().always = None;
        sleep(MINUTE * 2).await;
        for process in &all {
            let got = process.ready().await.map(|token| user(&token));
            if got.as_deref().ok() != Some("A") {
                wrong.push((round, got));
            }
        }
    }
    assert!(wrong.is_empty(), "{} {:?}", wrong.len(), wrong[0]);
}

/// A login is configured, then a typing error, then the login again, before a token was granted for it.
#[tokio::test(start_paused = true)]
async fn login_without_token_is_not_forgotten() {
    let (auth, store) = with_grace(&["A", "C"]);
    let process = auth.process(&store, "A");
    process.token().await.unwrap();
    advance(MINUTE).await;
    // Another user is configured, while the server is down.
    auth.state().always = Some(Act::Answer(503, "text/plain", ""));
    auth.process(&store, "C").token().await.unwrap_err();
    sleep(MINUTE).await;
    // The configuration is touched once more, with a typing error.
    auth.state().always = None;
    let _ = auth.process(&store, "Cc").token().await;
    sleep(MINUTE * 2).await;
    let got = auth.process(&store, "C").token().await;
    assert_eq!(got.map(|token| user(&token)).ok().as_deref(), Some("C"), "{}", stored(&store));
}

/// A login is given, one that is not valid, and the first one again.
#[tokio::test(start_paused = true)]
async fn login_is_given_again_after_invalid_one() {
    let (auth, _) = with_grace(&["A", "B"]);
    let provider = auth.single("A");
    provider.token().await.unwrap();
    provider.log_in("B");
    provider.log_in("C\n");
    provider.token().await.unwrap_err();
    provider.log_in("B");
    let got = provider.ready().await;
    assert_eq!(got.map(|token| user(&token)).ok().as_deref(), Some("B"), "{:?}", auth.presented());
}

/// Twelve users log in, each after a restart with the same configuration.
#[tokio::test(start_paused = true)]
async fn sixteen_logins_are_remembered() {
    let (auth, store) = with_grace(&["A"]);
    let mut users = Vec::new();
    for n in 0..12 {
        let name = format!("B{n}");
        auth.user(&name);
        let process = auth.process(&store, "A");
        process.log_in(&name);
        assert_eq!(user(&process.ready().await.unwrap()), name);
        users.push(name);
        advance(MINUTE).await;
    }
    // Eleven have been replaced since, A and this one among them.
    let process = auth.process(&store, "A");
    process.log_in(&users[0]);
    let got = process.ready().await.map(|token| user(&token));
    assert!(
        got.as_deref().ok() == Some("B11") && auth.state().reused.is_empty(),
        "{got:?} {:?}",
        auth.state().reused
    );
}

/// The log line of a login whose first refresh token is in the store already.
#[tokio::test(start_paused = true)]
async fn line_of_login_that_is_known() {
    let (record, _guard) = Record::start();
    let (auth, store) = with_grace(&["A"]);
    auth.state().always = Some(Act::Answer(503, "text/plain", ""));
    auth.process(&store, "A").token().await.unwrap_err();
    sleep(MINUTE).await;
    auth.state().always = None;
    record.clear();
    auth.process(&store, "A").token().await.unwrap();
    let logins: Vec<_> =
        record.events().into_iter().filter(|event| event.message == "using a login").collect();
    let reasons: Vec<_> = logins.iter().map(|event| event.fields["reason"].clone()).collect();
    assert_eq!(reasons, ["it is known already"]);
}

/// Several processes get wrong configurations at random.
#[tokio::test(start_paused = true)]
async fn random_configurations() {
    let mut failures = Vec::new();
    for round in 0..runs(100) {
        let (auth, store) = with_grace(&["A", "C"]);
        let mut random = fleet::Chance(round);
        let mode = Arc::new(std::sync::Mutex::new(0_u64));
        let client = |right: bool| {
            let (auth, mode) = (auth.clone(), Arc::clone(&mode));
            TokenClient::with_service(tower::service_fn(move |request: Request<String>| {
                let (auth, mode) = (auth.clone(), Arc::clone(&mode));
                async move {
                    let mode = *mode.lock().unwrap();
                    let fields: HashMap<String, String> =
                        form_urlencoded::parse(request.body().as_bytes()).into_owned().collect();
                    let known = auth.state().tokens.contains_key(&fields["refresh_token"]);
                    if right && known && mode % 4 != 3 {
                        return auth.answer(request).await;
                    }
                    auth.state().presented.push((
                        Instant::now(),
                        format!("{}/{}", fields["client_id"], fields["refresh_token"]),
                    ));
                    let (status, body) = match mode {
                        _ if mode % 4 == 3 => (503, ""),
                        0 => (400, r#"{"error":"invalid_grant"}"#),
                        1 => (400, r#"{"error":"Bad Request"}"#),
                        _ if right => (400, r#"{"error":"invalid_grant"}"#),
                        _ => (401, r#"{"error":"invalid_client"}"#),
                    };
                    let answer =
                        Response::builder().status(status).header("content-type", "application/json");
                    Ok::<_, BoxError>(answer.body(Full::<Bytes>::from(body))?)
                }
            }))
        };
        let start = |id: &str, seed: &str| {
            let source =
                OAuth2::login(Server::token_endpoint("https://login.example/token"), ClientAuth::public(id));
            TokenProvider::builder(source.with_client(client(id == "id")))
                .login(seed)
                .store(store.clone())
                .build()
                .unwrap()
        };
        let first = start("id", "A");
        first.token().await.unwrap();
        let mut processes = vec![first];
        let mut steps = Vec::new();
        for _ in 0..random.draw(10) + 2 {
            if processes.len() > 1 || random.draw(2) == 0 {
                let gone = random.draw(processes.len() as u64) as usize;
                let gone: TokenProvider = processes.remove(gone);
                gone.shutdown().await;
                sleep(SECOND).await;
            }
            *mode.lock().unwrap() = random.draw(4);
            let id = ["id", "idd", "iddd"][random.draw(3) as usize];
            let seed = ["A", "Aa", "Ab"][random.draw(3) as usize];
            steps.push((*mode.lock().unwrap(), id, seed));
            processes.push(start(id, seed));
            for _ in 0..random.draw(6) {
                for process in &processes {
                    let _ = process.token().await;
                }
                sleep(SECOND * 10).await;
            }
        }
        for process in processes {
            process.shutdown().await;
        }
        *mode.lock().unwrap() = 0;
        sleep(MINUTE).await;
        let last = start("id", "A");
        let got = last.ready().await;
        let reused = auth.state().reused.clone();
        let presented = auth.presented();
        if got.is_err() || !reused.is_empty() {
            failures.push(format!(
                "{round} {steps:?}\n   {:?}\n   {:?}\n   {:?}\n   {}",
                got.err(),
                reused,
                presented,
                stored(&store)
            ));
        }
    }
    assert!(
        failures.is_empty(),
        "{} failures: {}",
        failures.len(),
        failures[..failures.len().min(4)].join("\n")
    );
}

/// Exchanges outlive their refreshes while users log in, and tokens are challenged and removed.
#[tokio::test(start_paused = true)]
async fn random_logins_during_exchanges() {
    for round in 0..40_u64 {
        let mut random = fleet::Chance(round + 5000);
        let (auth, store) = with_grace(&["A"]);
        let processes: Vec<_> = (0..3)
            .map(|_| auth.builder("A").store(store.clone()).refresh_timeout(SECOND * 2).build().unwrap())
            .collect();
        let mut order = vec!["A".to_owned()];
        let mut least = [0; 3];
        for step in 0..60 {
            let n = random.draw(3) as usize;
            let process = processes[n].clone();
            match random.draw(10) {
                0 => auth.state().acts.push_back(Act::Slow(Duration::from_millis(random.draw(9000)))),
                1 => auth.state().acts.push_back(Act::SlowAnswer(
                    Duration::from_millis(random.draw(5000)),
                    503,
                    "",
                )),
                2 => auth.state().acts.push_back(Act::Unusable),
                3 => {
                    let name = format!("V{step}");
                    auth.user(&name);
                    process.log_in(&name);
                    order.push(name);
                    least[n] = order.len() - 1;
                }
                4 => process.invalidate(),
                5 => {
                    if let Some(token) = process.current() {
                        tokio::spawn({
                            let process = process.clone();
                            async move { process.refresh(&token).await }
                        });
                    }
                }
                _ => {}
            }
            let limit = Duration::from_millis(random.draw(5000));
            if let Ok(Ok(token)) = tokio::time::timeout(limit, process.token()).await {
                let name = user(&token);
                let presented = auth.presented();
                let begun = |name: &String| presented.iter().position(|other| other == name);
                assert!(
                    least[n] == 0
                        || begun(&name) >= begun(&order[least[n]]) && begun(&order[least[n]]).is_some(),
                    "round {round} step {step}: {name} after {}",
                    order[least[n]]
                );
            }
            sleep(Duration::from_millis(random.draw(9000))).await;
        }
        auth.state().acts.clear();
        sleep(MINUTE).await;
        let name = "last".to_owned();
        auth.user(&name);
        // Those that are pending begin.
        for process in &processes {
            let begun = Instant::now();
            while let Err(error) = process.ready().await {
                assert!(begun.elapsed() < MINUTE, "round {round}: {error}");
            }
        }
        processes[0].log_in(&name);
        let begun = Instant::now();
        while let Err(error) = processes[0].ready().await {
            assert!(begun.elapsed() < MINUTE, "round {round}: {error}");
        }
        sleep(MINUTE * 2).await;
        for process in &processes {
            assert_eq!(user(&process.token().await.unwrap()), name, "round {round}");
        }
        assert!(auth.state().reused.is_empty(), "round {round}: {:?}", auth.state().reused);
    }
}

/// Providers of a group have logins, and are evicted, while the store and the server fail.
#[cfg(feature = "tenants")]
#[tokio::test(start_paused = true)]
async fn random_logins_of_group() {
    use tower_bearer::TokenProviders;
    for round in 0..15_u64 {
        let mut random = fleet::Chance(round);
        let names: Vec<String> = (0..6).map(|n| format!("U{n}")).collect();
        let auth = Auth::new(&[]);
        auth.state().grace = MINUTE * 6;
        for name in &names {
            auth.user(name);
        }
        let stores: Vec<_> = (0..6).map(|_| MemoryStore::default()).collect();
        let make = {
            let (auth, stores) = (auth.clone(), stores.clone());
            move |key: &usize| {
                Ok::<_, BoxError>(
                    auth.builder(&format!("U{key}")).store(stores[*key].clone()).refresh_timeout(SECOND * 4),
                )
            }
        };
        let providers =
            TokenProviders::builder(make).max_providers(2).idle_timeout(SECOND * 5).build().unwrap();
        let mut given = HashMap::new();
        for step in 0..150 {
            let key = random.draw(6) as usize;
            match random.draw(12) {
                0 => stores[key].set(Health::Down),
                1 => stores[key].set(Health::ReadOnly),
                2 => auth.state().acts.push_back(Act::Slow(Duration::from_millis(random.draw(9000)))),
                3 => auth.state().acts.push_back(Act::Lost(Duration::from_millis(random.draw(3000)))),
                4 => auth.state().acts.push_back(Act::Unusable),
                5 => {
                    let name = format!("V{step}");
                    auth.user(&name);
                    providers.get(&key).unwrap().log_in(&name);
                    given.insert(key, name);
                }
                6 => stores[key].lose_lease(),
                _ => stores[key].set(Health::Good),
            }
            let provider = providers.get(&key).unwrap();
            let limit = Duration::from_millis(random.draw(6000));
            if let Ok(Ok(token)) = tokio::time::timeout(limit, provider.token()).await {
                let expected = given.get(&key).cloned().unwrap_or_else(|| format!("U{key}"));
                assert_eq!(user(&token), expected, "round {round} step {step}");
            }
            drop(provider);
            sleep(Duration::from_millis(random.draw(9000))).await;
        }
        for store in &stores {
            store.set(Health::Good);
        }
        auth.state().acts.clear();
        sleep(MINUTE).await;
        for key in 0..6 {
            let expected = given.get(&key).cloned().unwrap_or_else(|| format!("U{key}"));
            let got = providers.get(&key).unwrap().ready().await;
            let got = got.map(|token| user(&token)).map_err(|error| error.to_string());
            assert_eq!(got, Ok(expected), "round {round} {:?}", auth.state().reused);
        }
        assert!(auth.state().reused.is_empty(), "round {round}: {:?}", auth.state().reused);
    }
}

/// A stored record has the greatest numbers that it can have.
#[tokio::test(start_paused = true)]
async fn extreme_record_makes_no_panic() {
    for (from, to) in [
        (r#""granted_at":1"#, r#""granted_at":1,"refresh_token_expires_at":18446744073709551615"#),
        (r#""granted_at":1"#, r#""granted_at":1,"doubted_until":18446744073709551615"#),
        (r#""granted_at":1"#, r#""granted_at":18446744073709551615"#),
    ] {
        let (auth, store) = with_grace(&["A"]);
        auth.process(&store, "A").token().await.unwrap();
        let text = stored(&store);
        assert!(text.contains(from), "{text}");
        store.put(&text.replace(from, to), MINUTE);
        advance(SECOND * 5).await;
        let process = auth.process(&store, "A");
        let first = process.token().await;
        advance(MINUTE).await;
        let second = process.token().await;
        assert!(first.is_ok() && second.is_ok(), "{to}: {first:?} {second:?}");
    }
}

/// A program with another client runs, and the login of another one is granted.
#[tokio::test(start_paused = true)]
async fn wrong_client_costs_no_login_that_was_granted() {
    let (auth, store) = with_grace(&["A", "D"]);
    auth.state().clients = Some(["id".to_owned()].into());
    let wrong =
        TokenProvider::builder(auth.source_of("id2")).login("A").store(store.clone()).build().unwrap();
    let _ = wrong.token().await;
    sleep(SECOND * 10).await;
    let right = auth.process(&store, "A");
    right.token().await.unwrap();
    sleep(SECOND * 10).await;
    let _ = wrong.token().await;
    drop((right, wrong));
    sleep(MINUTE).await;
    let got = auth.process(&store, "A").token().await;
    assert!(got.is_ok() && auth.state().reused.is_empty(), "{:?} {:?}", got.is_ok(), auth.presented());
}

/// A program with another client and another login runs on, while others restart.
#[tokio::test(start_paused = true)]
async fn wrong_client_costs_no_stored_token() {
    let (auth, store) = with_grace(&["A", "D"]);
    auth.state().lifetime = 3600;
    auth.state().clients = Some(["id".to_owned()].into());
    let right = auth.process(&store, "A");
    right.token().await.unwrap();
    sleep(MINUTE).await;
    let wrong =
        TokenProvider::builder(auth.source_of("id2")).login("D").store(store.clone()).build().unwrap();
    let _ = wrong.token().await;
    let mut replicas = vec![];
    for _ in 0..10 {
        sleep(MINUTE * 2).await;
        let replica = auth.process(&store, "A");
        let _ = replica.token().await.unwrap();
        let _ = wrong.token().await;
        replicas.push(replica);
    }
    assert!(auth.state().granted <= 2, "{} {}", auth.state().granted, stored(&store));
}

/// A source of one's own, which says nothing of its credential, finds the record of a login.
#[tokio::test(start_paused = true)]
async fn login_is_not_replaced_by_source_without_credential() {
    let (auth, store) = with_grace(&["A"]);
    let one = auth.process(&store, "A");
    one.token().await.unwrap();
    drop(one);
    advance(MINUTE).await;
    let wrong = TokenProvider::builder(source_fn(|_| async { Ok(Token::builder("plain-0").build()?) }))
        .store(store.clone())
        .build()
        .unwrap();
    let _ = wrong.token().await;
    drop(wrong);
    advance(MINUTE).await;
    let got = auth.process(&store, "A").token().await;
    assert!(got.is_ok() && auth.state().reused.is_empty(), "{got:?} {:?}", auth.presented());
}

/// As the server, for its client.
fn client_credentials(auth: &Auth) -> OAuth2 {
    let server = Server::token_endpoint("https://login.example/token");
    OAuth2::client_credentials(server, ClientAuth::basic("id", "secret")).with_client(with_keys(auth))
}

/// A program without a login finds the record of a login that has ended.
#[tokio::test(start_paused = true)]
async fn record_of_ended_login_is_replaced() {
    let (auth, store) = with_grace(&["A"]);
    let one = auth.process(&store, "A");
    one.token().await.unwrap();
    advance(MINUTE).await;
    auth.state().tokens.clear();
    one.token().await.unwrap_err();
    drop(one);
    sleep(MINUTE).await;
    let build = || TokenProvider::builder(client_credentials(&auth)).store(store.clone()).build().unwrap();
    let (one, other) = (build(), build());
    let a = one.token().await.unwrap();
    sleep(SECOND * 10).await;
    let b = other.token().await.unwrap();
    assert_eq!(a.access_token(), b.access_token());
}

/// A login without a token is replaced by another one, and a process restarts with the first.
#[tokio::test(start_paused = true)]
async fn configuration_that_was_replaced_stays_so() {
    let (auth, store) = with_grace(&["A", "C", "D"]);
    auth.process(&store, "A").token().await.unwrap();
    advance(MINUTE).await;
    auth.state().always = Some(Act::Answer(503, "text/plain", ""));
    auth.process(&store, "C").token().await.unwrap_err();
    sleep(MINUTE).await;
    auth.state().always = None;
    let d = auth.process(&store, "D");
    assert_eq!(user(&d.ready().await.unwrap()), "D");
    advance(MINUTE).await;
    // A replica that was not updated restarts.
    let stale = auth.process(&store, "C");
    let _ = stale.ready().await;
    advance(MINUTE).await;
    let got = d.ready().await.map(|t| user(&t));
    advance(MINUTE).await;
    let restarted = auth.process(&store, "D").ready().await.map(|t| user(&t));
    assert_eq!((got.unwrap().as_str(), restarted.unwrap().as_str()), ("D", "D"));
}

/// The first refresh token of the login before is in the configuration of another client.
#[tokio::test(start_paused = true)]
async fn first_refresh_token_of_login_before_is_not_presented() {
    let (auth, store) = with_grace(&["A", "C"]);
    let one = auth.process(&store, "A");
    one.token().await.unwrap();
    advance(MINUTE * 2).await;
    auth.state().always = Some(Act::Answer(503, "text/plain", ""));
    auth.process(&store, "C").token().await.unwrap_err();
    sleep(MINUTE).await;
    auth.state().always = None;
    let other =
        TokenProvider::builder(auth.source_of("id2")).login("A").store(store.clone()).build().unwrap();
    let _ = other.token().await;
    assert!(auth.state().reused.is_empty(), "{:?}", auth.presented());
}

/// The subject of an exchange is a reader, which does not know whose login it uses.
#[tokio::test(start_paused = true)]
async fn exchange_for_reader() {
    let (auth, store) = with_grace(&["A", "B"]);
    let subjects = MemoryStore::default();
    let tool = auth.process(&subjects, "A");
    tool.ready().await.unwrap();
    let subject = || TokenProvider::reader(subjects.clone()).build().unwrap();
    let s = subject();
    s.ready().await.unwrap();
    let outer = exchange(s).store(store.clone()).build().unwrap();
    assert!(outer.token().await.unwrap().access_token().contains("-A-"));
    drop(outer);
    tool.log_in("B");
    tool.ready().await.unwrap();
    let s = subject();
    assert_eq!(user(&s.ready().await.unwrap()), "B");
    let outer = exchange(s).store(store.clone()).build().unwrap();
    let got = outer.token().await.unwrap();
    assert!(got.access_token().contains("-B-"), "{}", got.access_token());
}

/// Processes share what they exchange for tokens of a client.
#[tokio::test(start_paused = true)]
async fn exchange_for_client_is_shared() {
    let (auth, store) = with_grace(&[]);
    let subjects = MemoryStore::default();
    for is_first in [true, false] {
        let subject =
            TokenProvider::builder(client_credentials(&auth)).store(subjects.clone()).build().unwrap();
        let outer = exchange(subject).store(store.clone()).build().unwrap();
        let left = outer.token().await.unwrap().remaining().unwrap();
        assert_eq!(left > SECOND * 3590, is_first, "{left:?}");
        advance(SECOND * 20).await;
    }
}

/// The client's secret is replaced while a token is granted.
#[tokio::test(start_paused = true)]
async fn secret_is_replaced_during_grant() {
    let (auth, store) = with_grace(&[]);
    let source = Arc::new(client_credentials(&auth));
    let one = TokenProvider::builder(Arc::clone(&source)).store(store.clone()).build().unwrap();
    let running = tokio::spawn({
        let one = one.clone();
        async move { one.token().await }
    });
    sleep(SECOND / 10).await;
    source.set_secret("secret2");
    running.await.unwrap().unwrap();
    let other = TokenProvider::builder(client_credentials(&auth)).store(store.clone()).build().unwrap();
    other.token().await.unwrap();
    assert_eq!(auth.state().granted, 1);
}
