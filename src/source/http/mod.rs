//! HTTP exchanges with a token endpoint, for any source that has one.
//!
//! - `client`: the HTTP client of a source, which is the default one or the user's.
//! - `endpoint`: one exchange, with a deadline and a limit on the response; the error that a failed response means.
//! - `base_url`: the URL of the endpoints, checked before a credential is sent there.
//! - `token_response`: the parser of a successful response.
//! - `retry_after`: the delay that a response asks for.
//! - `tls`: the roots and the cryptography of the default client.

mod base_url;
mod client;
mod endpoint;
mod retry_after;
pub(crate) mod token_response;

pub mod tls;

pub(crate) use self::{
    base_url::BaseUrl,
    client::Client,
    endpoint::{BoundedResponse, Endpoint, ExchangeError, Sent, failure},
    retry_after::header_seconds,
};
