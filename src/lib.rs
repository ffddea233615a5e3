//! A tower layer that adds a bearer token to each request, refreshes the token before it expires, and retries requests
//! that the API answers with 401.
//!
//! # Why
//!
//! A bearer token expires, or is revoked. Then all requests get a 401 at one moment, and each of them asks for another
//! token: the auth endpoint gets a burst of requests, a refresh token that can be used only once is used twice, and
//! uploads that cannot be sent again are lost. With this crate one refresh serves all requests, in a task that no
//! caller can cancel, and each challenged request is sent again, its body included.
//!
//! # Ten lines
//!
//! README.md lists the dependencies of this example.
//!
//! ```no_run
//! # async fn run() -> Result<(), tower_bearer::BoxError> {
//! use bytes::Bytes;
//! use http::Request;
//! use http_body_util::Empty;
//! use hyper_rustls::HttpsConnectorBuilder;
//! use hyper_util::{client::legacy::Client, rt::TokioExecutor};
//! use tower::{ServiceBuilder, ServiceExt};
//! use tower_bearer::BearerAuthLayer;
//!
//! let https = HttpsConnectorBuilder::new().with_webpki_roots().https_only().enable_all_versions().build();
//! let client = ServiceBuilder::new()
//!     .layer(BearerAuthLayer::new("your-api-key"))
//!     .service(Client::builder(TokioExecutor::new()).build(https));
//!
//! let request = Request::get("https://ws.api.video/videos").body(Empty::<Bytes>::new())?;
//! let response = client.oneshot(request).await?;
//! println!("{}", response.status());
//! # Ok(())
//! # }
//! ```
//!
//! # What happens at an expiry
//!
//! Callers do not notice an expiry. In the last part of its life ([`RefreshAhead`]) a token is still used, while the
//! next one is fetched in the background. While a token works, callers do not notice an outage of its source either.
//! [`TokenProvider`] documents what a failure does.
//!
//! # What happens on a 401
//!
//! 1. The challenged token, and no other, is to be replaced. If the [`TokenProvider`] has a newer one already, that is
//!    used.
//! 2. Otherwise one refresh for all callers fetches the next token from the [`TokenSource`], in a task of its own.
//! 3. The response is drained within bounds and dropped, so that nothing of it is held.
//! 4. The request is sent again, with the body that [`replay`] has kept; after a backoff, if that token was challenged
//!    too.
//! 5. If nothing is left to try, the caller gets the API's last response unchanged.
//!
//! [`challenge`] documents which responses are a challenge, and [`RetryPolicy`] how often and how soon a request is sent again.
//!
//! # Which origins get the token
//!
//! Only the layer's [`AllowedOrigins`], whatever a redirect or a URI says.
//!
//! # Features
//!
//! Features only add items. Two things affect other code. `tower-http` changes
//! which 401 is a challenge. `default-client`, `RedisStore` and the test server enable rustls with ring, `aws-lc-rs` with
//! aws-lc-rs: if a program has both, for example by hyper-rustls' default features, rustls selects neither and
//! panics. Such a program installs one at its start (`CryptoProvider::install_default`).
//!
//! | feature | default | what it adds |
//! |---|---|---|
//! | `default-client` | yes | the HTTP client of [`TokenClient::new`], which the sources use unless they are given another: hyper-util over rustls with ring and Mozilla's roots |
//! | `tracing` | yes | spans and events, as [`observability`] lists them |
//! | `metrics` | no | counters, gauges and a histogram, as [`observability`] lists them |
//! | `oauth2-jwt` | no | `oauth2::Assertion`: signed JWTs, for the client authentication `private_key_jwt` and for JWT bearer |
//! | `native-roots` | no | `tls::Roots::Native`: the default client can trust the operating system's roots |
//! | `aws-lc-rs` | no | `tls::Cryptography::AwsLcRs`: the default client can use aws-lc-rs |
//! | `tenants` | no | `TokenProviders` and `BearerAuthLayer::by_key`: one layer for many tenants, each with its own token |
//! | `reqwest` | no | `ReqwestService`, which makes a reqwest client a tower service |
//! | `tower-http` | no | after a redirect by a `FollowRedirect` beneath the layer, only a 401 of the request's own origin is a challenge |
//!
//! The stores and the test server are packages of their own: [`tower-bearer-store`](https://docs.rs/tower-bearer-store) has
//! `FileStore`, `RedisStore` and `EncryptedStore`, and [`tower-bearer-testing`](https://docs.rs/tower-bearer-testing) has
//! `AuthServer`, an api.video-compatible server on loopback, for the tests of your own stack.
//!
//! Without features, the crate and its dependencies are 42 crates, which take 16 s of CPU time to build. With the default
//! features they are 69 crates and 33 s, most of it for hyper and rustls, and with all features 164 crates and 88 s.
//! `BENCHMARKING.md` in the repository has the commands.
//!
//! # Several processes
//!
//! Each provider serves one process. Processes that use one credential, or one user's login, share its token in a
//! [`store`]: in Redis, in a file, or in a store of your own. See [`guide::fleet`].
//!
//! # Many tenants
//!
//! A service that calls an API for many accounts has a token for each: `TokenProviders` makes a provider by key, and
//! `BearerAuthLayer::by_key` reads the key from the request (feature `tenants`, module `tenants`).
//!
//! # Where next
//!
//! [`guide::recipes`] for your stack, [`BearerAuthLayer`] for the layer's options, [`TokenProvider::builder`] for the provider's,
//! [`replay`] for bodies that are not `Clone`, [`guide::oauth2`] for an OAuth 2.0 authorization server and for a user's login,
//! [`TokenClient`], [`source_fn`] and [`TokenSource`] for another token service, [`observability`] for events and metrics,
//! [`tower-bearer-testing`](https://docs.rs/tower-bearer-testing) for tests.
//!
//! # Runtime
//!
//! A tokio runtime with time enabled. A refresh runs on the runtime of the caller that starts it, or on
//! [that of the provider](TokenProviderBuilder::runtime): a synchronous wrapper that makes a runtime for each call gives
//! the provider one that lives longer.

