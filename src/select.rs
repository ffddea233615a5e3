//! [`Providers`]: the provider whose token a request gets.
#![cfg_attr(not(feature = "tenants"), allow(dead_code, unreachable_pub))]

use std::{fmt, sync::Arc};

use http::{Extensions, HeaderMap, Method, Request, Uri, Version};

use crate::{error::Error, provider::TokenProvider};

type Select = dyn Fn(RequestHead<'_>) -> Result<TokenProvider, Error> + Send + Sync;

/// One provider for all requests, or one for each.
#[derive(Clone)]
pub(crate) struct Providers {
    /// The provider of all requests. If one is selected for each, it reports those without one, and has no token.
    pub(crate) default: TokenProvider,
    /// Selects the provider of a request.
    pub(crate) select: Option<Arc<Select>>,
}

impl Providers {
    /// Returns the provider that is selected for a request. `None` if one provider is for all.
    #[inline]
    pub(crate) fn of<B>(&self, request: &Request<B>) -> Result<Option<TokenProvider>, Error> {
        match &self.select {
            None => Ok(None),
            Some(select) => select(RequestHead::of(request)).map(Some),
        }
    }
}

/// Shows no key: a key may be a secret.
impl fmt::Debug for Providers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Providers");
        match self.select {
            None => shown.field("provider", &self.default).finish(),
            Some(_) => shown.finish_non_exhaustive(),
        }
    }
}

/// The head of a request, from which the key of its tenant is read.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct RequestHead<'a> {
    /// The method.
    pub method: &'a Method,
    /// The URI.
    pub uri: &'a Uri,
    /// The HTTP version.
    pub version: Version,
    /// The header fields.
    pub headers: &'a HeaderMap,
    /// The extensions, which layers above may have added.
    pub extensions: &'a Extensions,
}

impl<'a> RequestHead<'a> {
    fn of<B>(request: &'a Request<B>) -> Self {
        Self {
            method: request.method(),
            uri: request.uri(),
            version: request.version(),
            headers: request.headers(),
            extensions: request.extensions(),
        }
    }
}
