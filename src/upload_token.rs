//! [`UploadToken`]: what lets somebody else upload one's videos; made through a stack of its own over the source's client.

use std::{fmt, time::Duration};

use http::Response;
use secrecy::{ExposeSecret, SecretString, zeroize::Zeroizing};
use serde::{Deserialize, Serialize};
use tower::{Layer, ServiceExt, service_fn};

use crate::{
    error::{BoxError, Error, SourceError},
    layer::BearerAuthLayer,
    provider::TokenProvider,
    source::{ApiVideo, failure},
};

const PATH: &str = "/upload-tokens";

/// Lets whoever has it upload videos, without the API key and without a bearer token: api.video's delegated upload.
///
/// It goes into the query of `POST /upload?token=…`, a request that carries no `Authorization` header: give it
/// [`NoBearer`](crate::NoBearer) where the client has the layer.
///
/// Its `Debug` does not show the token, which is overwritten in memory when it is dropped.
#[derive(Clone)]
pub struct UploadToken {
    token: SecretString,
    ttl: Duration,
}

impl UploadToken {
    /// The token, a secret.
    pub fn token(&self) -> &str {
        self.token.expose_secret()
    }

    /// How long it lives, from when it was made.
    pub fn ttl(&self) -> Duration {
        self.ttl
    }
}

impl fmt::Debug for UploadToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UploadToken").field("ttl", &self.ttl).finish_non_exhaustive()
    }
}

impl ApiVideo {
    /// Makes an upload token (`POST /upload-tokens`) that lives for `ttl`, in whole seconds, rounded up.
    ///
    /// The request goes over this source's client to its base URL, with the token of `provider`, which is the one that was
    /// made of this source; it is healed as every request is.
    ///
    /// ```no_run
    /// # async fn run() -> Result<(), tower_bearer::Error> {
    /// use std::time::Duration;
    /// use tower_bearer::{ApiVideo, TokenProvider};
    ///
    /// let api_video = ApiVideo::new("your API key");
    /// let provider = TokenProvider::new(api_video.clone());
    /// let upload_token = api_video.upload_token(&provider, Duration::from_secs(600)).await?;
    /// println!("https://ws.api.video/upload?token={}", upload_token.token());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if `ttl` is zero, which api.video takes for "without end", or more than 68 years, the most
    /// that it takes. [`Error::Source`] if the endpoint cannot be reached, refuses, or answers without a token; and what
    /// [`TokenProvider::token`] may end with.
    ///
    /// # Cancel safety
    ///
    /// Dropped while the request is under way, a token may have been made that nobody knows; it runs out.
    pub async fn upload_token(&self, provider: &TokenProvider, ttl: Duration) -> Result<UploadToken, Error> {
        let seconds = ttl.as_secs().saturating_add(u64::from(ttl.subsec_nanos() > 0));
        if seconds == 0 || seconds > i32::MAX as u64 {
            return Err(Error::InvalidOption(
                "an upload token lives for more than zero, and at most 2³¹ s".into(),
            ));
        }
        // A number always serializes.
        let body = serde_json::to_string(&Body { ttl: seconds }).unwrap_or_default();
        let request = self.request(PATH, body)?;
        let url = request.uri().clone();
        let layer = BearerAuthLayer::with_provider(provider.clone()).allowed_origins(self.own_origin());
        let client = layer.layer(service_fn(|request| self.exchange(request)));
        let answer: Response<String> = client.oneshot(request).await.map_err(ours)?;
        let (head, body) = answer.into_parts();
        let body = Zeroizing::new(body);
        if !head.status.is_success() {
            return Err(match head.status.as_u16() {
                code @ (401 | 403) => {
                    SourceError::rejected(format!("api.video made no upload token (HTTP {code})"))
                }
                _ => failure(head.status, &head.headers, &url),
            }
            .into());
        }
        let invalid = || SourceError::invalid_response("api.video's answer has no upload token");
        let answer: Answer = serde_json::from_str(&body).map_err(|_| invalid())?;
        let token = answer.token.filter(|token| !token.expose_secret().is_empty()).ok_or_else(invalid)?;
        Ok(UploadToken { token, ttl: Duration::from_secs(seconds) })
    }
}

#[derive(Serialize)]
struct Body {
    ttl: u64,
}

#[derive(Deserialize)]
struct Answer {
    token: Option<SecretString>,
}

/// What the stack failed with: the provider's error, or the source's own.
fn ours(error: BoxError) -> Error {
    match error.downcast::<Error>() {
        Ok(error) => *error,
        Err(error) => match error.downcast::<SourceError>() {
            Ok(error) => (*error).into(),
            Err(error) => SourceError::unavailable("no upload token").with_cause(error).into(),
        },
    }
}
