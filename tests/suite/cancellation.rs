//! Callers are dropped at each of their polls. The refresh that they started continues, and the other callers get their
//! responses.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::Full;
use tokio::{runtime::Handle, task::JoinSet, time::sleep};
use tower::{Layer, ServiceExt};
use tower_bearer::{BoxError, RetryPolicy, SourceError};

use crate::support::{Act, HOUR, Scene, scene};

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
enum Situation {
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

const SITUATIONS: [Situation; 6] = [
    Situation::Missing,
    Situation::Expiring,
    Situation::Expired,
    Situation::Challenged,
    Situation::ChallengedTwice,
    Situation::Failing,
];

/// Drops two callers after the given numbers of polls and lets the third finish. Returns whether a caller was dropped
/// before it had finished.
async fn play(situation: Situation, first: usize, second: usize) -> bool {
    let instant = Duration::from_millis(1);
    let Scene { source, api, provider, layer, .. } = scene()
        .living(HOUR)
        .provider(|builder| builder.without_retry_budget().cool_down(instant, instant))
        .layer(|layer| layer.retry(RetryPolicy::new().max_retries(5)))
        .build();
    let (before, good) = match situation {
        Situation::Missing | Situation::Failing => (0, 1),
        Situation::Expiring | Situation::Expired | Situation::Challenged => (1, 2),
        Situation::ChallengedTwice => (1, 3),
    };
    if before == 1 {
        provider.token().await.unwrap();
    }
    match situation {
        Situation::Expiring => {
            api.accept("access-1");
            sleep(HOUR * 95 / 100).await;
        }
        Situation::Expired => sleep(HOUR).await,
        Situation::Failing => source.next(Act::Fail(SourceError::unavailable("down"))),
        Situation::Missing | Situation::Challenged | Situation::ChallengedTwice => {}
    }
    let last = good + u64::from(matches!(situation, Situation::Failing));
    api.accept(&format!("access-{last}"));

    let service = layer.layer(api.service());
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
        assert_eq!(end.unwrap().status(), StatusCode::OK, "{situation:?}, {first}, {second}");
        answered += 1;
    }
    assert!(answered >= 1, "{situation:?}, {first}, {second}");

    // Background tasks end, and none is left.
    sleep(Duration::from_secs(5)).await;
    assert_eq!(source.fetches(), last, "{situation:?}, {first}, {second}");
    assert_eq!(provider.status().generation, good, "{situation:?}, {first}, {second}");
    assert!(!provider.status().refreshing);
    assert_eq!(Handle::current().metrics().num_alive_tasks(), 0, "{situation:?}, {first}, {second}");
    // Each refresh token was used once: no two fetches had the same previous token.
    let mut previous = source.previous.lock().unwrap().clone();
    if matches!(situation, Situation::Failing) {
        previous.remove(0);
    }
    let spent = previous.len();
    previous.dedup();
    assert_eq!(previous.len(), spent, "{situation:?}, {first}, {second}");
    dropped
}

/// A caller, a waiter or a response future is dropped at any poll.
#[tokio::test(start_paused = true)]
async fn drop_at_any_poll_loses_nothing() {
    let mut dropped = 0;
    for situation in SITUATIONS {
        for first in 0..MOST_POLLS {
            for second in 0..MOST_POLLS {
                dropped += u64::from(play(situation, first, second).await);
            }
        }
        // No situation needs that many polls.
        assert!(
            !play(situation, MOST_POLLS, MOST_POLLS).await,
            "{situation:?} needs more polls than the test covers"
        );
    }
    assert!(dropped > 100, "{dropped}");
}
