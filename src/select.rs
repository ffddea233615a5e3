//! [`SelectProvider`]: which provider's token a request gets.

use http::{HeaderMap, Request};

use crate::{
    authorization::{Authorized, ExistingAuthorization, TooManyHeaders, authorize},
    error::Error,
    provider::{Cache, TokenProvider},
    retry::Budgets,
    token::TokenId,
};

mod sealed {
    use crate::provider::TokenProvider;

    /// Prevents implementations of [`SelectProvider`](super::SelectProvider) in other crates.
    pub trait Sealed {}

    impl Sealed for TokenProvider {}
    #[cfg(feature = "tenants")]
    impl Sealed for crate::tenants::ByKey {}
}

/// Selects the provider whose token a request gets: the bound on the last parameter of
/// [`BearerAuthLayer`](crate::BearerAuthLayer).
///
/// [`TokenProvider`], the default, is one provider for all requests. `tenants::ByKey` (feature `tenants`) selects one by a
/// key in the request. This trait is sealed: no other type can implement it.
pub trait SelectProvider: sealed::Sealed + Clone {
    /// What a request keeps of its provider.
    #[doc(hidden)]
    type Selected;

    /// What a service keeps between its requests.
    #[doc(hidden)]
    type Cache: Clone;

    #[doc(hidden)]
    fn cache(&self) -> Self::Cache;

    /// Selects the provider of a request.
    #[doc(hidden)]
    fn select<B>(&self, request: &Request<B>) -> Result<Self::Selected, Error>;

    /// What a request keeps that has no provider: it is failed, or sent without a token.
    #[doc(hidden)]
    fn none(&self) -> Self::Selected;

    #[doc(hidden)]
    fn provider<'a>(&'a self, selected: &'a Self::Selected) -> &'a TokenProvider;

    /// Adds the token to a request, if there is one that works, and returns whose header the request has and the token.
    /// Starts a refresh if the token is expiring.
    #[doc(hidden)]
    fn authorize(
        &self,
        selected: &Self::Selected,
        cache: &mut Self::Cache,
        headers: &mut HeaderMap,
        existing: ExistingAuthorization,
    ) -> Option<(Result<Authorized, TooManyHeaders>, TokenId)>;

    /// The retry budgets of the provider. `None` if its requests use the budget of the layer's policy.
    #[doc(hidden)]
    fn budgets<'a>(&'a self, selected: &'a Self::Selected) -> Option<&'a Budgets>;
}

impl SelectProvider for TokenProvider {
    type Selected = ();
    type Cache = Cache;

    fn cache(&self) -> Cache {
        self.cache()
    }

    #[inline]
    fn select<B>(&self, _: &Request<B>) -> Result<(), Error> {
        Ok(())
    }

    fn none(&self) {}

    #[inline]
    fn provider<'a>(&'a self, (): &'a ()) -> &'a TokenProvider {
        self
    }

    #[inline]
    fn authorize(
        &self,
        (): &(),
        cache: &mut Cache,
        headers: &mut HeaderMap,
        existing: ExistingAuthorization,
    ) -> Option<(Result<Authorized, TooManyHeaders>, TokenId)> {
        let (header, token) = self.header(cache)?;
        Some((authorize(headers, header, existing), token))
    }

    fn budgets<'a>(&'a self, (): &'a ()) -> Option<&'a Budgets> {
        None
    }
}
