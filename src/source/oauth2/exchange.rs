//! One exchange with a token endpoint: the request of a grant, and what its response means.

use std::time::Duration;

use http::header::{AUTHORIZATION, CONTENT_TYPE};
use http::{Request, Uri};

use super::super::client::{Sent, TokenClient, TokenResponse};
use super::super::{TokenRequest, check_text};
use super::form::{Form, base64_of_any_form};
use super::options::{Grant, OAuth2};
use crate::challenge::Challenge;
use crate::error::{SourceError, SourceErrorKind};
use crate::token::Token;
use crate::token_builder::jwt_lifetime;

/// The time limit of an exchange that spends a refresh token. The next one is lost with a response that is not waited for.
const ROTATION_TIMEOUT: Duration = Duration::from_secs(20);

/// Names that no parameter may have: each has a secret of a grant, or says which grant it is.
const RESERVED: &str = "grant_type refresh_token assertion subject_token subject_token_type client_secret \
                        client_assertion client_assertion_type";

impl OAuth2 {
    /// Requests a token. `secret` is the field of the grant's secret, if it has one, and its value.
    pub(super) async fn request_token(
        &self,
        secret: Option<(&str, &str)>,
        request: &TokenRequest<'_>,
    ) -> Result<Token, SourceError> {
        self.check()?;
        let client = self.client();
        let url = self.server.endpoint(&client).await?;
        let send = async |url: &Uri| {
            let sent = Sent::default();
            client.exchange(self.token_request(url, secret, request)?, self.server.option(), &sent).await
        };
        let mut result = send(&url).await;
        let is_gone = |response: &TokenResponse| matches!(response.status().as_u16(), 404 | 405 | 410);
        let is_elsewhere = result.as_ref().map_or_else(SourceError::is_connect, is_gone);
        if is_elsewhere {
            if let Some(url) = self.server.moved_from(&url, &client).await {
                result = send(&url).await;
            }
        }
        let mut response = result?;
        if self.options.use_id_token && !response.is_failure() {
            let id_token =
                response.fields.as_ref().and_then(|fields| fields.text("id_token")).map(str::to_owned);
            let Some(id_token) = id_token else {
                let text = response.described("has no id_token: ask for the scope openid, also in a refresh");
                return Err(response.with_next_refresh_token(SourceError::configuration(text)));
            };
            if let Some(fields) = response.fields.as_mut() {
                let lifetime = jwt_lifetime(&id_token).map(|lifetime| lifetime.as_secs_f64());
                fields.set("expires_in", lifetime.into());
                fields.set("access_token", id_token.into());
            }
        }
        // RFC 8693 §2.2.2: also the code for a subject token that is not valid.
        let is_subject = |error: &SourceError| {
            matches!(self.grant, Grant::TokenExchange { .. })
                && error.kind() == SourceErrorKind::Configuration
                && response.code() == Some("invalid_request")
        };
        response.granted(self.options.default_lifetime).map_err(|error| {
            if is_subject(&error) { error.of_kind(SourceErrorKind::Rejected) } else { error }
        })
    }

    /// The client, with the time limit of the grant.
    pub(super) fn client(&self) -> TokenClient {
        match &self.grant {
            Grant::Login => self.options.client.bounded(ROTATION_TIMEOUT, Duration::MAX),
            _ => self.options.client.clone(),
        }
    }

    /// Checks all options.
    pub(super) fn check(&self) -> Result<(), SourceError> {
        self.options.client.check()?;
        self.server.checked_url(&self.options.client)?;
        let (client_auth, _) = self.client_auth();
        client_auth.validate()?;
        let invalid = |what: String| Err(SourceError::configuration(what));
        // RFC 6749 §3.3.
        let is_scope = |scope: &str| {
            !scope.is_empty() && scope.bytes().all(|byte| byte.is_ascii_graphic() && !b"\"\\".contains(&byte))
        };
        if let Some(scope) = self.options.scopes.iter().find(|scope| !is_scope(scope)) {
            return invalid(format!(
                "scopes must have one scope in each value, of visible ASCII, got {scope:?}: trim it, or split it"
            ));
        }
        // RFC 8707 §2 also asks for an absolute URI, which not every server's resources are.
        let is_resource = |resource: &str| !resource.is_empty() && !resource.contains('#');
        if let Some(resource) = self.options.resources.iter().find(|resource| !is_resource(resource)) {
            return invalid(format!("resources must not be empty or have a fragment, got {resource:?}"));
        }
        if self.options.default_lifetime.is_some_and(|lifetime| lifetime.is_zero()) {
            return invalid("default_lifetime must be > 0, got 0s".to_owned());
        }
        let fixed = self.fixed_fields();
        fixed.check()?;
        for (name, value) in &self.options.parameters {
            let is_set = RESERVED.split(' ').any(|other| name == other)
                || fixed.has(name)
                || (name == "client_id" && client_auth.sends_id())
                || (self.options.follow_challenge && matches!(name.as_str(), "claims" | "acr_values"));
            if is_set || name.is_empty() {
                return invalid(format!(
                    "parameter must have a name that is not set otherwise, by the grant, by ClientAuth or by another \
                     option of OAuth2, got {name:?}"
                ));
            }
            check_text("the name of a parameter", name)?;
            check_text(name, value)?;
        }
        Ok(())
    }

