//! [`LayerOptions`]: what the layer's methods set, and their validation.

use crate::authorization::ExistingAuthorization;
use crate::challenge::ChallengeRule;
use crate::error::Error;
use crate::origins::AllowedOrigins;
use crate::retry::RetryPolicy;
use crate::select::Providers;

#[derive(Clone, Debug)]
pub(crate) struct LayerOptions {
    pub(crate) providers: Providers,
    /// How much of a body the strategy keeps; `None` if it has no limit.
    pub(crate) replay_limit: Option<usize>,
    pub(crate) retry: RetryPolicy,
    pub(crate) challenge: ChallengeRule,
    /// `None` for those of the request's provider.
    pub(crate) allowed_origins: Option<AllowedOrigins>,
    /// Whether a request to another origin fails.
    pub(crate) is_strict: bool,
    pub(crate) existing: ExistingAuthorization,
}

impl LayerOptions {
    pub(crate) fn new(providers: Providers, allowed_origins: Option<AllowedOrigins>) -> Self {
        Self {
            allowed_origins,
            is_strict: false,
            providers,
            replay_limit: None,
            retry: RetryPolicy::new(),
            challenge: ChallengeRule::Bearer,
            existing: ExistingAuthorization::default(),
        }
    }

    pub(crate) fn validate(&self) -> Result<(), Error> {
        let limit = format_args!("the replay limit must be > 0, got 0: to keep nothing, turn the replay off");
        Error::check(self.replay_limit != Some(0), limit)?;
        self.retry.validate()
    }
}
