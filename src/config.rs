//! [`Config`]: what the layer's methods set, and every request follows.

use crate::{
    challenge::ChallengeRule, error::Error, origins::AllowedOrigins, provider::TokenProvider, replay::Cloned,
    retry::RetryPolicy,
};

#[derive(Clone, Debug)]
pub(crate) struct Config<R> {
    pub(crate) provider: TokenProvider,
    pub(crate) replay: R,
    pub(crate) retry: RetryPolicy,
    pub(crate) challenge: ChallengeRule,
    pub(crate) scope: AllowedOrigins,
    pub(crate) existing: ExistingAuthorization,
    /// An option that cannot work: what every request answers, since the layer's methods cannot fail.
    pub(crate) invalid: Option<Error>,
}

impl Config<Cloned> {
    pub(crate) fn new(provider: TokenProvider) -> Self {
        Self {
            scope: provider.allowed_origins().clone(),
            provider,
            replay: Cloned,
            retry: RetryPolicy::new(),
            challenge: ChallengeRule::Bearer,
            existing: ExistingAuthorization::default(),
            invalid: None,
        }
    }
}

impl<R> Config<R> {
    /// The same with another strategy, and without what was wrong with the one before.
    pub(crate) fn with_replay<R2>(self, replay: R2) -> Config<R2> {
        let Self { provider, replay: _, retry, challenge, scope, existing, invalid: _ } = self;
        Config { provider, replay, retry, challenge, scope, existing, invalid: None }
    }
}

/// What becomes of an `Authorization` header that a request already has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ExistingAuthorization {
    /// The request is sent as it is; its 401 is its caller's own, and nothing is refreshed or sent again.
    #[default]
    Keep,
    /// The header is replaced by ours.
    Replace,
}
