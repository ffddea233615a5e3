//! OAuth 2.0: what [`OAuth2`](crate::OAuth2) is made from.
//!
//! - [`Server`]: the authorization server, by its token endpoint or by its issuer.
//! - [`ClientAuth`]: how the client authenticates.
//! - `Assertion` and `SigningKey` (feature `oauth2-jwt`): signed JWTs.

// `options` has the source and its options, `exchange` one exchange with the token endpoint, `grants` decides what is
// presented, and `login` which refresh token that is. `error_code` reads an error, and `form` has the fields of a request.
#[cfg(feature = "oauth2-jwt")]
mod assertion;
mod client_auth;
mod error_code;
mod exchange;
mod form;
mod grants;
mod login;
mod options;
mod server;

#[cfg(feature = "oauth2-jwt")]
#[cfg_attr(docsrs, doc(cfg(feature = "oauth2-jwt")))]
pub use self::assertion::{Assertion, SigningKey};
pub use self::{client_auth::ClientAuth, server::Server};

pub use self::options::OAuth2;
