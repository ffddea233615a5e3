//! [`Authority`]: the server's state: the accounts, the credentials, the valid tokens, the counters and the uploads.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    fmt,
    time::Duration,
};

use tokio::time::Instant;

use super::{
    Route,
    authorization::Authorization,
    credential::Credential,
    faults::Faults,
    jwt::TrustedKey,
    logins::{Login, Logins},
    random::random,
    uploads::Uploads,
    videos::Videos,
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
    /// `POST /oauth/token` that returned the first tokens of a login for a code.
    pub authorization_code_grants: u64,
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
    /// Requests to the API with a valid token, whatever the response. `challenged` counts them instead if the token was no
    /// longer valid [after the body](crate::AuthServerBuilder::check_after_body).
    pub accepted: u64,
    /// `GET /videos` that returned the list.
    pub videos_listed: u64,
    /// `POST /videos` that created a video.
    pub videos_made: u64,
    /// `DELETE /videos/{id}` that deleted a video.
    pub videos_deleted: u64,
    /// Videos whose bytes have all arrived.
    pub uploads: u64,
    /// `POST /upload-tokens` that created a token.
    pub upload_tokens: u64,
    /// `POST /upload` that created a video. `uploads` counts it, too, when all its bytes have arrived.
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
    pub(super) token_lifetime: Duration,
    pub(super) revoke_previous: bool,
    pub(super) counters: Counters,
    pub(super) faults: Faults,
    pub(super) uploads: Uploads,
    pub(super) reject_bearer_at_upload: bool,
    pub(super) rate_limit: RateLimit,
    /// The URL of the server, without a slash at its end.
    pub(super) issuer: String,
    pub(super) client_id: String,
    pub(super) client_secret: String,
    pub(super) trusted_key: TrustedKey,
    /// The `jti` of each client assertion that was accepted.
    pub(super) seen_jtis: HashSet<String>,
    pub(super) logins: Logins,
    /// The codes, of which each is exchanged once.
    pub(super) codes: HashMap<String, Authorization>,
    /// The newest forms of token requests, without their secrets.
    pub(super) token_requests: VecDeque<Vec<(String, String)>>,
    /// The valid access tokens, and those that have expired since the last grant.
    access_tokens: HashMap<String, AccessToken>,
    upload_tokens: HashMap<String, UploadToken>,
    /// By [`AccountId`]. An account that is removed keeps its place.
    accounts: Vec<Account>,
}

/// The index of an account.
pub(super) type AccountId = usize;

/// The account that a server has from its start. The OAuth 2.0 client and the logins belong to it.
const FIRST: AccountId = 0;

#[derive(Default)]
struct Account {
    /// `None` if the account was removed.
    api_key: Option<String>,
    /// The only valid refresh token of `/auth/refresh`.
    refresh_token: Option<String>,
    videos: Videos,
}

impl Account {
    fn new(api_key: String) -> Self {
        Self { api_key: Some(api_key), ..Self::default() }
    }
}

struct AccessToken {
    until: Instant,
    account: AccountId,
    /// The login whose refresh token gave this token.
    login: Option<Login>,
}

struct UploadToken {
    /// `None` if it does not expire.
    until: Option<Instant>,
    account: AccountId,
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
    pub(super) fn new() -> Self {
        Self {
            token_lifetime: Duration::from_secs(3600),
            revoke_previous: false,
            counters: Counters::default(),
            faults: Faults::default(),
            uploads: Uploads::default(),
            reject_bearer_at_upload: false,
            rate_limit: RateLimit::new(1_000_000),
            issuer: String::new(),
            client_id: format!("test-client-{}", random(8)),
            client_secret: format!("test-secret-{}", random(20)),
            trusted_key: TrustedKey::generate(),
            seen_jtis: HashSet::new(),
            logins: Logins::new(),
            codes: HashMap::new(),
            token_requests: VecDeque::new(),
            access_tokens: HashMap::new(),
            upload_tokens: HashMap::new(),
            accounts: vec![Account::new(random_key())],
        }
    }

    /// Returns the key of the first account. Empty if the account was removed.
    pub(super) fn api_key(&self) -> String {
        self.accounts[FIRST].api_key.clone().unwrap_or_default()
    }

    pub(super) fn set_api_key(&mut self, api_key: String) {
        self.accounts[FIRST].api_key = Some(api_key);
    }

    /// Adds an account. Returns its key.
    pub(super) fn add_account(&mut self) -> String {
        let api_key = random_key();
        self.accounts.push(Account::new(api_key.clone()));
        api_key
    }

    pub(super) fn account_of(&self, api_key: &str) -> Option<AccountId> {
        self.accounts.iter().position(|account| account.api_key.as_deref() == Some(api_key))
    }

    /// Ends the account's key and all its tokens.
    pub(super) fn remove_account(&mut self, account: AccountId) {
        self.accounts[account] = Account::default();
        self.revoke_access_tokens_of(account);
        self.upload_tokens.retain(|_, token| token.account != account);
    }

    /// Returns the videos of an account.
    pub(super) fn videos(&mut self, account: AccountId) -> &mut Videos {
        &mut self.accounts[account].videos
    }

