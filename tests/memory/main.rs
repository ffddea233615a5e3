//! The memory of replays. These tests have their own program and run one at a time, because the allocator counts for the
//! whole process.
#![cfg(feature = "default-client")]

#[path = "../support/mod.rs"]
mod support;

mod replay;
mod upload;

use peak_alloc::PeakAlloc;
use tokio::sync::{Mutex, MutexGuard};

#[global_allocator]
static ALLOCATED: PeakAlloc = PeakAlloc;

async fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::const_new(());
    ALONE.lock().await
}

/// Runs `work`. Returns the peak of additionally allocated memory and the output.
async fn growth<T>(work: impl Future<Output = T>) -> (usize, T) {
    let before = ALLOCATED.current_usage();
    ALLOCATED.reset_peak_usage();
    let output = work.await;
    (ALLOCATED.peak_usage().saturating_sub(before), output)
}
