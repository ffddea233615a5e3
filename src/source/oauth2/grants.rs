//! The grants of [`OAuth2`]: what each presents, and what follows if that is rejected.

use std::sync::Arc;

use tokio::time::Instant;

use super::{
    super::{TokenRequest, TokenSource, client::Sent},
    login::{Exchange, Login},
    options::{Grant, OAuth2},
};
use crate::{
    detached::detached,
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
        let limit = self.client().limit();
        let turn = login.turn(limit).await;
        let untaken = login.take_untaken();
        if let Some(token) = untaken.filter(|token| !token.0.is_expired(Instant::now() + LEAST_LIFE)) {
            return Some(Ok(token));
        }
        let exchange = login.present(asked)?;
        let (source, owner, request) = (self.clone(), Arc::clone(login), request.clone().into_owned());
        let exchanged = detached(async move {
            let exchange = source.exchange_refresh_token(exchange, &request);
            owner.driven(&turn, limit, exchange).await
        });
        match exchanged.await {
            Ok(Some(Ok(()))) => login.take_untaken().map(Ok),
            Ok(Some(Err(error))) => error.map(Err),
            Ok(None) => Some(Err(SourceError::unavailable("the token request was given up by its runtime"))),
            Err(error) => Some(Err(error)),
        }
    }

    /// Exchanges a refresh token. The error is `None` if the refresh token was rejected, or counts as spent.
    async fn exchange_refresh_token(
        &self,
        exchange: Exchange,
        request: &TokenRequest<'_>,
    ) -> Result<(), Option<SourceError>> {
        let presented = &exchange.presented;
        let field = Some(("refresh_token", presented.refresh_token()));
        match self.exchange(field, request, &presented.sent).await {
            Ok(token) => {
                exchange.granted(token);
                Ok(())
            }
            Err(failure) => Err(exchange.failed(failure)),
        }
    }

    /// Requests a token by a grant whose credential is not a refresh token. That works as long as a refresh token would, so
    /// one in the response is dropped.
    async fn by_credential(&self, request: &TokenRequest<'_>) -> Result<Token, SourceError> {
        let subject = match &self.grant {
            Grant::TokenExchange { subject, .. } => Some(("subject_token", subject)),
            Grant::JwtBearer(assertion) => Some(("assertion", assertion)),
            Grant::ClientCredentials | Grant::RefreshToken(_) => None,
        };
        let mut presented = None;
        if let Some((name, subject)) = subject {
            let asked = TokenRequest::new(request.reason());
            presented = Some((name, subject.source.fetch(&asked, &|_| {}).await?));
        }
        let presented = presented.as_ref().map(|(name, token)| (*name, token.access_token()));
        let token = self.exchange(presented, request, &Sent::default()).await;
        Ok(token.map_err(|failure| failure.error)?.without_refresh_token())
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
