//! A feature alone does not change the cryptography of the store in Redis.
//!
//! The gate runs this with the feature `aws-lc-rs` of tower-bearer, too: then rustls has two providers to choose from.
#![cfg(feature = "redis")]

use rustls::{
    NamedGroup,
    crypto::{CryptoProvider, ring},
};
use tower_bearer::store::TokenStore;
use tower_bearer_store::RedisStore;

fn groups_of(provider: &CryptoProvider) -> Vec<NamedGroup> {
    provider.kx_groups.iter().map(|group| group.name()).collect()
}

/// A program has chosen no cryptography, and Redis is reached over TLS.
#[tokio::test]
async fn redis_store_installs_ring() {
    assert!(CryptoProvider::get_default().is_none());
    let _ = RedisStore::new("rediss://127.0.0.1:1", "videos").unwrap().load().await;
    let installed = CryptoProvider::get_default().expect("no default provider");
    assert_eq!(groups_of(installed), groups_of(&ring::default_provider()));
}
