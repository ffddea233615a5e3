//! [`OAuth2`]: the source for an OAuth 2.0 authorization server, and its options.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::super::client::TokenClient;
use super::super::{DynTokenSource, TokenSource};
use super::client_auth::ClientAuth;
use super::server::Server;
use crate::debug::debug_fields;

/// A [`TokenSource`] for an OAuth 2.0 authorization server (RFC 6749).
///
/// ```
/// use tower_bearer::{BearerAuthLayer, OAuth2, TokenProvider, oauth2::{ClientAuth, Server}};
///
/// let source = OAuth2::client_credentials(
///     Server::issuer("https://login.example.com"),
///     ClientAuth::basic("your-client-id", "your-client-secret"),
/// );
/// let provider = TokenProvider::builder(source.scopes(["videos:read"])).build()?;
/// let layer = BearerAuthLayer::with_provider(provider);
/// # Ok::<(), tower_bearer::Error>(())
/// ```
///
/// # Grants
///
/// | grant | what a token is requested with | source |
/// |---|---|---|
/// | [`client_credentials`](Self::client_credentials) | the client's own authentication | RFC 6749 §4.4 |
/// | [`login`](Self::login) | the newest refresh token of a user's login | RFC 6749 §6 |
/// | [`token_exchange`](Self::token_exchange) | a token of another issuer | RFC 8693 |
/// | [`jwt_bearer`](Self::jwt_bearer) | a signed assertion | RFC 7523 §2.1 |
///
/// Only the second one uses the refresh tokens of responses. The others have a credential that works as long.
///
/// # Refresh tokens
///
/// Many servers rotate refresh tokens: each is spent by its use, and a spent one that is presented again revokes the whole
/// login (RFC 9700 §4.14.2). [`TokenProviderBuilder::login`](crate::TokenProviderBuilder::login) says how the provider
/// protects it, alone and with other processes. What an answer means for the refresh token:
///
/// | response to the refresh token | what follows |
/// |---|---|
/// | a token with a refresh token | the new refresh token replaces the old one |
/// | a token without one | the refresh token is kept (RFC 6749 §6) |
/// | an access token that cannot be used, with a refresh token | the new refresh token is presented after the backoff |
/// | `invalid_grant`, `invalid_token`, `bad_refresh_token`, `invalid_refresh_token`, `refresh_token_expired`, `expired_token` with any status; their like, unless with 408, 425, 429 or 5xx | the login has ended: [`LoginRequired`](crate::SourceErrorKind::LoginRequired) |
/// | another rejection, which is *doubtful*, since it does not name the refresh token: a 4xx in JSON with an unknown code or none, an empty 400, 401 or 403, `invalid_request`, `access_denied`, `interaction_required` and its like, a 200 with an unknown `error`, `unauthorized_client` with 403 | [`LoginRequired`](crate::SourceErrorKind::LoginRequired); the refresh token is kept, and presented once a minute at most, and by [`ready`](crate::TokenProvider::ready) |
/// | `invalid_client`, `unauthorized_client` and their like; an error of the configuration | the client is rejected, or set up wrongly; the refresh token is kept |
/// | everything else: none that is complete and in time, 408, 425, 429, 5xx, HTML, a success without a token | it is presented again after the backoff and a tenth of the outage, a minute at most. Once an answer is lost, the outage counts from there |
///
/// Servers state a code under many names, so it is looked for in `error`, in the fields of `error` or of the first of
/// `errors`, and in every other text. The like of a code is a text that says only that the refresh token, the grant or
/// the client is not valid, such as `refresh_token_revoked` or `The refresh token has expired.` Of any token, only a code
/// such as `token_expired` says so, and no prose.
///
/// If an answer is lost, the refresh token may be spent. Presenting it again heals the first loss of an outage if the
/// server accepts a spent one for 30 s, which is the [timeout](TokenClient::timeout) (20 s for a login), the backoff, and a
/// tenth of the outage; in a store, also for five seconds more than the [lease](crate::TokenProviderBuilder::lease). A server
/// that detects reuse may end the login instead.
///
/// # Errors
///
/// What follows holds for the other grants, and for a login's response that the table above does not name or calls a
/// failure of the client, of the configuration, or everything else.
///
/// | response of the token endpoint | kind |
/// |---|---|
/// | `invalid_client`, `unauthorized_client`, `access_denied`, `invalid_grant` and their like; `invalid_request` to a token exchange (RFC 8693 §2.2.2); a 4xx in JSON with another code or none, a 200 with another `error`; an empty 400, 401, 403 | [`Rejected`](crate::SourceErrorKind::Rejected) |
/// | `invalid_scope`, `invalid_target`, `invalid_request`, `unsupported_grant_type`; 3xx, 404, 405, 410, 415 | [`Configuration`](crate::SourceErrorKind::Configuration) |
/// | `interaction_required`, `login_required`, `consent_required` | [`LoginRequired`](crate::SourceErrorKind::LoginRequired) |
/// | `temporarily_unavailable`, `server_error`, `slow_down`; 408, 425, 429, 5xx, a 4xx with `Retry-After` and without one of these codes; none | [`Unavailable`](crate::SourceErrorKind::Unavailable), after `Retry-After` |
/// | anything else: a page of a firewall, another status, or a success without a valid token | [`InvalidResponse`](crate::SourceErrorKind::InvalidResponse) |
///
/// A message has the code if it is a known one, and nothing else of a response: neither `error_description` nor
/// `error_uri`.
///
/// Each exchange is bounded, and statuses are classified, as [`TokenClient`] documents.
///
/// # Which origins see the token
///
/// Every `https` origin and loopback, because the source does not know the API. Set the layer's
/// [`allowed_origins`](crate::BearerAuthLayer::allowed_origins).
///
/// # Clones
///
/// Clones share the client's secret and the server's metadata, also in several providers. Keep one to replace the secret
/// later ([`set_secret`](Self::set_secret)).
#[derive(Clone)]
pub struct OAuth2 {
    pub(super) grant: Grant,
    pub(super) server: Server,
    /// How the client authenticates, and how often that was replaced.
    client_auth: Arc<Mutex<(ClientAuth, u64)>>,
    pub(super) options: Options,
}

