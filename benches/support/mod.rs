//! What the benches measure with: a token that lives, a service that responds at once, and a typical retry policy.
#![allow(dead_code, unreachable_pub)]

use std::{
    convert::Infallible,
    future::{Ready, ready},
    hint::black_box,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Empty;
use tower::{Service, retry};
use tower_bearer::{SourceError, Token, TokenRequest, TokenSource};

/// As long as a token of api.video.
pub const TOKEN: &str =
    "eyJ0eXAiOiJKV1QiLCJhbGciOiJSUzI1NiJ9.eyJhdWQiOiJsaXM0MTc1OTQ1OTU0MjQ1NTQ1NDU0NTQ1In0.Cq4hM2chE_muUA";

/// The source of a token that lives for an hour.
pub struct Hourly;

impl TokenSource for Hourly {
    async fn fetch(&self, _: &TokenRequest<'_>) -> Result<Token, SourceError> {
        Ok(Token::builder(TOKEN).expires_in(Duration::from_secs(3600)).build()?)
    }
}

/// The inner service. It responds with 200 at once.
#[derive(Clone)]
pub struct Api;

impl Service<Request<Empty<Bytes>>> for Api {
    type Response = Response<Empty<Bytes>>;
    type Error = Infallible;
    type Future = Ready<Result<Response<Empty<Bytes>>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Empty<Bytes>>) -> Self::Future {
        black_box(&request);
        ready(Ok(Response::new(Empty::new())))
    }
}

/// A typical retry policy for tower: it clones the whole request and retries after a 401.
#[derive(Clone)]
pub struct On401(pub u32);

impl<B: Clone, ResBody, E> retry::Policy<Request<B>, Response<ResBody>, E> for On401 {
    type Future = Ready<()>;

    fn retry(&mut self, _: &mut Request<B>, result: &mut Result<Response<ResBody>, E>) -> Option<Ready<()>> {
        let challenged = matches!(result, Ok(response) if response.status() == StatusCode::UNAUTHORIZED);
        (challenged && self.0 > 0).then(|| {
            self.0 -= 1;
            ready(())
        })
    }

    fn clone_request(&mut self, request: &Request<B>) -> Option<Request<B>> {
        Some(request.clone())
    }
}
