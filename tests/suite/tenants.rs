//! Many tenants on one layer: each request has the token of its own tenant, and no tenant costs another anything.
#![cfg(feature = "tenants")]

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    convert::Infallible,
    sync::{
        Arc, Barrier, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::join_all;
use http::{HeaderMap, Request, Response, StatusCode, header::AUTHORIZATION};
use http_body_util::{Empty, Full};
use tokio::time::{Instant, advance, sleep};
use tower::{Layer, Service, ServiceExt};
use tower_bearer::{
    AllowedOrigins, BearerAuthLayer, BoxError, Credential, Error, ExistingAuthorization, Freshness, NoBearer,
    SourceError, StaticToken, Token, TokenProvider, TokenProviders, TokenRequest, TokenSource, UseToken,
    source_fn, tenants::TokenProvidersBuilder,
};

use crate::support::{self, Act, Api, HOUR, SECOND, Source, at_once, fleet, ours};

/// The tenant of a request, in its extensions.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Tenant(u32);

/// The sources of all tenants, and what the factory was called for.
#[derive(Clone, Default)]
struct Sources(Arc<SourcesState>);

#[derive(Default)]
struct SourcesState {
    /// How often a token was asked for, by tenant.
    asked: Mutex<HashMap<u32, u64>>,
    made: Mutex<Vec<u32>>,
}

impl Sources {
    fn asked(&self, tenant: u32) -> u64 {
        self.0.asked.lock().unwrap().get(&tenant).copied().unwrap_or_default()
    }

    fn made(&self) -> Vec<u32> {
        self.0.made.lock().unwrap().clone()
    }

    fn builder(&self) -> TokenProvidersBuilder<Tenant> {
        let sources = self.clone();
        TokenProviders::builder(move |tenant: &Tenant| {
            sources.0.made.lock().unwrap().push(tenant.0);
            Ok::<_, Infallible>(
                TokenProvider::builder(sources.source(tenant.0)).name(format!("tenant-{}", tenant.0)),
            )
        })
    }

    fn providers(&self) -> TokenProviders<Tenant> {
        self.builder().build().unwrap()
    }

    /// A source of tokens like `7-1`, which takes one second and has an hour's tokens.
    fn source(&self, tenant: u32) -> impl TokenSource + use<> {
        let state = Arc::clone(&self.0);
        source_fn(move |_| {
            let number = {
                let mut asked = state.asked.lock().unwrap();
                let number = asked.entry(tenant).or_default();
                *number += 1;
                *number
            };
            async move {
                sleep(SECOND).await;
                Ok(Token::builder(format!("{tenant}-{number}")).expires_in(HOUR).build()?)
            }
        })
    }
}

fn layer(providers: &TokenProviders<Tenant>) -> BearerAuthLayer {
    BearerAuthLayer::by_key(providers.clone(), |head| head.extensions.get::<Tenant>().map(Cow::Borrowed))
}

fn get(tenant: u32) -> Request<Empty<Bytes>> {
    Request::get("https://api.example/videos").extension(Tenant(tenant)).body(Empty::new()).unwrap()
}

/// Returns the tenant of the token of a request, or challenges it.
fn tenant_of(headers: &HeaderMap) -> Option<u32> {
    headers.get(AUTHORIZATION)?.to_str().ok()?.strip_prefix("Bearer ")?.split('-').next()?.parse().ok()
}

/// An API that answers with the tenant of the token, and challenges the tenants that `is_challenged` names.
fn api(
    is_challenged: impl Fn(u32) -> bool + Clone + Send + 'static,
) -> impl Service<
    Request<Empty<Bytes>>,
    Response = Response<Full<Bytes>>,
    Error = Infallible,
    Future = impl Future<Output = Result<Response<Full<Bytes>>, Infallible>> + Send,
> + Clone {
    tower::service_fn(move |request: Request<Empty<Bytes>>| {
        let tenant = tenant_of(request.headers());
        let challenged = tenant.is_some_and(&is_challenged);
        async move {
            let mut response =
                Response::new(Full::from(tenant.map_or(String::new(), |tenant| tenant.to_string())));
            if challenged {
                *response.status_mut() = StatusCode::UNAUTHORIZED;
            }
            Ok(response)
        }
    })
}

async fn answer<S>(service: &S, request: Request<Empty<Bytes>>) -> Result<String, BoxError>
where
    S: Service<Request<Empty<Bytes>>, Response = Response<Full<Bytes>>, Error = BoxError> + Clone,
{
    use http_body_util::BodyExt;
    let response = service.clone().oneshot(request).await?;
    Ok(String::from_utf8(response.into_body().collect().await?.to_bytes().to_vec())?)
}

/// A request gets the token of another tenant.
#[tokio::test(start_paused = true)]
async fn each_request_has_its_tenants_token() {
    let sources = Sources::default();
    let providers = sources.providers();
    let service = layer(&providers).layer(api(|_| false));
    let answers = join_all((0..30).map(|number| answer(&service, get(number % 3)))).await;
    for (number, answer) in (0..30).zip(answers) {
        assert_eq!(answer.unwrap(), (number % 3).to_string());
    }
    assert_eq!((0..3).map(|tenant| sources.asked(tenant)).collect::<Vec<_>>(), [1, 1, 1]);
    assert_eq!(providers.len(), 3);
    let statuses: BTreeMap<_, _> =
        providers.statuses().map(|(Tenant(tenant), status)| (tenant, status.freshness)).collect();
    assert_eq!(
        statuses,
        BTreeMap::from([(0, Freshness::Fresh), (1, Freshness::Fresh), (2, Freshness::Fresh)])
    );
}

/// A key can be borrowed as a `str`, made of the path, or be a tuple with all that a token depends on.
#[tokio::test(start_paused = true)]
async fn key_is_borrowed_or_owned() {
    let providers = TokenProviders::new(|tenant: &String| {
        Ok::<_, Infallible>(TokenProvider::builder(StaticToken::new(format!("{}-1", tenant.len()))))
    });
    let by_header = BearerAuthLayer::by_key(providers.clone(), |head| {
        head.headers.get("x-tenant")?.to_str().ok().map(Cow::Borrowed)
    })
    .layer(api(|_| false));
    let request = Request::get("https://api.example/").header("x-tenant", "four").body(Empty::new()).unwrap();
    assert_eq!(answer(&by_header, request).await.unwrap(), "4");

    let by_path = BearerAuthLayer::by_key(providers.clone(), |head| {
        head.uri.path().split('/').nth(1).filter(|tenant| !tenant.is_empty()).map(Cow::Borrowed)
    })
    .layer(api(|_| false));
    let request = Request::get("https://api.example/three/videos").body(Empty::new()).unwrap();
    assert_eq!(answer(&by_path, request).await.unwrap(), "5");
    assert_eq!(providers.get("four").unwrap().status().generation, 1);
    assert_eq!(providers.len(), 2);

    let pairs = TokenProviders::new(|(tenant, scope): &(u32, String)| {
        let token = format!("{}-1", tenant * 10 + scope.len() as u32);
        Ok::<_, Infallible>(TokenProvider::builder(StaticToken::new(token)))
    });
    let by_pair = BearerAuthLayer::by_key(pairs, |head| {
        let Tenant(tenant) = head.extensions.get()?;
        Some(Cow::Owned((*tenant, head.method.as_str().to_owned())))
    })
    .layer(api(|_| false));
    assert_eq!(answer(&by_pair, get(2)).await.unwrap(), "23");
}

/// A request has no key of a tenant.
#[tokio::test(start_paused = true)]
async fn request_without_key_is_never_sent() {
    let sources = Sources::default();
    let providers = sources.providers();
    let seen = Api::default();
    let service = layer(&providers).layer(seen.service());
    for method in ["GET", "POST"] {
        let request = Request::builder().method(method).uri("https://api.example/");
        let error = service.clone().oneshot(request.body(Empty::<Bytes>::new()).unwrap()).await.unwrap_err();
        assert!(matches!(ours(&error), Error::MissingKey), "{error}");
        assert!(!ours(&error).is_transient());
    }
    assert_eq!((seen.requests(), providers.len()), (0, 0));
}

/// A request that needs no token has no key of a tenant.
#[tokio::test(start_paused = true)]
async fn request_that_needs_no_token_needs_no_key() {
    let providers = Sources::default().providers();
    let seen = Api::default();
    let service = layer(&providers).layer(seen.service());
    let request = || Request::get("https://api.example/").body(Empty::<Bytes>::new()).unwrap();

    let mut without = request();
    without.extensions_mut().insert(NoBearer);
    let mut own = request();
    own.headers_mut().insert(AUTHORIZATION, "Basic abc".parse().unwrap());
    for request in [without, own.clone()] {
        service.clone().oneshot(request).await.unwrap();
    }
    // Its origins are those of the layer: without a key there are no others.
    let mut other = request();
    other.extensions_mut().insert(UseToken(Token::builder("other").build().unwrap()));
    let any = layer(&providers).allowed_origins(AllowedOrigins::https()).layer(seen.service());
    any.oneshot(other).await.unwrap();
    let sent: Vec<_> = seen.headers().iter().map(|headers| headers.get(AUTHORIZATION).cloned()).collect();
    assert_eq!(sent, [None, Some("Basic abc".parse().unwrap()), Some("Bearer other".parse().unwrap())]);

    // A header that is to be replaced is no credential.
    let replacing =
        layer(&providers).existing_authorization(ExistingAuthorization::Replace).layer(seen.service());
    let error = replacing.oneshot(own).await.unwrap_err();
    assert!(matches!(ours(&error), Error::MissingKey), "{error}");

    // To an origin of which the layer knows that it gets no token.
    let origins = AllowedOrigins::origins(["https://ws.api.video"]).unwrap();
    let only = layer(&providers).allowed_origins(origins).layer(seen.service());
    only.oneshot(request()).await.unwrap();
    assert_eq!(seen.headers().last().unwrap().get(AUTHORIZATION), None);
    assert_eq!(providers.len(), 0);
}

#[derive(Debug, thiserror::Error)]
#[error("no account {0}")]
struct NoAccount(u32);

/// The factory of providers fails.
#[tokio::test(start_paused = true)]
async fn factory_error_reaches_request_typed() {
    let known = Arc::new(AtomicBool::new(false));
    let sources = Sources::default();
    let (is_known, made) = (Arc::clone(&known), sources.clone());
    let providers = TokenProviders::new(move |tenant: &Tenant| {
        if !is_known.load(Ordering::SeqCst) {
            return Err(NoAccount(tenant.0));
        }
        Ok(TokenProvider::builder(made.source(tenant.0)))
    });
    let service = layer(&providers).layer(api(|_| false));
    let error = service.clone().oneshot(get(7)).await.unwrap_err();
    let Error::Factory(inner) = ours(&error) else { panic!("{error}") };
    assert_eq!(inner.downcast_ref::<NoAccount>().unwrap().0, 7);
    assert_eq!(error.to_string(), "no token provider could be made for the request's key: no account 7");
    assert_eq!(providers.len(), 0);

    known.store(true, Ordering::SeqCst);
    assert_eq!(answer(&service, get(7)).await.unwrap(), "7");
}

/// The factory of providers sets an option out of its range.
#[tokio::test(start_paused = true)]
async fn wrong_option_of_a_provider_reaches_request() {
    let providers = TokenProviders::new(|_: &Tenant| {
        Ok::<_, Infallible>(TokenProvider::builder(StaticToken::new("abc")).refresh_timeout(Duration::ZERO))
    });
    let error = layer(&providers).layer(api(|_| false)).oneshot(get(1)).await.unwrap_err();
    let Error::Factory(inner) = ours(&error) else { panic!("{error}") };
    assert!(matches!(inner.downcast_ref(), Some(Error::InvalidOption(_))), "{error}");
    assert_eq!(providers.len(), 0);
}

/// Many callers use a key for the first time at once.
#[test]
fn concurrent_first_uses_make_one_provider() {
    const THREADS: usize = 8;
    for _ in 0..50 {
        let made = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&made);
        let providers = TokenProviders::new(move |_: &Tenant| {
            count.fetch_add(1, Ordering::SeqCst);
            thread::yield_now();
            Ok::<_, Infallible>(TokenProvider::builder(StaticToken::new("abc")))
        });
        let barrier = Barrier::new(THREADS);
        thread::scope(|scope| {
            for number in 0..THREADS {
                let (providers, barrier) = (&providers, &barrier);
                scope.spawn(move || {
                    barrier.wait();
                    providers.get(&Tenant(number as u32 % 2)).unwrap();
                });
            }
        });
        assert_eq!((made.load(Ordering::SeqCst), providers.len()), (2, 2));
    }
}

