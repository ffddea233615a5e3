//! [`AuthServer`]: an api.video-compatible server on loopback, for the tests of your own stack.
//!
//! It is a real hyper server on a real socket, with HTTP/1.1, HTTP/2 and optionally TLS. It follows api.video's
//! contract: both grants, refresh tokens that are spent by their use and by an authentication with the key, tokens that
//! expire, videos and their lists, problem documents, and rate-limit headers. api.video's own clients for Python and
//! Node work with it. It also has an OAuth 2.0 token endpoint, whose tokens the same API
//! accepts. In addition, tests can inject faults, revoke tokens, and count every kind of call.
//!
//! ```
//! # async fn run() -> Result<(), Box<dyn std::error::Error>> {
//! use tower_bearer::{ApiVideo, TokenProvider};
//! use tower_bearer_testing::{AuthServer, Fault, Route};
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
//! # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(run()).unwrap();
//! ```
//!
//! # Cryptography
//!
//! TLS is by rustls with ring. A program that has another provider of cryptography, too, installs one as the default at its
//! start (`CryptoProvider::install_default`), since rustls then selects none.
//!
//! # Your own API
//!
//! [`AuthServerBuilder::api`] replaces the videos by any tower service, such as an axum `Router`: it gets the requests
//! whose token is valid. [`AuthServer::accepts`] is for a server that runs elsewhere.
//!
//! # Accounts
//!
//! A server has one account from its start. Its key is [`api_key`](AuthServer::api_key), and the OAuth 2.0 client and
//! the logins belong to it. [`add_account`](AuthServer::add_account) adds others, for tests of many tenants. Each
//! account has its own key, refresh token, access tokens and videos. A request sees the videos of its token's account
//! only, so a token of the wrong account shows in the response.
//!
//! # Recognizable secrets
//!
//! A test can search the output of a program for the server's secrets. An API key starts with `test-key-` (unless it
//! is set), the client secret with `test-secret-` (unless it is set), an access token with `eyJ0eXAiOiJKV1QifQ.`, and a
//! refresh token with `def50200`. An upload token is `to` and 32 hexadecimal digits.
//!
//! # Routes
//!
//! | route | what it does |
//! |---|---|
//! | `POST /auth/api-key` `{"apiKey"}` | returns a token; ends the account's refresh token before it |
//! | `POST /auth/refresh` `{"refreshToken"}` | returns a token; spends the refresh token |
//! | `GET /oauth/authorize` | redirects with a code, as if a user had agreed |
//! | `POST /oauth/token` | the OAuth 2.0 token endpoint, see below |
//! | `GET /.well-known/oauth-authorization-server` | returns the metadata (RFC 8414) |
//! | `GET /videos` | returns a page of the videos of the account: `currentPage`, `pageSize`, `sortBy`, `sortOrder`, and the filters `title`, `description`, `tags[]` and `metadata[key]` |
//! | `POST /videos` `{"title"}` | creates a video in it |
//! | `GET /videos/{id}` | returns a video |
//! | `DELETE /videos/{id}` | deletes it |
//! | `POST /videos/{id}/source` | receives its bytes, raw or as the file of a multipart form, whole or in chunks; checks `Content-Digest: sha-256` (RFC 9530) in the headers or trailers, if there is one |
//! | `GET /videos/{id}/status` | returns which bytes or parts have arrived |
//! | `POST /upload-tokens` `{"ttl"}` | creates an upload token with a lifetime of `ttl` seconds |
//! | `POST /upload?token=…` | receives the bytes of a new video, or a later chunk of the video whose ID is `videoId` in the form; needs no bearer token |
//!
//! The API accepts a bearer token, or the API key as the user of Basic authentication. The response to an upload is the
//! video, with the number of `bytes` of the request and the `sha256` of the video. The `sha256` is null until the whole
//! video has arrived.
//!
//! `Content-Range` has one of two forms. `bytes <first>-<last>/<all>` is for chunks that arrive in order. Its first
//! chunk starts the upload again. `part <number>/<all>` is for parts in any order, and `part <number>/*` while their
//! number is not known. A part, or the last range, that is sent again changes nothing.
//!
//! # api.video's own clients
//!
//! | client | credential | refresh | after a 401 |
//! |---|---|---|---|
//! | Python, `api.video` 1.4.7 | the bearer token; also at `POST /upload` | a thread, 10 s before the expiry, with the refresh token; the thread ends at the first failure | raises an error |
//! | Node, `@api.video/nodejs-client` 2.6.8 | the API key as Basic; also at `POST /upload` | none | rejects with an error |
//!
//! Both send chunks of at least 5 MiB as `part <number>/<all>`. In a delegated upload, only their progressive sessions
//! send `videoId`: with `upload_with_upload_token`, each chunk of a longer file begins a new video.
//!
//! # The token endpoint
//!
//! | `grant_type` | what it needs | client |
//! |---|---|---|
//! | `authorization_code` | a code of the authorization endpoint, with its redirect URI on loopback and the code verifier (RFC 7636, `S256`); begins a login | authenticated, or its ID only |
//! | `client_credentials` | | authenticated |
//! | `refresh_token` | a refresh token of a [login](AuthServer::log_in), which is spent and replaced by the next one of its family; a spent one that is used again revokes the family | authenticated, or its ID only |
//! | `urn:ietf:params:oauth:grant-type:token-exchange` (RFC 8693) | a subject token: a JWT (`…:jwt`, `…:id_token`), or an access token of this server (`…:access_token`) | authenticated |
//! | `urn:ietf:params:oauth:grant-type:jwt-bearer` (RFC 7523) | an assertion: a JWT with an issuer and a subject | any or none |
//!
//! There is one client. It authenticates with its secret (`client_secret_basic`, `client_secret_post`), or with a JWT that
//! is valid once (`private_key_jwt`). The server trusts the JWTs of its [signing key](AuthServer::signing_key) whose
//! audience is the token endpoint or the issuer. It grants every scope, audience and resource that is well-formed, and
//! keeps them in [`token_requests`](AuthServer::token_requests).
//!
//! Errors follow RFC 6749 §5.2. A subject token that is not valid is an `invalid_request` (RFC 8693 §2.2.2).

