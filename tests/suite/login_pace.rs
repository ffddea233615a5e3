//! When the refresh token of a login is presented: after a lost answer, a doubtful one, and a failure of the store.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use tokio::time::{Instant, advance, sleep};
use tower_bearer::{
    BoxError, OAuth2, SourceError, TokenClient, TokenProvider,
    oauth2::{ClientAuth, Server},
    source_fn,
};

use crate::support::{
    fleet::{self, Health, MINUTE},
    logins::{Act, SECOND, refreshing, stored, with_grace},
    runs,
};

/// Late in an outage, the server processes the request, and a gateway answers.
#[tokio::test(start_paused = true)]
async fn answer_of_gateway_late_in_outage() {
    for status in [502, 504] {
        let (auth, _) = with_grace(&["A"]);
        let times_out = Arc::new(AtomicBool::new(false));
        let client = TokenClient::with_service(tower::service_fn({
            let (auth, times_out) = (auth.clone(), Arc::clone(&times_out));
            move |request: Request<String>| {
                let (auth, times_out) = (auth.clone(), Arc::clone(&times_out));
                async move {
                    let answer = auth.answer(request).await;
                    if times_out.swap(false, Ordering::SeqCst) {
                        let answer = Response::builder().status(status).body(Full::<Bytes>::from("timeout"));
                        return Ok::<_, BoxError>(answer?);
                    }
                    answer
                }
            }
        }));
        let source =
            OAuth2::login(Server::token_endpoint("https://login.example/token"), ClientAuth::public("id"));
        let provider = TokenProvider::builder(source.with_client(client)).login("A").build().unwrap();
        auth.state().always = Some(Act::Answer(503, "text/plain", ""));
        let begun = Instant::now();
        while begun.elapsed() < MINUTE * 15 {
            provider.token().await.unwrap_err();
            sleep(SECOND).await;
        }
        auth.state().always = None;
        times_out.store(true, Ordering::SeqCst);
        while provider.token().await.is_err() {
            sleep(SECOND).await;
            assert!(
                auth.state().reused.is_empty(),
                "{status}: {:?}",
                auth.state().presented.iter().rev().take(4).collect::<Vec<_>>()
            );
        }
    }
}

/// The metadata are down. Then an answer is lost.
#[tokio::test(start_paused = true)]
async fn outage_of_metadata_loses_no_answer() {
    let (auth, _) = with_grace(&["A"]);
    let is_down = Arc::new(AtomicBool::new(true));
    let client = TokenClient::with_service(tower::service_fn({
        let (auth, is_down) = (auth.clone(), Arc::clone(&is_down));
        move |request: Request<String>| {
            let (auth, is_down) = (auth.clone(), Arc::clone(&is_down));
            async move {
                if request.uri().path().contains("well-known") {
                    let (status, body) = match is_down.load(Ordering::SeqCst) {
                        true => (503, ""),
                        false => (
                            200,
                            r#"{"issuer":"https://login.example","token_endpoint":"https://login.example/token"}"#,
                        ),
                    };
                    return Ok::<_, BoxError>(
                        Response::builder().status(status).body(Full::<Bytes>::from(body))?,
                    );
                }
                auth.answer(request).await
            }
        }
    }));
    let source = OAuth2::login(Server::issuer("https://login.example"), ClientAuth::public("id"));
    let provider = TokenProvider::builder(source.with_client(client)).login("A").build().unwrap();
    let begun = Instant::now();
    while begun.elapsed() < MINUTE * 15 {
        provider.token().await.unwrap_err();
        sleep(SECOND).await;
    }
    is_down.store(false, Ordering::SeqCst);
    auth.state().acts.push_back(Act::Lost(SECOND / 5));
    while provider.token().await.is_err() {
        sleep(SECOND).await;
        assert!(auth.state().reused.is_empty(), "{:?}", auth.state().presented);
    }
}

