//! The table of all metrics: their names, texts and labels.

/// A metric. `labels` are those beside `provider`, with all their values.
struct Metric {
    name: &'static str,
    kind: Kind,
    text: &'static str,
    registered: Registered,
    labels: &'static [(&'static str, &'static [&'static str])],
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Counter,
    Gauge,
    GaugeSeconds,
    HistogramSeconds,
}

/// When a counter is set to 0. One that first appeared with its first count would hide that count from a query for its
/// increase.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Registered {
    /// With a provider, or the group in its place.
    Always,
    WithGroup,
    WithStore,
    /// With its first value.
    Never,
}

const OUTCOMES: &[&str] = &["published", "transient", "permanent", "superseded"];

#[rustfmt::skip]
const METRICS: [Metric; 11] = {
    use {Kind::*, Registered::*};

    const fn metric(
        name: &'static str, kind: Kind, registered: Registered, text: &'static str,
        labels: &'static [(&'static str, &'static [&'static str])],
    ) -> Metric {
        Metric { name, kind, text, registered, labels }
    }

    [
        metric("tower_bearer_refreshes_total", Counter, Always,
            "Refreshes that have asked the token source, and have ended.",
            &[("reason", &["missing", "expired", "expiring", "challenged"]), ("outcome", OUTCOMES)]),
        metric("tower_bearer_refresh_duration_seconds", HistogramSeconds, Never,
            "How long a refresh that has asked the token source took.", &[("outcome", OUTCOMES)]),
        metric("tower_bearer_source_failures_total", Counter, Always,
            "Attempts of a refresh that failed transiently.", &[("kind", &["unavailable", "invalid_response"])]),
        metric("tower_bearer_token_expiry_timestamp_seconds", GaugeSeconds, Never,
            "When the current token expires, in seconds since 1970; 0 without a token, +Inf without a lifetime.", &[]),
        metric("tower_bearer_waits_total", Counter, Always, "Requests that waited for a token.", &[]),
        metric("tower_bearer_failed_requests_total", Counter, Always,
            "Requests that failed because no token was available.",
            &[("reason", &["unavailable", "invalid_response", "rejected", "login_required", "configuration", "timed_out",
                "cancelled", "interrupted", "no_runtime", "shut_down", "challenge_dropped", "missing_key", "factory"])]),
        metric("tower_bearer_challenges_total", Counter, Always, "Responses that challenged a token.",
            &[("outcome", &["retried", "retries_exhausted", "body_not_replayable", "no_token", "budget_exhausted",
                "no_runtime"])]),
        metric("tower_bearer_store_usable", Gauge, Never,
            "Whether the store can be used (1) or has failed (0).", &[]),
        metric("tower_bearer_providers", Gauge, Never, "How many providers a group has.", &[]),
        metric("tower_bearer_evictions_total", Counter, WithGroup, "Providers of a group that were evicted.",
            &[("reason", &["idle", "capacity"])]),
        metric("tower_bearer_store_total", Counter, WithStore,
            "What happened to the token that processes share: the events of the store's table.",
            &[("outcome", &["adopted", "stored", "superseded", "not_stored", "invalid_record", "without_store"])]),
    ]
};

/// A label and its value.
pub(super) type Label = (&'static str, &'static str);

/// The name and the labels of each counter that is registered then.
pub(super) fn counters(registered: Registered) -> impl Iterator<Item = (&'static str, Vec<Label>)> {
    let is_counter = move |metric: &Metric| metric.kind == Kind::Counter && metric.registered == registered;
    METRICS.into_iter().filter(is_counter).flat_map(|Metric { name, labels, .. }| {
        let mut series: Vec<Vec<Label>> = vec![Vec::new()];
        for (label, values) in labels {
            let with = |others: &Vec<Label>, value| others.iter().copied().chain([(*label, value)]).collect();
            series =
                series.iter().flat_map(|others| values.iter().map(|value| with(others, *value))).collect();
        }
        series.into_iter().map(move |labels| (name, labels))
    })
}

/// Describes the [metrics](crate::observability#metrics-feature-metrics) and their units to the installed recorder. Call it
/// once, after installing the recorder.
#[cfg(feature = "metrics")]
pub fn describe_metrics() {
    use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};

    for Metric { name, kind, text, .. } in METRICS {
        match kind {
            Kind::Counter => describe_counter!(name, Unit::Count, text),
            Kind::Gauge => describe_gauge!(name, Unit::Count, text),
            Kind::GaugeSeconds => describe_gauge!(name, Unit::Seconds, text),
            Kind::HistogramSeconds => describe_histogram!(name, Unit::Seconds, text),
        }
    }
}
