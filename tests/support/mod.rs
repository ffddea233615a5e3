//! Helpers for the tests: a scripted token source, an API that knows the valid tokens, and clients.
#![allow(dead_code, unreachable_pub, unused_imports)]

pub mod fleet;
pub mod folder;
pub mod log;
pub mod logins;
mod random;
mod scene;

use std::{
    collections::{HashSet, VecDeque},
    convert::Infallible,
    marker::PhantomData,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode, header::AUTHORIZATION};
use http_body::Body;
use http_body_util::{BodyExt, Empty, Full};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use tower::Service;
use tower_bearer::{BoxError, Credential, SourceError, Token, TokenRequest, TokenSource};

#[allow(unused_imports)]
pub use self::{
    random::{runs, sequences},
    scene::{Scene, SceneBuilder, scene, scene_of},
};

pub const MILLISECOND: Duration = Duration::from_millis(1);
pub const SECOND: Duration = Duration::from_secs(1);
pub const MINUTE: Duration = Duration::from_secs(60);
pub const HOUR: Duration = Duration::from_secs(3600);

/// What a [`Source`] does on one call.
pub enum Act {
    Fail(SourceError),
    Panic,
    Hang,
    /// Returns a new token with this lifetime.
    Live(Duration),
    /// Returns the previous access token again, with this lifetime.
    Again(Duration),
}

/// A source that returns `access-1`, `access-2` and so on. Each call takes one second, unless the test sets another time.
pub struct Source {
    pub fetches: AtomicU64,
    acts: Mutex<VecDeque<Act>>,
    takes: Duration,
    /// The lifetime of tokens after the last act. `None` for tokens without a lifetime.
    lifetime: Option<Duration>,
    /// For each call, the generation of the previous token.
    pub previous: Mutex<Vec<Option<u64>>>,
    pub revision: AtomicU64,
}

impl Default for Source {
    fn default() -> Self {
        Self {
            fetches: AtomicU64::default(),
            acts: Mutex::default(),
            takes: SECOND,
            lifetime: None,
            previous: Mutex::default(),
            revision: AtomicU64::default(),
        }
    }
}

impl Source {
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Creates a source whose tokens have this lifetime.
    pub fn living(lifetime: Duration) -> Arc<Self> {
        Arc::new(Self { lifetime: Some(lifetime), ..Self::default() })
    }

    /// Adds an act, also while the source is in use.
    pub fn next(&self, act: Act) {
        self.acts.lock().unwrap().push_back(act);
    }

    /// Removes the acts that have not been done.
    pub fn clear(&self) {
        self.acts.lock().unwrap().clear();
    }

    pub fn then(self: Arc<Self>, act: Act) -> Arc<Self> {
        self.next(act);
        self
    }

    pub fn fetches(&self) -> u64 {
        self.fetches.load(Ordering::SeqCst)
    }
}

impl TokenSource for Source {
    async fn fetch(&self, request: &TokenRequest<'_>) -> Result<Token, SourceError> {
        let call = self.fetches.fetch_add(1, Ordering::SeqCst) + 1;
        self.previous.lock().unwrap().push(request.previous().map(Token::generation));
        if !self.takes.is_zero() {
            tokio::time::sleep(self.takes).await;
        }
        let act = self.acts.lock().unwrap().pop_front().or(self.lifetime.map(Act::Live));
        let number = call - u64::from(matches!(act, Some(Act::Again(_))));
        let token =
            Token::builder(format!("access-{number}")).requested_at(tokio::time::Instant::now().into_std());
        match act {
            None => Ok(token.build()?),
            Some(Act::Live(lifetime) | Act::Again(lifetime)) => Ok(token.expires_in(lifetime).build()?),
            Some(Act::Fail(error)) => Err(error),
            Some(Act::Panic) => panic!("panic in the source"),
            Some(Act::Hang) => std::future::pending().await,
        }
    }

    fn credential(&self) -> Credential {
        Credential::default().with_revision(self.revision.load(Ordering::SeqCst))
    }
}

/// An in-memory API. It responds with 401 unless the token is among the accepted ones.
#[derive(Clone, Default)]
pub struct Api(Arc<Mutex<ApiState>>);

#[derive(Default)]
struct ApiState {
    good: HashSet<String>,
    /// The headers of each request.
    seen: Vec<HeaderMap>,
}

pub const CHALLENGED: &str = "who are you?";

impl Api {
    pub fn accept(&self, access_token: &str) {
        self.0.lock().unwrap().good.insert(access_token.to_owned());
    }

    pub fn revoke_all(&self) {
        self.0.lock().unwrap().good.clear();
    }

    pub fn requests(&self) -> usize {
        self.0.lock().unwrap().seen.len()
    }

    /// Returns the tokens of all requests, in order.
    pub fn tokens(&self) -> Vec<String> {
        let state = self.0.lock().unwrap();
        state.seen.iter().map(|headers| token_of(headers).unwrap_or_default().to_owned()).collect()
    }

    pub fn headers(&self) -> Vec<HeaderMap> {
        self.0.lock().unwrap().seen.clone()
    }

    pub fn answer(&self, headers: &HeaderMap) -> Response<Full<Bytes>> {
        let mut state = self.0.lock().unwrap();
        state.seen.push(headers.clone());
        let good = token_of(headers).is_some_and(|token| state.good.contains(token));
        let (status, body) = if good { (StatusCode::OK, "") } else { (StatusCode::UNAUTHORIZED, CHALLENGED) };
        Response::builder().status(status).body(Full::from(body)).unwrap()
    }

