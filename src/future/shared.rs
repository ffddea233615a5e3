//! [`Shared`]: what a request under way needs of the service that sent it.

use std::{
    collections::BTreeSet,
    sync::{Mutex, PoisonError},
};

use http::{Response, Uri};

use crate::{config::Config, origins};

/// How many origins outside of the scope are told of: where they go may be a stranger's choice.
const MAX_TOLD: usize = 64;

/// What requests under way share with the service that sent them: one reference count per request.
pub(crate) struct Shared<S, R> {
    pub(crate) options: Config<R>,
    /// What a retry's service is cloned from. It is never made ready, so that it holds no permit of a
    /// `ConcurrencyLimit`. The lock is there so that the service need not be `Sync`.
    template: Mutex<S>,
    /// The origins outside of the scope that have been told of.
    outside: Mutex<BTreeSet<String>>,
}

impl<S, R> Shared<S, R> {
    /// Tells of a request that goes without the token, once for each origin.
    #[cold]
    pub(crate) fn outside(&self, uri: &Uri) {
        let origin = origins::shown(uri);
        let mut told = self.outside.lock().unwrap_or_else(PoisonError::into_inner);
        if told.len() < MAX_TOLD && !told.contains(&origin) {
            told.insert(origin.clone());
            drop(told);
            self.options.provider.reporter().outside(&origin);
        }
    }
}

impl<S, R> Shared<S, R> {
    /// Whether an answer comes from an origin that the token is not meant for: where a follower of redirects beneath the
    /// layer has been led, which does not take the token there.
    ///
    /// Beneath the layer, and so known from the answer alone, where the follower leaves its last URI there.
    #[cold]
    pub(crate) fn is_foreign<ResBody>(&self, response: &Response<ResBody>) -> bool {
        final_uri(response).is_some_and(|uri| !self.options.scope.covers(uri))
    }
}

impl<S, R> Shared<S, R>
where
    S: Clone,
{
    pub(crate) fn new(service: S, options: Config<R>) -> Self {
        Self { options, template: Mutex::new(service), outside: Mutex::default() }
    }

    /// A service that nobody has made ready yet.
    pub(crate) fn service(&self) -> S {
        self.template.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Where an answer came from, as a follower of redirects says.
#[derive(Clone)]
pub(crate) struct FinalUri(pub(crate) Uri);

fn final_uri<ResBody>(response: &Response<ResBody>) -> Option<&Uri> {
    let extensions = response.extensions();
    let uri = extensions.get::<FinalUri>().map(|uri| &uri.0);
    #[cfg(feature = "tower-http")]
    let uri = uri.or_else(|| extensions.get::<tower_http::follow_redirect::RequestUri>().map(|uri| &uri.0));
    uri
}