#[derive(Clone, Default)]
pub(super) struct Options {
    pub(super) scopes: Vec<String>,
    pub(super) resources: Vec<String>,
    pub(super) audience: Option<String>,
    pub(super) parameters: Vec<(String, String)>,
    pub(super) default_lifetime: Option<Duration>,
    pub(super) follow_challenge: bool,
    pub(super) use_id_token: bool,
    pub(super) client: TokenClient,
}

#[derive(Clone)]
pub(super) enum Grant {
    ClientCredentials,
    Login,
    TokenExchange { subject: Arc<dyn DynTokenSource>, token_type: String },
    JwtBearer(Arc<dyn DynTokenSource>),
}

impl OAuth2 {
    /// Requests tokens for the client itself (RFC 6749 §4.4).
    ///
    /// Options that are not valid are an error of [`TokenProviderBuilder::build`](crate::TokenProviderBuilder::build), or
    /// else of the first use. This holds for all constructors and options. What only the server knows, such as its scopes,
    /// is an error of the first use.
    pub fn client_credentials(server: Server, client: ClientAuth) -> Self {
        Self::new(Grant::ClientCredentials, server, client)
    }

    /// Requests tokens with the refresh tokens of a user's login (RFC 6749 §6).
    ///
    /// The source has no state. The provider gets the first refresh token
    /// ([`TokenProviderBuilder::login`](crate::TokenProviderBuilder::login),
    /// [`TokenProvider::log_in`](crate::TokenProvider::log_in)), keeps the newest one, and presents it
    /// ([above](Self#refresh-tokens)).
    pub fn login(server: Server, client: ClientAuth) -> Self {
        Self::new(Grant::Login, server, client)
    }

    /// Exchanges a token of another issuer for an access token (RFC 8693).
    ///
    /// `subject` is asked at each exchange: a [`TokenFile`](crate::TokenFile) reads its file,
    /// [`source_fn`](crate::source_fn) calls a closure, `Assertion` (feature `oauth2-jwt`) signs a JWT, and
    /// [`StaticToken`](crate::StaticToken) has a fixed value. Its type is a JWT
    /// ([`subject_token_type`](Self::subject_token_type)). A user's login is one as a
    /// [`TokenProvider`](crate::TokenProvider), which has its refresh token. If both have a store, each has its own, or its
    /// own [namespace](crate::store::NamespacedStore): in the same one, each would wait for the lease of the other. Further
    /// parameters of RFC 8693, such as `actor_token`, are set by [`parameter`](Self::parameter).
    pub fn token_exchange(server: Server, client: ClientAuth, subject: impl TokenSource) -> Self {
        let token_type = "urn:ietf:params:oauth:token-type:jwt".to_owned();
        Self::new(Grant::TokenExchange { subject: Arc::new(subject), token_type }, server, client)
    }

    /// Requests tokens with a signed assertion (RFC 7523 §2.1).
    ///
    /// `assertion` is asked at each exchange, such as an `Assertion` (feature `oauth2-jwt`), which signs a new one each
    /// time. The client is often [`ClientAuth::none`], because the assertion identifies it.
    pub fn jwt_bearer(server: Server, client: ClientAuth, assertion: impl TokenSource) -> Self {
        Self::new(Grant::JwtBearer(Arc::new(assertion)), server, client)
    }

    fn new(grant: Grant, server: Server, client_auth: ClientAuth) -> Self {
        let client_auth = Arc::new(Mutex::new((client_auth, 0)));
        Self { grant, server, client_auth, options: Options::default() }
    }

