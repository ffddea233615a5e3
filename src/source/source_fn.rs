//! [`source_fn`]: a token source made from a closure.

use std::{any::type_name, future::Future};

use super::{TokenRequest, TokenSource};
use crate::{debug::debug_fields, error::SourceError, token::Token};

/// Makes a [`TokenSource`] from a closure that obtains one token per call, like tower's `service_fn` for services.
///
/// The closure gets the [`TokenRequest`] by value, so that an `async move` block can keep it. The rules of
/// [`TokenSource::fetch`] apply to the closure. The tokens may go to every `https` origin and loopback. Set fewer
/// origins with [`BearerAuthLayer::allowed_origins`](crate::BearerAuthLayer::allowed_origins). For a response that is
/// not a success, [`SourceError::from_status`] makes the error.
///
/// ```
/// use std::time::Duration;
/// use tower_bearer::{Token, TokenProvider, source_fn};
///
/// # async fn ask_the_vault(_: Option<String>) -> Result<String, std::io::Error> { Ok("eyJ0eXAi".into()) }
/// # async fn run() -> Result<(), tower_bearer::Error> {
/// use tower_bearer::SourceError;
///
/// let provider = TokenProvider::new(source_fn(|request| async move {
///     let claims = request.challenge().and_then(|challenge| challenge.claims()).map(str::to_owned);
///     let text = ask_the_vault(claims)
///         .await
///         .map_err(|error| SourceError::unavailable("the vault cannot be reached").with_cause(error))?;
///     Ok(Token::builder(text).expires_in(Duration::from_secs(300)).build()?)
/// }));
/// assert_eq!(provider.token().await?.access_token(), "eyJ0eXAi");
/// # Ok(())
/// # }
/// # tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(run()).unwrap();
/// ```
pub fn source_fn<F, Fut>(fetch: F) -> SourceFn<F>
where
    F: Fn(TokenRequest<'static>) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<Token, SourceError>> + Send,
{
    SourceFn { fetch }
}

/// A [`TokenSource`] made from a closure by [`source_fn`].
#[derive(Clone, Copy)]
pub struct SourceFn<F> {
    fetch: F,
}

impl<F, Fut> TokenSource for SourceFn<F>
where
    F: Fn(TokenRequest<'static>) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<Token, SourceError>> + Send,
{
    fn fetch(&self, request: &TokenRequest<'_>) -> impl Future<Output = Result<Token, SourceError>> + Send {
        (self.fetch)(request.clone().into_owned())
    }
}

debug_fields!(SourceFn<F> |_| { fetch: type_name::<F>() });