/// The factory of providers panics.
#[test]
fn panic_in_factory_is_no_deadlock() {
    let panics = Arc::new(AtomicBool::new(true));
    let is_first = Arc::clone(&panics);
    let entered = Arc::new(Barrier::new(2));
    let enters = Arc::clone(&entered);
    let providers = TokenProviders::new(move |_: &Tenant| {
        if is_first.swap(false, Ordering::SeqCst) {
            enters.wait();
            panic!("panic in the factory");
        }
        Ok::<_, Infallible>(TokenProvider::builder(StaticToken::new("abc")))
    });
    thread::scope(|scope| {
        let first = scope.spawn(|| providers.get(&Tenant(1)));
        entered.wait();
        let second = scope.spawn(|| providers.get(&Tenant(1)).map(|_| ()));
        assert!(first.join().is_err());
        second.join().unwrap().unwrap();
    });
    assert_eq!(providers.len(), 1);
}

/// The factory of providers asks for another provider.
#[test]
fn factory_that_gets_another_provider_is_an_error() {
    let own: Arc<Mutex<Option<TokenProviders<Tenant>>>> = Arc::default();
    let inner = Arc::clone(&own);
    let providers = TokenProviders::new(move |tenant: &Tenant| {
        let providers = inner.lock().unwrap().clone().unwrap();
        // Itself, another one that is not there, and one that is.
        match tenant.0 {
            1 => drop(providers.get(&Tenant(1))?),
            2 => drop(providers.get(&Tenant(3))?),
            4 => drop(providers.get(&Tenant(5))?),
            _ => {}
        }
        Ok::<_, Error>(TokenProvider::builder(StaticToken::new("abc")))
    });
    *own.lock().unwrap() = Some(providers.clone());
    for tenant in [1, 2] {
        let error = providers.get(&Tenant(tenant)).unwrap_err();
        assert!(matches!(&error, Error::Factory(_)), "{error}");
        assert!(error.to_string().contains("must not ask its own group"), "{error}");
    }
    providers.get(&Tenant(5)).unwrap();
    providers.get(&Tenant(4)).unwrap();
    assert_eq!(providers.len(), 2);
}

