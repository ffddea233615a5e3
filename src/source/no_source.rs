//! [`NoSource`]: the source of a provider that reads the tokens of others.

use super::{TokenRequest, TokenSource};
use crate::{error::SourceError, token::Token};

/// The source of a provider without a credential, which [`TokenProvider::reader`](crate::TokenProvider::reader) makes.
#[derive(Debug)]
pub struct NoSource(pub(crate) ());

impl TokenSource for NoSource {
    async fn fetch(&self, _: &TokenRequest<'_>) -> Result<Token, SourceError> {
        Err(no_credential())
    }

    /// Not called for a reader: no other role can do without a credential.
    fn validate(&self) -> Result<(), SourceError> {
        Err(no_credential())
    }
}

fn no_credential() -> SourceError {
    SourceError::configuration(
        "role must be Reader without a credential: a reader uses the tokens in its store",
    )
}
