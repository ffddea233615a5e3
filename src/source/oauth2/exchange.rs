//! One exchange with a token endpoint: the request of a grant, and what its response means.

use http::{
    HeaderMap, Request, StatusCode, Uri,
    header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE},
};
use secrecy::SecretString;
use tokio::time::Instant;

use super::{
    super::{
        TokenRequest,
        http::{ExchangeError, Sent, TokenResponse, check_timeout},
    },
    error_code::{ErrorCode, Reported},
    form::Form,
    options::{Grant, OAuth2},
    server::shown,
};
use crate::{
    challenge::Challenge,
    error::{SourceError, SourceErrorKind},
    retry_after::retry_after,
    token::Token,
};

/// Names that no parameter may have: each has a secret of a grant, or says which grant it is.
const RESERVED: [&str; 8] = [
    "grant_type",
    "refresh_token",
    "assertion",
    "subject_token",
    "subject_token_type",
    "client_secret",
    "client_assertion",
    "client_assertion_type",
];

/// How an exchange failed, which decides what follows for a refresh token.
pub(super) enum Failure {
    /// The server rejected what was presented (`invalid_grant`).
    Grant(SourceError),
    /// The server may have granted a token, and the result is lost.
    Lost(SourceError),
    /// The server has granted a token that cannot be used, perhaps with another refresh token.
    Unusable(SourceError, Option<SecretString>),
    /// No token was granted, for another reason.
    Other(SourceError),
}

impl From<Failure> for SourceError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Grant(error) | Failure::Lost(error) | Failure::Other(error) => error,
            Failure::Unusable(error, _) => error,
        }
    }
}

impl OAuth2 {
    /// Requests a token with the secret of the grant, if it has one: the name of its field, and its value. If that is a
    /// refresh token, it is kept unless the response has another.
    pub(super) async fn exchange(
        &self,
        presented: Option<(&str, &str)>,
        request: &TokenRequest<'_>,
        sent: &Sent,
    ) -> Result<Token, Failure> {
        self.check().map_err(Failure::Other)?;
        let endpoint = self.client.endpoint().map_err(Failure::Other)?;
        let url = self.server.endpoint(&self.client, self.timeout).await.map_err(Failure::Other)?;
        let request = self.request(&url, presented, request).map_err(Failure::Other)?;
        let url = shown(&url);
        let requested_at = Instant::now().into_std();
        let mut response = endpoint.send(request, self.timeout, sent).await.map_err(|error| {
            let not_sent = matches!(error, ExchangeError::NotSent(_));
            let error = error.into_source_error(&format!("no token from {url}"));
            if not_sent { Failure::Other(error) } else { Failure::Lost(error) }
        })?;
        if !response.status.is_success() {
            let reported = Reported::in_body(&response.error_body().await);
            return Err(self.failure(response.status, &response.headers, reported, &url));
        }
        let parsed = TokenResponse::from_json(&response.body)
            .or_else(|error| TokenResponse::from_form(&response.body).ok_or(error));
        match Reported::in_body(&response.body) {
            Reported::Nothing => {}
            reported => {
                let failure = self.failure(response.status, &response.headers, reported, &url);
                // A success with both may have granted the token.
                let has_token = parsed.is_ok_and(|parsed| parsed.has_access_token());
                return Err(match failure {
                    Failure::Other(error) if has_token => Failure::Lost(error),
                    failure => failure,
                });
            }
        }
        let kept = presented.filter(|(name, _)| *name == "refresh_token").map(|(_, token)| token);
        // If the response cannot be used, a refresh token may still be spent.
        let invalid = |error| SourceError::invalid_response(format!("{url}: {error}"));
        let parsed = parsed.map_err(|error| Failure::Lost(invalid(error)))?;
        let next = parsed.refresh_token().map(SecretString::from);
        parsed
            .token(requested_at, self.default_lifetime, kept)
            .map_err(|error| Failure::Unusable(invalid(error), next))
    }

    /// Checks all options.
    pub(super) fn check(&self) -> Result<(), SourceError> {
        check_timeout(self.timeout)?;
        self.server.checked_url()?;
        let (client_auth, _) = self.client_auth();
        client_auth.validate()?;
        if let Grant::RefreshToken(login) = &self.grant {
            login.check()?;
        }
        let invalid = |what: String| Err(SourceError::configuration(what));
        // RFC 6749 §3.3.
        let is_scope = |scope: &str| {
            !scope.is_empty() && scope.bytes().all(|byte| byte.is_ascii_graphic() && !b"\"\\".contains(&byte))
        };
        if let Some(scope) = self.scopes.iter().find(|scope| !is_scope(scope)) {
            return invalid(format!(
                "scopes must have one scope in each value, of visible ASCII, got {scope:?}"
            ));
        }
        // RFC 8707 §2 also asks for an absolute URI, which not every server's resources are.
        let is_resource = |resource: &str| !resource.is_empty() && !resource.contains('#');
        if let Some(resource) = self.resources.iter().find(|resource| !is_resource(resource)) {
            return invalid(format!("resources must not be empty or have a fragment, got {resource:?}"));
        }
        if self.default_lifetime.is_some_and(|lifetime| lifetime.is_zero()) {
            return invalid("default_lifetime must be > 0, got 0s".to_owned());
        }
        let fixed = self.fixed_fields();
        for (name, _) in &self.parameters {
            let is_set = RESERVED.contains(&name.as_str())
                || fixed.has(name)
                || (name == "client_id" && client_auth.sends_id())
                || (self.follow_challenge && matches!(name.as_str(), "claims" | "acr_values"));
            if is_set || name.is_empty() {
                return invalid(format!(
                    "parameter must have a name that is not set otherwise, by the grant, by ClientAuth or by another \
                     option of OAuth2, got {name:?}"
                ));
            }
        }
        Ok(())
    }

