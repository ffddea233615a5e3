//! [`ReqwestService`]: a reqwest client as a service for `http` requests. [`ReqwestExt`]: such a service as a reqwest client.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use http::{Request, Response};
use pin_project_lite::pin_project;
use reqwest::{Body, Client, ResponseBuilderExt, Url};
use tower::ServiceExt;
use tower_service::Service;

use crate::error::{BoxError, Error};
use crate::future::Redirected;
use crate::replay::ReplayBody;
use crate::service::BearerAuth;

/// A [`reqwest::Client`] as the inner service of a layer such as [`BearerAuthLayer`](crate::BearerAuthLayer): it takes
/// [`http::Request`]s and returns [`http::Response`]s.
///
/// [`BearerAuth::execute`] sends reqwest's own requests. A body that is `Clone` needs no option of the layer, and any other
/// one, such as [`reqwest::Body`], needs [`buffered`](crate::BearerAuthLayer::buffered):
///
/// ```
/// # use tower_bearer::{StaticToken, TokenProvider};
/// use tower::ServiceBuilder;
/// use tower_bearer::{BearerAuthLayer, ReqwestService};
///
/// # async fn run(provider: TokenProvider) -> Result<(), Box<dyn std::error::Error>> {
/// let http = reqwest::Client::new();
/// let client = ServiceBuilder::new()
///     .layer(BearerAuthLayer::with_provider(provider).buffered(1 << 20))
///     .service(ReqwestService::new(http.clone()));
///
/// let request = http.post("https://ws.api.video/videos").body(r#"{"title": "A film"}"#).build()?;
/// let response: reqwest::Response = client.execute(request).await?;
/// # Ok(())
/// # }
/// ```
///
/// # Redirects
///
/// The client follows redirects, inside the layer, and removes `Authorization` when the origin changes. A 401 from another
/// origin than the request's is not treated as a challenge. A redirect that keeps the body (307, 308) is returned as the
/// response, if the layer records the body: reqwest cannot send a stream twice.
///
/// # Errors
///
/// The client's errors. A URI that reqwest does not support, for example one without a host, is also reported as one
/// ([`is_builder`](reqwest::Error::is_builder)).
#[derive(Clone, Debug)]
pub struct ReqwestService(Client);

impl ReqwestService {
    /// Creates a service that sends with `client`. Clones of the service share the client's connections.
    pub fn new(client: Client) -> Self {
        Self(client)
    }
}

impl<B: Into<Body>> Service<Request<B>> for ReqwestService {
    type Response = Response<Body>;
    type Error = reqwest::Error;
    type Future = ReqwestFuture;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), reqwest::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> ReqwestFuture {
        match reqwest::Request::try_from(request) {
            Ok(request) => {
                let url = Some(request.url().clone());
                ReqwestFuture { url, response: Some(self.0.call(request)), invalid: None }
            }
            Err(error) => ReqwestFuture { url: None, response: None, invalid: Some(error) },
        }
    }
}

pin_project! {
    /// The response future of [`ReqwestService`].
    #[derive(Debug)]
    pub struct ReqwestFuture {
        // Where the request was sent.
        url: Option<Url>,
        #[pin]
        response: Option<<Client as Service<reqwest::Request>>::Future>,
        // Why reqwest rejected the request. Then there is no response.
        invalid: Option<reqwest::Error>,
    }
}

impl Future for ReqwestFuture {
    type Output = Result<Response<Body>, reqwest::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let Some(response) = this.response.as_pin_mut() else {
            // Polling a completed future is a bug of the caller. It stays pending, without a panic.
            return this.invalid.take().map_or(Poll::Pending, |error| Poll::Ready(Err(error)));
        };
        let response = ready!(response.poll(cx))?;
        let from = response.url().clone();
        let mut response = Response::from(response);
        // For reqwest's response that is made of it.
        if let Ok(with_url) = http::response::Builder::new().url(from.clone()).body(()) {
            response.extensions_mut().extend(with_url.into_parts().0.extensions);
        }
        if this.url.take().is_some_and(|url| url.origin() != from.origin()) {
            response.extensions_mut().insert(Redirected);
        }
        Poll::Ready(Ok(response))
    }
}

/// A body that is sent again is one of reqwest, for a layer with [`buffered`](crate::BearerAuthLayer::buffered).
impl<B> From<ReplayBody<B>> for Body
where
    B: http_body::Body<Data: Send, Error: Into<BoxError>> + Send + 'static,
{
    fn from(body: ReplayBody<B>) -> Self {
        Self::wrap(body)
    }
}

impl<S, R> BearerAuth<S, R> {
    /// Sends `request`, as [`reqwest::Client::execute`] does. reqwest's methods read the response. Feature `reqwest`.
    ///
    /// With layers around this service, [`ReqwestExt`] has the method.
    ///
    /// # Errors
    ///
    /// [`ExecuteError`] with the error of the token, of reqwest, or of a layer.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future ends the request. A refresh that is running goes on.
    pub async fn execute<ResBody>(&self, request: reqwest::Request) -> Result<reqwest::Response, ExecuteError>
    where
        // Bounds of the method: the compiler names what is missing.
        Self: Service<Request<Body>, Response = Response<ResBody>, Error: Into<BoxError>> + Clone,
        ResBody: Into<Body>,
    {
        execute(self.clone(), request).await
    }
}

/// Sends reqwest's requests by a client that is a tower service, such as a [`BearerAuth`] over [`ReqwestService`] with layers
/// around it.
pub trait ReqwestExt {
    /// As [`BearerAuth::execute`].
    fn execute(
        &self,
        request: reqwest::Request,
    ) -> impl Future<Output = Result<reqwest::Response, ExecuteError>> + Send;
}

impl<S, ResBody> ReqwestExt for S
where
    S: Service<Request<Body>, Response = Response<ResBody>, Error: Into<BoxError>, Future: Send>
        + Clone
        + Send
        + Sync,
    ResBody: Into<Body>,
{
    async fn execute(&self, request: reqwest::Request) -> Result<reqwest::Response, ExecuteError> {
        execute(self.clone(), request).await
    }
}

async fn execute<S, ResBody>(service: S, request: reqwest::Request) -> Result<reqwest::Response, ExecuteError>
where
    S: Service<Request<Body>, Response = Response<ResBody>, Error: Into<BoxError>>,
    ResBody: Into<Body>,
{
    let request = Request::try_from(request).map_err(ExecuteError::Reqwest)?;
    let response = service.oneshot(request).await;
    response.map(Into::into).map_err(|error| ExecuteError::of(error.into()))
}

/// Why [`BearerAuth::execute`] has no response.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExecuteError {
    /// The request could not be sent: there is no token for it, or its origin does not get one.
    #[error(transparent)]
    Token(Error),
    /// reqwest's error.
    #[error(transparent)]
    Reqwest(reqwest::Error),
    /// The error of another layer.
    #[error(transparent)]
    Other(BoxError),
}

impl ExecuteError {
    fn of(error: BoxError) -> Self {
        let reqwest =
            |error: BoxError| error.downcast().map_or_else(Self::Other, |error| Self::Reqwest(*error));
        error.downcast().map_or_else(reqwest, |error| Self::Token(*error))
    }
}
