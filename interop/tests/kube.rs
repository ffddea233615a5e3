//! kube: list, watch and patch with a small API server.

use std::{pin::pin, sync::Arc};

use axum::{
    Json, Router,
    body::{Body as AxumBody, Bytes},
    extract::{Path, Query, State},
    response::{IntoResponse, Response},
    routing::get,
};
use futures_util::{StreamExt, TryStreamExt, stream};
use hyper_util::{client::legacy::Client as HyperClient, rt::TokioExecutor};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{
    Api, Client, Config,
    api::{ListParams, Patch, PatchParams, WatchEvent, WatchParams},
    client::{Body, ClientBuilder, ConfigExt},
};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::broadcast;
use tower::{BoxError, ServiceBuilder, buffer::BufferLayer};
use tower_bearer::{BearerAuthLayer, TokenProvider};
use tower_bearer_interop::{Issuer, recovers_with_one_refresh, serve};

/// The events of a watch.
type Events = Arc<broadcast::Sender<Value>>;

fn config_map(name: &str, data: Value) -> Value {
    json!({ "apiVersion": "v1", "kind": "ConfigMap", "data": data,
        "metadata": { "name": name, "namespace": "default", "resourceVersion": "7" } })
}

#[derive(Deserialize)]
struct Params {
    watch: Option<bool>,
}

/// Returns a list or, for a watch, an endless body with one line per event.
async fn list(State(events): State<Events>, Query(params): Query<Params>) -> Response {
    if params.watch != Some(true) {
        let items = [config_map("first", json!({ "a": "1" })), config_map("second", json!({}))];
        return Json(json!({ "apiVersion": "v1", "kind": "ConfigMapList",
            "metadata": { "resourceVersion": "7" }, "items": items }))
        .into_response();
    }
    let lines = stream::unfold(events.subscribe(), async |mut events| {
        let event = events.recv().await.ok()?;
        Some((Ok::<_, BoxError>(format!("{event}\n")), events))
    });
    AxumBody::from_stream(lines).into_response()
}

/// Returns the patch as the whole object.
async fn patch(Path(name): Path<String>, body: Bytes) -> Response {
    let patch: Value = serde_json::from_slice(&body).unwrap();
    Json(config_map(&name, patch["data"].clone())).into_response()
}

struct Cluster {
    issuer: Issuer,
    events: Events,
    config: Config,
}

impl Cluster {
    async fn start() -> Self {
        let (issuer, events) = (Issuer::default(), Events::new(broadcast::channel(16).0));
        let config_maps = "/api/v1/namespaces/default/configmaps";
        let router = Router::new()
            .route(config_maps, get(list))
            .route(&format!("{config_maps}/{{name}}"), axum::routing::patch(patch))
            .with_state(Arc::clone(&events));
        let address = serve(router, &issuer).await;
        let config = Config::new(format!("http://{address}").parse().unwrap());
        Self { issuer, events, config }
    }

    fn layer(&self) -> BearerAuthLayer {
        BearerAuthLayer::with_provider(TokenProvider::new(self.issuer.clone()))
    }

    /// Creates a client with a custom stack.
    fn own(&self) -> Client {
        let stack = ServiceBuilder::new()
            .layer(self.config.base_uri_layer())
            .layer(self.layer().clone_with(Body::try_clone))
            .service(HyperClient::builder(TokioExecutor::new()).build_http::<Body>());
        Client::new(stack, "default")
    }

    /// Creates a client with kube's default stack, which a buffer makes `Clone`.
    fn default_stack(&self) -> Client {
        ClientBuilder::try_from(self.config.clone())
            .unwrap()
            .with_layer(&BufferLayer::new(1024))
            .with_layer(&self.layer().clone_with(Body::try_clone))
            .build()
    }
}

async fn lists_and_patches_recover(cluster: &Cluster, client: Client) {
    recovers_with_one_refresh(&cluster.issuer, |number| {
        let api: Api<ConfigMap> = Api::default_namespaced(client.clone());
        async move {
            if number % 2 == 0 {
                let list = api.list(&ListParams::default()).await.unwrap();
                assert_eq!(list.items.len(), 2);
            } else {
                let value = number.to_string();
                let patch = Patch::Merge(json!({ "data": { "number": value } }));
                let patched = api.patch("first", &PatchParams::default(), &patch).await.unwrap();
                assert_eq!(patched.data.unwrap()["number"], value);
            }
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_of_ones_own_stack() {
    let cluster = Cluster::start().await;
    lists_and_patches_recover(&cluster, cluster.own()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kubes_default_stack() {
    let cluster = Cluster::start().await;
    lists_and_patches_recover(&cluster, cluster.default_stack()).await;
}

#[tokio::test]
async fn watch_recovers_then_survives_revocation() {
    let cluster = Cluster::start().await;
    for client in [cluster.own(), cluster.default_stack()] {
        let api: Api<ConfigMap> = Api::default_namespaced(client);
        api.list(&ListParams::default()).await.unwrap();
        cluster.issuer.revoke();
        let mut watch = pin!(api.watch(&WatchParams::default(), "7").await.unwrap());
        for name in ["first", "second"] {
            let event = json!({ "type": "ADDED", "object": config_map(name, json!({})) });
            cluster.events.send(event).unwrap();
            let Some(WatchEvent::Added(added)) = watch.try_next().await.unwrap() else { panic!("no event") };
            assert_eq!(added.metadata.name.as_deref(), Some(name));
            // A running watch is not authenticated again.
            cluster.issuer.revoke();
        }
        assert!(futures_util::FutureExt::now_or_never(watch.next()).is_none());
    }
}
