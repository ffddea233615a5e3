//! [`TokenClient`]: one exchange with a token endpoint, for all sources.
//!
//! - `transport`: sends a request by the default client or the user's, within a deadline.
//! - `default_client`: the client that is used unless the user sets one, and `tls`: its roots and cryptography.
//! - `response`: what a response means.
//! - `verdict`: the table of what a response that is no token means, and `stated_code`: which code it states.

#[cfg(feature = "default-client")]
mod default_client;
mod response;
mod stated_code;
#[cfg(feature = "default-client")]
pub mod tls;
mod transport;
mod verdict;

use std::{ops::Bound, time::Duration};

use http::header::{ACCEPT, ACCEPT_ENCODING, CONTENT_TYPE, USER_AGENT};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, Uri};
use http_body::Body;
use tokio::time::Instant;
use tower_service::Service;

pub use self::response::TokenResponse;

pub(crate) use self::transport::Sent;
#[cfg(feature = "default-client")]
use self::{
    default_client::DefaultClient,
    tls::{Cryptography, Roots},
};
use self::{response::Fields, transport::Transport};
use super::check_duration;
use crate::debug::debug_fields;
use crate::error::{BoxError, SourceError};
use crate::origins;
use crate::origins::{AllowedOrigins, is_loopback};

/// What a URL must be at least.
const EXPECTED_URL: &str = "have a scheme and a host, such as https://api.example.com";

/// The time limit of an exchange, unless another one is set.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The headers of a request that only the exchange sets.
const RESERVED: &str =
    "accept-encoding connection content-encoding content-length content-type host te transfer-encoding";

/// An HTTP client for a token endpoint: one bounded exchange, whose failure is a [`SourceError`].
///
/// [`ApiVideo`](crate::ApiVideo) and [`OAuth2`](crate::OAuth2) use it (`with_client`), and a source of yours can. This
/// one asks an endpoint that takes a key in JSON:
///
/// ```
/// use tower_bearer::{TokenClient, source_fn};
///
/// let client = TokenClient::new();
/// let source = source_fn(move |_| {
///     let client = client.clone();
///     async move { client.post_json("https://auth.example.com/token", r#"{"key":"your-key"}"#).await?.token() }
/// });
/// ```
///
/// # What it guarantees
///
/// - One deadline for the whole exchange, from connecting to the end of the response ([`timeout`](Self::timeout)). If the
///   process was stopped when it passed, nothing is sent any more, and the response to a request that was sent is read for at
///   most another second.
/// - At most 64 KiB of a response are read.
/// - The default client follows no redirect, because it would send the credential to another URL.
/// - Plaintext `http` is only used on loopback ([`allow_plaintext`](Self::allow_plaintext)). A URL has no user name.
/// - `Accept-Encoding: identity`, `Accept: application/json` and a `User-Agent` are sent. Firewalls reject requests
///   without the last one.
/// - An error contains no byte of the exchange, and no text of the client's error, which may quote the request.
/// - [`SourceError::is_unsent`] says whether the request was certainly not sent.
///
/// # The default client
///
/// hyper-util's client over rustls, for HTTP/1.1 (feature `default-client`, on by default). Each exchange has a
/// connection of its own: nothing that became of an earlier one can make it fail, such as a connection that died without
/// notice or a runtime that has ended. TLS sessions are resumed. Clones share the TLS configuration, so use clones of one
/// client for many sources.
///
/// For a proxy, client certificates, or an endpoint that speaks HTTP/2 only, there is
/// [`with_service`](Self::with_service).
///
/// # What a response means
///
/// | response | error |
/// |---|---|
/// | 408, 425, 429, 5xx; any 4xx with `Retry-After` | [`Unavailable`](crate::SourceErrorKind::Unavailable), after that delay |
/// | 400, 401, 403, with a JSON object, a form or no body | [`Rejected`](crate::SourceErrorKind::Rejected) |
/// | 3xx, 404, 405, 410, 415 | [`Configuration`](crate::SourceErrorKind::Configuration) |
/// | anything else, such as the page of a firewall with 403 or 202 | [`InvalidResponse`](crate::SourceErrorKind::InvalidResponse), with status and content type |
/// | none | [`Unavailable`](crate::SourceErrorKind::Unavailable) |
///
/// `Debug` shows no value of a header.
#[derive(Clone, Default)]
pub struct TokenClient {
    /// The user's client; `None` for the default one.
    given: Option<Transport>,
    #[cfg(feature = "default-client")]
    default: DefaultClient,
    /// Further headers.
    headers: HeaderMap,
    /// The error for a header that is not valid.
    invalid: Option<SourceError>,
    timeout: Option<Duration>,
    allows_plaintext: bool,
}

