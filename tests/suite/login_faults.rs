//! Logins of several users that meet faults of a store, of an authorization server, or of a configuration: no login is lost,
//! and nobody gets the token of another user.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use tokio::time::{Instant, advance, sleep};
use tower_bearer::{
    BoxError, OAuth2, TokenClient, TokenProvider,
    oauth2::{ClientAuth, Server},
    store::{Role, TokenStore},
};

use crate::support::{
    fleet::{Health, MINUTE, MemoryStore, POST},
    logins::{Act, Auth, SECOND, exchange, is_login, stored, user},
};

/// A known login is given while a new one has not begun.
#[tokio::test(start_paused = true)]
async fn known_login_does_not_bury_pending() {
    for has_store in [false, true] {
        let (auth, store) = (Auth::new(&["A", "B", "C"]), MemoryStore::default());
        let p = if has_store { auth.process(&store, "A") } else { auth.single("A") };
        p.token().await.unwrap();
        p.log_in("B");
        assert_eq!(user(&p.token().await.unwrap()), "B");
        // C logs in; something then repeats an older, known login, which is documented to be ignored.
        p.log_in("C");
        p.log_in("A");
        let got = p.token().await.map(|t| user(&t));
        assert_eq!(got.unwrap(), "C", "store: {has_store}: {:?}", auth.presented());
    }
}

/// The login that is in use is given again while a new one has not begun.
#[tokio::test(start_paused = true)]
async fn login_in_use_does_not_bury_pending() {
    let auth = Auth::new(&["A", "B"]);
    let p = auth.single("A");
    p.token().await.unwrap();
    p.log_in("B");
    p.log_in("A");
    assert_eq!(user(&p.token().await.unwrap()), "B", "{:?}", auth.presented());
}

/// A login that only the store knows is given while a new one has not begun.
#[tokio::test(start_paused = true)]
async fn login_known_to_store_does_not_bury_pending() {
    for is_current in [false, true] {
        let (auth, store) = (Auth::new(&["A", "B", "C"]), MemoryStore::default());
        let q = auth.process(&store, "A");
        q.token().await.unwrap();
        q.log_in("B");
        q.token().await.unwrap();
        let p = auth.process(&store, "");
        p.log_in("C");
        // This process has not read the store yet.
        p.log_in(if is_current { "B" } else { "A" });
        let expected = if is_current { "B" } else { "C" };
        assert_eq!(user(&p.token().await.unwrap()), expected, "{:?}", auth.presented());
        q.invalidate();
        assert_eq!(user(&q.token().await.unwrap()), expected, "{:?}", auth.presented());
    }
}

/// A caller waits for the refresh of a token that works, a user logs in, and the server rejects the new login.
#[tokio::test(start_paused = true)]
async fn waiter_gets_no_token_of_login_before() {
    let auth = Auth::new(&["A"]);
    let p = auth.single("A");
    p.token().await.unwrap();
    advance(SECOND * 57).await; // expiring
    let waiting = tokio::spawn({
        let p = p.clone();
        async move { p.token().await }
    });
    sleep(POST / 2).await;
    assert!(!waiting.is_finished());
    p.log_in("B"); // unknown to the server: invalid_grant
    let got = waiting.await.unwrap();
    assert!(got.is_err(), "after log_in(B): {:?}", got.map(|t| t.access_token().to_owned()));
}

/// The store loses its newest record, and has that of the user before.
#[tokio::test(start_paused = true)]
async fn failover_does_not_bring_user_before_back() {
    let (auth, store) = (Auth::new(&["A", "B"]), MemoryStore::default());
    auth.state().lifetime = 600;
    let (p, q) = (auth.process(&store, "A"), auth.process(&store, "A"));
    p.token().await.unwrap();
    q.token().await.unwrap();
    let before = store.kept().record;
    p.log_in("B");
    assert_eq!(user(&p.token().await.unwrap()), "B");
    // A failover loses the newest writes. Then the other process refreshes.
    store.change(|kept| kept.record = before);
    advance(SECOND * 599).await;
    q.token().await.unwrap();
    advance(SECOND * 5).await;
    let got = p.token().await.unwrap();
    assert_eq!(user(&got), "B", "p was told log_in(B): {:?}", auth.presented());
}

