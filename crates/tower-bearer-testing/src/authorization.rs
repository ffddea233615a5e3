//! The authorization endpoint (RFC 6749 §4.1), whose user agrees at once, and the grant for its codes.

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, Uri, header::LOCATION};
use ring::digest::{SHA256, digest};

use super::{
    authority::{Authority, Granted},
    logins::Login,
    oauth2::{Form, TokenError, error},
    random::random,
    responses::problem,
};

pub(super) const AUTHORIZATION_PATH: &str = "/oauth/authorize";

/// What a code was issued for.
pub(super) struct Authorization {
    redirect_uri: String,
    code_challenge: String,
    /// `None` until the code is exchanged.
    login: Option<Login>,
}

impl Authority {
    /// Responds to the browser of a user, who agrees.
    pub(super) fn authorize(&mut self, query: &str) -> Response<Bytes> {
        let form = match Form::parse(query.as_bytes()) {
            Ok(form) => form,
            Err(error) => return problem(StatusCode::BAD_REQUEST, &error.description),
        };
        // RFC 6749 §4.1.2.1: without these two, nobody is redirected.
        let client = form.get("client_id").is_some_and(|id| id == self.client_id);
        let redirect_uri = form.get("redirect_uri").filter(|uri| is_loopback(uri));
        let Some(redirect_uri) = redirect_uri.filter(|_| client) else {
            return problem(
                StatusCode::BAD_REQUEST,
                "The request needs the server's client_id, and a redirect_uri on loopback.",
            );
        };
        let mut answer = match self.issue_code(redirect_uri, &form) {
            Ok(code) => vec![("code", code)],
            Err(error) => vec![("error", error.code.to_owned()), ("error_description", error.description)],
        };
        answer.extend(form.get("state").map(|state| ("state", state.to_owned())));
        // RFC 9207.
        answer.push(("iss", self.issuer.clone()));
        let answer = form_urlencoded::Serializer::new(String::new()).extend_pairs(answer).finish();
        let separator = if redirect_uri.contains('?') { '&' } else { '?' };
        let Ok(location) = HeaderValue::try_from(format!("{redirect_uri}{separator}{answer}")) else {
            return problem(StatusCode::BAD_REQUEST, "The redirect_uri is not a URI.");
        };
        let mut response = Response::new(Bytes::new());
        *response.status_mut() = StatusCode::FOUND;
        response.headers_mut().insert(LOCATION, location);
        response
    }

    fn issue_code(&mut self, redirect_uri: &str, form: &Form) -> Result<String, TokenError> {
        if form.required("response_type")? != "code" {
            return error("unsupported_response_type", "Only codes are issued.");
        }
        form.check_targets()?;
        let code_challenge = form.required("code_challenge")?.to_owned();
        if form.get("code_challenge_method") != Some("S256") {
            return error("invalid_request", "The code_challenge_method must be S256.");
        }
        let code = random(16);
        let authorization =
            Authorization { redirect_uri: redirect_uri.to_owned(), code_challenge, login: None };
        self.codes.insert(code.clone(), authorization);
        Ok(code)
    }

    /// Exchanges a code (RFC 6749 §4.1.3, RFC 7636 §4.6), which is valid once. It begins a login. A second use ends that
    /// (RFC 6749 §4.1.2).
    pub(super) fn exchange_code(&mut self, form: &Form) -> Result<Granted, TokenError> {
        let (code, redirect_uri) = (form.required("code")?, form.required("redirect_uri")?);
        let verifier = form.required("code_verifier")?;
        let Some(authorization) = self.codes.remove(code) else {
            return error("invalid_grant", "The code is unknown or was used earlier.");
        };
        if let Some(login) = authorization.login {
            self.logins.end(login);
            self.revoke_login(login);
            return error("invalid_grant", "The code was used earlier. Its login is revoked.");
        }
        let challenge = BASE64_URL_SAFE_NO_PAD.encode(digest(&SHA256, verifier.as_bytes()));
        if (redirect_uri, &challenge) != (&authorization.redirect_uri, &authorization.code_challenge) {
            return error("invalid_grant", "The redirect_uri or the code_verifier is another one.");
        }
        self.counters.authorization_code_grants += 1;
        let (login, refresh_token) = self.logins.start();
        self.codes.insert(code.to_owned(), Authorization { login: Some(login), ..authorization });
        Ok(Granted { refresh_token: Some(refresh_token), ..self.issue(Some(login)) })
    }
}

/// Whether a URI leads to a program on this machine (RFC 8252 §7.3). Any of them counts as registered.
fn is_loopback(uri: &str) -> bool {
    // A URI of this type has no fragment, which RFC 6749 §3.1.2 forbids, but it does not reject one.
    let is_plain = uri.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'#');
    let uri = uri.parse::<Uri>().ok().filter(|uri| is_plain && uri.scheme_str() == Some("http"));
    uri.as_ref().and_then(Uri::authority).is_some_and(|authority| {
        let host = authority.host();
        let port = authority.port_u16().map(|port| format!(":{port}")).unwrap_or_default();
        // Without user info, and with a port that is one.
        matches!(host, "127.0.0.1" | "localhost" | "[::1]") && authority.as_str() == format!("{host}{port}")
    })
}