impl TokenClient {
    /// Makes a client that sends requests by the default client.
    ///
    /// Without the feature `default-client`, each exchange is a
    /// [`Configuration`](crate::SourceErrorKind::Configuration) error.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes a client that sends requests by `service`, such as a client with a proxy or client certificates.
    ///
    /// ```
    /// use hyper_util::{client::legacy::Client, rt::TokioExecutor};
    /// use tower_bearer::TokenClient;
    ///
    /// // Your client, over TLS. Its request body is a `String`, or can be made of one (`tower::ServiceExt::map_request`).
    /// let http = Client::builder(TokioExecutor::new()).build_http::<String>();
    /// let client = TokenClient::with_service(http).header("user-agent", "your-app/1.0");
    /// ```
    ///
    /// The service must not follow redirects: reqwest does, unless its client has `redirect::Policy::none()`
    /// (`ReqwestService`). It must not retry a request that may have been sent. It must not be wrapped in the layer that gets
    /// its tokens by this client, because the refresh would wait for itself. A request counts as sent once the service is
    /// called, unless the connection was refused, or hyper-util or reqwest says that it could not be made.
    pub fn with_service<S, ResBody>(service: S) -> Self
    where
        S: Service<Request<String>, Response = Response<ResBody>, Error: Into<BoxError>, Future: Send>
            + Clone
            + Send
            + 'static,
        ResBody: Body<Data: Send, Error: Into<BoxError>> + Send + 'static,
    {
        Self { given: Some(Transport::new(service, false)), ..Self::new() }
    }

    /// Sets which root certificates the default client trusts. Default: [`Roots::WebPki`].
    ///
    /// ```no_run
    /// use tower_bearer::{TokenClient, tls::Roots};
    ///
    /// let authority = std::fs::read_to_string("/etc/ssl/certs/company.pem")?;
    /// let client = TokenClient::new().roots(Roots::Pem(authority));
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// A [`Roots::Pem`] that is not valid is an error as for [`timeout`](Self::timeout). Roots of the system that cannot be
    /// read are one of the exchange. It has no effect with [`with_service`](Self::with_service).
    #[cfg(feature = "default-client")]
    #[cfg_attr(docsrs, doc(cfg(feature = "default-client")))]
    pub fn roots(mut self, roots: Roots) -> Self {
        self.default = DefaultClient::new(roots, self.default.cryptography);
        self
    }

    /// Sets which cryptography the default client uses for TLS. Default: [`Cryptography::Ring`].
    ///
    /// It has no effect with [`with_service`](Self::with_service).
    #[cfg(feature = "default-client")]
    #[cfg_attr(docsrs, doc(cfg(feature = "default-client")))]
    pub fn cryptography(mut self, cryptography: Cryptography) -> Self {
        self.default = DefaultClient::new(self.default.roots, cryptography);
        self
    }

    /// Sets the timeout of one exchange, from connecting to the end of the response. Default: 10 s, and 20 s for an
    /// exchange that spends the refresh token of a login ([`OAuth2::login`](crate::OAuth2::login)).
    ///
    /// It must be more than zero and at most an hour. Otherwise it is an error of
    /// [`TokenProviderBuilder::build`](crate::TokenProviderBuilder::build), or else of each exchange. A refresh that
    /// ends earlier ends the exchange, except for that of a login
    /// ([`refresh_timeout`](crate::TokenProviderBuilder::refresh_timeout)). A caller may wait for as many exchanges as a
    /// refresh has attempts ([`retry`](crate::TokenProviderBuilder::retry)).
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Sets a header of each request, in place of the `User-Agent` or the `Accept` that is sent otherwise. Its value is
    /// marked sensitive.
    ///
    /// A name or a value that is not valid is an error as for [`timeout`](Self::timeout), and so is a name that belongs to the
    /// exchange: `Accept-Encoding`, `Connection`, `Content-Encoding`, `Content-Length`, `Content-Type`, `Host`, `TE` and
    /// `Transfer-Encoding`. An `Authorization` that the source sends has precedence.
    pub fn header(mut self, name: &str, value: &str) -> Self {
        let is_free = |name: &HeaderName| RESERVED.split(' ').all(|reserved| name != reserved);
        if let (Some(name), Ok(mut value)) = (name.parse().ok().filter(is_free), HeaderValue::from_str(value))
        {
            value.set_sensitive(true);
            self.headers.insert(name, value);
        } else {
            self.invalid = Some(SourceError::configuration(format!(
                "header must have a valid name, other than {RESERVED}, and a value without a line break, got the name {name:?}"
            )));
        }
        self
    }

    /// Allows plaintext `http` for any host. Default: on loopback only.
    ///
    /// Anyone on the network path can then read the credential. Meant for meshes whose sidecar does the TLS. It concerns the
    /// token endpoint only: an API with a plaintext URL must be one of the layer's
    /// [`allowed_origins`](crate::BearerAuthLayer::allowed_origins).
    pub fn allow_plaintext(mut self) -> Self {
        self.allows_plaintext = true;
        self
    }

