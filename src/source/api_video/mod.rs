//! [`ApiVideo`]: api.video's disposable bearer token: the source, its options, and how it talks to the API.

mod credential;
mod grants;

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, OnceLock},
    time::Duration,
};

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri,
    header::{ACCEPT, CONTENT_TYPE},
};
use http_body::Body;
use tower_service::Service;

use self::credential::Credential;
use super::{
    base_url::BaseUrl,
    client::default_client,
    endpoint::{Answer, Endpoint, Sent},
    retry_after::retry_after,
};
use crate::{
    error::{BoxError, Error, SourceError},
    origins::AllowedOrigins,
};

const PRODUCTION: &str = "https://ws.api.video";
const SANDBOX: &str = "https://sandbox.api.video";

const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(10);

/// How the client names itself, as api.video's own clients do.
const ORIGIN_CLIENT: HeaderName = HeaderName::from_static("av-origin-client");
const ORIGIN_APP: HeaderName = HeaderName::from_static("av-origin-app");

/// api.video's disposable bearer token ("Bearer Token Authentication" in its documents).
///
/// ```
/// use tower_bearer::{ApiVideo, TokenProvider};
///
/// let provider = TokenProvider::new(ApiVideo::sandbox("your API key"));
/// ```
///
/// # Order of grants
///
/// `POST /auth/refresh` with the refresh token, if there is one that is not known to be spent; if that is rejected,
/// `POST /auth/api-key` with the API key; if that is rejected (400, 401, 403), a permanent error. So the key travels as
/// seldom as the documents ask.
///
/// A refresh token is spent by its use, so it is presented at most twice:
///
/// | answer to the refresh token | what follows |
/// |---|---|
/// | 4xx except 408 and 429, or a redirect | it is rejected: the API key |
/// | 5xx, an answer that is lost, late or unusable | it may be spent: presented once more after the backoff, then the API key |
/// | 408, 429, or the request was not sent | it is not spent: presented again after the backoff |
///
/// So a refresh endpoint that is broken for good costs a token no more than one authentication. Whether a request was sent
/// is known exactly of the default client; with [another](Self::with_client), from the call on it may have been sent, unless
/// its error says that no connection was made.
///
/// A refresh token is also spent whenever anybody authenticates with the same key: a second process on one key costs both of them a
/// refused refresh, and so an authentication by key, each time the other renews its token. Where there are several, let
/// them share a store ([`TokenProviderBuilder::store`](crate::TokenProviderBuilder#method.store), feature `store`), or have
/// each use the [key alone](Self::key_only).
///
/// # What is not trusted
///
/// At most 64 KiB of an answer are read, within one deadline ([`timeout`](Self::timeout)). A redirect is not followed: it
/// would carry the key elsewhere. Plaintext `http` is refused for any host but loopback
/// ([`insecure_base_url`](Self::insecure_base_url)).
///
/// # Which origins see the token
///
/// That of the base URL, which is the API's as well, unless the layer is told otherwise
/// ([`BearerAuthLayer::scope`](crate::BearerAuthLayer::allowed_origins)).
///
/// # Clones
///
/// A clone shares the key: keep one to replace it later ([`set_key`](Self::set_key)).
#[derive(Clone)]
pub struct ApiVideo {
    credential: Arc<Mutex<Credential>>,
    base_url: BaseUrl,
    client: Client,
    timeout: Duration,
    origin_app: Option<HeaderValue>,
    key_only: bool,
}

#[derive(Clone)]
enum Client {
    /// Made when it is first needed: loading root certificates takes a while.
    Default(Arc<OnceLock<Result<Endpoint, SourceError>>>),
    Given(Endpoint),
}

impl ApiVideo {
    /// api.video's production environment.
    ///
    /// An empty or ill-formed key is an error when it is first used.
    pub fn new(api_key: impl Into<String>) -> Self {
        Self::at(api_key.into(), Uri::from_static(PRODUCTION))
    }

