//! The grants of [`ApiVideo`]: by refresh token where there is one, else by API key.

use std::time::Duration;

use http::StatusCode;
use secrecy::ExposeSecret;
use serde::Serialize;
use tokio::time::Instant;

use super::{
    super::{TokenSource, endpoint::ExchangeError, token_response},
    ApiVideo, failure,
};
use crate::{error::SourceError, observability, scope::Scope, token::Token};

/// What the documents say a token lives for; taken where an answer does not say.
const DEFAULT_LIFETIME: Duration = Duration::from_secs(3600);

enum Grant<'a> {
    RefreshToken(&'a str),
    ApiKey(&'a str),
}

/// How a grant failed, as far as the next grant is concerned.
enum Failure {
    /// The credential was answered with a refusal.
    Refused(StatusCode),
    /// The request may have been acted upon, and its result is gone.
    Lost(SourceError),
    /// Nothing was spent.
    Other(SourceError),
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
    async fn grant(&self, grant: Grant<'_>) -> Result<Token, Failure> {
        let endpoint = self.endpoint().map_err(Failure::Other)?;
        let request = self.request(grant.path(), grant.body()).map_err(Failure::Other)?;
        let url = request.uri().clone();
        let requested_at = Instant::now().into_std();
        let answer = endpoint.send(request, self.timeout).await.map_err(|error| {
            let not_sent = matches!(error, ExchangeError::NotSent(_));
            let error = SourceError::unavailable(format!("no token from {url}")).with_cause(error);
            if not_sent { Failure::Other(error) } else { Failure::Lost(error) }
        })?;
        if answer.status.is_success() {
            // The refresh token was spent on an answer that is of no use.
            return token_response::parse(&answer.body, requested_at, DEFAULT_LIFETIME)
                .map_err(Failure::Lost);
        }
        Err(match answer.status.as_u16() {
            400 | 401 | 403 => Failure::Refused(answer.status),
            _ => Failure::Other(failure(answer.status, &answer.headers, &url)),
        })
    }

    /// Tries the refresh token; `None` when the API key's turn has come.
    async fn refresh(&self, previous: Option<&Token>) -> Option<Result<Token, SourceError>> {
        if self.key_only {
            return None;
        }
        let refresh_token = self.credential().spend(previous)?;
        match self.grant(Grant::RefreshToken(refresh_token)).await {
            Ok(token) => {
                self.credential().found();
                Some(Ok(token))
            }
            Err(Failure::Refused(status)) => {
                self.credential().spent();
                observability::refresh_token_refused(status);
                None
            }
            Err(Failure::Lost(_)) if self.credential().is_spent() => {
                observability::refresh_token_spent();
                None
            }
            Err(Failure::Lost(error)) => Some(Err(error)),
            Err(Failure::Other(error)) => {
                self.credential().found();
                Some(Err(error))
            }
        }
    }

    async fn authenticate(&self) -> Result<Token, SourceError> {
        let (key, revision) = self.credential().key()?;
        let token = match self.grant(Grant::ApiKey(key.expose_secret())).await {
            Ok(token) => token,
            Err(Failure::Lost(error) | Failure::Other(error)) => return Err(error),
            Err(Failure::Refused(status)) => {
                let host = self.base_url.host().unwrap_or_default();
                return Err(SourceError::refused(format!(
                    "{host} refused the API key (HTTP {}): check that it is this environment's, and not revoked",
                    status.as_u16()
                )));
            }
        };
        self.credential().granted(revision);
        Ok(token)
    }
}

impl TokenSource for ApiVideo {
    async fn fetch(&self, previous: Option<&Token>) -> Result<Token, SourceError> {
        match self.refresh(previous).await {
            Some(result) => result,
            None => self.authenticate().await,
        }
    }

    /// By the refresh token alone.
    async fn renew(&self, previous: &Token) -> Result<Option<Token>, SourceError> {
        self.refresh(Some(previous)).await.transpose()
    }

    fn revision(&self) -> u64 {
        self.credential().revision()
    }

    /// The origin of the auth endpoints, which is also the API's.
    fn scope(&self) -> Scope {
        self.own_scope()
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
