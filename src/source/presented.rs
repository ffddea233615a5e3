//! [`Presented`]: a refresh token that is being presented to a token endpoint, and what became of it.

use http::StatusCode;
use secrecy::{ExposeSecret, SecretString};

use super::client::Sent;
use crate::error::SourceError;

/// How often a refresh token is presented if no answer says what became of it. The first time may have spent it.
pub(crate) const MAX_PRESENTED: u8 = 2;

/// How an exchange failed.
pub(crate) struct Failure {
    pub(crate) error: SourceError,
    pub(crate) means: Means,
}

/// What the failure of an exchange means for the refresh token in it.
pub(crate) enum Means {
    /// The endpoint rejected it, with this status.
    Rejected(#[cfg_attr(not(feature = "api-video"), allow(dead_code))] StatusCode),
    /// It may be spent: the endpoint may have processed the request.
    Unclear,
    /// It is not spent: the request was not sent, or not processed.
    Unspent,
    /// The endpoint granted this one in its place, beside a token that cannot be used.
    #[cfg(feature = "oauth2")]
    Replaced(SecretString),
}

/// The failure of an exchange without a response, or of what comes before it.
impl From<SourceError> for Failure {
    fn from(error: SourceError) -> Self {
        let is_unspent = error.is_unsent() || !error.is_transient();
        Self { error, means: if is_unspent { Means::Unspent } else { Means::Unclear } }
    }
}

/// What remembers how often refresh tokens were presented.
pub(crate) trait Count {
    /// Changes how often this refresh token was presented, if it is still remembered.
    fn change(&self, refresh_token: &str, change: impl FnOnce(&mut u8));
}

/// A refresh token that is being presented to the endpoint.
///
/// It counts as presented from the start, because the exchange may be lost at any await. Its drop takes that back if the
/// request was not sent.
pub(crate) struct Presented<C: Count> {
    pub(crate) count: C,
    refresh_token: SecretString,
    pub(crate) sent: Sent,
    is_unspent: bool,
}

impl<C: Count> Presented<C> {
    /// `count` has counted the refresh token.
    pub(crate) fn new(count: C, refresh_token: SecretString) -> Self {
        Self { count, refresh_token, sent: Sent::default(), is_unspent: false }
    }

    pub(crate) fn refresh_token(&self) -> &str {
        self.refresh_token.expose_secret()
    }

    /// Records how the exchange failed. Returns the failure as an error if the refresh token must not be presented again.
    pub(crate) fn failed(mut self, failure: Failure) -> Result<SourceError, Failure> {
        self.is_unspent = matches!(failure.means, Means::Unspent);
        let is_over = match failure.means {
            Means::Rejected(_) => {
                self.count.change(self.refresh_token(), |presented| *presented = MAX_PRESENTED);
                true
            }
            // If the server asks for a delay, nothing else is sent before that has passed.
            Means::Unclear if failure.error.retry_after().is_none() => {
                let mut times = MAX_PRESENTED;
                self.count.change(self.refresh_token(), |presented| times = *presented);
                times >= MAX_PRESENTED
            }
            _ => false,
        };
        if is_over { Err(failure) } else { Ok(failure.error) }
    }
}

impl<C: Count> Drop for Presented<C> {
    fn drop(&mut self) {
        if self.is_unspent || !self.sent.get() {
            self.count.change(self.refresh_token(), |presented| *presented = presented.saturating_sub(1));
        }
    }
}
