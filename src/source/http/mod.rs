//! HTTP exchanges with a token endpoint, for any source that has one.
//!
//! - `client`: the HTTP client of a source, which is the default one or the user's.
//! - `endpoint`: one exchange, with a deadline and a limit on the response.
//! - `base_url`: the URL of the endpoints, checked before a credential is sent there.
//! - `token_response`: the parser of a successful response.
//! - `tls`: the roots and the cryptography of the default client.

mod base_url;
mod client;
mod endpoint;
pub(crate) mod token_response;

pub mod tls;

pub(crate) use self::{
    base_url::BaseUrl,
    client::Client,
    endpoint::{BoundedResponse, Endpoint, ExchangeError, Sent},
};
