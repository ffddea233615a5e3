//! Token stores for [`tower_bearer`]: the processes that use one credential share one token.
//!
//! | store | shares a token between | feature |
//! |---|---|---|
//! | [`FileStore`] | the processes of one user on one host | `file` (Unix) |
//! | [`RedisStore`] | processes on any number of hosts | `redis` |
//! | [`EncryptedStore`] | as the store that it wraps, with encrypted records | `encryption` |
//!
//! `RedisStore` uses rustls for `rediss://`, and enables its `ring`: see the
//! [features of tower-bearer](https://docs.rs/tower-bearer/latest/tower_bearer/#features) if a program has another provider
//! of cryptography, too. No feature is enabled by default.
//!
//! Give a store to [`TokenProviderBuilder::store`]. The module [`tower_bearer::store`] documents the protocol, and the page
//! [`tower_bearer::guide::fleet`] how to run processes that share a token.
//!
//! [`TokenProviderBuilder::store`]: tower_bearer::TokenProviderBuilder::store

#![cfg_attr(docsrs, feature(doc_cfg))]

#[cfg(feature = "encryption")]
mod encrypted;
// rustix has no `flock` for Solaris.
#[cfg(all(feature = "file", unix, not(target_os = "solaris")))]
mod file;
#[cfg(feature = "redis")]
mod redis;

#[cfg(feature = "encryption")]
#[cfg_attr(docsrs, doc(cfg(feature = "encryption")))]
pub use self::encrypted::{EncryptedStore, EncryptionKeys};
#[cfg(all(feature = "file", unix, not(target_os = "solaris")))]
#[cfg_attr(docsrs, doc(cfg(all(feature = "file", unix))))]
pub use self::file::FileStore;
#[cfg(feature = "redis")]
#[cfg_attr(docsrs, doc(cfg(feature = "redis")))]
pub use self::redis::RedisStore;

/// A duration as the stores keep it.
#[cfg(any(feature = "file", feature = "redis"))]
fn millis(duration: std::time::Duration) -> u64 {
    duration.as_millis().try_into().unwrap_or(u64::MAX)
}

/// An option that is out of its range.
#[cfg(any(feature = "encryption", feature = "file", feature = "redis"))]
fn invalid(text: String) -> tower_bearer::Error {
    tower_bearer::Error::InvalidOption(text.into())
}