/// A tenant is removed while its provider is made.
#[test]
fn removal_during_the_factory_wins() {
    let (entered, leave) = (Arc::new(Barrier::new(2)), Arc::new(Barrier::new(2)));
    let waits = Arc::new(AtomicBool::new(true));
    let (enters, leaves, is_first) = (Arc::clone(&entered), Arc::clone(&leave), Arc::clone(&waits));
    let providers = TokenProviders::new(move |_: &Tenant| {
        if is_first.swap(false, Ordering::SeqCst) {
            enters.wait();
            leaves.wait();
        }
        Ok::<_, Infallible>(TokenProvider::builder(StaticToken::new("abc")))
    });
    thread::scope(|scope| {
        let old = scope.spawn(|| providers.get(&Tenant(1)).unwrap());
        entered.wait();
        // The account's credential has changed: from here on, the factory returns the new one.
        providers.remove(&Tenant(1));
        leave.wait();
        let old = old.join().unwrap();
        old.invalidate();
        drop(old);
    });
    assert_eq!(providers.len(), 0);
}

/// A tenant is removed, and comes back.
#[tokio::test(start_paused = true)]
async fn removed_provider_is_made_anew() {
    let sources = Sources::default();
    let providers = sources.providers();
    let service = layer(&providers).layer(api(|_| false));
    answer(&service, get(1)).await.unwrap();
    let removed = providers.remove(&Tenant(1)).unwrap();
    assert_eq!(removed.status().generation, 1);
    assert!(providers.remove(&Tenant(1)).is_none());
    assert!(providers.is_empty());
    answer(&service, get(1)).await.unwrap();
    assert_eq!((sources.made(), sources.asked(1)), (vec![1, 1], 2));
    // The other handle still works.
    assert_eq!(removed.token().await.unwrap().access_token(), "1-1");
}

