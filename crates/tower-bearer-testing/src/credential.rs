//! [`Credential`]: what a request to the API authenticates with.

use base64::{Engine, prelude::BASE64_STANDARD};
use http::{HeaderMap, header::AUTHORIZATION};

/// The credential in the headers of a request. At most one of the fields is `Some`.
pub(super) struct Credential {
    pub(super) access_token: Option<String>,
    pub(super) api_key: Option<String>,
}

impl Credential {
    pub(super) fn of(headers: &HeaderMap) -> Self {
        Self { access_token: bearer_token(headers).map(str::to_owned), api_key: basic_key(headers) }
    }
}

fn bearer_token(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token)
}

/// Returns the API key of a request that has it as the name of a user (RFC 7617). The password is not
/// used.
fn basic_key(headers: &HeaderMap) -> Option<String> {
    let (scheme, credentials) = headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    let decoded =
        BASE64_STANDARD.decode(credentials).ok().filter(|_| scheme.eq_ignore_ascii_case("basic"))?;
    Some(String::from_utf8(decoded).ok()?.split(':').next()?.to_owned())
}
