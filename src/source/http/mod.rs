//! HTTP exchanges with a token endpoint, for any source that has one.
//!
//! - `client`: the HTTP client of a source, which is the default one or the user's.
//! - `endpoint`: one exchange, with a deadline and a limit on the response.
//! - `url`: whether a credential may be sent to a URL.
//! - `token_response`: the parser of a successful response.
//! - `tls`: the roots and the cryptography of the default client.

mod client;
mod endpoint;
mod token_response;
mod url;

pub mod tls;

#[cfg(feature = "api-video")]
pub(crate) use self::endpoint::BoundedResponse;
#[cfg(feature = "oauth2")]
pub(crate) use self::token_response::{form_field, without_byte_order_mark};
pub(crate) use self::{
    client::Client,
    endpoint::{Endpoint, ExchangeError, Sent, check_timeout},
    token_response::TokenResponse,
    url::check_url,
};