    /// Authenticates with a key, which ends its account's refresh token.
    pub(super) fn authenticate(&mut self, api_key: &str) -> Option<Granted> {
        let account = self.account_of(api_key);
        let count = if account.is_some() {
            &mut self.counters.api_key_grants
        } else {
            &mut self.counters.rejected_api_keys
        };
        *count += 1;
        account.map(|account| self.grant(account))
    }

    /// Refreshes, which spends the refresh token.
    pub(super) fn refresh(&mut self, refresh_token: &str) -> Option<Granted> {
        let is_its = |account: &Account| account.refresh_token.as_deref() == Some(refresh_token);
        let account = self.accounts.iter().position(is_its);
        let count = if account.is_some() {
            &mut self.counters.refresh_grants
        } else {
            &mut self.counters.rejected_refresh_tokens
        };
        *count += 1;
        account.map(|account| self.grant(account))
    }

    fn grant(&mut self, account: AccountId) -> Granted {
        // The form of api.video's own refresh tokens.
        let refresh_token = format!("def50200{}", random(32));
        self.accounts[account].refresh_token = Some(refresh_token.clone());
        Granted { refresh_token: Some(refresh_token), ..self.issue_for(account, None) }
    }

    /// Issues an access token of the first account, without a refresh token.
    pub(super) fn issue(&mut self, login: Option<Login>) -> Granted {
        self.issue_for(FIRST, login)
    }

    fn issue_for(&mut self, account: AccountId, login: Option<Login>) -> Granted {
        if self.revoke_previous {
            self.revoke_access_tokens_of(account);
        }
        let now = Instant::now();
        self.access_tokens.retain(|_, token| token.until > now);
        // The form of api.video's own access tokens, which are JWTs.
        let access_token = format!("eyJ0eXAiOiJKV1QifQ.{}.{}", random(16), random(8));
        let lifetime = self.token_lifetime;
        self.access_tokens
            .insert(access_token.clone(), AccessToken { until: now + lifetime, account, login });
        Granted { access_token, refresh_token: None, issued_token_type: None, lifetime }
    }

    /// Returns the account of a request with this credential, and counts the request. `None` if it is not valid.
    pub(super) fn accept(&mut self, credential: &Credential) -> Option<AccountId> {
        let account = self.account_with_credential(credential);
        *if account.is_some() { &mut self.counters.accepted } else { &mut self.counters.challenged } += 1;
        account
    }

    /// Returns the account that a token or an API key belongs to. `None` if it is not valid.
    pub(super) fn account_with_credential(&self, credential: &Credential) -> Option<AccountId> {
        let account = credential.access_token.as_deref().and_then(|token| self.account_with(token));
        account.or_else(|| credential.api_key.as_deref().and_then(|key| self.account_of(key)))
    }

    /// Counts a request as challenged that was accepted before its body.
    pub(super) fn count_late_challenge(&mut self) {
        self.counters.accepted -= 1;
        self.counters.challenged += 1;
    }

    /// Returns the account that a valid access token belongs to.
    pub(super) fn account_with(&self, access_token: &str) -> Option<AccountId> {
        let token = self.access_tokens.get(access_token)?;
        (Instant::now() < token.until).then_some(token.account)
    }

    /// Creates an upload token. Without a `ttl`, it does not expire.
    pub(super) fn delegate(&mut self, account: AccountId, ttl: Option<Duration>) -> String {
        self.counters.upload_tokens += 1;
        let token = format!("to{}", random(16));
        let until = ttl.and_then(|ttl| Instant::now().checked_add(ttl));
        self.upload_tokens.insert(token.clone(), UploadToken { until, account });
        token
    }

    /// Returns the account that an upload token belongs to. `None` if the token is not valid.
    pub(super) fn accept_upload_token(&mut self, token: Option<&str>) -> Option<AccountId> {
        let good = token
            .and_then(|token| self.upload_tokens.get(token))
            .filter(|token| token.until.is_none_or(|until| Instant::now() < until));
        self.counters.rejected_upload_tokens += u64::from(good.is_none());
        good.map(|token| token.account)
    }

    pub(super) fn revoke_access_tokens(&mut self) {
        self.access_tokens.clear();
    }

    pub(super) fn revoke_access_tokens_of(&mut self, account: AccountId) {
        self.access_tokens.retain(|_, token| token.account != account);
    }

    /// Revokes the access tokens of a login.
    pub(super) fn revoke_login(&mut self, login: Login) {
        self.access_tokens.retain(|_, token| token.login != Some(login));
    }

    pub(super) fn revoke_refresh_token(&mut self) {
        self.accounts[FIRST].refresh_token = None;
    }

    /// Returns the fault for a request to `route`, if any, and counts it.
    pub(super) fn fault(&mut self, route: Route) -> Option<super::Fault> {
        let fault = self.faults.next(route);
        self.counters.faults += u64::from(fault.is_some());
        fault
    }
}

/// Returns an API key in the recognizable form.
fn random_key() -> String {
    format!("test-key-{}", random(20))
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
