//! Processes that share the login of a user: one refresh token, which a server revokes if it is presented twice.

use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use http::{Request, Response};
use http_body_util::Full;
use tokio::{
    task::JoinHandle,
    time::{Instant, advance, sleep, timeout},
};
use tower_bearer::{
    BoxError, Error, OAuth2, Token, TokenClient, TokenProvider,
    oauth2::{ClientAuth, Server},
    store::{Extension, Lease, Publication, Record, StoreError, TokenStore},
};
use tower_bearer_store::{EncryptedStore, EncryptionKeys};

use crate::support::{
    fleet::{Chance, Health, MINUTE, MemoryStore, POST},
    logins::{Act, Auth, SECOND, is_login, stored, user},
    runs,
};

/// The life of a process: what it does ends with it, between any two steps.
#[derive(Clone, Default)]
struct Life(tokio::sync::watch::Sender<bool>);

impl Life {
    fn end(&self) {
        self.0.send_replace(true);
    }

    async fn of<T>(&self, doing: impl Future<Output = T>) -> T {
        let mut ended = self.0.subscribe();
        let ended = async move { ended.wait_for(|has_ended| *has_ended).await.is_ok() };
        tokio::select! {
            biased;
            _ = ended => std::future::pending().await,
            done = doing => done,
        }
    }
}

/// The store, as a process that may be killed uses it.
struct Mortal(MemoryStore, Life);

impl TokenStore for Mortal {
    fn namespace(&self) -> &str {
        "memory"
    }

    async fn load(&self) -> Result<Option<Record>, StoreError> {
        self.1.of(self.0.load()).await
    }

    async fn lease(&self, length: Duration) -> Result<Option<Lease>, StoreError> {
        self.1.of(self.0.lease(length)).await
    }

    async fn extend(&self, lease: &Lease, length: Duration) -> Result<Extension, StoreError> {
        self.1.of(self.0.extend(lease, length)).await
    }

    async fn publish(&self, lease: &Lease, record: Record) -> Result<Publication, StoreError> {
        self.1.of(self.0.publish(lease, record)).await
    }

    async fn release(&self, lease: Lease) -> Result<(), StoreError> {
        self.1.of(self.0.release(lease)).await
    }
}

fn logged_in() -> (Auth, MemoryStore) {
    (Auth::new(&["seed"]), MemoryStore::default())
}

/// Logs a user in, which ends the login before.
fn log_in(logins: &Auth, user: &str) {
    logins.state().tokens.clear();
    logins.user(user);
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

/// Sixteen processes that share a login start, or find their token expired, at one moment: one of them presents the
/// refresh token.
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
    assert_eq!(logins.processed(), ["seed", "r-seed-1", "r-seed-2", "r-seed-3"]);
}

