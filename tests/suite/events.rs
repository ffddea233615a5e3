//! Every documented event is emitted with its fields, and no other event is.
#![cfg(all(feature = "tracing", feature = "default-client"))]

use std::{
    borrow::Cow,
    collections::BTreeSet,
    convert::Infallible,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{Empty, Full};
use tokio::time::{advance, sleep};
use tower::{Layer, ServiceExt};
use tower_bearer::{
    ApiVideo, BearerAuthLayer, RetryPolicy, SourceError, Token, TokenClient, TokenFile, TokenProvider,
    TokenProviders, TokenSource, source_fn,
};
use tracing::{Event, Level, Metadata, Subscriber, span};

use crate::support::{
    Act, Api, HOUR, Scene, SceneBuilder, Source, fleet,
    folder::Folder,
    get,
    log::{Fields, Logged, Record},
    scene, scene_of,
};

/// An event in the documentation of `observability`.
#[derive(Debug)]
struct Documented {
    /// The message, with `{}` for a number.
    message: String,
    /// Its level, and `DEBUG` if it may be repeated.
    levels: Vec<Level>,
    fields: BTreeSet<String>,
    in_refresh_span: bool,
}

impl Documented {
    fn is_of(&self, event: &Logged) -> bool {
        let mut rest = &*event.message;
        self.message.split("{}").all(|part| match rest.strip_prefix(part) {
            Some(left) => {
                rest = left.trim_start_matches(|digit: char| digit.is_ascii_digit());
                true
            }
            None => false,
        }) && rest.is_empty()
    }
}

fn documented() -> Vec<Documented> {
    let mut in_refresh_span = false;
    let mut events = Vec::new();
    let names = |text: &str| text.split('`').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>();
    for line in
        include_str!("../../src/observability/mod.rs").lines().take_while(|line| line.starts_with("//!"))
    {
        in_refresh_span |= line.starts_with("//! Within a refresh's span");
        in_refresh_span &= !line.starts_with("//! Outside of a refresh");
        let columns: Vec<_> = line.trim_start_matches("//!").trim().trim_matches('|').split(" | ").collect();
        let words = columns.get(1).into_iter().flat_map(|text| text.split([',', ' ']));
        let levels: Vec<Level> = words.filter_map(|word| word.parse().ok()).collect();
        if levels.is_empty() {
            continue;
        }
        let mut fields: BTreeSet<_> = names(columns.get(2).unwrap_or(&"")).into_iter().collect();
        if !in_refresh_span {
            fields.insert("provider".to_owned());
        }
        let message = names(columns[0]).remove(0);
        events.push(Documented { message, levels, fields, in_refresh_span });
    }
    events
}

/// Builds a scene whose provider is `videos`.
fn videos<T: TokenSource>(scene: SceneBuilder<'_, T>) -> Scene<T> {
    scene.provider(|builder| builder.name("videos")).build()
}

/// Triggers every event.
async fn trigger_every_event() {
    let second = Duration::from_secs(1);

    // The source fails once, then returns a token. A request is challenged, and its retry succeeds. The next request is
    // challenged until its retries are used.
    let down = Act::Fail(SourceError::unavailable("down").with_cause("the connection was reset"));
    let Scene { api, provider, service, .. } = videos(scene().living(HOUR).then(down).accept(["access-3"]));
    assert_eq!(service.clone().oneshot(get()).await.unwrap().status(), StatusCode::OK);
    api.revoke_all();
    assert_eq!(service.oneshot(get()).await.unwrap().status(), StatusCode::UNAUTHORIZED);
    provider.invalidate();
    provider.shutdown().await;

    // The source returns the challenged token again, which is about to expire. Another source returns an unchallenged
    // token again. A credential is rejected.
    let same = videos(scene().then(Act::Live(HOUR)).then(Act::Again(Duration::ZERO))).provider;
    let first = same.token().await.unwrap();
    same.refresh(&first).await.unwrap();
    advance(HOUR).await;
    let only = source_fn(|_| async { Ok(Token::builder("access-1").build()?) });
    let same = videos(scene_of(only)).provider;
    let first = same.token().await.unwrap();
    for _ in 0..2 {
        same.refresh(&first).await.unwrap();
        advance(second * 10).await;
    }
    let same = videos(scene().then(Act::Live(HOUR)).then(Act::Again(HOUR))).provider;
    same.token().await.unwrap();
    advance(HOUR * 2).await;
    same.token().await.unwrap();
    let reject = || Act::Fail(SourceError::rejected("the key was rejected"));
    let service = videos(scene().times(2, reject)).service;
    for _ in 0..2 {
        assert!(service.clone().oneshot(get()).await.is_err());
        advance(second * 10).await;
    }

    // The refreshes that challenges start fail.
    let down = || Act::Fail(SourceError::unavailable("down"));
    let provider = videos(scene().then(Act::Live(HOUR)).times(6, down)).provider;
    let first = provider.token().await.unwrap();
    for _ in 0..2 {
        assert!(provider.refresh(&first).await.is_err());
    }

    // An outage: the refresh of an expiring token fails twice, then requests fail twice, then it is over. Later the
    // credential is rejected while the token works.
    let outage = scene().living(HOUR).then(Act::Live(HOUR)).times(12, down);
    let Scene { source, provider, service, .. } = videos(outage);
    provider.token().await.unwrap();
    advance(HOUR * 95 / 100).await;
    for _ in 0..2 {
        provider.token().await.unwrap();
        sleep(second * 30).await;
    }
    advance(HOUR).await;
    for _ in 0..2 {
        assert!(service.clone().oneshot(get()).await.is_err());
    }
    provider.token().await.unwrap();
    (0..4).for_each(|_| source.next(reject()));
    advance(HOUR * 95 / 100).await;
    let current = provider.token().await.unwrap();
    sleep(second * 3).await;
    provider.token().await.unwrap();
    sleep(second * 10).await;
    // The API challenges it, too.
    for _ in 0..2 {
        assert!(provider.refresh(&current).await.is_err());
        sleep(second * 20).await;
    }
    // A login is required, or the configuration is wrong, while the token works and after that.
    let failures = [
        SourceError::login_required("the refresh token was rejected"),
        SourceError::configuration("no such path"),
    ];
    for failure in failures {
        let fail = || Act::Fail(failure.clone());
        let provider = videos(scene().living(HOUR).then(Act::Live(HOUR)).times(4, fail)).provider;
        provider.token().await.unwrap();
        let challenged = videos(scene().then(Act::Live(HOUR)).times(2, fail)).provider;
        let first = challenged.token().await.unwrap();
        for _ in 0..2 {
            assert!(challenged.refresh(&first).await.is_err());
            sleep(second * 5).await;
        }
        advance(HOUR * 95 / 100).await;
        for _ in 0..2 {
            provider.token().await.unwrap();
            sleep(second * 5).await;
        }
        advance(HOUR).await;
        for _ in 0..2 {
            assert!(provider.token().await.is_err());
            sleep(second * 20).await;
        }
        // Nobody needs the token of a provider that keeps fresh.
        let idle = videos(scene().times(3, fail).provider(|builder| builder.keep_fresh(true))).provider;
        sleep(second * 5).await;
        idle.shutdown().await;
    }
    let idle = videos(scene().times(3, reject).provider(|builder| builder.keep_fresh(true))).provider;
    sleep(second * 5).await;
    idle.shutdown().await;

    // Tokens that are about to expire, several in a row.
    let provider = videos(scene().living(Duration::from_millis(50))).provider;
    for _ in 0..2 {
        provider.token().await.unwrap();
        sleep(second * 5).await;
    }

    // A caller joins a refresh. A challenge is late. The refresh of an expiring token fails. A permanent failure lasts.
    let Scene { source, provider, .. } = videos(scene().living(HOUR));
    let (first, _) = tokio::join!(provider.token(), provider.token());
    let first = first.unwrap();
    provider.refresh(&first).await.unwrap();
    provider.refresh(&first).await.unwrap();
    advance(HOUR * 95 / 100).await;
    source.next(Act::Fail(SourceError::unavailable("limited").with_retry_after(HOUR)));
    provider.token().await.unwrap();
    sleep(second * 2).await;
    provider.token().await.unwrap();
    let provider = videos(scene().then(reject())).provider;
    assert!(provider.token().await.is_err());
    assert!(provider.token().await.is_err());

    // A token file is removed before it is read again.
    let folder = Folder::new();
    std::fs::write(folder.token(), "canary-file").unwrap();
    let file = videos(scene_of(TokenFile::new(folder.token()))).provider;
    let first = file.token().await.unwrap();
    std::fs::remove_file(folder.token()).unwrap();
    assert_eq!(file.refresh(&first).await.unwrap().generation(), 1);
    advance(second * 120).await;
    file.token().await.unwrap();
    std::fs::write(folder.token(), "canary-file-2").unwrap();
    advance(second * 120).await;
    file.token().await.unwrap();

    // Two requests to an origin that is not allowed.
    let Scene { service, layer, api: other, .. } = videos(scene());
    for _ in 0..2 {
        let request = Request::get("http://api.example/?token=canary").body(Empty::<Bytes>::new()).unwrap();
        let response = service.clone().oneshot(request).await.unwrap();
        assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
    }

    // A request has a header of its own. The body of another one is longer than the limit.
    let own =
        Request::get("http://127.0.0.1/").header("authorization", "Basic canary").body(Empty::<Bytes>::new());
    service.oneshot(own.unwrap()).await.unwrap();
    let long = layer.buffered(1).layer(other.service());
    let request = Request::post("http://127.0.0.1/").body(Full::<Bytes>::from("long")).unwrap();
    assert_eq!(long.clone().oneshot(request.clone()).await.unwrap().status(), StatusCode::UNAUTHORIZED);
    assert_eq!(long.oneshot(request).await.unwrap().status(), StatusCode::UNAUTHORIZED);

    // The program sets tokens, one of them without a lifetime.
    let set = videos(scene()).provider;
    set.set(Token::builder("access-9").expires_in(HOUR).build().unwrap());
    set.set(Token::builder("access-10").build().unwrap());

    // A refresh times out.
    assert!(videos(scene().then(Act::Hang)).provider.token().await.is_err());

    // Requests that are not retried: there is no other token, no retry, no replayable body, or no budget.
    let Scene { api, provider, layer, service, .. } =
        videos(scene().living(HOUR).then(Act::Live(HOUR)).then(reject()));
    provider.token().await.unwrap();
    assert_eq!(service.oneshot(get()).await.unwrap().status(), StatusCode::UNAUTHORIZED);
    advance(second * 2).await;
    let none = layer.clone().retry(RetryPolicy::new().max_retries(0));
    assert_eq!(none.layer(api.service()).oneshot(get()).await.unwrap().status(), StatusCode::UNAUTHORIZED);
    let none = layer.clone().no_replay();
    assert_eq!(none.layer(api.service()).oneshot(get()).await.unwrap().status(), StatusCode::UNAUTHORIZED);
    sleep(second * 2).await;
    let broke = videos(scene().provider(|builder| builder.retry_budget(second, 0, 0.0))).service;
    assert_eq!(broke.oneshot(get()).await.unwrap().status(), StatusCode::UNAUTHORIZED);

    // api.video rejects a refresh token. The response to another one is lost twice. A lifetime is not a number.
    let responses = Arc::new(Mutex::new(vec!["3600", "lost", "lost", "soon", "3600", "rejected", "3600"]));
    let auth = tower::service_fn(move |_: Request<String>| {
        let mut responses = responses.lock().unwrap();
        let (response, number) = (responses.pop().unwrap(), responses.len());
        async move {
            let status = if response == "rejected" { StatusCode::BAD_REQUEST } else { StatusCode::OK };
            let body = match response {
                "lost" => "{".to_owned(),
                response => format!(
                    r#"{{"access_token": "access-{number}", "refresh_token": "refresh-{number}", "expires_in": "{response}"}}"#
                ),
            };
            Ok::<_, Infallible>(Response::builder().status(status).body(Full::<Bytes>::from(body)).unwrap())
        }
    });
    let source = ApiVideo::new("canary-key").with_client(TokenClient::with_service(auth));
    let provider = videos(scene_of(source)).provider;
    for _ in 0..2 {
        let token = provider.token().await.unwrap();
        provider.refresh(&token).await.unwrap();
        advance(second * 10).await;
    }
    let token = provider.token().await.unwrap();
    provider.refresh(&token).await.unwrap();

    // A user logs in, and the store says that the refresh token is presented. The login is given again.
    let login = source_fn(|_| async { Ok(Token::builder("access-1").refresh_token("refresh-1").build()?) });
    let login = TokenProvider::builder(login).login("canary-seed").store(fleet::MemoryStore::default());
    let login = login.name("videos").build().unwrap();
    login.token().await.unwrap();
    login.log_in("canary-seed");

    // The record is one of another credential.
    let store = fleet::MemoryStore::default();
    store.put(r#"{"schema":1,"access_token":"canary","credential":"1","token_credential":"2"}"#, HOUR);
    let other = fleet::Endpoint::default().process(&store).name("videos").build().unwrap();
    other.token().await.unwrap();

    fleet::trigger_every_store_event("videos").await;
    trigger_every_event_of_tenants().await;
}

/// Providers are evicted, one is kept since it is used, and requests have no provider.
async fn trigger_every_event_of_tenants() {
    // Two tenants share a store: one uses the token of the other one.
    let store = Arc::new(fleet::MemoryStore::default());
    let both = TokenProviders::new(move |_: &u8| {
        Ok::<_, Infallible>(
            TokenProvider::builder(Source::living(HOUR)).name("tenant").store(Arc::clone(&store)),
        )
    });
    for key in 0..2 {
        both.get(&key).unwrap().token().await.unwrap();
    }
    let providers = TokenProviders::builder(|key: &&str| match *key {
        "canary-unknown" => Err("no such tenant"),
        key => Ok(TokenProvider::builder(Source::new()).name(format!("tenant-{}", key.len()))),
    })
    .name("tenants")
    .max_providers(1)
    .idle_timeout(Duration::from_secs(8))
    .build()
    .unwrap();
    providers.get(&"canary-a").unwrap();
    let used = providers.get(&"canary-bc").unwrap();
    used.token().await.unwrap();
    providers.get(&"canary-bcd").unwrap();
    assert_eq!(providers.len(), 2);
    drop(used);
    sleep(Duration::from_secs(20)).await;
    assert!(providers.is_empty());
    let layer =
        BearerAuthLayer::by_key(providers, |head| head.extensions.get::<&'static str>().map(Cow::Borrowed));
    let service = layer.layer(Api::default().service());
    for _ in 0..2 {
        service.clone().oneshot(get()).await.unwrap_err();
        let mut request = get();
        request.extensions_mut().insert("canary-unknown");
        service.clone().oneshot(request).await.unwrap_err();
    }
}

/// An event does not name the tenant as the factory does, or a request without a tenant as the group.
#[tokio::test(start_paused = true)]
async fn events_name_the_tenant() {
    let (record, _guard) = Record::start();
    trigger_every_event_of_tenants().await;
    let events = record.events();
    let of = |message: &str, level: Level| {
        let events = events.iter().filter(|event| event.message.starts_with(message) && event.level == level);
        events.map(|event| event.fields["provider"].clone()).collect::<Vec<_>>()
    };
    let evicted = of("provider evicted", Level::DEBUG);
    assert!(evicted.len() == 3 && evicted.iter().all(|name| name.starts_with("tenant-")), "{events:?}");
    assert_eq!(of("more providers than", Level::WARN), ["tenants"]);
    assert_eq!(of("request failed", Level::ERROR), ["tenants", "tenants"]);
    assert_eq!(of("request failed", Level::DEBUG), ["tenants", "tenants"]);
    assert!(!format!("{events:?}").contains("canary"));
}

/// A thousand tenants log a line each at an expiry.
#[tokio::test(start_paused = true)]
async fn tokens_of_tenants_are_counted() {
    let (record, _guard) = Record::start();
    let group = TokenProviders::builder(|_: &u32| {
        Ok::<_, Infallible>(TokenProvider::builder(Source::living(HOUR)).name("tenant"))
    });
    let group = group.name("tenants").build().unwrap();
    for _ in 0..2 {
        for tenant in 0..1000 {
            let provider = group.get(&tenant).unwrap();
            tokio::spawn(async move { provider.token().await.unwrap() });
        }
        sleep(2 * HOUR).await;
    }
    let events = record.events();
    let of = |message: &'static str, level: Level| {
        events.iter().filter(move |event| event.message == message && event.level == level)
    };
    assert_eq!(
        (of("token published", Level::INFO).count(), of("token published", Level::DEBUG).count()),
        (0, 2000)
    );
    let counted: Vec<_> = of("tokens of the group published", Level::INFO)
        .map(|event| (&*event.fields["group"], &*event.fields["tokens"]))
        .collect();
    assert_eq!(counted, [("tenants", "1"), ("tenants", "1000")]);
    assert_eq!(events.iter().filter(|event| event.level <= Level::INFO).count(), 2);
}

/// An event is not documented, or contains a secret.
#[tokio::test(start_paused = true)]
async fn emits_exactly_documented_events() {
    let (record, _guard) = Record::start();
    trigger_every_event().await;
    let emitted = record.events();
    let documented = documented();
    assert!(documented.len() > 15, "{documented:?}");
    for event in &emitted {
        let Some(Documented { levels, fields, in_refresh_span, .. }) =
            documented.iter().find(|documented| documented.is_of(event))
        else {
            panic!("not documented: {event:?}")
        };
        assert!(levels.contains(&event.level), "{event:?}");
        assert_eq!(*in_refresh_span, event.in_refresh_span, "{event:?}");
        let is_absent_without_lifetime =
            |field: &String| field.ends_with("_in_ms") || field == "works_for_ms" || field == "repeated";
        for field in fields.iter().filter(|field| !event.fields.contains_key(*field)) {
            assert!(is_absent_without_lifetime(field), "no {field} in {event:?}");
        }
        for field in event.fields.keys() {
            assert!(fields.contains(field), "{field} is not documented: {event:?}");
        }
    }
    // One event needs a suspended machine. A unit test covers it.
    for event in documented.iter().filter(|event| !event.message.contains("wall clock is ahead")) {
        for level in &event.levels {
            let is_emitted = emitted.iter().any(|emitted| event.is_of(emitted) && emitted.level == *level);
            assert!(is_emitted, "not emitted at {level}: {}", event.message);
        }
    }
    record.one("origin is not allowed; sending the request without the token");
    let reasons: BTreeSet<_> = emitted
        .iter()
        .filter(|event| event.message.starts_with("not retrying"))
        .filter_map(|event| event.fields.get("reason").cloned())
        .collect();
    assert_eq!(
        reasons.into_iter().collect::<Vec<_>>(),
        ["body_not_replayable", "budget_exhausted", "no_token", "retries_exhausted"]
    );

    // No event contains a secret.
    for secret in ["access-", "refresh-", "canary", "Bearer"] {
        assert!(!format!("{emitted:?}{:?}", record.spans.lock().unwrap()).contains(secret), "{secret}");
    }
}

/// The event of a failed refresh has the chain of causes, and the delay.
#[tokio::test(start_paused = true)]
async fn failure_event_has_chain_and_delay() {
    let (record, _guard) = Record::start();
    let error = SourceError::unavailable("down")
        .with_cause("the connection was reset")
        .with_retry_after(Duration::from_secs(7));
    let provider = videos(scene().living(HOUR).then(Act::Fail(error))).provider;
    provider.token().await.unwrap();
    let failed =
        record.events().into_iter().find(|event| event.message.starts_with("refresh failed")).unwrap();
    let delay_ms = &failed.fields["delay_ms"];
    assert_eq!(failed.message, format!("refresh failed (attempt 1 of 3), next try in {delay_ms} ms"));
    assert_eq!(failed.fields["attempt"], "1");
    assert_eq!(failed.fields["kind"], "unavailable");
    assert_eq!(failed.fields["error"], "no access token could be obtained: down: the connection was reset");
    let delay: u64 = failed.fields["delay_ms"].parse().unwrap();
    assert!((7100..=7200).contains(&delay), "{delay}");
    let published = record.one("token published");
    assert_eq!((&*published.fields["generation"], &*published.fields["expires_in_ms"]), ("1", "3600000"));
    // Two fetches of a second each, and the delay between them.
    let took: u64 = published.fields["took_ms"].parse().unwrap();
    assert!((2000 + delay..=2001 + delay).contains(&took), "{took}");
}

/// The span of a refresh does not lead to the request that started it.
#[tokio::test(start_paused = true)]
async fn refresh_span_follows_from_starter() {
    let (record, _guard) = Record::start();
    let provider = videos(scene().living(HOUR)).provider;
    let caller = tracing::info_span!("caller");
    let token = tracing::Instrument::instrument(provider.token(), caller).await.unwrap();
    provider.refresh(&token).await.unwrap();
    advance(HOUR * 95 / 100).await;
    provider.token().await.unwrap();
    sleep(Duration::from_secs(2)).await;
    advance(HOUR * 2).await;
    provider.token().await.unwrap();
    let spans = record.spans.lock().unwrap();
    let shown: Vec<_> =
        spans.iter().map(|span| (&*span["refresh"], &*span["reason"], &*span["generation"])).collect();
    assert_eq!(
        shown,
        [("1", "missing", "0"), ("2", "challenged", "1"), ("3", "expiring", "2"), ("4", "expired", "3")]
    );
    assert!(spans.iter().all(|span| span["provider"] == "videos"));
    assert_eq!(*record.followed.lock().unwrap(), ["caller"]);
}

/// A request with a valid token emits an event.
#[tokio::test(start_paused = true)]
async fn good_token_emits_no_event() {
    let Scene { provider, service, .. } = videos(scene().living(HOUR).accept(["access-1"]));
    let (record, _guard) = Record::start();
    provider.token().await.unwrap();
    record.events.lock().unwrap().clear();
    assert_eq!(service.oneshot(get()).await.unwrap().status(), StatusCode::OK);
    assert!(record.events().is_empty(), "{:?}", record.events());
}

/// A subscriber that calls the provider from its callbacks, and may panic.
#[derive(Clone, Default)]
struct Reentrant {
    provider: Arc<std::sync::OnceLock<TokenProvider>>,
    panics: bool,
}

impl Subscriber for Reentrant {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let is_published = fields.0.get("message").is_some_and(|message| message == "token published");
        assert!(!(self.panics && is_published), "expected panic of the subscriber");
        self.call_provider();
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}

    fn clone_span(&self, id: &span::Id) -> span::Id {
        self.call_provider();
        id.clone()
    }

    fn try_close(&self, _: span::Id) -> bool {
        self.call_provider();
        false
    }
}

impl Reentrant {
    fn call_provider(&self) {
        if let Some(provider) = self.provider.get() {
            provider.status();
        }
    }
}

/// A subscriber calls the provider: it is called without a lock, and its panic ends the refresh.
#[test]
fn reentrant_subscriber_is_no_deadlock() {
    for panics in [false, true] {
        let (done, ended) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let reentrant = Reentrant { panics, ..Reentrant::default() };
            let _guard = tracing::subscriber::set_default(reentrant.clone());
            let mut runtime = tokio::runtime::Builder::new_current_thread();
            runtime.enable_time().start_paused(true).build().unwrap().block_on(async {
                let provider = videos(scene().living(HOUR)).provider;
                reentrant.provider.set(provider.clone()).unwrap();
                let started = tokio::spawn({
                    let provider = provider.clone();
                    async move { provider.token().await }
                });
                tokio::task::yield_now().await;
                let joined =
                    tokio::time::timeout(HOUR / 2, provider.token()).await.expect("the caller is stuck");
                let started = started.await.unwrap();
                assert_eq!((started.is_err(), joined.is_err()), (panics, panics));
            });
            done.send(()).unwrap();
        });
        // The thread never ends in a deadlock. A failed assertion drops the sender.
        ended.recv_timeout(Duration::from_secs(60)).expect("deadlock, or a failed assertion above");
    }
}
