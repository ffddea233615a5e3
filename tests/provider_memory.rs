//! An idle provider is small. The test has its own file, because the allocator counts for the whole process.

use std::{
    alloc::System,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use tokio::time::sleep;
use tower_bearer::{SourceError, Token, TokenError, TokenProvider, TokenRequest, TokenSource};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const PROVIDERS: usize = 1_000;

/// As documented by `TokenProvider`.
const MAX_BYTES: usize = 640;

/// A source of one byte: whether its next call fails.
struct Source(AtomicBool);

impl TokenSource for Source {
    async fn fetch(&self, _: &TokenRequest<'_>) -> Result<Token, SourceError> {
        if self.0.swap(false, Ordering::Relaxed) {
            return Err(SourceError::unavailable("down"));
        }
        Ok(token()?)
    }
}

fn token() -> Result<Token, TokenError> {
    Token::builder("abc").refresh_token("def").expires_in(Duration::from_secs(3600)).build()
}

async fn provider(fails_once: bool) -> TokenProvider {
    let provider = TokenProvider::new(Source(fails_once.into()));
    provider.token().await.unwrap();
    // The tasks of the refresh end.
    sleep(Duration::from_millis(1)).await;
    provider
}

/// Returns the bytes that one call of `make` leaves on the heap.
async fn bytes<T>(make: impl AsyncFn() -> T) -> usize {
    // The process allocates some memory only once.
    make().await;
    let mut made = Vec::with_capacity(PROVIDERS);
    let region = Region::new(ALLOCATOR);
    for _ in 0..PROVIDERS {
        made.push(make().await);
    }
    let change = region.change();
    (change.bytes_allocated - change.bytes_deallocated).div_ceil(PROVIDERS)
}

/// An idle provider takes more memory than documented.
#[tokio::test(start_paused = true)]
async fn idle_provider_is_small() {
    let of_token = bytes(async || token().unwrap()).await;
    for fails_once in [false, true] {
        let idle = bytes(async || provider(fails_once).await).await - of_token;
        assert!(idle <= MAX_BYTES, "{idle} bytes, after a failure: {fails_once}");
    }
}