/// The process that presents the seed ends; another one, which never had it, continues.
#[tokio::test(start_paused = true)]
async fn stored_seed_outlives_its_process() {
    let (logins, store) = logged_in();
    logins.state().grace = MINUTE;
    let first = logins.process(&store, "seed");
    assert!(timeout(POST / 2, first.token()).await.is_err());
    assert_eq!(logins.processed(), ["seed"]);
    let record = stored(&store);
    assert!(record.contains(r#""refresh_token":"seed""#) && !record.contains("access"), "{record}");

    let killed = store.kept();
    first.shutdown().await;
    let store = MemoryStore::default();
    store.change(|kept| kept.record = killed.record);
    let other = logins.process(&store, "");
    assert_eq!(other.token().await.unwrap().access_token(), "acc-seed-2");
    assert_eq!((logins.processed(), logins.reused()), (vec!["seed".to_owned(); 2], 0));
}

/// A process is killed while it refreshes ahead of the expiry, and starts again: the stored access token works for longer
/// than the server accepts the refresh token that the process has spent.
#[tokio::test(start_paused = true)]
async fn process_killed_while_refreshing_ahead() {
    let (logins, store) = logged_in();
    (logins.state().grace, logins.state().lifetime) = (SECOND * 30, 3600);
    let life = Life::default();
    let first = logins.builder("seed").store(Mortal(store.clone(), life.clone())).build().unwrap();
    first.token().await.unwrap();
    sleep(SECOND * 3_300).await;
    tokio::spawn(async move { first.token().await });
    sleep(POST / 2).await;
    assert_eq!(logins.processed(), ["seed", "r-seed-1"]);
    life.end();

    let second = logins.process(&store, "seed");
    for _ in 0..60 {
        second.token().await.unwrap();
        sleep(SECOND * 10).await;
    }
    assert_eq!((logins.processed()[2..].to_vec(), logins.reused()), (vec!["r-seed-1".to_owned()], 0));
}

/// A stored refresh token expires before the access token: another process than the one that got it presents it in
/// time.
#[tokio::test(start_paused = true)]
async fn stored_refresh_token_is_presented_before_it_expires() {
    let (logins, store) = logged_in();
    logins.state().further = r#","refresh_expires_in":30"#;
    let first = logins.process(&store, "seed");
    first.token().await.unwrap();
    first.shutdown().await;
    let other = logins.process(&store, "");
    assert_eq!(other.token().await.unwrap().access_token(), "acc-seed-1");
    advance(SECOND * 29).await;
    assert_eq!(other.token().await.unwrap().access_token(), "acc-seed-2");
    assert_eq!((logins.processed(), logins.reused()), (vec!["seed".to_owned(), "r-seed-1".to_owned()], 0));
}

/// A process that starts again has its seed, which is spent, and the store, which has a newer refresh token.
#[tokio::test(start_paused = true)]
async fn stored_refresh_token_wins_over_seed() {
    let (logins, store) = logged_in();
    logins.process(&store, "seed").token().await.unwrap();
    advance(MINUTE).await;
    let restarted = logins.process(&store, "seed");
    restarted.token().await.unwrap();
    assert_eq!(logins.processed(), ["seed", "r-seed-1"]);

    // The next deployment has the refresh token of a new login.
    log_in(&logins, "seed-2");
    advance(MINUTE).await;
    let restarted = logins.process(&store, "seed-2");
    restarted.token().await.unwrap();
    assert_eq!(logins.processed()[2..], ["seed-2"]);
}

/// A user logs in to one process, and the others have only the store.
#[tokio::test(start_paused = true)]
async fn login_reaches_fleet() {
    let (logins, store) = logged_in();
    let (one, other) = (logins.process(&store, "seed"), logins.process(&store, "seed"));
    one.token().await.unwrap();
    other.token().await.unwrap();
    logins.state().tokens.clear();
    advance(MINUTE).await;
    assert!(is_login(&one.token().await.unwrap_err()));
    assert!(is_login(&other.token().await.unwrap_err()));
    let presented = logins.processed().len();
    advance(SECOND * 2).await;
    for provider in [&one, &other] {
        assert!(is_login(&provider.token().await.unwrap_err()));
    }
    assert_eq!(logins.processed().len(), presented, "nothing is left to present");

    log_in(&logins, "second");
    one.log_in("second");
    assert_eq!(one.token().await.unwrap().access_token(), "acc-second-2");
    advance(SECOND * 10).await;
    assert_eq!(other.token().await.unwrap().access_token(), "acc-second-2");
    advance(MINUTE).await;
    other.token().await.unwrap();
    assert_eq!(logins.processed()[presented..], ["second", "r-second-2"]);
}

/// The store of a login is down, so a process cannot know whether another one has spent the refresh token.
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
    assert_eq!(logins.processed(), [""; 0]);

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
    assert_eq!(logins.processed(), ["seed", "r-seed-1"]);
}

/// The store of a login fails between the response and its publication.
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
    assert_eq!(refreshing.await.unwrap().unwrap().access_token(), "acc-seed-2");
    assert!(stored(&store).contains("r-seed-2"));
    assert_eq!(waiting.await.unwrap().unwrap().access_token(), "acc-seed-2");
    assert_eq!(logins.processed(), ["seed", "r-seed-1"]);
}

/// The store of a login fails for longer. The token is used after one lease, and is stored later.
#[tokio::test(start_paused = true)]
async fn token_is_used_if_store_stays_down() {
    let (logins, store) = logged_in();
    let one = logins.process(&store, "seed");
    let refreshing = refresh_into(&one, &store, Health::Down).await;
    assert_eq!(refreshing.await.unwrap().unwrap().access_token(), "acc-seed-1");
    assert!(!stored(&store).contains("acc-seed-1"));
    store.set(Health::Good);
    sleep(MINUTE / 2).await;
    assert!(stored(&store).contains("r-seed-1"));
    let lease = store.lease(SECOND).await.unwrap();
    assert!(lease.is_some(), "no lease is left");
}

/// A process that shares no store keeps the login as well, for as long as it runs.
#[tokio::test(start_paused = true)]
async fn single_process_needs_no_store() {
    let (logins, _) = logged_in();
    let provider = logins.single("seed");
    for _ in 0..20 {
        let tokens = join_all((0..50).map(|_| provider.token())).await;
        assert!(tokens.iter().all(Result::is_ok));
        advance(MINUTE).await;
    }
    assert_eq!((logins.processed().len(), logins.reused()), (20, 0));
}

