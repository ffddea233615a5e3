//! One rule for validation: setters accept any value, `build()` checks all of them, and where there is no `build()` the
//! first request reports the same error.
#![cfg(feature = "default-client")]

use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, Uri};
use http_body_util::Full;
use tower::{Layer, ServiceExt, service_fn};
use tower_bearer::{
    AllowedOrigins, ApiVideo, BearerAuthLayer, BoxError, Error, RefreshAhead, RetryPolicy, StaticToken,
    TokenClient, TokenFile, TokenProvider, TokenProviderBuilder, TokenSource,
};

use crate::support::{self, SECOND, Scene, get, ours, scene};

fn builder() -> TokenProviderBuilder<StaticToken> {
    TokenProvider::builder(StaticToken::new("abc"))
}

/// An error with its sources, as a log shows it.
fn text(error: &Error) -> String {
    support::chain(error)
}

/// An option is out of its range: the error names the option, the range and the value.
#[test]
fn build_names_option_range_and_value() {
    let ahead = RefreshAhead::new();
    let policy = RetryPolicy::new();
    for (builder, expected) in [
        (builder().name(""), "name must be at least one character long, got none"),
        (builder().refresh_timeout(Duration::ZERO), "refresh_timeout must be > 0 and <= 1h, got 0s"),
        (builder().refresh_timeout(3601 * SECOND), "refresh_timeout must be > 0 and <= 1h, got 3601s"),
        (builder().cool_down(SECOND, SECOND / 2), "cool_down: need 0 < min <= max <= 1h, got 1s and 0.5s"),
        (builder().cool_down(Duration::ZERO, SECOND), "cool_down: need 0 < min <= max <= 1h, got 0s and 1s"),
        (builder().refresh_ahead(ahead.share(1.5)), "refresh_ahead: share must be >= 0 and <= 0.9, got 1.5"),
        (
            builder().refresh_ahead(ahead.jitter(f64::NAN)),
            "refresh_ahead: jitter must be >= 0 and <= 0.5, got NaN",
        ),
        (
            builder().refresh_ahead(ahead.between(SECOND, Duration::ZERO)),
            "refresh_ahead: need min <= max, got 1s and 0s",
        ),
        (builder().retry(policy.backoff(SECOND, Duration::ZERO)), "got 1s and 0s"),
        (builder().retry_budget(Duration::ZERO, 1, 0.1), "retry_budget must have 1s <= ttl <= 60s, got 0s"),
    ] {
        let error = builder.build().unwrap_err();
        assert!(matches!(error, Error::InvalidOption(_)) && !error.is_transient(), "{error:?}");
        assert!(text(&error).ends_with(expected), "{}", text(&error));
    }
}

/// What `build()` says of a source, and what the first request says where there was no `build()`.
async fn source_error(source: impl TokenSource + Clone) -> String {
    let built = TokenProvider::builder(source.clone()).build().unwrap_err();
    assert!(matches!(built, Error::Source(_)) && !built.is_transient(), "{built:?}");
    let layer =
        BearerAuthLayer::with_provider(TokenProvider::new(source)).allowed_origins(AllowedOrigins::https());
    let service = layer.layer(service_fn(|_: Request<_>| async {
        Ok::<_, BoxError>(Response::new(Full::<Bytes>::default()))
    }));
    let first = service.oneshot(get()).await.unwrap_err();
    assert_eq!(text(ours(&first)), text(&built));
    text(&built)
}

/// The options of a source are not valid, with or without `build`.
#[tokio::test(start_paused = true)]
async fn source_error_is_the_same_with_and_without_build() {
    for (source, expected) in [
        (ApiVideo::new(""), "key"),
        (ApiVideo::new("canary key"), "key"),
        (
            ApiVideo::new("key").with_client(TokenClient::new().timeout(Duration::ZERO)),
            "timeout must be > 0 and <= 1h, got 0s",
        ),
        (ApiVideo::new("key").origin_app("a b", "1"), "origin_app"),
        (ApiVideo::new("key").base_url(Uri::from_static("/relative")), "base_url"),
        (ApiVideo::new("key").base_url(Uri::from_static("http://api.example")), "base_url"),
    ] {
        let text = source_error(source).await;
        assert!(text.contains(expected) && !text.contains("canary"), "{text}");
    }
    let text = source_error(std::sync::Arc::new(StaticToken::new("canary token"))).await;
    assert!(!text.contains("canary"), "{text}");
    let text = source_error(TokenFile::new("/nowhere").reload_interval(Duration::ZERO)).await;
    assert!(text.contains("reload_interval must be >= 1s and <= 1d, got 0s"), "{text}");
}

/// An option of the layer is not valid: the first request reports it.
#[tokio::test(start_paused = true)]
async fn first_request_reports_layer_option() {
    let Scene { api, layer, .. } = scene().build();
    let retry = layer.clone().retry(RetryPolicy::new().backoff(SECOND, Duration::ZERO));
    let error = retry.layer(api.service()).oneshot(get()).await.unwrap_err();
    assert!(ours(&error).to_string().contains("got 1s and 0s"), "{error}");

    let none = layer.clone().buffered(0).layer(api.service());
    let error = none.oneshot(get()).await.unwrap_err();
    assert!(matches!(ours(&error), Error::InvalidOption(_)), "{error}");
    // The strategy that replaces it has no limit.
    assert!(layer.buffered(0).no_replay().layer(api.service()).oneshot(get()).await.is_ok());
}
