//! Simulates fleets of 100, 1,000 and 10,000 members that share one token: POSTs, operations of the store, and how long
//! a caller waits.
//!
//! ```text
//! cargo bench --bench fleet              # all fleets, about a minute
//! cargo bench --bench fleet -- --brief   # 100 and 1,000 members, two expiries
//! ```
//!
//! The clock is paused, so an hour takes as long as its events take to run. The members are providers of one process
//! with the default options. Their store is in memory, with the latencies of a Redis: each operation crosses the
//! network, and waits until the operations before it are done. A member that dies does nothing more: the endpoint
//! finishes its exchange, but nobody gets the token, and its lease is not released. A new member takes its place.

use std::{
    future::ready,
    hash::{BuildHasherDefault, DefaultHasher},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

#[path = "../tests/support/fleet.rs"]
mod fleet;

use fleet::{Endpoint, MemoryStore};
use tokio::{
    runtime::Builder,
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep, sleep_until},
};
use tower::util::rng::{HasherRng, Rng};
use tower_bearer::{
    SourceError, Token, TokenProvider, TokenRequest, TokenSource,
    store::{Extension, Lease, Publication, Record, StoreError, TokenStore},
};

/// The life of a token, as at api.video.
const LIFE: Duration = Duration::from_secs(3600);
/// A member sends a request once in this time, on average.
const PERIOD: Duration = Duration::from_secs(60);
/// The way to the store and back, and how much longer it takes for one operation in a hundred.
const NETWORK: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(20));
/// How long the store works on one operation, as Redis on a script: one after the other.
const WORK: Duration = Duration::from_micros(20);
/// Somewhat longer than a POST takes, so that a member may also die between its response and the publication.
const EXCHANGE: Duration = Duration::from_millis(220);

/// What the members of a fleet share, and what is counted of it.
struct Fleet {
    endpoint: Endpoint,
    store: MemoryStore,
    /// The part of the members that dies during the life of a token, and of the exchanges during which a member dies.
    deaths: f64,
    rng: Mutex<HasherRng<BuildHasherDefault<DefaultHasher>>>,
    /// When the store has done the operations that it has got.
    idle_at: Mutex<Instant>,
    /// Requests that failed because a token did not come in time.
    failed: AtomicU64,
    longest_wait: Mutex<Duration>,
    /// The POSTs before the counting started.
    posts_before: Mutex<u64>,
}

impl Fleet {
    fn new(deaths: f64) -> Arc<Self> {
        let fleet = Self {
            endpoint: Endpoint::default(),
            store: MemoryStore::default(),
            deaths,
            rng: Mutex::new(HasherRng::with_hasher(BuildHasherDefault::default())),
            idle_at: Mutex::new(Instant::now()),
            failed: AtomicU64::new(0),
            longest_wait: Mutex::default(),
            posts_before: Mutex::default(),
        };
        fleet.endpoint.change(|grants| grants.lifetime = Some(LIFE));
        Arc::new(fleet)
    }

    /// A random number of at least 0 and less than 1.
    fn random(&self) -> f64 {
        lock(&self.rng).next_f64()
    }

    fn posts(&self) -> u64 {
        self.endpoint.grants().posts()
    }

    /// Takes as long as one operation of the store.
    async fn operate(&self) {
        let done_at = {
            let mut idle_at = lock(&self.idle_at);
            *idle_at = (*idle_at).max(Instant::now()) + WORK;
            *idle_at
        };
        let late = if self.random() < 0.01 { NETWORK.1 } else { Duration::ZERO };
        sleep_until(done_at + NETWORK.0 + late).await;
    }

    /// Forgets what has been counted.
    fn start_counting(&self) {
        self.store.change(|kept| kept.operations = 0);
        self.failed.store(0, Ordering::Relaxed);
        *lock(&self.longest_wait) = Duration::ZERO;
        *lock(&self.posts_before) = self.posts();
    }
}

/// One process. All its parts share its life.
#[derive(Clone)]
struct Member {
    fleet: Arc<Fleet>,
    /// True once it is dead.
    dead: Arc<watch::Sender<bool>>,
}

impl Member {
    fn new(fleet: &Arc<Fleet>) -> Self {
        Self { fleet: Arc::clone(fleet), dead: Arc::default() }
    }

    fn provider(&self) -> TokenProvider {
        TokenProvider::builder(self.clone()).store(self.clone()).build().expect("the options are valid")
    }

    /// Waits until the member dies.
    async fn end(&self) {
        // Cannot fail: `self` has the sender.
        let _ = self.dead.subscribe().wait_for(|dead| *dead).await;
    }

