//! The scenarios. Each runs one peer against a server of its own, and counts at the server and at the callers.

mod field;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use http::StatusCode;
use serde_json::{Value, json};
use tokio::{
    task::JoinSet,
    time::{MissedTickBehavior, interval, sleep, timeout},
};
use tower_bearer_testing::{AuthServer, Fault, Route};

use crate::{
    BoxError, happy,
    peer::{AHEAD, DUE, Info, Peer},
    server::{LATENCY, challenge, posts, setup, slow, start},
};

/// A name, and the names of its figures.
pub type Scenario = (&'static str, &'static [&'static str]);

pub static SCENARIOS: [Scenario; 16] = [
    ("cold start", &["POSTs", "failed", "last response after"]),
    ("refresh under load", &["POSTs", "failed or 401", "waited"]),
    ("expired while idle", &["POSTs", "failed or 401", "waited"]),
    ("revocation", &["POSTs", "failed", "401 to the caller", "last response after"]),
    ("late 401", &["POSTs", "the late request"]),
    ("caller dropped in the exchange", &["the login"]),
    ("token endpoint fails", &["failed or 401", "waited", "POSTs in 7 s"]),
    ("token endpoint hangs", &["failed or 401", "waited", "POSTs in 7 s"]),
    ("401 indefinitely", &["POSTs per minute", "API requests per request"]),
    ("upload refused midway", &["response", "sent again"]),
    ("dead connection", &["failed or 401", "waited", "refreshed after"]),
    ("gzip", &["response", "the login"]),
    ("two resets", &["failed or 401", "the login", "last response after"]),
    (
        "odd rejection",
        &["401: POSTs in 7 s", "401: asks for a login", "400: POSTs in 7 s", "400: asks for a login"],
    ),
    ("restart", &["the same login", "another login"]),
    ("happy path", &["ns", "instructions", "allocations"]),
];

#[derive(Clone, Copy)]
pub struct Scale {
    pub brief: bool,
}

impl Scale {
    /// The number of callers at one moment, or of requests per second.
    pub fn callers(self) -> usize {
        if self.brief { 50 } else { 1_000 }
    }

    /// The number of requests per second while a fault lasts.
    fn rate(self) -> usize {
        if self.brief { 20 } else { 100 }
    }
}

/// How long a caller waits for a response.
const PATIENCE: Duration = Duration::from_secs(15);

/// The same while the token endpoint does not work.
const SHORT_PATIENCE: Duration = Duration::from_secs(5);

/// Returns the figures of a scenario.
pub async fn run(scenario: &str, info: &Info, scale: Scale) -> Result<Vec<String>, BoxError> {
    match scenario {
        "cold start" => cold_start(info, scale).await,
        "refresh under load" => refresh_under_load(info, scale).await,
        "expired while idle" => expired_while_idle(info, scale).await,
        "revocation" => revocations(info, scale).await,
        "late 401" => late_challenge(info).await,
        "caller dropped in the exchange" => dropped_caller(info).await,
        "token endpoint fails" => outage(info, Fault::Status(StatusCode::SERVICE_UNAVAILABLE), scale).await,
        "token endpoint hangs" => outage(info, Fault::Hang, scale).await,
        "401 indefinitely" => always_challenged(info, scale).await,
        "upload refused midway" => refused_upload(info).await,
        "dead connection" => field::dead_connection(info, scale).await,
        "gzip" => field::compressed(info).await,
        "two resets" => field::two_resets(info, scale).await,
        "odd rejection" => field::odd_rejections(info, scale).await,
        "restart" => field::restart(info).await,
        "happy path" => happy::figures(info, scale.brief).await,
        _ => Err(format!("there is no scenario '{scenario}'").into()),
    }
}

/// What callers have seen.
#[derive(Default)]
struct Seen {
    failed: usize,
    challenged: usize,
    waited: usize,
    last: Duration,
}

impl Seen {
    fn add(&mut self, outcome: &Result<StatusCode, BoxError>, took: Duration) {
        match outcome {
            Ok(StatusCode::UNAUTHORIZED) => self.challenged += 1,
            // The API answers at once, and an exchange takes twice as long.
            Ok(status) if status.is_success() => self.waited += usize::from(took >= LATENCY / 2),
            Ok(_) | Err(_) => self.failed += 1,
        }
        self.last = self.last.max(took);
    }

    fn unsuccessful(&self) -> String {
        (self.failed + self.challenged).to_string()
    }
}

type Requests = JoinSet<(Result<StatusCode, BoxError>, Duration)>;

fn send(peer: &Arc<dyn Peer>, patience: Duration, requests: &mut Requests) {
    let peer = Arc::clone(peer);
    requests.spawn(async move {
        let sent = Instant::now();
        let outcome = timeout(patience, peer.get()).await;
        (outcome.unwrap_or_else(|elapsed| Err(elapsed.into())), sent.elapsed())
    });
}

async fn join(requests: Requests) -> Seen {
    let mut seen = Seen::default();
    for (outcome, took) in requests.join_all().await {
        seen.add(&outcome, took);
    }
    seen
}

/// Sends one request each at once.
async fn burst(peer: &Arc<dyn Peer>, callers: usize) -> Seen {
    let mut requests = Requests::new();
    (0..callers).for_each(|_| send(peer, PATIENCE, &mut requests));
    join(requests).await
}

/// Sends at a steady rate, without waiting for earlier responses.
async fn send_at_rate(
    peer: &Arc<dyn Peer>,
    per_second: usize,
    length: Duration,
    patience: Duration,
) -> Requests {
    let mut ticks = interval(Duration::from_secs(1) / u32::try_from(per_second).expect("a small number"));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut requests = Requests::new();
    for _ in 0..per_second as u64 * length.as_secs() {
        ticks.tick().await;
        send(peer, patience, &mut requests);
    }
    requests
}

/// Builds the peer and sends the first request.
async fn warm(info: &Info, server: &AuthServer, ahead: Option<Duration>) -> Result<Arc<dyn Peer>, BoxError> {
    let peer = (info.build)(setup(server, ahead).await?).await?;
    let status = peer.get().await?;
    if status.is_success() { Ok(peer) } else { Err(format!("the first request got a {status}").into()) }
}

fn milliseconds(duration: Duration) -> String {
    format!("{} ms", duration.as_millis())
}

async fn cold_start(info: &Info, scale: Scale) -> Result<Vec<String>, BoxError> {
    let server = start(Duration::from_secs(3600)).await?;
    slow(&server);
    let setup = setup(&server, None).await?;
    let begun = Instant::now();
    // Some peers fetch the first token here.
    let peer = (info.build)(setup).await?;
    let seen = burst(&peer, scale.callers()).await;
    Ok(vec![posts(&server).to_string(), seen.unsuccessful(), milliseconds(begun.elapsed())])
}

async fn refresh_under_load(info: &Info, scale: Scale) -> Result<Vec<String>, BoxError> {
    let server = start(info.lifetime).await?;
    let peer = warm(info, &server, Some(AHEAD)).await?;
    slow(&server);
    let before = posts(&server);
    // Ends before the next token is due.
    let requests = send_at_rate(&peer, scale.callers(), DUE + Duration::from_secs(2), PATIENCE).await;
    let seen = join(requests).await;
    Ok(vec![(posts(&server) - before).to_string(), seen.unsuccessful(), seen.waited.to_string()])
}

async fn expired_while_idle(info: &Info, scale: Scale) -> Result<Vec<String>, BoxError> {
    // A token that expires, for peers that refresh on request only. The others have the next one in time.
    let (lifetime, ahead) = if info.in_background { (info.lifetime, Some(AHEAD)) } else { (DUE, None) };
    let server = start(lifetime).await?;
    let peer = warm(info, &server, ahead).await?;
    server.set_token_lifetime(Duration::from_secs(3600));
    slow(&server);
    let before = posts(&server);
    sleep(DUE + Duration::from_secs(1)).await;
    let seen = burst(&peer, scale.callers()).await;
    Ok(vec![(posts(&server) - before).to_string(), seen.unsuccessful(), seen.waited.to_string()])
}

/// The figures differ from run to run, as they depend on the order of the callers.
async fn revocations(info: &Info, scale: Scale) -> Result<Vec<String>, BoxError> {
    let mut runs = Vec::new();
    for _ in 0..if scale.brief { 1 } else { 5 } {
        runs.push(revocation(info, scale).await?);
    }
    let figures = (0..4).map(|at| {
        let run = || runs.iter().map(|run| run[at]);
        let (least, most) = (run().min().unwrap_or_default(), run().max().unwrap_or_default());
        let unit = if at == 3 { " ms" } else { "" };
        if least == most { format!("{most}{unit}") } else { format!("{least} to {most}{unit}") }
    });
    Ok(figures.collect())
}

async fn revocation(info: &Info, scale: Scale) -> Result<[u128; 4], BoxError> {
    let server = start(Duration::from_secs(3600)).await?;
    let peer = warm(info, &server, None).await?;
    slow(&server);
    let before = posts(&server);
    server.revoke_access_tokens();
    let seen = burst(&peer, scale.callers()).await;
    let posts = posts(&server) - before;
    Ok([posts.into(), seen.failed as u128, seen.challenged as u128, seen.last.as_millis()])
}

/// A request is sent with a token that is revoked and replaced before the API answers it.
async fn late_challenge(info: &Info) -> Result<Vec<String>, BoxError> {
    if !info.on_401 {
        return Ok(vec!["no".into(); 2]);
    }
    let server = start(Duration::from_secs(3600)).await?;
    let peer = warm(info, &server, None).await?;
    let before = posts(&server);
    server.inject(Route::Api, Fault::Delay(Duration::from_secs(1)));
    let slow = Arc::clone(&peer);
    let late = tokio::spawn(async move { slow.get().await });
    sleep(Duration::from_millis(200)).await;
    server.revoke_access_tokens();
    for _ in 0..2 {
        peer.get().await?;
    }
    let late = late.await??;
    peer.get().await?;
    Ok(vec![(posts(&server) - before).to_string(), late.as_u16().to_string()])
}

/// Callers that wait for 100 ms each, while a refresh takes more than half a second. The token endpoint spends the
/// refresh token first.
async fn dropped_caller(info: &Info) -> Result<Vec<String>, BoxError> {
    if let Some(reason) = info.no_refresh_token {
        return Ok(vec![format!("no: {reason}")]);
    }
    let server = start(info.lifetime).await?;
    let mut setup = setup(&server, Some(AHEAD)).await?;
    setup.refresh_token = Some(server.log_in());
    let peer = (info.build)(setup).await?;
    peer.get().await?;
    server.inject_always(Route::OAuthToken, Fault::Drip(Duration::from_millis(2)));
    let begun = Instant::now();
    while begun.elapsed() < DUE + Duration::from_secs(2) {
        // An error here is the loss that the last request shows.
        let _ = timeout(Duration::from_millis(100), peer.get()).await;
        sleep(Duration::from_millis(5)).await;
    }
    server.clear_faults();
    sleep(Duration::from_secs(1)).await;
    let last = peer.get().await.is_ok_and(|status| status.is_success());
    let kept = last && server.counters().reused_refresh_tokens == 0;
    if kept && server.counters().oauth_refresh_grants < 2 {
        return Err("no refresh was running".into());
    }
    Ok(vec![if kept { "kept" } else { "lost" }.into()])
}

/// From before the token is due, the token endpoint does not work. The token does, for all of the time.
async fn outage(info: &Info, fault: Fault, scale: Scale) -> Result<Vec<String>, BoxError> {
    let server = start(info.lifetime).await?;
    let peer = warm(info, &server, Some(AHEAD)).await?;
    server.inject_always(Route::OAuthToken, fault);
    sleep(DUE).await;
    let requests = send_at_rate(&peer, scale.rate(), Duration::from_secs(7), SHORT_PATIENCE).await;
    // There are no other faults.
    let posts = server.counters().faults;
    let seen = join(requests).await;
    Ok(vec![seen.unsuccessful(), seen.waited.to_string(), posts.to_string()])
}

async fn always_challenged(info: &Info, scale: Scale) -> Result<Vec<String>, BoxError> {
    let length = Duration::from_secs(if scale.brief { 2 } else { 60 });
    let server = start(Duration::from_secs(3600)).await?;
    let peer = warm(info, &server, None).await?;
    let before = posts(&server);
    server.inject_always(Route::Api, challenge());
    let seen = join(send_at_rate(&peer, scale.rate(), length, PATIENCE).await).await;
    let per_minute = (posts(&server) - before) * 60 / length.as_secs();
    // There are no other faults.
    let amplification = server.counters().faults as f64 / (seen.challenged + seen.failed) as f64;
    Ok(vec![per_minute.to_string(), format!("{amplification:.1}")])
}

/// Eight megabytes are sent with a token that is revoked. The API responds after the head.
async fn refused_upload(info: &Info) -> Result<Vec<String>, BoxError> {
    const CHUNKS: usize = 128;
    let server = start(Duration::from_secs(3600)).await?;
    let peer = warm(info, &server, None).await?;
    let url = format!("{}videos/{}/source", server.uri(), new_video(&server).await?);
    server.revoke_access_tokens();
    let outcome = peer.upload(&url, CHUNKS).await;
    let uploaded = server.uploads().iter().any(|upload| upload.bytes == CHUNKS as u64 * 64 * 1024);
    let response = match outcome {
        Ok(status) if status.is_success() != uploaded => return Err(format!("{status} is wrong").into()),
        Ok(status) => status.as_u16().to_string(),
        Err(_) => "failed".into(),
    };
    Ok(vec![response, info.upload.into()])
}

/// Creates a video with a token that is not the peer's.
async fn new_video(server: &AuthServer) -> Result<String, BoxError> {
    let client = reqwest::Client::builder().no_proxy().build()?;
    let request = client.post(server.token_endpoint()).form(&[("grant_type", "client_credentials")]);
    let request = request.basic_auth(server.client_id(), Some(server.client_secret()));
    let token: Value = request.send().await?.json().await?;
    let token = token["access_token"].as_str().ok_or("there is no access token")?;
    let request = client.post(format!("{}videos", server.uri())).json(&json!({ "title": "a film" }));
    let video: Value = request.bearer_auth(token).send().await?.json().await?;
    Ok(video["videoId"].as_str().ok_or("there is no video")?.to_owned())
}