#![cfg_attr(docsrs, feature(doc_cfg))]

mod authorization;
mod bounds;
mod chain;
pub mod challenge;
mod debug;
mod detached;
mod error;
mod future;
pub mod guide;
mod layer;
mod layer_options;
mod login;
pub mod observability;
mod origins;
mod per_request;
mod provider;
mod refresh_ahead;
pub mod replay;
#[cfg(feature = "reqwest")]
mod reqwest_service;
mod retry;
mod retry_after;
mod retry_budget;
mod select;
mod service;
mod source;
pub mod store;
mod sync;
#[cfg(feature = "tenants")]
#[cfg_attr(docsrs, doc(cfg(feature = "tenants")))]
pub mod tenants;
mod timer;
mod token;
mod upload_token;
mod www_authenticate;

pub use self::authorization::ExistingAuthorization;
pub use self::bounds::{CloneService, HttpService};
pub use self::error::{BoxError, Error, SourceError, SourceErrorKind, TokenError};
pub use self::future::ResponseFuture;
pub use self::layer::BearerAuthLayer;
pub use self::origins::AllowedOrigins;
pub use self::per_request::{NoBearer, UseToken};
pub use self::provider::{Freshness, Status, StatusChanges, TokenProvider, TokenProviderBuilder};
pub use self::refresh_ahead::RefreshAhead;
#[cfg(feature = "reqwest")]
#[cfg_attr(docsrs, doc(cfg(feature = "reqwest")))]
pub use self::reqwest_service::{ExecuteError, ReqwestExt, ReqwestFuture, ReqwestService};
pub use self::retry::RetryPolicy;
pub use self::service::BearerAuth;
#[cfg(feature = "default-client")]
#[cfg_attr(docsrs, doc(cfg(feature = "default-client")))]
pub use self::source::client::tls;
pub use self::source::oauth2::{self, OAuth2};
pub use self::source::{
    Credential, RefreshReason, SourceFn, StaticToken, TokenClient, TokenFile, TokenRequest, TokenResponse,
    TokenSource, source_fn,
};
#[cfg(feature = "tenants")]
#[cfg_attr(docsrs, doc(cfg(feature = "tenants")))]
pub use self::tenants::TokenProviders;
pub use self::token::{Token, TokenBuilder};
pub use self::{source::api_video::ApiVideo, upload_token::UploadToken};

/// README.md's code, tested as this crate's documentation is.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
