//! [`ApiVideo`]: the source for api.video's disposable bearer tokens.
//!
//! This file has the options and the request that all endpoints share. `base_url` has the URL of the endpoints, `grants`
//! has the two grants, and `key` the API key.

mod base_url;
mod grants;
mod key;

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use http::{HeaderName, HeaderValue, Request, StatusCode, Uri, header::CONTENT_TYPE};

pub(crate) use self::base_url::OPTION;
use self::{base_url::BaseUrl, key::ApiKey};
use super::client::{TokenClient, TokenResponse};
use crate::{error::SourceError, retry_after::header_seconds};

const PRODUCTION: &str = "https://ws.api.video";
const SANDBOX: &str = "https://sandbox.api.video";

/// The name of the client, in the form that api.video's own clients use.
const ORIGIN_CLIENT: HeaderName = HeaderName::from_static("av-origin-client");
const ORIGIN_APP: HeaderName = HeaderName::from_static("av-origin-app");

/// The delay that a 429 of api.video asks for, in seconds.
const RATE_LIMIT_RETRY_AFTER: &str = "x-ratelimit-retry-after";

/// A [`TokenSource`](crate::TokenSource) for api.video's disposable bearer tokens ("Bearer Token Authentication" in its
/// documents).
///
/// ```
/// use tower_bearer::{ApiVideo, TokenProvider};
///
/// let provider = TokenProvider::new(ApiVideo::sandbox("your-api-key"));
/// ```
///
/// # Order of grants
///
/// 1. `POST /auth/refresh` with the refresh token, if there is one of this key.
/// 2. If that is rejected, `POST /auth/api-key` with the API key.
/// 3. If that is rejected too (400, 401, 403), a permanent error.
///
/// The key is thus sent as rarely as api.video's documents ask.
///
/// Its use spends a refresh token, so the key is used after two answers that do not say what became of it:
///
/// | response to the refresh token | what follows |
/// |---|---|
/// | 408, 425, 429, a 4xx with `Retry-After`, or the request was not sent | it is not spent: it is presented again after the backoff |
/// | any other 4xx with JSON; 404, 405, 410, 415; an empty 401 or 403; a redirect | it is rejected: the API key is used |
/// | everything else, such as a 5xx, an empty 400, a page, or a response that is lost or late | it may be spent: it is presented once more after the backoff, then the API key is used |
///
/// A refresh endpoint that always fails thus costs at most one authentication per token. With the default client, it is
/// known exactly whether a request was sent. With [another one](TokenClient::with_service), a request counts as sent
/// once the service is called, unless its error is a failure to connect.
///
/// Every authentication with the key ends the refresh token before it, whichever process holds that. Two processes on
/// one key therefore cost each other a rejected refresh and an authentication per expiry. Let several processes share
/// a store ([`TokenProviderBuilder::store`](crate::TokenProviderBuilder#method.store)), or use the key only
/// ([`key_only`](Self::key_only)).
///
/// Each exchange is bounded, and errors are classified, as [`TokenClient`] documents.
///
/// # Which origins see the token
///
/// The origin of the base URL, which the API shares, unless the layer's
/// [`allowed_origins`](crate::BearerAuthLayer::allowed_origins) are set.
///
/// # Clones
///
/// Clones share the key. Keep one to replace the key later ([`set_key`](Self::set_key)).
#[derive(Clone)]
pub struct ApiVideo {
    key: Arc<Mutex<ApiKey>>,
    pub(crate) base_url: BaseUrl,
    pub(crate) client: TokenClient,
    /// The header, or the error for a name or a version that is not valid.
    origin_app: Option<Result<HeaderValue, SourceError>>,
    key_only: bool,
}

impl ApiVideo {
    /// Makes a source for api.video's production environment.
    ///
    /// A key that is empty or not valid is an error of
    /// [`TokenProviderBuilder::build`](crate::TokenProviderBuilder::build), or else of the first use.
    pub fn new(api_key: impl Into<String>) -> Self {
        Self::at(api_key.into(), Uri::from_static(PRODUCTION))
    }

    /// Makes a source for api.video's sandbox environment, which has its own API key.
    pub fn sandbox(api_key: impl Into<String>) -> Self {
        Self::at(api_key.into(), Uri::from_static(SANDBOX))
    }

    fn at(key: String, base_url: Uri) -> Self {
        Self {
            key: Arc::new(Mutex::new(ApiKey::new(key))),
            base_url: BaseUrl::new(base_url),
            client: TokenClient::new(),
            origin_app: None,
            key_only: false,
        }
    }

