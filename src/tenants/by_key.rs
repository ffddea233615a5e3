//! [`ByKey`]: selects the provider of a request by a key in the request.

use std::{
    borrow::{Borrow, Cow},
    fmt,
    hash::Hash,
    sync::Arc,
};

use http::{Extensions, HeaderMap, Method, Request, Uri, Version};

use super::{providers::TokenProviders, tenant::Tenant};
use crate::{
    authorization::{Authorized, ExistingAuthorization, TooManyHeaders, authorize},
    error::Error,
    layer::BearerAuthLayer,
    provider::TokenProvider,
    replay::Cloned,
    retry::Budgets,
    select::SelectProvider,
    token::TokenId,
};

type Select = dyn Fn(RequestHead<'_>) -> Result<Arc<Tenant>, Error> + Send + Sync;

/// Selects the provider of a request by a key in the request; see
/// [`BearerAuthLayer::by_key`](crate::BearerAuthLayer::by_key).
///
/// It names the type of a layer or a service: `BearerAuth<Client, Cloned, ByKey>`.
#[derive(Clone)]
pub struct ByKey {
    select: Arc<Select>,
    /// Reports a request without a tenant.
    nobody: TokenProvider,
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
    #[inline]
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

impl BearerAuthLayer<Cloned, ByKey> {
    /// Makes a layer that adds to each request the token of its tenant. `key_of` reads the tenant's key from the head of the
    /// request, its extensions included.
    ///
    /// A key that is part of the request, such as a header's value or an extension, is [borrowed](Cow::Borrowed). A key that
    /// is made of it is [owned](Cow::Owned). The key may be borrowed as a `str` if the group's keys are `String`s.
    ///
    /// ```
    /// use std::borrow::Cow;
    /// use tower_bearer::{BearerAuthLayer, BoxError, StaticToken, TokenProvider, TokenProviders};
    ///
    /// let providers = TokenProviders::new(|tenant: &String| {
    ///     Ok::<_, BoxError>(TokenProvider::builder(StaticToken::new("eyJ0eXAi")).name(tenant))
    /// });
    /// let layer = BearerAuthLayer::by_key(providers, |head| {
    ///     head.headers.get("x-tenant")?.to_str().ok().map(Cow::Borrowed)
    /// });
    /// # let _ = layer;
    /// ```
    ///
    /// `key_of` must return a key that the caller of the API may use: a header that a client sets must have been checked.
    ///
    /// # Requests without a key
    ///
    /// If `key_of` returns `None`, the request fails with [`Error::MissingKey`]. If the factory returns an error, it fails
    /// with [`Error::Factory`]. It is never sent with the token of another tenant. A request that is to be sent without a
    /// token needs no key: one with [`NoBearer`](crate::NoBearer), with an `Authorization` header that is
    /// [kept](crate::ExistingAuthorization::Keep), or to an origin outside of the layer's
    /// [`allowed_origins`](Self::allowed_origins).
    ///
    /// # Options
    ///
    /// Each tenant has a retry budget with the values of the layer's [`RetryPolicy`](crate::RetryPolicy), which the layers
    /// that use the policy and the group share. The origins are by default those of the tenant's source.
    #[cfg_attr(docsrs, doc(cfg(feature = "tenants")))]
    pub fn by_key<K, Q, F>(providers: TokenProviders<K>, key_of: F) -> Self
    where
        K: Borrow<Q> + Clone + Eq + Hash + Send + Sync + 'static,
        Q: Eq + Hash + ToOwned<Owned = K> + ?Sized + 'static,
        F: for<'a> Fn(RequestHead<'a>) -> Option<Cow<'a, Q>> + Send + Sync + 'static,
    {
        let nobody = providers.nobody().clone();
        let select = move |head: RequestHead<'_>| {
            let key = key_of(head).ok_or(Error::MissingKey)?;
            providers.tenant::<Q>(&key)
        };
        Self::selecting(ByKey { select: Arc::new(select), nobody })
    }
}

impl SelectProvider for ByKey {
    type Selected = Option<Arc<Tenant>>;
    type Cache = ();

    fn cache(&self) {}

    #[inline]
    fn select<B>(&self, request: &Request<B>) -> Result<Self::Selected, Error> {
        (self.select)(RequestHead::of(request)).map(Some)
    }

    fn none(&self) -> Self::Selected {
        None
    }

    #[inline]
    fn provider<'a>(&'a self, selected: &'a Self::Selected) -> &'a TokenProvider {
        selected.as_ref().map_or(&self.nobody, |tenant| &tenant.provider)
    }

    /// Reads the token of the tenant. A service keeps none of them, since it would keep them all.
    #[inline]
    fn authorize(
        &self,
        selected: &Self::Selected,
        (): &mut (),
        headers: &mut HeaderMap,
        existing: ExistingAuthorization,
    ) -> Option<(Result<Authorized, TooManyHeaders>, TokenId)> {
        let token = self.provider(selected).usable()?;
        Some((authorize(headers, token.0.header(), existing), token.id()))
    }

    fn budgets<'a>(&'a self, selected: &'a Self::Selected) -> Option<&'a Budgets> {
        selected.as_ref().map(|tenant| &tenant.budgets)
    }
}

/// Shows no key: a key may be a secret.
impl fmt::Debug for ByKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ByKey").finish_non_exhaustive()
    }
}
