//! [`ApiVideo`]: the source for api.video's disposable bearer tokens.
//!
//! This file has the options and the request that all endpoints share. `base_url` has the URL of the endpoints, `grants`
//! decides which grant is used, `credential` counts how often a refresh token was presented, and `upload_token` requests
//! tokens for delegated uploads.

mod base_url;
mod credential;
mod grants;
mod upload_token;

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri,
    header::{ACCEPT, CONTENT_TYPE},
};
use http_body::Body;
use tower_service::Service;

pub use self::upload_token::UploadToken;

use self::{base_url::BaseUrl, credential::Credential};
use super::http::{
    BoundedResponse, Client, Endpoint, Sent, check_timeout,
    tls::{Cryptography, Roots},
};
use crate::{
    error::{BoxError, SourceError},
    retry_after::header_seconds,
};

const PRODUCTION: &str = "https://ws.api.video";
const SANDBOX: &str = "https://sandbox.api.video";

const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(10);

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
/// 1. `POST /auth/refresh` with the refresh token, if there is one that is not known to be spent.
/// 2. If that is rejected, `POST /auth/api-key` with the API key.
/// 3. If that is rejected too (400, 401, 403), a permanent error.
///
/// The key is thus sent as rarely as api.video's documents ask.
///
/// Its use spends a refresh token, so it is presented at most twice:
///
/// | response to the refresh token | what follows |
/// |---|---|
/// | 4xx except 408 and 429, or a redirect | it is rejected: the API key is used |
/// | 5xx, or a response that is lost, late or unusable | it may be spent: it is presented once more after the backoff, then the API key is used |
/// | 408, 429, or the request was not sent | it is not spent: it is presented again after the backoff |
///
/// A refresh endpoint that always fails thus costs at most one authentication per token. With the default client, it is
/// known exactly whether a request was sent. With [another client](Self::with_client), a request counts as sent once
/// the client is called, unless its error is a failure to connect.
///
/// Every authentication with the key ends the refresh token before it, whichever process holds that. Two processes on
/// one key therefore cost each other a rejected refresh and an authentication per renewal. Let several processes share
/// a store ([`TokenProviderBuilder::store`](crate::TokenProviderBuilder#method.store), feature `store`), or use the key
/// only ([`key_only`](Self::key_only)).
///
/// # Limits
///
/// - An exchange reads at most 64 KiB of a response, within one deadline ([`timeout`](Self::timeout)).
/// - Redirects are not followed, because a redirect would send the key to another URL.
/// - Plaintext `http` is rejected for each host but loopback ([`insecure_base_url`](Self::insecure_base_url)).
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
    credential: Arc<Mutex<Credential>>,
    base_url: BaseUrl,
    client: Client,
    timeout: Duration,
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
            credential: Arc::new(Mutex::new(Credential::new(key))),
            base_url: BaseUrl::new(base_url),
            client: Client::default(),
            timeout: EXCHANGE_TIMEOUT,
            origin_app: None,
            key_only: false,
        }
    }

    /// Sets the base URL of the auth endpoints, such as a proxy's or a test server's. Default: the environment's.
    ///
    /// The URL is `https`, or `http` on loopback. It may have a path, which is a prefix of the endpoints' paths, but
    /// neither a query nor a user name. A URL that is not valid is an error of
    /// [`TokenProviderBuilder::build`](crate::TokenProviderBuilder::build), or else of the first use.
    pub fn base_url(mut self, base_url: Uri) -> Self {
        self.base_url = BaseUrl::new(base_url);
        self
    }

    /// Sets the base URL like [`base_url`](Self::base_url), and allows plaintext `http` for any host.
    ///
    /// Anyone on the network path can then read the API key. Meant for meshes whose sidecar does the TLS.
    pub fn insecure_base_url(mut self, base_url: Uri) -> Self {
        self.base_url = BaseUrl::insecure(base_url);
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

    /// Sets the HTTP client, such as one with a proxy or client certificates. Default: hyper-util's over rustls, with a
    /// connect timeout of 5 s and an idle timeout of 15 s.
    ///
    /// The client must neither retry a request that may have been sent nor follow redirects. It must not be wrapped in
    /// the layer that gets its tokens from this source, because the refresh would wait for itself.
    pub fn with_client<C, ResBody>(mut self, client: C) -> Self
    where
        C: Service<Request<String>, Response = Response<ResBody>> + Clone + Send + 'static,
        C::Error: Into<BoxError>,
        C::Future: Send,
        ResBody: Body + Send + 'static,
        ResBody::Data: Send,
        ResBody::Error: Into<BoxError>,
    {
        self.client = Client::Given(Endpoint::new(client));
        self
    }

    /// Uses the HTTP client of `other`, whose connections and TLS configuration the two sources then share.
    ///
    /// By default, each source makes its own client, which its clones share. Use one source as the template for many
    /// with other credentials, such as those of many tenants (`TokenProviders`, feature `tenants`).
    ///
    /// This source takes the [`roots`](Self::roots) and the [`cryptography`](Self::cryptography) of `other`, too. If
    /// one of them is set on this source afterwards, it makes its own client again. They have no effect on a client
    /// that was set ([`with_client`](Self::with_client)).
    pub fn with_client_of(mut self, other: &Self) -> Self {
        self.client = other.client.clone();
        self
    }

    /// Sets which root certificates the default client trusts. Default: [`Roots::WebPki`].
    ///
    /// It has no effect with [`with_client`](Self::with_client).
    pub fn roots(mut self, roots: Roots) -> Self {
        self.client.set_roots(roots);
        self
    }

    /// Sets which cryptography the default client uses for TLS. Default: [`Cryptography::Ring`].
    ///
    /// It has no effect with [`with_client`](Self::with_client).
    pub fn cryptography(mut self, cryptography: Cryptography) -> Self {
        self.client.set_cryptography(cryptography);
        self
    }

    /// Sets the timeout of one exchange with an auth endpoint, from connecting to the end of the response. Default:
    /// 10 s.
    ///
    /// It must be more than zero and at most an hour. Otherwise it is an error of
    /// [`TokenProviderBuilder::build`](crate::TokenProviderBuilder::build), or else of the first use.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
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
    /// therefore finds its refresh token dead: each renewal costs a rejected refresh and an authentication, which ends
    /// the refresh token of the next process. This option avoids the rejected refresh, but sends the key once per
    /// process and expiry. A store that all share costs one refresh per expiry instead
    /// ([`TokenProviderBuilder::store`](crate::TokenProviderBuilder#method.store), feature `store`).
    ///
    /// The access tokens of the other processes remain valid, unless api.video ends them, which its documents do not
    /// say. If it does, each renewal costs every other process a 401 and a retry, and without a store that does not
    /// end.
    pub fn key_only(mut self) -> Self {
        self.key_only = true;
        self
    }

    /// Replaces the API key, in all clones. The next grant uses it. If the old key was rejected, the cool-down ends.
    ///
    /// The current access token remains in use until it is about to expire or the API challenges it.
    pub fn set_key(&self, api_key: impl Into<String>) {
        self.credential().set_key(api_key.into());
    }

    fn credential(&self) -> MutexGuard<'_, Credential> {
        credential::lock(&self.credential)
    }

    /// Builds a `POST` request to the API, with the headers that all requests have.
    ///
    /// # Errors
    ///
    /// [`SourceError::configuration`] if an option other than the key is not valid.
    fn request(&self, path: &str, body: String) -> Result<Request<String>, SourceError> {
        check_timeout(self.timeout)?;
        let mut request = Request::builder()
            .method(Method::POST)
            .uri(self.base_url.join(path)?)
            .header(ACCEPT, "application/json")
            .header(CONTENT_TYPE, "application/json")
            .header(ORIGIN_CLIENT, concat!("tower-bearer:", env!("CARGO_PKG_VERSION")));
        if let Some(app) = self.origin_app.clone().transpose()? {
            request = request.header(ORIGIN_APP, app);
        }
        request.body(body).map_err(|error| {
            SourceError::configuration("cannot build the request to api.video").with_cause(error)
        })
    }

    /// Sends `request` with the source's client and reads the response. The body is empty unless the status is a
    /// success.
    async fn exchange(&self, request: Request<String>) -> Result<Response<String>, SourceError> {
        let url = request.uri().clone();
        let response = self.client.endpoint()?.send(request, self.timeout, &Sent::default()).await;
        let BoundedResponse { status, headers, mut body, .. } =
            response.map_err(|error| error.into_source_error(&format!("no response from {url}")))?;
        let text = String::from_utf8(std::mem::take(&mut *body))
            .map_err(|_| SourceError::invalid_response(format!("the response of {url} is not UTF-8")))?;
        let mut response = Response::new(text);
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        Ok(response)
    }
}

