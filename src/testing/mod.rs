//! [`AuthServer`]: an api.video-compatible server on loopback, for the tests of your own stack (feature `test-util`).
//!
//! It is a real hyper server on a real socket, over HTTP/1.1, HTTP/2 and, if asked for, TLS. It keeps api.video's
//! contract: both grants, refresh tokens that are spent by their use and by an authentication with the key, tokens that
//! expire, problem documents, rate-limit headers. On top of it are what tests need: faults on demand, revocation, and
//! counters for every kind of call.
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
//! // The answer to the refresh is lost, and with it the refresh token: the API key is asked for the next.
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
//! # Secrets that can be searched for
//!
//! Its API key begins with `test-key-` (unless it is set), its access tokens with `eyJ0eXAiOiJKV1QifQ.`, its refresh tokens
//! with `def50200`, its upload tokens with `to` and 32 hexadecimal digits: a test of what your own program prints can look for them.
//!
//! # Routes
//!
//! | route | what it does |
//! |---|---|
//! | `POST /auth/api-key` `{"apiKey"}` | gives a token; ends the refresh token before it |
//! | `POST /auth/refresh` `{"refreshToken"}` | gives a token; spends the refresh token |
//! | `GET /videos` | lists the videos |
//! | `POST /videos` `{"title"}` | makes a video |
//! | `POST /videos/{id}/source` | takes its bytes, raw or as the `file` of a multipart form, whole or chunk by chunk (`Content-Range`); checks them against `Content-Digest: sha-256` (RFC 9530) in the headers or trailers, if it is there |
//! | `POST /upload-tokens` `{"ttl"}` | makes an upload token, which lives for `ttl` seconds |
//! | `POST /upload?token=…` | makes a video of the bytes that it takes, raw or as a form, whole; needs no bearer token |

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

/// A running server; it ends, with all its connections, when this is dropped. See the [module](self).
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
    /// If no port can be listened on.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime with I/O and time enabled.
    pub async fn start() -> io::Result<Self> {
        Self::builder().start().await
    }

    /// Starts a server with options of its own.
    pub fn builder() -> AuthServerBuilder {
        AuthServerBuilder {
            authority: Authority::new(format!("test-key-{}", random(20))),
            port: 0,
            tls: false,
            challenge_late: false,
        }
    }

    /// Where it listens: a base URL for [`ApiVideo`](crate::ApiVideo) and for requests.
    pub fn uri(&self) -> Uri {
        let scheme = if self.certificate.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address).parse().expect("an address is an authority")
    }

    /// The API key that it accepts.
    pub fn api_key(&self) -> String {
        self.server.authority().api_key.clone()
    }

    /// The certificate that clients have to trust, in DER; `None` without TLS.
    pub fn certificate(&self) -> Option<&[u8]> {
        self.certificate.as_deref()
    }

    /// Revokes every access token: each gets a 401 from now on. Refresh tokens stay good.
    pub fn revoke_access_tokens(&self) {
        self.server.authority().revoke_access_tokens();
    }

    /// Revokes the refresh token: only the API key gets another token.
    pub fn revoke_refresh_token(&self) {
        self.server.authority().revoke_refresh_token();
    }

    /// Accepts another API key from now on, in place of the one before.
    pub fn set_api_key(&self, api_key: impl Into<String>) {
        self.server.authority().api_key = api_key.into();
    }

    /// Sets how long the tokens given from now on live.
    pub fn set_token_lifetime(&self, lifetime: Duration) {
        self.server.authority().token_lifetime = lifetime;
    }

    /// Lets `fault` happen to the next request to `route` for which none is queued yet.
    pub fn inject(&self, route: Route, fault: Fault) {
        self.server.authority().faults.push(route, fault);
    }

    /// Lets `fault` happen to every request to `route` that none is queued for, until [`clear_faults`](Self::clear_faults).
    pub fn inject_always(&self, route: Route, fault: Fault) {
        self.server.authority().faults.set(route, fault);
    }

    /// Forgets all faults that are still to come.
    pub fn clear_faults(&self) {
        self.server.authority().faults.clear();
    }

    /// How many calls of each kind there were.
    pub fn counters(&self) -> Counters {
        self.server.authority().counters
    }

    /// What has been uploaded whole, in order.
    pub fn uploads(&self) -> Vec<Upload> {
        self.server.authority().uploads.whole.clone()
    }
}

impl Drop for AuthServer {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// Builds an [`AuthServer`]; see [`AuthServer::builder`].
#[derive(Debug)]
#[must_use = "a builder does nothing until `start` is called"]
pub struct AuthServerBuilder {
    authority: Authority,
    port: u16,
    tls: bool,
    challenge_late: bool,
}

impl AuthServerBuilder {
    /// Sets the port. Default: 0, a free one.
    pub fn port(mut self, port: u16) -> Self {
        self.port = port;
        self
    }

    /// Sets the API key. Default: a random one.
    pub fn api_key(mut self, api_key: impl Into<String>) -> Self {
        self.authority.api_key = api_key.into();
        self
    }

    /// Sets how long a token lives. Default: an hour, as api.video's.
    pub fn token_lifetime(mut self, lifetime: Duration) -> Self {
        self.authority.token_lifetime = lifetime;
        self
    }

    /// Sets whether a grant revokes the access tokens before it. Default: no. api.video's documents do not say.
    pub fn revoke_previous(mut self, revoke: bool) -> Self {
        self.authority.revoke_previous = revoke;
        self
    }

    /// Sets how many requests a minute are answered; others get a 429. Default: a million.
    pub fn rate_limit(mut self, per_minute: u32) -> Self {
        self.authority.rate_limit = RateLimit::new(per_minute);
        self
    }

    /// Sets whether a 401 comes only after the request's whole body, rather than at its headers. Default: no.
    pub fn challenge_late(mut self, late: bool) -> Self {
        self.challenge_late = late;
        self
    }

    /// Sets whether an upload by upload token is refused that comes with an `Authorization` header. Default: no.
    pub fn reject_bearer_at_upload(mut self, refuse: bool) -> Self {
        self.authority.reject_bearer_at_upload = refuse;
        self
    }

    /// Sets whether it speaks TLS, with a [certificate](AuthServer::certificate) made now. Default: no.
    pub fn tls(mut self, tls: bool) -> Self {
        self.tls = tls;
        self
    }

    /// Starts the server, on `127.0.0.1`.
    ///
    /// # Errors
    ///
    /// If the port cannot be listened on, or no certificate can be made.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime with I/O and time enabled.
    pub async fn start(self) -> io::Result<AuthServer> {
        let (certificate, acceptor) = if self.tls { Some(connection::tls()?) } else { None }.unzip();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, self.port)).await?;
        let address = listener.local_addr()?;
        let server = Server::new(self.authority, self.challenge_late);
        let accepting = tokio::spawn(connection::serve(listener, acceptor, server.clone()));
        Ok(AuthServer { server, address, certificate: certificate.map(|der| der.to_vec()), accepting })
    }
}