mod api_video;
mod authority;
mod authorization;
mod builder;
mod connection;
mod credential;
mod faults;
mod jwt;
mod logins;
mod oauth2;
mod random;
mod request_body;
mod request_record;
mod responses;
mod routes;
mod service;
mod uploads;
mod videos;

use std::{io, time::Duration};

use http::{HeaderMap, Uri};
use tokio::task::JoinHandle;

pub use self::{
    authority::Counters,
    builder::AuthServerBuilder,
    faults::{Fault, Route},
    request_body::RequestBody,
    request_record::RequestRecord,
    uploads::Upload,
};

use self::{
    authority::{AccountId, Authority},
    credential::Credential,
    routes::Server,
};

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A running server. Its drop ends it and all its connections. See the [module](self).
#[derive(Debug)]
pub struct AuthServer {
    server: Server,
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
        AuthServerBuilder::new()
    }

    /// Returns the URL of the server: a base URL for `ApiVideo` of tower-bearer and for requests.
    pub fn uri(&self) -> Uri {
        self.issuer().parse().expect("an address is an authority")
    }

    /// Returns the URL of the server without a slash at its end: the issuer in its
    /// [metadata](https://www.rfc-editor.org/rfc/rfc8414).
    pub fn issuer(&self) -> String {
        self.server.authority().issuer.clone()
    }

    /// Returns the URL of the OAuth 2.0 token endpoint.
    pub fn token_endpoint(&self) -> String {
        self.server.authority().token_endpoint()
    }

    /// Returns the API key of the first account. Empty after [`remove_account`](Self::remove_account).
    pub fn api_key(&self) -> String {
        self.server.authority().api_key()
    }

    /// Adds an [account](self#accounts), and returns its API key. The rate limit, the faults and the counters are those
    /// of the whole server.
    pub fn add_account(&self) -> String {
        self.server.authority().add_account()
    }

    /// Removes the account with this API key. Its key and its tokens are rejected from now on.
    ///
    /// # Panics
    ///
    /// Panics if no account has this key.
    pub fn remove_account(&self, api_key: &str) {
        self.with_account(api_key, Authority::remove_account);
    }

    /// Revokes the access tokens of the account with this API key. Its refresh token remains valid.
    ///
    /// # Panics
    ///
    /// Panics if no account has this key.
    pub fn revoke_access_tokens_of(&self, api_key: &str) {
        self.with_account(api_key, Authority::revoke_access_tokens_of);
    }

    fn with_account(&self, api_key: &str, change: fn(&mut Authority, AccountId)) {
        let mut authority = self.server.authority();
        let account = authority.account_of(api_key).expect("an account has the API key");
        change(&mut authority, account);
    }

    /// Returns the ID of the OAuth 2.0 client that the server knows.
    pub fn client_id(&self) -> String {
        self.server.authority().client_id.clone()
    }

    /// Returns the secret of the OAuth 2.0 client.
    pub fn client_secret(&self) -> String {
        self.server.authority().client_secret.clone()
    }

    /// Returns the private key whose JWTs the server trusts, in PEM (PKCS#8, for ES256). It signs client assertions
    /// (`private_key_jwt`), assertions of the JWT bearer grant, and subject tokens of a token exchange.
    pub fn signing_key(&self) -> String {
        self.server.authority().trusted_key.pem()
    }

    /// Returns what the login of a user gives: the first refresh token of a family. It belongs to the OAuth 2.0 client.
    pub fn log_in(&self) -> String {
        self.server.authority().logins.start().1
    }

    /// Returns the certificate that clients have to trust, in DER. `None` without TLS.
    pub fn certificate(&self) -> Option<&[u8]> {
        self.certificate.as_deref()
    }

    /// Revokes every access token, of all accounts. A request with one gets a 401. Refresh tokens remain valid.
    pub fn revoke_access_tokens(&self) {
        self.server.authority().revoke_access_tokens();
    }

    /// Revokes the refresh token of `/auth/refresh` of the first account. Only its API key then gives it another token.
    pub fn revoke_refresh_token(&self) {
        self.server.authority().revoke_refresh_token();
    }

    /// Replaces the API key of the first account.
    pub fn set_api_key(&self, api_key: impl Into<String>) {
        self.server.authority().set_api_key(api_key.into());
    }

    /// Ends all [logins](Self::log_in). Their refresh tokens are then invalid. Access tokens remain valid.
    pub fn revoke_logins(&self) {
        self.server.authority().logins.end_all();
    }

    /// Replaces the secret of the OAuth 2.0 client.
    pub fn set_client_secret(&self, secret: impl Into<String>) {
        self.server.authority().client_secret = secret.into();
    }

    /// Sets the lifetime of tokens that are granted from now on.
    pub fn set_token_lifetime(&self, lifetime: Duration) {
        self.server.authority().token_lifetime = lifetime;
    }

    /// Returns whether a request with these headers has a valid access token (`Authorization: Bearer`), or an account's API
    /// key as the user of Basic authentication. A server of your own can check its requests with it.
    ///
    /// The request is counted as [`accepted`](Counters::accepted) or [`challenged`](Counters::challenged).
    pub fn accepts(&self, headers: &HeaderMap) -> bool {
        self.server.authority().accept(&Credential::of(headers)).is_some()
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

    /// Returns the parameters of the newest 64 requests to the token endpoint, in order, also of rejected ones. Secrets,
    /// assertions and tokens are omitted.
    pub fn token_requests(&self) -> Vec<Vec<(String, String)>> {
        self.server.authority().token_requests.iter().cloned().collect()
    }
}

impl Drop for AuthServer {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}
