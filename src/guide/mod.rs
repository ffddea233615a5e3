//! Pages on subjects that span several items of the crate.
//!
//! - [`recipes`]: how to add the layer to hyper-util, axum, tonic, kube, octocrab, reqwest and others.

/// How to add the layer to an existing stack.
///
// Its examples need the peers, so they are tested in `interop`, where the peers are dependencies.
#[cfg_attr(not(doctest), doc = include_str!("recipes.md"))]
pub mod recipes {}