/// A process stores the refresh token of a new login, and does not get a token. Another one does, and rotates it.
#[tokio::test(start_paused = true)]
async fn login_is_handed_over() {
    let (logins, store) = logged_in();
    let (one, other) = (logins.process(&store, "seed"), logins.process(&store, "seed"));
    one.token().await.unwrap();
    other.token().await.unwrap();
    advance(MINUTE).await;
    log_in(&logins, "second");
    one.log_in("second");
    logins.state().acts.extend([Act::Busy(503, "0"); 3]);
    assert!(one.token().await.unwrap_err().is_transient());
    assert!(stored(&store).contains("second"));
    other.token().await.unwrap();
    for _ in 0..3 {
        sleep(SECOND * 5).await;
        one.token().await.unwrap();
        advance(MINUTE).await;
        other.token().await.unwrap();
    }
    assert_eq!(logins.reused(), 0, "{:?}", logins.processed());
}

/// Each process gets a new login, also one that starts again later.
#[tokio::test(start_paused = true)]
async fn each_process_may_be_told_of_login() {
    let (logins, store) = logged_in();
    let processes = ["seed", "seed", ""].map(|seed| logins.process(&store, seed));
    for process in &processes {
        process.token().await.unwrap();
    }
    advance(MINUTE).await;
    log_in(&logins, "second");
    for process in &processes {
        process.log_in("second");
        process.token().await.unwrap();
        advance(MINUTE).await;
    }
    let restarted = logins.process(&store, "");
    restarted.log_in("second");
    for process in processes.iter().chain([&restarted]) {
        process.token().await.unwrap();
        advance(MINUTE).await;
    }
    let presented = logins.processed();
    assert_eq!(
        presented.iter().filter(|refresh_token| *refresh_token == "second").count(),
        1,
        "{presented:?}"
    );
    assert_eq!(logins.reused(), 0, "{presented:?}");
}

/// Three processes share a login, with random failures, restarts, dropped callers and a new login.
#[tokio::test(start_paused = true)]
async fn random_fleet_keeps_login() {
    for number in 0..runs(300) {
        let (logins, store) = logged_in();
        let mut random = Chance(number);
        logins.state().random = Some(Box::new(move || match (random.draw(8), random.draw(3000)) {
            (0, _) => Act::Busy(503, "0"),
            (1, _) => Act::Refused,
            (_, millis) => Act::Slow(Duration::from_millis(millis)),
        }));
        let mut chance = Chance(number + 1000);
        let start = |seed: &str| logins.process(&store, seed);
        let mut processes = [start("seed"), start("seed"), start("")];
        for step in 0..40 {
            let one = chance.draw(3) as usize;
            match chance.draw(10) {
                // With the last login, as if its configuration had it.
                0 => processes[one] = start(if step > 15 { "second" } else { "seed" }),
                1 if step > 15 => processes[one].log_in("second"),
                _ => {}
            }
            if step == 15 {
                log_in(&logins, "second");
                processes[one].log_in("second");
            }
            for process in &processes {
                let _ = timeout(Duration::from_millis(chance.draw(2000)), process.token()).await;
            }
            sleep(Duration::from_millis(chance.draw(40_000))).await;
        }
        assert_eq!(logins.reused(), 0, "{number}: {:?}", logins.processed());
    }
}

/// A record that cannot be read may have the refresh token that works. It is neither ignored nor replaced.
#[tokio::test(start_paused = true)]
async fn unreadable_record_is_not_replaced() {
    let (logins, store) = logged_in();
    let running = logins.process(&store, "seed");
    running.token().await.unwrap();
    advance(MINUTE).await;
    let wrong = EncryptedStore::new(store.clone(), EncryptionKeys::new("2", &[9; 32]).unwrap());
    let wrong = logins.builder("seed").store(wrong).build().unwrap();
    let error = wrong.token().await.unwrap_err();
    assert!(error.to_string().contains("must not be presented without it"), "{error}");
    assert!(wrong.status().store.is_some_and(|store| !store.is_usable()), "the store fails");
    running.token().await.unwrap();
    assert_eq!(logins.processed(), ["seed", "r-seed-1"]);
}

/// The access token stays the same while the refresh tokens rotate.
#[tokio::test(start_paused = true)]
async fn same_access_token_may_have_new_refresh_token() {
    let (logins, store) = logged_in();
    logins.state().same_access_token = true;
    let processes = [logins.process(&store, "seed"), logins.process(&store, "seed")];
    for _ in 0..3 {
        for process in &processes {
            process.token().await.unwrap();
            advance(MINUTE).await;
        }
    }
    assert_eq!(logins.reused(), 0, "{:?}", logins.processed());
}