    /// Returns a service that reads a request's body before it responds.
    pub fn service<B>(&self) -> ApiService<B> {
        ApiService(self.clone(), PhantomData)
    }
}

/// An [`Api`] for requests with a body of type `B`.
pub struct ApiService<B>(Api, PhantomData<fn(B)>);

impl<B> Clone for ApiService<B> {
    fn clone(&self) -> Self {
        Self(self.0.clone(), PhantomData)
    }
}

impl<B> Service<Request<B>> for ApiService<B>
where
    B: Body<Data: Send> + Send + 'static,
{
    type Response = Response<Full<Bytes>>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let api = self.0.clone();
        Box::pin(async move {
            let (head, body) = request.into_parts();
            let _ = body.collect().await;
            Ok(api.answer(&head.headers))
        })
    }
}

fn token_of(headers: &HeaderMap) -> Option<&str> {
    headers.get(AUTHORIZATION)?.to_str().ok()?.strip_prefix("Bearer ")
}

/// Polls a future once. Returns its output, or `None` if it is pending.
pub fn at_once<F: Future>(future: F) -> Option<F::Output> {
    match std::pin::pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => Some(output),
        Poll::Pending => None,
    }
}

/// Runs a future on this thread, without tokio.
pub fn block_on<F: Future>(future: F) -> F::Output {
    struct Unpark(std::thread::Thread);

    impl std::task::Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }

    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut future = std::pin::pin!(future);
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(output) => return output,
            Poll::Pending => std::thread::park(),
        }
    }
}

/// Runs a future on a paused clock, on a thread of its own.
///
/// # Panics
///
/// If it does not end, because of a deadlock.
pub fn ends(future: impl Future<Output = ()> + Send + 'static) {
    let (done, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        runtime.enable_time().start_paused(true).build().unwrap().block_on(future);
        done.send(()).unwrap();
    });
    // A failed assertion drops the sender.
    ended.recv_timeout(Duration::from_secs(60)).expect("deadlock, or a failed assertion above");
}

pub fn get() -> Request<Empty<Bytes>> {
    Request::get("https://api.example/videos").body(Empty::new()).unwrap()
}

/// A request for the videos of a test server.
pub fn get_videos(server: &tower_bearer_testing::AuthServer) -> Request<Empty<Bytes>> {
    Request::get(format!("{}videos", server.uri())).body(Empty::new()).unwrap()
}

pub fn http1<B>() -> Client<HttpConnector, B>
where
    B: Body<Data: Send> + Send,
{
    Client::builder(TokioExecutor::new()).build_http()
}

pub fn http2<B>() -> Client<HttpConnector, B>
where
    B: Body<Data: Send> + Send,
{
    Client::builder(TokioExecutor::new()).http2_only(true).build_http()
}

/// Returns the crate's own error.
///
/// # Panics
///
/// If the error is of another type.
pub fn ours(error: &BoxError) -> &tower_bearer::Error {
    error.downcast_ref().unwrap_or_else(|| panic!("not a tower_bearer::Error: {error:?}"))
}

/// Returns a command that starts cargo, without the variables that cargo sets for a test.
///
/// Build scripts, such as ring's, run again if these variables change. Then cargo builds all that depends on them again,
/// in this command and in the next one.
pub fn cargo() -> std::process::Command {
    let mut command = std::process::Command::new(env!("CARGO"));
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        let for_a_package = ["CARGO_BIN_", "CARGO_MANIFEST_", "CARGO_PKG_", "CARGO_RUSTC_"];
        let is_set_for_tests = for_a_package.iter().any(|prefix| text.starts_with(prefix))
            || ["CARGO", "CARGO_CRATE_NAME", "CARGO_PRIMARY_PACKAGE", "CARGO_TARGET_TMPDIR", "OUT_DIR"]
                .contains(&&*text);
        if is_set_for_tests {
            command.env_remove(name);
        }
    }
    command
}

/// Formats an error with its chain of sources.
pub fn chain(error: &dyn std::error::Error) -> String {
    let beneath = error.source().map(|source| format!(": {}", chain(source)));
    format!("{error}{}", beneath.unwrap_or_default())
}

/// Converts an iterator to a stream.
pub fn iterated<I: Iterator + Unpin>(iterator: I) -> impl futures_core::Stream<Item = I::Item> + Unpin {
    struct Iterated<I>(I);

    impl<I: Iterator + Unpin> futures_core::Stream for Iterated<I> {
        type Item = I::Item;

        fn poll_next(mut self: std::pin::Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<I::Item>> {
            Poll::Ready(self.0.next())
        }
    }

    Iterated(iterator)
}

/// Creates a TLS client that trusts only this certificate, and uses HTTP/2 if the server supports it.
pub fn https<B>(certificate: &[u8]) -> Client<hyper_rustls::HttpsConnector<HttpConnector>, B>
where
    B: Body<Data: Send> + Send,
{
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate.to_vec().into()).unwrap();
    let config =
        rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
    let connector = hyper_rustls::HttpsConnectorBuilder::new()
        .with_tls_config(config)
        .https_only()
        .enable_all_versions()
        .build();
    Client::builder(TokioExecutor::new()).build(connector)
}
