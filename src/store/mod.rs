//! Token stores: several processes that use one credential share one token.
//!
//! The package [`tower-bearer-store`](https://docs.rs/tower-bearer-store) has a store in a file, one in Redis, and one that
//! encrypts the records of another. A store of your own implements [`TokenStore`].
//!
//! Give a store to
//! [`TokenProviderBuilder::store`](crate::TokenProviderBuilder::store), and choose the [`Role`] of each process.
//! [`TokenStore`] documents the protocol and what happens when the store fails. For many credentials, such as one per
//! tenant, a [`NamespacedStore`] keeps their records in one place.

mod access;
mod health;
mod record;
mod token_store;

pub(crate) use self::access::{POLL_BACKOFF, StoreAccess};
pub use self::health::StoreStatus;
pub use self::record::{Extension, Lease, Publication, Record};
pub(crate) use self::token_store::DynTokenStore;
pub use self::token_store::{NamespacedStore, Role, TokenStore};

pub use crate::error::{StoreError, StoreErrorKind};
pub use crate::source::NoSource;
