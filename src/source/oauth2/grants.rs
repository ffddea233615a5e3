//! The grants of [`OAuth2`]: what each presents.

use super::super::{Credential, TokenRequest, TokenSource};
use super::options::{Grant, OAuth2};
use crate::{error::SourceError, token::Token};

impl OAuth2 {
    /// Requests a token by a grant whose credential is not a refresh token. That works as long as a refresh token would, so
    /// one in the response is dropped.
    async fn by_credential(&self, request: &TokenRequest<'_>) -> Result<Token, SourceError> {
        let token = match self.grant.subject() {
            Some((field, subject)) => {
                let subject = subject.fetch(&TokenRequest::new(request.reason())).await?;
                self.request_token(Some((field, subject.access_token())), request).await
            }
            None => self.request_token(None, request).await,
        };
        Ok(token?.without_refresh_token())
    }
}

impl TokenSource for OAuth2 {
    async fn fetch(&self, request: &TokenRequest<'_>) -> Result<Token, SourceError> {
        match (&self.grant, request.refresh_token()) {
            (Grant::Login, Some(refresh_token)) => {
                self.request_token(Some(("refresh_token", refresh_token)), request).await
            }
            (Grant::Login, None) => {
                self.check()?;
                Err(SourceError::login_required("there is no refresh token: a user has to log in"))
            }
            (_, Some(_)) => Err(SourceError::configuration(format!(
                "the grant {} has no login: the grant refresh_token has one",
                self.grant.name()
            ))),
            (_, None) => self.by_credential(request).await,
        }
    }

    fn validate(&self) -> Result<(), SourceError> {
        if let Some((_, subject)) = self.grant.subject() {
            subject.validate()?;
            if subject.credential().is_login() {
                return Err(SourceError::configuration(
                    "the subject of an exchange must have its refresh token: build a TokenProvider with the login, and a \
                     store for it, and pass that",
                ));
            }
        }
        self.check()
    }

    /// A refresh token belongs to the server, the client's id and the grant. An access token also belongs to the scopes, the
    /// resources, the audience, the parameters, and the subject of an exchange. The client's secret is no part of it.
    fn credential(&self) -> Credential {
        let (client_auth, revision) = self.client_auth();
        let holder = [&*self.server.url, &*client_auth.id, self.grant.name()];
        let credential = Credential::new(holder).for_token(self.fixed_fields().iter());
        let parameters = self.options.parameters.iter().flat_map(|(name, value)| [name, value]);
        let credential = credential.for_token(parameters.map(String::as_str)).with_revision(revision);
        let credential =
            if self.options.use_id_token { credential.for_token(["id_token"]) } else { credential };
        match self.grant.subject() {
            Some((_, subject)) => credential.of_subject(&subject.credential()).without_logins(),
            None if matches!(self.grant, Grant::Login) => credential.of_login(),
            None => credential.without_logins(),
        }
    }
}