    /// Sets the base URL of the auth endpoints, such as a proxy's or a test server's. Default: the environment's.
    ///
    /// The URL is `https`, or `http` on loopback ([`TokenClient::allow_plaintext`]). It may have a path, which is a prefix of the endpoints' paths, but
    /// neither a query nor a user name. A URL that is not valid is an error of
    /// [`TokenProviderBuilder::build`](crate::TokenProviderBuilder::build), or else of the first use.
    pub fn base_url(mut self, base_url: Uri) -> Self {
        self.base_url = BaseUrl::new(base_url);
        self
    }

    /// Returns the base URL of the API that the tokens are for. Build the URLs of requests from it.
    ///
    /// It is the environment's, or the one that was set ([`base_url`](Self::base_url)). Its path ends with `/`. By
    /// default, only requests to its origin get the token. A request to another host, such as production's with a
    /// source for the sandbox, is sent without one.
    ///
    /// ```
    /// use http::Request;
    /// use tower_bearer::ApiVideo;
    ///
    /// let source = ApiVideo::sandbox("your-api-key");
    /// let request = Request::get(format!("{}videos", source.api_base())).body(String::new())?;
    /// assert_eq!(request.uri(), "https://sandbox.api.video/videos");
    /// # Ok::<(), http::Error>(())
    /// ```
    pub fn api_base(&self) -> Uri {
        self.base_url.with_slash()
    }

    /// Sets the client for the token endpoint, with its timeout, headers and TLS. Default: [`TokenClient::new`].
    ///
    /// Use clones of one client for many sources, such as those of many tenants (`TokenProviders`, feature `tenants`). An
    /// option that is not valid is an error of [`TokenProviderBuilder::build`](crate::TokenProviderBuilder::build), or
    /// else of the first use.
    pub fn with_client(mut self, client: TokenClient) -> Self {
        self.client = client;
        self
    }

    /// Sets the name of the application that api.video gets (`AV-Origin-App: name:version`). Default: none.
    ///
    /// The name must be 1 to 50 characters of `A-Z a-z 0-9 - _`, and the version one to three numbers with dots between
    /// them. Otherwise it is an error of [`TokenProviderBuilder::build`](crate::TokenProviderBuilder::build), or else
    /// of the first use.
    pub fn origin_app(mut self, name: &str, version: &str) -> Self {
        let name_fits = (1..=50).contains(&name.len())
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte));
        let number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
        let version_fits = version.split('.').count() <= 3 && version.split('.').all(number);
        let value = HeaderValue::try_from(format!("{name}:{version}")).ok();
        self.origin_app = Some(value.filter(|_| name_fits && version_fits).ok_or_else(|| {
            SourceError::configuration(format!(
                "origin_app must have a name of 1 to 50 of A-Z a-z 0-9 - _ and a version x[.y[.z]], \
                 got {name:?} and {version:?}"
            ))
        }));
        self
    }

    /// Sets that every token is requested with the API key, never with a refresh token. Default: no.
    ///
    /// Use it for several processes on one key that do not share a store. Each authentication with a key ends the
    /// refresh token before it, whichever process holds that. Without this option, every process but the newest
    /// therefore finds its refresh token dead: each expiry costs a rejected refresh and an authentication, which ends
    /// the refresh token of the next process. This option avoids the rejected refresh, but sends the key once per
    /// process and expiry. A store that all share costs one refresh per expiry instead
    /// ([`TokenProviderBuilder::store`](crate::TokenProviderBuilder#method.store)).
    ///
    /// The access tokens of the other processes remain valid, unless api.video ends them, which its documents do not
    /// say. If it does, each new token costs every other process a 401 and a retry, and without a store that does not
    /// end.
    pub fn key_only(mut self) -> Self {
        self.key_only = true;
        self
    }

    /// Replaces the API key, in all clones. The next grant uses it. If the old key was rejected, the cool-down ends.
    ///
    /// The current access token remains in use until it is about to expire or the API challenges it.
    pub fn set_key(&self, api_key: impl Into<String>) {
        self.key().set(api_key.into());
    }

    fn key(&self) -> MutexGuard<'_, ApiKey> {
        self.key.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Builds a `POST` request to the API, with the headers that all requests have.
    ///
    /// # Errors
    ///
    /// [`SourceError::configuration`] if an option other than the key is not valid.
    pub(crate) fn request(&self, path: &str, body: String) -> Result<Request<String>, SourceError> {
        self.client.check()?;
        let mut request = Request::post(self.base_url.join(path, &self.client)?)
            .header(CONTENT_TYPE, "application/json")
            .header(ORIGIN_CLIENT, concat!("tower-bearer:", env!("CARGO_PKG_VERSION")));
        if let Some(app) = self.origin_app.clone().transpose()? {
            request = request.header(ORIGIN_APP, app);
        }
        request.body(body).map_err(|error| {
            SourceError::configuration("cannot build the request to api.video").with_cause(error)
        })
    }
}