/// An exchange starts late in a refresh, whose timeout ends it. Its token is used by the next one.
#[tokio::test(start_paused = true)]
async fn exchange_outlives_its_refresh() {
    let (logins, _) = logged_in();
    logins.state().acts.push_back(Act::Busy(503, "25"));
    logins.state().acts.push_back(Act::Slow(POST + SECOND * 10));
    let provider = logins.single("seed");
    provider.token().await.unwrap_err();
    assert_eq!(provider.token().await.unwrap().access_token(), "acc-seed-1");
    advance(MINUTE).await;
    assert_eq!(provider.token().await.unwrap().access_token(), "acc-seed-2");
    assert_eq!(logins.processed(), ["seed", "r-seed-1"]);

    // Nobody asks before that token has expired, too: its refresh token is used.
    let (logins, _) = logged_in();
    logins.state().acts.push_back(Act::Slow(POST + SECOND * 10));
    let provider = logins.builder("seed").refresh_timeout(SECOND * 5).build().unwrap();
    provider.token().await.unwrap_err();
    sleep(MINUTE * 2).await;
    assert_eq!(provider.token().await.unwrap().access_token(), "acc-seed-2");
    assert_eq!(logins.processed(), ["seed", "r-seed-1"]);
}

/// A refresh times out, and another process needs a token before the exchange ends.
#[tokio::test(start_paused = true)]
async fn lease_outlives_its_refresh() {
    let (logins, store) = logged_in();
    let build = || {
        let builder = logins.builder("seed").store(store.clone());
        builder.lease(SECOND * 2).refresh_timeout(SECOND * 5).build().unwrap()
    };
    let (one, other) = (build(), build());
    logins.state().acts.push_back(Act::Slow(POST + SECOND * 15));
    one.token().await.unwrap_err();
    let mut refreshes = 0;
    while other.token().await.is_err() {
        refreshes += 1;
    }
    assert!(refreshes > 1, "the exchange runs for longer than a refresh of the other process");
    assert_eq!(one.token().await.unwrap().access_token(), "acc-seed-1");
    assert_eq!(logins.processed(), ["seed"]);
}

/// A refresh ends while its token is being stored, and no caller asks before that has expired.
#[tokio::test(start_paused = true)]
async fn token_is_stored_after_its_refresh() {
    let (logins, store) = logged_in();
    let builder = logins.builder("seed").store(store.clone());
    let one = builder.refresh_timeout(SECOND * 5).build().unwrap();
    one.token().await.unwrap();
    advance(MINUTE).await;
    let refreshing = refresh_into(&one, &store, Health::Down).await;
    refreshing.await.unwrap().unwrap_err();
    store.set(Health::Good);
    sleep(MINUTE * 2).await;
    let other = logins.process(&store, "seed");
    other.token().await.unwrap();
    assert_eq!(logins.processed(), ["seed", "r-seed-1", "r-seed-2"]);
}

/// The store of a login has no room for longer than a lease. No other process gets the lease meanwhile.
#[tokio::test(start_paused = true)]
async fn lease_is_kept_until_token_is_stored() {
    let (logins, store) = logged_in();
    let (one, other) = (logins.process(&store, "seed"), logins.process(&store, "seed"));
    one.token().await.unwrap();
    other.token().await.unwrap();
    advance(MINUTE).await;
    let refreshing = refresh_into(&one, &store, Health::Full).await;
    assert_eq!(refreshing.await.unwrap().unwrap().access_token(), "acc-seed-2", "after one lease");
    other.token().await.unwrap_err();
    store.set(Health::Good);
    assert_eq!(other.token().await.unwrap().access_token(), "acc-seed-2");
    assert_eq!(logins.processed(), ["seed", "r-seed-1"]);
}

/// A response has no usable access token: with a store, another process has to present its refresh token.
#[tokio::test(start_paused = true)]
async fn refresh_token_of_unusable_response_is_stored() {
    let (logins, store) = logged_in();
    let (one, other) = (logins.process(&store, "seed"), logins.process(&store, "seed"));
    one.token().await.unwrap();
    other.token().await.unwrap();
    advance(MINUTE).await;
    logins.state().always = Some(Act::Unusable);
    one.token().await.unwrap_err();
    logins.state().always = None;
    other.token().await.unwrap();
    assert_eq!(logins.reused(), 0, "{:?}", logins.processed());
}