/// The API challenges every token of one tenant.
#[tokio::test(start_paused = true)]
async fn storm_of_one_tenant_leaves_anothers_budget() {
    let sources = Sources::default();
    let providers = TokenProviders::new(move |tenant: &Tenant| {
        let builder = TokenProvider::builder(sources.source(tenant.0));
        Ok::<_, Infallible>(builder.retry_budget(10 * SECOND, 1, 0.0))
    });
    let lags = Arc::new(AtomicBool::new(false));
    let challenges = Arc::clone(&lags);
    // Tenant 1 is always challenged. Tenant 2 is while its API lags.
    let is_challenged = move |tenant| tenant == 1 || (tenant == 2 && challenges.load(Ordering::SeqCst));
    let attempts: Arc<Mutex<HashMap<u32, u64>>> = Arc::default();
    let counted = Arc::clone(&attempts);
    let service = layer(&providers).layer(api(move |tenant| {
        *counted.lock().unwrap().entry(tenant).or_default() += 1;
        is_challenged(tenant)
    }));
    answer(&service, get(2)).await.unwrap();
    for _ in 0..100 {
        answer(&service, get(1)).await.unwrap();
    }
    let storm = attempts.lock().unwrap()[&1];
    assert!(storm < 150, "the storm has spent its own budget: {storm}");

    attempts.lock().unwrap().clear();
    answer(&service, get(1)).await.unwrap();
    assert_eq!(attempts.lock().unwrap()[&1], 1);
    lags.store(true, Ordering::SeqCst);
    answer(&service, get(2)).await.unwrap();
    // The first retry is free, the second takes from the budget.
    assert_eq!(attempts.lock().unwrap()[&2], 3);
}

/// A tenant's request goes to the origin of another tenant.
#[tokio::test(start_paused = true)]
async fn origins_are_those_of_the_tenant() {
    struct At(u32);

    impl TokenSource for At {
        async fn fetch(&self, _: &TokenRequest<'_>) -> Result<Token, SourceError> {
            Ok(Token::builder(format!("{}-1", self.0)).build()?)
        }

        fn allowed_origins(&self) -> AllowedOrigins {
            AllowedOrigins::origins([format!("https://{}.example", self.0)]).unwrap()
        }
    }

    let providers =
        TokenProviders::new(|tenant: &Tenant| Ok::<_, Infallible>(TokenProvider::builder(At(tenant.0))));
    let service = layer(&providers).layer(api(|_| false));
    let to = |origin: u32, tenant| {
        let mut request = get(tenant);
        *request.uri_mut() = format!("https://{origin}.example/").parse().unwrap();
        answer(&service, request)
    };
    assert_eq!(to(1, 1).await.unwrap(), "1");
    assert_eq!(to(2, 2).await.unwrap(), "2");
    assert_eq!(to(2, 1).await.unwrap(), "", "the token of tenant 1 must not go to tenant 2's origin");
    // The layer's own origins are those of all tenants.
    let any = layer(&providers).allowed_origins(AllowedOrigins::https()).layer(api(|_| false));
    let mut request = get(1);
    *request.uri_mut() = "https://2.example/".parse().unwrap();
    assert_eq!(answer(&any, request).await.unwrap(), "1");
}

/// A tenant is idle for long, and comes back.
#[tokio::test(start_paused = true)]
async fn idle_provider_is_evicted() {
    let sources = Sources::default();
    let providers = sources.builder().idle_timeout(80 * SECOND).build().unwrap();
    let service = layer(&providers).layer(api(|_| false));
    answer(&service, get(1)).await.unwrap();
    answer(&service, get(2)).await.unwrap();
    let held = providers.get(&Tenant(3)).unwrap();
    for _ in 0..10 {
        sleep(20 * SECOND).await;
        answer(&service, get(1)).await.unwrap();
    }
    let keys =
        || providers.statuses().map(|(Tenant(tenant), _)| tenant).collect::<std::collections::BTreeSet<_>>();
    assert_eq!(keys(), [1, 3].into(), "the first is used, and the third has a handle");
    drop(held);
    sleep(79 * SECOND).await;
    assert!(keys().contains(&3), "it was in use until now");
    sleep(12 * SECOND).await;
    assert_eq!(keys(), [].into(), "nothing is used any more");
    // It comes back with one token request.
    answer(&service, get(2)).await.unwrap();
    assert_eq!((sources.asked(1), sources.asked(2)), (1, 2));
}

