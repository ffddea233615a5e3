//! [`LayerOptions`]: what the layer's methods set, and their validation.

use crate::authorization::ExistingAuthorization;
use crate::challenge::ChallengeRule;
use crate::error::Error;
use crate::origins::AllowedOrigins;
use crate::replay::Cloned;
use crate::retry::RetryPolicy;
use crate::select::Providers;

#[derive(Clone, Debug)]
pub(crate) struct LayerOptions<R> {
    pub(crate) providers: Providers,
    pub(crate) replay: R,
    /// How much of a body the strategy keeps; `None` if it has no limit.
    pub(crate) replay_limit: Option<usize>,
    pub(crate) retry: RetryPolicy,
    pub(crate) challenge: ChallengeRule,
    /// `None` for those of the request's provider.
    pub(crate) allowed_origins: Option<AllowedOrigins>,
    pub(crate) existing: ExistingAuthorization,
}

impl LayerOptions<Cloned> {
    pub(crate) fn new(providers: Providers, allowed_origins: Option<AllowedOrigins>) -> Self {
        Self {
            allowed_origins,
            providers,
            replay: Cloned,
            replay_limit: None,
            retry: RetryPolicy::new(),
            challenge: ChallengeRule::Bearer,
            existing: ExistingAuthorization::default(),
        }
    }
}

impl<R> LayerOptions<R> {
    /// Replaces the strategy that sends bodies again.
    pub(crate) fn with_replay<R2>(self, replay: R2, replay_limit: Option<usize>) -> LayerOptions<R2> {
        let Self { providers, replay: _, replay_limit: _, retry, challenge, allowed_origins, existing } =
            self;
        LayerOptions { providers, replay, replay_limit, retry, challenge, allowed_origins, existing }
    }

    pub(crate) fn validate(&self) -> Result<(), Error> {
        let limit = format_args!("the replay limit must be > 0 (use no_replay() to keep nothing), got 0");
        Error::check(self.replay_limit != Some(0), limit)?;
        self.retry.validate()
    }
}
