//! OAuth 2.0: what [`OAuth2`](crate::OAuth2) is made from.
//!
//! - [`Server`]: the authorization server, by its token endpoint or by its issuer.
//! - [`ClientAuth`]: how the client authenticates.
//! - `Assertion` and `SigningKey` (feature `oauth2-jwt`): signed JWTs.

// `options` has the source and its options, `exchange` one exchange with the token endpoint, and `grants` decides what is
// presented. `form` has the fields of a request.
#[cfg(feature = "oauth2-jwt")]
mod assertion;
mod client_auth;
mod exchange;
mod form;
mod grants;
mod options;
mod server;

#[cfg(feature = "oauth2-jwt")]
#[cfg_attr(docsrs, doc(cfg(feature = "oauth2-jwt")))]
pub use self::assertion::{Assertion, SigningKey};
pub use self::{client_auth::ClientAuth, server::Server};

pub use self::options::OAuth2;
