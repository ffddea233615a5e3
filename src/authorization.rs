//! [`authorize`]: the one header that is added to a request.

use http::{HeaderMap, HeaderValue, header::AUTHORIZATION};

use crate::{config::ExistingAuthorization, error::Error};

/// Whose `Authorization` header a request has.
pub(crate) enum Authorized {
    Ours,
    Callers,
}

/// Adds the token to a request that has no `Authorization` header, or whose own is not kept (RFC 6750 §2.1).
#[inline]
pub(crate) fn authorize(
    headers: &mut HeaderMap,
    token: HeaderValue,
    existing: ExistingAuthorization,
) -> Result<Authorized, Error> {
    match (headers.try_append(AUTHORIZATION, token), existing) {
        (Ok(false), _) => Ok(Authorized::Ours),
        (Ok(true), existing) => Ok(resolve(headers, existing)),
        (Err(_), _) => Err(Error::TooManyHeaders),
    }
}

/// Ours has just been added to what a caller had set: one of the two goes.
#[cold]
fn resolve(headers: &mut HeaderMap, existing: ExistingAuthorization) -> Authorized {
    let mut values: Vec<_> = headers.get_all(AUTHORIZATION).iter().cloned().collect();
    let ours = values.pop();
    headers.remove(AUTHORIZATION);
    match existing {
        ExistingAuthorization::Keep => {
            headers.extend(values.into_iter().map(|value| (AUTHORIZATION, value)));
            Authorized::Callers
        }
        ExistingAuthorization::Replace => {
            headers.extend(ours.map(|value| (AUTHORIZATION, value)));
            Authorized::Ours
        }
    }
}