/// A process that starts again stores its seed, though another one has a token of that login to store.
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
    assert!(stored(&store).contains("r-seed-2"), "{}", stored(&store));
    one.token().await.unwrap();
    assert_eq!(logins.processed(), ["seed", "r-seed-1", "r-seed-2"]);
}

/// Another user logs in, or a restart has another user's refresh token. The first user's token is not used again.
#[tokio::test(start_paused = true)]
async fn nobody_acts_as_somebody_else() {
    for has_store in [false, true] {
        let (logins, store) = logged_in();
        let build = |seed: &str| if has_store { logins.process(&store, seed) } else { logins.single(seed) };
        let process = build("seed");
        assert_eq!(process.token().await.unwrap().access_token(), "acc-seed-1");
        logins.user("second");
        process.log_in("second");
        assert!(process.current().is_none(), "the token of the first user");
        assert_eq!(process.token().await.unwrap().access_token(), "acc-second-2");
        assert_eq!(logins.processed(), ["seed", "second"]);

        // The first login is known, also after many rotations.
        advance(MINUTE).await;
        process.token().await.unwrap();
        process.log_in("seed");
        advance(MINUTE).await;
        process.token().await.unwrap();
        assert_eq!(logins.processed()[2..], ["r-second-2", "r-second-3"]);
    }

    // A restart.
    let (logins, store) = logged_in();
    logins.process(&store, "seed").token().await.unwrap();
    logins.user("second");
    assert_eq!(logins.process(&store, "second").token().await.unwrap().access_token(), "acc-second-2");
    // One that still has the first is a laggard of the deployment.
    assert_eq!(logins.process(&store, "seed").token().await.unwrap().access_token(), "acc-second-2");
    assert_eq!(logins.processed(), ["seed", "second"]);
    assert_eq!(logins.reused(), 0);
}

/// The program logs a user in before the store was read, in each process of a fleet.
#[tokio::test(start_paused = true)]
async fn login_before_first_token_wins() {
    let (logins, store) = logged_in();
    logins.process(&store, "seed").token().await.unwrap();
    logins.user("second");
    let processes = ["seed", "", "other"].map(|seed| logins.process(&store, seed));
    for process in &processes {
        process.log_in("second");
    }
    for token in join_all(processes.iter().map(TokenProvider::token)).await {
        assert_eq!(token.unwrap().access_token(), "acc-second-2");
    }
    assert_eq!(logins.processed(), ["seed", "second"]);
}

/// The refresh token in a configuration has a typing error, which does not cost the login that works, and is presented
/// once.
#[tokio::test(start_paused = true)]
async fn typing_error_costs_no_login() {
    let (logins, store) = logged_in();
    logins.process(&store, "seed").token().await.unwrap();
    for _ in 0..3 {
        advance(MINUTE).await;
        let process = logins.process(&store, "sead");
        process.token().await.unwrap();
    }
    assert_eq!(logins.processed(), ["seed", "sead", "r-seed-1", "r-seed-2", "r-seed-3"]);
    // A user's login is not the configuration's: nobody goes on as another user.
    let process = logins.process(&store, "seed");
    process.log_in("sead-2");
    assert!(is_login(&process.token().await.unwrap_err()));
    assert!(is_login(&logins.process(&store, "seed").token().await.unwrap_err()));
    assert_eq!(logins.processed()[5..], ["sead-2"]);
}

/// A configuration is corrected before the server has said anything of the wrong one.
#[tokio::test(start_paused = true)]
async fn corrected_configuration_uses_login_before() {
    let (logins, store) = logged_in();
    logins.process(&store, "seed").token().await.unwrap();
    advance(MINUTE).await;
    logins.state().acts.extend([Act::Busy(503, "0"); 3]);
    logins.process(&store, "sead").token().await.unwrap_err();
    assert!(stored(&store).contains("sead") && stored(&store).contains("r-seed-1"));
    logins.process(&store, "seed").token().await.unwrap();
    assert_eq!(logins.processed(), ["seed", "r-seed-1"]);
}

/// Two processes on one store have two configurations. The newer one wins, and each seed is presented once.
#[tokio::test(start_paused = true)]
async fn two_configurations_converge() {
    let (logins, store) = logged_in();
    let old = logins.process(&store, "seed");
    old.token().await.unwrap();
    logins.user("second");
    let new = logins.process(&store, "second");
    new.token().await.unwrap();
    for round in 0..4 {
        advance(MINUTE).await;
        let (old, new) = tokio::join!(old.token(), new.token());
        assert_eq!(old.unwrap().access_token(), new.unwrap().access_token(), "{round}");
        for seed in ["seed", "second"] {
            logins.process(&store, seed).token().await.unwrap();
        }
    }
    assert_eq!(logins.processed()[..2], ["seed", "second"]);
    assert_eq!((logins.processed().len(), logins.reused()), (6, 0));
}

