//! [`Options`]: what the layer's methods set, and every request follows.

use crate::{
    challenge::Challenge, error::Error, provider::TokenProvider, replay::Cloned, retry::RetryPolicy,
    scope::Scope,
};

#[derive(Clone, Debug)]
pub(crate) struct Options<R> {
    pub(crate) provider: TokenProvider,
    pub(crate) replay: R,
    pub(crate) retry: RetryPolicy,
    pub(crate) challenge: Challenge,
    pub(crate) scope: Scope,
    pub(crate) existing: Existing,
    /// An option that cannot work: what every request answers, since the layer's methods cannot fail.
    pub(crate) invalid: Option<Error>,
}

impl Options<Cloned> {
    pub(crate) fn new(provider: TokenProvider) -> Self {
        Self {
            scope: provider.scope().clone(),
            provider,
            replay: Cloned,
            retry: RetryPolicy::new(),
            challenge: Challenge::Bearer,
            existing: Existing::default(),
            invalid: None,
        }
    }
}

impl<R> Options<R> {
    /// The same with another strategy, and without what was wrong with the one before.
    pub(crate) fn with_replay<R2>(self, replay: R2) -> Options<R2> {
        let Self { provider, replay: _, retry, challenge, scope, existing, invalid: _ } = self;
        Options { provider, replay, retry, challenge, scope, existing, invalid: None }
    }
}

/// What becomes of an `Authorization` header that a request already has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Existing {
    /// The request is sent as it is; its 401 is its caller's own, and nothing is refreshed or sent again.
    #[default]
    Keep,
    /// The header is replaced by ours.
    Replace,
}