    /// The fields that are the same in each request and have no secret.
    fn fixed_fields(&self) -> Form {
        let mut form = Form::default();
        form.add("grant_type", self.grant.name());
        if !self.scopes.is_empty() {
            form.add("scope", &self.scopes.join(" "));
        }
        self.resources.iter().for_each(|resource| form.add("resource", resource));
        self.audience.iter().for_each(|audience| form.add("audience", audience));
        form
    }

    fn request(
        &self,
        url: &Uri,
        presented: Option<(&str, &str)>,
        request: &TokenRequest<'_>,
    ) -> Result<Request<String>, SourceError> {
        let mut form = self.fixed_fields();
        if let Some((name, value)) = presented {
            form.add(name, value);
        }
        if let Grant::TokenExchange { token_type, .. } = &self.grant {
            form.add("subject_token_type", token_type);
        }
        self.parameters.iter().for_each(|(name, value)| form.add(name, value));
        if let Some(challenge) = request.challenge().filter(|_| self.follow_challenge) {
            claims(challenge).iter().for_each(|claims| form.add("claims", claims));
            challenge.acr_values().iter().for_each(|values| form.add("acr_values", values));
        }
        #[cfg(feature = "oauth2-jwt")]
        let audience = self.server.issuer_identifier().map_or_else(|| url.to_string(), str::to_owned);
        #[cfg(not(feature = "oauth2-jwt"))]
        let audience = String::new();
        let authorization = self.client_auth().0.add_to(&mut form, &audience)?;
        let mut request = Request::post(url)
            .header(ACCEPT, "application/json")
            .header(CONTENT_TYPE, "application/x-www-form-urlencoded");
        if let Some(authorization) = authorization {
            request = request.header(AUTHORIZATION, authorization);
        }
        request.body(form.encoded()).map_err(|error| {
            SourceError::configuration("the token request cannot be built").with_cause(error)
        })
    }
}

/// Returns the `claims` of a challenge as JSON, if there are any. Microsoft's APIs send them in base64.
fn claims(challenge: &Challenge) -> Option<String> {
    use base64::{
        Engine,
        alphabet::{STANDARD, URL_SAFE},
        engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
    };

    let claims = challenge.claims()?;
    let any_padding = GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    let decoded = [STANDARD, URL_SAFE].iter().find_map(|alphabet| {
        let bytes = GeneralPurpose::new(alphabet, any_padding).decode(claims).ok()?;
        String::from_utf8(bytes).ok().filter(|text| text.trim_start().starts_with('{'))
    });
    Some(decoded.unwrap_or_else(|| claims.to_owned()))
}

impl OAuth2 {
    /// Returns the failure for a response without a token.
    fn failure(&self, status: StatusCode, headers: &HeaderMap, reported: Reported, url: &str) -> Failure {
        let code = status.as_u16();
        let by_status = || SourceError::of_response(status, headers, url, "the server's URL");
        let error = match reported {
            // A server that is down may answer with anything.
            _ if matches!(code, 408 | 429 | 500..=599) => by_status(),
            Reported::Registered(ErrorCode { name: "invalid_request", .. })
                if matches!(self.grant, Grant::TokenExchange { .. }) =>
            {
                // RFC 8693 §2.2.2: also the code for a subject token that is not valid.
                SourceError::rejected(format!(
                    "{url} responded with HTTP {code} invalid_request: check the subject token, its type and the options"
                ))
            }
            Reported::Registered(ErrorCode { name, kind, hint }) => {
                let message = format!("{url} responded with HTTP {code} {name}: {hint}");
                let error = match kind {
                    SourceErrorKind::Rejected => SourceError::rejected(message),
                    SourceErrorKind::LoginRequired => SourceError::login_required(message),
                    SourceErrorKind::Unavailable => {
                        let error = SourceError::unavailable(message);
                        retry_after(headers).into_iter().fold(error, SourceError::with_retry_after)
                    }
                    _ => SourceError::configuration(message),
                };
                if name == "invalid_grant" {
                    return Failure::Grant(error);
                }
                error
            }
            Reported::Unregistered if status.is_success() || matches!(code, 400 | 401 | 403) => {
                let message =
                    format!("{url} responded with HTTP {code} and an error code that is not registered");
                SourceError::invalid_response(message)
            }
            Reported::Nothing if matches!(code, 400 | 401 | 403) => SourceError::rejected(format!(
                "{url} responded with HTTP {code} without an error code: check the URL, then the credential"
            )),
            Reported::Unregistered | Reported::Nothing => by_status(),
        };
        // It is the status of a rejected grant, too, which would have spent a refresh token.
        let is_unclear = code == 400 && reported == Reported::Nothing;
        if is_unclear { Failure::Lost(error) } else { Failure::Other(error) }
    }
}

#[cfg(test)]
mod tests {
    use http::{HeaderValue, header::WWW_AUTHENTICATE};

    use super::*;

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
