//! A tower layer that adds a bearer token to each request, refreshes the token before it expires, and retries requests
//! that the API answers with 401.
//!
//! A bearer token expires, or is revoked. Then all requests get a 401 at one moment, and each of them asks for another
//! token: the auth endpoint gets a burst of requests, a refresh token that can be used only once is used twice, and
//! uploads that cannot be sent again are lost. With this crate one refresh serves all requests, in a task that no
//! caller can cancel, and each challenged request is sent again, its body included.
//!
//! README.md has a first program with reqwest. With hyper, of whose TLS the features matter:
//!
//! ```sh
//! cargo add tower-bearer bytes http http-body-util tower --features tower/util
//! cargo add hyper-rustls --no-default-features --features http1,http2,ring,tls12,webpki-tokio
//! cargo add hyper-util --features client-legacy,http1,http2,tokio
//! cargo add tokio --features macros,rt-multi-thread
//! ```
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
//! # Where next
//!
//! | you want | page |
//! |---|---|
//! | to know the terms | [`guide::concepts`]: token, provider, source, challenge, store |
//! | your stack | [`guide::recipes`], [`guide::without_tower`] |
//! | OAuth 2.0, a user's login | [`guide::oauth2`] |
//! | options | [`BearerAuthLayer`], [`TokenProvider::builder`] |
//! | a token service of your own | [`source_fn`], [`TokenClient`], [`TokenSource`] |
//! | several processes | [`guide::fleet`], [`tower-bearer-store`](https://docs.rs/tower-bearer-store) |
//! | many accounts | `TokenProviders` (feature `tenants`) |
//! | failures, events, alerts | [`guide::failures`], [`observability`], [`guide::operating`] |
//! | tests of your own stack | [`tower-bearer-testing`](https://docs.rs/tower-bearer-testing) |
//!
//! # Runtime
//!
//! A tokio runtime with time enabled. A refresh runs on the runtime of the caller that starts it, or on
//! [that of the provider](TokenProviderBuilder::runtime).
//!
//! # Features
//!
#![doc = include_str!("guide/features.md")]
//!
//! Features only add items. Two things affect other code: `tower-http` changes which 401 is a challenge; and
//! `default-client`, `RedisStore` and the test server enable rustls with ring, `aws-lc-rs` with aws-lc-rs. If a program has
//! both, for example by the default features of hyper-rustls, rustls has no default, and a client that needs it panics:
//! install one at the start (`CryptoProvider::install_default`).
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
mod origin_hash;
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
mod token_builder;
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
pub use self::token::Token;
pub use self::token_builder::TokenBuilder;
pub use self::{source::api_video::ApiVideo, upload_token::UploadToken};

/// README.md's code, tested as this crate's documentation is.
#[cfg(all(doctest, feature = "default-client", feature = "reqwest"))]
#[doc = include_str!("../README.md")]
struct Readme;
