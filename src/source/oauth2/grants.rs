//! The grants of [`OAuth2`]: what each presents.

use super::{
    super::{Credential, TokenRequest, TokenSource},
    options::{Grant, OAuth2},
};
use crate::{error::SourceError, token::Token};

impl OAuth2 {
    /// Requests a token by a grant whose credential is not a refresh token. That works as long as a refresh token would, so
    /// one in the response is dropped.
    async fn by_credential(&self, request: &TokenRequest<'_>) -> Result<Token, SourceError> {
        let subject = match &self.grant {
            Grant::TokenExchange { subject, .. } => Some(("subject_token", subject)),
            Grant::JwtBearer(assertion) => Some(("assertion", assertion)),
            Grant::ClientCredentials | Grant::Login => None,
        };
        let mut presented = None;
        if let Some((name, subject)) = subject {
            let asked = TokenRequest::new(request.reason());
            presented = Some((name, subject.fetch(&asked).await?));
        }
        let presented = presented.as_ref().map(|(name, token)| (*name, token.access_token()));
        Ok(self.exchange(presented, request).await?.without_refresh_token())
    }
}

impl TokenSource for OAuth2 {
    async fn fetch(&self, request: &TokenRequest<'_>) -> Result<Token, SourceError> {
        match (&self.grant, request.refresh_token()) {
            (Grant::Login, Some(refresh_token)) => {
                self.exchange(Some(("refresh_token", refresh_token)), request).await
            }
            (Grant::Login, None) => {
                self.check()?;
                Err(SourceError::login_required("there is no refresh token: a user has to log in"))
            }
            (_, Some(_)) => Err(SourceError::configuration(format!(
                "the grant {} has no login: use OAuth2::login for one",
                self.grant.name()
            ))),
            (_, None) => self.by_credential(request).await,
        }
    }

    fn validate(&self) -> Result<(), SourceError> {
        if let Grant::TokenExchange { subject, .. } | Grant::JwtBearer(subject) = &self.grant {
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
        let holder = [self.server.url(), client_auth.id(), self.grant.name()];
        let credential = Credential::new(holder).for_token(self.fixed_fields().iter());
        let parameters = self.options.parameters.iter().flat_map(|(name, value)| [name, value]);
        let credential = credential.for_token(parameters.map(String::as_str)).with_revision(revision);
        let credential =
            if self.options.use_id_token { credential.for_token(["id_token"]) } else { credential };
        match &self.grant {
            Grant::Login => credential.of_login(),
            Grant::TokenExchange { subject, .. } | Grant::JwtBearer(subject) => {
                credential.of_subject(&subject.credential()).without_logins()
            }
            Grant::ClientCredentials => credential.without_logins(),
        }
    }
}