/// A provider is due for eviction while a refresh runs.
#[tokio::test(start_paused = true)]
async fn provider_with_a_running_refresh_is_not_evicted() {
    let source = Source::new().then(Act::Hang);
    let own = Arc::clone(&source);
    let made = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&made);
    let providers = TokenProviders::builder(move |_: &Tenant| {
        count.fetch_add(1, Ordering::SeqCst);
        Ok::<_, Infallible>(TokenProvider::builder(Arc::clone(&own)).refresh_timeout(HOUR))
    })
    .idle_timeout(8 * SECOND)
    .max_providers(1)
    .build()
    .unwrap();
    // The caller starts a refresh, and is dropped.
    let provider = providers.get(&Tenant(1)).unwrap();
    assert!(at_once(provider.token()).is_none());
    drop(provider);
    sleep(60 * SECOND).await;
    // Another tenant needs its place.
    providers.get(&Tenant(2)).unwrap();
    assert!(providers.statuses().any(|(key, status)| key == Tenant(1) && status.refreshing));
    assert_eq!(made.load(Ordering::SeqCst), 2);
    sleep(HOUR).await;
    assert!(providers.is_empty(), "the refresh has ended");
}

/// A source of a user's login: only the process has its newest refresh token.
struct Login;

impl TokenSource for Login {
    async fn fetch(&self, request: &TokenRequest<'_>) -> Result<Token, SourceError> {
        let next = match request.refresh_token() {
            None | Some("last") => return Err(SourceError::login_required("the login has ended")),
            Some("next") => "last",
            Some(_) => "next",
        };
        sleep(SECOND).await;
        Ok(Token::builder("1-1").refresh_token(next).expires_in(HOUR).build()?)
    }

    fn credential(&self) -> Credential {
        Credential::default().of_login()
    }
}

/// A tenant whose providers share a store.
fn builder_with_stores(
    stores: &Arc<Mutex<HashMap<u32, fleet::MemoryStore>>>,
    endpoint: &fleet::Endpoint,
) -> TokenProvidersBuilder<Tenant> {
    let (stores, endpoint) = (Arc::clone(stores), endpoint.clone());
    TokenProviders::builder(move |tenant: &Tenant| {
        let store = stores.lock().unwrap().entry(tenant.0).or_default().clone();
        Ok::<_, Infallible>(endpoint.process(&store))
    })
}

/// An evicted tenant comes back, and its store has the token.
#[tokio::test(start_paused = true)]
async fn evicted_tenant_comes_back_from_its_store_without_a_request() {
    let (stores, endpoint) = (Arc::default(), fleet::Endpoint::default());
    let providers = builder_with_stores(&stores, &endpoint).max_providers(1).build().unwrap();
    let first = providers.get(&Tenant(1)).unwrap().token().await.unwrap();
    let posts = endpoint.grants().posts();
    providers.get(&Tenant(2)).unwrap();
    assert!(providers.statuses().all(|(tenant, _)| tenant == Tenant(2)), "the first was evicted");
    let again = providers.get(&Tenant(1)).unwrap().token().await.unwrap();
    assert_eq!((again.access_token(), endpoint.grants().posts()), (first.access_token(), posts));
}

/// Only the process has the refresh token of an idle tenant.
#[tokio::test(start_paused = true)]
async fn login_that_is_not_stored_yet_is_kept() {
    let stores: Arc<Mutex<HashMap<u32, fleet::MemoryStore>>> = Arc::default();
    let shared = Arc::clone(&stores);
    let providers = TokenProviders::builder(move |tenant: &Tenant| {
        let store = shared.lock().unwrap().entry(tenant.0).or_default().clone();
        Ok::<_, Infallible>(TokenProvider::builder(Login).login("first").store(store))
    })
    .idle_timeout(8 * SECOND)
    .build()
    .unwrap();
    let provider = providers.get(&Tenant(1)).unwrap();
    let store = stores.lock().unwrap()[&1].clone();
    let obtained = tokio::spawn({
        let provider = provider.clone();
        async move { provider.token().await }
    });
    sleep(SECOND / 2).await;
    store.set(fleet::Health::Full);
    assert_eq!(obtained.await.unwrap().unwrap().access_token(), "1-1");
    drop(provider);
    sleep(60 * SECOND).await;
    assert_eq!(providers.len(), 1);
    store.set(fleet::Health::Good);
    sleep(60 * SECOND).await;
    assert!(providers.is_empty(), "the login is in the store");
    assert!(store.kept().record.unwrap().0.text().contains("next"));
}

/// The refresh tokens of a login, each of which may be presented once, and how long an exchange takes.
#[derive(Clone, Default)]
struct Rotating {
    presented: Arc<Mutex<Vec<String>>>,
    takes: Arc<Mutex<Duration>>,
}

impl TokenSource for Rotating {
    async fn fetch(&self, request: &TokenRequest<'_>) -> Result<Token, SourceError> {
        let Some(asked) = request.refresh_token() else {
            return Err(SourceError::login_required("the login has ended"));
        };
        self.presented.lock().unwrap().push(asked.to_owned());
        let (number, takes) = (self.presented.lock().unwrap().len(), *self.takes.lock().unwrap());
        sleep(takes).await;
        let token = Token::builder(format!("1-{number}")).refresh_token(format!("r{number}"));
        Ok(token.expires_in(60 * SECOND).build()?)
    }

    fn credential(&self) -> Credential {
        Credential::default().of_login()
    }
}

