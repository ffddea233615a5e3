//! The peers, each wired as its own documentation says.

mod aliri;
mod aws;
mod azure;
mod by_hand;
mod gears;
mod google;
mod huskarl;
mod rmcp;
mod tower_bearer;

use std::{
    convert::Infallible,
    future::ready,
    hint::black_box,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::{future::BoxFuture, stream};
use http::{Request, Response, StatusCode, Uri};
use http_body::Frame;
use http_body_util::{BodyExt, Empty, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::Value;
use tokio::sync::Mutex;
use tower::{Service, ServiceExt, service_fn};

use crate::BoxError;

/// Where the servers are, and what a peer is built with.
#[derive(Clone)]
pub struct Setup {
    pub token_endpoint: String,
    /// The URL of google-cloud-auth's metadata server.
    pub metadata: String,
    /// The URL of the API, with a slash at its end.
    pub api: String,
    pub client_id: String,
    pub client_secret: String,
    /// `None` for the grant of the client's credentials.
    pub refresh_token: Option<String>,
    /// The refresh token of another login, for a peer that has no other grant.
    pub login: String,
    /// The folder in which a peer keeps what survives a restart, if it does.
    pub state: Option<PathBuf>,
    /// How long before its expiry a token is refreshed. `None` for the peer's default.
    pub ahead: Option<Duration>,
    /// When the token is due, if `ahead` is set.
    pub due: Duration,
}

impl Setup {
    /// The part of a token's life after which it is due, if `ahead` is set.
    fn share_until_due(&self) -> Option<f64> {
        self.ahead.map(|ahead| self.due.as_secs_f64() / (self.due + ahead).as_secs_f64())
    }
}

#[async_trait::async_trait]
pub trait Peer: Send + Sync {
    /// Sends `GET /videos`.
    async fn get(&self) -> Result<StatusCode, BoxError>;

    /// Sends `POST /videos/{id}/source` with a body of `chunks` of 64 KiB.
    async fn upload(&self, url: &str, chunks: usize) -> Result<StatusCode, BoxError>;

    /// Sends requests to a service that responds at once: through the peer, or the same without it.
    async fn stub(&self, requests: usize, through: bool) -> Result<(), BoxError>;

    /// Whether an outcome of [`get`](Self::get) says that a user has to log in again.
    fn asks_for_login(&self, _: &Result<StatusCode, BoxError>) -> bool {
        false
    }
}

type Built = BoxFuture<'static, Result<Arc<dyn Peer>, BoxError>>;

/// A row of [`PEERS`].
pub struct Info {
    pub name: &'static str,
    /// The package whose version the table shows. `None` for tower's own parts.
    pub package: &'static str,
    /// The life of a token that is due for a refresh after [`DUE`], and what is left of it then. Peers with a fixed
    /// margin need a longer one.
    pub lifetime: Duration,
    /// Whether a task of the peer refreshes a token that no request asks for.
    pub in_background: bool,
    /// Whether a 401 makes the peer replace the token.
    pub on_401: bool,
    /// Why the peer cannot use a rotating refresh token.
    pub no_refresh_token: Option<&'static str>,
    /// Whether the peer has a store for a login, or the trait of one.
    pub has_store: bool,
    /// The kind of body that is sent again.
    pub upload: &'static str,
    pub build: fn(Setup) -> Built,
}

/// When a token of [`Info::lifetime`] is due for a refresh.
pub const DUE: Duration = Duration::from_secs(3);

/// How long before its expiry a token is due, for peers that have an option for it.
pub const AHEAD: Duration = Duration::from_secs(9);

pub const CONFIGURED: Duration = Duration::from_secs(3 + 9);

pub static PEERS: [Info; 9] = [
    Info {
        name: "tower-bearer",
        package: "tower-bearer",
        lifetime: CONFIGURED,
        in_background: false,
        on_401: true,
        no_refresh_token: None,
        has_store: true,
        upload: "any stream",
        build: |setup| Box::pin(tower_bearer::build(setup)),
    },
    Info {
        name: "huskarl",
        package: "huskarl",
        lifetime: CONFIGURED,
        in_background: false,
        on_401: true,
        no_refresh_token: None,
        has_store: true,
        upload: "by the caller",
        build: |setup| Box::pin(huskarl::build(setup)),
    },
    Info {
        name: "azure_core",
        package: "azure_core",
        // Five minutes before the expiry: `should_refresh` in bearer_token_policy.rs.
        lifetime: Duration::from_secs(3 + 300),
        in_background: false,
        on_401: true,
        no_refresh_token: None,
        has_store: false,
        upload: "a seekable stream",
        build: |setup| Box::pin(azure::build(setup)),
    },
    Info {
        name: "rmcp",
        package: "rmcp",
        lifetime: DUE.saturating_add(rmcp::MARGIN).saturating_add(rmcp::MARGIN),
        in_background: false,
        on_401: true,
        no_refresh_token: None,
        has_store: true,
        upload: "from memory",
        build: |setup| Box::pin(rmcp::build(setup)),
    },
    Info {
        name: "aws",
        package: "aws-smithy-runtime",
        lifetime: CONFIGURED,
        in_background: false,
        on_401: false,
        no_refresh_token: None,
        has_store: false,
        upload: "no",
        build: |setup| Box::pin(aws::build(setup)),
    },
    Info {
        name: "google-cloud-auth",
        package: "google-cloud-auth",
        // Four minutes before the expiry: `NORMAL_REFRESH_SLACK` in token_cache.rs.
        lifetime: Duration::from_secs(3 + 240),
        in_background: true,
        on_401: false,
        no_refresh_token: Some("no rotation"),
        has_store: false,
        upload: "no",
        build: |setup| Box::pin(google::build(setup)),
    },
    Info {
        name: "cf-gears",
        package: "cf-gears-toolkit-auth",
        lifetime: CONFIGURED,
        in_background: true,
        on_401: true,
        no_refresh_token: Some("no such grant"),
        has_store: false,
        upload: "from memory",
        build: |setup| Box::pin(gears::build(setup)),
    },
    Info {
        name: "aliri_tokens",
        package: "aliri_tokens",
        lifetime: CONFIGURED,
        in_background: true,
        on_401: false,
        no_refresh_token: None,
        has_store: false,
        upload: "no",
        build: |setup| Box::pin(aliri::build(setup)),
    },
    Info {
        name: "by hand",
        package: "tower",
        // kube refreshes a minute before the expiry.
        lifetime: Duration::from_secs(3 + 60),
        in_background: false,
        on_401: true,
        no_refresh_token: None,
        has_store: false,
        upload: "from memory",
        build: |setup| Box::pin(by_hand::build(setup)),
    },
];

type Body = Full<Bytes>;
type Streamed = UnsyncBoxBody<Bytes, Infallible>;

const CHUNK: usize = 64 * 1024;

fn http_client<B>() -> Client<HttpConnector, B>
where
    B: http_body::Body<Data: Send> + Send,
{
    Client::builder(TokioExecutor::new()).build_http()
}

fn reqwest_client() -> Result<reqwest::Client, BoxError> {
    Ok(reqwest::Client::builder().no_proxy().build()?)
}

/// A body in memory.
fn in_memory(chunks: usize) -> Bytes {
    Bytes::from(vec![7; chunks * CHUNK])
}

/// A body that can be read once.
fn streamed(chunks: usize) -> Streamed {
    let chunks = stream::unfold(chunks, |left| async move {
        // Slow enough that the response to the head arrives in the middle.
        tokio::time::sleep(Duration::from_millis(2)).await;
        let chunk = Frame::data(Bytes::from_static(&[7; CHUNK]));
        (left > 0).then(|| (Ok::<_, Infallible>(chunk), left - 1))
    });
    StreamBody::new(chunks).boxed_unsync()
}

async fn status<B>(response: Response<B>) -> Result<StatusCode, BoxError>
where
    B: http_body::Body<Error: Into<BoxError>>,
{
    let status = response.status();
    response.into_body().collect().await.map_err(Into::into)?;
    Ok(status)
}

async fn reqwest_status(response: reqwest::Response) -> Result<StatusCode, BoxError> {
    let status = response.status();
    response.bytes().await?;
    Ok(status)
}

/// The inner service of the happy path. It responds with 200 at once.
fn stub<E>() -> impl Service<
    Request<Body>,
    Response = Response<Empty<Bytes>>,
    Error = E,
    Future: Future<Output = Result<Response<Empty<Bytes>>, E>> + Send,
> + Clone
+ Send
+ 'static
where
    E: Send + 'static,
{
    service_fn(|request| {
        black_box(&request);
        ready(Ok(Response::new(Empty::new())))
    })
}

/// The same without a service, for peers that are no layer.
fn stub_call(request: Request<Body>) -> Response<Empty<Bytes>> {
    black_box(&request);
    Response::new(Empty::new())
}

fn request(uri: &Uri) -> Request<Body> {
    let mut request = Request::new(Body::default());
    *request.uri_mut() = uri.clone();
    request
}

async fn each<S>(mut service: S, uri: &Uri, requests: usize) -> Result<(), BoxError>
where
    S: Service<Request<Body>, Error: Into<BoxError>>,
{
    for _ in 0..requests {
        let service = service.ready().await.map_err(Into::into)?;
        black_box(service.call(request(uri)).await.map_err(Into::into)?);
    }
    Ok(())
}

/// What a user writes for the token endpoint: one exchange, which keeps the refresh token that it returns.
struct Exchange {
    client: reqwest::Client,
    token_endpoint: String,
    client_id: String,
    client_secret: String,
    refresh_token: Mutex<Option<String>>,
}

impl Exchange {
    fn new(setup: &Setup) -> Result<Self, BoxError> {
        Ok(Self {
            client: reqwest_client()?,
            token_endpoint: setup.token_endpoint.clone(),
            client_id: setup.client_id.clone(),
            client_secret: setup.client_secret.clone(),
            refresh_token: Mutex::new(setup.refresh_token.clone()),
        })
    }

    /// Returns a token, and when it ends.
    async fn token(&self) -> Result<(String, Instant), BoxError> {
        let mut refresh_token = self.refresh_token.lock().await;
        let mut form = vec![("grant_type", "client_credentials")];
        if let Some(refresh_token) = refresh_token.as_deref() {
            form = vec![("grant_type", "refresh_token"), ("refresh_token", refresh_token)];
        }
        let request = self.client.post(&self.token_endpoint).form(&form);
        let request = request.basic_auth(&self.client_id, Some(&self.client_secret));
        let requested_at = Instant::now();
        let token: Value = request.send().await?.error_for_status()?.json().await?;
        if let Some(next) = token["refresh_token"].as_str() {
            *refresh_token = Some(next.to_owned());
        }
        let access_token = token["access_token"].as_str().ok_or("there is no access token")?;
        let lifetime = token["expires_in"].as_u64().ok_or("the token has no lifetime")?;
        Ok((access_token.to_owned(), requested_at + Duration::from_secs(lifetime)))
    }
}
