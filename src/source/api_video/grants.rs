//! The grants of [`ApiVideo`]: by refresh token if there is one, else by API key.

use std::{sync::Arc, time::Duration};

use secrecy::ExposeSecret;
use serde_json::Value;

use super::{
    super::{
        TokenRequest, TokenSource,
        client::Sent,
        presented::{Failure, Means, Presented},
    },
    ApiVideo, OPTION, failure,
};
use crate::{
    error::{SourceError, SourceErrorKind},
    observability,
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
    async fn grant(&self, grant: Grant<'_>, sent: &Sent) -> Result<Token, Failure> {
        let request = self.request(grant.path(), grant.body())?;
        let response = self.client.exchange(request, OPTION, sent).await?;
        let status = response.status();
        if status.is_success() {
            // If the response cannot be used, the refresh token may still be spent.
            return Ok(response.granted(Some(DEFAULT_LIFETIME), None)?);
        }
        let error = failure(&response);
        let means = match error.kind() {
            SourceErrorKind::Unavailable if !status.is_server_error() => Means::Unspent,
            SourceErrorKind::Unavailable => Means::Unclear,
            // 400 in RFC 6749 §5.2; another status may mean that the endpoint takes no refresh token. If the configuration
            // is wrong, the endpoint for the key reports it.
            _ if response.is_verdict() || !status.is_client_error() => Means::Rejected(status),
            _ => Means::Unclear,
        };
        Err(Failure { error, means })
    }

    /// Requests a token with the refresh token. Returns `None` if the API key has to be used instead.
    async fn refresh(&self, previous: Option<&Token>) -> Option<Result<Token, SourceError>> {
        let refresh_token = previous?.refresh_token().filter(|_| !self.key_only)?;
        if !self.credential().present(refresh_token) {
            return None;
        }
        // Counts as presented until its drop, even if this future is dropped first.
        let presented = Presented::new(Arc::clone(&self.credential), refresh_token.into());
        match self.grant(Grant::RefreshToken(refresh_token), &presented.sent).await {
            Ok(token) => {
                self.credential().renewed(refresh_token, &token);
                Some(Ok(token))
            }
            Err(failure) => match presented.failed(failure) {
                Ok(error) => Some(Err(error)),
                Err(failure) => {
                    match failure.means {
                        Means::Rejected(status) => observability::refresh_token_rejected(status),
                        _ => observability::refresh_lost_twice(&failure.error),
                    }
                    None
                }
            },
        }
    }

    /// Requests a token with the API key.
    async fn authenticate(&self) -> Result<Token, SourceError> {
        let (key, revision) = self.credential().key()?;
        match self.grant(Grant::ApiKey(key.expose_secret()), &Sent::default()).await {
            Ok(token) => {
                self.credential().granted(revision, &token);
                Ok(token)
            }
            Err(Failure { error, means: Means::Rejected(status) })
                if error.kind() == SourceErrorKind::Rejected =>
            {
                Err(SourceError::rejected(format!(
                    "{}auth/api-key rejected the API key (HTTP {}): check that it belongs to this environment and is not revoked",
                    self.api_base(),
                    status.as_u16()
                )))
            }
            Err(Failure { error, .. }) => Err(error),
        }
    }
}

impl TokenSource for ApiVideo {
    async fn fetch(&self, request: &TokenRequest<'_>) -> Result<Token, SourceError> {
        match self.refresh(request.previous()).await {
            Some(result) => result,
            None => self.authenticate().await,
        }
    }

    /// Uses the refresh token only.
    async fn renew(&self, request: &TokenRequest<'_>) -> Result<Option<Token>, SourceError> {
        self.refresh(request.previous()).await.transpose()
    }

    fn validate(&self) -> Result<(), SourceError> {
        self.credential().key()?;
        // Checks the other options.
        self.request("/", String::new()).map(drop)
    }

    fn revision(&self) -> u64 {
        self.credential().revision()
    }

    /// The origin of the base URL, which the API shares.
    fn allowed_origins(&self) -> AllowedOrigins {
        self.base_url.allowed_origins()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_escaped_in_json() {
        assert_eq!(Grant::ApiKey("a\"b").body(), r#"{"apiKey":"a\"b"}"#);
        assert_eq!(Grant::RefreshToken("r").body(), r#"{"refreshToken":"r"}"#);
    }
}
