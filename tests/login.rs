//! Processes that share the login of a user: one refresh token, which a server revokes if it is presented twice.
#![cfg(all(feature = "oauth2", feature = "store"))]

#[path = "support/fleet.rs"]
mod fleet;
mod support;

use std::{
    collections::{HashMap, VecDeque},
    io,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use bytes::Bytes;
use fleet::{Health, MINUTE, MemoryStore, POST};
use futures_util::future::join_all;
use http::{Request, Response};
use http_body_util::Full;
use tokio::{
    task::JoinHandle,
    time::{Instant, advance, sleep, timeout},
};
use tower_bearer::{
    BoxError, Error, OAuth2, SourceErrorKind, Token, TokenClient, TokenProvider,
    oauth2::{ClientAuth, Server},
    store::{EncryptedStore, EncryptionKeys, TokenStore},
};

const SECOND: Duration = Duration::from_secs(1);

/// An authorization server whose refresh tokens rotate. A token request is processed at its start, and takes [`POST`].
#[derive(Clone, Default)]
struct Logins(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    /// When each refresh token of the login was spent.
    refresh_tokens: HashMap<String, Option<Instant>>,
    /// How long a spent refresh token is accepted.
    grace: Duration,
    granted: u32,
    presented: Vec<String>,
    /// The next requests are not processed, and get this answer: a status, and `Retry-After`.
    refusals: VecDeque<(u16, &'static str)>,
    /// How much longer the next answer takes.
    delay: Duration,
    /// Whether the access token stays the same.
    is_same: bool,
    /// Whether the access token is not valid.
    is_unusable: bool,
    /// Further fields of the response.
    further: &'static str,
    /// Decides which requests fail, and how long the others take.
    chance: Option<Chance>,
    /// How often a spent refresh token was presented too late, which revoked the login.
    reused: u32,
}

/// Pseudo-random numbers, the same in each run.
#[derive(Default)]
struct Chance(u64);

impl Chance {
    fn draw(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % below
    }
}

impl Logins {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// Logs a user in: `refresh_token` is the first of its family, which ends the one before.
    fn log_in(&self, refresh_token: &str) {
        self.state().refresh_tokens = [(refresh_token.to_owned(), None)].into();
    }

    fn revoke(&self) {
        self.state().refresh_tokens.clear();
    }

    fn reused(&self) -> u32 {
        self.state().reused
    }

    fn presented(&self) -> Vec<String> {
        self.state().presented.clone()
    }

    fn grant(&self, refresh_token: &str) -> Option<u32> {
        let mut state = self.state();
        state.presented.push(refresh_token.to_owned());
        let grace = state.grace;
        let spent = state.refresh_tokens.get_mut(refresh_token)?;
        if spent.get_or_insert_with(Instant::now).elapsed() > grace {
            state.reused += 1;
            state.refresh_tokens.clear();
            return None;
        }
        state.granted += 1;
        let next = format!("refresh-{}", state.granted);
        state.refresh_tokens.insert(next, None);
        Some(state.granted)
    }

    /// Responds to a token request. Whether a spent refresh token was used in it is known from its first time.
    async fn answer(&self, request: Request<String>) -> Result<Response<Full<Bytes>>, BoxError> {
        let field =
            form_urlencoded::parse(request.body().as_bytes()).find(|(name, _)| name == "refresh_token");
        let (_, refresh_token) = field.unwrap();
        let (refusal, takes) = {
            let mut state = self.state();
            let drawn = state.chance.as_mut().map(|chance| (chance.draw(8), chance.draw(3000)));
            match (drawn, state.refusals.pop_front()) {
                (Some((0, _)), _) => (Some((503, "0")), POST),
                (Some((1, _)), _) => return Err(io::Error::from(io::ErrorKind::ConnectionRefused).into()),
                (Some((_, millis)), _) => (None, Duration::from_millis(millis)),
                (None, None) => (None, POST + std::mem::take(&mut state.delay)),
                (None, refusal) => (refusal, POST),
            }
        };
        if let Some((status, retry_after)) = refusal {
            let response = Response::builder().status(status).header("retry-after", retry_after);
            return Ok(response.body(Full::default())?);
        }
        let granted = self.grant(&refresh_token);
        sleep(takes).await;
        let (is_same, is_unusable) = {
            let state = self.state();
            (state.is_same, state.is_unusable)
        };
        let further = self.state().further;
        let (status, body) = match granted {
            Some(number) => {
                let access_token = match (is_same, is_unusable) {
                    (true, _) => "same".to_owned(),
                    (_, true) => "not valid".to_owned(),
                    _ => format!("access-{number}"),
                };
                let body = format!(
                    r#"{{"access_token":"{access_token}","refresh_token":"refresh-{number}","expires_in":60{further}}}"#
                );
                (200, body)
            }
            None => (400, r#"{"error":"invalid_grant"}"#.to_owned()),
        };
        Ok(Response::builder().status(status).body(Full::from(body))?)
    }

    fn source(&self, seed: &str) -> OAuth2 {
        let logins = self.clone();
        let server = Server::token_endpoint("https://login.example/token");
        OAuth2::refresh_token(server, ClientAuth::public("id"), seed).with_client(TokenClient::with_service(
            tower::service_fn(move |request| {
                let logins = logins.clone();
                async move { logins.answer(request).await }
            }),
        ))
    }

    fn process(&self, store: &MemoryStore, seed: &str) -> TokenProvider {
        TokenProvider::builder(self.source(seed)).store(store.clone()).build().unwrap()
    }
}

fn logged_in() -> (Logins, MemoryStore) {
    let logins = Logins::default();
    logins.log_in("seed");
    (logins, MemoryStore::default())
}

fn is_login(error: &Error) -> bool {
    matches!(error, Error::Source(error) if error.kind() == SourceErrorKind::LoginRequired)
}

fn stored(store: &MemoryStore) -> String {
    store.kept().record.map(|(record, _)| record.text().to_owned()).unwrap_or_default()
}

/// Starts a refresh, and changes the store while its exchange runs.
async fn refresh_into(
    process: &TokenProvider,
    store: &MemoryStore,
    health: Health,
) -> JoinHandle<Result<Token, Error>> {
    let process = process.clone();
    let refreshing = tokio::spawn(async move { process.token().await });
    sleep(POST / 2).await;
    store.set(health);
    refreshing
}

/// Row 113: at a start and at each expiry, one process of sixteen presents the refresh token.
#[tokio::test(start_paused = true)]
async fn one_process_presents_each_refresh_token() {
    let (logins, store) = logged_in();
    let processes: Vec<_> = (0..16).map(|_| logins.process(&store, "seed")).collect();
    for _ in 0..4 {
        for token in join_all(processes.iter().map(TokenProvider::token)).await {
            token.unwrap();
        }
        advance(MINUTE).await;
    }
    assert_eq!(logins.presented(), ["seed", "refresh-1", "refresh-2", "refresh-3"]);
}

/// Row 114: the process that presents the seed ends; another one, which never had it, continues.
#[tokio::test(start_paused = true)]
async fn stored_seed_outlives_its_process() {
    let (logins, store) = logged_in();
    logins.state().grace = MINUTE;
    let source = logins.source("seed");
    let first = TokenProvider::builder(source).store(store.clone()).build().unwrap();
    assert!(timeout(POST / 2, first.token()).await.is_err());
    assert_eq!(logins.presented(), ["seed"]);
    let record = stored(&store);
    assert!(record.contains(r#""refresh_token":"seed""#) && !record.contains("access"), "{record}");

    let killed = store.kept();
    first.shutdown().await;
    let store = MemoryStore::default();
    store.change(|kept| kept.record = killed.record);
    let other = logins.process(&store, "");
    assert_eq!(other.token().await.unwrap().access_token(), "access-2");
    assert_eq!((logins.presented(), logins.reused()), (vec!["seed".to_owned(); 2], 0));
}

/// Row 152: another process than the one that got it presents the refresh token before that expires.
#[tokio::test(start_paused = true)]
async fn stored_refresh_token_is_presented_before_it_expires() {
    let (logins, store) = logged_in();
    logins.state().further = r#","refresh_expires_in":30"#;
    let first = logins.process(&store, "seed");
    first.token().await.unwrap();
    first.shutdown().await;
    let other = logins.process(&store, "");
    assert_eq!(other.token().await.unwrap().access_token(), "access-1");
    advance(SECOND * 29).await;
    assert_eq!(other.token().await.unwrap().access_token(), "access-2");
    assert_eq!((logins.presented(), logins.reused()), (vec!["seed".to_owned(), "refresh-1".to_owned()], 0));
}

/// Row 115: a process that starts again has its seed, which is spent, and the store, which has a newer refresh token.
#[tokio::test(start_paused = true)]
async fn stored_refresh_token_wins_over_seed() {
    let (logins, store) = logged_in();
    logins.process(&store, "seed").token().await.unwrap();
    advance(MINUTE).await;
    let restarted = logins.process(&store, "seed");
    restarted.token().await.unwrap();
    assert_eq!(logins.presented(), ["seed", "refresh-1"]);

    // The next deployment has the refresh token of a new login, and the stored one does not work any more.
    logins.log_in("seed-2");
    advance(MINUTE).await;
    let restarted = logins.process(&store, "seed-2");
    restarted.token().await.unwrap();
    assert_eq!(logins.presented()[2..], ["refresh-2", "seed-2"]);
}

/// Row 112: a login in one process reaches the others with the store.
#[tokio::test(start_paused = true)]
async fn login_reaches_fleet() {
    let (logins, store) = logged_in();
    let source = logins.source("seed");
    let one = TokenProvider::builder(source.clone()).store(store.clone()).build().unwrap();
    let other = logins.process(&store, "seed");
    one.token().await.unwrap();
    other.token().await.unwrap();
    logins.revoke();
    advance(MINUTE).await;
    assert!(is_login(&one.token().await.unwrap_err()));
    assert!(is_login(&other.token().await.unwrap_err()));
    let presented = logins.presented().len();
    advance(SECOND * 2).await;
    for provider in [&one, &other] {
        assert!(is_login(&provider.token().await.unwrap_err()));
    }
    assert_eq!(logins.presented().len(), presented, "nothing is left to present");

    logins.log_in("login-2");
    source.set_refresh_token("login-2");
    assert_eq!(one.token().await.unwrap().access_token(), "access-2");
    advance(SECOND * 10).await;
    assert_eq!(other.token().await.unwrap().access_token(), "access-2");
    advance(MINUTE).await;
    other.token().await.unwrap();
    assert_eq!(logins.presented()[presented..], ["login-2", "refresh-2"]);
}

/// Row 116: without its store, a process cannot know whether another one has spent the refresh token.
#[tokio::test(start_paused = true)]
async fn refresh_token_waits_for_store() {
    let (logins, store) = logged_in();
    let processes = [logins.process(&store, "seed"), logins.process(&store, "seed")];
    store.set(Health::Down);
    for process in &processes {
        let error = process.token().await.unwrap_err();
        assert!(error.is_transient(), "{error}");
        assert!(error.to_string().contains("must not be presented without it"), "{error}");
    }
    assert_eq!(logins.presented(), [""; 0]);

    store.set(Health::Good);
    sleep(SECOND * 10).await;
    for _ in 0..2 {
        for process in &processes {
            process.token().await.unwrap();
        }
        // Down while the token is expiring: requests use it.
        store.set(Health::Down);
        advance(MINUTE * 95 / 100).await;
        for process in &processes {
            process.token().await.unwrap();
        }
        store.set(Health::Good);
        advance(MINUTE).await;
    }
    assert_eq!(logins.presented(), ["seed", "refresh-1"]);
}

/// Row 117: the store fails between the response and its publication.
#[tokio::test(start_paused = true)]
async fn new_refresh_token_is_stored_before_use() {
    let (logins, store) = logged_in();
    let (one, other) = (logins.process(&store, "seed"), logins.process(&store, "seed"));
    one.token().await.unwrap();
    advance(MINUTE).await;
    let refreshing = refresh_into(&one, &store, Health::Down).await;
    sleep(SECOND * 3).await;
    assert!(!refreshing.is_finished(), "its refresh token is not stored");
    let waiting = tokio::spawn(async move { other.token().await });
    store.set(Health::Good);
    assert_eq!(refreshing.await.unwrap().unwrap().access_token(), "access-2");
    assert!(stored(&store).contains("refresh-2"));
    assert_eq!(waiting.await.unwrap().unwrap().access_token(), "access-2");
    assert_eq!(logins.presented(), ["seed", "refresh-1"]);
}

/// Row 117: the store fails for longer. The token is used after one lease, and is stored later.
#[tokio::test(start_paused = true)]
async fn token_is_used_if_store_stays_down() {
    let (logins, store) = logged_in();
    let one = logins.process(&store, "seed");
    let refreshing = refresh_into(&one, &store, Health::Down).await;
    assert_eq!(refreshing.await.unwrap().unwrap().access_token(), "access-1");
    assert!(!stored(&store).contains("access-1"));
    store.set(Health::Good);
    sleep(MINUTE / 2).await;
    assert!(stored(&store).contains("refresh-1"));
    let lease = store.lease(SECOND).await.unwrap();
    assert!(lease.is_some(), "no lease is left");
}

/// A process that shares no store keeps the login as well, for as long as it runs.
#[tokio::test(start_paused = true)]
async fn single_process_needs_no_store() {
    let (logins, _) = logged_in();
    let provider = TokenProvider::new(logins.source("seed"));
    for _ in 0..20 {
        let tokens = join_all((0..50).map(|_| provider.token())).await;
        assert!(tokens.iter().all(Result::is_ok));
        advance(MINUTE).await;
    }
    assert_eq!((logins.presented().len(), logins.reused()), (20, 0));
}

/// Row 122: a process stores the refresh token of a new login, and does not get a token. Another one does, and rotates it.
#[tokio::test(start_paused = true)]
async fn login_is_handed_over() {
    let (logins, store) = logged_in();
    let source = logins.source("seed");
    let one = TokenProvider::builder(source.clone()).store(store.clone()).build().unwrap();
    let other = logins.process(&store, "seed");
    one.token().await.unwrap();
    other.token().await.unwrap();
    advance(MINUTE).await;
    logins.log_in("login-2");
    source.set_refresh_token("login-2");
    logins.state().refusals.extend([(503, "0"); 3]);
    assert!(one.token().await.unwrap_err().is_transient());
    assert!(stored(&store).contains("login-2"));
    other.token().await.unwrap();
    for _ in 0..3 {
        sleep(SECOND * 5).await;
        one.token().await.unwrap();
        advance(MINUTE).await;
        other.token().await.unwrap();
    }
    assert_eq!(logins.reused(), 0, "{:?}", logins.presented());
}

/// Row 122: each process is told of the login, also one that starts again later.
#[tokio::test(start_paused = true)]
async fn each_process_may_be_told_of_login() {
    let (logins, store) = logged_in();
    let sources = [logins.source("seed"), logins.source("seed"), logins.source("")];
    let processes =
        sources.clone().map(|source| TokenProvider::builder(source).store(store.clone()).build().unwrap());
    for process in &processes {
        process.token().await.unwrap();
    }
    advance(MINUTE).await;
    logins.log_in("login-2");
    for (source, process) in sources.iter().zip(&processes) {
        source.set_refresh_token("login-2");
        process.token().await.unwrap();
        advance(MINUTE).await;
    }
    let restarted = logins.source("");
    restarted.set_refresh_token("login-2");
    let restarted = TokenProvider::builder(restarted).store(store.clone()).build().unwrap();
    for process in processes.iter().chain([&restarted]) {
        process.token().await.unwrap();
        advance(MINUTE).await;
    }
    let presented = logins.presented();
    assert_eq!(
        presented.iter().filter(|refresh_token| *refresh_token == "login-2").count(),
        1,
        "{presented:?}"
    );
    assert_eq!(logins.reused(), 0, "{presented:?}");
}

/// Rows 113, 122 and 125: three processes, with random failures, restarts, dropped callers and a new login.
#[tokio::test(start_paused = true)]
async fn random_fleet_keeps_login() {
    for number in 0..300 {
        let (logins, store) = logged_in();
        logins.state().chance = Some(Chance(number));
        let mut chance = Chance(number + 1000);
        let start = |seed: &str| {
            let source = logins.source(seed);
            (TokenProvider::builder(source.clone()).store(store.clone()).build().unwrap(), source)
        };
        let mut processes = [start("seed"), start("seed"), start("")];
        for step in 0..40 {
            let one = chance.draw(3) as usize;
            match chance.draw(10) {
                // With the last login, as if its configuration had it.
                0 => processes[one] = start(if step > 15 { "login-2" } else { "seed" }),
                1 if step > 15 => processes[one].1.set_refresh_token("login-2"),
                _ => {}
            }
            if step == 15 {
                logins.log_in("login-2");
                processes[one].1.set_refresh_token("login-2");
            }
            for (process, _) in &processes {
                let _ = timeout(Duration::from_millis(chance.draw(2000)), process.token()).await;
            }
            sleep(Duration::from_millis(chance.draw(40_000))).await;
        }
        assert_eq!(logins.reused(), 0, "{number}: {:?}", logins.presented());
    }
}

/// Row 123: a record that cannot be read may have the refresh token that works. It is neither ignored nor replaced.
#[tokio::test(start_paused = true)]
async fn unreadable_record_is_not_replaced() {
    let (logins, store) = logged_in();
    let running = logins.process(&store, "seed");
    running.token().await.unwrap();
    advance(MINUTE).await;
    let wrong = EncryptedStore::new(store.clone(), EncryptionKeys::new("2", &[9; 32]).unwrap());
    let wrong = TokenProvider::builder(logins.source("seed")).store(wrong).build().unwrap();
    let error = wrong.token().await.unwrap_err();
    assert!(error.to_string().contains("must not be presented without it"), "{error}");
    assert!(wrong.status().store.is_some_and(|store| !store.is_usable()), "the store fails");
    running.token().await.unwrap();
    assert_eq!(logins.presented(), ["seed", "refresh-1"]);
}

/// Row 124: the access token stays the same while the refresh tokens rotate.
#[tokio::test(start_paused = true)]
async fn same_access_token_may_have_new_refresh_token() {
    let (logins, store) = logged_in();
    logins.state().is_same = true;
    let processes = [logins.process(&store, "seed"), logins.process(&store, "seed")];
    for _ in 0..3 {
        for process in &processes {
            process.token().await.unwrap();
            advance(MINUTE).await;
        }
    }
    assert_eq!(logins.reused(), 0, "{:?}", logins.presented());
}

/// Row 125: the exchange starts late in a refresh, whose timeout ends it. Its token is used by the next one.
#[tokio::test(start_paused = true)]
async fn exchange_outlives_its_refresh() {
    let (logins, _) = logged_in();
    logins.state().refusals.push_back((503, "25"));
    logins.state().delay = SECOND * 10;
    let provider = TokenProvider::new(logins.source("seed"));
    provider.token().await.unwrap_err();
    assert_eq!(provider.token().await.unwrap().access_token(), "access-1");
    advance(MINUTE).await;
    assert_eq!(provider.token().await.unwrap().access_token(), "access-2");
    assert_eq!(logins.presented(), ["seed", "refresh-1"]);

    // Nobody asks before that token has expired, too: its refresh token is used.
    let (logins, _) = logged_in();
    logins.state().delay = SECOND * 10;
    let provider = TokenProvider::builder(logins.source("seed")).refresh_timeout(SECOND * 5).build().unwrap();
    provider.token().await.unwrap_err();
    sleep(MINUTE * 2).await;
    assert_eq!(provider.token().await.unwrap().access_token(), "access-2");
    assert_eq!(logins.presented(), ["seed", "refresh-1"]);
}

/// Row 125: the refresh times out, and another process needs a token before the exchange ends.
#[tokio::test(start_paused = true)]
async fn lease_outlives_its_refresh() {
    let (logins, store) = logged_in();
    let build = || {
        let builder = TokenProvider::builder(logins.source("seed")).store(store.clone());
        builder.lease(SECOND * 2).refresh_timeout(SECOND * 5).build().unwrap()
    };
    let (one, other) = (build(), build());
    logins.state().delay = SECOND * 15;
    one.token().await.unwrap_err();
    let mut refreshes = 0;
    while other.token().await.is_err() {
        refreshes += 1;
    }
    assert!(refreshes > 1, "the exchange runs for longer than a refresh of the other process");
    assert_eq!(one.token().await.unwrap().access_token(), "access-1");
    assert_eq!(logins.presented(), ["seed"]);
}

/// Row 126: two providers of one program have clones of the source.
#[tokio::test(start_paused = true)]
async fn clones_share_refresh_token() {
    let (logins, _) = logged_in();
    let source = logins.source("seed");
    let providers = [TokenProvider::new(source.clone()), TokenProvider::new(source)];
    for _ in 0..5 {
        for token in join_all(providers.iter().map(TokenProvider::token)).await {
            token.unwrap();
        }
        advance(MINUTE).await;
    }
    assert_eq!(logins.reused(), 0, "{:?}", logins.presented());
}

/// Row 117: the refresh ends while its token is being stored, and nobody asks before that has expired.
#[tokio::test(start_paused = true)]
async fn token_is_stored_after_its_refresh() {
    let (logins, store) = logged_in();
    let builder = TokenProvider::builder(logins.source("seed")).store(store.clone());
    let one = builder.refresh_timeout(SECOND * 5).build().unwrap();
    one.token().await.unwrap();
    advance(MINUTE).await;
    let refreshing = refresh_into(&one, &store, Health::Down).await;
    refreshing.await.unwrap().unwrap_err();
    store.set(Health::Good);
    sleep(MINUTE * 2).await;
    let other = logins.process(&store, "seed");
    other.token().await.unwrap();
    assert_eq!(logins.presented(), ["seed", "refresh-1", "refresh-2"]);
}

/// Row 117: the store has no room for longer than a lease. No other process gets the lease meanwhile.
#[tokio::test(start_paused = true)]
async fn lease_is_kept_until_token_is_stored() {
    let (logins, store) = logged_in();
    let (one, other) = (logins.process(&store, "seed"), logins.process(&store, "seed"));
    one.token().await.unwrap();
    other.token().await.unwrap();
    advance(MINUTE).await;
    let refreshing = refresh_into(&one, &store, Health::Full).await;
    assert_eq!(refreshing.await.unwrap().unwrap().access_token(), "access-2", "after one lease");
    other.token().await.unwrap_err();
    store.set(Health::Good);
    assert_eq!(other.token().await.unwrap().access_token(), "access-2");
    assert_eq!(logins.presented(), ["seed", "refresh-1"]);
}

/// Row 127: with a store, another process has to present the refresh token of an unusable response.
#[tokio::test(start_paused = true)]
async fn refresh_token_of_unusable_response_is_stored() {
    let (logins, store) = logged_in();
    let (one, other) = (logins.process(&store, "seed"), logins.process(&store, "seed"));
    one.token().await.unwrap();
    other.token().await.unwrap();
    advance(MINUTE).await;
    logins.state().is_unusable = true;
    one.token().await.unwrap_err();
    logins.state().is_unusable = false;
    other.token().await.unwrap();
    assert_eq!(logins.reused(), 0, "{:?}", logins.presented());
}

/// Row 126: a provider with a clone of the source is idle for many rotations.
#[tokio::test(start_paused = true)]
async fn idle_clone_presents_newest_refresh_token() {
    let (logins, _) = logged_in();
    let source = logins.source("seed");
    let (busy, idle) = (TokenProvider::new(source.clone()), TokenProvider::new(source));
    idle.token().await.unwrap();
    for _ in 0..100 {
        busy.token().await.unwrap();
        advance(MINUTE).await;
    }
    idle.token().await.unwrap();
    assert_eq!(logins.reused(), 0, "{:?}", logins.presented());
}

/// Row 114: a process that starts again stores its seed, though another one has a token of that login to store.
#[tokio::test(start_paused = true)]
async fn seed_does_not_outlive_later_token() {
    let (logins, store) = logged_in();
    let one = logins.process(&store, "seed");
    one.token().await.unwrap();
    advance(MINUTE).await;
    let refreshing = refresh_into(&one, &store, Health::Down).await;
    refreshing.await.unwrap().unwrap();
    store.flush();
    store.set(Health::Good);
    let text = r#"{"schema":1,"refresh_token":"seed","login":"GbJYVuHBUMqDTP_ItZsjrQ"}"#;
    store.put(text, Duration::ZERO);
    sleep(MINUTE * 2).await;
    assert!(stored(&store).contains("refresh-2"), "{}", stored(&store));
    one.token().await.unwrap();
    assert_eq!(logins.presented(), ["seed", "refresh-1", "refresh-2"]);
}
