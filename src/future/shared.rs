//! [`Via`]: what a request under way needs of the service that sent it. [`Shared`]: what its requests share.

use std::collections::BTreeSet;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use http::{Response, Uri};
use tokio::time::Instant;

use crate::error::Error;
use crate::layer_options::LayerOptions;
use crate::observability::NEWS_INTERVAL;
use crate::origin_hash::OriginHash;
use crate::origins;
use crate::provider::TokenProvider;

/// How many origins that are not allowed are reported: a request's URI may be a stranger's input.
const MAX_REPORTED: usize = 64;

/// What requests under way share with the service that sent them: one reference count per request.
pub(crate) struct Shared<S, R> {
    pub(crate) options: LayerOptions,
    pub(crate) replay: R,
    /// An option out of its range: the error of every request, since the layer's methods cannot fail.
    pub(crate) invalid: Option<Error>,
    /// What the service of a retry is cloned from. It is never made ready, so that it holds no permit of a
    /// `ConcurrencyLimit`. Behind a lock, so that the service need not be `Sync`.
    template: Mutex<S>,
    /// When a body that could not be sent again was news last.
    body_reported: Mutex<Option<Instant>>,
    /// The origins that are not allowed and have been reported.
    reported: Mutex<BTreeSet<String>>,
    /// Whether the responses say where they come from, as far as is known: then a request keeps a hash of its origin.
    follows: AtomicBool,
}

impl<S, R> Shared<S, R>
where
    S: Clone,
{
    pub(crate) fn new(service: S, options: LayerOptions, replay: R) -> Self {
        Self {
            invalid: options.validate().err(),
            options,
            replay,
            template: Mutex::new(service),
            body_reported: Mutex::default(),
            reported: Mutex::default(),
            follows: AtomicBool::new(cfg!(feature = "tower-http")),
        }
    }

    /// A clone of the inner service that has not been made ready.
    pub(crate) fn service(&self) -> S {
        self.template.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl<S, R> Shared<S, R> {
    /// What a request keeps of its origin.
    #[inline]
    pub(crate) fn origin(&self, uri: &Uri) -> OriginHash {
        if self.follows.load(Ordering::Relaxed) { OriginHash::of(uri) } else { OriginHash::NONE }
    }

    /// Whether a response comes from another origin than its request went to: a redirect follower beneath the layer was
    /// redirected there, and did not send the token.
    ///
    /// Known only if the follower leaves that in the response.
    #[cold]
    #[cfg_attr(not(feature = "tower-http"), allow(unused_variables))]
    pub(super) fn is_foreign<ResBody>(&self, response: &Response<ResBody>, origin: OriginHash) -> bool {
        let extensions = response.extensions();
        #[cfg(feature = "tower-http")]
        {
            let uri = extensions.get::<tower_http::follow_redirect::RequestUri>();
            self.follows.store(uri.is_some(), Ordering::Relaxed);
            if let Some(uri) = uri {
                return !origin.is_of(&uri.0);
            }
        }
        extensions.get::<Redirected>().is_some()
    }
}

/// What a request needs of the service that sent it: what its requests share, and the provider of this one.
pub(crate) struct Via<S, R> {
    shared: Arc<Shared<S, R>>,
    /// `None` for the service's only one, or if the request needs none.
    selected: Option<TokenProvider>,
}

impl<S, R> Via<S, R> {
    #[inline]
    pub(crate) fn new(shared: &Arc<Shared<S, R>>, selected: Option<TokenProvider>) -> Self {
        Self { shared: Arc::clone(shared), selected }
    }

    #[inline]
    pub(crate) fn provider(&self) -> &TokenProvider {
        self.selected.as_ref().unwrap_or(&self.shared.options.providers.default)
    }

    /// Whether it is news that a body cannot be sent again: once a minute.
    pub(super) fn body_is_news(&self) -> bool {
        let mut reported = self.body_reported.lock().unwrap_or_else(PoisonError::into_inner);
        let is_news = reported.is_none_or(|at| at.elapsed() >= NEWS_INTERVAL);
        if is_news {
            *reported = Some(Instant::now());
        }
        is_news
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
}

impl<S, R> Deref for Via<S, R> {
    type Target = Shared<S, R>;

    #[inline]
    fn deref(&self) -> &Shared<S, R> {
        &self.shared
    }
}

/// A response extension of a service that follows redirects: it comes from another origin than its request went to.
#[derive(Clone, Copy)]
pub(crate) struct Redirected;
