//! What the tests share: a token source that does as it is told, an API that knows which tokens are good, and clients.
#![allow(dead_code, unreachable_pub)]

use std::{
    collections::{HashSet, VecDeque},
    convert::Infallible,
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
use tower_bearer::{BoxError, SourceError, Token, TokenRequest, TokenSource};

/// What a [`Source`] does at one call.
pub enum Act {
    Fail(SourceError),
    Panic,
    Hang,
    /// A token that lives this long.
    Live(Duration),
    /// The access token before, which lives this long.
    Again(Duration),
}

/// A source whose tokens are `access-1`, `access-2` and so on, after a second each.
#[derive(Default)]
pub struct Source {
    pub fetches: AtomicU64,
    acts: Mutex<VecDeque<Act>>,
    /// How long tokens live when there is no act left; no lifetime is stated if it is `None`.
    lifetime: Option<Duration>,
    /// The generations of the tokens that calls were to renew.
    pub previous: Mutex<Vec<Option<u64>>>,
    pub revision: AtomicU64,
}

impl Source {
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// All tokens live this long.
    pub fn living(lifetime: Duration) -> Arc<Self> {
        Arc::new(Self { lifetime: Some(lifetime), ..Self::default() })
    }

    /// Adds an act while the source is in use.
    pub fn next(&self, act: Act) {
        self.acts.lock().unwrap().push_back(act);
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
        tokio::time::sleep(Duration::from_secs(1)).await;
        let act = self.acts.lock().unwrap().pop_front().or(self.lifetime.map(Act::Live));
        let number = call - u64::from(matches!(act, Some(Act::Again(_))));
        let token = Token::builder(format!("access-{number}"))
            .refresh_token(format!("refresh-{call}"))
            .requested_at(tokio::time::Instant::now().into_std());
        match act {
            None => Ok(token.build()?),
            Some(Act::Live(lifetime) | Act::Again(lifetime)) => Ok(token.expires_in(lifetime).build()?),
            Some(Act::Fail(error)) => Err(error),
            Some(Act::Panic) => panic!("the source's own panic"),
            Some(Act::Hang) => std::future::pending().await,
        }
    }

    fn revision(&self) -> u64 {
        self.revision.load(Ordering::SeqCst)
    }
}

/// An API in memory: answers 401 unless the token is among the good ones.
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

    /// The tokens that requests came with, in order.
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

    /// As a service that reads a request's body before it answers.
    pub fn service<B>(
        &self,
    ) -> impl tower::Service<
        Request<B>,
        Response = Response<Full<Bytes>>,
        Error = Infallible,
        Future: Future<Output = Result<Response<Full<Bytes>>, Infallible>> + Send,
    > + Clone
    + Send
    + 'static
    where
        B: Body<Data: Send> + Send + 'static,
    {
        let api = self.clone();
        tower::service_fn(move |request: Request<B>| {
            let api = api.clone();
            async move {
                let (head, body) = request.into_parts();
                let _ = body.collect().await;
                Ok(api.answer(&head.headers))
            }
        })
    }
}

fn token_of(headers: &HeaderMap) -> Option<&str> {
    headers.get(AUTHORIZATION)?.to_str().ok()?.strip_prefix("Bearer ")
}

/// The outcome of a future that needs only one poll; `None` if it waits.
pub fn at_once<F: Future>(future: F) -> Option<F::Output> {
    match std::pin::pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => Some(output),
        Poll::Pending => None,
    }
}

pub fn get() -> Request<Empty<Bytes>> {
    Request::get("https://api.example/videos").body(Empty::new()).unwrap()
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

/// Our own error, if that is what a request ended with.
pub fn ours(error: &BoxError) -> &tower_bearer::Error {
    error.downcast_ref().unwrap_or_else(|| panic!("not ours: {error:?}"))
}

/// An error and all beneath it, as a log would show it.
pub fn chain(error: &dyn std::error::Error) -> String {
    let beneath = error.source().map(|source| format!(": {}", chain(source)));
    format!("{error}{}", beneath.unwrap_or_default())
}

/// A stream of what an iterator yields.
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

/// A client over TLS that trusts just this certificate, and speaks HTTP/2 where the server does.
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