/// A restart has another client, other scopes or another audience, on the same store.
#[tokio::test(start_paused = true)]
async fn record_belongs_to_credential() {
    let (logins, store) = logged_in();
    let build = |source: OAuth2| TokenProvider::builder(source).login("seed").store(store.clone()).build();
    build(logins.source()).unwrap().token().await.unwrap();
    // The access token is not for these, but the login is.
    for (source, presented) in [
        (logins.source().scopes(["other"]), "r-seed-1"),
        (logins.source().audience("other"), "r-seed-2"),
        (logins.source().resources(["https://other"]), "r-seed-3"),
        (logins.source().parameter("x", "y"), "r-seed-4"),
        (logins.source(), "r-seed-5"),
    ] {
        let process = build(source).unwrap();
        process.token().await.unwrap();
        assert_eq!(logins.processed().last().unwrap(), presented);
        // A new secret of the client is no other credential.
        process.shutdown().await;
    }
    let other =
        OAuth2::login(Server::token_endpoint("https://login.example/token"), ClientAuth::public("id-2"));
    let other = other.with_client(logins.client());
    let other = build(other).unwrap();
    // Its first refresh token is spent, and the newest one is not for this client.
    let error = other.token().await.unwrap_err();
    assert!(error.to_string().contains("was used with another server, client or key"), "{error}");
    assert_eq!(logins.processed().last().unwrap(), "r-seed-5");
    log_in(&logins, "seed-2");
    other.log_in("seed-2");
    other.token().await.unwrap();
    assert_eq!(logins.processed().last().unwrap(), "seed-2");
    assert_eq!(logins.reused(), 0);
}

