//! [`TokenResponse`]: a response of a token endpoint, and what it means.

use std::borrow::Cow;
use std::time::{Duration, Instant};

use http::{HeaderMap, StatusCode, response::Parts};
use secrecy::zeroize::{Zeroize, Zeroizing};
use serde_json::{Map, Value};

use super::stated_code::stated_code;
use super::transport::ReadBody;
use super::verdict::{Content, content_type, is_page};
use crate::debug::debug_fields;
use crate::error::{Fate, SourceError};
use crate::observability;
use crate::token::{LEAST_LIFE, Token};
use crate::token_builder::TokenBuilder;

/// The types of a token that needs a proof with each request (RFC 9449 §5, RFC 7800, RFC 6749 §7.1).
const PROOF_TYPES: [&str; 3] = ["dpop", "pop", "mac"];

/// The lifetime of a refresh token: Keycloak's and GitHub's name for it.
const REFRESH_TOKEN_LIFETIMES: [&str; 2] = ["refresh_expires_in", "refresh_token_expires_in"];

/// A response of a token endpoint ([`TokenClient::send`](super::TokenClient::send)).
///
/// The body may contain a token. It is overwritten when dropped, and `Debug` does not show it.
pub struct TokenResponse {
    /// Without its query.
    pub(in super::super) url: String,
    /// The option that has set the URL.
    pub(in super::super) option: String,
    pub(in super::super) requested_at: Instant,
    pub(in super::super) head: Parts,
    pub(in super::super) body: ReadBody,
    /// The fields of the body. `None` if it is something else, or could not be read.
    pub(crate) fields: Option<Fields>,
}

impl TokenResponse {
    /// Returns the status.
    pub fn status(&self) -> StatusCode {
        self.head.status
    }

    /// Returns the headers.
    pub fn headers(&self) -> &HeaderMap {
        &self.head.headers
    }

    /// Returns the body, which may contain a token. Use it for a response of another form than
    /// [`token`](Self::token) reads.
    pub fn body(&self) -> &[u8] {
        self.body.as_ref().map_or(&[], |body| body)
    }

    /// Returns the token of a successful response (RFC 6749 §5.1), which is a JSON object or form-encoded.
    ///
    /// Real endpoints differ from the RFC, so this reads:
    ///
    /// - `expires_in`, as a number or a text. One that is zero, negative or unreadable, or that is over already, is
    ///   unknown.
    /// - `refresh_token`. An empty one is none. Its lifetime is `refresh_expires_in` or `refresh_token_expires_in`.
    /// - `token_type`. Any type is a bearer token, except for those that need a proof (DPoP, PoP, MAC).
    ///
    /// # Errors
    ///
    /// [`InvalidResponse`](crate::SourceErrorKind::InvalidResponse) if there is no valid token, or an `error` beside it.
    /// The message has the status and the content type, and nothing of the body.
    pub fn token(&self) -> Result<Token, SourceError> {
        self.granted(None)
    }

    /// Returns the token, or what the response says instead. `default_lifetime` counts if the token's is not known.
    pub(crate) fn granted(&self, default_lifetime: Option<Duration>) -> Result<Token, SourceError> {
        self.read(default_lifetime).map_err(|error| self.with_next_refresh_token(error))
    }

    /// Adds the refresh token in the response, whose access token cannot be used, unless the one before is rejected.
    pub(crate) fn with_next_refresh_token(&self, error: SourceError) -> SourceError {
        let next = self.fields.as_ref().and_then(Fields::refresh_token);
        match next.filter(|_| self.status().is_success() && error.fate() != Fate::Rejected) {
            Some(next) => error.with_next_refresh_token(next),
            None => error,
        }
    }

    /// Whether the response says that there is no token: by its status, or by an error.
    pub(crate) fn is_failure(&self) -> bool {
        let says_error = |fields: &Fields| {
            fields.has_error() || (!fields.has_token() && fields.code(self.status()).is_some())
        };
        !self.status().is_success() || self.fields.as_ref().is_none_or(says_error)
    }