    /// Does `future`, and never ends if the member dies meanwhile.
    async fn alive<T>(&self, future: impl Future<Output = T>) -> T {
        tokio::select! {
            biased;
            () = self.end() => std::future::pending().await,
            done = future => done,
        }
    }

    /// Asks the endpoint, which finishes an exchange whose member has died meanwhile.
    async fn exchange<T>(&self, exchange: impl Future<Output = T>) -> T {
        self.alive(ready(())).await;
        self.may_die_within(EXCHANGE);
        let token = exchange.await;
        self.alive(ready(token)).await
    }

    /// Dies by chance, at a random time within `time`.
    fn may_die_within(&self, time: Duration) {
        if self.fleet.random() < self.fleet.deaths {
            let (dead, after) = (Arc::clone(&self.dead), time.mul_f64(self.fleet.random()));
            tokio::spawn(async move {
                sleep(after).await;
                dead.send_replace(true);
            });
        }
    }

    /// Gets a token, and records how long that took. A request that times out is sent again.
    async fn request(&self, provider: &TokenProvider, challenged: Option<&Token>) {
        let begun = Instant::now();
        let token = loop {
            let token = match challenged {
                Some(challenged) => provider.refresh(challenged).await,
                None => provider.token().await,
            };
            match token {
                Ok(token) => break token,
                Err(error) => {
                    assert!(error.is_transient(), "{error:?}");
                    self.fleet.failed.fetch_add(1, Ordering::Relaxed);
                }
            }
        };
        assert!(token.remaining().is_some_and(|left| !left.is_zero()));
        let mut longest = lock(&self.fleet.longest_wait);
        *longest = (*longest).max(begun.elapsed());
    }

    /// Sends requests until it dies or `end`.
    async fn run(&self, end: Instant) {
        let provider = self.provider();
        let requests = self.alive(async {
            loop {
                self.request(&provider, None).await;
                sleep(PERIOD.mul_f64(2.0 * self.fleet.random())).await;
            }
        });
        // Exponential, so that a member that is replaced early does not change the rate.
        let lives = -(1.0 - self.fleet.random()).ln() / self.fleet.deaths;
        let dies_at = if lives < 1e6 { Instant::now() + LIFE.mul_f64(lives) } else { end };
        tokio::select! {
            () = requests => {}
            () = sleep_until(dies_at.min(end)) => {}
            () = self.end() => {}
        }
        self.dead.send_replace(true);
    }
}

impl TokenSource for Member {
    async fn fetch(&self, request: &TokenRequest<'_>) -> Result<Token, SourceError> {
        self.exchange(self.fleet.endpoint.fetch(request)).await
    }
}

impl TokenStore for Member {
    fn namespace(&self) -> &str {
        self.fleet.store.namespace()
    }

    async fn load(&self) -> Result<Option<Record>, StoreError> {
        self.alive(self.fleet.operate()).await;
        self.fleet.store.load().await
    }

    async fn lease(&self, length: Duration) -> Result<Option<Lease>, StoreError> {
        self.alive(self.fleet.operate()).await;
        self.fleet.store.lease(length).await
    }

    async fn extend(&self, lease: &Lease, length: Duration) -> Result<Extension, StoreError> {
        self.alive(self.fleet.operate()).await;
        self.fleet.store.extend(lease, length).await
    }

    async fn publish(&self, lease: &Lease, record: Record) -> Result<Publication, StoreError> {
        self.alive(self.fleet.operate()).await;
        self.fleet.store.publish(lease, record).await
    }

    async fn release(&self, lease: Lease) -> Result<(), StoreError> {
        self.alive(self.fleet.operate()).await;
        self.fleet.store.release(lease).await
    }
}

/// The figures of one fleet.
#[derive(Default)]
struct Figures {
    posts: u64,
    /// The most POSTs for one expiry.
    most_posts: u64,
    operations: u64,
    failed: u64,
    longest_wait: Duration,
}

impl Fleet {
    /// Adds what has been counted for one expiry.
    fn add_to(&self, figures: &mut Figures) {
        let posts = self.posts() - *lock(&self.posts_before);
        figures.posts += posts;
        figures.most_posts = figures.most_posts.max(posts);
        figures.operations += self.store.kept().operations;
        figures.failed += self.failed.load(Ordering::Relaxed);
        figures.longest_wait = figures.longest_wait.max(*lock(&self.longest_wait));
    }
}

