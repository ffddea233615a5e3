//! [`AuthServer`]: an api.video-compatible server on loopback, for the tests of your own stack (feature `test-util`).
//!
//! It is a real hyper server on a real socket, with HTTP/1.1, HTTP/2 and optionally TLS. It follows api.video's
//! contract: both grants, refresh tokens that are spent by their use and by an authentication with the key, tokens that
//! expire, problem documents, and rate-limit headers. In addition, tests can inject faults, revoke tokens, and count
//! every kind of call.
//!
//! ```
//! # #[cfg(feature = "api-video")]
//! # async fn run() -> Result<(), Box<dyn std::error::Error>> {
//! use tower_bearer::{ApiVideo, TokenProvider, testing::{AuthServer, Fault, Route}};
//!
//! let server = AuthServer::start().await?;
//! let provider = TokenProvider::new(ApiVideo::new(server.api_key()).base_url(server.uri()));
//! let first = provider.token().await?;
//!
//! // The response to the refresh is lost, and with it the refresh token. The API key is used for the next token.
//! server.inject(Route::RefreshGrant, Fault::LoseAnswer);
//! let second = provider.refresh(&first).await?;
//! assert_eq!(second.generation(), 2);
//! assert_eq!(server.counters().api_key_grants, 2);
//! # Ok(())
//! # }
//! # #[cfg(feature = "api-video")]
//! # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(run()).unwrap();
//! ```
//!
//! # Recognizable secrets
//!
//! A test can search the output of a program for the server's secrets. The API key starts with `test-key-` (unless it
//! is set), an access token with `eyJ0eXAiOiJKV1QifQ.`, and a refresh token with `def50200`. An upload token is `to`
//! and 32 hexadecimal digits.
//!
//! # Routes
//!
//! | route | what it does |
//! |---|---|
//! | `POST /auth/api-key` `{"apiKey"}` | returns a token; ends the refresh token before it |
//! | `POST /auth/refresh` `{"refreshToken"}` | returns a token; spends the refresh token |
//! | `GET /videos` | lists the videos |
//! | `POST /videos` `{"title"}` | creates a video |
//! | `POST /videos/{id}/source` | receives its bytes, raw or as the `file` of a multipart form, whole or in chunks (`Content-Range`); checks `Content-Digest: sha-256` (RFC 9530) in the headers or trailers, if there is one |
//! | `POST /upload-tokens` `{"ttl"}` | creates an upload token with a lifetime of `ttl` seconds |
//! | `POST /upload?token=…` | creates a video from its bytes, raw or as a form, whole; needs no bearer token |

mod authority;
mod connection;
mod faults;
mod routes;
mod uploads;

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use http::Uri;
use tokio::{net::TcpListener, task::JoinHandle};

pub use self::{
    authority::Counters,
    faults::{Fault, Route},
    uploads::Upload,
};

use self::{
    authority::{Authority, RateLimit, random},
    routes::Server,
};

/// A running server. Its drop ends it and all its connections. See the [module](self).
#[derive(Debug)]
pub struct AuthServer {
    server: Server,
    address: SocketAddr,
    certificate: Option<Vec<u8>>,
    accepting: JoinHandle<std::convert::Infallible>,
}

impl AuthServer {
    /// Starts a server with the default options, on a free port.
    ///
    /// # Errors
    ///
    /// An I/O error if the server cannot listen on a port.
    ///
    /// # Panics
    ///
    /// Panics outside of a tokio runtime with I/O and time enabled.
    pub async fn start() -> io::Result<Self> {
        Self::builder().start().await
    }

    /// Returns a builder for a server with other options.
    pub fn builder() -> AuthServerBuilder {
        AuthServerBuilder {
            authority: Authority::new(format!("test-key-{}", random(20))),
            port: 0,
            tls: false,
            challenge_late: false,
        }
    }

