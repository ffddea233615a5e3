//! The alerts and the dashboard of `examples/prometheus`, in a real Prometheus that scrapes this program.
//!
//! Needs `prometheus` and `promtool` (Debian's package `prometheus`).

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use axum::{Router, routing::get};
use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::Full;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use serde_json::Value;
use tokio::{
    net::TcpListener,
    process::{Child, Command},
    time::{Instant, sleep},
};
use tower::{Layer, Service, ServiceExt};
use tower_bearer::{
    ApiVideo, BearerAuth, BearerAuthLayer, BoxError, TokenProvider, TokenProviderBuilder,
    replay::{Cloned, NoReplay},
};
use tower_bearer_store::RedisStore;
use tower_bearer_testing::{AuthServer, Fault, Route};

const ALERTS: &str = include_str!("../../examples/prometheus/alerts.yml");
const DASHBOARD: &str = include_str!("../../examples/prometheus/dashboard.json");
const OPERATING: &str = include_str!("../../src/guide/operating.md");

/// How long the test waits for Prometheus at most. Reached only if the test fails.
const PATIENCE: Duration = Duration::from_secs(120);

type Http = Client<HttpConnector, Full<Bytes>>;

/// A provider with its own auth server, whose API is the same server.
struct Tenant {
    server: AuthServer,
    provider: TokenProvider,
}

impl Tenant {
    async fn new(name: &str) -> Self {
        Self::with(name, |builder| builder).await
    }

    async fn with(
        name: &str,
        options: impl FnOnce(TokenProviderBuilder<ApiVideo>) -> TokenProviderBuilder<ApiVideo>,
    ) -> Self {
        let server = AuthServer::start().await.unwrap();
        let source = ApiVideo::new(server.api_key()).base_url(server.uri());
        let provider = options(TokenProvider::builder(source).name(name)).build().unwrap();
        Self { server, provider }
    }

    fn layer(&self) -> BearerAuthLayer {
        BearerAuthLayer::with_provider(self.provider.clone())
    }

    fn service(&self) -> BearerAuth<Http, Cloned> {
        self.layer().layer(Client::builder(TokioExecutor::new()).build_http())
    }

    /// Lists the videos.
    async fn call(&self) -> Result<StatusCode, BoxError> {
        self.call_by(self.service()).await
    }

    async fn call_by<S, B>(&self, service: S) -> Result<StatusCode, BoxError>
    where
        S: Service<Request<Full<Bytes>>, Response = http::Response<B>, Error = BoxError>,
    {
        let request = Request::get(format!("{}videos", self.server.uri())).body(Full::default())?;
        Ok(service.oneshot(request).await?.status())
    }
}

