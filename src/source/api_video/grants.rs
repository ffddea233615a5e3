//! The grants of [`ApiVideo`]: by refresh token if there is one, else by API key.

use std::time::Duration;

use http::StatusCode;
use secrecy::ExposeSecret;
use serde_json::Value;

use super::{
    super::{TokenRequest, TokenSource, client::Sent},
    ApiVideo,
    credential::Presented,
    failure,
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

/// How a grant failed, which decides what follows for a refresh token.
enum Failure {
    /// The endpoint rejected the request, with this status.
    Rejected(StatusCode, SourceError),
    /// The request was not processed: it was not sent, or the endpoint asks for another attempt.
    Unspent(SourceError),
    /// The endpoint may have processed the request.
    Unclear(SourceError),
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
        let request = self.request(grant.path(), grant.body()).map_err(Failure::Unspent)?;
        let response = self.exchange(request, sent).await.map_err(|error| {
            if error.is_unsent() || !error.is_transient() {
                Failure::Unspent(error)
            } else {
                Failure::Unclear(error)
            }
        })?;
        let status = response.status();
        if status.is_success() {
            // If the response cannot be used, the refresh token may still be spent.
            let token = response.granted(response.fields(), Some(DEFAULT_LIFETIME), None);
            return token.map_err(Failure::Unclear);
        }
        let error = failure(&response);
        Err(match error.kind() {
            SourceErrorKind::Unavailable if !status.is_server_error() => Failure::Unspent(error),
            SourceErrorKind::Unavailable => Failure::Unclear(error),
            _ if response.is_verdict() || !status.is_client_error() => Failure::Rejected(status, error),
            _ => Failure::Unclear(error),
        })
    }

    /// Requests a token with the refresh token. Returns `None` if the API key has to be used instead.
    async fn refresh(&self, previous: Option<&Token>) -> Option<Result<Token, SourceError>> {
        if self.key_only {
            return None;
        }
        let sent = Sent::default();
        // Counts as presented until its drop, even if this future is dropped first.
        let presented = Presented::new(&self.credential, previous?.refresh_token()?, &sent)?;
        let error = match self.grant(Grant::RefreshToken(presented.refresh_token()), &sent).await {
            Ok(token) => {
                presented.renewed(&token);
                return Some(Ok(token));
            }
            Err(Failure::Unspent(error)) => {
                presented.take_back();
                return Some(Err(error));
            }
            // 400 in RFC 6749 §5.2; another status may mean that the endpoint takes no refresh token. If the configuration
            // is wrong, the endpoint for the key reports it.
            Err(Failure::Rejected(status, _)) => {
                presented.spend();
                observability::refresh_token_rejected(status);
                return None;
            }
            Err(Failure::Unclear(error)) => error,
        };
        // If the server asks for a delay, the key is not sent before that delay has passed.
        if presented.is_last() && error.retry_after().is_none() {
            observability::refresh_lost_twice(&error);
            return None;
        }
        Some(Err(error))
    }

    /// Requests a token with the API key.
    async fn authenticate(&self) -> Result<Token, SourceError> {
        let (key, revision) = self.credential().key()?;
        match self.grant(Grant::ApiKey(key.expose_secret()), &Sent::default()).await {
            Ok(token) => {
                self.credential().granted(revision, &token);
                Ok(token)
            }
            Err(Failure::Rejected(status, error)) if error.kind() == SourceErrorKind::Rejected => {
                Err(SourceError::rejected(format!(
                    "{}auth/api-key rejected the API key (HTTP {}): check that it belongs to this environment and is not revoked",
                    self.api_base(),
                    status.as_u16()
                )))
            }
            Err(Failure::Rejected(_, error) | Failure::Unspent(error) | Failure::Unclear(error)) => {
                Err(error)
            }
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
