//! Every documented metric is recorded with its name and its labels.
#![cfg(feature = "metrics")]

mod support;

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, SystemTime},
};

use http::StatusCode;
use metrics::{
    Counter, CounterFn, Gauge, GaugeFn, Histogram, HistogramFn, Key, KeyName, Metadata, SharedString, Unit,
};
use support::{Act, Scene, Source, fleet, get, scene};
use tower::{Layer, ServiceExt};
use tower_bearer::{BearerAuthLayer, BoxError, RetryPolicy, SourceError, TokenProvider, TokenProviders};

/// The value of a metric, or the number of a histogram's values.
#[derive(Default)]
struct Value(Mutex<f64>);

impl Value {
    fn change(&self, change: impl FnOnce(f64) -> f64) {
        let mut value = self.0.lock().unwrap();
        *value = change(*value);
    }
}

impl CounterFn for Value {
    fn increment(&self, by: u64) {
        self.change(|value| value + by as f64);
    }

    fn absolute(&self, to: u64) {
        self.change(|_| to as f64);
    }
}

impl GaugeFn for Value {
    fn increment(&self, by: f64) {
        self.change(|value| value + by);
    }

    fn decrement(&self, by: f64) {
        self.change(|value| value - by);
    }

    fn set(&self, to: f64) {
        self.change(|_| to);
    }
}

impl HistogramFn for Value {
    fn record(&self, _: f64) {
        self.change(|count| count + 1.0);
    }
}

/// Records metrics.
#[derive(Default)]
struct Recorder(Mutex<State>);

#[derive(Default)]
struct State {
    /// The kind of each metric with its unit, as the documentation has it, and its description.
    described: HashMap<String, (&'static str, String)>,
    values: HashMap<(&'static str, Key), Arc<Value>>,
}

impl Recorder {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    fn describe(&self, name: &KeyName, kind: &'static str, text: &str) {
        self.state().described.insert(name.as_str().to_owned(), (kind, text.to_owned()));
    }

    fn value(&self, kind: &'static str, key: &Key) -> Arc<Value> {
        Arc::clone(self.state().values.entry((kind, key.clone())).or_default())
    }

    /// Maps each metric, as `name{a=b}`, to its value, or for a histogram to the number of its values.
    ///
    /// Checks that the documentation has a row for it, whose text is the one that the recorder was given.
    fn metrics(&self) -> BTreeMap<String, u64> {
        let documentation = include_str!("../src/observability/mod.rs");
        let state = self.state();
        let recorded = state.values.iter().map(|((kind, key), value)| {
            let name = key.name();
            let (described, text) = &state.described[name];
            assert!(described.starts_with(kind), "{name}: {kind}, {described}");
            let row = format!("//! | `{name}` | {described} | {text} | ");
            assert!(documentation.contains(&row), "not in the documentation: {row}");
            let labels: BTreeMap<_, _> = key.labels().map(|label| (label.key(), label.value())).collect();
            let labels: Vec<_> = labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
            (format!("{name}{{{}}}", labels.join(",")), *value.0.lock().unwrap() as u64)
        });
        recorded.collect()
    }
}

impl metrics::Recorder for Recorder {
    fn describe_counter(&self, name: KeyName, unit: Option<Unit>, text: SharedString) {
        assert_eq!(unit, Some(Unit::Count));
        self.describe(&name, "counter", &text);
    }

    fn describe_gauge(&self, name: KeyName, unit: Option<Unit>, text: SharedString) {
        let kind = match unit {
            Some(Unit::Seconds) => "gauge, seconds",
            Some(Unit::Count) => "gauge",
            other => panic!("{name:?}: {other:?}"),
        };
        self.describe(&name, kind, &text);
    }

    fn describe_histogram(&self, name: KeyName, unit: Option<Unit>, text: SharedString) {
        assert_eq!(unit, Some(Unit::Seconds));
        self.describe(&name, "histogram, seconds", &text);
    }

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        Counter::from_arc(self.value("counter", key))
    }

    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::from_arc(self.value("gauge", key))
    }

    fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::from_arc(self.value("histogram", key))
    }
}

