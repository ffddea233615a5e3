//! The OAuth 2.0 token endpoint: the authentication of the client and the grant for one form, and the metadata.

use base64::{Engine, prelude::BASE64_STANDARD};
use http::{
    HeaderMap,
    header::{AUTHORIZATION, CONTENT_TYPE},
};
use serde_json::{Value, json};

use super::{
    authority::{Authority, Granted},
    authorization::AUTHORIZATION_PATH,
    logins::Rejected,
};

pub(super) const TOKEN_PATH: &str = "/oauth/token";
pub(super) const METADATA_PATH: &str = "/.well-known/oauth-authorization-server";

const AUTHORIZATION_CODE: &str = "authorization_code";
const CLIENT_CREDENTIALS: &str = "client_credentials";
const REFRESH_TOKEN: &str = "refresh_token";
const TOKEN_EXCHANGE: &str = "urn:ietf:params:oauth:grant-type:token-exchange";
const JWT_BEARER: &str = "urn:ietf:params:oauth:grant-type:jwt-bearer";

const ACCESS_TOKEN_TYPE: &str = "urn:ietf:params:oauth:token-type:access_token";
const JWT_TYPES: [&str; 2] =
    ["urn:ietf:params:oauth:token-type:jwt", "urn:ietf:params:oauth:token-type:id_token"];

/// The parameters that are not recorded.
const SECRETS: [&str; 10] = [
    "client_secret",
    "client_assertion",
    "assertion",
    "code",
    "code_verifier",
    "device_code",
    "password",
    "refresh_token",
    "subject_token",
    "actor_token",
];

/// The number of token requests that are recorded.
const RECORDED: usize = 64;

/// An error response of the token endpoint (RFC 6749 §5.2).
#[derive(Debug)]
pub(super) struct TokenError {
    pub(super) code: &'static str,
    pub(super) description: String,
}

pub(super) fn error<T>(code: &'static str, description: impl Into<String>) -> Result<T, TokenError> {
    Err(TokenError { code, description: description.into() })
}

/// How the client of a request is known. Each variant can do what the ones before it can.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Client {
    /// The request names no client.
    Unknown,
    /// The request has the client's ID only.
    Public,
    Authenticated,
}

impl Client {
    fn at_least(self, needed: Self) -> Result<(), TokenError> {
        if self < needed {
            return error("invalid_client", "This grant needs a client that is authenticated.");
        }
        Ok(())
    }
}

impl Authority {
    pub(super) fn token_endpoint(&self) -> String {
        format!("{}{TOKEN_PATH}", self.issuer)
    }

    /// Returns the metadata (RFC 8414 §2).
    pub(super) fn metadata(&mut self) -> Value {
        self.counters.metadata_requests += 1;
        json!({
            "issuer": self.issuer,
            "authorization_endpoint": format!("{}{AUTHORIZATION_PATH}", self.issuer),
            "token_endpoint": self.token_endpoint(),
            "grant_types_supported": [AUTHORIZATION_CODE, CLIENT_CREDENTIALS, REFRESH_TOKEN, TOKEN_EXCHANGE, JWT_BEARER],
            "token_endpoint_auth_methods_supported":
                ["client_secret_basic", "client_secret_post", "private_key_jwt", "none"],
            "token_endpoint_auth_signing_alg_values_supported": ["ES256"],
            "response_types_supported": ["code"],
            "code_challenge_methods_supported": ["S256"],
            "authorization_response_iss_parameter_supported": true,
        })
    }

    /// Responds to a token request. `body` is `None` if it was too long or broke off.
    pub(super) fn grant_token(
        &mut self,
        headers: &HeaderMap,
        body: Option<&[u8]>,
    ) -> Result<Granted, TokenError> {
        let granted = Form::of_request(headers, body).and_then(|form| {
            self.record(&form);
            self.grant_for(headers, &form)
        });
        match &granted {
            Ok(_) => {}
            Err(error) if error.code == "invalid_client" => self.counters.rejected_clients += 1,
            Err(_) => self.counters.rejected_oauth_grants += 1,
        }
        granted
    }

    fn record(&mut self, form: &Form) {
        if self.token_requests.len() == RECORDED {
            self.token_requests.pop_front();
        }
        let kept =
            form.0.iter().filter(|(name, _)| !SECRETS.iter().any(|secret| name.eq_ignore_ascii_case(secret)));
        self.token_requests.push_back(kept.cloned().collect());
    }

