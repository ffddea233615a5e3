//! [`authorize`]: adds the `Authorization` header. [`ExistingAuthorization`]: what happens to one that is there.

use http::header::{AUTHORIZATION, Entry};
use http::{HeaderMap, HeaderValue};

/// What happens to an `Authorization` header that a request already has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExistingAuthorization {
    /// The request is sent unchanged. A 401 to it goes to the caller: it starts no refresh and no retry.
    #[default]
    Keep,
    /// The layer's token replaces the header.
    Replace,
}

/// Whose `Authorization` header a request carries.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Authorized {
    /// The layer's.
    Layer,
    /// The caller's.
    Caller,
}

/// Adds the token to a request that has no `Authorization` header, or whose header is to be replaced (RFC 6750 §2.1).
/// `None` if the request has as many headers as a map can have.
#[inline]
pub(crate) fn authorize(
    headers: &mut HeaderMap,
    token: &HeaderValue,
    existing: ExistingAuthorization,
) -> Option<Authorized> {
    match headers.try_entry(AUTHORIZATION).ok()? {
        Entry::Vacant(entry) => _ = entry.try_insert(token.clone()).ok()?,
        Entry::Occupied(_) if existing == ExistingAuthorization::Keep => return Some(Authorized::Caller),
        Entry::Occupied(mut entry) => _ = entry.insert(token.clone()),
    }
    Some(Authorized::Layer)
}
