//! [`StaticToken`]: a fixed access token, which is never renewed.

use secrecy::{ExposeSecret, SecretString};

use super::{Credential, TokenRequest, TokenSource};
use crate::{error::SourceError, token::Token};

/// A [`TokenSource`] with one fixed access token, such as a personal access token.
///
/// The token is used until the API challenges it. The source has no other: the caller gets the challenge as the
/// response, and during the cool-down so do later requests.
///
/// ```
/// use tower_bearer::{BearerAuthLayer, AllowedOrigins, StaticToken, TokenProvider};
///
/// let provider = TokenProvider::new(StaticToken::new("ghp_your_token"));
/// let layer = BearerAuthLayer::with_provider(provider)
///     .allowed_origins(AllowedOrigins::origins(["https://api.github.com"])?);
/// # Ok::<(), tower_bearer::Error>(())
/// ```
///
/// # Which origins see the token
///
/// Every `https` origin and loopback, unless the layer's
/// [`allowed_origins`](crate::BearerAuthLayer::allowed_origins) are set. Set them to the origins that the token is for.
#[derive(Debug)]
pub struct StaticToken(SecretString);

impl StaticToken {
    /// Makes a source of `access_token`.
    ///
    /// A token that is empty or is not visible ASCII (RFC 6749 appendix A.12) is an error of
    /// [`TokenProviderBuilder::build`](crate::TokenProviderBuilder::build), or else of the first use.
    pub fn new(access_token: impl Into<String>) -> Self {
        Self(access_token.into().into())
    }

    fn token(&self) -> Result<Token, SourceError> {
        Token::builder(self.0.expose_secret()).build().map_err(|error| {
            SourceError::configuration(format!("the static token is not a valid access token: {error}"))
        })
    }
}

impl TokenSource for StaticToken {
    async fn fetch(&self, request: &TokenRequest<'_>) -> Result<Token, SourceError> {
        if request.previous().is_some() {
            return Err(SourceError::rejected("the static token cannot be renewed: the source has no other"));
        }
        self.token()
    }

    fn validate(&self) -> Result<(), SourceError> {
        self.token().map(drop)
    }

    fn credential(&self) -> Credential {
        Credential::new([self.0.expose_secret()]).without_logins()
    }
}
