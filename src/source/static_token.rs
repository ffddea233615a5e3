//! [`StaticToken`]: a token that somebody else gave, and that nothing renews.

use std::fmt;

use secrecy::{ExposeSecret, SecretString};

use super::{TokenRequest, TokenSource};
use crate::{error::SourceError, token::Token};

/// One access token, as it was given: a personal access token, or one that another service delegated.
///
/// It is used until the API refuses it. Then there is no other: the refusal is the request's answer, and, while the cool-down
/// lasts, that of the requests after it.
///
/// ```
/// use tower_bearer::{BearerAuthLayer, AllowedOrigins, StaticToken, TokenProvider};
///
/// let provider = TokenProvider::new(StaticToken::new("ghp_your_token"));
/// let layer = BearerAuthLayer::with_provider(provider).allowed_origins(AllowedOrigins::origins(["https://api.github.com"])?);
/// # Ok::<(), tower_bearer::Error>(())
/// ```
///
/// # Which origins see the token
///
/// Every `https` origin, and loopback, unless the layer is told otherwise
/// ([`BearerAuthLayer::scope`](crate::BearerAuthLayer::allowed_origins)): name those that it is for.
pub struct StaticToken(SecretString);

impl StaticToken {
    /// An empty or ill-formed token is an error when it is first used (RFC 6750 §2.1).
    pub fn new(access_token: impl Into<String>) -> Self {
        Self(access_token.into().into())
    }
}

impl TokenSource for StaticToken {
    async fn fetch(&self, request: &TokenRequest<'_>) -> Result<Token, SourceError> {
        if request.previous().is_some() {
            return Err(SourceError::rejected(
                "the static token is of no use any more, and there is no other",
            ));
        }
        Token::builder(self.0.expose_secret()).build().map_err(|error| {
            SourceError::configuration("the static token is not an access token").with_cause(error)
        })
    }
}

impl fmt::Debug for StaticToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StaticToken").finish_non_exhaustive()
    }
}
