//! Many tenants: one layer, and a token for each account of an API.
//!
//! A service that calls an API on behalf of many accounts needs a token for each. [`TokenProviders`] makes a
//! [`TokenProvider`](crate::TokenProvider) for a key when the key is used first, and
//! [`BearerAuthLayer::by_key`](crate::BearerAuthLayer::by_key) reads the key from each request:
//!
//! ```
//! use std::{borrow::Cow, collections::HashMap};
//! use tower::ServiceBuilder;
//! use tower_bearer::{BearerAuthLayer, SourceError, StaticToken, TokenProvider, TokenProviders};
//!
//! /// The tenant of a request, which a layer above has put into its extensions.
//! #[derive(Clone, PartialEq, Eq, Hash)]
//! struct Account(u64);
//!
//! let tokens = HashMap::from([(Account(1), "eyJ0eXAi"), (Account(2), "eyJhbGci")]);
//! let providers = TokenProviders::new(move |account: &Account| {
//!     let token = tokens.get(account).ok_or("no such account")?;
//!     Ok::<_, &str>(TokenProvider::builder(StaticToken::new(*token)).name(format!("account-{}", account.0)))
//! });
//! let layer = BearerAuthLayer::by_key(providers.clone(), |head| {
//!     head.extensions.get::<Account>().map(Cow::Borrowed)
//! });
//! # let client = tower::service_fn(|_: http::Request<String>| async {
//! #     Ok::<_, std::convert::Infallible>(http::Response::new(String::new()))
//! # });
//! let service = ServiceBuilder::new().layer(layer).service(client);
//! # let _ = (service, SourceError::unavailable(""));
//! assert_eq!(providers.get(&Account(1))?.status().generation, 0);
//! # Ok::<(), tower_bearer::Error>(())
//! ```
//!
//! # The key
//!
//! Two requests with equal keys use one token. The key must therefore contain everything that a token depends on: the
//! account, and the scopes, the audience or the environment if they differ. A key that misses one of them gives a request
//! the token of another tenant.
//!
//! Keys are compared by `Eq`, not by their hash alone. They are hashed with random keys, so a client that chooses its key
//! cannot cause collisions.
//!
//! # What is kept apart
//!
//! Each tenant has its own token, refreshes, backoff, cool-down, retry budget, and origins (unless the layer sets them). A
//! tenant whose token is always challenged costs the others nothing. A request keeps its tenant's provider from its first
//! attempt to its last.
//!
//! # How many, and for how long
//!
//! At most [10,000 providers](TokenProvidersBuilder::max_providers) are kept, and each until it has not been used for
//! [an hour](TokenProvidersBuilder::idle_timeout). Each use of the group evicts what is idle, so that no task has to run.
//! Eviction loses nothing:
//!
//! - A provider that a request or a handle uses, whose refresh runs, or whose login is not stored yet, is kept beyond the
//!   bound until that is over, and found again by its key.
//! - A user's login ([`TokenProviderBuilder::login`](crate::TokenProviderBuilder::login)) needs a store in a group, with a
//!   [namespace](crate::store::NamespacedStore::for_namespace) for each login: without one, its request gets
//!   [`Error::Factory`](crate::Error::Factory) with an [`Error::InvalidOption`](crate::Error::InvalidOption).
//! - Any other provider is made again at the next request with its key. It asks for one token, or for none if it has a
//!   store. That begins its backoff and its cool-down again.
//!
//! # Cost
//!
//! A request pays for its key, one lookup, the clock, and a reference count. A key that is borrowed from the request is not
//! cloned. An idle provider takes about 800 bytes of heap, its token and its source not counted (`cargo bench --bench
//! tenants`). A provider that is to [keep fresh](crate::TokenProviderBuilder::keep_fresh) has its own task, takes about
//! 2,100 bytes, and wakes once a minute, or once a second while its credential is rejected.

mod builder;
mod cache;
mod providers;

pub use self::{builder::TokenProvidersBuilder, providers::TokenProviders};
pub use crate::select::RequestHead;