    /// Sends `POST url` with this body in JSON (`Content-Type: application/json`), as [`send`](Self::send) does.
    ///
    /// # Errors
    ///
    /// As for [`send`](Self::send).
    ///
    /// # Cancel safety
    ///
    /// As for [`send`](Self::send).
    pub async fn post_json(&self, url: &str, body: impl Into<String>) -> Result<TokenResponse, SourceError> {
        let request = Request::post(url).header(CONTENT_TYPE, "application/json").body(body.into());
        // Without the parser's error: the URL may have a secret.
        let invalid = |_| SourceError::configuration(format!("the URL must {EXPECTED_URL}"));
        self.send(request.map_err(invalid)?).await
    }

    /// Sends a request and reads the response.
    ///
    /// # Errors
    ///
    /// - The kind [above](Self#what-a-response-means) unless the status is a success.
    /// - [`Configuration`](crate::SourceErrorKind::Configuration) if an option or the URL is not valid. The message
    ///   shows neither a query nor a user name.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the request may have been sent: what it spends may be spent.
    pub async fn send(&self, request: Request<String>) -> Result<TokenResponse, SourceError> {
        let response = self.exchange(request, "the URL", &Sent::default()).await?;
        if response.status().is_success() { Ok(response) } else { Err(response.failure()) }
    }

    /// Sends `request` to the URL that the option of this name has set. Returns a response of any status.
    ///
    /// # Cancel safety
    ///
    /// `sent` is correct even if this future is dropped.
    pub(crate) async fn exchange(
        &self,
        mut request: Request<String>,
        option: &str,
        sent: &Sent,
    ) -> Result<TokenResponse, SourceError> {
        sent.set(None);
        self.check()?;
        self.check_url(request.uri(), option)?;
        let transport = self.transport()?;
        let headers = request.headers_mut();
        for (name, value) in &self.headers {
            headers.entry(name).or_insert_with(|| value.clone());
        }
        let agent = concat!("tower-bearer/", env!("CARGO_PKG_VERSION"));
        for (name, value) in [(ACCEPT, "application/json"), (USER_AGENT, agent)] {
            headers.entry(name).or_insert(HeaderValue::from_static(value));
        }
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        let url = origins::shown_with_path(request.uri());
        let requested_at = Instant::now().into_std();
        let answer = transport.send(request, self.limit(), sent).await;
        let (head, body) = answer.map_err(|error| error.within(&format!("no response from {url}")))?;
        let fields = body.as_ref().and_then(|body| Fields::of(body));
        Ok(TokenResponse { url, option: option.to_owned(), requested_at, head, body, fields })
    }

    fn transport(&self) -> Result<Transport, SourceError> {
        if let Some(given) = &self.given {
            return Ok(given.clone());
        }
        #[cfg(feature = "default-client")]
        return self.default.transport();
        #[cfg(not(feature = "default-client"))]
        Err(SourceError::configuration(
            "the source must have an HTTP client: give it one, or enable the feature default-client",
        ))
    }

    /// Checks all options.
    pub(crate) fn check(&self) -> Result<(), SourceError> {
        let range = (Bound::Excluded(Duration::ZERO), Bound::Included(Duration::from_secs(60 * 60)));
        check_duration("timeout", self.limit(), range, "> 0 and <= 1h")?;
        self.invalid.clone().map_or(Ok(()), Err)?;
        // Other roots take time to load.
        #[cfg(feature = "default-client")]
        if self.given.is_none() && !matches!(self.default.roots, Roots::Pem(_)) {
            return Ok(());
        }
        self.transport().map(drop)
    }

    /// Checks that a credential may be sent to `url`, which the option of this name has set.
    ///
    /// # Errors
    ///
    /// [`SourceError::configuration`] if the URL cannot be used. The message shows at most the origin, because a user name or
    /// a query may be a secret.
    pub(crate) fn check_url(&self, url: &Uri, option: &str) -> Result<(), SourceError> {
        let what = match (url.scheme_str(), url.authority()) {
            (None, _) | (_, None) => EXPECTED_URL.to_owned(),
            (_, Some(authority)) if authority.as_str().contains('@') => {
                "not have a user name or password".to_owned()
            }
            (_, Some(authority)) if authority.host().is_empty() => "have a host".to_owned(),
            (Some("http"), Some(authority)) if !self.allows_plaintext && !is_loopback(authority.host()) => {
                format!(
                    "not be plaintext http except on loopback, got {}: use https, or allow plaintext",
                    origins::shown(url)
                )
            }
            (Some("http" | "https"), _) if AllowedOrigins::origin_of(url).covers(url) => return Ok(()),
            (Some("http" | "https"), _) => "have a port of at most 65535".to_owned(),
            _ => format!("be https or http, got {}", origins::shown(url)),
        };
        Err(SourceError::configuration(format!("{option} must {what}")))
    }

    /// The time limit of one exchange.
    pub(crate) fn limit(&self) -> Duration {
        self.timeout.unwrap_or(TIMEOUT)
    }

    /// Returns the client with this timeout unless the user has set one, and at most with the other one.
    pub(crate) fn bounded(&self, default: Duration, most: Duration) -> Self {
        self.clone().timeout(self.timeout.unwrap_or(default).min(most))
    }
}

debug_fields!(TokenClient |it| { is_default: it.given.is_none(), timeout: it.timeout });