/// An idle tenant's exchange outlives its refresh, and the store fails as it ends.
#[tokio::test(start_paused = true)]
async fn exchange_that_outlives_its_refresh_keeps_the_provider() {
    let (login, store) = (Rotating::default(), fleet::MemoryStore::default());
    let (source, shared) = (login.clone(), store.clone());
    let providers = TokenProviders::builder(move |tenant: &Tenant| {
        let store = if tenant.0 == 1 { shared.clone() } else { fleet::MemoryStore::default() };
        let builder = TokenProvider::builder(source.clone()).login("r0").store(store);
        Ok::<_, Infallible>(builder.refresh_timeout(5 * SECOND))
    })
    .max_providers(1)
    .build()
    .unwrap();
    let provider = providers.get(&Tenant(1)).unwrap();
    provider.token().await.unwrap();
    *login.takes.lock().unwrap() = 20 * SECOND;
    provider.invalidate();
    provider.token().await.unwrap_err();
    drop(provider);
    // Another tenant needs its place.
    providers.get(&Tenant(2)).unwrap();
    store.set(fleet::Health::Down);
    sleep(120 * SECOND).await;
    store.set(fleet::Health::Good);
    *login.takes.lock().unwrap() = Duration::ZERO;
    sleep(120 * SECOND).await;
    providers.get(&Tenant(1)).unwrap().token().await.unwrap();
    assert_eq!(*login.presented.lock().unwrap(), ["r0", "r1", "r2"], "none is presented twice");
}

/// A request to an origin that the layer does not allow makes no provider.
#[tokio::test(start_paused = true)]
async fn request_to_a_foreign_origin_makes_no_provider() {
    let sources = Sources::default();
    let providers = sources.providers();
    let origins = AllowedOrigins::origins(["https://ws.api.video"]).unwrap();
    let service = layer(&providers).allowed_origins(origins).layer(api(|_| false));
    assert_eq!(answer(&service, get(1)).await.unwrap(), "");
    assert_eq!(providers.len(), 0);
}

/// Requests with unknown keys crowd the other tenants out.
#[tokio::test(start_paused = true)]
async fn unknown_tenants_evict_nobody() {
    let sources = Sources::default();
    let made = sources.clone();
    let providers = TokenProviders::builder(move |tenant: &Tenant| {
        if tenant.0 >= 100 {
            return Err(NoAccount(tenant.0));
        }
        Ok(TokenProvider::builder(made.source(tenant.0)))
    })
    .max_providers(100)
    .build()
    .unwrap();
    let service = layer(&providers).layer(api(|_| false));
    join_all((0..100).map(|tenant| answer(&service, get(tenant)))).await;
    for tenant in 100..10_000 {
        answer(&service, get(tenant)).await.unwrap_err();
    }
    assert_eq!(providers.len(), 100);
    join_all((0..100).map(|tenant| answer(&service, get(tenant)))).await;
    assert!((0..100).all(|tenant| sources.asked(tenant) == 1));
}

/// There are more tenants than the bound.
#[tokio::test(start_paused = true)]
async fn number_of_providers_is_bounded() {
    for max in [1, 2, 10, 100, 2001, 5000] {
        let sources = Sources::default();
        let providers = sources.builder().max_providers(max).build().unwrap();
        for tenant in 0..(max + max.min(500)) as u32 {
            providers.get(&Tenant(tenant)).unwrap();
            assert!(providers.len() <= max);
        }
        assert!(providers.len() * 10 >= max * 9, "{} of {max}", providers.len());
        let service = layer(&providers).layer(api(|_| false));
        for tenant in 0..(2 * max.min(10) as u32) {
            assert_eq!(answer(&service, get(tenant)).await.unwrap(), tenant.to_string());
        }
    }
}

/// A tenant is removed, and made again, while its request is challenged.
#[tokio::test(start_paused = true)]
async fn retry_keeps_the_provider_of_its_request() {
    let sources = Sources::default();
    let providers = sources.providers();
    let removes = providers.clone();
    let challenged = Arc::new(AtomicBool::new(true));
    let service = layer(&providers).layer(api(move |tenant| {
        // The tenant is removed, and made anew, while its request is challenged.
        let is_first = challenged.swap(false, Ordering::SeqCst);
        if is_first {
            removes.remove(&Tenant(tenant));
            removes.get(&Tenant(tenant)).unwrap();
        }
        is_first
    }));
    assert_eq!(answer(&service, get(4)).await.unwrap(), "4");
    assert_eq!(sources.made(), [4, 4]);
    // Both tokens are of the first provider.
    assert_eq!(sources.asked(4), 2);
    assert_eq!(providers.get(&Tenant(4)).unwrap().status().generation, 0);
}

/// The program shuts down while providers of many tenants refresh.
#[tokio::test(start_paused = true)]
async fn shutdown_waits_for_all_refreshes() {
    let sources = Sources::default();
    let providers = sources.providers();
    for tenant in 0..10 {
        assert!(at_once(providers.get(&Tenant(tenant)).unwrap().token()).is_none());
    }
    providers.shutdown().await;
    let statuses: Vec<_> = providers.statuses().map(|(_, status)| status).collect();
    assert_eq!(statuses.len(), 10);
    assert!(statuses.iter().all(|status| status.shut_down && !status.refreshing && status.generation == 1));
    assert!(matches!(providers.get(&Tenant(99)), Err(Error::ShutDown)));
    // A token that works is still used.
    assert_eq!(answer(&layer(&providers).layer(api(|_| false)), get(3)).await.unwrap(), "3");
}