/// The store loses its newest record, and has that of the user before, while the new login has no token yet.
#[tokio::test(start_paused = true)]
async fn failover_before_first_token() {
    let (auth, store) = (Auth::new(&["A", "B"]), MemoryStore::default());
    auth.state().lifetime = 600;
    let q = auth.process(&store, "A");
    q.token().await.unwrap();
    let before = store.kept().record;
    let p = auth.process(&store, "");
    p.log_in("B");
    auth.state().acts.extend(vec![Act::Answer(503, "text/plain", ""); 3]);
    p.token().await.unwrap_err();
    store.change(|kept| kept.record = before);
    sleep(SECOND * 5).await;
    let got = p.token().await.unwrap();
    assert_eq!(user(&got), "B", "p was told log_in(B): {:?}", auth.presented());
}

/// A restart has a wrong client id, which is corrected later.
#[tokio::test(start_paused = true)]
async fn typing_error_in_client_id_costs_no_login() {
    let (auth, store) = (Auth::new(&["A"]), MemoryStore::default());
    auth.state().clients = Some(["id".to_owned()].into());
    let p = auth.process(&store, "A");
    for _ in 0..3 {
        p.token().await.unwrap();
        advance(MINUTE).await;
    }
    drop(p);
    let typo = TokenProvider::builder(auth.source_of("idd")).login("A").store(store.clone()).build().unwrap();
    typo.token().await.unwrap_err();
    drop(typo);
    sleep(MINUTE).await;
    let p = auth.process(&store, "A");
    let got = p.token().await;
    assert!(
        got.is_ok() && auth.state().reused.is_empty(),
        "{got:?}: {:?}\n{}",
        auth.presented(),
        stored(&store)
    );
}

/// The subject of an exchange is the login of another user, on the same store.
#[tokio::test(start_paused = true)]
async fn record_of_exchange_belongs_to_login() {
    let auth = Auth::new(&["A", "B"]);
    let store = MemoryStore::default();
    let outer = exchange(auth.process(&MemoryStore::default(), "A")).store(store.clone()).build().unwrap();
    assert!(outer.token().await.unwrap().access_token().contains("-A-"));
    // A restart with another user's login.
    let outer = exchange(auth.process(&MemoryStore::default(), "B")).store(store.clone()).build().unwrap();
    let got = outer.token().await.unwrap();
    assert!(got.access_token().contains("-B-"), "a restart with B: {}", got.access_token());
}

async fn posts_in_20_minutes(answer: Act) -> (u32, bool) {
    let auth = Auth::new(&["A"]);
    let p = auth.single("A");
    p.token().await.unwrap();
    auth.state().always = Some(answer);
    advance(MINUTE).await;
    let begun = Instant::now();
    let before = auth.state().presented.len();
    let mut login = true;
    while begun.elapsed() < MINUTE * 20 {
        if let Err(error) = p.token().await {
            login &= is_login(&error);
        }
        sleep(SECOND / 2).await;
    }
    let n = u32::try_from(auth.state().presented.len() - before).unwrap();
    (n, login)
}

/// Each answer has a new refresh token, and no usable access token.
#[tokio::test(start_paused = true)]
async fn unusable_answers_are_bounded_in_rate() {
    let (posts, _) = posts_in_20_minutes(Act::Unusable).await;
    // A tenth of the outage, a minute at most: about 25 + 20.
    assert!(posts < 120, "{posts} in 20 minutes");
}

