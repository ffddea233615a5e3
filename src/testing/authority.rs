//! [`Authority`]: the server's state: the credentials, the valid tokens, the counters and the uploads.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    fmt,
    time::Duration,
};

use tokio::time::Instant;

use super::{
    Route,
    faults::Faults,
    jwt::TrustedKey,
    logins::{Login, Logins},
    random::random,
    uploads::Uploads,
};

/// The number of calls of each kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counters {
    /// TCP connections accepted.
    pub connections: u64,
    /// `POST /auth/api-key` that returned a token.
    pub api_key_grants: u64,
    /// `POST /auth/api-key` that were rejected because of a wrong key.
    pub rejected_api_keys: u64,
    /// `POST /auth/refresh` that returned a token.
    pub refresh_grants: u64,
    /// `POST /auth/refresh` that were rejected because the refresh token is spent or unknown.
    pub rejected_refresh_tokens: u64,
    /// `POST /oauth/token` that returned a token for the client's credentials.
    pub client_credentials_grants: u64,
    /// `POST /oauth/token` that returned a token for a refresh token.
    pub oauth_refresh_grants: u64,
    /// `POST /oauth/token` that returned a token for another token.
    pub token_exchanges: u64,
    /// `POST /oauth/token` that returned a token for an assertion.
    pub jwt_bearer_grants: u64,
    /// `POST /oauth/token` that were rejected because of the client (`invalid_client`).
    pub rejected_clients: u64,
    /// `POST /oauth/token` that were rejected for another reason.
    pub rejected_oauth_grants: u64,
    /// `POST /oauth/token` with a spent refresh token after the grace. `rejected_oauth_grants` counts them, too.
    pub reused_refresh_tokens: u64,
    /// `GET /.well-known/oauth-authorization-server` that returned the metadata.
    pub metadata_requests: u64,
    /// Requests to the API with a valid token, whatever the response.
    pub accepted: u64,
    /// `GET /videos` that returned the list.
    pub videos_listed: u64,
    /// `POST /videos` that created a video.
    pub videos_made: u64,
    /// Videos whose bytes have all arrived.
    pub uploads: u64,
    /// `POST /upload-tokens` that created a token.
    pub upload_tokens: u64,
    /// `POST /upload` that created a video. `uploads` counts them, too.
    pub delegated_uploads: u64,
    /// `POST /upload` that were challenged because the upload token is expired or unknown.
    pub rejected_upload_tokens: u64,
    /// Requests to the API that got a 401.
    pub challenged: u64,
    /// Requests of any kind over HTTP/2.
    pub http2_requests: u64,
    /// Requests with an injected fault.
    pub faults: u64,
    /// Requests over the rate limit.
    pub rate_limited: u64,
}

/// The server's state.
pub(super) struct Authority {
    pub(super) api_key: String,
    pub(super) token_lifetime: Duration,
    pub(super) revoke_previous: bool,
    pub(super) counters: Counters,
    pub(super) faults: Faults,
    pub(super) uploads: Uploads,
    pub(super) reject_bearer_at_upload: bool,
    pub(super) rate_limit: RateLimit,
    /// Title by id.
    pub(super) videos: BTreeMap<String, String>,
    /// The URL of the server, without a slash at its end.
    pub(super) issuer: String,
    pub(super) client_id: String,
    pub(super) client_secret: String,
    pub(super) trusted_key: TrustedKey,
    /// The `jti` of each client assertion that was accepted.
    pub(super) seen_jtis: HashSet<String>,
    pub(super) logins: Logins,
    /// The newest forms of token requests, without their secrets.
    pub(super) token_requests: VecDeque<Vec<(String, String)>>,
    /// The valid access tokens, and those that have expired since the last grant.
    access_tokens: HashMap<String, AccessToken>,
    /// The only valid refresh token of `/auth/refresh`.
    refresh_token: Option<String>,
    /// The expiry of each upload token, if it has one.
    upload_tokens: HashMap<String, Option<Instant>>,
}

struct AccessToken {
    until: Instant,
    /// The login whose refresh token gave this token.
    login: Option<Login>,
}

/// Omits the keys, the secrets and the tokens.
impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority")
            .field("token_lifetime", &self.token_lifetime)
            .field("counters", &self.counters)
            .finish_non_exhaustive()
    }
}

/// The result of a grant.
pub(super) struct Granted {
    pub(super) access_token: String,
    pub(super) refresh_token: Option<String>,
    /// What a token exchange has issued (RFC 8693 §2.2.1).
    pub(super) issued_token_type: Option<&'static str>,
    pub(super) lifetime: Duration,
}