    /// The fields that are the same in each request and have no secret.
    pub(super) fn fixed_fields(&self) -> Form {
        let mut form = Form::default();
        form.add("grant_type", self.grant.name());
        if !self.options.scopes.is_empty() {
            form.add("scope", &self.options.scopes.join(" "));
        }
        self.options.resources.iter().for_each(|resource| form.add("resource", resource));
        self.options.audience.iter().for_each(|audience| form.add("audience", audience));
        if let Grant::TokenExchange { token_type, .. } = &self.grant {
            form.add("subject_token_type", token_type);
        }
        form
    }

    fn token_request(
        &self,
        url: &Uri,
        secret: Option<(&str, &str)>,
        request: &TokenRequest<'_>,
    ) -> Result<Request<String>, SourceError> {
        let mut form = self.fixed_fields();
        secret.iter().for_each(|(field, secret)| form.add(field, secret));
        self.options.parameters.iter().for_each(|(name, value)| form.add(name, value));
        if let Some(challenge) = request.challenge().filter(|_| self.options.follow_challenge) {
            claims(challenge).iter().for_each(|claims| form.add("claims", claims));
            challenge.acr_values().iter().for_each(|values| form.add("acr_values", values));
        }
        let authorization = self.client_auth().0.add_to(&mut form, &self.server.audience(url))?;
        let mut request = Request::post(url).header(CONTENT_TYPE, "application/x-www-form-urlencoded");
        if let Some(authorization) = authorization {
            request = request.header(AUTHORIZATION, authorization);
        }
        let request = request.body(form.encoded());
        request.map_err(|_| SourceError::configuration("the token request cannot be built"))
    }
}

/// Returns the `claims` of a challenge as JSON, if there are any. Microsoft's APIs send them in base64.
fn claims(challenge: &Challenge) -> Option<String> {
    let claims = challenge.claims()?;
    let decoded = base64_of_any_form(claims).and_then(|bytes| String::from_utf8(bytes.to_vec()).ok());
    Some(decoded.filter(|text| text.trim_start().starts_with('{')).unwrap_or_else(|| claims.to_owned()))
}

#[cfg(test)]
mod tests {
    use http::{HeaderValue, header::WWW_AUTHENTICATE};

    use super::*;

    /// The claims of a challenge come as JSON or in base64.
    #[test]
    fn claims_are_decoded_if_in_base64() {
        let claims_of = |text: &str| {
            let value = HeaderValue::try_from(format!("Bearer claims=\"{text}\"")).unwrap();
            let headers = [(WWW_AUTHENTICATE, value)].into_iter().collect();
            claims(&Challenge::from_headers(&headers)?)
        };
        // The example of Microsoft's documents on claims challenges, with and without padding.
        let decoded = r#"{"access_token":{"nbf":{"essential":true, "value":"1604106651"}}}"#;
        let encoded =
            "eyJhY2Nlc3NfdG9rZW4iOnsibmJmIjp7ImVzc2VudGlhbCI6dHJ1ZSwgInZhbHVlIjoiMTYwNDEwNjY1MSJ9fX0";
        for text in [encoded.to_owned(), format!("{encoded}=")] {
            assert_eq!(claims_of(&text).as_deref(), Some(decoded), "{text}");
        }
        assert_eq!(claims_of(r#"{\"a\":1}"#).as_deref(), Some(r#"{"a":1}"#));
        assert_eq!(claims_of("plain").as_deref(), Some("plain"));
    }
}
