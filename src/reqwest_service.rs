//! [`ReqwestService`]: a reqwest client as a service for `http` requests.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use http::{Request, Response};
use pin_project_lite::pin_project;
use reqwest::{Body, Client, Error, Url};
use tower_service::Service;

use crate::future::Redirected;

/// A [`reqwest::Client`] as the inner service of a layer such as [`BearerAuthLayer`](crate::BearerAuthLayer): it takes
/// [`http::Request`]s and returns [`http::Response`]s.
///
/// A body that is `Clone` needs nothing more. For any other body, use
/// [`replay_with`](crate::BearerAuthLayer::replay_with) and wrap it as a [`reqwest::Body`]:
///
/// ```
/// # use tower_bearer::{StaticToken, TokenProvider};
/// use tower::ServiceBuilder;
/// use tower_bearer::{BearerAuthLayer, ReqwestService};
///
/// # let provider = TokenProvider::new(StaticToken::new("abc"));
/// # let client = reqwest::Client::new();
/// let service = ServiceBuilder::new()
///     .layer(BearerAuthLayer::with_provider(provider).replay_with(1 << 20, reqwest::Body::wrap))
///     .service(ReqwestService::new(client));
/// # fn is_service<S: tower::Service<http::Request<reqwest::Body>>>(_: &S) {}
/// # is_service(&service);
/// ```
///
/// # Redirects
///
/// The client follows redirects, inside the layer, and removes `Authorization` when the origin changes. A 401 from another
/// origin than the request's is not treated as a challenge.
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
    type Error = Error;
    type Future = ReqwestFuture;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
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
        invalid: Option<Error>,
    }
}

impl Future for ReqwestFuture {
    type Output = Result<Response<Body>, Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let Some(response) = this.response.as_pin_mut() else {
            // Polling a completed future is a bug of the caller. It stays pending, without a panic.
            return this.invalid.take().map_or(Poll::Pending, |error| Poll::Ready(Err(error)));
        };
        let response = ready!(response.poll(cx))?;
        let is_own = this.url.take().is_none_or(|url| url.origin() == response.url().origin());
        let mut response = Response::from(response);
        if !is_own {
            response.extensions_mut().insert(Redirected);
        }
        Poll::Ready(Ok(response))
    }
}