/// The last handle of a group is dropped while its providers refresh.
#[tokio::test(start_paused = true)]
async fn drop_of_the_last_handle_ends_all() {
    let sources = Sources::default();
    let providers = sources.providers();
    let mut changes = providers.get(&Tenant(1)).unwrap().subscribe();
    let service = layer(&providers).layer(api(|_| false));
    drop(providers);
    answer(&service, get(1)).await.unwrap();
    drop(service);
    while let Some(status) = changes.next().await {
        assert!(status.generation <= 1);
    }
}

/// The `Debug` output of a group contains a key, which may be a secret.
#[tokio::test(start_paused = true)]
async fn debug_shows_no_key() {
    let providers = TokenProviders::new(|_: &String| {
        Ok::<_, Infallible>(TokenProvider::builder(StaticToken::new("canary-token")))
    });
    providers.get("canary-key").unwrap().token().await.unwrap();
    let layer = BearerAuthLayer::by_key(providers.clone(), |head| {
        head.headers.get("x-tenant")?.to_str().ok().map(Cow::Borrowed)
    });
    let service = layer.layer(tower::service_fn(|_: Request<String>| async {
        Ok::<_, Infallible>(Response::new(String::new()))
    }));
    let shown = format!("{providers:?} {layer:?} {:?}", providers.get("canary-key").unwrap());
    let _ = service;
    assert!(!shown.contains("canary"), "{shown}");
}

/// An option of a group is out of its range.
#[test]
fn options_out_of_range_are_errors() {
    let builder = || Sources::default().builder();
    let error = |builder: TokenProvidersBuilder<Tenant>| builder.build().unwrap_err().to_string();
    assert!(error(builder().name("")).contains("name must be at least one character long"));
    assert!(error(builder().max_providers(0)).contains("max_providers must be >= 1 and <= 10000000, got 0"));
    assert!(error(builder().max_providers(usize::MAX)).contains("max_providers"));
    assert!(
        error(builder().idle_timeout(Duration::ZERO))
            .contains("idle_timeout must be >= 1s and <= 30 days, got 0s")
    );
    assert!(error(builder().idle_timeout(Duration::MAX)).contains("idle_timeout"));
    assert!(builder().without_idle_timeout().max_providers(1).build().is_ok());
}

/// A group without an idle timeout keeps idle providers.
#[tokio::test(start_paused = true)]
async fn without_idle_timeout_nothing_is_aged_out() {
    let sources = Sources::default();
    let providers = sources.builder().without_idle_timeout().build().unwrap();
    answer(&layer(&providers).layer(api(|_| false)), get(1)).await.unwrap();
    advance(1000 * HOUR).await;
    sleep(SECOND).await;
    assert_eq!(providers.len(), 1);
}

/// The tokens of thousands of tenants were issued at one moment, and expire at one moment.
#[tokio::test(start_paused = true)]
async fn kept_fresh_tenants_spread_their_refreshes() {
    const TENANTS: u32 = 2000;
    let begun = Instant::now();
    let asked_at: Arc<Mutex<Vec<Duration>>> = Arc::default();
    let asked = Arc::clone(&asked_at);
    let providers = TokenProviders::new(move |_: &Tenant| {
        let asked = Arc::clone(&asked);
        let source = source_fn(move |_| {
            asked.lock().unwrap().push(begun.elapsed());
            async { Ok(Token::builder("abc").expires_in(HOUR).build()?) }
        });
        Ok::<_, Infallible>(TokenProvider::builder(source).keep_fresh(true))
    });
    for tenant in 0..TENANTS {
        providers.get(&Tenant(tenant)).unwrap();
    }
    sleep(HOUR * 9 / 10 + 60 * SECOND).await;
    assert_eq!(providers.len(), TENANTS as usize);
    let mut by_second = BTreeMap::<u64, u32>::new();
    for at in asked_at.lock().unwrap().drain(..).skip(TENANTS as usize) {
        *by_second.entry(at.as_secs()).or_default() += 1;
    }
    assert_eq!(by_second.values().sum::<u32>(), TENANTS, "each was refreshed once: {by_second:?}");
    // The window is 72 s wide: a tenth of the tenth of an hour, before and after.
    assert!(by_second.len() > 60, "{by_second:?}");
    assert!(by_second.values().all(|count| *count < TENANTS / 20), "{by_second:?}");
}

/// The background refreshes the token of an idle tenant, which is evicted nevertheless.
#[tokio::test(start_paused = true)]
async fn background_refresh_keeps_no_idle_provider() {
    let sources = Sources::default();
    let made = sources.clone();
    let providers = TokenProviders::builder(move |tenant: &Tenant| {
        Ok::<_, Infallible>(TokenProvider::builder(made.source(tenant.0)).keep_fresh(true))
    })
    .idle_timeout(2 * HOUR)
    .build()
    .unwrap();
    providers.get(&Tenant(1)).unwrap();
    sleep(HOUR).await;
    assert_eq!(sources.asked(1), 2, "it is kept fresh without requests");
    sleep(24 * HOUR).await;
    assert_eq!((providers.len(), sources.asked(1)), (0, 3), "until it has been idle for two hours");
}

/// Pseudo-random numbers, the same in each run.
struct Chance(u64);

