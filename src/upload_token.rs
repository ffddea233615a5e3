//! [`UploadToken`]: a token for api.video's delegated uploads, requested with the layer over the source's client.

use std::{sync::Arc, time::Duration};

use http::{Request, Response};
use secrecy::{ExposeSecret, SecretString};
use tower::{Layer, ServiceExt, service_fn};

use crate::error::{BoxError, Error, Seconds, SourceError, SourceErrorKind};
use crate::layer::BearerAuthLayer;
use crate::provider::TokenProvider;
use crate::source::api_video::{ApiVideo, OPTION, failure};
use crate::source::client::Sent;
use crate::source::{TokenResponse, TokenSource};

/// A token that allows its holder to upload videos, without the API key and without a bearer token (delegated upload).
///
/// It goes into the query of `POST /upload?token=…`. That request has no `Authorization` header: if its client has the
/// layer, add [`NoBearer`](crate::NoBearer) to the request.
///
/// `Debug` does not show the token. The token is overwritten in memory when it is dropped.
#[derive(Clone, Debug)]
pub struct UploadToken {
    token: SecretString,
    ttl: Duration,
}

impl UploadToken {
    /// Returns the token, which is a secret.
    pub fn token(&self) -> &str {
        self.token.expose_secret()
    }

    /// Returns the lifetime of the token, counted from its creation.
    pub fn ttl(&self) -> Duration {
        self.ttl
    }
}

impl ApiVideo {
    /// Creates an upload token (`POST /upload-tokens`) with a lifetime of `ttl`, rounded up to whole seconds.
    ///
    /// The request uses this source's client and base URL, and the token of `provider`, which must be made from this
    /// source. If the API challenges it, it is retried as every request is.
    ///
    /// ```no_run
    /// # async fn run() -> Result<(), tower_bearer::Error> {
    /// use std::time::Duration;
    /// use tower_bearer::{ApiVideo, TokenProvider};
    ///
    /// let api_video = ApiVideo::new("your-api-key");
    /// let provider = TokenProvider::new(api_video.clone());
    /// let upload_token = api_video.upload_token(&provider, Duration::from_secs(600)).await?;
    /// println!("{}upload?token={}", api_video.api_base(), upload_token.token());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// - [`Error::InvalidOption`] if `ttl` is zero, which api.video reads as unlimited, or more than 2³¹ - 1 s, its
    ///   maximum.
    /// - [`Error::Source`] if the endpoint cannot be reached, rejects the request, or responds without a token.
    /// - The errors of [`TokenProvider::token`].
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped after the request was sent, the API may have created a token that nothing holds. It
    /// expires.
    pub async fn upload_token(&self, provider: &TokenProvider, ttl: Duration) -> Result<UploadToken, Error> {
        let seconds = ttl.as_secs().saturating_add(u64::from(ttl.subsec_nanos() > 0));
        let text = format_args!("ttl must be > 0 and < 2^31 s, got {}", Seconds(ttl));
        Error::check((1..=i32::MAX as u64).contains(&seconds), text)?;
        let request = self.request("upload-tokens", format!(r#"{{"ttl":{seconds}}}"#))?;
        let layer = BearerAuthLayer::with_provider(provider.clone()).allowed_origins(self.allowed_origins());
        let client = layer.layer(service_fn(|request: Request<String>| async {
            let response = self.client.exchange(request, OPTION, &Sent::default()).await?;
            let mut answer = Response::new(String::new());
            *answer.status_mut() = response.status();
            *answer.headers_mut() = response.headers().clone();
            answer.extensions_mut().insert(Arc::new(response));
            Ok::<_, SourceError>(answer)
        }));
        let answer = client.oneshot(request).await.map_err(into_error)?;
        let Some(response) = answer.extensions().get::<Arc<TokenResponse>>() else {
            return Err(SourceError::invalid_response("the layer has dropped the response").into());
        };
        let code = response.status().as_u16();
        let token = response.fields.as_ref().and_then(|fields| fields.text("token"));
        let token = token.filter(|token| !token.is_empty());
        Err(match (code, token) {
            (200..=299, Some(token)) => {
                return Ok(UploadToken { token: token.into(), ttl: Duration::from_secs(seconds) });
            }
            (200..=299, None) => response.invalid("has no upload token"),
            (401 | 403, _) if response.failure().kind() == SourceErrorKind::Rejected => {
                SourceError::rejected(format!("api.video did not create an upload token (HTTP {code})"))
            }
            // The API has accepted the token, so the request is what it does not understand.
            (400, _) => response.invalid("is an error"),
            _ => failure(response),
        }
        .into())
    }
}

/// Returns the error inside the layer's boxed one: the provider's, or the source's.
fn into_error(error: BoxError) -> Error {
    let source_error = |error: BoxError| match error.downcast::<SourceError>() {
        Ok(error) => *error,
        Err(error) => SourceError::unavailable("no upload token from api.video").with_cause(error),
    };
    error.downcast::<Error>().map_or_else(|error| source_error(error).into(), |error| *error)
}
