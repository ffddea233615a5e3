//! Pages on subjects that span several items of the crate.
//!
//! - [`concepts`]: token, provider, source, challenge and store, on which the other pages build.
//! - [`recipes`]: how to add the layer to hyper-util, axum, tonic, kube, octocrab, reqwest and others.
//! - [`without_tower`]: the token for a client that is not a tower service: reqwest-middleware, progenitor, object_store,
//!   a WebSocket and others.
//! - [`oauth2`]: tokens of an OAuth 2.0 authorization server, and of other SDKs.
//! - [`mcp`]: the token of an MCP client, and one login for all processes of a command-line tool.
//! - [`failures`]: what happens at an expiry, on a 401, when the auth endpoint fails, and at a shutdown.
//! - [`fleet`]: how several processes share one token.
//! - [`operating`]: how to run a program that uses the crate: its log, its alerts, and what to do about each.
//! - [`peers`]: what other crates do in the same scenarios, measured.
//! - [`security`]: what the crate promises about secrets, each promise with its test.

// The pages link to items of all features. The documentation is published with all of them.
#![cfg_attr(
    not(all(feature = "default-client", feature = "oauth2-jwt", feature = "tenants")),
    allow(rustdoc::broken_intra_doc_links)
)]

/// Five terms: token, provider, source, challenge and store.
///
#[doc = include_str!("concepts.md")]
pub mod concepts {}

/// The token for a client that is not a tower service.
///
// Its examples need the peers, as those of the recipes. `interop/sdks` tests those of the second part.
#[cfg_attr(not(doctest), doc = include_str!("without_tower.md"))]
#[cfg_attr(not(doctest), doc = include_str!("without_tower_clients.md"))]
pub mod without_tower {}

/// How to add the layer to an existing stack.
///
// Its examples need the peers, so they are tested in `interop`, where the peers are dependencies.
#[cfg_attr(not(doctest), doc = include_str!("recipes.md"))]
pub mod recipes {}

/// Tokens of an OAuth 2.0 authorization server, and of other SDKs.
///
// Its examples need the peers as well: `interop` tests those of the services, and `interop/sdks` those of the SDKs.
#[cfg_attr(not(doctest), doc = include_str!("oauth2.md"))]
#[cfg_attr(not(doctest), doc = include_str!("oauth2_sdks.md"))]
pub mod oauth2 {}

/// The token of an MCP client, and one login for all processes of a command-line tool.
///
// Its example needs rmcp, so it is tested in `interop/sdks`.
#[cfg_attr(not(doctest), doc = include_str!("mcp.md"))]
pub mod mcp {}

/// What happens at an expiry, on a 401, when the auth endpoint fails, and at a shutdown.
///
#[doc = include_str!("failures.md")]
pub mod failures {}

/// How several processes share one token.
///
#[doc = include_str!("fleet.md")]
pub mod fleet {}

/// How to run a program that uses this crate: its log, its alerts, and what to do about each.
///
#[doc = include_str!("operating.md")]
pub mod operating {}

/// What other crates that keep a bearer token do in the same scenarios, measured.
///
#[doc = include_str!("peers.md")]
pub mod peers {}

/// What the crate promises about secrets, each promise with its test, and what it does not promise.
///
#[doc = include_str!("../../SECURITY.md")]
pub mod security {}
