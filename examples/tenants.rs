//! One client for 1,000 accounts, each with its own token: some are revoked, some are removed, most are idle until they
//! are evicted. Then 10,000 tenants that are kept fresh for an hour.
//!
//! ```text
//! cargo run --example tenants
//! ```
//!
//! The API is the crate's test server in this process. An account's list of videos has only its own, so that the token
//! of another account would show in the answer. The hour of the second part runs on a virtual clock.

use std::{
    borrow::Cow,
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::{StreamExt, future::join_all, stream};
use http::{Method, Request, StatusCode, Uri};
use http_body_util::{BodyExt, Full};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use tokio::time::{Instant, advance, sleep, sleep_until, timeout};
use tower::{Layer, ServiceExt};
use tower_bearer::{
    ApiVideo, BearerAuth, BearerAuthLayer, BoxError, Error, SourceErrorKind, Token, TokenClient,
    TokenProvider, TokenProviders, source_fn,
};
use tower_bearer_testing::AuthServer;

const ACCOUNTS: u32 = 1000;
/// How many requests are under way at one moment.
const CONCURRENT: usize = 64;
const IDLE_TIMEOUT: Duration = Duration::from_secs(2);

const KEPT_FRESH: u32 = 10_000;
const LIFETIME: Duration = Duration::from_secs(3600);

/// The tenant of a request. A gateway puts it into the request's extensions, after it has authenticated its caller.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct AccountId(u32);

#[derive(Debug, thiserror::Error)]
#[error("there is no account {0}")]
struct UnknownAccount(u32);

fn main() -> Result<(), BoxError> {
    tokio::runtime::Runtime::new()?.block_on(many_accounts())?;
    let mut paused = tokio::runtime::Builder::new_current_thread();
    paused.enable_time().start_paused(true).build()?.block_on(kept_fresh())
}

async fn many_accounts() -> Result<(), BoxError> {
    let server = AuthServer::start().await?;
    let keys: HashMap<_, _> = (0..ACCOUNTS).map(|id| (AccountId(id), server.add_account())).collect();
    let keys = Arc::new(keys);

    // The sources of all accounts share one HTTP client.
    let (base_url, client) = (server.uri(), TokenClient::new());
    let made = Arc::new(AtomicUsize::new(0));
    let providers = TokenProviders::builder({
        let (keys, made) = (Arc::clone(&keys), Arc::clone(&made));
        move |account: &AccountId| {
            let key = keys.get(account).ok_or(UnknownAccount(account.0))?;
            made.fetch_add(1, Relaxed);
            let source = ApiVideo::new(key).base_url(base_url.clone()).with_client(client.clone());
            Ok::<_, UnknownAccount>(TokenProvider::builder(source))
        }
    })
    .idle_timeout(IDLE_TIMEOUT)
    .build()?;
    let layer = BearerAuthLayer::by_key(providers.clone(), |head| {
        head.extensions.get::<AccountId>().map(Cow::Borrowed)
    });
    let api = Api {
        client: layer.layer(Client::builder(TokioExecutor::new()).build_http()),
        videos: format!("{}videos", server.uri()).parse()?,
    };
    let [mut seen, mut refused, mut unknown] = [(); 3].map(|()| Seen::default());

    // Each account's first request: one authentication with its key.
    api.send(&Method::POST, 0..ACCOUNTS, &mut seen).await;
    api.send(&Method::GET, 0..ACCOUNTS, &mut seen).await;

    // Some are revoked, some are removed, and some requests are for accounts that do not exist.
    let (revoked, removed) = (0..100, 500..550);
    revoked.clone().for_each(|id| server.revoke_access_tokens_of(&keys[&AccountId(id)]));
    removed.clone().for_each(|id| server.remove_account(&keys[&AccountId(id)]));
    let remaining = || (0..ACCOUNTS).filter(|id| !removed.contains(id));
    for _ in 0..3 {
        api.send(&Method::GET, removed.clone(), &mut refused).await;
        api.send(&Method::GET, ACCOUNTS..ACCOUNTS + 10, &mut unknown).await;
        api.send(&Method::GET, remaining(), &mut seen).await;
    }

    // Fifty stay busy, until all others were idle for so long that they are evicted.
    let busy = 0..50;
    let wait = async {
        while providers.len() > busy.len() {
            api.send(&Method::GET, busy.clone(), &mut seen).await;
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(10 * IDLE_TIMEOUT, wait).await?;
    let evicted = made.load(Relaxed) - providers.len();

    // The evicted ones come back with one authentication each.
    api.send(&Method::GET, removed.clone(), &mut refused).await;
    api.send(&Method::GET, remaining(), &mut seen).await;

    let counters = server.counters();
    println!("accounts                    {ACCOUNTS}, {} revoked, {} removed", revoked.len(), removed.len());
    println!("requests                    {}", seen.requests + refused.requests + unknown.requests);
    println!("  the account's videos      {}", seen.own);
    println!("  another account's videos  {}", seen.others + refused.others + unknown.others);
    println!("  of removed accounts       {} x 401, {} x typed error", refused.challenged, refused.rejected);
    println!("  of unknown accounts       {} x typed error", unknown.unknown);
    println!(
        "POST /auth/api-key          {}, {} rejected",
        counters.api_key_grants, counters.rejected_api_keys
    );
    println!(
        "POST /auth/refresh          {}, {} rejected",
        counters.refresh_grants, counters.rejected_refresh_tokens
    );
    println!("connections                 {}", counters.connections);
    println!("providers                   {evicted} evicted, {} now", providers.len());

    assert_eq!(seen.own, seen.requests, "each request of the others has its account's videos");
    assert_eq!(refused.challenged + refused.rejected, refused.requests);
    assert!(refused.rejected >= removed.len(), "one that has no token any more gets the reason");
    assert_eq!(unknown.unknown, unknown.requests);
    assert!(evicted >= ACCOUNTS as usize - busy.len());
    // Each provider authenticates once. A token that is revoked while its provider is evicted needs no refresh.
    let (with_key, with_refresh_token) = (counters.api_key_grants, counters.refresh_grants);
    assert!(with_key <= made.load(Relaxed) as u64 && with_refresh_token <= revoked.len() as u64);
    Ok(())
}

/// The API, for all accounts.
struct Api {
    client: BearerAuth<Client<HttpConnector, Full<Bytes>>>,
    videos: Uri,
}

/// How many requests there were, and what they got.
#[derive(Default)]
struct Seen {
    requests: usize,
    /// The account's own videos.
    own: usize,
    /// Videos of another account.
    others: usize,
    /// The API's own 401.
    challenged: usize,
    /// The error for a key that the auth endpoint rejects.
    rejected: usize,
    /// The factory's error.
    unknown: usize,
    /// Anything else.
    failed: usize,
}

impl Api {
    /// Sends a request for each account. A `POST` creates the account's only video, a `GET` lists its videos.
    async fn send(&self, method: &Method, accounts: impl IntoIterator<Item = u32>, seen: &mut Seen) {
        let requests = stream::iter(accounts).map(|id| async move { (id, self.request(method, id).await) });
        let mut answers = requests.buffer_unordered(CONCURRENT);
        while let Some((id, answer)) = answers.next().await {
            seen.requests += 1;
            let count = match answer {
                Ok((StatusCode::UNAUTHORIZED, _)) => &mut seen.challenged,
                Ok((status, body)) if status.is_success() && titles(&body) == [title(id)] => &mut seen.own,
                Ok((status, _)) if status.is_success() => &mut seen.others,
                Err(error) => match error.downcast_ref() {
                    Some(Error::Source(error)) if error.kind() == SourceErrorKind::Rejected => {
                        &mut seen.rejected
                    }
                    Some(Error::Factory(error)) if error.is::<UnknownAccount>() => &mut seen.unknown,
                    _ => &mut seen.failed,
                },
                Ok(_) => &mut seen.failed,
            };
            *count += 1;
        }
    }

    async fn request(&self, method: &Method, id: u32) -> Result<(StatusCode, Bytes), BoxError> {
        let film = format!(r#"{{"title": "{}"}}"#, title(id));
        let body = if method == Method::POST { Full::from(film) } else { Full::default() };
        let request =
            Request::builder().method(method).uri(&self.videos).extension(AccountId(id)).body(body)?;
        let response = self.client.clone().oneshot(request).await?;
        Ok((response.status(), response.into_body().collect().await?.to_bytes()))
    }
}

fn title(id: u32) -> String {
    format!("the film of account {id}")
}

/// The titles in a list of videos, or of one video.
fn titles(body: &[u8]) -> Vec<String> {
    let body: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
    let videos = body["data"].as_array().cloned().unwrap_or_else(|| vec![body]);
    videos.iter().map(|video| video["title"].as_str().unwrap_or_default().to_owned()).collect()
}

async fn kept_fresh() -> Result<(), BoxError> {
    let start = Instant::now();
    let refreshes = Arc::new(Mutex::new(Vec::new()));
    let providers = TokenProviders::builder({
        let refreshes = Arc::clone(&refreshes);
        move |_: &u32| {
            let refreshes = Arc::clone(&refreshes);
            let source = source_fn(move |request| {
                if request.previous().is_some() {
                    refreshes.lock().unwrap().push(start.elapsed());
                }
                async {
                    sleep(Duration::from_millis(100)).await;
                    Ok(Token::builder("a-token").expires_in(LIFETIME).build()?)
                }
            });
            Ok::<_, BoxError>(TokenProvider::builder(source).keep_fresh(true))
        }
    })
    .max_providers(2 * KEPT_FRESH as usize)
    .without_idle_timeout()
    .build()?;
    // All get their first token at one moment.
    let all = (0..KEPT_FRESH).map(|tenant| providers.get(&tenant)).collect::<Result<Vec<_>, _>>()?;
    join_all(all.iter().map(TokenProvider::token)).await;
    // No refresh is due before that, and the background tasks would wake up once a minute.
    advance(LIFETIME * 5 / 6).await;
    sleep_until(start + LIFETIME).await;

    let mut refreshes = std::mem::take(&mut *refreshes.lock().unwrap());
    refreshes.sort_unstable();
    assert_eq!(refreshes.len(), all.len(), "each tenant's token is refreshed once");
    assert!(providers.statuses().all(|(_, status)| status.refreshes == 2 && status.failed_refreshes == 0));
    let within_second = |(first, at): (usize, &Duration)| {
        refreshes[first..].partition_point(|other| *other < *at + Duration::from_secs(1))
    };
    let most = refreshes.iter().enumerate().map(within_second).max().unwrap_or_default();

    println!(
        "\n{KEPT_FRESH} tenants are kept fresh; their tokens were issued at one moment and live for an hour"
    );
    let (first, last) = (refreshes[0].as_secs(), refreshes[refreshes.len() - 1].as_secs());
    for from in (first..=last).step_by(4) {
        let count = refreshes.iter().filter(|at| (from..from + 4).contains(&at.as_secs())).count();
        println!("{:02}:{:02}  {:<60} {count}", from / 60, from % 60, "#".repeat(count / 12));
    }
    let share = 100.0 * most as f64 / refreshes.len() as f64;
    println!("at most {most} refreshes ({share:.1}%) start within one second");
    assert!(share < 5.0);
    Ok(())
}