impl Chance {
    fn draw(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % below
    }
}

/// What the server of [`requests_never_carry_the_token_of_another_tenant`] knows.
#[derive(Default)]
struct Issued {
    number: AtomicU64,
    /// The number of the first token of each tenant that is valid.
    valid_from: Mutex<HashMap<u32, u64>>,
    mixed: AtomicU64,
    token_requests: AtomicU64,
}

impl Issued {
    async fn issue(axum::extract::State(issued): axum::extract::State<Arc<Self>>, tenant: String) -> String {
        issued.token_requests.fetch_add(1, Ordering::SeqCst);
        // The others' requests overtake this one.
        tokio::task::yield_now().await;
        format!("{tenant}-{}", issued.number.fetch_add(1, Ordering::SeqCst))
    }

    async fn api(
        axum::extract::State(issued): axum::extract::State<Arc<Self>>,
        axum::extract::Path(tenant): axum::extract::Path<u32>,
        headers: HeaderMap,
    ) -> (StatusCode, String) {
        let token = headers[AUTHORIZATION].to_str().unwrap().strip_prefix("Bearer ").unwrap().to_owned();
        let (of, number) = token.split_once('-').unwrap();
        if of != tenant.to_string() {
            issued.mixed.fetch_add(1, Ordering::SeqCst);
        }
        let valid_from = issued.valid_from.lock().unwrap().get(&tenant).copied().unwrap_or_default();
        let is_valid = number.parse::<u64>().unwrap() >= valid_from;
        (if is_valid { StatusCode::OK } else { StatusCode::UNAUTHORIZED }, of.to_owned())
    }

    fn revoke(&self, tenant: u32) {
        self.valid_from.lock().unwrap().insert(tenant, self.number.load(Ordering::SeqCst));
    }
}

/// The tokens of two tenants are mixed up, by random revocations, evictions, removals and dropped requests, over
/// sockets.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_never_carry_the_token_of_another_tenant() {
    const TENANTS: u64 = 24;
    let issued = Arc::new(Issued::default());
    let router = axum::Router::new()
        .route("/token", axum::routing::post(Issued::issue))
        .route("/api/{tenant}", axum::routing::get(Issued::api))
        .with_state(Arc::clone(&issued));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await });

    let http = support::http1::<Full<Bytes>>();
    let asks = http.clone();
    let providers = TokenProviders::builder(move |tenant: &Tenant| {
        let (asks, tenant) = (asks.clone(), tenant.0);
        Ok::<_, Infallible>(TokenProvider::builder(source_fn(move |_| {
            let request =
                Request::post(format!("http://{address}/token")).body(Full::from(tenant.to_string()));
            let response = asks.request(request.unwrap());
            async move {
                use http_body_util::BodyExt;
                let failed = |_| SourceError::unavailable("no response");
                let response = response.await.map_err(|_| SourceError::unavailable("no response"))?;
                let body = response.into_body().collect().await.map_err(failed)?.to_bytes();
                Ok(Token::builder(String::from_utf8_lossy(&body)).expires_in(HOUR).build()?)
            }
        })))
    })
    .max_providers(16)
    .idle_timeout(SECOND)
    .build()
    .unwrap();
    let service =
        BearerAuthLayer::by_key(providers.clone(), |head| head.extensions.get::<Tenant>().map(Cow::Borrowed))
            .layer(http);

    let (healed, dropped) = (AtomicU64::new(0), AtomicU64::new(0));
    let run = |seed| {
        let (service, providers, issued, healed, dropped) =
            (service.clone(), providers.clone(), &issued, &healed, &dropped);
        async move {
            let mut chance = Chance(seed);
            for _ in 0..150 {
                // The first tenants are busy, the others are idle from time to time.
                let tenant = chance.draw(chance.0 % TENANTS + 1) as u32;
                match chance.draw(40) {
                    0 => drop(providers.remove(&Tenant(tenant))),
                    1..=3 => issued.revoke(tenant),
                    _ => {}
                }
                let request = Request::get(format!("http://{address}/api/{tenant}"))
                    .extension(Tenant(tenant))
                    .body(Full::default())
                    .unwrap();
                let mut response = Box::pin(service.clone().oneshot(request));
                if chance.draw(10) == 0 {
                    for _ in 0..chance.draw(4) {
                        if at_once(response.as_mut()).is_some() {
                            break;
                        }
                        tokio::task::yield_now().await;
                    }
                    dropped.fetch_add(1, Ordering::SeqCst);
                    continue;
                }
                use http_body_util::BodyExt;
                let response = response.await.unwrap();
                healed.fetch_add(u64::from(response.status() == StatusCode::OK), Ordering::SeqCst);
                let body = response.into_body().collect().await.unwrap().to_bytes();
                assert_eq!(body, tenant.to_string(), "the response to another tenant's request");
            }
        }
    };
    join_all((1..=16).map(run)).await;
    assert_eq!(issued.mixed.load(Ordering::SeqCst), 0);
    let (healed, dropped) = (healed.into_inner(), dropped.into_inner());
    assert!(dropped > 100 && healed * 10 > (16 * 150 - dropped) * 9, "{healed} of {}", 16 * 150 - dropped);
    let token_requests = issued.token_requests.load(Ordering::SeqCst);
    assert!(token_requests > 2 * TENANTS, "providers were evicted, removed and refreshed: {token_requests}");
}
