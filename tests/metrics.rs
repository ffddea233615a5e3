//! Every documented metric is recorded with its name and its labels.
#![cfg(feature = "metrics")]

#[path = "support/fleet.rs"]
mod fleet;
mod support;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use http::StatusCode;
use metrics_util::{
    MetricKind,
    debugging::{DebugValue, DebuggingRecorder, Snapshotter},
};
use support::{Act, Api, Source, get};
use tower::{Layer, ServiceExt};
use tower_bearer::{BearerAuthLayer, RetryPolicy, SourceError, TokenProvider};

/// Maps each metric, as `name{a=b}`, to its value, or for a histogram to the number of its values.
fn metrics_of(snapshotter: &Snapshotter) -> BTreeMap<String, u64> {
    let metrics = snapshotter.snapshot().into_vec().into_iter();
    let recorded = metrics.map(|(key, unit, description, value)| {
        assert!(unit.is_some() && description.is_some(), "no description or unit: {key:?}");
        let labels: BTreeMap<_, _> = key.key().labels().map(|label| (label.key(), label.value())).collect();
        let labels: Vec<_> = labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
        let value = match value {
            DebugValue::Counter(count) => count,
            DebugValue::Histogram(values) => {
                assert_eq!(key.kind(), MetricKind::Histogram);
                values.len() as u64
            }
            DebugValue::Gauge(_) => panic!("{key:?}"),
        };
        (format!("{}{{{}}}", key.key().name(), labels.join(",")), value)
    });
    recorded.collect()
}

/// Runs a future on a paused clock and records its metrics.
fn record(recorder: &DebuggingRecorder, future: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
    metrics::with_local_recorder(recorder, || runtime.unwrap().block_on(future));
}

/// The outcomes of a shared token. The invalid record is counted twice because it is read twice.
#[test]
fn store_outcomes_are_counted() {
    let recorder = DebuggingRecorder::new();
    record(&recorder, async {
        tower_bearer::observability::describe_metrics();
        fleet::trigger_every_store_event("videos").await;
    });
    let mut recorded = metrics_of(&recorder.snapshotter());
    recorded.retain(|name, _| name.starts_with("tower_bearer_store_total"));
    let expected = [
        ("adopted", 2),
        ("without_store", 1),
        ("invalid_record", 2),
        ("not_stored", 1),
        ("stored", 3),
        ("superseded", 1),
    ];
    let expected = expected.map(|(outcome, count)| {
        (format!("tower_bearer_store_total{{outcome={outcome},provider=videos}}"), count)
    });
    assert_eq!(recorded, expected.into());
    assert!(include_str!("../src/observability.rs").contains("//! | `tower_bearer_store_total` |"));
}

#[test]
fn every_documented_metric_is_counted() {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    record(&recorder, record_every_metric());
    let recorded = metrics_of(&snapshotter);
    let expected = [
        ("tower_bearer_challenges_total{outcome=retried,provider=videos}", 1),
        ("tower_bearer_challenges_total{outcome=retries,provider=videos}", 1),
        ("tower_bearer_refresh_duration_seconds{outcome=permanent,provider=videos}", 1),
        ("tower_bearer_refresh_duration_seconds{outcome=published,provider=videos}", 2),
        ("tower_bearer_refreshes_total{outcome=permanent,provider=videos,reason=challenged}", 1),
        ("tower_bearer_refreshes_total{outcome=published,provider=videos,reason=missing}", 1),
        ("tower_bearer_refreshes_total{outcome=published,provider=videos,reason=challenged}", 1),
        ("tower_bearer_source_failures_total{kind=unavailable,provider=videos}", 1),
        ("tower_bearer_waits_total{provider=videos}", 1),
    ];
    let expected: BTreeMap<_, _> = expected.map(|(name, count)| (name.to_owned(), count)).into();
    assert_eq!(recorded, expected);
    // The documentation names every metric.
    let documentation = include_str!("../src/observability.rs");
    for name in recorded.keys() {
        let name = name.split('{').next().unwrap();
        assert!(documentation.contains(&format!("//! | `{name}` |")), "{name}");
    }
}

async fn record_every_metric() {
    tower_bearer::observability::describe_metrics();
    let source = Source::living(Duration::from_secs(3600))
        .then(Act::Fail(SourceError::unavailable("down")))
        .then(Act::Live(Duration::from_secs(3600)));
    let provider = TokenProvider::builder(Arc::clone(&source)).name("videos").build().unwrap();
    let layer = BearerAuthLayer::with_provider(provider);
    let api = Api::default();
    // The request waits for its token, which takes two attempts. It is challenged, and its retry succeeds.
    api.accept("access-3");
    let response = layer.layer(api.service()).oneshot(get()).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    // A request that succeeds at once records nothing.
    let response = layer.layer(api.service()).oneshot(get()).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    // The request is challenged and not retried. The refresh that it starts in the background fails permanently.
    tokio::time::advance(Duration::from_secs(10)).await;
    source.next(Act::Fail(SourceError::rejected("no")));
    api.revoke_all();
    let layer = layer.retry(RetryPolicy::new().max_retries(0));
    let response = layer.layer(api.service()).oneshot(get()).await.unwrap();
    assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
    tokio::time::sleep(Duration::from_secs(2)).await;
}