/// Runs a future on a paused clock and records its metrics.
fn record(recorder: &Recorder, future: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
    metrics::with_local_recorder(recorder, || runtime.unwrap().block_on(future));
}

/// Each outcome of a shared token is counted. The invalid record is counted twice because it is read twice.
#[test]
fn store_outcomes_are_counted() {
    let recorder = Recorder::default();
    record(&recorder, async {
        tower_bearer::observability::describe_metrics();
        fleet::trigger_every_store_event("videos").await;
    });
    let mut recorded = recorder.metrics();
    recorded.retain(|name, _| name.starts_with("tower_bearer_store_total"));
    let expected = [
        ("adopted", 2),
        ("without_store", 2),
        ("invalid_record", 2),
        ("not_stored", 1),
        ("stored", 4),
        ("superseded", 1),
    ];
    let expected = expected.map(|(outcome, count)| {
        (format!("tower_bearer_store_total{{outcome={outcome},provider=videos}}"), count)
    });
    assert_eq!(recorded, expected.into());
}

/// A documented metric is not recorded, or a recorded one is not documented.
#[test]
fn every_documented_metric_is_counted() {
    let recorder = Recorder::default();
    record(&recorder, record_every_metric());
    let mut recorded = recorder.metrics();
    recorded.retain(|_, value| *value > 0);
    let expected = [
        ("tower_bearer_challenges_total{outcome=retried,provider=videos}", 1),
        ("tower_bearer_challenges_total{outcome=retries_exhausted,provider=videos}", 1),
        ("tower_bearer_failed_requests_total{provider=videos,reason=rejected}", 3),
        ("tower_bearer_refresh_duration_seconds{outcome=permanent,provider=videos}", 1),
        ("tower_bearer_refresh_duration_seconds{outcome=published,provider=videos}", 2),
        ("tower_bearer_refreshes_total{outcome=permanent,provider=videos,reason=challenged}", 1),
        ("tower_bearer_refreshes_total{outcome=published,provider=videos,reason=missing}", 1),
        ("tower_bearer_refreshes_total{outcome=published,provider=videos,reason=challenged}", 1),
        ("tower_bearer_source_failures_total{kind=unavailable,provider=videos}", 1),
        ("tower_bearer_waits_total{provider=videos}", 4),
    ];
    let expected: BTreeMap<_, _> = expected.map(|(name, count)| (name.to_owned(), count)).into();
    assert_eq!(recorded, expected);
}

async fn record_every_metric() {
    tower_bearer::observability::describe_metrics();
    let Scene { source, api, layer, service, .. } = scene()
        .living(Duration::from_secs(3600))
        .then(Act::Fail(SourceError::unavailable("down")))
        .accept(["access-3"])
        .provider(|builder| builder.name("videos"))
        .build();
    // The request waits for its token, which takes two attempts. It is challenged, and its retry succeeds.
    let response = service.clone().oneshot(get()).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    // A request that succeeds at once records nothing.
    let response = service.oneshot(get()).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    // The request is challenged and not retried. The refresh that it starts in the background fails permanently.
    tokio::time::advance(Duration::from_secs(10)).await;
    source.next(Act::Fail(SourceError::rejected("no")));
    api.revoke_all();
    let layer = layer.retry(RetryPolicy::new().max_retries(0));
    let response = layer.layer(api.service()).oneshot(get()).await.unwrap();
    assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
    tokio::time::sleep(Duration::from_secs(1)).await;
    // Three requests fail at once, because there is no token and the source is not asked.
    layer.provider().invalidate();
    for _ in 0..3 {
        layer.layer(api.service()).oneshot(get()).await.unwrap_err();
    }
}

/// A counter first appears with its first count, which hides that count from a query for its increase.
#[test]
fn counters_start_at_zero() {
    let recorder = Recorder::default();
    record(&recorder, async {
        tower_bearer::observability::describe_metrics();
        let provider = TokenProvider::builder(Source::new()).name("videos").build().unwrap();
        provider.shutdown().await;
    });
    let registered = recorder.metrics();
    assert!(registered.values().all(|count| *count == 0), "{registered:?}");

    let recorder = Recorder::default();
    record(&recorder, record_every_metric());
    for name in recorder.metrics().into_keys().filter(|name| name.contains("_total{")) {
        assert!(registered.contains_key(&name), "{name}");
    }
}