impl fmt::Debug for ApiVideo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApiVideo")
            .field("origin", &self.base_url.allowed_origins())
            .field("client", &self.client)
            .finish_non_exhaustive()
    }
}

/// Returns the error for a response whose status is not a success.
///
/// A 429 of api.video may have its delay in `X-RateLimit-Retry-After`, which counts if there is no `Retry-After`.
pub(crate) fn failure(response: &TokenResponse) -> SourceError {
    // Its errors have no code: 400, 401 and 403 reject the grant.
    let error = response.failure_of(None);
    match header_seconds(response.headers(), RATE_LIMIT_RETRY_AFTER) {
        Some(delay)
            if response.status() == StatusCode::TOO_MANY_REQUESTS && error.retry_after().is_none() =>
        {
            error.with_retry_after(delay)
        }
        _ => error,
    }
}

#[cfg(all(test, feature = "default-client"))]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::source::TokenSource;

    /// The headers that name the application are not valid.
    #[test]
    fn checks_origin_app_name_and_version() {
        let named = |name: &str, version: &str| ApiVideo::new("key").origin_app(name, version).validate();
        let longest = "a".repeat(50);
        for (name, version) in [("my-app_1", "1"), ("a", "1.2"), (&longest, "1.2.3")] {
            assert!(named(name, version).is_ok(), "{name}:{version}");
        }
        let too_long = "a".repeat(51);
        for (name, version) in
            [("", "1"), (&too_long, "1"), ("a b", "1"), ("a", ""), ("a", "1.2.3.4"), ("a", "1."), ("a", "v1")]
        {
            assert!(named(name, version).is_err(), "{name}:{version}");
        }
    }

    /// A source whose options are not valid is used without `validate`, which `TokenProvider::new` does not call.
    #[tokio::test]
    async fn fetch_reports_errors_of_validate() {
        use crate::source::{RefreshReason, TokenRequest};

        let key = || ApiVideo::new("key");
        for (source, expected) in [
            (ApiVideo::new(""), "the API key must not be empty: copy it from"),
            (
                key().with_client(TokenClient::new().timeout(Duration::ZERO)),
                "timeout must be > 0 and <= 1h, got 0s",
            ),
            (key().origin_app("a", "v1"), "origin_app must have a name"),
            (key().base_url(Uri::from_static("/auth")), "base_url must have a scheme and a host"),
        ] {
            let error = source.validate().unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
            let fetched = source.fetch(&TokenRequest::new(RefreshReason::Missing)).await.unwrap_err();
            assert_eq!(fetched.to_string(), error);
        }
    }

    /// A 429 says in api.video's own header when to ask again.
    #[test]
    fn rate_limit_header_counts_for_429() {
        let delay = |status: StatusCode, headers: &[(&'static str, &str)]| {
            let builder = http::Response::builder().status(status);
            let builder =
                headers.iter().fold(builder, |builder, (name, value)| builder.header(*name, *value));
            let head = builder.body(()).unwrap().into_parts().0;
            let (url, option, requested_at) =
                (PRODUCTION.into(), "base_url".into(), std::time::Instant::now());
            let response = TokenResponse { url, option, requested_at, head, body: None, fields: None };
            failure(&response).retry_after().map(|delay| delay.as_secs())
        };
        let (limited, rate_limit) = (StatusCode::TOO_MANY_REQUESTS, (RATE_LIMIT_RETRY_AFTER, "7"));
        assert_eq!(delay(limited, &[rate_limit]), Some(7));
        assert_eq!(delay(limited, &[rate_limit, ("retry-after", "3")]), Some(3));
        assert_eq!(delay(limited, &[rate_limit, ("retry-after", "soon")]), Some(7));
        assert_eq!(delay(StatusCode::SERVICE_UNAVAILABLE, &[rate_limit]), None);
    }

    /// The `Debug` output of the source contains the API key.
    #[test]
    fn debug_shows_no_key() {
        assert!(!format!("{:?}", ApiVideo::new("canary")).contains("canary"));
    }
}
