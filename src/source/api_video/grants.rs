//! The grants of [`ApiVideo`]: by refresh token if there is one, else by API key.

use std::time::Duration;

use serde_json::Value;

use super::{
    super::{Credential, TokenRequest, TokenSource, client::Sent},
    ApiVideo, OPTION, failure,
};
use crate::{
    error::{SourceError, SourceErrorKind},
    origins::AllowedOrigins,
    token::Token,
};

/// The lifetime of a token whose response has no `expires_in`. It is the one in api.video's documents.
const DEFAULT_LIFETIME: Duration = Duration::from_secs(3600);

/// What a token is requested with.
enum Grant<'a> {
    RefreshToken(&'a str),
    ApiKey(&'a str),
}

impl Grant<'_> {
    fn path(&self) -> &'static str {
        match self {
            Self::RefreshToken(_) => "/auth/refresh",
            Self::ApiKey(_) => "/auth/api-key",
        }
    }

    fn body(&self) -> String {
        let (name, secret) = match self {
            Self::RefreshToken(refresh_token) => ("refreshToken", *refresh_token),
            Self::ApiKey(api_key) => ("apiKey", *api_key),
        };
        format!("{{\"{name}\":{}}}", Value::from(secret))
    }
}

impl ApiVideo {
    /// Requests a token, in one exchange.
    async fn grant(&self, grant: Grant<'_>, sent: &Sent) -> Result<Token, SourceError> {
        let is_key = matches!(grant, Grant::ApiKey(_));
        let request = self.request(grant.path(), grant.body())?;
        let response = self.client.exchange(request, OPTION, sent).await?;
        if response.status().is_success() {
            return response.granted(Some(DEFAULT_LIFETIME));
        }
        let error = failure(&response);
        Err(match error.kind() {
            SourceErrorKind::Rejected if is_key => SourceError::rejected(format!(
                "{}auth/api-key rejected the API key (HTTP {}): check that it belongs to this environment and is not revoked",
                self.api_base(),
                response.status().as_u16()
            )),
            _ => error,
        })
    }
}

impl TokenSource for ApiVideo {
    async fn fetch(&self, request: &TokenRequest<'_>) -> Result<Token, SourceError> {
        let key = self.key().clone();
        match request.refresh_token().filter(|_| !self.key_only) {
            Some(refresh_token) => self.grant(Grant::RefreshToken(refresh_token), &request.sent).await,
            None => self.grant(Grant::ApiKey(key.checked()?), &request.sent).await,
        }
    }

    fn validate(&self) -> Result<(), SourceError> {
        self.key().checked()?;
        // Checks the other options.
        self.request("/", String::new()).map(drop)
    }

    /// All tokens are those of the key and its environment.
    fn credential(&self) -> Credential {
        let key = self.key();
        let credential = Credential::new([self.api_base().to_string().as_str(), key.unchecked()]);
        let credential = if self.key_only { credential.without_logins() } else { credential };
        credential.with_revision(key.revision)
    }

    /// The origin of the base URL, which the API shares.
    fn allowed_origins(&self) -> AllowedOrigins {
        self.base_url.allowed_origins()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A secret contains characters that JSON escapes.
    #[test]
    fn a_secret_is_escaped_in_json() {
        assert_eq!(Grant::ApiKey("a\"b").body(), r#"{"apiKey":"a\"b"}"#);
        assert_eq!(Grant::RefreshToken("r").body(), r#"{"refreshToken":"r"}"#);
    }
}