    /// Returns the error code, if it is a known one.
    pub(crate) fn code(&self) -> Option<&'static str> {
        self.fields.as_ref()?.code(self.status())
    }

    fn read(&self, default_lifetime: Option<Duration>) -> Result<Token, SourceError> {
        let Some(fields) = self.fields.as_ref().filter(|_| !self.is_failure()) else {
            return Err(self.failure());
        };
        if fields.0.get("token_type").is_some_and(needs_proof) {
            return Err(self.invalid("has a token_type that needs a proof, such as DPoP"));
        }
        let Some(token) = fields.text("access_token") else {
            return Err(self.invalid("has no access_token that is a text"));
        };
        let mut token = Token::builder(token).requested_at(self.requested_at);
        let elapsed = tokio::time::Instant::now().into_std().saturating_duration_since(self.requested_at);
        let stated = fields.0.get("expires_in");
        if let Some(lifetime) = stated.and_then(lifetime).filter(|known| *known >= elapsed + LEAST_LIFE) {
            token = token.expires_in(lifetime);
        } else {
            if stated.is_some_and(|stated| !stated.is_null()) {
                observability::lifetime_ignored(default_lifetime);
            }
            token = default_lifetime.into_iter().fold(token, TokenBuilder::expires_in);
        }
        if let Some(refresh_token) = fields.refresh_token() {
            token = token.refresh_token(refresh_token);
            let lifetimes = REFRESH_TOKEN_LIFETIMES.iter().filter_map(|name| lifetime(fields.0.get(*name)?));
            token = lifetimes.min().into_iter().fold(token, TokenBuilder::refresh_token_expires_in);
        }
        token.build().map_err(|error| self.invalid(&format!("has a token that is not valid ({error})")))
    }

    /// Returns what the status and the error code say, or that a success is no token response.
    pub(crate) fn failure(&self) -> SourceError {
        self.failure_of(self.code())
    }

    /// As [`failure`](Self::failure), with this error code.
    pub(crate) fn failure_of(&self, code: Option<&'static str>) -> SourceError {
        let content = match &self.fields {
            Some(fields) => {
                Content::Fields { code, has_error: fields.has_error(), has_token: fields.has_token() }
            }
            None if self.body.as_ref().is_some_and(|body| body.is_empty()) && !is_page(self.headers()) => {
                Content::Empty
            }
            None => Content::Other,
        };
        SourceError::of_response(self.status(), self.headers(), content, &self.url, &self.option)
    }

    pub(crate) fn invalid(&self, what: &str) -> SourceError {
        SourceError::invalid_response(self.described(what))
    }

    /// Says what is wrong with the response, with its status and content type.
    pub(crate) fn described(&self, what: &str) -> String {
        let (code, kind) = (self.status().as_u16(), content_type(self.headers()));
        format!("the response of {} {what} (HTTP {code}, {kind})", self.url)
    }
}

debug_fields!(TokenResponse |it| { url: it.url, status: it.head.status });

/// The fields of a response, of which the last counts if a name is there twice. They are overwritten when dropped.
pub(crate) struct Fields(Map<String, Value>);

impl Fields {
    /// Parses a body that is a JSON object, or form-encoded.
    pub(super) fn of(body: &[u8]) -> Option<Self> {
        let lossy = || serde_json::from_str(&Zeroizing::new(String::from_utf8_lossy(body).into_owned()));
        let parsed = serde_json::from_slice(body).or_else(|_| lossy()).ok();
        parsed.or_else(|| form(body)).map(Self)
    }

    pub(crate) fn text(&self, name: &str) -> Option<&str> {
        self.0.get(name)?.as_str()
    }

    pub(crate) fn set(&mut self, name: &str, value: Value) {
        self.0.insert(name.to_owned(), value);
    }

