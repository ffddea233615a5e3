//! The grants of [`OAuth2`]: what each presents, and what follows if that is rejected.

use std::sync::Arc;

use secrecy::ExposeSecret;
use tokio::time::Instant;

use super::{
    super::{TokenRequest, TokenSource, client::Sent, detached},
    exchange::{Failure, ROTATION_TIMEOUT},
    login::{Login, Presented},
    options::{Grant, OAuth2},
};
use crate::{
    error::SourceError,
    token::{LEAST_LIFE, Token},
};

impl OAuth2 {
    /// Requests a token with the refresh token of `asked`, or with the one that has replaced it. Returns `None` if that
    /// cannot be presented, or was rejected.
    ///
    /// The exchange runs in a task of its own: its result has the next refresh token, and would be lost if it were
    /// dropped. The next call takes a result that no caller has waited for.
    async fn present(
        &self,
        login: &Arc<Login>,
        asked: &Token,
        request: &TokenRequest<'_>,
    ) -> Option<Result<Token, SourceError>> {
        if let Err(error) = self.check() {
            return Some(Err(error));
        }
        let turn = login.turn().await;
        let untaken = login.take_untaken();
        if let Some(token) = untaken.filter(|token| !token.0.is_expired(Instant::now() + LEAST_LIFE)) {
            return Some(Ok(token));
        }
        // Four fetches of metadata and another exchange may come first. After that, the exchange hangs because its runtime is not driven.
        let presented =
            login.present(asked, Instant::now() + self.client.timeout_or(ROTATION_TIMEOUT).limit() * 6)?;
        let (source, request) = (self.clone(), request.clone().into_owned());
        let exchange = async move {
            let _turn = turn;
            source.exchange_refresh_token(presented, &request).await
        };
        match detached(exchange).await {
            Ok(Ok(())) => login.take_untaken().map(Ok),
            Ok(Err(error)) => error.map(Err),
            Err(error) => Some(Err(error)),
        }
    }

    /// Exchanges a refresh token. The error is `None` if the refresh token was rejected, or counts as spent.
    async fn exchange_refresh_token(
        &self,
        presented: Presented,
        request: &TokenRequest<'_>,
    ) -> Result<(), Option<SourceError>> {
        let field = Some(("refresh_token", presented.refresh_token()));
        match self.exchange(field, request, &presented.sent).await {
            Ok(token) => {
                presented.granted(token);
                Ok(())
            }
            Err(Failure::Grant(_)) => {
                presented.spend();
                Err(None)
            }
            Err(Failure::Unusable(error, Some(next))) => {
                presented.replace(next.expose_secret());
                Err(Some(error))
            }
            Err(Failure::Lost(_) | Failure::Unusable(..)) if presented.is_last() => Err(None),
            Err(Failure::Lost(error) | Failure::Unusable(error, None)) => Err(Some(error)),
            Err(Failure::Other(error)) => {
                presented.take_back();
                Err(Some(error))
            }
        }
    }

    /// Requests a token by a grant whose credential is not a refresh token.
    async fn by_credential(&self, request: &TokenRequest<'_>) -> Result<Token, SourceError> {
        let (name, subject) = match &self.grant {
            Grant::TokenExchange { subject, .. } => ("subject_token", subject),
            Grant::JwtBearer(assertion) => ("assertion", assertion),
            Grant::ClientCredentials | Grant::RefreshToken(_) => {
                return self.keep_access_token(None, request).await;
            }
        };
        let asked = TokenRequest::new(request.reason());
        let token = subject.source.fetch(&asked, &|_| {}).await?;
        self.keep_access_token(Some((name, token.access_token())), request).await
    }

    /// Requests a token, and drops its refresh token: the credential works as long.
    async fn keep_access_token(
        &self,
        presented: Option<(&str, &str)>,
        request: &TokenRequest<'_>,
    ) -> Result<Token, SourceError> {
        Ok(self.exchange(presented, request, &Sent::default()).await?.without_refresh_token())
    }
}

impl TokenSource for OAuth2 {
    async fn fetch(&self, request: &TokenRequest<'_>) -> Result<Token, SourceError> {
        let Grant::RefreshToken(login) = &self.grant else { return self.by_credential(request).await };
        // Not that of the previous token: without a store, no other process has a newer one. A login may set another one
        // while one is rejected.
        while let Some(next) = login.next() {
            if let Some(result) = self.present(login, &next, request).await {
                return result;
            }
        }
        Err(SourceError::login_required(
            "no refresh token is left that the authorization server accepts: a user has to log in again (then \
             OAuth2::set_refresh_token, or a start with the new refresh token)",
        ))
    }

    /// Presents the refresh token of the previous token only. The other grants have none.
    async fn renew(&self, request: &TokenRequest<'_>) -> Result<Option<Token>, SourceError> {
        match (&self.grant, request.previous()) {
            (Grant::RefreshToken(login), Some(previous)) => {
                self.present(login, previous, request).await.transpose()
            }
            _ => Ok(None),
        }
    }

    fn validate(&self) -> Result<(), SourceError> {
        if let Grant::TokenExchange { subject, .. } | Grant::JwtBearer(subject) = &self.grant {
            subject.checked.clone()?;
        }
        self.check()
    }

    fn revision(&self) -> u64 {
        let of_grant = match &self.grant {
            Grant::ClientCredentials => 0,
            Grant::RefreshToken(login) => login.revision(),
            Grant::TokenExchange { subject, .. } | Grant::JwtBearer(subject) => subject.source.revision(),
        };
        // A subject's revision may be any number.
        self.client_auth().1.wrapping_add(of_grant)
    }

    fn seed(&self) -> Option<Token> {
        match &self.grant {
            Grant::RefreshToken(login) => login.next(),
            _ => None,
        }
    }

    fn needs_store(&self) -> bool {
        matches!(self.grant, Grant::RefreshToken(_))
    }
}