/// A login is the subject of a token exchange, and outlives its process.
#[tokio::test(start_paused = true)]
async fn login_may_be_subject_of_exchange() {
    let (logins, store) = logged_in();
    let exchanged = tower::service_fn(|request: Request<String>| async move {
        let fields = form_urlencoded::parse(request.body().as_bytes());
        let subject = fields.into_iter().find(|(name, _)| name == "subject_token").unwrap().1;
        let body = format!(r#"{{"access_token":"for-{subject}","expires_in":60,"refresh_token":"unused"}}"#);
        Ok::<_, BoxError>(Response::new(Full::<Bytes>::from(body)))
    });
    let exchange = |login: TokenProvider| {
        let server = Server::token_endpoint("https://sts.example/token");
        let source = OAuth2::token_exchange(server, ClientAuth::none(), login);
        TokenProvider::builder(source.with_client(TokenClient::with_service(exchanged))).build().unwrap()
    };
    for expected in ["for-acc-seed-1", "for-acc-seed-2"] {
        let provider = exchange(logins.process(&store, "seed"));
        let token = provider.token().await.unwrap();
        assert_eq!((token.access_token(), token.refresh_token()), (expected, None));
        advance(MINUTE).await;
    }
    assert_eq!(logins.processed(), ["seed", "r-seed-1"]);

    let server = Server::token_endpoint("https://sts.example/token");
    let source = OAuth2::token_exchange(server, ClientAuth::none(), logins.source());
    let error = TokenProvider::builder(source).build().unwrap_err();
    assert!(error.to_string().contains("build a TokenProvider with the login"), "{error}");
}

/// The response has no usable access token, and the store cannot be written then.
#[tokio::test(start_paused = true)]
async fn unusable_response_is_stored_when_store_recovers() {
    for outage in [SECOND, SECOND * 5, SECOND * 40] {
        let (logins, store) = logged_in();
        let one = logins.process(&store, "seed");
        one.token().await.unwrap();
        advance(MINUTE).await;
        logins.state().always = Some(Act::Unusable);
        let refreshing = refresh_into(&one, &store, Health::Full).await;
        sleep(SECOND / 4).await;
        logins.state().always = None;
        sleep(outage).await;
        store.set(Health::Good);
        let _ = refreshing.await.unwrap();
        sleep(SECOND * 5).await;
        // The process ends, and another one continues.
        let newest = logins.state().granted;
        assert!(stored(&store).contains(&format!("r-seed-{newest}")), "{outage:?}: {}", stored(&store));
        drop(one);
        sleep(SECOND * 30).await;
        logins.process(&store, "").token().await.unwrap();
        assert_eq!(logins.reused(), 0, "{outage:?}: {:?}", logins.processed());
    }
}

/// A human repairs what was rejected, and calls `ready`.
#[tokio::test(start_paused = true)]
async fn ready_asks_again_at_once() {
    let (logins, _) = logged_in();
    let provider = logins.single("seed");
    for cause in [403, 404] {
        logins.state().acts.extend([Act::Busy(cause, ""); 40]);
        // A long cool-down.
        for _ in 0..200 {
            provider.token().await.unwrap_err();
            sleep(SECOND).await;
        }
        logins.state().acts.clear();
        let begun = Instant::now();
        provider.ready().await.unwrap();
        assert!(begun.elapsed() <= POST * 2, "{cause}: {:?}", begun.elapsed());
        provider.invalidate();
    }
    // A loop of it is bounded.
    logins.state().tokens.clear();
    let before = logins.processed().len();
    logins.state().acts.extend(std::iter::repeat_n(Act::Busy(403, ""), 1000));
    let begun = Instant::now();
    while begun.elapsed() < MINUTE * 10 {
        provider.ready().await.unwrap_err();
        sleep(SECOND).await;
    }
    let asked = 1000 - logins.state().acts.len();
    assert!((12..=30).contains(&asked), "{asked}, {before}");
}

/// A process whose refresh token is spent is rejected, and another one has a newer one that the store lost.
#[tokio::test(start_paused = true)]
async fn laggard_does_not_bury_newer_chain() {
    let (logins, store) = logged_in();
    logins.state().lenient = true;
    let (ahead, laggard) = (logins.process(&store, "seed"), logins.process(&store, "seed"));
    ahead.token().await.unwrap();
    laggard.token().await.unwrap();
    let lost = store.kept();
    advance(MINUTE).await;
    ahead.token().await.unwrap();
    // The newest write is lost, as in a failover.
    store.change(|kept| kept.record = lost.record);
    assert!(is_login(&laggard.token().await.unwrap_err()));
    assert!(!stored(&store).contains("r-seed-1"), "{}", stored(&store));
    advance(MINUTE).await;
    assert_eq!(ahead.token().await.unwrap().access_token(), "acc-seed-3");
    advance(SECOND * 30).await;
    assert_eq!(laggard.token().await.unwrap().access_token(), "acc-seed-3");
    assert_eq!(logins.processed(), ["seed", "r-seed-1", "r-seed-1", "r-seed-2"]);
}

/// A fleet gets a doubtful answer to its refresh token: one process asks once a minute.
#[tokio::test(start_paused = true)]
async fn fleet_tries_doubtful_refresh_token_once_a_minute() {
    let (logins, store) = logged_in();
    let processes: Vec<_> = (0..8).map(|_| logins.process(&store, "seed")).collect();
    for process in &processes {
        process.token().await.unwrap();
    }
    advance(MINUTE).await;
    logins.state().acts.extend(std::iter::repeat_n(Act::Busy(403, ""), 10_000));
    let begun = Instant::now();
    while begun.elapsed() < MINUTE * 20 {
        for process in &processes {
            assert!(is_login(&process.token().await.unwrap_err()));
        }
        sleep(SECOND * 5).await;
    }
    let asked = 10_000 - logins.state().acts.len();
    assert!((15..=21).contains(&asked), "{asked}");
    // Nor does a process that starts again ask.
    assert!(is_login(&logins.process(&store, "seed").token().await.unwrap_err()));
    logins.state().acts.clear();
    advance(MINUTE).await;
    processes[3].token().await.unwrap();
}

/// Bursts of answers say nothing, and none of them processed the request.
#[tokio::test(start_paused = true)]
async fn burst_of_unclear_answers_ends_no_login() {
    for has_store in [false, true] {
        let (logins, store) = logged_in();
        let process = if has_store { logins.process(&store, "seed") } else { logins.single("seed") };
        process.token().await.unwrap();
        for burst in [2, 5, 40] {
            advance(MINUTE).await;
            logins.state().acts.extend(std::iter::repeat_n(Act::Busy(502, "0"), burst));
            while process.token().await.is_err() {
                sleep(SECOND).await;
            }
        }
        assert_eq!((logins.reused(), logins.state().granted), (0, 4));
    }
}

/// A fleet with every fault at random: users log in at any moment, configurations change, processes are killed between
/// any two steps, answers are lost or say nothing, and the store fails or loses a lease. No refresh token is used
/// twice, no process acts as a user who was replaced, and each process gets the token of the last user at the end.
#[tokio::test(start_paused = true)]
async fn random_users_share_store() {
    for number in 0..runs(150) {
        random_users(number).await;
    }
}

/// Any fault, alone or in a burst, or none.
fn chaos(mut chance: Chance) -> Box<dyn FnMut() -> Act + Send> {
    let (mut burst, mut left, mut was_lost) = (0, 0, false);
    Box::new(move || {
        if left == 0 {
            burst = chance.draw(24);
            left = if chance.draw(6) == 0 { 1 + chance.draw(4) } else { 1 };
        }
        left -= 1;
        let takes = POST + Duration::from_millis(chance.draw(2500));
        // A second lost answer in a row would be presented after the grace.
        was_lost = matches!(burst, 5..=7) && !was_lost;
        match burst {
            0 => Act::Answer(503, "text/plain", ""),
            1 => Act::Refused,
            2 => Act::Answer(403, "text/html", "<html>"),
            3 => Act::Answer(400, "application/json", r#"{"error":"Bad Request"}"#),
            4 => Act::Answer(429, "text/plain", ""),
            5 if was_lost => Act::Lost(POST),
            6 if was_lost => Act::Page,
            7 if was_lost => Act::Unusable,
            _ => Act::Slow(takes),
        }
    })
}

struct Member {
    provider: TokenProvider,
    life: Life,
    /// The seed that it was given last by `log_in`.
    given: Option<String>,
}

async fn random_users(number: u64) {
    let (logins, store) = (Auth::new(&[]), MemoryStore::default());
    logins.state().grace = MINUTE * 6;
    logins.state().random = Some(chaos(Chance(number)));
    let mut chance = Chance(number + 10_000);
    let start = |seed: &str| {
        let life = Life::default();
        let server = Server::token_endpoint("https://login.example/token");
        let client = TokenClient::with_service(tower::service_fn({
            let (logins, life) = (logins.clone(), life.clone());
            move |request| {
                let (logins, life) = (logins.clone(), life.clone());
                async move { life.of(logins.answer(request)).await }
            }
        }));
        let source = OAuth2::login(server, ClientAuth::public("id")).with_client(client);
        let store = Mortal(store.clone(), life.clone());
        let provider = TokenProvider::builder(source).login(seed).store(store).build().unwrap();
        Member { provider, life, given: None }
    };
    let mut users = 0;
    let mut new_user = || {
        users += 1;
        let seed = format!("user-{users}");
        logins.user(&seed);
        seed
    };
    let mut configured = new_user();
    let mut members = [start(&configured), start(&configured), start("")];
    for _ in 0..40 {
        let one = chance.draw(3) as usize;
        match chance.draw(24) {
            0..=2 => {
                members[one].life.end();
                members[one] = start(if chance.draw(3) == 0 { "" } else { &configured });
            }
            3 | 4 => {
                let seed = new_user();
                members[one].provider.log_in(&seed);
                members[one].given = Some(seed);
            }
            5 => {
                configured = new_user();
                members[one].life.end();
                members[one] = start(&configured);
            }
            6 => {
                members[one].provider.log_in("user-1");
                members[one].given = None;
            }
            7 => store.set(Health::Down),
            8 => store.set(Health::Full),
            9 => store.set(Health::ReadOnly),
            10 => store.set(Health::Slow),
            11 => store.set(Health::Forgetful),
            12 => store.lose_lease(),
            _ => store.set(Health::Good),
        }
        for Member { provider, given, .. } in &members {
            let asked = timeout(Duration::from_millis(chance.draw(4000)), provider.token()).await;
            if let (Ok(Ok(token)), Some(given)) = (asked, given) {
                let begun = |seed: &String| logins.presented().iter().position(|asked| asked == seed);
                let used = user(&token);
                assert!(
                    begun(given).is_some() && begun(&used) >= begun(given),
                    "{number}: {used} after {given}: {:?}",
                    logins.presented()
                );
            }
        }
        sleep(Duration::from_millis(chance.draw(30_000))).await;
    }

    logins.state().random = None;
    store.set(Health::Good);
    for _ in 0..18 {
        sleep(SECOND * 10).await;
        for member in &members {
            let _ = member.provider.token().await;
        }
    }
    for member in &members {
        // Begins a login that was given.
        member.provider.ready().await.unwrap_or_else(|error| panic!("{number}: {error}"));
    }
    let last = new_user();
    members[0].provider.log_in(&last);
    members[0].provider.ready().await.unwrap_or_else(|error| panic!("{number}: {error}"));
    sleep(MINUTE).await;
    for member in &members {
        let token = member.provider.token().await.unwrap_or_else(|error| panic!("{number}: {error}"));
        assert_eq!(user(&token), last, "{number}");
    }
    assert_eq!(logins.reused(), 0, "{number}: {:?}", logins.presented());
}
