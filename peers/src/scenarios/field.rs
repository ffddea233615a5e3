//! The field's faults, from public bug reports of similar software.

use std::{
    path::PathBuf,
    process,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{Response, StatusCode, header::CONTENT_TYPE};
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};
use tower_bearer_testing::{AuthServer, Fault, Route};

use super::{PATIENCE, SHORT_PATIENCE, Scale, join, milliseconds, send_at_rate};
use crate::{
    BoxError,
    fronts::{Compressing, DyingPath},
    peer::{AHEAD, CONFIGURED, DUE, Info, Peer, Setup},
    server::{posts, setup, start},
};

/// What is known of a peer's login, where it has one.
fn the_login(info: &Info, server: &AuthServer, works: bool) -> String {
    match info.no_refresh_token {
        Some(reason) => format!("no: {reason}"),
        None if works && server.counters().reused_refresh_tokens == 0 => "kept".into(),
        None => "lost".into(),
    }
}

/// The setup with a login, for peers that can use one.
async fn with_login(info: &Info, server: &AuthServer, ahead: Option<Duration>) -> Result<Setup, BoxError> {
    let mut setup = setup(server, ahead).await?;
    if info.no_refresh_token.is_none() {
        setup.refresh_token = Some(server.log_in());
    }
    Ok(setup)
}

/// Sends one request, with a limit.
async fn works(peer: &dyn Peer) -> bool {
    matches!(timeout(PATIENCE, peer.get()).await, Ok(Ok(status)) if status.is_success())
}

async fn first_request(peer: &dyn Peer) -> Result<(), BoxError> {
    if works(peer).await { Ok(()) } else { Err("the first request has failed".into()) }
}

/// Builds the peer with a login and a token that has expired when the first request is sent, where no task of the peer
/// has replaced it. Before that, `prepare` injects the faults.
async fn with_expired_token(
    info: &Info,
    prepare: impl FnOnce(&AuthServer),
) -> Result<(AuthServer, Arc<dyn Peer>), BoxError> {
    let (lifetime, ahead) = if info.in_background { (info.lifetime, Some(AHEAD)) } else { (DUE, None) };
    let server = start(lifetime).await?;
    let peer = (info.build)(with_login(info, &server, ahead).await?).await?;
    first_request(&*peer).await?;
    server.set_token_lifetime(Duration::from_secs(3600));
    prepare(&server);
    sleep(DUE + Duration::from_secs(1)).await;
    Ok((server, peer))
}

/// The connections to the token endpoint have died when the token is due. The token works all the time.
pub(super) async fn dead_connection(info: &Info, scale: Scale) -> Result<Vec<String>, BoxError> {
    // More than the 30 s of a usual timeout are left, as there would be with tokens that live an hour.
    let (due, ahead) = (Duration::from_secs(5), Duration::from_secs(45));
    let is_fixed = info.lifetime != CONFIGURED;
    let server = start(if is_fixed { info.lifetime - DUE + due } else { due + ahead }).await?;
    let path = DyingPath::new();
    let mut setup = Setup { due, ..with_login(info, &server, Some(ahead)).await? };
    setup.token_endpoint = path.to(&setup.token_endpoint).await?;
    setup.metadata = path.to(&setup.metadata).await?;
    let peer = (info.build)(setup).await?;
    first_request(&*peer).await?;
    let before = posts(&server);
    path.die();
    sleep(due).await;
    let length = Duration::from_secs(if scale.brief { 5 } else { 40 });
    let begun = Instant::now();
    let refreshed = async {
        while posts(&server) == before && begun.elapsed() < length {
            sleep(Duration::from_millis(20)).await;
        }
        (posts(&server) > before).then(|| begun.elapsed())
    };
    let (requests, refreshed) = tokio::join!(send_at_rate(&peer, 20, length, SHORT_PATIENCE), refreshed);
    let seen = join(requests).await;
    let refreshed = refreshed.map_or_else(|| format!("> {} s", length.as_secs()), seconds);
    Ok(vec![seen.unsuccessful(), seen.waited.to_string(), refreshed])
}

fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}

/// A proxy compresses what the token endpoint answers, unless the request says that it must not.
pub(super) async fn compressed(info: &Info) -> Result<Vec<String>, BoxError> {
    let server = start(Duration::from_secs(3600)).await?;
    let proxy = Compressing::new()?;
    let mut setup = with_login(info, &server, None).await?;
    setup.token_endpoint = proxy.to(&setup.token_endpoint).await?;
    setup.metadata = proxy.to(&setup.metadata).await?;
    // Some peers fetch the first token here.
    let peer = timeout(PATIENCE, (info.build)(setup)).await?;
    let response = match &peer {
        Ok(peer) => timeout(PATIENCE, peer.get()).await.unwrap_or_else(|elapsed| Err(elapsed.into())),
        Err(error) => Err(error.to_string().into()),
    };
    let response = response.map_or_else(|_| "failed".into(), |status| status.as_u16().to_string());
    proxy.stop();
    let works = match peer {
        Ok(peer) => works(&*peer).await,
        Err(_) => false,
    };
    Ok(vec![response, the_login(info, &server, works)])
}

