//! [`ApiService`]: the user's own API, of any type of service.

use std::{
    fmt,
    future::{Future, poll_fn},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::BodyExt;
use tower_service::Service;

use super::{
    request_body::RequestBody,
    responses::{Body, problem, whole},
};
use crate::BoxError;

type Answer = Pin<Box<dyn Future<Output = Response<Body>> + Send>>;

/// A service without its type. Each request is sent to a clone.
#[derive(Clone)]
pub(super) struct ApiService(Arc<dyn Fn(Request<RequestBody>) -> Answer + Send + Sync>);

impl ApiService {
    pub(super) fn new<S, B>(service: S) -> Self
    where
        S: Service<Request<RequestBody>, Response = Response<B>, Error: Into<BoxError>, Future: Send>
            + Clone
            + Send
            + 'static,
        B: http_body::Body<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
    {
        // The lock is for services that are not `Sync`. It is held for the clone only.
        let service = Mutex::new(service);
        Self(Arc::new(move |request| {
            let service = service.lock().unwrap_or_else(PoisonError::into_inner).clone();
            Box::pin(answer(service, request))
        }))
    }

    pub(super) async fn call(&self, request: Request<RequestBody>) -> Response<Body> {
        (self.0)(request).await
    }
}

/// Sends a request to the service. An error of the service becomes a 500.
async fn answer<S, B>(mut service: S, request: Request<RequestBody>) -> Response<Body>
where
    S: Service<Request<RequestBody>, Response = Response<B>, Error: Into<BoxError>>,
    B: http_body::Body<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
{
    let answered = match poll_fn(|cx| service.poll_ready(cx).map_err(Into::into)).await {
        Ok(()) => service.call(request).await.map_err(Into::into),
        Err(error) => Err(error),
    };
    match answered {
        Ok(response) => response.map(|body| body.map_err(Into::into).boxed_unsync()),
        Err(error) => {
            let title = format!("The service failed: {error}");
            problem(StatusCode::INTERNAL_SERVER_ERROR, &title).map(whole)
        }
    }
}

impl fmt::Debug for ApiService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiService")
    }
}