/// The number of series grows with the number of tenants.
#[test]
fn tenants_share_the_series_of_their_group() {
    let series = |tenants: u64, by_provider: bool| {
        let recorder = Recorder::default();
        record(&recorder, async {
            tower_bearer::observability::describe_metrics();
            let providers = TokenProviders::builder(|tenant: &u64| {
                let (endpoint, store) = (fleet::Endpoint::default(), fleet::MemoryStore::default());
                Ok::<_, SourceError>(endpoint.process(&store).name(format!("tenant-{tenant}")))
            })
            .name("tenants")
            .max_providers(50)
            .metrics_by_provider(by_provider)
            .build()
            .unwrap();
            let layer =
                BearerAuthLayer::by_key(providers, |head| head.extensions.get().map(Cow::<u64>::Borrowed));
            let api = layer.layer(tower::service_fn(|_| async {
                Ok::<_, BoxError>(http::Response::new(String::new()))
            }));
            for tenant in 0..tenants {
                let mut request = get();
                request.extensions_mut().insert(tenant);
                api.clone().oneshot(request).await.unwrap();
            }
            api.oneshot(get()).await.unwrap_err();
        });
        recorder.metrics()
    };
    let (one, many) = (series(1, false), series(200, false));
    assert_eq!(one.keys().collect::<Vec<_>>(), many.keys().collect::<Vec<_>>());
    assert!(many.keys().all(|name| name.contains("provider=tenants")), "{many:?}");
    let count = |name: &str| many[&format!("tower_bearer_{name}")];
    assert_eq!(count("refreshes_total{outcome=published,provider=tenants,reason=missing}"), 200);
    assert_eq!(count("failed_requests_total{provider=tenants,reason=missing_key}"), 1);
    assert_eq!(count("providers{provider=tenants}"), 0, "the group is gone");
    assert_eq!(count("evictions_total{provider=tenants,reason=capacity}"), 150);
    // By choice, each tenant has its own.
    assert_eq!(
        series(2, true)["tower_bearer_refreshes_total{outcome=published,provider=tenant-1,reason=missing}"],
        1
    );
}

/// The gauge of the expiry shows an old expiry, or one where there is none.
#[test]
fn expiry_gauge_follows_the_token() {
    let recorder = Recorder::default();
    let expiry = || {
        let state = recorder.state();
        let (_, expiry) = state.values.iter().find(|((kind, _), _)| *kind == "gauge").unwrap();
        *expiry.0.lock().unwrap()
    };
    record(&recorder, async {
        let provider = TokenProvider::new(Source::new().then(Act::Live(Duration::from_secs(60))));
        provider.token().await.unwrap();
        // At most a minute from now.
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs_f64();
        let left = expiry() - now;
        assert!(left > 0.0 && left <= 60.0, "{left}");
        provider.invalidate();
        assert_eq!(expiry(), 0.0);
        provider.token().await.unwrap();
        assert_eq!(expiry(), f64::INFINITY, "a token without a lifetime");
    });
}

/// The store cannot be used, and the gauge does not show it.
#[test]
fn gauge_follows_store() {
    let recorder = Recorder::default();
    record(&recorder, async {
        tower_bearer::observability::describe_metrics();
        let gauge = || recorder.metrics().remove("tower_bearer_store_usable{provider=videos}");
        let (endpoint, store) = (fleet::Endpoint::default(), fleet::MemoryStore::default());
        let process = endpoint.process(&store).name("videos").build().unwrap();
        for (health, is_usable) in
            [(fleet::Health::Good, 1), (fleet::Health::Forgetful, 0), (fleet::Health::Good, 1)]
        {
            store.set(health);
            process.invalidate();
            process.token().await.unwrap();
            tokio::time::sleep(fleet::MINUTE / 2).await;
            assert_eq!(gauge(), Some(is_usable), "{health:?}");
        }
    });
}
