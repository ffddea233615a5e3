//! [`NoBearer`] and [`UseToken`]: request extensions that override the token.

use crate::token::Token;

/// A request [extension](http::Extensions): the layer sends the request without its token.
///
/// A 401 to it goes to the caller: it starts no refresh and no retry. For requests that carry their credential
/// elsewhere, such as api.video's delegated uploads (`POST /upload?token=…`).
///
/// ```
/// use http::Request;
/// use tower_bearer::NoBearer;
///
/// let request = Request::post("https://ws.api.video/upload?token=to1R5L").extension(NoBearer).body(())?;
/// # Ok::<(), http::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NoBearer;

/// A request [extension](http::Extensions): the layer sends the request with this token instead of the provider's.
///
/// A 401 to it goes to the caller: it starts no refresh and no retry. The layer's
/// [allowed origins](crate::BearerAuthLayer::allowed_origins) and its rule for an
/// [existing `Authorization` header](crate::ExistingAuthorization) hold as for any request. If the request also has [`NoBearer`],
/// it is sent without a token.
///
/// ```
/// use http::Request;
/// use tower_bearer::{Token, UseToken};
///
/// let token = Token::builder("eyJ0eXAi").build()?;
/// let request = Request::get("https://ws.api.video/videos").extension(UseToken(token)).body(())?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct UseToken(pub Token);