impl fmt::Debug for ApiVideo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApiVideo")
            .field("host", &self.base_url.host())
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

/// Returns the error for a response whose status is not a success.
///
/// A 429 of api.video may have its delay in `X-RateLimit-Retry-After`, which counts if there is no `Retry-After`.
fn failure(status: StatusCode, headers: &HeaderMap, url: &Uri) -> SourceError {
    let error = SourceError::of_response(status, headers, url, "base_url");
    match header_seconds(headers, RATE_LIMIT_RETRY_AFTER) {
        Some(delay) if status == StatusCode::TOO_MANY_REQUESTS && error.retry_after().is_none() => {
            error.with_retry_after(delay)
        }
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::TokenSource;

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

    #[test]
    fn timeout_is_above_zero_and_bounded() {
        let second = Duration::from_secs(1);
        for (timeout, fits) in
            [(Duration::ZERO, false), (second, true), (second * 3600, true), (second * 3601, false)]
        {
            assert_eq!(ApiVideo::new("key").timeout(timeout).validate().is_ok(), fits, "{timeout:?}");
        }
    }

    /// `TokenProvider::new` does not call `validate`.
    #[tokio::test]
    async fn fetch_reports_errors_of_validate() {
        use crate::source::{RefreshReason, TokenRequest};

        let key = || ApiVideo::new("key");
        for (source, expected) in [
            (ApiVideo::new(""), "the API key must not be empty: copy it from"),
            (key().timeout(Duration::ZERO), "timeout must be > 0 and <= 1h, got 0s"),
            (key().origin_app("a", "v1"), "origin_app must have a name"),
            (key().base_url(Uri::from_static("/auth")), "base_url must have a scheme and a host"),
        ] {
            let error = source.validate().unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
            let fetched = source.fetch(&TokenRequest::new(RefreshReason::Missing)).await.unwrap_err();
            assert_eq!(fetched.to_string(), error);
        }
    }

    #[test]
    fn rate_limit_header_counts_for_429() {
        let delay = |status: StatusCode, headers: &[(&'static str, &str)]| {
            let headers =
                headers.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect();
            let url = Uri::from_static(PRODUCTION);
            failure(status, &headers, &url).retry_after().map(|delay| delay.as_secs())
        };
        let (limited, rate_limit) = (StatusCode::TOO_MANY_REQUESTS, (RATE_LIMIT_RETRY_AFTER, "7"));
        assert_eq!(delay(limited, &[rate_limit]), Some(7));
        assert_eq!(delay(limited, &[rate_limit, ("retry-after", "3")]), Some(3));
        assert_eq!(delay(limited, &[rate_limit, ("retry-after", "soon")]), Some(7));
        assert_eq!(delay(StatusCode::SERVICE_UNAVAILABLE, &[rate_limit]), None);
    }

    #[test]
    fn debug_shows_no_key() {
        assert!(!format!("{:?}", ApiVideo::new("canary")).contains("canary"));
    }
}
