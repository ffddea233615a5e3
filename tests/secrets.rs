//! No secret in anything that can be printed.

mod support;

use std::{convert::Infallible, fmt::Debug};

use bytes::Bytes;
use http::{Request, Response, StatusCode, header::AUTHORIZATION};
use http_body_util::{Empty, Full};
use support::get;
use tower::{Layer, Service, ServiceExt};
use tower_bearer::{ApiVideo, BearerAuthLayer, Scope, SourceError, Token, TokenProvider};

#[derive(Default)]
struct Shown(String);

impl Shown {
    fn add(&mut self, value: &dyn Debug) {
        self.0 += &format!("{value:?}{value:#?}");
    }
}

#[tokio::test(start_paused = true)]
async fn nothing_that_can_be_printed_shows_a_key_or_a_token() {
    let answer = r#"{"access_token": "canary-access", "refresh_token": "canary-refresh"}"#;
    let auth = tower::service_fn(move |request: Request<String>| async move {
        let refused = request.uri().path().ends_with("refresh");
        let status = if refused { StatusCode::UNAUTHORIZED } else { StatusCode::OK };
        let answer = Response::builder().status(status).body(Full::<Bytes>::from(answer)).unwrap();
        Ok::<_, Infallible>(answer)
    });
    let source = ApiVideo::new("canary-key").with_client(auth);
    let mut shown = Shown::default();
    shown.add(&source);
    shown.add(&TokenProvider::builder(source.clone()));
    let provider = TokenProvider::new(source.clone());
    let token = provider.token().await.unwrap();
    assert_eq!((token.access_token(), token.refresh_token()), ("canary-access", Some("canary-refresh")));
    shown.add(&token);
    shown.add(&token.header_value());
    shown.add(&Token::builder("canary-access").refresh_token("canary-refresh"));
    shown.add(&provider);
    shown.add(&provider.status());

    let layer = BearerAuthLayer::with_provider(provider.clone()).scope(Scope::https());
    shown.add(&layer);
    shown.add(&layer.clone().buffered(1));
    shown.add(&layer.clone().replay_with(1, |body: tower_bearer::ReplayBody<Empty<Bytes>>| body));
    shown.add(&layer.clone().clone_with(|body: &Empty<Bytes>| Some(*body)));
    shown.add(&layer.clone().no_replay());
    #[derive(Clone, Debug)]
    struct Api;
    impl Service<Request<Empty<Bytes>>> for Api {
        type Response = Response<Empty<Bytes>>;
        type Error = String;
        type Future = std::future::Ready<Result<Self::Response, String>>;

        fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Self::Error>> {
            std::task::Poll::Ready(Ok(()))
        }

        fn call(&mut self, request: Request<Empty<Bytes>>) -> Self::Future {
            assert_eq!(request.headers()[AUTHORIZATION], "Bearer canary-access");
            // What a logging client would print.
            std::future::ready(Err(format!("{request:?}")))
        }
    }
    let mut service = layer.layer(Api);
    shown.add(&service);
    shown.add(&service.call(get()));
    let error = service.oneshot(get()).await.unwrap_err();
    assert!(error.to_string().contains("authorization"));
    shown.add(&error);
    shown.0 += &support::chain(&*error);

    source.set_key("canary key");
    let refused = provider.refresh(&token).await.unwrap_err();
    shown.add(&refused);
    shown.0 += &support::chain(&refused);
    shown.add(&SourceError::refused("no").with_cause(refused));
    assert!(!shown.0.contains("canary"), "{}", shown.0);
}
