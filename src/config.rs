//! [`Config`]: what the layer's methods set, and their validation.

use crate::{
    challenge::ChallengeRule, error::Error, origins::AllowedOrigins, provider::TokenProvider, replay::Cloned,
    retry::RetryPolicy,
};

#[derive(Clone, Debug)]
pub(crate) struct Config<R> {
    pub(crate) provider: TokenProvider,
    pub(crate) replay: R,
    /// How much of a body the strategy keeps; `None` if it has no limit.
    pub(crate) replay_limit: Option<usize>,
    pub(crate) retry: RetryPolicy,
    pub(crate) challenge: ChallengeRule,
    pub(crate) allowed_origins: AllowedOrigins,
    pub(crate) existing: ExistingAuthorization,
}

impl Config<Cloned> {
    pub(crate) fn new(provider: TokenProvider) -> Self {
        Self {
            allowed_origins: provider.allowed_origins().clone(),
            provider,
            replay: Cloned,
            replay_limit: None,
            retry: RetryPolicy::new(),
            challenge: ChallengeRule::Bearer,
            existing: ExistingAuthorization::default(),
        }
    }
}

impl<R> Config<R> {
    /// Replaces the strategy that sends bodies again.
    pub(crate) fn with_replay<R2>(self, replay: R2, replay_limit: Option<usize>) -> Config<R2> {
        let Self { provider, replay: _, replay_limit: _, retry, challenge, allowed_origins, existing } = self;
        Config { provider, replay, replay_limit, retry, challenge, allowed_origins, existing }
    }

    pub(crate) fn validate(&self) -> Result<(), Error> {
        if self.replay_limit == Some(0) {
            return Err(Error::out_of_range("the replay limit", "> 0 (use no_replay() to keep nothing)", 0));
        }
        self.retry.validate()
    }
}

/// What happens to an `Authorization` header that a request already has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExistingAuthorization {
    /// The request is sent unchanged. A 401 to it goes to the caller: it starts no refresh and no retry.
    #[default]
    Keep,
    /// The layer's token replaces the header.
    Replace,
}