    fn grant_for(&mut self, headers: &HeaderMap, form: &Form) -> Result<Granted, TokenError> {
        let client = self.client(headers, form)?;
        form.check_targets()?;
        match form.required("grant_type")? {
            AUTHORIZATION_CODE => {
                client.at_least(Client::Public)?;
                self.exchange_code(form)
            }
            CLIENT_CREDENTIALS => {
                client.at_least(Client::Authenticated)?;
                self.counters.client_credentials_grants += 1;
                Ok(self.issue(None))
            }
            REFRESH_TOKEN => {
                client.at_least(Client::Public)?;
                self.refresh_login(form.required("refresh_token")?)
            }
            TOKEN_EXCHANGE => {
                client.at_least(Client::Authenticated)?;
                self.exchange(form)
            }
            // RFC 7523 §3.1: the client need not be known.
            JWT_BEARER => {
                let claims = self
                    .verify(form.required("assertion")?)
                    .or_else(|description| error("invalid_grant", description))?;
                if !(claims["iss"].is_string() && claims["sub"].is_string()) {
                    return error("invalid_grant", "The JWT needs an issuer and a subject.");
                }
                self.counters.jwt_bearer_grants += 1;
                Ok(self.issue(None))
            }
            _ => error("unsupported_grant_type", "This grant type is not known."),
        }
    }

    fn refresh_login(&mut self, refresh_token: &str) -> Result<Granted, TokenError> {
        match self.logins.refresh(refresh_token) {
            Ok((login, next)) => {
                self.counters.oauth_refresh_grants += 1;
                Ok(Granted { refresh_token: next, ..self.issue(Some(login)) })
            }
            Err(Rejected::Unknown) => error("invalid_grant", "The refresh token is unknown or revoked."),
            Err(Rejected::Reused(login)) => {
                self.counters.reused_refresh_tokens += 1;
                self.revoke_login(login);
                error("invalid_grant", "The refresh token was spent earlier. Its login is revoked.")
            }
        }
    }

    /// Exchanges a subject token (RFC 8693 §2.1).
    fn exchange(&mut self, form: &Form) -> Result<Granted, TokenError> {
        self.check_subject(form.required("subject_token")?, form.required("subject_token_type")?)?;
        match (form.get("actor_token"), form.get("actor_token_type")) {
            (None, None) => {}
            (Some(token), Some(token_type)) => self.check_subject(token, token_type)?,
            _ => return error("invalid_request", "An actor token and its type come together."),
        }
        if form.get("requested_token_type").is_some_and(|requested| requested != ACCESS_TOKEN_TYPE) {
            return error("invalid_request", "Only access tokens are issued.");
        }
        self.counters.token_exchanges += 1;
        Ok(Granted { issued_token_type: Some(ACCESS_TOKEN_TYPE), ..self.issue(None) })
    }

    /// Checks a subject or actor token. One that is not valid is an invalid request (RFC 8693 §2.2.2).
    fn check_subject(&self, token: &str, token_type: &str) -> Result<(), TokenError> {
        let checked = match token_type {
            ACCESS_TOKEN_TYPE if self.account_with(token).is_some() => Ok(()),
            ACCESS_TOKEN_TYPE => Err("This access token is not valid here."),
            jwt if JWT_TYPES.contains(&jwt) => self.verify(token).map(drop),
            _ => Err("This token type is not known."),
        };
        checked.or_else(|description| error("invalid_request", description))
    }

    /// Authenticates the client (RFC 6749 §2.3, RFC 7521 §4.2).
    fn client(&mut self, headers: &HeaderMap, form: &Form) -> Result<Client, TokenError> {
        let (basic, secret, assertion) =
            (headers.get(AUTHORIZATION), form.get("client_secret"), form.get("client_assertion"));
        let methods = [basic.is_some(), secret.is_some(), assertion.is_some()];
        if methods.iter().filter(|used| **used).count() > 1 {
            return error("invalid_request", "A client authenticates with one method.");
        }
        let id = form.get("client_id");
        let good = if let Some(basic) = basic {
            let given = basic.to_str().ok().and_then(basic_credentials);
            given.is_some_and(|(id, secret)| id == self.client_id && secret == self.client_secret)
        } else if let Some(secret) = secret {
            id.is_some() && secret == self.client_secret
        } else if let Some(assertion) = assertion {
            self.check_client_assertion(assertion, form.get("client_assertion_type"))?;
            true
        } else {
            return match id {
                None => Ok(Client::Unknown),
                Some(id) if id == self.client_id => Ok(Client::Public),
                Some(_) => error("invalid_client", "The client is unknown."),
            };
        };
        if !good || id.is_some_and(|id| id != self.client_id) {
            return error("invalid_client", "The client or its secret is wrong.");
        }
        Ok(Client::Authenticated)
    }

