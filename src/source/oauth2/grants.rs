//! The grants of [`OAuth2`]: what each presents, and what follows if that is rejected.

use std::sync::Mutex;

use secrecy::ExposeSecret;

use super::{
    super::{
        TokenRequest, TokenSource,
        http::{Credential, Presented, Sent, credential::lock},
    },
    exchange::Failure,
    options::{Grant, OAuth2},
};
use crate::{error::SourceError, token::Token};

impl OAuth2 {
    /// Requests a token with this refresh token. Returns `None` if it cannot be presented, or was rejected.
    async fn present(
        &self,
        credential: &Mutex<Credential>,
        refresh_token: &str,
        request: &TokenRequest<'_>,
    ) -> Option<Result<Token, SourceError>> {
        let sent = Sent::default();
        // Counts as presented until its drop, even if this future is dropped first.
        let presented = Presented::new(credential, refresh_token, &sent)?;
        match self.exchange(Some(("refresh_token", presented.refresh_token())), request, &sent).await {
            Ok(token) => {
                presented.renewed(&token);
                Some(Ok(token))
            }
            Err(Failure::Grant(_)) => {
                presented.spend();
                None
            }
            Err(Failure::Lost(_)) if presented.is_last() => None,
            Err(Failure::Lost(error)) => Some(Err(error)),
            Err(Failure::Other(error)) => {
                presented.take_back();
                Some(Err(error))
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
        let Grant::RefreshToken(credential) = &self.grant else { return self.by_credential(request).await };
        if let Some(token) = self.renew(request).await? {
            return Ok(token);
        }
        let seed = lock(credential).seed();
        if let Some(seed) = seed {
            if let Some(result) = self.present(credential, seed.expose_secret(), request).await {
                return result;
            }
        }
        Err(SourceError::login_required(
            "no refresh token is left that the authorization server accepts: a user has to log in again, and the new \
             refresh token has to be set with set_refresh_token",
        ))
    }

    /// Presents the refresh token of the previous token only. The other grants have none.
    async fn renew(&self, request: &TokenRequest<'_>) -> Result<Option<Token>, SourceError> {
        match (&self.grant, request.previous().and_then(Token::refresh_token)) {
            (Grant::RefreshToken(credential), Some(refresh_token)) => {
                self.present(credential, refresh_token, request).await.transpose()
            }
            _ => Ok(None),
        }
    }

    fn validate(&self) -> Result<(), SourceError> {
        if let Grant::TokenExchange { subject, .. } | Grant::JwtBearer(subject) = &self.grant {
            subject.checked.clone()?;
        }
        if let Grant::RefreshToken(credential) = &self.grant {
            if lock(credential).secret().0.expose_secret().len() > Token::MAX_LEN {
                let text = format!("the refresh token must be at most {} bytes long", Token::MAX_LEN);
                return Err(SourceError::configuration(text));
            }
        }
        self.check()
    }

    fn revision(&self) -> u64 {
        let of_grant = match &self.grant {
            Grant::ClientCredentials => 0,
            Grant::RefreshToken(credential) => lock(credential).revision(),
            Grant::TokenExchange { subject, .. } | Grant::JwtBearer(subject) => subject.source.revision(),
        };
        self.client_auth().1 + of_grant
    }

    fn seed(&self) -> Option<String> {
        let Grant::RefreshToken(credential) = &self.grant else { return None };
        lock(credential).seed().map(|seed| seed.expose_secret().to_owned())
    }

    fn needs_store(&self) -> bool {
        matches!(self.grant, Grant::RefreshToken(_))
    }
}
