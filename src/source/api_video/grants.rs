//! The grants of [`ApiVideo`]: by refresh token where there is one, else by API key.

use std::time::Duration;

use http::StatusCode;
use secrecy::ExposeSecret;
use serde::Serialize;
use tokio::time::Instant;

use super::{
    super::{
        TokenRequest, TokenSource,
        endpoint::{ExchangeError, Sent},
        token_response,
    },
    ApiVideo,
    credential::Presented,
    failure,
};
use crate::{error::SourceError, observability, origins::AllowedOrigins, token::Token};

/// What the documents say a token lives for; taken where an answer does not say.
const DEFAULT_LIFETIME: Duration = Duration::from_secs(3600);

enum Grant<'a> {
    RefreshToken(&'a str),
    ApiKey(&'a str),
}

/// How a grant failed, as far as the next grant is concerned.
enum Failure {
    /// The endpoint answered, with a status that is no success.
    Status(StatusCode, SourceError),
    /// The request may have been acted upon, and its result is gone.
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
        // Two texts always serialize; an empty body would be refused by the endpoint.
        serde_json::to_string(&Body { refresh_token, api_key }).unwrap_or_default()
    }
}

impl ApiVideo {
    async fn grant(&self, grant: Grant<'_>, sent: &Sent) -> Result<Token, Failure> {
        let endpoint = self.endpoint().map_err(Failure::NotSent)?;
        let request = self.request(grant.path(), grant.body()).map_err(Failure::NotSent)?;
        let url = request.uri().clone();
        let requested_at = Instant::now().into_std();
        let answer = endpoint.send(request, self.timeout, sent).await.map_err(|error| {
            let not_sent = matches!(error, ExchangeError::NotSent(_));
            let error = SourceError::unavailable(format!("no token from {url}")).with_cause(error);
            if not_sent { Failure::NotSent(error) } else { Failure::Lost(error) }
        })?;
        if answer.status.is_success() {
            // The refresh token was spent on an answer that is of no use.
            return token_response::parse(&answer.body, requested_at, DEFAULT_LIFETIME)
                .map_err(Failure::Lost);
        }
        Err(Failure::Status(answer.status, failure(answer.status, &answer.headers, &url)))
    }

    /// Tries the refresh token; `None` when the API key's turn has come.
    async fn refresh(&self, previous: Option<&Token>) -> Option<Result<Token, SourceError>> {
        if self.key_only {
            return None;
        }
        let sent = Sent::default();
        // Counts as presented until its drop, also when this future is dropped meanwhile.
        let presented = Presented::new(&self.credential, previous?.refresh_token()?, &sent)?;
        let error = match self.grant(Grant::RefreshToken(presented.refresh_token()), &sent).await {
            Ok(token) => {
                presented.renewed(&token);
                return Some(Ok(token));
            }
            Err(Failure::NotSent(error)) => {
                presented.take_back();
                return Some(Err(error));
            }
            Err(Failure::Status(StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS, error)) => {
                presented.take_back();
                return Some(Err(error));
            }
            // Any other answer that is neither a success nor a server's error rejects it (RFC 6749 §5.2 has 400), or says
            // that nothing there accepts one. Whether that is all that is wrong, the key's endpoint will say.
            Err(Failure::Status(status, _)) if !status.is_server_error() => {
                presented.spend();
                observability::refresh_token_rejected(status);
                return None;
            }
            Err(Failure::Status(_, error) | Failure::Lost(error)) => error,
        };
        // A server that asks for a pause gets it before the key is sent to it.
        if presented.is_last() && error.retry_after().is_none() {
            observability::refresh_token_spent();
            return None;
        }
        Some(Err(error))
    }

    async fn authenticate(&self) -> Result<Token, SourceError> {
        let (key, revision) = self.credential().key()?;
        let token = match self.grant(Grant::ApiKey(key.expose_secret()), &Sent::default()).await {
            Ok(token) => token,
            Err(Failure::Status(status, error)) => match status.as_u16() {
                400 | 401 | 403 => {
                    let host = self.base_url.host().unwrap_or_default();
                    return Err(SourceError::rejected(format!(
                        "{host} refused the API key (HTTP {}): check that it is this environment's, and not revoked",
                        status.as_u16()
                    )));
                }
                _ => return Err(error),
            },
            Err(Failure::Lost(error) | Failure::NotSent(error)) => return Err(error),
        };
        self.credential().granted(revision, &token);
        Ok(token)
    }
}

impl TokenSource for ApiVideo {
    async fn fetch(&self, request: &TokenRequest<'_>) -> Result<Token, SourceError> {
        match self.refresh(request.previous()).await {
            Some(result) => result,
            None => self.authenticate().await,
        }
    }

    /// By the refresh token alone.
    async fn renew(&self, request: &TokenRequest<'_>) -> Result<Option<Token>, SourceError> {
        self.refresh(request.previous()).await.transpose()
    }

    fn revision(&self) -> u64 {
        self.credential().revision()
    }

    /// The origin of the auth endpoints, which is also the API's.
    fn allowed_origins(&self) -> AllowedOrigins {
        self.own_origin()
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
