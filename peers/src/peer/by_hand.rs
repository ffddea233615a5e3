//! What a user writes today: tower's `Retry` around an `AsyncFilter` with a mutex, as in kube's client.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::future::BoxFuture;
use http::{HeaderValue, Request, Response, StatusCode, Uri, header::AUTHORIZATION};
use hyper::body::Incoming;
use tokio::sync::Mutex;
use tower::{
    Service, ServiceBuilder, ServiceExt,
    filter::AsyncFilterLayer,
    retry::{self, RetryLayer},
    util::BoxCloneSyncService,
};

use super::{Body, BoxError, Exchange, Peer, Setup, each, http_client, in_memory, status, stub};

/// kube's margin: a token that ends within it is refreshed before the request is sent.
const MARGIN: Duration = Duration::from_secs(60);

#[derive(Clone)]
struct Tokens {
    exchange: Arc<Exchange>,
    current: Arc<Mutex<Option<(String, Instant)>>>,
}

impl Tokens {
    /// The lock is held while a token is fetched, as in kube.
    async fn authorize(self, mut request: Request<Body>) -> Result<Request<Body>, BoxError> {
        let mut current = self.current.lock().await;
        let token = match current.take().filter(|(_, ends)| Instant::now() + MARGIN < *ends) {
            Some(token) => token,
            None => self.exchange.token().await?,
        };
        let mut value = HeaderValue::try_from(format!("Bearer {}", token.0))?;
        value.set_sensitive(true);
        *current = Some(token);
        request.headers_mut().insert(AUTHORIZATION, value);
        Ok(request)
    }

    fn layer<S>(
        &self,
        inner: S,
    ) -> impl Service<Request<Body>, Response = S::Response, Error = BoxError, Future: Send> + Clone + use<S>
    where
        S: Service<Request<Body>, Error: Into<BoxError>, Future: Send> + Clone + Send,
        S: Service<Request<Body>, Response: Challenged + Send>,
    {
        let tokens = self.clone();
        ServiceBuilder::new()
            .layer(RetryLayer::new(On401 { current: Arc::clone(&self.current), left: 1 }))
            .layer(AsyncFilterLayer::new(move |request| -> BoxFuture<'static, _> {
                Box::pin(tokens.clone().authorize(request))
            }))
            .service(inner)
    }
}

trait Challenged {
    fn is_challenge(&self) -> bool;
}

impl<B> Challenged for Response<B> {
    fn is_challenge(&self) -> bool {
        self.status() == StatusCode::UNAUTHORIZED
    }
}

/// Discards the token after a 401 and sends the request once more. The policy cannot know which token was challenged:
/// the filter adds it to a request that the policy does not see.
#[derive(Clone)]
struct On401 {
    current: Arc<Mutex<Option<(String, Instant)>>>,
    left: u32,
}

impl<R: Challenged, E> retry::Policy<Request<Body>, R, E> for On401 {
    type Future = BoxFuture<'static, ()>;

    fn retry(&mut self, _: &mut Request<Body>, result: &mut Result<R, E>) -> Option<Self::Future> {
        if self.left == 0 || !result.as_ref().is_ok_and(Challenged::is_challenge) {
            return None;
        }
        self.left -= 1;
        let current = Arc::clone(&self.current);
        Some(Box::pin(async move { *current.lock().await = None }))
    }

    fn clone_request(&mut self, request: &Request<Body>) -> Option<Request<Body>> {
        Some(request.clone())
    }
}

struct ByHand {
    tokens: Tokens,
    client: BoxCloneSyncService<Request<Body>, Response<Incoming>, BoxError>,
    videos: Uri,
}

pub(super) async fn build(setup: Setup) -> Result<Arc<dyn Peer>, BoxError> {
    let tokens = Tokens { exchange: Arc::new(Exchange::new(&setup)?), current: Arc::default() };
    let client = BoxCloneSyncService::new(tokens.layer(http_client()));
    Ok(Arc::new(ByHand { tokens, client, videos: format!("{}videos", setup.api).parse()? }))
}

#[async_trait::async_trait]
impl Peer for ByHand {
    async fn get(&self) -> Result<StatusCode, BoxError> {
        status(self.client.clone().oneshot(super::request(&self.videos)).await?).await
    }

    async fn upload(&self, url: &str, chunks: usize) -> Result<StatusCode, BoxError> {
        let request = Request::post(url).body(in_memory(chunks).into())?;
        status(self.client.clone().oneshot(request).await?).await
    }

    async fn stub(&self, requests: usize, through: bool) -> Result<(), BoxError> {
        match through {
            true => each(self.tokens.layer(stub::<BoxError>()), &self.videos, requests).await,
            false => each(stub::<BoxError>(), &self.videos, requests).await,
        }
    }
}