/// A human repairs what was doubtful, and restarts the program.
#[tokio::test(start_paused = true)]
async fn ready_asks_after_restart_in_doubt() {
    let (auth, store) = (Auth::new(&["A"]), MemoryStore::default());
    let p = auth.process(&store, "A");
    p.token().await.unwrap();
    advance(MINUTE).await;
    auth.state().acts.push_back(Act::Answer(403, "application/json", r#"{"error":"inactive_user"}"#));
    p.token().await.unwrap_err();
    // The human repairs it, and starts the program again.
    let p = auth.process(&store, "A");
    let got = p.ready().await;
    assert!(got.is_ok(), "{got:?}");
}

/// A human repairs what was doubtful, and restarts another process than the one that has recorded the doubt.
#[tokio::test(start_paused = true)]
async fn ready_asks_in_fleet() {
    let (auth, store) = (Auth::new(&["A"]), MemoryStore::default());
    let (p, q) = (auth.process(&store, "A"), auth.process(&store, "A"));
    p.token().await.unwrap();
    q.token().await.unwrap();
    advance(MINUTE).await;
    auth.state().always = Some(Act::Answer(403, "application/json", r#"{"error":"inactive_user"}"#));
    p.token().await.unwrap_err();
    q.token().await.unwrap_err();
    sleep(MINUTE).await;
    p.token().await.unwrap_err(); // doubts again, with a newer record
    auth.state().always = None;
    let got = q.ready().await;
    assert!(got.is_ok(), "{got:?}");
}

/// A process with an old record gets a doubtful answer, and another one has a newer refresh token.
#[tokio::test(start_paused = true)]
async fn doubting_laggard_does_not_bury_newer_chain() {
    let (auth, store) = (Auth::new(&["A"]), MemoryStore::default());
    auth.state().lenient = true;
    let (ahead, laggard) = (auth.process(&store, "A"), auth.process(&store, "A"));
    ahead.token().await.unwrap();
    laggard.token().await.unwrap();
    let lost = store.kept();
    advance(MINUTE).await;
    ahead.token().await.unwrap();
    store.change(|kept| kept.record = lost.record);
    // The server says of a spent refresh token what many say.
    auth.state().acts.push_back(Act::Answer(400, "application/json", r#"{"error":"Bad Request"}"#));
    laggard.token().await.unwrap_err();
    advance(MINUTE).await;
    let got = ahead.token().await;
    assert!(got.is_ok(), "{got:?} {:?}\n{}", auth.presented(), stored(&store));
}

/// The store is flushed, and a restart has the first refresh token, which is spent.
#[tokio::test(start_paused = true)]
async fn rejected_seed_does_not_bury_newer_chain() {
    let (auth, store) = (Auth::new(&["A"]), MemoryStore::default());
    auth.state().lenient = true;
    let ahead = auth.process(&store, "A");
    ahead.token().await.unwrap();
    advance(MINUTE).await;
    ahead.token().await.unwrap();
    store.flush();
    let restarted = auth.process(&store, "A");
    restarted.token().await.unwrap_err();
    advance(MINUTE).await;
    let got = ahead.token().await;
    assert!(got.is_ok(), "{got:?} {:?}\n{}", auth.presented(), stored(&store));
}

/// A reader is configured with a login.
#[tokio::test(start_paused = true)]
async fn reader_with_login_reads() {
    let (auth, store) = (Auth::new(&["A"]), MemoryStore::default());
    let p = auth.process(&store, "A");
    let reader = auth.builder("A").store(store.clone()).role(Role::Reader).build();
    let Ok(reader) = reader else { return };
    p.token().await.unwrap();
    let got = reader.token().await;
    assert!(got.is_ok(), "{got:?}");
}

/// A reader is given a login.
#[tokio::test(start_paused = true)]
async fn reader_told_of_login_reads() {
    let (auth, store) = (Auth::new(&["A", "B"]), MemoryStore::default());
    let p = auth.process(&store, "A");
    p.token().await.unwrap();
    let reader = TokenProvider::reader(store.clone()).build().unwrap();
    reader.token().await.unwrap();
    p.log_in("B");
    p.token().await.unwrap();
    reader.log_in("B");
    let got = reader.token().await;
    assert!(got.is_ok(), "{got:?}");
}

/// A source that presents no refresh tokens is given a login.
#[tokio::test(start_paused = true)]
async fn client_credentials_do_not_give_token_of_user() {
    let service = tower::service_fn(|_: Request<String>| async move {
        Ok::<_, BoxError>(Response::new(Full::<Bytes>::from(r#"{"access_token":"client","expires_in":60}"#)))
    });
    let source =
        OAuth2::client_credentials(Server::token_endpoint("https://a/t"), ClientAuth::basic("i", "s"))
            .with_client(TokenClient::with_service(service));
    let source = Arc::new(source);
    let error = TokenProvider::builder(Arc::clone(&source)).login("user").build().unwrap_err();
    assert!(error.to_string().contains("takes no refresh token of a login"), "{error}");
    let store = MemoryStore::default();
    let build = || TokenProvider::builder(Arc::clone(&source)).store(store.clone()).build().unwrap();
    let provider = build();
    provider.token().await.unwrap();
    provider.log_in("user");
    let error = provider.token().await.unwrap_err();
    assert!(error.to_string().contains("takes no refresh token of a login"), "{error}");
    // The login is not stored: a restart works again.
    build().token().await.unwrap();
}

/// The store is down for longer than a lease during an exchange.
#[tokio::test(start_paused = true)]
async fn outage_during_exchange() {
    let mut lost = 0;
    for seed in 0..40_u64 {
        let (auth, store) = (Auth::new(&["A"]), MemoryStore::default());
        let fleet: Vec<_> = (0..4).map(|_| auth.process(&store, "A")).collect();
        for p in &fleet {
            p.token().await.unwrap();
        }
        advance(MINUTE).await;
        let one = tokio::spawn({
            let p = fleet[0].clone();
            async move { p.token().await }
        });
        sleep(POST / 2).await;
        store.set(Health::Down);
        let busy: Vec<_> = fleet[1..]
            .iter()
            .map(|p| {
                let p = p.clone();
                tokio::spawn(async move {
                    loop {
                        let _ = p.token().await;
                        sleep(Duration::from_millis(50)).await;
                    }
                })
            })
            .collect();
        sleep(SECOND * 15 + Duration::from_millis(37 * seed)).await;
        store.set(Health::Good);
        sleep(SECOND * 20).await;
        let _ = one.await;
        busy.iter().for_each(|task| task.abort());
        lost += u32::from(!auth.state().reused.is_empty());
    }
    assert_eq!(lost, 0, "of 40 logins");
}

/// The runtime of a call ends while its token is being stored.
#[test]
fn new_refresh_token_is_stored_before_use() {
    let (auth, store) = (Auth::new(&["A"]), MemoryStore::default());
    auth.state().lifetime = 20;
    auth.state().grace = Duration::from_millis(50);
    let rt = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let p = auth.builder("A").store(store.clone()).lease(SECOND).build().unwrap();
    rt().block_on(async { p.token().await.unwrap() });
    p.invalidate();
    // The caller is gone, and its runtime, while the record is being published.
    store.change(|kept| kept.publication_takes = Duration::ZERO);
    rt().block_on(async {
        let call = tokio::spawn({
            let p = p.clone();
            async move { p.token().await }
        });
        sleep(POST / 2).await;
        store.set(Health::Slow);
        sleep(SECOND).await;
        drop(call);
    });
    store.set(Health::Good);
    let got = rt().block_on(async { p.token().await });
    eprintln!("{got:?} {}", stored(&store));
    let newest = format!("r-A-{}", auth.state().granted);
    assert!(got.is_err() || stored(&store).contains(&newest), "used before it is stored: {}", stored(&store));
}

/// The refresh token in a configuration gets a rejection without a known code. It may be right, so no process continues
/// as the user before; if it is wrong, a correction costs nothing.
#[tokio::test(start_paused = true)]
async fn doubtful_rejection_of_configured_login() {
    for is_right in [true, false] {
        let (auth, store) = (Auth::new(&["A"]), MemoryStore::default());
        if is_right {
            auth.user("B");
        }
        auth.process(&store, "A").token().await.unwrap();
        auth.state().acts.push_back(Act::Answer(401, "application/json", r#"{"error":"Unauthorized"}"#));
        let process = auth.process(&store, "B");
        assert!(is_login(&process.token().await.unwrap_err()));
        advance(MINUTE / 2).await;
        let other = auth.process(&store, "");
        assert!(is_login(&process.token().await.unwrap_err()));
        assert!(is_login(&other.token().await.unwrap_err()));
        let expected = if is_right { "B" } else { "A" };
        drop((process, other));
        advance(MINUTE).await;
        let process = auth.process(&store, expected);
        assert_eq!(user(&process.token().await.unwrap()), expected, "{:?}", auth.presented());
        assert!(auth.state().reused.is_empty());
    }
}

/// A provider of a group is given a login, and is idle.
#[cfg(feature = "tenants")]
#[tokio::test(start_paused = true)]
async fn eviction_does_not_lose_pending_login() {
    use tower_bearer::TokenProviders;
    let auth = Auth::new(&["A", "B"]);
    let stores: Arc<Mutex<HashMap<u32, MemoryStore>>> = Arc::default();
    let made = auth.clone();
    let providers = TokenProviders::builder(move |key: &u32| {
        let store = stores.lock().unwrap().entry(*key).or_default().clone();
        let seed = if *key == 0 { "A".to_owned() } else { format!("none-{key}") };
        Ok::<_, BoxError>(made.builder(&seed).store(store))
    })
    .idle_timeout(SECOND * 10)
    .build()
    .unwrap();
    providers.get(&0).unwrap().token().await.unwrap();
    providers.get(&0).unwrap().log_in("B");
    sleep(MINUTE).await;
    for key in 1..20 {
        providers.get(&key).unwrap();
        sleep(SECOND).await;
    }
    let got = providers.get(&0).unwrap().token().await.unwrap();
    assert_eq!(user(&got), "B", "after log_in(B): {:?}", auth.presented());
}

/// A user logs in before the configured login has begun.
#[tokio::test(start_paused = true)]
async fn configured_login_is_known_after_log_in() {
    let (auth, store) = (Auth::new(&["A", "B"]), MemoryStore::default());
    let p = auth.process(&store, "A");
    p.log_in("B");
    assert_eq!(user(&p.token().await.unwrap()), "B");
    // The same program starts again, or a second process of it, with its configuration unchanged.
    let again = auth.process(&store, "A");
    let got = again.token().await.unwrap();
    advance(MINUTE).await;
    let told = p.token().await.unwrap();
    assert_eq!((&*user(&got), &*user(&told)), ("B", "B"), "{:?}", auth.presented());
}

/// A store that takes long to release a lease.
struct SlowRelease(MemoryStore);

impl TokenStore for SlowRelease {
    fn namespace(&self) -> &str {
        self.0.namespace()
    }
    async fn load(&self) -> Result<Option<tower_bearer::store::Record>, tower_bearer::store::StoreError> {
        self.0.load().await
    }
    async fn lease(
        &self,
        length: Duration,
    ) -> Result<Option<tower_bearer::store::Lease>, tower_bearer::store::StoreError> {
        self.0.lease(length).await
    }
    async fn publish(
        &self,
        lease: &tower_bearer::store::Lease,
        record: tower_bearer::store::Record,
    ) -> Result<tower_bearer::store::Publication, tower_bearer::store::StoreError> {
        self.0.publish(lease, record).await
    }
    async fn release(
        &self,
        lease: tower_bearer::store::Lease,
    ) -> Result<(), tower_bearer::store::StoreError> {
        sleep(Duration::from_millis(1900)).await;
        self.0.release(lease).await
    }
}

/// A stored token expires while its lease is being released.
#[tokio::test(start_paused = true)]
async fn expired_record_stays_expired() {
    let (auth, store) = (Auth::new(&["A"]), MemoryStore::default());
    let one = auth.process(&store, "A");
    one.token().await.unwrap();
    let (kept, _) = store.kept().record.unwrap();
    store.flush();
    let text = kept.text().to_owned();
    store.change(|kept| {
        kept.before_lease =
            Some(tower_bearer::store::Record::new(100, text).expires_in(Duration::from_millis(1500)));
    });
    let other = auth.builder("").store(SlowRelease(store.clone())).build().unwrap();
    let got = other.token().await.unwrap();
    assert!(got.access_token() != "acc-A-1" || got.remaining().is_some(), "no lifetime: {got:?}");
}
