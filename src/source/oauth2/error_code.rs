//! [`registered`]: the registered error codes of a token endpoint, and what each means for the source.

use crate::error::SourceErrorKind;

/// A registered error code, its kind, and what to check (IANA, "OAuth Extensions Error").
pub(super) type ErrorCode = (&'static str, SourceErrorKind, &'static str);

/// The codes of RFC 6749 §4.1.2.1 and §5.2, RFC 8628 §3.5, RFC 8707 §2, RFC 9449 §5 and §8, and OpenID Connect Core
/// §3.1.2.6.
const CODES: [ErrorCode; 20] = {
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
        ("invalid_request", Configuration, "check the options, and the subject token of an exchange"),
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

/// Finds a code. Any other one may have any text, so it is not shown.
pub(super) fn registered(name: &str) -> Option<ErrorCode> {
    CODES.into_iter().find(|(code, ..)| *code == name)
}