/// `ready` presents a doubtful refresh token, and the answer is lost.
#[tokio::test(start_paused = true)]
async fn answer_is_lost_in_doubt() {
    let mut lost = Vec::new();
    for has_store in [false, true] {
        let (auth, store) = with_grace(&["A"]);
        let mut builder = auth.builder("A");
        if has_store {
            builder = builder.store(store);
        }
        let provider = builder.build().unwrap();
        auth.state().acts.extend([Act::Answer(403, "application/json", ""), Act::Lost(SECOND / 5)]);
        provider.token().await.unwrap_err();
        sleep(SECOND * 5).await;
        let _ = provider.ready().await;
        let begun = Instant::now();
        while begun.elapsed() < MINUTE * 3 {
            let _ = provider.token().await;
            sleep(SECOND).await;
        }
        if !auth.state().reused.is_empty() {
            let presented = auth.state().presented.clone();
            let at: Vec<_> = presented.iter().map(|(at, _)| at.duration_since(presented[0].0)).collect();
            lost.push((has_store, at));
        }
    }
    assert!(lost.is_empty(), "{lost:?}");
}

/// An answer is lost while an ingress answers in place of the server.
#[tokio::test(start_paused = true)]
async fn answer_is_lost_between_those_of_ingress() {
    let mut lost = Vec::new();
    let page = Act::Answer(404, "text/html", "<html>default backend</html>");
    let client = Act::Answer(401, "application/json", r#"{"error":"invalid_client"}"#);
    for (name, act) in [("404", page), ("invalid_client", client)] {
        for before in [0, 10] {
            let (auth, _) = with_grace(&["A"]);
            let provider = auth.single("A");
            auth.state().always = Some(act);
            let begun = Instant::now();
            while begun.elapsed() < MINUTE * before {
                provider.token().await.unwrap_err();
                sleep(SECOND).await;
            }
            auth.state().always = None;
            auth.state().acts.extend([Act::Lost(SECOND / 5), act]);
            let from = auth.presented().len();
            let begun = Instant::now();
            while begun.elapsed() < MINUTE * 4 {
                let _ = provider.token().await;
                sleep(SECOND).await;
            }
            if !auth.state().reused.is_empty() {
                let presented = auth.state().presented[from..].to_vec();
                let at: Vec<_> = presented.iter().map(|(at, _)| at.duration_since(presented[0].0)).collect();
                lost.push((name, before, at));
            }
        }
    }
    assert!(lost.is_empty(), "{lost:?}");
}

/// An answer is lost, and the store fails for a moment.
#[tokio::test(start_paused = true)]
async fn answer_is_lost_while_store_fails() {
    let mut lost = Vec::new();
    for health in [Health::Down, Health::Misconfigured] {
        let (auth, store) = with_grace(&["A"]);
        let provider = auth.process(&store, "A");
        provider.token().await.unwrap();
        store.set(health);
        advance(MINUTE).await;
        let begun = Instant::now();
        while begun.elapsed() < MINUTE * 10 {
            let _ = provider.token().await;
            sleep(SECOND).await;
        }
        store.set(Health::Good);
        auth.state().acts.push_back(Act::Lost(SECOND / 5));
        let presented = auth.presented().len();
        while auth.presented().len() == presented {
            let _ = provider.token().await;
            sleep(SECOND / 5).await;
        }
        // For a second.
        store.set(health);
        let _ = provider.token().await;
        sleep(SECOND).await;
        store.set(Health::Good);
        let begun = Instant::now();
        while begun.elapsed() < MINUTE * 3 {
            let _ = provider.token().await;
            sleep(SECOND).await;
        }
        if !auth.state().reused.is_empty() {
            lost.push(health);
        }
    }
    assert!(lost.is_empty(), "{lost:?}");
}

/// A refresh token is doubtful while the access token has no lifetime, for several processes.
#[tokio::test(start_paused = true)]
async fn doubt_beside_token_without_lifetime() {
    let (auth, store) = with_grace(&["A"]);
    auth.state().lifetime = 0;
    let processes: Vec<_> = (0..8).map(|_| auth.process(&store, "A")).collect();
    let mut tokens = Vec::new();
    for process in &processes {
        tokens.push(process.token().await.unwrap());
    }
    auth.state().always = Some(Act::Answer(403, "application/json", ""));
    let begun = Instant::now();
    while begun.elapsed() < MINUTE * 20 {
        for (process, token) in processes.iter().zip(&tokens) {
            let _ = process.refresh(token).await;
        }
        sleep(SECOND * 5).await;
    }
    let presented = auth.presented().len() - 1;
    assert!(presented <= 21, "{presented} in 20 min");
}

/// A refresh token is doubtful while the access token ends soon.
#[tokio::test(start_paused = true)]
async fn doubt_beside_token_that_ends_soon() {
    let (auth, store) = with_grace(&["A"]);
    auth.state().lifetime = 100;
    let processes: Vec<_> = (0..8).map(|_| auth.process(&store, "A")).collect();
    for process in &processes {
        process.token().await.unwrap();
    }
    advance(SECOND * 95).await;
    auth.state().always = Some(Act::Answer(403, "application/json", ""));
    let begun = Instant::now();
    while begun.elapsed() < MINUTE {
        for process in &processes {
            let _ = process.token().await;
        }
        sleep(SECOND).await;
    }
    let presented = auth.state().presented.clone();
    let presented: Vec<_> =
        presented.iter().skip(1).map(|(at, token)| (at.duration_since(begun), token)).collect();
    assert!(presented.len() <= 1, "{presented:?}");
}

/// `ready` is called at the start, hours before the refresh token is doubtful.
#[tokio::test(start_paused = true)]
async fn ready_at_start_and_doubt_later() {
    let (auth, store) = with_grace(&["A"]);
    auth.state().lifetime = 36_000;
    let processes: Vec<_> = (0..8).map(|_| auth.process(&store, "A")).collect();
    for process in &processes {
        process.ready().await.unwrap();
    }
    advance(SECOND * 33_000).await;
    auth.state().always = Some(Act::Answer(403, "application/json", ""));
    let begun = Instant::now();
    while begun.elapsed() < MINUTE - SECOND {
        for process in &processes {
            process.token().await.unwrap();
        }
        sleep(SECOND * 5).await;
    }
    let presented = auth.presented().len() - 1;
    assert!(presented <= 1, "{presented} in a minute");
}

/// The store fails while one process exchanges the refresh token, and another one has seen that.
#[tokio::test(start_paused = true)]
async fn mark_was_seen_before_outage() {
    let mut lost = Vec::new();
    for health in [Health::Down, Health::ReadOnly, Health::Slow] {
        for round in 0..runs(40) {
            let mut random = fleet::Chance(round);
            let (auth, store) = with_grace(&["A"]);
            let one = auth.process(&store, "A");
            let other = auth.process(&store, "A");
            one.token().await.unwrap();
            other.token().await.unwrap();
            advance(MINUTE).await;
            refreshing(&one, &auth, SECOND * 6).await;
            let waits = tokio::spawn({
                let other = other.clone();
                async move { other.token().await }
            });
            sleep(SECOND * 4).await;
            store.set(health);
            let until = Instant::now() + Duration::from_millis(20_000 + random.draw(200_000));
            let calls: Vec<_> = [&one, &other]
                .into_iter()
                .map(|process| {
                    let process = process.clone();
                    tokio::spawn(async move {
                        while Instant::now() < until + MINUTE {
                            let _ = process.token().await;
                            sleep(Duration::from_millis(50)).await;
                        }
                    })
                })
                .collect();
            tokio::time::sleep_until(until).await;
            store.set(Health::Good);
            for call in calls {
                call.await.unwrap();
            }
            let _ = waits.await;
            if !auth.state().reused.is_empty() {
                lost.push((health, round));
            }
        }
    }
    assert!(lost.is_empty(), "{}: {:?}", lost.len(), &lost[..lost.len().min(20)]);
}

/// The store is flushed while the server fails.
#[tokio::test(start_paused = true)]
async fn flush_during_outage_of_server() {
    let (auth, store) = with_grace(&["A"]);
    let one = auth.process(&store, "A");
    one.token().await.unwrap();
    advance(MINUTE).await;
    auth.state().always = Some(Act::Answer(503, "text/plain", ""));
    one.token().await.unwrap_err();
    store.flush();
    let presented = auth.presented().len();
    let begun = Instant::now();
    while begun.elapsed() < MINUTE * 10 {
        let _ = one.token().await;
        sleep(SECOND).await;
    }
    assert!(auth.presented().len() > presented + 3);
    let text = stored(&store);
    // The next process.
    auth.state().always = None;
    let other = auth.process(&store, "A");
    let got = other.token().await;
    assert!(
        got.is_ok() && auth.state().reused.is_empty(),
        "{got:?} {:?} {text}",
        auth.presented().iter().rev().take(3).collect::<Vec<_>>()
    );
}

/// The store fails for a random time. Returns the longest time from its recovery to a token.
async fn slowest_recovery(health: Health) -> Duration {
    let mut worst = Duration::ZERO;
    for round in 0..10_u64 {
        let mut random = fleet::Chance(round);
        let (auth, store) = with_grace(&["A"]);
        let one = auth.process(&store, "A");
        let other = auth.process(&store, "A");
        one.token().await.unwrap();
        other.token().await.unwrap();
        advance(MINUTE).await;
        drop(one);
        auth.state().acts.clear();
        store.set(health);
        let until = Instant::now() + Duration::from_millis(60_000 + random.draw(600_000));
        while Instant::now() < until {
            let _ = tokio::time::timeout_at(until, other.token()).await;
            sleep(SECOND).await;
        }
        store.set(Health::Good);
        let begun = Instant::now();
        while other.token().await.is_err() {
            sleep(Duration::from_millis(50)).await;
        }
        worst = worst.max(begun.elapsed());
    }
    worst
}

/// The store of a login is down, and is back: the login follows with backoff, which is at most 5 s.
#[tokio::test(start_paused = true)]
async fn login_heals_soon_after_store() {
    for health in [Health::Down, Health::ReadOnly, Health::Full, Health::Forgetful, Health::Misconfigured] {
        let worst = slowest_recovery(health).await;
        assert!(worst <= SECOND * 11 / 2, "{health:?}: {worst:?}");
    }
}

/// A token was not taken by its refresh, and the store fails or is flushed.
#[tokio::test(start_paused = true)]
async fn untaken_token_is_stored_again() {
    for case in [1, 2, 4, 0, 3] {
        let (auth, store) = with_grace(&["A"]);
        auth.state().lifetime = 3600;
        let one = auth.builder("A").store(store.clone()).refresh_timeout(SECOND * 2).build().unwrap();
        auth.state().acts.push_back(Act::Slow(SECOND * 5));
        one.token().await.unwrap_err();
        match case {
            1 => store.set(Health::Down),
            2 => store.set(Health::ReadOnly),
            _ => {}
        }
        sleep(SECOND * 10).await;
        match case {
            0 => store.flush(),
            3 => {
                store.flush();
                store.set(Health::Down)
            }
            4 => store.set(Health::Misconfigured),
            _ => {}
        }
        let mut got = one.token().await;
        for _ in 0..60 {
            if got.is_ok() {
                break;
            }
            sleep(SECOND).await;
            got = one.token().await;
        }
        assert!(got.is_ok(), "{case} {got:?}");
        store.set(Health::Good);
        sleep(MINUTE).await;
        let other = auth.process(&store, "A").token().await;
        assert!(
            other.is_ok() && auth.state().reused.is_empty(),
            "{case} {other:?} {:?} {}",
            auth.presented(),
            stored(&store)
        );
    }
}

/// A source that asks for no delay after a permanent failure is asked after the shortest cool-down.
#[tokio::test(start_paused = true)]
async fn permanent_failure_has_shortest_cool_down() {
    let asked = Arc::new(AtomicU32::new(0));
    let source = source_fn({
        let asked = Arc::clone(&asked);
        move |_| {
            asked.fetch_add(1, Ordering::SeqCst);
            async { Err(SourceError::rejected("the key was rejected").with_retry_after(Duration::ZERO)) }
        }
    });
    let provider = TokenProvider::new(source);
    for _ in 0..60 {
        provider.token().await.unwrap_err();
        sleep(SECOND / 4).await;
    }
    let asked = asked.load(Ordering::SeqCst);
    assert!((10..=16).contains(&asked), "{asked}");
}
