//! [`Config`]: what the layer's methods set, and their validation.

use http::Uri;

use crate::{
    authorization::ExistingAuthorization, challenge::ChallengeRule, error::Error, origins::AllowedOrigins,
    provider::TokenProvider, replay::Cloned, retry::RetryPolicy, select::SelectProvider,
};

#[derive(Clone, Debug)]
pub(crate) struct Config<R, P = TokenProvider> {
    pub(crate) providers: P,
    pub(crate) replay: R,
    /// How much of a body the strategy keeps; `None` if it has no limit.
    pub(crate) replay_limit: Option<usize>,
    pub(crate) retry: RetryPolicy,
    pub(crate) challenge: ChallengeRule,
    /// `None` for those of the request's provider.
    pub(crate) allowed_origins: Option<AllowedOrigins>,
    pub(crate) existing: ExistingAuthorization,
}

impl<P> Config<Cloned, P> {
    pub(crate) fn new(providers: P, allowed_origins: Option<AllowedOrigins>) -> Self {
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

impl<R, P> Config<R, P> {
    /// Replaces the strategy that sends bodies again.
    pub(crate) fn with_replay<R2>(self, replay: R2, replay_limit: Option<usize>) -> Config<R2, P> {
        let Self { providers, replay: _, replay_limit: _, retry, challenge, allowed_origins, existing } =
            self;
        Config { providers, replay, replay_limit, retry, challenge, allowed_origins, existing }
    }

    pub(crate) fn validate(&self) -> Result<(), Error> {
        if self.replay_limit == Some(0) {
            return Err(Error::out_of_range("the replay limit", "> 0 (use no_replay() to keep nothing)", 0));
        }
        self.retry.validate()
    }
}

impl<R, P: SelectProvider> Config<R, P> {
    /// Whether a request to `uri` may carry the token of the selected provider.
    #[inline]
    pub(crate) fn covers(&self, selected: &P::Selected, uri: &Uri) -> bool {
        match &self.allowed_origins {
            Some(origins) => origins.covers(uri),
            None => self.providers.provider(selected).allowed_origins().covers(uri),
        }
    }
}
