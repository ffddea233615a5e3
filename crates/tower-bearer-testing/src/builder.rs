//! [`AuthServerBuilder`]: the options of a server, and its start.

use std::{io, net::Ipv4Addr, time::Duration};

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use tokio::net::TcpListener;
use tower_service::Service;

use super::{
    AuthServer,
    authority::{Authority, RateLimit},
    connection,
    request_body::RequestBody,
    request_record::{Observer, RequestRecord},
    routes::{Options, Server},
    service::ApiService,
};
use crate::BoxError;

/// A builder for an [`AuthServer`], made by [`AuthServer::builder`].
#[derive(Debug)]
#[must_use = "a builder does nothing until `start` is called"]
pub struct AuthServerBuilder {
    authority: Authority,
    port: u16,
    tls: bool,
    options: Options,
}

impl AuthServerBuilder {
    pub(super) fn new() -> Self {
        Self { authority: Authority::new(), port: 0, tls: false, options: Options::default() }
    }

    /// Sets the port. Default: 0, which is any free port.
    pub fn port(mut self, port: u16) -> Self {
        self.port = port;
        self
    }

    /// Sets the API key of the first account. Default: a random one.
    pub fn api_key(mut self, api_key: impl Into<String>) -> Self {
        self.authority.set_api_key(api_key.into());
        self
    }

    /// Sets the ID and the secret of the OAuth 2.0 client. Default: random ones.
    pub fn client(mut self, id: impl Into<String>, secret: impl Into<String>) -> Self {
        self.authority.client_id = id.into();
        self.authority.client_secret = secret.into();
        self
    }

    /// Sets whether a refresh at the token endpoint spends the refresh token and returns the next one. Otherwise, the
    /// refresh token stays valid and the response has none. Default: yes.
    pub fn rotate(mut self, rotate: bool) -> Self {
        self.authority.logins.rotate = rotate;
        self
    }

    /// Sets how long a spent refresh token still gives further tokens of its family. Its use after that time revokes the
    /// family and the family's access tokens. Default: zero.
    pub fn refresh_token_grace(mut self, grace: Duration) -> Self {
        self.authority.logins.grace = grace;
        self
    }

    /// Sets the lifetime of a token. Default: 1 h, like api.video.
    pub fn token_lifetime(mut self, lifetime: Duration) -> Self {
        self.authority.token_lifetime = lifetime;
        self
    }

    /// Sets whether a grant revokes the account's earlier access tokens. Default: no. api.video's documents do not say
    /// which it does.
    pub fn revoke_previous(mut self, revoke: bool) -> Self {
        self.authority.revoke_previous = revoke;
        self
    }

    /// Sets the number of requests per minute. Further ones get a 429. Default: a million.
    pub fn rate_limit(mut self, per_minute: u32) -> Self {
        self.authority.rate_limit = RateLimit::new(per_minute);
        self
    }

    /// Sets whether a 401 is sent after the request's whole body, instead of after its headers. Default: no. The token is
    /// checked when the headers arrive.
    pub fn challenge_late(mut self, late: bool) -> Self {
        self.options.challenge_late = late;
        self
    }

    /// Sets whether the token of a request with a body is checked again at the end of the body. Default: no.
    ///
    /// If the token has expired or was revoked while the body was sent, the response is a 401. The API does not see the
    /// end of the body: an upload is not stored, and a service of [`api`](Self::api) reads an error instead of the last
    /// bytes, or instead of the end. Its response is replaced by the 401.
    ///
    /// A service that does not read the body to its end is not checked. One that responds before the end only gets the
    /// error, because its response has been sent.
    pub fn check_after_body(mut self, check: bool) -> Self {
        self.options.check_after_body = check;
        self
    }

    /// Replaces the videos by `service`, such as an axum `Router`. Default: the videos of api.video.
    ///
    /// The service gets each request that is for none of the token endpoints and not for the metadata, if its token (or API
    /// key) is valid. Other requests get a 401. Faults of [`Route::Api`](crate::Route::Api), the rate limit and the counters
    /// `accepted` and `challenged` apply as to the videos. Bodies are streamed in both directions, except that
    /// [`Truncate`](crate::Fault::Truncate) and [`Drip`](crate::Fault::Drip) read the response first. If the service
    /// fails, the response is a 500 with the text of the error.
    ///
    /// ```
    /// # async fn run() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    /// use axum::{Router, routing::get};
    /// use bytes::Bytes;
    /// use http_body_util::Empty;
    /// use hyper_util::{client::legacy::Client, rt::TokioExecutor};
    /// use tower_bearer::{ApiVideo, BearerAuthLayer, TokenProvider};
    /// use tower_bearer_testing::AuthServer;
    /// use tower_layer::Layer;
    /// use tower_service::Service;
    ///
    /// let orders = Router::new().route("/orders", get(async || "no orders"));
    /// let server = AuthServer::builder().api(orders).start().await?;
    ///
    /// let provider = TokenProvider::new(ApiVideo::new(server.api_key()).base_url(server.uri()));
    /// let client = Client::builder(TokioExecutor::new()).build_http::<Empty<Bytes>>();
    /// let mut client = BearerAuthLayer::with_provider(provider).layer(client);
    /// for _ in 0..2 {
    ///     let request = http::Request::get(format!("{}orders", server.uri())).body(Empty::new())?;
    ///     std::future::poll_fn(|cx| Service::<http::Request<Empty<Bytes>>>::poll_ready(&mut client, cx)).await?;
    ///     assert_eq!(client.call(request).await?.status(), 200);
    ///     server.revoke_access_tokens();
    /// }
    /// assert_eq!(server.counters().challenged, 1);
    /// # Ok(())
    /// # }
    /// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(run()).unwrap();
    /// ```
    pub fn api<S, B>(mut self, service: S) -> Self
    where
        S: Service<Request<RequestBody>, Response = Response<B>, Error: Into<BoxError>, Future: Send>
            + Clone
            + Send
            + 'static,
        B: Body<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
    {
        self.options.service = Some(ApiService::new(service));
        self
    }

    /// Calls `observer` after each request, when its response is ready or when it is certain that there is none. Default:
    /// none. It is called on the task of the connection, so it must not block.
    pub fn on_request_end(mut self, observer: impl Fn(&RequestRecord) + Send + Sync + 'static) -> Self {
        self.options.observer = Some(Observer::new(observer));
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
    pub async fn start(mut self) -> io::Result<AuthServer> {
        let (certificate, acceptor) = if self.tls { Some(connection::tls()?) } else { None }.unzip();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, self.port)).await?;
        let scheme = if self.tls { "https" } else { "http" };
        self.authority.issuer = format!("{scheme}://{}", listener.local_addr()?);
        let server = Server::new(self.authority, self.options);
        let accepting = tokio::spawn(connection::serve(listener, acceptor, server.clone()));
        Ok(AuthServer { server, certificate: certificate.map(|der| der.to_vec()), accepting })
    }
}
