//! [`NoBearer`] and [`UseToken`]: what a request's extensions say of its token.

use http::Extensions;

use crate::token::Token;

/// In a request's [extensions](http::Extensions): send this one as it is, without a token of ours.
///
/// Its 401 is its caller's own: nothing is refreshed or sent again. For what carries its credential elsewhere, such as
/// api.video's delegated uploads (`POST /upload?token=…`).
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

/// In a request's [extensions](http::Extensions): send this one with that token, in place of the provider's.
///
/// Its 401 is its caller's own: nothing is refreshed or sent again. All else holds for it as well: the layer's
/// [scope](crate::BearerAuthLayer::allowed_origins), and what becomes of an `Authorization` header that is there already
/// ([`ExistingAuthorization`](crate::ExistingAuthorization)). With [`NoBearer`] beside it, there is no token.
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

/// What a request asks for.
pub(crate) enum AuthOverride {
    NoBearer,
    UseToken(Token),
}

impl AuthOverride {
    pub(crate) fn of(extensions: &Extensions) -> Option<Self> {
        if extensions.get::<NoBearer>().is_some() {
            return Some(Self::NoBearer);
        }
        extensions.get().map(|UseToken(token)| Self::UseToken(token.clone()))
    }
}
