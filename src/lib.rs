//! A tower layer that gives any HTTP client a bearer token that is always fresh.
//!
//! # Why
//!
//! A bearer token runs out, or is revoked. Then every request under way gets a 401 at once, and each of them asks for
//! another token: the auth endpoint is stormed, a refresh token that can be used only once is used twice, uploads that
//! cannot be sent again are lost. This crate has one place where that is done right: one refresh for everybody, in a
//! task that no caller can cancel, and each refused request sent again, its body included.
//!
//! # Ten lines
//!
//! ```no_run
//! # #[cfg(feature = "api-video")]
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
//!     .layer(BearerAuthLayer::new("your api.video API key"))
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
//! Nothing that a caller would notice: in the last part of its life ([`RefreshAhead`]) a token is still used, while the next
//! is fetched behind the callers' backs. While a token lives, an outage of its source is not noticed either. What failures
//! do is told at [`TokenProvider`].
//!
//! # What happens on a 401
//!
//! 1. The refused token, and no other, is to be replaced: if the [`TokenProvider`] has a newer one already, that is taken.
//! 2. Otherwise one refresh for everybody fetches the next from the [`TokenSource`], in a task of its own.
//! 3. The refused answer is drained within bounds, so that its connection serves again.
//! 4. The request is sent again, with what [`replay`] has kept of its body; after a backoff, if that token was refused too.
//! 5. When nothing is left to try, the caller gets the API's last answer as it is.
//!
//! Which answers count as a refusal is told in [`challenge`], how often and how soon in [`RetryPolicy`].
//!
//! # Where the token goes
//!
//! To the origins of the layer's [`AllowedOrigins`] and no other, whatever a redirect or a URI says.
//!
//! # Features
//!
//! | feature | default | what it adds |
//! |---|---|---|
//! | `api-video` | yes | `ApiVideo`, the source for api.video's disposable bearer tokens, with its default HTTP client: hyper-util's, over rustls with ring and Mozilla's roots |
//! | `tracing` | yes | spans and events, as [`observability`] lists them |
//! | `metrics` | no | counters and a histogram, as [`observability`] lists them |
//! | `native-roots` | no | that client trusts the operating system's root certificates instead |
//! | `aws-lc-rs` | no | that client's cryptography is aws-lc-rs' instead of ring's |
//! | `store` | no | `TokenStore`: several processes share one token, in a store of your own |
//! | `file-store` | no | `FileStore`, for the processes of one host; needs Unix, and Rust 1.89 |
//! | `redis` | no | `RedisStore`, for the processes of many hosts |
//! | `encryption` | no | `EncryptedStore`: what is stored can only be read by those who have the key |
//! | `reqwest` | no | `ReqwestService`, with which the layer wraps a reqwest client |
//! | `tower-http` | no | the layer knows where a `FollowRedirect` beneath it was led, so that the 401 of another origin is no challenge |
//! | `test-util` | no | `testing::AuthServer`, a server of api.video's kind on loopback, for the tests of your own stack |
//!
//! # Several processes
//!
//! Each provider is for its own process. Processes that share a credential share its token by a `TokenStore` (feature `store`):
//! in Redis, in a file, or in a store of your own.
//!
//! # Where next
//!
//! [`recipes`] for your stack, [`BearerAuthLayer`] for the layer's options, [`TokenProvider::builder`] for the provider's, [`replay`] for bodies that are
//! not `Clone`, [`TokenSource`] for another token service, [`observability`] for what is logged and counted, `testing` for
//! tests.
//!
//! # Runtime
//!
//! A tokio runtime with time enabled. Refreshes run on the runtime of the caller that starts them.

#![cfg_attr(docsrs, feature(doc_cfg))]

mod authorization;
mod bounds;
pub mod challenge;
mod config;
mod error;
mod future;
mod layer;
pub mod observability;
mod per_request;
mod provider;
/// How to put the layer into the stack that you have.
///
// Its examples need the peers, and are tested where those are dependencies: in `interop`.
#[cfg_attr(not(doctest), doc = include_str!("recipes.md"))]
pub mod recipes {}
mod origins;
pub mod replay;
#[cfg(feature = "reqwest")]
mod reqwest_service;
mod retry;
mod service;
mod source;
#[cfg(feature = "store")]
#[cfg_attr(docsrs, doc(cfg(feature = "store")))]
pub mod store;
#[cfg(feature = "test-util")]
#[cfg_attr(docsrs, doc(cfg(feature = "test-util")))]
pub mod testing;
mod token;
#[cfg(feature = "api-video")]
mod upload_token;

#[cfg(feature = "reqwest")]
#[cfg_attr(docsrs, doc(cfg(feature = "reqwest")))]
pub use self::reqwest_service::{ReqwestFuture, ReqwestService};
pub use self::{
    bounds::{CloneService, HttpService},
    config::ExistingAuthorization,
    error::{BoxError, Error, SourceError, SourceErrorKind, TokenError},
    future::ResponseFuture,
    layer::BearerAuthLayer,
    origins::AllowedOrigins,
    per_request::{NoBearer, UseToken},
    provider::{Freshness, RefreshAhead, Status, StatusChanges, TokenProvider, TokenProviderBuilder},
    replay::ReplayBody,
    retry::RetryPolicy,
    service::BearerAuth,
    source::{RefreshReason, SourceFn, StaticToken, TokenFile, TokenRequest, TokenSource, source_fn},
    token::{Token, TokenBuilder},
};
#[cfg(feature = "api-video")]
#[cfg_attr(docsrs, doc(cfg(feature = "api-video")))]
pub use self::{source::ApiVideo, upload_token::UploadToken};

/// README.md's code, tested as this crate's documentation is.
#[cfg(all(doctest, feature = "api-video"))]
#[doc = include_str!("../README.md")]
struct Readme;