    /// api.video's sandbox environment; its API key is another than production's.
    pub fn sandbox(api_key: impl Into<String>) -> Self {
        Self::at(api_key.into(), Uri::from_static(SANDBOX))
    }

    fn at(key: String, base_url: Uri) -> Self {
        Self {
            credential: Arc::new(Mutex::new(Credential::new(key))),
            base_url: BaseUrl::new(base_url),
            client: Client::Default(Arc::default()),
            timeout: EXCHANGE_TIMEOUT,
            origin_app: None,
            key_only: false,
        }
    }

    /// Sets where the auth endpoints are, such as a proxy or a test server: `https`, or `http` on loopback.
    ///
    /// A path is kept as a prefix. A URL that cannot serve is an error when it is first used.
    pub fn base_url(mut self, base_url: Uri) -> Self {
        self.base_url = BaseUrl::new(base_url);
        self
    }

    /// As [`base_url`](Self::base_url), but plaintext `http` may go to any host: whoever listens has the API key.
    ///
    /// For meshes whose sidecar does the TLS.
    pub fn insecure_base_url(mut self, base_url: Uri) -> Self {
        self.base_url = BaseUrl::insecure(base_url);
        self
    }

    /// Sets the HTTP client, such as one with a proxy or client certificates. Default: hyper-util's over rustls, with a
    /// connect timeout of 5 s and idle connections kept for 15 s.
    ///
    /// The client must not retry a request that may have been sent, nor follow redirects. It must not be wrapped in the
    /// layer that it serves: the refresh would wait for itself.
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

    /// Sets how long one exchange with an auth endpoint may take, from connecting to the end of its answer. Default:
    /// 10 s.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if it is zero or more than an hour.
    pub fn timeout(mut self, timeout: Duration) -> Result<Self, Error> {
        if timeout.is_zero() || timeout > Duration::from_secs(60 * 60) {
            return Err(Error::InvalidOption(
                "an exchange's timeout is more than zero, and at most an hour".into(),
            ));
        }
        self.timeout = timeout;
        Ok(self)
    }

