//! [`authorize`]: adds the `Authorization` header.

use http::{HeaderMap, HeaderValue, header::AUTHORIZATION};

use crate::{config::ExistingAuthorization, error::Error};

/// Whose `Authorization` header a request carries.
#[derive(Clone, Copy, Debug)]
pub enum Authorized {
    /// The layer's.
    Layer,
    /// The caller's.
    Caller,
}

/// Adds the token to a request that has no `Authorization` header, or whose header is to be replaced (RFC 6750 §2.1).
#[inline]
pub(crate) fn authorize(
    headers: &mut HeaderMap,
    token: HeaderValue,
    existing: ExistingAuthorization,
) -> Result<Authorized, Error> {
    match (headers.try_append(AUTHORIZATION, token), existing) {
        (Ok(false), _) => Ok(Authorized::Layer),
        (Ok(true), existing) => Ok(resolve(headers, existing)),
        (Err(_), _) => Err(Error::TooManyHeaders),
    }
}

/// Removes one of two headers: the caller's, or the token that was added after it.
#[cold]
fn resolve(headers: &mut HeaderMap, existing: ExistingAuthorization) -> Authorized {
    let mut values: Vec<_> = headers.get_all(AUTHORIZATION).iter().cloned().collect();
    let token = values.pop();
    headers.remove(AUTHORIZATION);
    match existing {
        ExistingAuthorization::Keep => {
            headers.extend(values.into_iter().map(|value| (AUTHORIZATION, value)));
            Authorized::Caller
        }
        ExistingAuthorization::Replace => {
            headers.extend(token.map(|value| (AUTHORIZATION, value)));
            Authorized::Layer
        }
    }
}
