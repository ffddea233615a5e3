//! Callers are dropped at each of their polls. The refresh that they started continues, and the other callers get their
//! responses.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::Full;
use tokio::{runtime::Handle, task::JoinSet, time::sleep};
use tower::{Layer, ServiceExt};
use tower_bearer::{BearerAuthLayer, BoxError, RetryPolicy, SourceError, TokenProvider};

use crate::support::{Act, Api, HOUR, Source};

/// More polls than any request in this test needs.
const MOST_POLLS: usize = 12;

/// Drops its future after `polls` polls and then returns `None`.
struct DroppedAt<F> {
    future: Option<Pin<Box<F>>>,
    polls: usize,
}

impl<F: Future> Future for DroppedAt<F> {
    type Output = Option<F::Output>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if self.polls == 0 {
            self.future = None;
        }
        self.polls = self.polls.saturating_sub(1);
        match &mut self.future {
            Some(future) => future.as_mut().poll(cx).map(Some),
            None => Poll::Ready(None),
        }
    }
}

/// The situation of three callers.
#[derive(Clone, Copy, Debug)]
enum Scene {
    /// There is no token yet.
    Missing,
    /// The token is expiring.
    Expiring,
    /// The token has expired.
    Expired,
    /// The token is challenged; the next one is accepted.
    Challenged,
    /// Two tokens are challenged, so that there is a backoff.
    ChallengedTwice,
    /// The source fails once.
    Failing,
}

const SCENES: [Scene; 6] = [
    Scene::Missing,
    Scene::Expiring,
    Scene::Expired,
    Scene::Challenged,
    Scene::ChallengedTwice,
    Scene::Failing,
];

/// Drops two callers after the given numbers of polls and lets the third finish. Returns whether a caller was dropped
/// before it had finished.
async fn play(scene: Scene, first: usize, second: usize) -> bool {
    let source = Source::living(HOUR);
    let provider = TokenProvider::builder(Arc::clone(&source))
        .without_retry_budget()
        .cool_down(Duration::from_millis(1), Duration::from_millis(1))
        .build()
        .unwrap();
    let api = Api::default();
    let (before, good) = match scene {
        Scene::Missing | Scene::Failing => (0, 1),
        Scene::Expiring | Scene::Expired | Scene::Challenged => (1, 2),
        Scene::ChallengedTwice => (1, 3),
    };
    if before == 1 {
        provider.token().await.unwrap();
    }
    match scene {
        Scene::Expiring => {
            api.accept("access-1");
            sleep(HOUR * 95 / 100).await;
        }
        Scene::Expired => sleep(HOUR).await,
        Scene::Failing => source.next(Act::Fail(SourceError::unavailable("down"))),
        Scene::Missing | Scene::Challenged | Scene::ChallengedTwice => {}
    }
    let last = good + u64::from(matches!(scene, Scene::Failing));
    api.accept(&format!("access-{last}"));

    let retry = RetryPolicy::new().max_retries(5);
    let service = BearerAuthLayer::with_provider(provider.clone()).retry(retry).layer(api.service());
    let request = || Request::post("https://api.example/videos").body(Full::<Bytes>::from("body")).unwrap();
    let mut callers = JoinSet::new();
    for polls in [first, second, usize::MAX] {
        let future = Some(Box::pin(service.clone().oneshot(request())));
        callers.spawn(DroppedAt { future, polls });
    }
    let ends: Vec<Option<Result<_, BoxError>>> = callers.join_all().await;
    let dropped = ends.iter().any(Option::is_none);
    let mut answered = 0;
    for end in ends.into_iter().flatten() {
        assert_eq!(end.unwrap().status(), StatusCode::OK, "{scene:?}, {first}, {second}");
        answered += 1;
    }
    assert!(answered >= 1, "{scene:?}, {first}, {second}");

    // Background tasks end, and none is left.
    sleep(Duration::from_secs(5)).await;
    assert_eq!(source.fetches(), last, "{scene:?}, {first}, {second}");
    assert_eq!(provider.status().generation, good, "{scene:?}, {first}, {second}");
    assert!(!provider.status().refreshing);
    assert_eq!(Handle::current().metrics().num_alive_tasks(), 0, "{scene:?}, {first}, {second}");
    // Each refresh token was used once: no two fetches had the same previous token.
    let mut previous = source.previous.lock().unwrap().clone();
    if matches!(scene, Scene::Failing) {
        previous.remove(0);
    }
    let spent = previous.len();
    previous.dedup();
    assert_eq!(previous.len(), spent, "{scene:?}, {first}, {second}");
    dropped
}

/// A caller, a waiter or a response future is dropped at any poll.
#[tokio::test(start_paused = true)]
async fn drop_at_any_poll_loses_nothing() {
    let mut dropped = 0;
    for scene in SCENES {
        for first in 0..MOST_POLLS {
            for second in 0..MOST_POLLS {
                dropped += u64::from(play(scene, first, second).await);
            }
        }
        // No scene needs that many polls.
        assert!(
            !play(scene, MOST_POLLS, MOST_POLLS).await,
            "{scene:?} needs more polls than the test covers"
        );
    }
    assert!(dropped > 100, "{dropped}");
}
