//! Simulates a fleet without processes: an in-memory store with injected failures, and an auth endpoint that
//! invalidates refresh tokens as api.video does.
#![allow(dead_code, unreachable_pub)]

use std::{
    collections::{HashSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use tokio::time::{Instant, sleep, sleep_until};
use tower_bearer::{
    SourceError, Token, TokenProvider, TokenProviderBuilder, TokenRequest, TokenSource,
    store::{Extension, Lease, Publication, Record, StoreError, TokenStore},
};

pub const MINUTE: Duration = Duration::from_secs(60);

/// How long each grant takes by default.
pub const POST: Duration = Duration::from_millis(200);

/// How long each operation of a slow store takes: more than its time limit.
const SLOW: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Health {
    #[default]
    Good,
    Down,
    Slow,
    ReadOnly,
    /// Grants leases, but stores nothing.
    Forgetful,
    /// Grants leases, but has no room for a record.
    Full,
    /// Set up wrongly, such as with a wrong password.
    Misconfigured,
}

/// Stops one simulated process, so that it extends no lease.
#[derive(Clone, Default)]
pub struct Stop(Arc<Mutex<Option<Instant>>>);

impl Stop {
    pub fn stop_for(&self, length: Duration) {
        *self.0.lock().unwrap() = Some(Instant::now() + length);
    }

    async fn wait_until_resumed(&self) {
        let until = *self.0.lock().unwrap();
        if let Some(until) = until {
            sleep_until(until).await;
        }
    }
}

#[derive(Clone, Default)]
pub struct MemoryStore(Arc<Mutex<Kept>>, Stop);

#[derive(Clone, Default)]
pub struct Kept {
    pub health: Health,
    pub record: Option<(Record, Instant)>,
    fence: u64,
    leased_until: Option<Instant>,
    /// All operations, also those that fail.
    pub operations: u64,
    pub loads: u64,
    pub leases: u64,
    pub published: u64,
    pub superseded: u64,
    pub extended: u64,
    /// Leases that were not extended because they had ended.
    pub not_extended: u64,
    /// Whether the store cannot extend leases.
    pub cannot_extend: bool,
    /// A record that another process publishes directly before the next lease is granted.
    pub before_lease: Option<Record>,
    /// How long the next leases take to be granted.
    pub lease_takes: VecDeque<Duration>,
    /// How long the next publication takes to return after the record is stored.
    pub publication_takes: Duration,
}

impl MemoryStore {
    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap()
    }

    pub fn kept(&self) -> Kept {
        self.lock().clone()
    }

    pub fn change(&self, change: impl FnOnce(&mut Kept)) {
        change(&mut self.lock());
    }

    pub fn set(&self, health: Health) {
        self.lock().health = health;
    }

    pub fn flush(&self) {
        let mut kept = self.lock();
        (kept.record, kept.leased_until) = (None, None);
    }

    /// Loses the lease, as in a failover to a replica that has not received it.
    pub fn lose_lease(&self) {
        self.lock().leased_until = None;
    }

    /// Publishes a record as another process.
    pub fn put(&self, text: &str, lifetime: Duration) {
        let mut kept = self.lock();
        kept.fence += 1;
        kept.record = Some((Record::new(kept.fence, text).expires_in(lifetime), Instant::now()));
    }

    async fn health(&self) -> Result<Health, StoreError> {
        let health = {
            let mut kept = self.lock();
            kept.operations += 1;
            kept.health
        };
        match health {
            Health::Down => {
                return Err(StoreError::unavailable("the store is down").with_cause("connection refused"));
            }
            Health::Misconfigured => return Err(StoreError::configuration("the password is wrong")),
            Health::Slow => sleep(SLOW).await,
            _ => {}
        }
        Ok(health)
    }

    async fn writable(&self) -> Result<Health, StoreError> {
        match self.health().await? {
            Health::ReadOnly => Err(StoreError::unavailable("the store is read-only")),
            health => Ok(health),
        }
    }
}

/// Returns a record's text as the crate writes it.
pub fn record_text(access_token: &str, refresh_token: &str) -> String {
    format!(r#"{{"schema":1,"access_token":"{access_token}","refresh_token":"{refresh_token}"}}"#)
}

impl TokenStore for MemoryStore {
    fn namespace(&self) -> &str {
        "memory"
    }

    async fn load(&self) -> Result<Option<Record>, StoreError> {
        self.health().await?;
        let mut kept = self.lock();
        kept.loads += 1;
        Ok(kept.record.as_ref().map(|(record, stored_at)| record.aged_by(stored_at.elapsed())))
    }

    async fn lease(&self, length: Duration) -> Result<Option<Lease>, StoreError> {
        self.writable().await?;
        let (lease, takes) = {
            let mut kept = self.lock();
            if kept.leased_until.is_some_and(|until| Instant::now() < until) {
                return Ok(None);
            }
            if let Some(record) = kept.before_lease.take() {
                kept.fence = record.version();
                kept.record = Some((record, Instant::now()));
            }
            kept.leases += 1;
            kept.fence += 1;
            kept.leased_until = Some(Instant::now() + length);
            (Lease::new(kept.fence), kept.lease_takes.pop_front())
        };
        sleep(takes.unwrap_or_default()).await;
        Ok(Some(lease))
    }

    async fn extend(&self, lease: &Lease, length: Duration) -> Result<Extension, StoreError> {
        self.1.wait_until_resumed().await;
        self.writable().await?;
        let mut kept = self.lock();
        if kept.cannot_extend {
            return Ok(Extension::Unsupported);
        }
        if lease.fence() != kept.fence || kept.leased_until.is_none_or(|until| until <= Instant::now()) {
            kept.not_extended += 1;
            return Ok(Extension::Expired);
        }
        kept.extended += 1;
        kept.leased_until = Some(Instant::now() + length);
        Ok(Extension::Extended)
    }

    async fn publish(&self, lease: &Lease, record: Record) -> Result<Publication, StoreError> {
        let health = self.writable().await?;
        if health == Health::Full {
            return Err(StoreError::unavailable("the store is full"));
        }
        let takes = {
            let mut kept = self.lock();
            if lease.fence() != kept.fence {
                kept.superseded += 1;
                return Ok(Publication::Superseded);
            }
            if health == Health::Forgetful {
                return Err(StoreError::unavailable("the store forgets its records"));
            }
            kept.published += 1;
            kept.record = Some((record, Instant::now()));
            std::mem::take(&mut kept.publication_takes)
        };
        sleep(takes).await;
        Ok(Publication::Stored)
    }

    async fn release(&self, lease: Lease) -> Result<(), StoreError> {
        self.writable().await?;
        let mut kept = self.lock();
        if lease.fence() == kept.fence {
            kept.leased_until = None;
        }
        Ok(())
    }
}

/// The auth endpoint of all processes, which use the same key.
#[derive(Clone, Default)]
pub struct Endpoint(Arc<Mutex<Grants>>, Stop);

#[derive(Clone, Debug, Default)]
pub struct Grants {
    pub refreshes: u64,
    pub rejected: u64,
    pub authentications: u64,
    /// The newest refresh token, which is the only valid one.
    refresh_token: String,
    granted: u64,
    /// How long the next processes are stopped between a grant and its response.
    pub delays: VecDeque<Duration>,
    /// How long each grant takes. Default: [`POST`].
    pub takes: Option<Duration>,
    /// The refresh tokens that are in use by a running exchange.
    presented: HashSet<String>,
    /// How often a refresh token was presented while another exchange used it.
    pub presented_twice: u64,
    pub lifetime: Option<Duration>,
    /// The answers to the next requests say nothing: whether each request is processed.
    pub unclear: VecDeque<bool>,
}

impl Grants {
    pub fn posts(&self) -> u64 {
        self.refreshes + self.rejected + self.authentications
    }

    fn grant(&mut self) -> Token {
        self.granted += 1;
        self.refresh_token = format!("refresh-{}", self.granted);
        Token::builder(format!("access-{}", self.granted))
            .refresh_token(self.refresh_token.clone())
            .expires_in(self.lifetime.unwrap_or(MINUTE))
            .build()
            .unwrap()
    }
}

impl Endpoint {
    pub fn grants(&self) -> Grants {
        self.0.lock().unwrap().clone()
    }

    pub fn change<T>(&self, change: impl FnOnce(&mut Grants) -> T) -> T {
        change(&mut self.0.lock().unwrap())
    }

    /// Authenticates with the same key outside of the fleet.
    pub fn authenticate_elsewhere(&self) -> Token {
        self.change(Grants::grant)
    }

    /// Builds a process that shares `store`, and refreshes its token 10 s before it expires.
    pub fn process(&self, store: &MemoryStore) -> TokenProviderBuilder<Self> {
        self.process_with(store, &Stop::default())
    }

    /// As [`process`](Self::process), with a `stop` for the process.
    pub fn process_with(&self, store: &MemoryStore, stop: &Stop) -> TokenProviderBuilder<Self> {
        let store = MemoryStore(Arc::clone(&store.0), stop.clone());
        TokenProvider::builder(Self(Arc::clone(&self.0), stop.clone())).store(store)
    }

    async fn answer(
        &self,
        grant: impl FnOnce(&mut Grants) -> Result<Token, SourceError>,
    ) -> Result<Token, SourceError> {
        sleep(self.grants().takes.unwrap_or(POST)).await;
        let (answer, delay) = {
            self.change(|grants| {
                let lost = || Err(SourceError::unavailable("no answer"));
                let answer = match grants.unclear.pop_front() {
                    None => grant(grants),
                    Some(false) => lost(),
                    Some(true) => grant(grants).and_then(|_| lost()),
                };
                (answer, grants.delays.pop_front())
            })
        };
        if let Some(delay) = delay {
            self.1.stop_for(delay);
            sleep(delay).await;
        }
        answer
    }

    /// Counts the refresh token as presented until the returned value is dropped.
    fn present(&self, refresh_token: &str) -> Presented {
        let is_first = self.change(|grants| {
            let is_first = grants.presented.insert(refresh_token.to_owned());
            grants.presented_twice += u64::from(!is_first);
            is_first
        });
        Presented { endpoint: self.clone(), refresh_token: is_first.then(|| refresh_token.to_owned()) }
    }
}

struct Presented {
    endpoint: Endpoint,
    /// `None` if another exchange already presents it.
    refresh_token: Option<String>,
}

impl Drop for Presented {
    fn drop(&mut self) {
        if let Some(refresh_token) = &self.refresh_token {
            self.endpoint.change(|grants| grants.presented.remove(refresh_token));
        }
    }
}

impl TokenSource for Endpoint {
    async fn fetch(&self, request: &TokenRequest<'_>) -> Result<Token, SourceError> {
        let Some(refresh_token) = request.refresh_token() else {
            return self
                .answer(|grants| {
                    grants.authentications += 1;
                    Ok(grants.grant())
                })
                .await;
        };
        let _presented = self.present(refresh_token);
        self.answer(|grants| {
            if grants.refresh_token != refresh_token {
                grants.rejected += 1;
                return Err(SourceError::rejected("it was presented before").with_rejected_refresh_token());
            }
            grants.refreshes += 1;
            Ok(grants.grant())
        })
        .await
    }
}

/// Causes every event of the store: `adopted` twice, each other event once.
pub async fn trigger_every_store_event(name: &str) {
    let (endpoint, store) = (Endpoint::default(), MemoryStore::default());
    let build = || endpoint.process(&store).name(name).lease(Duration::from_secs(2)).build().unwrap();
    let (process, other) = (build(), build());

    // A record that cannot be read; then the first token, which the other process adopts.
    store.put("canary", MINUTE);
    let token = process.token().await.unwrap();
    other.token().await.unwrap();

    // One process is stopped for longer than its lease. The other waits for the lease and refreshes the token. Then the
    // first resumes.
    endpoint.change(|grants| grants.delays.push_back(Duration::from_secs(5)));
    let stopped = tokio::spawn({
        let process = process.clone();
        async move { process.refresh(&token).await.unwrap() }
    });
    sleep(Duration::from_secs(1)).await;
    let token = other.refresh(&other.current().unwrap()).await.unwrap();
    stopped.await.unwrap();

    // The store forgets a record. Later it is down while no time is left to wait for it.
    sleep(Duration::from_secs(4)).await;
    store.set(Health::Forgetful);
    let token = other.refresh(&token).await.unwrap();
    store.set(Health::Good);
    sleep(MINUTE / 2).await;
    store.set(Health::Down);
    let token = other.refresh(&token).await.unwrap();

    // Later it is up again. Then another process does not release its lease.
    store.set(Health::Good);
    sleep(MINUTE).await;
    let _never_released = store.lease(60 * MINUTE).await.unwrap().unwrap();
    other.refresh(&token).await.unwrap();
}

/// Pseudo-random numbers, which depend on a seed alone.
#[derive(Default)]
pub struct Chance(pub u64);

impl Chance {
    pub fn draw(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % below
    }

    /// One of these.
    pub fn pick<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.draw(of.len() as u64) as usize].clone()
    }

    /// Up to so many, and at least one.
    pub fn list<T>(&mut self, up_to: u64, mut one: impl FnMut(&mut Self) -> T) -> Vec<T> {
        (0..=self.draw(up_to)).map(|_| one(self)).collect()
    }
}
