//! [`Shared`]: what a request under way needs of the service that sent it.

use std::{
    collections::BTreeSet,
    sync::{Mutex, PoisonError},
};

use http::{Response, Uri};

use crate::{config::Config, error::Error, origins};

/// How many origins that are not allowed are reported: a request's URI may be a stranger's input.
const MAX_REPORTED: usize = 64;

/// What requests under way share with the service that sent them: one reference count per request.
pub(crate) struct Shared<S, R> {
    pub(crate) options: Config<R>,
    /// An option out of its range: the error of every request, since the layer's methods cannot fail.
    pub(crate) invalid: Option<Error>,
    /// What the service of a retry is cloned from. It is never made ready, so that it holds no permit of a
    /// `ConcurrencyLimit`. Behind a lock, so that the service need not be `Sync`.
    template: Mutex<S>,
    /// The origins that are not allowed and have been reported.
    reported: Mutex<BTreeSet<String>>,
}

impl<S, R> Shared<S, R> {
    /// Reports a request that goes without the token, once for each origin.
    #[cold]
    pub(crate) fn report_origin(&self, uri: &Uri) {
        let origin = origins::shown(uri);
        let mut reported = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
        if reported.len() < MAX_REPORTED && !reported.contains(&origin) {
            reported.insert(origin.clone());
            drop(reported);
            self.options.provider.reporter().origin_not_allowed(&origin);
        }
    }
}

impl<S, R> Shared<S, R> {
    /// Whether a response comes from an origin that is not allowed: a redirect follower beneath the layer was
    /// redirected there, and did not send the token.
    ///
    /// Known only if the follower leaves its last URI in the response.
    #[cold]
    pub(crate) fn is_foreign<ResBody>(&self, response: &Response<ResBody>) -> bool {
        final_uri(response).is_some_and(|uri| !self.options.allowed_origins.covers(uri))
    }
}

impl<S, R> Shared<S, R>
where
    S: Clone,
{
    pub(crate) fn new(service: S, options: Config<R>) -> Self {
        let invalid = options.validate().err();
        Self { options, invalid, template: Mutex::new(service), reported: Mutex::default() }
    }

    /// A clone of the inner service that has not been made ready.
    pub(crate) fn service(&self) -> S {
        self.template.lock().unwrap_or_else(PoisonError::into_inner).clone()
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
