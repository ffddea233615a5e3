//! [`TokenSource`]: where tokens come from, and the sources that the crate has.
//!
//! A source makes one attempt per call and returns its result. The provider decides when to call it, how often, and with
//! which refresh token.

pub(crate) mod api_video;
mod check;
pub(crate) mod client;
mod credential;
mod no_source;
pub mod oauth2;
mod request;
mod source_fn;
mod static_token;
mod token_file;
mod token_source;

pub(crate) use self::check::{DAY, SECOND, check_duration, check_text};
pub use self::client::{TokenClient, TokenResponse};
pub use self::credential::Credential;
pub use self::no_source::NoSource;
pub use self::request::{RefreshReason, TokenRequest};
pub use self::source_fn::{SourceFn, source_fn};
pub use self::static_token::StaticToken;
pub use self::token_file::TokenFile;
pub(crate) use self::token_source::DynTokenSource;
pub use self::token_source::TokenSource;
pub(crate) use self::{client::Sent, credential::fingerprint, request::CurrentReason};