    /// Returns the URL of the server: a base URL for [`ApiVideo`](crate::ApiVideo) and for requests.
    pub fn uri(&self) -> Uri {
        let scheme = if self.certificate.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address).parse().expect("an address is an authority")
    }

    /// Returns the API key that the server accepts.
    pub fn api_key(&self) -> String {
        self.server.authority().api_key.clone()
    }

    /// Returns the certificate that clients have to trust, in DER. `None` without TLS.
    pub fn certificate(&self) -> Option<&[u8]> {
        self.certificate.as_deref()
    }

    /// Revokes every access token. A request with one gets a 401. Refresh tokens remain valid.
    pub fn revoke_access_tokens(&self) {
        self.server.authority().revoke_access_tokens();
    }

    /// Revokes the refresh token. Only the API key then gives another token.
    pub fn revoke_refresh_token(&self) {
        self.server.authority().revoke_refresh_token();
    }

    /// Replaces the API key that the server accepts.
    pub fn set_api_key(&self, api_key: impl Into<String>) {
        self.server.authority().api_key = api_key.into();
    }

    /// Sets the lifetime of tokens that are granted from now on.
    pub fn set_token_lifetime(&self, lifetime: Duration) {
        self.server.authority().token_lifetime = lifetime;
    }

    /// Queues `fault` for one request to `route`, after the faults that are queued already.
    pub fn inject(&self, route: Route, fault: Fault) {
        self.server.authority().faults.push(route, fault);
    }

    /// Injects `fault` into every request to `route` for which none is queued, until
    /// [`clear_faults`](Self::clear_faults).
    pub fn inject_always(&self, route: Route, fault: Fault) {
        self.server.authority().faults.set(route, fault);
    }

    /// Removes all faults, queued and permanent.
    pub fn clear_faults(&self) {
        self.server.authority().faults.clear();
    }

    /// Returns the number of calls of each kind.
    pub fn counters(&self) -> Counters {
        self.server.authority().counters
    }

    /// Returns the complete uploads, in order.
    pub fn uploads(&self) -> Vec<Upload> {
        self.server.authority().uploads.whole.clone()
    }
}

impl Drop for AuthServer {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// A builder for an [`AuthServer`], made by [`AuthServer::builder`].
#[derive(Debug)]
#[must_use = "a builder does nothing until `start` is called"]
pub struct AuthServerBuilder {
    authority: Authority,
    port: u16,
    tls: bool,
    challenge_late: bool,
}

impl AuthServerBuilder {
    /// Sets the port. Default: 0, which is any free port.
    pub fn port(mut self, port: u16) -> Self {
        self.port = port;
        self
    }

    /// Sets the API key. Default: a random one.
    pub fn api_key(mut self, api_key: impl Into<String>) -> Self {
        self.authority.api_key = api_key.into();
        self
    }

    /// Sets the lifetime of a token. Default: 1 h, like api.video.
    pub fn token_lifetime(mut self, lifetime: Duration) -> Self {
        self.authority.token_lifetime = lifetime;
        self
    }

    /// Sets whether a grant revokes earlier access tokens. Default: no. api.video's documents do not say which it does.
    pub fn revoke_previous(mut self, revoke: bool) -> Self {
        self.authority.revoke_previous = revoke;
        self
    }

    /// Sets the number of requests per minute. Further ones get a 429. Default: a million.
    pub fn rate_limit(mut self, per_minute: u32) -> Self {
        self.authority.rate_limit = RateLimit::new(per_minute);
        self
    }

    /// Sets whether a 401 is sent after the request's whole body, instead of after its headers. Default: no.
    pub fn challenge_late(mut self, late: bool) -> Self {
        self.challenge_late = late;
        self
    }

    /// Sets whether an upload with an upload token is rejected (400) if it has an `Authorization` header. Default: no.
    pub fn reject_bearer_at_upload(mut self, reject: bool) -> Self {
        self.authority.reject_bearer_at_upload = reject;
        self
    }

    /// Sets whether the server uses TLS, with a new [certificate](AuthServer::certificate). Default: no.
    pub fn tls(mut self, tls: bool) -> Self {
        self.tls = tls;
        self
    }

    /// Starts the server, on `127.0.0.1`.
    ///
    /// # Errors
    ///
    /// An I/O error if the server cannot listen on the port, or cannot create a certificate.
    ///
    /// # Panics
    ///
    /// Panics outside of a tokio runtime with I/O and time enabled.
    pub async fn start(self) -> io::Result<AuthServer> {
        let (certificate, acceptor) = if self.tls { Some(connection::tls()?) } else { None }.unzip();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, self.port)).await?;
        let address = listener.local_addr()?;
        let server = Server::new(self.authority, self.challenge_late);
        let accepting = tokio::spawn(connection::serve(listener, acceptor, server.clone()));
        Ok(AuthServer { server, address, certificate: certificate.map(|der| der.to_vec()), accepting })
    }
}
