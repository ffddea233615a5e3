//! Measures ten thousand callers at an expired token: the number of calls to the source, and the time from its response
//! until the last caller has its token, compared to a mutex held during the refresh. Then ten thousand callers are
//! challenged at once, for many generations.
//!
//! ```text
//! cargo bench --bench stampede              # 20 rounds of each, and 1,000 generations
//! cargo bench --bench stampede -- --brief   # 3, and 20
//! ```

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{sync::Mutex, task::JoinSet};
use tower_bearer::{RefreshReason, SourceError, Token, TokenProvider, TokenRequest, TokenSource};

const CALLERS: usize = 10_000;
const LIFETIME: Duration = Duration::from_secs(1);
/// Long enough for all callers to arrive.
const LATENCY: Duration = Duration::from_millis(200);

struct Endpoint {
    begun: Instant,
    posts: AtomicU64,
    /// Nanoseconds from `begun` to the newest response.
    answered: AtomicU64,
}

impl Endpoint {
    fn new() -> Arc<Self> {
        Arc::new(Self { begun: Instant::now(), posts: AtomicU64::new(0), answered: AtomicU64::new(0) })
    }

    fn elapsed(&self) -> u64 {
        self.begun.elapsed().as_nanos() as u64
    }
}

impl TokenSource for Endpoint {
    async fn fetch(&self, _: &TokenRequest<'_>) -> Result<Token, SourceError> {
        let number = self.posts.fetch_add(1, Ordering::SeqCst);
        let requested_at = tokio::time::Instant::now().into_std();
        tokio::time::sleep(LATENCY).await;
        self.answered.store(self.elapsed(), Ordering::SeqCst);
        let token = Token::builder(format!("access-{number}"));
        Ok(token.expires_in(LIFETIME + LATENCY).requested_at(requested_at).build()?)
    }
}

/// The time from the endpoint's response until the last caller has its token, and the number of calls to the endpoint.
struct Round {
    took: Duration,
    posts: u64,
}

async fn stampede<F>(endpoint: &Endpoint, call: impl Fn() -> F) -> Round
where
    F: Future<Output = Token> + Send + 'static,
{
    let asked = endpoint.posts.load(Ordering::SeqCst);
    let begun = endpoint.begun;
    let mut callers = JoinSet::new();
    for _ in 0..CALLERS {
        let caller = call();
        callers.spawn(async move {
            assert!(caller.await.remaining().is_some_and(|left| !left.is_zero()));
            begun.elapsed()
        });
    }
    let last = callers.join_all().await.into_iter().max().unwrap_or_default();
    let answered = Duration::from_nanos(endpoint.answered.load(Ordering::SeqCst));
    Round { took: last.saturating_sub(answered), posts: endpoint.posts.load(Ordering::SeqCst) - asked }
}

async fn provider(endpoint: &Arc<Endpoint>, provider: &TokenProvider) -> Round {
    stampede(endpoint, || {
        let provider = provider.clone();
        async move { provider.token().await.unwrap() }
    })
    .await
}

async fn mutex(endpoint: &Arc<Endpoint>, token: &Arc<Mutex<Option<Token>>>) -> Round {
    stampede(endpoint, || {
        let (endpoint, token) = (Arc::clone(endpoint), Arc::clone(token));
        async move {
            let mut current = token.lock().await;
            let works = |token: &Token| token.remaining().is_some_and(|left| !left.is_zero());
            match current.clone().filter(works) {
                Some(token) => token,
                None => current
                    .insert(endpoint.fetch(&TokenRequest::new(RefreshReason::Missing)).await.unwrap())
                    .clone(),
            }
        }
    })
    .await
}

/// Challenges ten thousand callers at once in each of `count` generations. Returns the maximum of POSTs per generation.
fn generations(count: u64) -> u64 {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let endpoint = Endpoint::new();
        let provider = TokenProvider::new(Arc::clone(&endpoint));
        let mut most = 0;
        for _ in 0..count {
            let challenged = provider.token().await.unwrap();
            let next = challenged.generation() + 1;
            let asked = endpoint.posts.load(Ordering::SeqCst);
            let mut callers = JoinSet::new();
            for _ in 0..CALLERS {
                let (provider, challenged) = (provider.clone(), challenged.clone());
                callers.spawn(async move { provider.refresh(&challenged).await.unwrap().generation() });
            }
            assert!(callers.join_all().await.into_iter().all(|newest| newest == next));
            most = most.max(endpoint.posts.load(Ordering::SeqCst) - asked);
            // Beyond the cool-down and the expiry.
            tokio::time::advance(Duration::from_secs(600)).await;
        }
        most
    })
}

fn median(rounds: &[Round]) -> Duration {
    let mut took: Vec<_> = rounds.iter().map(|round| round.took).collect();
    took.sort_unstable();
    took[took.len() / 2]
}

fn main() {
    let brief = std::env::args().any(|argument| argument == "--brief");
    stampedes(if brief { 3 } else { 20 });
    let count = if brief { 20 } else { 1_000 };
    let most = generations(count);
    println!("\n{CALLERS} callers challenged at once, {count} times: {most} POST each");
    assert_eq!(most, 1, "one POST per generation");
}

#[tokio::main]
async fn stampedes(rounds: u32) {
    let (endpoint, mutex_endpoint) = (Endpoint::new(), Endpoint::new());
    let handle = TokenProvider::new(Arc::clone(&endpoint));
    let locked = Arc::new(Mutex::new(None));
    let (mut provider_rounds, mut mutex_rounds) = (Vec::new(), Vec::new());
    // The first round of each is a warm-up, without a token instead of with an expired one.
    for _ in 0..=rounds {
        provider_rounds.push(provider(&endpoint, &handle).await);
        mutex_rounds.push(mutex(&mutex_endpoint, &locked).await);
        tokio::time::sleep(LIFETIME + Duration::from_millis(50)).await;
    }
    println!("{CALLERS} callers at an expired token, medians of {rounds} rounds");
    println!("                  POSTs per round    last caller after response");
    for (name, rounds) in [("tower-bearer", &mut provider_rounds), ("mutex", &mut mutex_rounds)] {
        rounds.remove(0);
        let most = rounds.iter().map(|round| round.posts).max().unwrap_or_default();
        println!("{name:<17} {most:>15} {:>27.2} ms", median(rounds).as_secs_f64() * 1e3);
    }
    let posts = provider_rounds.iter().map(|round| round.posts).max().unwrap_or_default();
    let ratio = median(&provider_rounds).as_secs_f64() / median(&mutex_rounds).as_secs_f64();
    println!("\nbars                                  figure     bar");
    println!(
        "POSTs per expired token, at most     {posts:>7} {:>7}  {}",
        1,
        if posts == 1 { "met" } else { "MISSED" }
    );
    println!(
        "time over the mutex's                {ratio:>7.2}  ≤ 1.20  {}",
        if ratio <= 1.2 { "met" } else { "MISSED" }
    );
    assert_eq!(posts, 1, "10,000 callers, one POST");
}
