//! [`Shared`]: what a request under way needs of the service that sent it.

use std::sync::{Mutex, PoisonError};

use crate::options::Options;

/// What requests under way share with the service that sent them: one reference count per request.
pub(crate) struct Shared<S, R> {
    pub(crate) options: Options<R>,
    /// What a retry's service is cloned from. It is never made ready, so that it holds no permit of a
    /// `ConcurrencyLimit`. The lock is there so that the service need not be `Sync`.
    template: Mutex<S>,
}

impl<S, R> Shared<S, R>
where
    S: Clone,
{
    pub(crate) fn new(service: S, options: Options<R>) -> Self {
        Self { options, template: Mutex::new(service) }
    }

    /// A service that nobody has made ready yet.
    pub(crate) fn service(&self) -> S {
        self.template.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
