//! [`authorize`]: adds the `Authorization` header.

use http::{
    HeaderMap, HeaderValue,
    header::{AUTHORIZATION, Entry},
};

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
    token: &HeaderValue,
    existing: ExistingAuthorization,
) -> Result<Authorized, Error> {
    match headers.try_entry(AUTHORIZATION) {
        Ok(Entry::Vacant(entry)) => {
            entry.try_insert(token.clone()).map_err(|_| Error::TooManyHeaders)?;
            Ok(Authorized::Layer)
        }
        Ok(Entry::Occupied(_)) if existing == ExistingAuthorization::Keep => Ok(Authorized::Caller),
        Ok(Entry::Occupied(mut entry)) => {
            entry.insert(token.clone());
            Ok(Authorized::Layer)
        }
        Err(_) => Err(Error::TooManyHeaders),
    }
}
