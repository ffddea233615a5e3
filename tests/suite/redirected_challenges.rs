//! A response counts only if it comes from the origin of its request, though another origin may get the token too.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, header::LOCATION};
use http_body_util::{BodyExt, Empty, Full};
use tokio::time::{advance, sleep};
use tower::{Layer, Service, ServiceExt, service_fn, util::BoxCloneService};
use tower_bearer::BoxError;
use tower_http::follow_redirect::FollowRedirect;

use crate::support::{Scene, Source, scene};

const API: &str = "https://api.example";
const REFUSED: &str = "this is not your origin";

type Client = BoxCloneService<Request<Empty<Bytes>>, Response<Full<Bytes>>, BoxError>;

/// The hosts of all requests, in order.
type Hosts = Arc<Mutex<Vec<String>>>;

/// A service for all origins. The API redirects `/to?<uri>` to that URI, and responds with the status in another path.
/// `other.example` responds with the status in its path.
fn web(
    hosts: &Hosts,
) -> impl Service<
    Request<Empty<Bytes>>,
    Response = Response<Full<Bytes>>,
    Error = Infallible,
    Future = impl Future<Output = Result<Response<Full<Bytes>>, Infallible>> + Send,
> + Clone
+ Send
+ 'static {
    let hosts = Arc::clone(hosts);
    service_fn(move |request: Request<Empty<Bytes>>| {
        let uri = request.uri().clone();
        hosts.lock().unwrap().push(uri.host().unwrap().to_lowercase());
        let mut response = Response::new(Full::from(REFUSED));
        match uri.query() {
            Some(next) => {
                *response.status_mut() = StatusCode::TEMPORARY_REDIRECT;
                response.headers_mut().insert(LOCATION, HeaderValue::from_str(next).unwrap());
            }
            None => *response.status_mut() = uri.path().trim_start_matches('/').parse().unwrap(),
        }
        async move { Ok(response) }
    })
}

/// A source, and its clients with and without replay, whose layers have the default origins: every `https` origin.
fn clients(hosts: &Hosts) -> (Arc<Source>, [Client; 2]) {
    let Scene { source, layer, .. } = scene().build();
    let web = FollowRedirect::new(web(hosts));
    let replays = BoxCloneService::new(layer.clone().layer(web.clone()));
    (source, [replays, BoxCloneService::new(layer.no_replay().layer(web))])
}

fn get(uri: &str) -> Request<Empty<Bytes>> {
    Request::get(uri).body(Empty::new()).unwrap()
}

/// Sends a request that is redirected to `next`, and returns the status of the last hop.
async fn redirected(client: &Client, next: &str) -> StatusCode {
    let response = client.clone().oneshot(get(&format!("{API}/to?{next}"))).await.unwrap();
    let status = response.status();
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), REFUSED);
    status
}

/// A redirect beneath the layer leads to another origin, which challenges the request.
#[tokio::test(start_paused = true)]
async fn redirected_401_is_no_challenge() {
    for next in [
        "https://other.example/401",
        "https://sub.api.example/401",
        "https://api.example:8443/401",
        "http://api.example/401",
    ] {
        for replays in [0, 1] {
            let hosts = Hosts::default();
            let (source, clients) = clients(&hosts);
            assert_eq!(redirected(&clients[replays], next).await, StatusCode::UNAUTHORIZED);
            sleep(Duration::from_secs(10)).await;
            assert_eq!(source.fetches(), 1, "{next}");
            assert_eq!(hosts.lock().unwrap().len(), 2, "{next}");
        }
    }
}

/// A redirect beneath the layer stays at the origin, which challenges the request.
#[tokio::test(start_paused = true)]
async fn own_401_after_redirect_is_challenge() {
    for next in ["/401", "https://api.example/401", "https://API.example/401", "https://api.example:443/401"]
    {
        for replays in [0, 1] {
            let (source, clients) = clients(&Hosts::default());
            assert_eq!(redirected(&clients[replays], next).await, StatusCode::UNAUTHORIZED);
            sleep(Duration::from_secs(10)).await;
            assert_eq!(source.fetches(), 2, "{next}");
        }
    }
}

/// A request for another notation of the origin is redirected to the usual one.
#[tokio::test(start_paused = true)]
async fn notation_of_request_does_not_matter() {
    for origin in ["https://API.EXAMPLE", "https://api.example:443", "https://user@api.example"] {
        for replays in [0, 1] {
            let (source, clients) = clients(&Hosts::default());
            let request = get(&format!("{origin}/to?{API}/401"));
            assert_eq!(
                clients[replays].clone().oneshot(request).await.unwrap().status(),
                StatusCode::UNAUTHORIZED
            );
            sleep(Duration::from_secs(10)).await;
            assert_eq!(source.fetches(), 2, "{origin}");
        }
    }
}

/// Only some of the responses come from the redirect follower.
#[tokio::test(start_paused = true)]
async fn response_of_unknown_origin_is_own() {
    let plain = web(&Hosts::default());
    let follows = FollowRedirect::new(plain.clone());
    let some = service_fn(move |request: Request<Empty<Bytes>>| {
        let (plain, follows) = (plain.clone(), follows.clone());
        async move {
            if request.uri().path() == "/200" {
                plain.oneshot(request).await
            } else {
                follows.oneshot(request).await
            }
        }
    });
    let Scene { source, layer, .. } = scene().build();
    let client = layer.no_replay().layer(some);
    for path in ["/200", "/401"] {
        let response = client.clone().oneshot(get(&format!("{API}{path}"))).await.unwrap();
        assert_eq!(response.status().as_str(), &path[1..]);
    }
    sleep(Duration::from_secs(10)).await;
    assert_eq!(source.fetches(), 2);
}

/// The API challenges every token. The successes of another origin say nothing about them, so that the cool-down
/// doubles as it does without them.
#[tokio::test(start_paused = true)]
async fn redirected_success_is_no_evidence() {
    let mut fetches = Vec::new();
    for next in ["https://other.example/404", "https://other.example/200"] {
        let (source, [client, _]) = clients(&Hosts::default());
        for _ in 0..600 {
            redirected(&client, next).await;
            client.clone().oneshot(get(&format!("{API}/401"))).await.unwrap();
            advance(Duration::from_millis(500)).await;
        }
        fetches.push(source.fetches());
    }
    let [without, with] = fetches[..] else { unreachable!() };
    assert!(with <= without + 1, "{with} fetches, and {without} without the successes");
}