/// Provokes each fault, each at a provider of its own, which is named for it.
async fn provoke(tenants: &[Tenant; 8]) {
    let [healthy, down, gone, rejected, challenging, revoked, streaming, storeless] = tenants;
    let unavailable = || Fault::Status(StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(healthy.call().await.unwrap(), StatusCode::OK);

    let token = down.provider.current().unwrap();
    down.server.inject_always(Route::RefreshGrant, unavailable());
    down.server.inject_always(Route::ApiKeyGrant, unavailable());
    down.provider.refresh(&token).await.unwrap_err();
    assert_eq!(down.call().await.unwrap(), StatusCode::OK);

    gone.server.inject_always(Route::ApiKeyGrant, unavailable());
    gone.call().await.unwrap_err();

    rejected.server.set_api_key("another");
    for _ in 0..3 {
        rejected.call().await.unwrap_err();
    }

    challenging.server.inject_always(Route::Api, Fault::Status(StatusCode::UNAUTHORIZED));
    for _ in 0..20 {
        assert_eq!(challenging.call().await.unwrap(), StatusCode::UNAUTHORIZED);
    }

    for _ in 0..9 {
        assert_eq!(revoked.call().await.unwrap(), StatusCode::OK);
        revoked.server.revoke_access_tokens();
    }

    let service: BearerAuth<Http, NoReplay> =
        streaming.layer().no_replay().layer(Client::builder(TokioExecutor::new()).build_http());
    assert_eq!(streaming.call_by(service.clone()).await.unwrap(), StatusCode::OK);
    streaming.server.revoke_access_tokens();
    assert_eq!(streaming.call_by(service).await.unwrap(), StatusCode::UNAUTHORIZED);

    assert_eq!(storeless.call().await.unwrap(), StatusCode::OK);
}

/// What has to fire after [`provoke`].
const EXPECTED: [(&str, &str); 9] = [
    ("TowerBearerRefreshesFail", "down"),
    ("TowerBearerRequestsFail", "gone"),
    ("TowerBearerRefreshesFail", "gone"),
    ("TowerBearerRequestsFail", "rejected"),
    ("TowerBearerCredentialRejected", "rejected"),
    ("TowerBearerApiRejectsTokens", "challenging"),
    ("TowerBearerTokensRevokedOften", "revoked"),
    ("TowerBearerBodiesNotReplayed", "streaming"),
    ("TowerBearerStoreUnusable", "storeless"),
];

/// A Prometheus server on loopback, which ends with this value.
struct Prometheus {
    url: String,
    folder: PathBuf,
    _process: Child,
}

impl Prometheus {
    /// Starts a server that scrapes `target` and evaluates the alerts, each without the time that it has to last.
    async fn start(target: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("tower-bearer-prometheus-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let alerts: String = ALERTS
            .lines()
            .filter(|line| !line.trim().starts_with("for:"))
            .flat_map(|line| [line, "\n"])
            .collect();
        fs::write(folder.join("alerts.yml"), alerts).unwrap();
        let config = format!(
            "global: {{scrape_interval: 250ms, scrape_timeout: 250ms, evaluation_interval: 250ms}}\n\
             rule_files: [alerts.yml]\n\
             scrape_configs: [{{job_name: test, static_configs: [{{targets: ['{target}']}}]}}]\n"
        );
        fs::write(folder.join("prometheus.yml"), config).unwrap();
        let port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
        let process = Command::new("prometheus")
            .arg(format!("--config.file={}", folder.join("prometheus.yml").display()))
            .arg(format!("--storage.tsdb.path={}", folder.join("data").display()))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .arg("--log.level=error")
            .kill_on_drop(true)
            .spawn()
            .expect("prometheus, from Debian's package of this name");
        Self { url: format!("http://127.0.0.1:{port}"), folder, _process: process }
    }

    async fn get(&self, path: &str, parameters: &[(&str, &str)]) -> Option<Value> {
        let url = reqwest::Url::parse_with_params(&format!("{}{path}", self.url), parameters).unwrap();
        let text = reqwest::get(url).await.ok()?.text().await.ok()?;
        serde_json::from_str(&text).ok()
    }

    /// Returns the result of a PromQL query.
    async fn query(&self, query: &str) -> Vec<Value> {
        let Some(answer) = self.get("/api/v1/query", &[("query", query)]).await else { return Vec::new() };
        assert_eq!(answer["status"], "success", "{query}: {answer}");
        answer["data"]["result"].as_array().unwrap().clone()
    }

    /// Returns the names and the providers of the alerts that fire.
    async fn firing(&self) -> BTreeSet<(String, String)> {
        let alerts = self.get("/api/v1/alerts", &[]).await.unwrap();
        let alerts = alerts["data"]["alerts"].as_array().unwrap();
        let label = |alert: &Value, name: &str| alert["labels"][name].as_str().unwrap_or_default().to_owned();
        let firing = alerts.iter().filter(|alert| alert["state"] == "firing");
        firing.map(|alert| (label(alert, "alertname"), label(alert, "provider"))).collect()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

async fn serve_metrics(metrics: PrometheusHandle) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let router = Router::new().route("/metrics", get(move || std::future::ready(metrics.render())));
    tokio::spawn(async move { axum::serve(listener, router).await });
    address
}

#[tokio::test]
async fn alerts_fire_on_their_faults() {
    let metrics = PrometheusBuilder::new().install_recorder().unwrap();
    tower_bearer::observability::describe_metrics();
    // Nothing listens at the store's address.
    let store = RedisStore::new("redis://127.0.0.1:1", "api.video").unwrap();
    let tenants = [
        Tenant::new("healthy").await,
        Tenant::new("down").await,
        Tenant::new("gone").await,
        Tenant::new("rejected").await,
        Tenant::new("challenging").await,
        Tenant::new("revoked").await,
        Tenant::new("streaming").await,
        Tenant::with("storeless", |builder| builder.store(store)).await,
    ];
    // Before the first scrape: a refresh that has just succeeded would keep the alert from firing for five minutes.
    tenants[1].provider.token().await.unwrap();
    let prometheus = Prometheus::start(&serve_metrics(metrics).await).await;

    // The counters of all providers are there, at 0, before anything happens.
    let deadline = Instant::now() + PATIENCE;
    while prometheus.query("tower_bearer_waits_total == 0").await.len() < tenants.len() {
        assert!(Instant::now() < deadline, "Prometheus does not scrape");
        sleep(Duration::from_millis(100)).await;
    }
    provoke(&tenants).await;

    let owned = |(alert, provider): (&str, &str)| (alert.to_owned(), provider.to_owned());
    let expected: BTreeSet<_> = EXPECTED.into_iter().map(owned).collect();
    let mut firing = prometheus.firing().await;
    while !firing.is_superset(&expected) {
        assert!(Instant::now() < deadline, "not fired: {:?}", expected.difference(&firing));
        sleep(Duration::from_millis(100)).await;
        firing = prometheus.firing().await;
    }
    assert!(firing.is_subset(&expected), "fired without a fault: {:?}", firing.difference(&expected));

    // Each panel of the dashboard shows something of all this.
    let dashboard: Value = serde_json::from_str(DASHBOARD).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    assert!(panels.len() > 5);
    for target in panels.iter().flat_map(|panel| panel["targets"].as_array().unwrap()) {
        let query = target["expr"].as_str().unwrap();
        let query = query.replace("$job", ".*").replace("$provider", ".*").replace("$__rate_interval", "1m");
        assert!(!query.contains('$'), "{query}");
        assert!(!prometheus.query(&query).await.is_empty(), "{query}");
    }
}

/// The file is what an operator loads: valid, with a next step for each alert and a section in the documentation.
#[tokio::test]
async fn alerts_name_a_next_step() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/prometheus");
    // The second has synthetic series over time: what fires after how long, and what does not.
    for (verb, file) in [("check", "alerts.yml"), ("test", "alerts_test.yml")] {
        let checked =
            Command::new("promtool").args([verb, "rules", file]).current_dir(&folder).output().await;
        let checked = checked.expect("promtool, from Debian's package prometheus");
        let shown = [checked.stdout, checked.stderr].concat();
        assert!(checked.status.success(), "{}", String::from_utf8_lossy(&shown));
    }

    let mut names = BTreeSet::new();
    for alert in ALERTS.split("- alert: ").skip(1) {
        let name = alert.lines().next().unwrap();
        assert!(alert.contains("next_step: ") && alert.contains("severity: "), "{name}");
        let page = "https://docs.rs/tower-bearer/latest/tower_bearer/guide/operating/index.html";
        assert!(alert.contains(&format!("runbook_url: {page}#{}\n", name.to_lowercase())), "{name}");
        assert!(OPERATING.contains(&format!("\n## {name}\n")), "{name}");
        names.insert(name);
    }
    let provoked: BTreeSet<_> = EXPECTED.iter().map(|(alert, _)| *alert).collect();
    assert_eq!(names, provoked, "each alert is provoked");
}
