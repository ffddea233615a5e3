//! [`Via`]: what a request under way needs of the service that sent it. [`Shared`]: what its requests share.

use std::{
    collections::BTreeSet,
    ops::Deref,
    sync::{Arc, Mutex, PoisonError},
};

use http::{Response, Uri};

use crate::{
    config::Config, error::Error, origins, provider::TokenProvider, retry::Budgets, select::SelectProvider,
};

/// How many origins that are not allowed are reported: a request's URI may be a stranger's input.
const MAX_REPORTED: usize = 64;

/// What requests under way share with the service that sent them: one reference count per request.
pub(crate) struct Shared<S, R, P> {
    pub(crate) options: Config<R, P>,
    /// An option out of its range: the error of every request, since the layer's methods cannot fail.
    pub(crate) invalid: Option<Error>,
    /// What the service of a retry is cloned from. It is never made ready, so that it holds no permit of a
    /// `ConcurrencyLimit`. Behind a lock, so that the service need not be `Sync`.
    template: Mutex<S>,
    /// The origins that are not allowed and have been reported.
    reported: Mutex<BTreeSet<String>>,
}

impl<S, R, P> Shared<S, R, P>
where
    S: Clone,
{
    pub(crate) fn new(service: S, options: Config<R, P>) -> Self {
        let invalid = options.validate().err();
        Self { options, invalid, template: Mutex::new(service), reported: Mutex::default() }
    }

    /// A clone of the inner service that has not been made ready.
    pub(crate) fn service(&self) -> S {
        self.template.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What a request needs of the service that sent it: what its requests share, and the provider of this one.
pub(crate) struct Via<S, R, P: SelectProvider> {
    shared: Arc<Shared<S, R, P>>,
    selected: P::Selected,
}

impl<S, R, P: SelectProvider> Via<S, R, P> {
    #[inline]
    pub(crate) fn new(shared: &Arc<Shared<S, R, P>>, selected: P::Selected) -> Self {
        Self { shared: Arc::clone(shared), selected }
    }

    #[inline]
    pub(crate) fn provider(&self) -> &TokenProvider {
        self.options.providers.provider(&self.selected)
    }

    /// The retry budgets of the request's provider, if it has its own.
    pub(super) fn budgets(&self) -> Option<&Budgets> {
        self.options.providers.budgets(&self.selected)
    }

    /// Reports a request that goes without the token, once for each origin.
    #[cold]
    pub(crate) fn report_origin(&self, uri: &Uri) {
        let origin = origins::shown(uri);
        let mut reported = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
        if reported.len() < MAX_REPORTED && !reported.contains(&origin) {
            reported.insert(origin.clone());
            drop(reported);
            self.provider().reporter().origin_not_allowed(&origin);
        }
    }

    /// Whether a response comes from an origin that is not allowed: a redirect follower beneath the layer was
    /// redirected there, and did not send the token.
    ///
    /// Known only if the follower leaves its last URI in the response.
    #[cold]
    pub(super) fn is_foreign<ResBody>(&self, response: &Response<ResBody>) -> bool {
        final_uri(response).is_some_and(|uri| !self.options.covers(&self.selected, uri))
    }
}

impl<S, R, P: SelectProvider> Deref for Via<S, R, P> {
    type Target = Shared<S, R, P>;

    #[inline]
    fn deref(&self) -> &Shared<S, R, P> {
        &self.shared
    }
}

/// The URI that a response came from, as a redirect follower reports it.
#[derive(Clone)]
pub(crate) struct FinalUri(pub(crate) Uri);

fn final_uri<ResBody>(response: &Response<ResBody>) -> Option<&Uri> {
    let extensions = response.extensions();
    let uri = extensions.get::<FinalUri>().map(|uri| &uri.0);
    #[cfg(feature = "tower-http")]
    let uri = uri.or_else(|| extensions.get::<tower_http::follow_redirect::RequestUri>().map(|uri| &uri.0));
    uri
}