/// All members send requests all the time.
async fn steady(members: usize, deaths: f64, expiries: u32) -> Figures {
    /// The default: a token is replaced in the last tenth of its life.
    const REPLACED: Duration = Duration::from_secs(LIFE.as_secs() * 9 / 10);
    let fleet = Fleet::new(deaths);
    // Between two expiries, like the ends of the periods below.
    let begins = Instant::now() + REPLACED / 2;
    let end = begins + REPLACED * expiries;
    let mut running = JoinSet::new();
    for _ in 0..members {
        let fleet = Arc::clone(&fleet);
        running.spawn(async move {
            sleep(PERIOD.mul_f64(2.0 * fleet.random())).await;
            while Instant::now() < end {
                Member::new(&fleet).run(end).await;
            }
        });
    }
    let mut figures = Figures::default();
    for expiry in 0..expiries {
        sleep_until(begins + REPLACED * expiry).await;
        fleet.start_counting();
        sleep_until(begins + REPLACED * (expiry + 1)).await;
        fleet.add_to(&mut figures);
    }
    running.join_all().await;
    figures
}

/// What makes all members need a token at one moment.
#[derive(Clone, Copy)]
enum Moment {
    /// There is no token yet.
    Start,
    /// The token has expired while no member sent a request.
    Expiry,
    /// The API challenges the token.
    Revocation,
}

/// All members need a token at one moment, `times` times.
async fn at_once(moment: Moment, members: usize, deaths: f64, times: u32) -> Figures {
    let fleet = Fleet::new(deaths);
    let mut all: Vec<(Member, TokenProvider)> = Vec::new();
    let mut figures = Figures::default();
    for _ in 0..times {
        if matches!(moment, Moment::Start) {
            all.clear();
            fleet.store.flush();
        }
        replace_the_dead(&fleet, &mut all, members);
        match moment {
            Moment::Start => {}
            Moment::Expiry => {
                first_requests(&all).await;
                sleep(LIFE).await;
            }
            // Longer than the pause between two challenges that a refresh answers.
            Moment::Revocation => {
                first_requests(&all).await;
                sleep(LIFE / 2).await;
            }
        }
        replace_the_dead(&fleet, &mut all, members);
        fleet.start_counting();
        let mut requests = JoinSet::new();
        for (member, provider) in &all {
            member.may_die_within(EXCHANGE);
            let (member, provider) = (member.clone(), provider.clone());
            requests.spawn(async move {
                let challenged = provider.current().filter(|_| matches!(moment, Moment::Revocation));
                tokio::select! {
                    () = member.request(&provider, challenged.as_ref()) => {}
                    () = member.end() => {}
                }
            });
        }
        requests.join_all().await;
        fleet.add_to(&mut figures);
    }
    figures
}

fn replace_the_dead(fleet: &Arc<Fleet>, all: &mut Vec<(Member, TokenProvider)>, members: usize) {
    all.retain(|(member, _)| !*member.dead.borrow());
    all.resize_with(members, || {
        let member = Member::new(fleet);
        let provider = member.provider();
        (member, provider)
    });
}

/// Each member gets the token, one after the other.
async fn first_requests(all: &[(Member, TokenProvider)]) {
    for (member, provider) in all {
        tokio::select! {
            () = member.request(provider, None) => {}
            () = member.end() => {}
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no panic while it was locked")
}

fn main() {
    let brief = std::env::args().any(|argument| argument == "--brief");
    let (sizes, expiries): (&[usize], u32) =
        if brief { (&[100, 1_000], 2) } else { (&[100, 1_000, 10_000], 10) };
    println!("{expiries} expiries of a token; a cell has the figures of {sizes:?} members\n");
    println!(
        "| the members need a token | die | POSTs per expiry (at most) | operations per member and expiry | \
         longest wait | requests that timed out |"
    );
    println!("|---|---|---|---|---|---|");
    let moments = [
        ("at different times", None),
        ("at once, at the start", Some(Moment::Start)),
        ("at once, at an expiry", Some(Moment::Expiry)),
        ("at once, at a revocation", Some(Moment::Revocation)),
    ];
    for (name, moment) in moments {
        for deaths in [0.0, 0.2] {
            let fleets = sizes.iter().map(|&members| {
                let runtime = Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
                let figures = runtime.block_on(async {
                    match moment {
                        None => steady(members, deaths, expiries).await,
                        Some(moment) => at_once(moment, members, deaths, expiries).await,
                    }
                });
                let per_expiry = |count: u64| count as f64 / f64::from(expiries);
                [
                    format!("{:.2} ({})", per_expiry(figures.posts), figures.most_posts),
                    format!("{:.1}", per_expiry(figures.operations) / members as f64),
                    format!("{:.1} s", figures.longest_wait.as_secs_f64()),
                    figures.failed.to_string(),
                ]
            });
            let fleets: Vec<_> = fleets.collect();
            let cell =
                |at: usize| fleets.iter().map(|cells| cells[at].as_str()).collect::<Vec<_>>().join(", ");
            let cells: Vec<_> = (0..4).map(cell).collect();
            println!("| {name} | {:.0} % | {} |", deaths * 100.0, cells.join(" | "));
        }
    }
}