    /// Sets the scopes to request (`scope`, RFC 6749 §3.3), one in each value. Default: none, so that the server decides.
    pub fn scopes<S: Into<String>>(mut self, scopes: impl IntoIterator<Item = S>) -> Self {
        self.options.scopes = scopes.into_iter().map(Into::into).collect();
        self
    }

    /// Sets the resources that the token is for (`resource`, RFC 8707 §2). Default: none. They have no fragment.
    pub fn resources<S: Into<String>>(mut self, resources: impl IntoIterator<Item = S>) -> Self {
        self.options.resources = resources.into_iter().map(Into::into).collect();
        self
    }

    /// Sets the audience of the token (`audience`, RFC 8693 §2.1, which some servers also take for other grants). Default:
    /// none.
    pub fn audience(mut self, audience: impl Into<String>) -> Self {
        self.options.audience = Some(audience.into());
        self
    }

    /// Sets the type of the subject token of [`token_exchange`](Self::token_exchange) (RFC 8693 §3). Default:
    /// `urn:ietf:params:oauth:token-type:jwt`.
    ///
    /// It has no effect on the other grants.
    pub fn subject_token_type(mut self, subject_token_type: impl Into<String>) -> Self {
        if let Grant::TokenExchange { token_type, .. } = &mut self.grant {
            *token_type = subject_token_type.into();
        }
        self
    }

    /// Adds a parameter to each request. A name may be added more than once.
    ///
    /// A name that the grant, the client's authentication or another option sets is an error of
    /// [`TokenProviderBuilder::build`](crate::TokenProviderBuilder::build), or else of the first use. So is one that has a
    /// secret of a grant, such as `client_secret`.
    pub fn parameter(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.options.parameters.push((name.into(), value.into()));
        self
    }

    /// Sets the lifetime of a token whose response has no valid `expires_in`. Default: none, so that the token is used until
    /// the API challenges it. It is more than zero.
    pub fn default_lifetime(mut self, lifetime: Duration) -> Self {
        self.options.default_lifetime = Some(lifetime);
        self
    }

    /// Sets whether a request has what the API's challenge asks for: the parameters `claims` and `acr_values`
    /// ([`Challenge`](crate::challenge::Challenge)). Default: no.
    ///
    /// `claims` in base64, as Microsoft's APIs send it, is decoded. Turn it on only for an API that may decide what the
    /// token is asked for.
    pub fn follow_challenge(mut self, follow: bool) -> Self {
        self.options.follow_challenge = follow;
        self
    }

    /// Sets whether the ID token of the response is the bearer token, in place of the access token (OpenID Connect Core
    /// §3.1.3.3), as Kubernetes' API servers take it. Default: no.
    ///
    /// The server sends one if `openid` is one of the [scopes](Self::scopes), or was one at the login. Some servers send none
    /// at a refresh (OpenID Connect Core §12.2): that is a [`Configuration`](crate::SourceErrorKind::Configuration) error,
    /// which keeps the new refresh token. The lifetime is that of its claims `exp` and `iat`, and unknown if it is not a
    /// JWT. The token is not verified here: the API does that.
    pub fn use_id_token(mut self, use_id_token: bool) -> Self {
        self.options.use_id_token = use_id_token;
        self
    }

    /// Sets the client for the token endpoint and the metadata, with its timeout, headers and TLS. Default:
    /// [`TokenClient::new`].
    ///
    /// Use clones of one client for many sources, such as those of many tenants (`TokenProviders`, feature `tenants`).
    pub fn with_client(mut self, client: TokenClient) -> Self {
        self.options.client = client;
        self
    }

    /// Replaces the client's secret, in all clones. The next exchange uses it. If the old secret was rejected, the cool-down
    /// ends.
    ///
    /// It has no effect if the client has no secret ([`ClientAuth`]).
    pub fn set_secret(&self, secret: impl Into<String>) {
        let mut client_auth = self.client_auth.lock().unwrap_or_else(PoisonError::into_inner);
        client_auth.0.set_secret(secret.into());
        client_auth.1 += 1;
    }

    pub(super) fn client_auth(&self) -> (ClientAuth, u64) {
        self.client_auth.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

debug_fields!(OAuth2 |it| { grant: it.grant.name(), server: it.server, client: it.client_auth().0 });

impl Grant {
    /// Returns the source of the token that is presented, if there is one, and the field that has that token.
    pub(super) fn subject(&self) -> Option<(&'static str, &dyn DynTokenSource)> {
        match self {
            Self::TokenExchange { subject, .. } => Some(("subject_token", &**subject)),
            Self::JwtBearer(assertion) => Some(("assertion", &**assertion)),
            Self::ClientCredentials | Self::Login => None,
        }
    }

    /// Returns the `grant_type`.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::ClientCredentials => "client_credentials",
            Self::Login => "refresh_token",
            Self::TokenExchange { .. } => "urn:ietf:params:oauth:grant-type:token-exchange",
            Self::JwtBearer(_) => "urn:ietf:params:oauth:grant-type:jwt-bearer",
        }
    }
}