    /// Checks the JWT of a client (RFC 7523 §3), which is valid once.
    fn check_client_assertion(&mut self, jwt: &str, assertion_type: Option<&str>) -> Result<(), TokenError> {
        if assertion_type != Some("urn:ietf:params:oauth:client-assertion-type:jwt-bearer") {
            return error("invalid_client", "The client assertion is not a JWT by its type.");
        }
        let claims = self.verify(jwt).or_else(|description| error("invalid_client", description))?;
        if claims["iss"] != self.client_id || claims["sub"] != self.client_id {
            return error("invalid_client", "The issuer and the subject of the JWT must be the client.");
        }
        match claims["jti"].as_str() {
            None => error("invalid_client", "The JWT needs a jti."),
            Some(jti) if !self.seen_jtis.insert(jti.to_owned()) => {
                error("invalid_client", "This JWT was used earlier.")
            }
            Some(_) => Ok(()),
        }
    }

    fn verify(&self, jwt: &str) -> Result<Value, &'static str> {
        self.trusted_key.verify(jwt, &[self.token_endpoint(), self.issuer.clone()])
    }
}

/// The parameters of a request that have a value.
pub(super) struct Form(Vec<(String, String)>);

impl Form {
    fn of_request(headers: &HeaderMap, body: Option<&[u8]>) -> Result<Self, TokenError> {
        let content_type =
            headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let media_type = content_type.split(';').next().unwrap_or_default().trim();
        let Some(body) =
            body.filter(|_| media_type.eq_ignore_ascii_case("application/x-www-form-urlencoded"))
        else {
            return error("invalid_request", "The request is not a form.");
        };
        Self::parse(body)
    }

    pub(super) fn parse(text: &[u8]) -> Result<Self, TokenError> {
        let mut form = Self(Vec::new());
        for (name, value) in form_urlencoded::parse(text).into_owned() {
            // RFC 8693 §2.1: only these two can be repeated.
            if !["resource", "audience"].contains(&name.as_str()) && form.get(&name).is_some() {
                return error("invalid_request", "A parameter is repeated.");
            }
            // RFC 6749 §3.2: a parameter without a value counts as omitted.
            if !value.is_empty() {
                form.0.push((name, value));
            }
        }
        Ok(form)
    }

    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(of, _)| of == name).map(|(_, value)| value.as_str())
    }

    pub(super) fn required(&self, name: &str) -> Result<&str, TokenError> {
        self.get(name)
            .map_or_else(|| error("invalid_request", format!("This parameter is required: {name}.")), Ok)
    }

    /// Checks the form of the scopes (RFC 6749 §3.3) and the resources (RFC 8707 §2). All are granted.
    pub(super) fn check_targets(&self) -> Result<(), TokenError> {
        let is_scope = |scope: &str| {
            !scope.is_empty() && scope.bytes().all(|byte| matches!(byte, b'!' | b'#'..=b'[' | b']'..=b'~'))
        };
        if self.get("scope").is_some_and(|scopes| !scopes.split(' ').all(is_scope)) {
            return error("invalid_scope", "The scope is malformed.");
        }
        let is_resource = |uri: &str| uri.contains(':') && !uri.contains('#');
        if self.0.iter().any(|(name, value)| name == "resource" && !is_resource(value)) {
            return error("invalid_target", "A resource is an absolute URI without a fragment.");
        }
        Ok(())
    }
}

/// Parses the ID and the secret of a client, which are form-encoded (RFC 6749 §2.3.1).
fn basic_credentials(header: &str) -> Option<(String, String)> {
    let (scheme, credentials) = header.split_once(' ')?;
    let decoded = BASE64_STANDARD.decode(credentials.trim()).ok()?;
    let (id, secret) = std::str::from_utf8(&decoded).ok()?.split_once(':')?;
    scheme.eq_ignore_ascii_case("basic").then_some(())?;
    Some((form_decoded(id)?, form_decoded(secret)?))
}

/// Decodes a single value. `None` if it has a separator of a form.
fn form_decoded(value: &str) -> Option<String> {
    let form = format!("={value}");
    let mut pairs = form_urlencoded::parse(form.as_bytes()).filter(|_| !value.contains('&'));
    pairs.next().map(|(_, decoded)| decoded.into_owned())
}