    /// Names the application to api.video (`AV-Origin-App: name:version`). Default: not named.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] unless the name is 1 to 50 characters of `A-Z a-z 0-9 - _`, and the version is one to
    /// three numbers with dots between them.
    pub fn origin_app(mut self, name: &str, version: &str) -> Result<Self, Error> {
        let name_fits = (1..=50).contains(&name.len())
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte));
        let number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
        let version_fits = version.split('.').count() <= 3 && version.split('.').all(number);
        let value = HeaderValue::try_from(format!("{name}:{version}")).ok();
        match value.filter(|_| name_fits && version_fits) {
            Some(value) => self.origin_app = Some(value),
            None => {
                return Err(Error::InvalidOption(
                    "origin_app takes a name of 1 to 50 of A-Z a-z 0-9 - _, and a version x[.y[.z]]".into(),
                ));
            }
        }
        Ok(self)
    }

    /// Has each token obtained with the API key, never with a refresh token: for several processes on one key that share no
    /// store. Default: no.
    ///
    /// Each authentication with a key is the end of the refresh token before it, whoever has it. So of several processes
    /// that each keep a refresh token, all but the newest find theirs dead when they come to spend it: each renewal costs
    /// a refused refresh and an authentication, which kills the next one's. This spares them the refused refresh, at the
    /// price that the key travels once per process and expiry. A store shared by all costs one refresh per expiry instead
    /// ([`TokenProviderBuilder::store`](crate::TokenProviderBuilder#method.store), feature `store`).
    ///
    /// The access tokens of the other processes stay good, unless api.video ends them; its documents do not say. If it does,
    /// each renewal costs every other process a 401, which is healed, and without a store there is no end to that.
    pub fn key_only(mut self) -> Self {
        self.key_only = true;
        self
    }

    /// Replaces the API key, in all clones. The next grant uses it; a cool-down after the old key's refusal is over.
    ///
    /// The current access token stays in use until it ages or is refused.
    pub fn set_key(&self, api_key: impl Into<String>) {
        self.credential().set_key(api_key.into());
    }

    fn credential(&self) -> MutexGuard<'_, Credential> {
        credential::lock(&self.credential)
    }

    fn endpoint(&self) -> Result<Endpoint, SourceError> {
        match &self.client {
            Client::Given(endpoint) => Ok(endpoint.clone()),
            Client::Default(made) => made.get_or_init(|| default_client().map(Endpoint::reporting)).clone(),
        }
    }

    /// A `POST` to the API, with the headers that all of them have.
    pub(crate) fn request(&self, path: &str, body: String) -> Result<Request<String>, SourceError> {
        let mut request = Request::builder()
            .method(Method::POST)
            .uri(self.base_url.join(path)?)
            .header(ACCEPT, "application/json")
            .header(CONTENT_TYPE, "application/json")
            .header(ORIGIN_CLIENT, concat!("tower-bearer:", env!("CARGO_PKG_VERSION")));
        if let Some(app) = &self.origin_app {
            request = request.header(ORIGIN_APP, app);
        }
        request.body(body).map_err(|error| {
            SourceError::configuration("the request to api.video cannot be built").with_cause(error)
        })
    }

    /// Sends `request` by the source's own client, and reads the answer, within bounds; of a refusal, the head alone.
    pub(crate) async fn exchange(&self, request: Request<String>) -> Result<Response<String>, SourceError> {
        let url = request.uri().clone();
        let answer = self.endpoint()?.send(request, self.timeout, &Sent::default()).await;
        let Answer { status, headers, mut body } = answer
            .map_err(|error| SourceError::unavailable(format!("no answer from {url}")).with_cause(error))?;
        let text = String::from_utf8(std::mem::take(&mut *body))
            .map_err(|_| SourceError::invalid_response(format!("the answer of {url} is no text")))?;
        let mut response = Response::new(text);
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        Ok(response)
    }

    /// Its own origin.
    pub(crate) fn own_origin(&self) -> AllowedOrigins {
        self.base_url.allowed_origins()
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

/// What an answer means that is neither a success nor the refusal of a credential.
pub(crate) fn failure(status: StatusCode, headers: &HeaderMap, url: &Uri) -> SourceError {
    let code = status.as_u16();
    match code {
        408 | 429 | 500..=599 => {
            let error = SourceError::unavailable(format!("{url} answered HTTP {code}"));
            match retry_after(status, headers) {
                Some(delay) => error.with_retry_after(delay),
                None => error,
            }
        }
        300..=399 => SourceError::configuration(format!(
            "{url} answered with a redirect (HTTP {code}), which is not followed: set the final base URL"
        )),
        404 | 405 | 410 | 415 => SourceError::configuration(format!(
            "{url} is no endpoint of api.video's (HTTP {code}): check the base URL"
        )),
        _ => SourceError::invalid_response(format!("{url} answered HTTP {code}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checks_origin_app_name_and_version() {
        let named = |name: &str, version: &str| ApiVideo::new("key").origin_app(name, version).is_ok();
        let longest = "a".repeat(50);
        for (name, version) in [("my-app_1", "1"), ("a", "1.2"), (&longest, "1.2.3")] {
            assert!(named(name, version), "{name}:{version}");
        }
        let too_long = "a".repeat(51);
        for (name, version) in
            [("", "1"), (&too_long, "1"), ("a b", "1"), ("a", ""), ("a", "1.2.3.4"), ("a", "1."), ("a", "v1")]
        {
            assert!(!named(name, version), "{name}:{version}");
        }
    }

    #[test]
    fn timeout_is_above_zero_and_bounded() {
        let second = Duration::from_secs(1);
        for (timeout, fits) in
            [(Duration::ZERO, false), (second, true), (second * 3600, true), (second * 3601, false)]
        {
            assert_eq!(ApiVideo::new("key").timeout(timeout).is_ok(), fits, "{timeout:?}");
        }
    }

    #[test]
    fn a_key_is_shown_nowhere() {
        assert!(!format!("{:?}", ApiVideo::new("canary")).contains("canary"));
    }
}
