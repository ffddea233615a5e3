//! [`ErrorCode`]: the registered error codes of a token endpoint, and what each means for the source.

use serde::Deserialize;
use serde_json::Value;

use super::super::http::{form_field, without_byte_order_mark};
use crate::error::SourceErrorKind;

/// An error code that is registered for a token endpoint's response (IANA, "OAuth Extensions Error").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ErrorCode {
    pub(super) name: &'static str,
    pub(super) kind: SourceErrorKind,
    /// What to check.
    pub(super) hint: &'static str,
}

/// The codes of RFC 6749 §4.1.2.1 and §5.2, RFC 8628 §3.5, RFC 8707 §2, RFC 9449 §5 and §8, and OpenID Connect Core
/// §3.1.2.6.
const CODES: [(&str, SourceErrorKind, &str); 20] = {
    use SourceErrorKind::{Configuration, LoginRequired, Rejected, Unavailable};

    [
        ("invalid_grant", Rejected, "the grant is not valid, has expired, or was revoked"),
        (
            "invalid_client",
            Rejected,
            "check the client's id and its secret; of an assertion, the key, the audience and the clock",
        ),
        ("unauthorized_client", Rejected, "the client may not use this grant"),
        ("access_denied", Rejected, "the grant was denied"),
        ("invalid_request", Configuration, "check the options of the source"),
        ("invalid_scope", Configuration, "check the scopes"),
        ("invalid_target", Configuration, "check the resources and the audience"),
        ("unsupported_grant_type", Configuration, "the server does not offer this grant"),
        ("invalid_dpop_proof", Configuration, "the server asks for DPoP, which this source does not have"),
        ("use_dpop_nonce", Configuration, "the server asks for DPoP, which this source does not have"),
        ("temporarily_unavailable", Unavailable, "the server cannot respond now"),
        ("server_error", Unavailable, "the server has failed"),
        ("slow_down", Unavailable, "the server asks for fewer requests"),
        ("authorization_pending", Unavailable, "a user has to confirm first"),
        ("expired_token", LoginRequired, "a user has to log in again"),
        ("interaction_required", LoginRequired, "a user has to log in again"),
        ("login_required", LoginRequired, "a user has to log in again"),
        ("account_selection_required", LoginRequired, "a user has to log in again"),
        ("consent_required", LoginRequired, "a user has to log in again, and to consent"),
        ("unmet_authentication_requirements", LoginRequired, "a user has to log in more strongly"),
    ]
};

/// What a response says about an error. None of its text is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reported {
    /// It has no error, or one that is not a text.
    Nothing,
    Registered(ErrorCode),
    /// A code that is not registered. It may have any text, so it is not shown.
    Unregistered,
}

impl Reported {
    /// Reads the `error` of a response: in JSON, or form-encoded.
    pub(super) fn in_body(body: &[u8]) -> Self {
        #[derive(Deserialize)]
        struct Body {
            error: Option<Value>,
        }

        match serde_json::from_slice(without_byte_order_mark(body)) {
            Ok(Body { error: Some(Value::String(name)) }) => Self::of(&name),
            Ok(_) => Self::Nothing,
            Err(_) => form_field(body, "error").map_or(Self::Nothing, |name| Self::of(&name)),
        }
    }

    fn of(name: &str) -> Self {
        if name.is_empty() {
            return Self::Nothing;
        }
        let code = CODES.iter().find(|(code, ..)| *code == name);
        code.map_or(Self::Unregistered, |&(name, kind, hint)| {
            Self::Registered(ErrorCode { name, kind, hint })
        })
    }
}