    /// Returns the refresh token. An empty one counts as missing.
    pub(crate) fn refresh_token(&self) -> Option<&str> {
        self.text("refresh_token").filter(|token| !token.is_empty())
    }

    pub(crate) fn has_token(&self) -> bool {
        self.text("access_token").is_some_and(|token| !token.is_empty())
    }

    /// Whether there is an error: in `error`, or under another name if there is no token. Some servers send one that says that
    /// there is none.
    fn has_error(&self) -> bool {
        let is_error = |name: &str| self.0.get(name).is_some_and(|error| !is_none(error));
        let is_code = |name: &str| self.text(name).is_some() && is_error(name);
        let has_other = || is_error("errors") || ["error_code", "errorCode", "code"].into_iter().any(is_code);
        is_error("error") || (!self.has_token() && has_other())
    }

    /// Returns the error code, if it is a known one: in `error` or `errors`, or else in any other text.
    fn code(&self, status: StatusCode) -> Option<&'static str> {
        let mut texts = Vec::new();
        for name in ["error", "errors"] {
            match self.0.get(name).map(|errors| errors.get(0).unwrap_or(errors)) {
                Some(Value::Object(fields)) => add_texts(fields, &mut texts),
                Some(Value::String(text)) => texts.push(text.into()),
                _ => {}
            }
        }
        add_texts(&self.0, &mut texts);
        stated_code(&texts, status)
    }
}

/// Adds the texts of an object, and what it says of a field, such as `{"field": "refresh_token", "code": "invalid"}`.
fn add_texts<'a>(fields: &'a Map<String, Value>, texts: &mut Vec<Cow<'a, str>>) {
    let text = |name| fields.get(name).and_then(Value::as_str);
    texts.extend(fields.values().filter_map(Value::as_str).map(Cow::from));
    if let (Some(field), Some(code)) = (text("field"), text("code")) {
        texts.push(format!("{field} {code}").into());
    }
}

/// Whether an error says that there is none.
fn is_none(error: &Value) -> bool {
    let text = error.as_str().map_or_else(|| error.to_string(), str::to_owned);
    matches!(text.trim(), "" | "0" | "0.0" | "false" | "none" | "null" | "[]" | "{}")
}

impl Drop for Fields {
    fn drop(&mut self) {
        self.0.values_mut().for_each(|value| {
            if let Value::String(text) = value {
                text.zeroize();
            }
        });
    }
}

/// Reads a body that is form-encoded, as some authorization servers send it. `None` if it is something else, such as HTML,
/// whose text could have the form of a field.
fn form(body: &[u8]) -> Option<Map<String, Value>> {
    let body = body.trim_ascii();
    if !body.iter().all(|byte| byte.is_ascii_graphic() && !b"<>\"{}".contains(byte)) {
        return None;
    }
    let fields = form_urlencoded::parse(body);
    let fields: Map<_, _> = fields.map(|(key, value)| (key.into_owned(), value.into())).collect();
    ["access_token", "error"].iter().any(|name| fields.contains_key(*name)).then_some(fields)
}

/// Whether this `token_type` needs a proof. Of several types, one that needs none is enough.
fn needs_proof(token_type: &Value) -> bool {
    match token_type {
        Value::String(name) => PROOF_TYPES.iter().any(|proof| name.trim().eq_ignore_ascii_case(proof)),
        Value::Array(types) => !types.is_empty() && types.iter().all(needs_proof),
        _ => false,
    }
}

/// Reads a lifetime: seconds as a number or a text, whole or fractional. `None` unless it is more than zero.
fn lifetime(stated: &Value) -> Option<Duration> {
    let seconds = match stated {
        Value::Number(number) => number.as_f64()?,
        Value::String(text) => text.trim().parse().ok()?,
        _ => return None,
    };
    // Not true of NaN either.
    (seconds > 0.0).then(|| Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX))
}
