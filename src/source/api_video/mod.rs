//! [`ApiVideo`]: the source for api.video's disposable bearer tokens.
//!
//! This file has the options, `request` what is sent to the endpoints, and `key` the API key.

mod key;
mod request;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use http::{HeaderValue, Uri};

use self::key::ApiKey;
pub(crate) use self::request::{OPTION, failure};
use super::{TokenSource, client::TokenClient};
use crate::{debug::debug_fields, error::SourceError};

const PRODUCTION: &str = "https://ws.api.video";
const SANDBOX: &str = "https://sandbox.api.video";

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
/// | any other 4xx with JSON; 404, 405, 410, 415; an empty 400, 401 or 403; a redirect | it is rejected: the API key is used |
/// | everything else, such as a 5xx, a page, or a response that is lost or late | it may be spent: it is presented once more after the backoff, then the API key is used |
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
    base_url: Uri,
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
            key: Arc::new(Mutex::new(ApiKey { key: key.into(), revision: 0 })),
            base_url,
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
        self.base_url = base_url;
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
        let path = self.base_url.path().trim_end_matches('/');
        let mut parts = self.base_url.clone().into_parts();
        parts.path_and_query = format!("{path}/").parse().ok();
        // A URL without an origin is returned as it was set.
        Uri::from_parts(parts).unwrap_or_else(|_| self.base_url.clone())
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
    /// Use it for several processes on one key that do not share a store. Each of them ends the refresh tokens of the others
    /// ([above](Self#order-of-grants)), so that every expiry costs a rejected refresh and an authentication. This option
    /// avoids the rejected refresh, but sends the key once per process and expiry. A store that all share costs one refresh
    /// per expiry instead ([`TokenProviderBuilder::store`](crate::TokenProviderBuilder#method.store)).
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
        let mut key = self.key();
        *key = ApiKey { key: api_key.into().into(), revision: key.revision + 1 };
    }

    fn key(&self) -> MutexGuard<'_, ApiKey> {
        self.key.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

debug_fields!(ApiVideo |it| { origin: it.allowed_origins(), client: it.client });

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

    /// The `Debug` output of the source contains the API key.
    #[test]
    fn debug_shows_no_key() {
        assert!(!format!("{:?}", ApiVideo::new("canary")).contains("canary"));
    }
}