impl Authority {
    pub(super) fn new(api_key: String) -> Self {
        Self {
            api_key,
            token_lifetime: Duration::from_secs(3600),
            revoke_previous: false,
            counters: Counters::default(),
            faults: Faults::default(),
            uploads: Uploads::default(),
            reject_bearer_at_upload: false,
            rate_limit: RateLimit::new(1_000_000),
            videos: BTreeMap::new(),
            issuer: String::new(),
            client_id: format!("test-client-{}", random(8)),
            client_secret: format!("test-secret-{}", random(20)),
            trusted_key: TrustedKey::generate(),
            seen_jtis: HashSet::new(),
            logins: Logins::new(),
            token_requests: VecDeque::new(),
            access_tokens: HashMap::new(),
            refresh_token: None,
            upload_tokens: HashMap::new(),
        }
    }

    /// Authenticates with the key, which ends the refresh token before it.
    pub(super) fn authenticate(&mut self, api_key: &str) -> Option<Granted> {
        if api_key != self.api_key {
            self.counters.rejected_api_keys += 1;
            return None;
        }
        self.counters.api_key_grants += 1;
        Some(self.grant())
    }

    /// Refreshes, which spends the refresh token.
    pub(super) fn refresh(&mut self, refresh_token: &str) -> Option<Granted> {
        if self.refresh_token.as_deref() != Some(refresh_token) {
            self.counters.rejected_refresh_tokens += 1;
            return None;
        }
        self.counters.refresh_grants += 1;
        Some(self.grant())
    }

    fn grant(&mut self) -> Granted {
        // The form of api.video's own refresh tokens.
        let refresh_token = format!("def50200{}", random(32));
        self.refresh_token = Some(refresh_token.clone());
        Granted { refresh_token: Some(refresh_token), ..self.issue(None) }
    }

    /// Issues an access token, without a refresh token.
    pub(super) fn issue(&mut self, login: Option<Login>) -> Granted {
        if self.revoke_previous {
            self.access_tokens.clear();
        }
        let now = Instant::now();
        self.access_tokens.retain(|_, token| token.until > now);
        // The form of api.video's own access tokens, which are JWTs.
        let access_token = format!("eyJ0eXAiOiJKV1QifQ.{}.{}", random(16), random(8));
        let lifetime = self.token_lifetime;
        self.access_tokens.insert(access_token.clone(), AccessToken { until: now + lifetime, login });
        Granted { access_token, refresh_token: None, issued_token_type: None, lifetime }
    }

    pub(super) fn accepts(&mut self, access_token: Option<&str>) -> bool {
        let good = access_token.is_some_and(|token| self.is_valid(token));
        *if good { &mut self.counters.accepted } else { &mut self.counters.challenged } += 1;
        good
    }

    pub(super) fn is_valid(&self, access_token: &str) -> bool {
        self.access_tokens.get(access_token).is_some_and(|token| Instant::now() < token.until)
    }

    /// Creates an upload token. Without a `ttl`, it does not expire.
    pub(super) fn delegate(&mut self, ttl: Option<Duration>) -> String {
        self.counters.upload_tokens += 1;
        let token = format!("to{}", random(16));
        self.upload_tokens.insert(token.clone(), ttl.and_then(|ttl| Instant::now().checked_add(ttl)));
        token
    }

    pub(super) fn accepts_upload_token(&mut self, token: Option<&str>) -> bool {
        let until = token.and_then(|token| self.upload_tokens.get(token));
        let good = until.is_some_and(|until| until.is_none_or(|until| Instant::now() < until));
        self.counters.rejected_upload_tokens += u64::from(!good);
        good
    }

    pub(super) fn revoke_access_tokens(&mut self) {
        self.access_tokens.clear();
    }

    /// Revokes the access tokens of a login.
    pub(super) fn revoke_login(&mut self, login: Login) {
        self.access_tokens.retain(|_, token| token.login != Some(login));
    }

    pub(super) fn revoke_refresh_token(&mut self) {
        self.refresh_token = None;
    }

    /// Returns the fault for a request to `route`, if any, and counts it.
    pub(super) fn fault(&mut self, route: Route) -> Option<super::Fault> {
        let fault = self.faults.next(route);
        self.counters.faults += u64::from(fault.is_some());
        fault
    }
}

/// A limit on the requests per minute, in windows of a minute.
#[derive(Debug)]
pub(super) struct RateLimit {
    pub(super) limit: u32,
    used: u32,
    window: Instant,
}

/// The state of the rate limit, which every response shows.
pub(super) struct Rate {
    pub(super) limit: u32,
    pub(super) remaining: u32,
    pub(super) retry_after: Duration,
    pub(super) exceeded: bool,
}

impl RateLimit {
    const WINDOW: Duration = Duration::from_secs(60);

    pub(super) fn new(limit: u32) -> Self {
        Self { limit, used: 0, window: Instant::now() }
    }

    pub(super) fn count(&mut self) -> Rate {
        let now = Instant::now();
        if now - self.window >= Self::WINDOW {
            *self = Self { limit: self.limit, used: 0, window: now };
        }
        let exceeded = self.used >= self.limit;
        self.used = self.used.saturating_add(1);
        Rate {
            limit: self.limit,
            remaining: self.limit.saturating_sub(self.used),
            retry_after: (self.window + Self::WINDOW) - now,
            exceeded,
        }
    }
}
