//! What a group of providers refuses, what it evicts, and where a request's own token may go.
#![cfg(feature = "tenants")]

use std::{
    borrow::Cow,
    convert::Infallible,
    io, thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{Empty, Full};
use tokio::runtime::{Builder, Runtime};
use tower::{Layer, ServiceExt, util::BoxCloneService};
use tower_bearer::{
    AllowedOrigins, BearerAuthLayer, BoxError, Credential, Error, SourceError, StaticToken, Token,
    TokenProvider, TokenProviders, TokenRequest, TokenSource, UseToken, source_fn,
};

use crate::support::{self, Api, fleet, ours};

const OWN: &str = "https://ws.api.video";
const FOREIGN: &str = "https://evil.example";

type Client = BoxCloneService<Request<Empty<Bytes>>, Response<Full<Bytes>>, BoxError>;

/// A source whose tokens are for [`OWN`].
struct Narrow;

impl TokenSource for Narrow {
    async fn fetch(&self, _: &TokenRequest<'_>) -> Result<Token, SourceError> {
        Ok(Token::builder("access-1").build()?)
    }

    fn allowed_origins(&self) -> AllowedOrigins {
        own()
    }
}

fn own() -> AllowedOrigins {
    AllowedOrigins::origins([OWN]).unwrap()
}

/// A client whose requests have their tenant in a header. There is no tenant but `acme`.
fn client(api: &Api, origins: Option<AllowedOrigins>) -> Client {
    let providers = TokenProviders::new(|tenant: &String| match tenant.as_str() {
        "acme" => Ok(TokenProvider::builder(Narrow)),
        _ => Err(io::Error::other("no such tenant")),
    });
    let mut layer = BearerAuthLayer::by_key(providers, |head| {
        head.headers.get("x-tenant")?.to_str().ok().map(Cow::Borrowed)
    });
    if let Some(origins) = origins {
        layer = layer.allowed_origins(origins);
    }
    BoxCloneService::new(layer.layer(api.service()))
}

/// A request with a token of its own.
fn get(origin: &str, tenant: Option<&str>) -> Request<Empty<Bytes>> {
    let token = Token::builder("mine").build().unwrap();
    let mut request = Request::get(format!("{origin}/videos")).extension(UseToken(token));
    if let Some(tenant) = tenant {
        request = request.header("x-tenant", tenant);
    }
    request.body(Empty::new()).unwrap()
}

/// A request brings its own token and no key of a tenant, so that nothing says which origins are allowed.
#[tokio::test(start_paused = true)]
async fn own_token_without_key_is_error() {
    for tenant in [None, Some("unknown")] {
        let api = Api::default();
        let client = client(&api, None);
        let result = client.oneshot(get(FOREIGN, tenant)).await.map(|response| response.status());
        assert!(!api.tokens().contains(&"mine".to_owned()), "{tenant:?}: the token was sent");
        let error = result.expect_err("the request was sent");
        let expected = match tenant {
            None => matches!(ours(&error), Error::MissingKey),
            Some(_) => matches!(ours(&error), Error::Factory(_)),
        };
        assert!(expected, "{tenant:?}: {error}");
    }
}

/// A request brings its own token, with a tenant or with origins of the layer itself: it goes to those origins alone.
#[tokio::test(start_paused = true)]
async fn own_token_goes_to_allowed_origins() {
    for (tenant, origins) in [(Some("acme"), None), (None, Some(own())), (Some("unknown"), Some(own()))] {
        let api = Api::default();
        let client = client(&api, origins);
        client.clone().oneshot(get(OWN, tenant)).await.unwrap();
        client.oneshot(get(FOREIGN, tenant)).await.unwrap();
        assert_eq!(api.tokens(), ["mine", ""], "{tenant:?}");
    }
}

/// A login: its refresh tokens rotate, and nothing else gives a token.
struct Login;

impl TokenSource for Login {
    async fn fetch(&self, _: &TokenRequest<'_>) -> Result<Token, SourceError> {
        Ok(Token::builder("access-1").refresh_token("refresh-1").build()?)
    }

    fn credential(&self) -> Credential {
        Credential::default().of_login()
    }
}

/// A login is given to a provider of a group without a store, where an eviction would lose it.
#[tokio::test(start_paused = true)]
async fn login_without_store_is_typed_error() {
    let store = fleet::MemoryStore::default();
    let providers = TokenProviders::new(move |tenant: &String| {
        let builder = TokenProvider::builder(Login).login("refresh-0");
        Ok::<_, Infallible>(if tenant == "stored" { builder.store(store.clone()) } else { builder })
    });
    let error = providers.get("unstored").expect_err("the login has no store");
    let Error::Factory(inner) = &error else { panic!("{error:?}") };
    assert!(matches!(inner.downcast_ref(), Some(Error::InvalidOption(_))), "{error:?}");
    assert!(error.to_string().contains("store"), "{error}");
    assert_eq!(providers.len(), 0);
    assert_eq!(providers.get("stored").unwrap().token().await.unwrap().access_token(), "access-1");
}

/// More providers are in use than the bound of their group: they are evicted once they are not.
#[tokio::test(start_paused = true)]
async fn released_providers_are_evicted() {
    const MAX: usize = 100;
    let providers = TokenProviders::builder(|_: &usize| {
        Ok::<_, Infallible>(TokenProvider::builder(StaticToken::new("access-1")))
    });
    let providers = providers.max_providers(MAX).build().unwrap();
    let handles: Vec<_> = (0..3 * MAX).map(|tenant| providers.get(&tenant).unwrap()).collect();
    assert_eq!(providers.len(), 3 * MAX, "a provider in use was evicted");
    drop(handles);
    for tenant in 3 * MAX..4 * MAX {
        providers.get(&tenant).unwrap();
    }
    assert!(providers.len() <= MAX, "{} of {MAX}", providers.len());
}

/// Uses a provider, and another one every 100 ms. Returns how many are left when the first was evicted, or in the end.
fn left_after_idle(providers: &TokenProviders<u32>, runtime: &Runtime) -> usize {
    let begun = Instant::now();
    runtime.block_on(async {
        providers.get(&2).unwrap();
        while providers.len() > 1 && begun.elapsed() < Duration::from_secs(4) {
            tokio::time::sleep(Duration::from_millis(100)).await;
            providers.get(&3).unwrap();
        }
    });
    providers.len()
}

/// The runtime of the first use of a group exists, and is not driven any more.
#[test]
fn eviction_outlives_first_runtime() {
    let runtime = || Builder::new_current_thread().enable_all().build().unwrap();
    let (first, second) = (runtime(), runtime());
    let providers = TokenProviders::builder(|_: &u32| {
        Ok::<_, Infallible>(TokenProvider::builder(StaticToken::new("access-1")))
    });
    let providers = providers.idle_timeout(Duration::from_secs(1)).build().unwrap();
    first.block_on(async { drop(providers.get(&1).unwrap()) });
    let group = providers.clone();
    let left = thread::spawn(move || left_after_idle(&group, &second)).join().unwrap();
    assert_eq!(left, 1, "idle providers were not evicted");
    drop(first);
}

/// The runtime of the first use of a group has been shut down.
#[test]
fn eviction_outlives_shut_down_runtime() {
    let runtime = || Builder::new_current_thread().enable_all().build().unwrap();
    let providers = TokenProviders::builder(|_: &u32| {
        Ok::<_, Infallible>(TokenProvider::builder(StaticToken::new("access-1")))
    });
    let providers = providers.idle_timeout(Duration::from_secs(1)).build().unwrap();
    runtime().block_on(async { drop(providers.get(&1).unwrap()) });
    assert_eq!(left_after_idle(&providers, &runtime()), 1, "idle providers were not evicted");
}

/// Refreshes on a runtime that is not driven any more keep no provider.
#[test]
fn overdue_refresh_keeps_no_provider() {
    let providers = TokenProviders::builder(|_: &u32| {
        let source = source_fn(|_| std::future::pending::<Result<Token, SourceError>>());
        Ok::<_, BoxError>(TokenProvider::builder(source).refresh_timeout(Duration::from_millis(100)))
    })
    .max_providers(10)
    .idle_timeout(Duration::from_secs(1))
    .build()
    .unwrap();
    let stalled = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    stalled.block_on(async {
        for tenant in 0..1000 {
            assert!(support::at_once(providers.get(&tenant).unwrap().token()).is_none());
        }
    });
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(providers.len(), 0);
}

/// A provider that a handle uses is found again, also after a shutdown.
#[tokio::test(start_paused = true)]
async fn used_provider_is_found_beyond_bound() {
    let factory = |_: &u32| {
        let source = source_fn(|_| async { Ok::<_, SourceError>(Token::builder("abc").build()?) });
        Ok::<_, BoxError>(TokenProvider::builder(source))
    };
    let providers = TokenProviders::builder(factory).max_providers(1).build().unwrap();
    let first = providers.get(&1).unwrap();
    first.token().await.unwrap();
    let second = providers.get(&2).unwrap();
    second.token().await.unwrap();
    assert_eq!((providers.len(), providers.statuses().count()), (2, 2));
    assert!(providers.get(&1).unwrap().current().is_some());
    providers.shutdown().await;
    assert!([1, 2].iter().all(|key| providers.get(key).unwrap().current().is_some()));
    assert!(providers.get(&3).is_err());
}

/// A program looks at the statuses of a group, which is no use of a provider.
#[tokio::test(start_paused = true)]
async fn statuses_use_no_provider() {
    let factory = |_: &u32| {
        let source = source_fn(|_| async { Ok::<_, SourceError>(Token::builder("abc").build()?) });
        Ok::<_, BoxError>(TokenProvider::builder(source))
    };
    let providers = TokenProviders::builder(factory).idle_timeout(Duration::from_secs(10)).build().unwrap();
    providers.get(&1).unwrap();
    for _ in 0..3 {
        let statuses = providers.statuses();
        let _ = providers.len();
        drop(statuses);
        tokio::time::advance(Duration::from_secs(5)).await;
    }
    assert_eq!(providers.len(), 0);
}
