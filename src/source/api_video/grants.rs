//! The grants of [`ApiVideo`]: by refresh token if there is one, else by API key.

use std::time::Duration;

use http::StatusCode;
use secrecy::ExposeSecret;
use serde::Serialize;
use tokio::time::Instant;

use super::{
    super::{
        TokenRequest, TokenSource,
        http::{ExchangeError, Sent, TokenResponse},
    },
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

/// How a grant failed, which decides what follows.
enum Failure {
    /// The endpoint responded with a status that is not a success.
    Status(StatusCode, SourceError),
    /// The endpoint may have processed the request, and the result is lost.
    Lost(SourceError),
    /// The request was not sent.
    NotSent(SourceError),
}

impl Grant<'_> {
    fn path(&self) -> &'static str {
        match self {
            Self::RefreshToken(_) => "/auth/refresh",
            Self::ApiKey(_) => "/auth/api-key",
        }
    }

    fn body(&self) -> String {
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Body<'a> {
            #[serde(skip_serializing_if = "Option::is_none")]
            refresh_token: Option<&'a str>,
            #[serde(skip_serializing_if = "Option::is_none")]
            api_key: Option<&'a str>,
        }

        let (refresh_token, api_key) = match self {
            Self::RefreshToken(refresh_token) => (Some(*refresh_token), None),
            Self::ApiKey(api_key) => (None, Some(*api_key)),
        };
        // Two strings always serialize. The endpoint would reject an empty body.
        serde_json::to_string(&Body { refresh_token, api_key }).unwrap_or_default()
    }
}

impl ApiVideo {
    /// Requests a token, in one exchange.
    async fn grant(&self, grant: Grant<'_>, sent: &Sent) -> Result<Token, Failure> {
        let request = self.request(grant.path(), grant.body()).map_err(Failure::NotSent)?;
        let endpoint = self.client.endpoint().map_err(Failure::NotSent)?;
        let url = request.uri().clone();
        let requested_at = Instant::now().into_std();
        let response = endpoint.send(request, self.timeout, sent).await.map_err(|error| {
            let not_sent = matches!(error, ExchangeError::NotSent(_));
            let error = error.into_source_error(&format!("no token from {url}"));
            if not_sent { Failure::NotSent(error) } else { Failure::Lost(error) }
        })?;
        if response.status.is_success() {
            // If the response cannot be used, the refresh token may still be spent.
            return TokenResponse::from_json(&response.body)
                .and_then(|parsed| parsed.token(requested_at, Some(DEFAULT_LIFETIME), None))
                .map_err(|error| Failure::Lost(SourceError::invalid_response(format!("{url}: {error}"))));
        }
        Err(Failure::Status(response.status, failure(response.status, &response.headers, &url)))
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
            Err(
                Failure::NotSent(error)
                | Failure::Status(StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS, error),
            ) => {
                presented.take_back();
                return Some(Err(error));
            }
            // Any other status below 500 rejects the refresh token (400 in RFC 6749 §5.2), or means that the endpoint
            // takes none. If the configuration is wrong, the endpoint for the key reports it.
            Err(Failure::Status(status, _)) if !status.is_server_error() => {
                presented.spend();
                observability::refresh_token_rejected(status);
                return None;
            }
            Err(Failure::Status(_, error) | Failure::Lost(error)) => error,
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
            Err(Failure::Status(status, error)) if error.kind() == SourceErrorKind::Rejected => {
                Err(SourceError::rejected(format!(
                    "{}auth/api-key rejected the API key (HTTP {}): check that it belongs to this environment and is not revoked",
                    self.api_base(),
                    status.as_u16()
                )))
            }
            Err(Failure::Status(_, error) | Failure::Lost(error) | Failure::NotSent(error)) => Err(error),
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
