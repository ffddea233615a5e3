//! A request that is not sent keeps no permit of the inner service, even if its service is kept.
#![cfg(feature = "tenants")]

use std::{borrow::Cow, io, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode};
use http_body_util::{Empty, Full};
use tokio::{sync::Semaphore, time::timeout};
use tower::{Layer, Service, ServiceExt, limit::GlobalConcurrencyLimitLayer, util::BoxCloneService};
use tower_bearer::{
    BearerAuthLayer, BoxError, Error, NoBearer, RetryPolicy, SourceError, StaticToken, TokenProvider,
    TokenProviders,
};

use crate::support::{Act, Api, Scene, get, ours, scene};

type Tenants = BoxCloneService<Request<Empty<Bytes>>, Response<Full<Bytes>>, BoxError>;

/// A limit of one request at a time, which clients share.
fn limit() -> GlobalConcurrencyLimitLayer {
    GlobalConcurrencyLimitLayer::with_semaphore(Arc::new(Semaphore::new(1)))
}

/// A group whose factory works, or fails.
fn providers(works: bool) -> TokenProviders<String> {
    TokenProviders::new(move |_: &String| match works {
        true => Ok(TokenProvider::builder(StaticToken::new("access-1"))),
        false => Err(io::Error::other("no such tenant")),
    })
}

/// Makes a service whose requests have their tenant in a header.
fn by_key(works: bool, limit: &GlobalConcurrencyLimitLayer, api: &Api) -> Tenants {
    let layer = BearerAuthLayer::by_key(providers(works), |head| {
        head.headers.get("x-tenant")?.to_str().ok().map(Cow::Borrowed)
    });
    BoxCloneService::new(layer.layer(limit.layer(api.service())))
}

/// Adds as many headers as a request can have.
fn fill(headers: &mut HeaderMap) {
    for number in 0.. {
        let name = HeaderName::from_bytes(format!("x-{number}").as_bytes()).unwrap();
        if headers.try_append(name, HeaderValue::from_static("1")).is_err() {
            return;
        }
    }
}

/// Expects that the request fails, and that another client gets the only permit while this service is kept.
async fn keeps_nothing<S, B>(limit: GlobalConcurrencyLimitLayer, mut service: S, request: Request<B>) -> Error
where
    S: Service<Request<B>, Response = Response<Full<Bytes>>, Error = BoxError>,
{
    let error = service.ready().await.unwrap().call(request).await.expect_err("the request was sent");
    let error = ours(&error).clone();
    let api = Api::default();
    let other = timeout(Duration::from_secs(60), limit.layer(api.service()).oneshot(get())).await;
    other.unwrap_or_else(|_| panic!("the permit was kept after {error:?}")).unwrap();
    assert_eq!(api.requests(), 1);
    // The service still works.
    let ready = timeout(Duration::from_secs(60), service.ready()).await;
    ready.expect("the service is never ready again").unwrap();
    error
}

/// A request without the key of a tenant keeps the permit of its service.
#[tokio::test(start_paused = true)]
async fn missing_key_keeps_no_permit() {
    let limit = limit();
    let service = by_key(true, &limit, &Api::default());
    assert!(matches!(keeps_nothing(limit, service, get()).await, Error::MissingKey));
}

/// The factory of a provider fails, and its request keeps the permit of its service.
#[tokio::test(start_paused = true)]
async fn failed_factory_keeps_no_permit() {
    let limit = limit();
    let service = by_key(false, &limit, &Api::default());
    let mut request = get();
    request.headers_mut().insert("x-tenant", "acme".parse().unwrap());
    assert!(matches!(keeps_nothing(limit, service, request).await, Error::Factory(_)));
}

/// An option of the layer is not valid, and a request keeps the permit of its service.
#[tokio::test(start_paused = true)]
async fn invalid_option_keeps_no_permit() {
    let limit_of_bodies = limit();
    let Scene { api, layer, .. } = scene().build();
    let service = layer.clone().buffered(0).layer(limit_of_bodies.layer(api.service()));
    assert!(matches!(keeps_nothing(limit_of_bodies, service, get()).await, Error::InvalidOption(_)));

    let limit = limit();
    let policy = RetryPolicy::new().backoff(Duration::ZERO, Duration::ZERO);
    let service = layer.retry(policy).layer(limit.layer(api.service()));
    assert!(matches!(keeps_nothing(limit, service, get()).await, Error::InvalidOption(_)));
}

/// A request with too many headers keeps the permit of its service, with a token or before the first one.
#[tokio::test(start_paused = true)]
async fn too_many_headers_keep_no_permit() {
    for has_token in [true, false] {
        let limit = limit();
        let Scene { api, layer, .. } = if has_token { scene().with_token().await } else { scene().build() };
        let service = layer.layer(limit.layer(api.service()));
        let mut request = get();
        fill(request.headers_mut());
        assert!(matches!(keeps_nothing(limit, service, request).await, Error::TooManyHeaders));
    }
}

/// A request that fails keeps the permit of its service, for any replay strategy.
#[tokio::test(start_paused = true)]
async fn no_strategy_keeps_permit() {
    let full = || {
        let mut request = get();
        fill(request.headers_mut());
        request
    };
    let Scene { api, layer, .. } = scene().with_token().await;

    let shared = limit();
    let service = layer.clone().no_replay().layer(shared.layer(api.service()));
    keeps_nothing(shared, service, full()).await;

    let shared = limit();
    let service = layer.clone().buffered(1024).layer(shared.layer(api.service()));
    keeps_nothing(shared, service, full()).await;

    let shared = limit();
    let service = layer.clone_with(|body: &Empty<Bytes>| Some(*body)).layer(shared.layer(api.service()));
    keeps_nothing(shared, service, full()).await;
}

/// The source gives no first token, and the request that waits for it keeps the permit of its service.
#[tokio::test(start_paused = true)]
async fn failed_source_keeps_no_permit() {
    let limit = limit();
    let Scene { api, layer, .. } = scene().then(Act::Fail(SourceError::rejected("no"))).build();
    let service = layer.layer(limit.layer(api.service()));
    assert!(matches!(keeps_nothing(limit, service, get()).await, Error::Source(_)));
}

/// A request that needs no token is sent, with the permit that its service has.
#[tokio::test(start_paused = true)]
async fn request_without_token_is_sent() {
    let api = Api::default();
    let mut service = by_key(false, &limit(), &api);
    let mut request = get();
    request.extensions_mut().insert(NoBearer);
    let response = service.ready().await.unwrap().call(request).await.unwrap();
    assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
    assert_eq!(api.tokens(), [""]);
}