/// The connection is reset in two exchanges in a row. The server has not processed them.
pub(super) async fn two_resets(info: &Info, scale: Scale) -> Result<Vec<String>, BoxError> {
    let reset_twice = |server: &AuthServer| {
        for _ in 0..2 {
            server.inject(Route::OAuthToken, Fault::Reset);
        }
    };
    let (server, peer) = with_expired_token(info, reset_twice).await?;
    let requests = send_at_rate(&peer, scale.rate(), Duration::from_secs(3), PATIENCE).await;
    let seen = join(requests).await;
    let works = works(&*peer).await;
    Ok(vec![seen.unsuccessful(), the_login(info, &server, works), milliseconds(seen.last)])
}

/// The token endpoint rejects the refresh token in a form that is not that of RFC 6749 §5.2.
pub(super) async fn odd_rejections(info: &Info, scale: Scale) -> Result<Vec<String>, BoxError> {
    if info.no_refresh_token.is_some() {
        return Ok(vec!["no".into(); 4]);
    }
    let unauthorized = (StatusCode::UNAUTHORIZED, "application/json", json!({ "error": "invalid_token" }));
    // api.video's.
    let problem = json!({
        "type": "https://docs.api.video/reference/authentication-invalid-user-credentials",
        "title": "The user credentials were incorrect.",
        "status": 400,
    });
    let problem = (StatusCode::BAD_REQUEST, "application/problem+json", problem);
    let mut cells = Vec::new();
    for rejection in [unauthorized, problem] {
        cells.extend(odd_rejection(info, rejection, scale).await?);
    }
    Ok(cells)
}

async fn odd_rejection(
    info: &Info,
    (status, content_type, body): (StatusCode, &str, Value),
    scale: Scale,
) -> Result<[String; 2], BoxError> {
    let mut response = Response::new(Bytes::from(body.to_string()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, content_type.parse()?);
    let (server, peer) = with_expired_token(info, |server| {
        server.inject_always(Route::OAuthToken, Fault::Answer(response));
    })
    .await?;
    let requests = send_at_rate(&peer, scale.rate(), Duration::from_secs(7), SHORT_PATIENCE).await;
    // There are no other faults.
    let posts = server.counters().faults;
    join(requests).await;
    let outcome =
        timeout(SHORT_PATIENCE, peer.get()).await.map_err(BoxError::from).and_then(|outcome| outcome);
    let reported = if peer.asks_for_login(&outcome) { "yes" } else { "no" };
    Ok([posts.to_string(), reported.into()])
}

/// The process restarts with what it has stored: with the login of its configuration, or with another user's.
pub(super) async fn restart(info: &Info) -> Result<Vec<String>, BoxError> {
    if !info.has_store {
        return Ok(vec!["no".into(); 2]);
    }
    let folder = folder()?;
    let kept = restart_with_same(info, folder.join("same")).await;
    let used = restart_with_another(info, folder.join("another")).await;
    std::fs::remove_dir_all(&folder)?;
    Ok(vec![kept?, used?])
}

/// A new folder in the system's folder for temporary files.
fn folder() -> Result<PathBuf, BoxError> {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let folder = std::env::temp_dir().join(format!("tower-bearer-peers-{}-{number}", process::id()));
    for name in ["same", "another"] {
        std::fs::create_dir_all(folder.join(name))?;
    }
    Ok(folder)
}

/// Sends a request with a login, which is spent and stored. Returns the setup.
async fn before_restart(info: &Info, server: &AuthServer, state: PathBuf) -> Result<Setup, BoxError> {
    let mut setup = with_login(info, server, None).await?;
    setup.state = Some(state);
    let peer = (info.build)(setup.clone()).await?;
    first_request(&*peer).await?;
    Ok(setup)
}

async fn restart_with_same(info: &Info, state: PathBuf) -> Result<String, BoxError> {
    let server = start(Duration::from_secs(3600)).await?;
    let setup = before_restart(info, &server, state).await?;
    server.revoke_access_tokens();
    let peer = (info.build)(setup).await?;
    let works = works(&*peer).await;
    Ok(the_login(info, &server, works))
}

async fn restart_with_another(info: &Info, state: PathBuf) -> Result<String, BoxError> {
    let server = start(Duration::from_secs(3600)).await?;
    let mut setup = before_restart(info, &server, state).await?;
    let refresh_token = server.log_in();
    setup.refresh_token = Some(refresh_token.clone());
    let peer = (info.build)(setup).await?;
    first_request(&*peer).await?;
    // The peer has spent this refresh token if it used it.
    let client = reqwest::Client::builder().no_proxy().build()?;
    let form = [("grant_type", "refresh_token"), ("refresh_token", &refresh_token)];
    let request = client.post(server.token_endpoint()).form(&form);
    let request = request.basic_auth(server.client_id(), Some(server.client_secret()));
    let is_unspent = request.send().await?.status().is_success();
    Ok(if is_unspent { "not used" } else { "used" }.into())
}
