//! aws-smithy-runtime: an operation of the kind that the AWS SDK is made of, with the bearer auth scheme, the identity
//! cache of the defaults, and a resolver that makes one exchange for each call.

use std::{
    convert::Infallible,
    fmt,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use aws_smithy_runtime::client::{
    auth::http::BearerAuthScheme,
    identity::IdentityCache,
    orchestrator::operation::{Operation, OperationBuilder},
};
use aws_smithy_runtime_api::client::{
    auth::{
        AuthSchemeOptionResolverParams, SharedAuthScheme, SharedAuthSchemeOptionResolver,
        http::HTTP_BEARER_AUTH_SCHEME_ID, static_resolver::StaticAuthSchemeOptionResolver,
    },
    http::{HttpConnector, HttpConnectorFuture, SharedHttpConnector, http_client_fn},
    identity::{Identity, IdentityFuture, ResolveIdentity, SharedIdentityResolver, http::Token},
    orchestrator::{HttpRequest, HttpResponse},
    result::ConnectorError,
    runtime_components::{RuntimeComponents, RuntimeComponentsBuilder},
    runtime_plugin::{SharedRuntimePlugin, StaticRuntimePlugin},
};
use aws_smithy_types::{
    body::SdkBody,
    config_bag::{ConfigBag, Layer},
    retry::RetryConfig,
};
use bytes::Bytes;
use http::{Method, StatusCode};

use super::{BoxError, Exchange, Peer, Setup, in_memory, reqwest_client};

/// Every call is an exchange, so that the figures are those of the cache.
struct Resolver {
    exchange: Exchange,
    /// How much earlier than its end an identity expires.
    early: Duration,
}

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resolver").finish_non_exhaustive()
    }
}

impl ResolveIdentity for Resolver {
    fn resolve_identity<'a>(&'a self, _: &'a RuntimeComponents, _: &'a ConfigBag) -> IdentityFuture<'a> {
        IdentityFuture::new(async {
            let (token, ends) = self.exchange.token().await?;
            let left = ends.saturating_duration_since(Instant::now());
            let ends = SystemTime::now() + left - self.early;
            Ok(Identity::new(Token::new(token, Some(ends)), Some(ends)))
        })
    }
}

/// What is sent, under the URL of the API.
#[derive(Debug)]
struct Call {
    method: Method,
    path: String,
    body: Bytes,
}

impl Call {
    fn get() -> Self {
        Self { method: Method::GET, path: "/videos".into(), body: Bytes::new() }
    }
}

#[derive(Debug)]
struct Reqwest(reqwest::Client);

impl HttpConnector for Reqwest {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        let client = self.0.clone();
        HttpConnectorFuture::new(async move {
            let send = async {
                let request = request.try_into_http1x()?;
                let request = request.map(|body| Bytes::copy_from_slice(body.bytes().unwrap_or_default()));
                let response = client.execute(request.try_into()?).await?;
                let status = response.status();
                Ok::<_, BoxError>(http::Response::builder().status(status).body(response.bytes().await?)?)
            };
            respond(send.await.map_err(ConnectorError::io)?)
        })
    }
}

fn respond(response: http::Response<Bytes>) -> Result<HttpResponse, ConnectorError> {
    let response = response.map(SdkBody::from);
    HttpResponse::try_from(response).map_err(|error| ConnectorError::other(error.into(), None))
}

/// Responds at once.
#[derive(Debug)]
struct Stub;

impl HttpConnector for Stub {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        std::hint::black_box(request);
        HttpConnectorFuture::ready(respond(http::Response::new(Bytes::new())))
    }
}

type Sent = Operation<Call, StatusCode, Infallible>;

fn operation(
    endpoint: &str,
    connector: impl HttpConnector + 'static,
    auth: impl FnOnce(OperationBuilder) -> OperationBuilder,
) -> Sent {
    let connector = SharedHttpConnector::new(connector);
    auth(Operation::builder())
        .service_name("videos")
        .operation_name("Send")
        .endpoint_url(endpoint)
        .http_client(http_client_fn(move |_, _| connector.clone()))
        .standard_retry(&RetryConfig::standard())
        .serializer(|call: Call| {
            let request = http::Request::builder().method(call.method).uri(call.path);
            Ok(HttpRequest::try_from(request.body(SdkBody::from(call.body))?)?)
        })
        .deserializer(|response| Ok(StatusCode::from_u16(response.status().as_u16()).expect("a status")))
        .build()
}

struct Aws {
    operation: Sent,
    /// Over an inner service that responds at once, with and without a token.
    stubs: [Sent; 2],
    api: String,
}

pub(super) async fn build(setup: Setup) -> Result<Arc<dyn Peer>, BoxError> {
    let resolver =
        Resolver { exchange: Exchange::new(&setup)?, early: setup.ahead.unwrap_or(Duration::ZERO) };
    let cache = match setup.ahead {
        None => IdentityCache::lazy(),
        // The jitter of the buffer cannot be turned off: the resolver states the earlier end instead.
        Some(_) => IdentityCache::lazy().buffer_time(Duration::ZERO),
    };
    let components = RuntimeComponentsBuilder::new("bearer")
        .with_auth_scheme_option_resolver(Some(SharedAuthSchemeOptionResolver::new(
            StaticAuthSchemeOptionResolver::new(vec![HTTP_BEARER_AUTH_SCHEME_ID]),
        )))
        .with_auth_scheme(SharedAuthScheme::new(BearerAuthScheme::new()))
        .with_identity_cache(Some(cache.build()))
        .with_identity_resolver(HTTP_BEARER_AUTH_SCHEME_ID, SharedIdentityResolver::new(resolver));
    let mut config = Layer::new("bearer");
    config.store_put(AuthSchemeOptionResolverParams::new(()));
    let plugin = StaticRuntimePlugin::new().with_config(config.freeze()).with_runtime_components(components);
    let plugin = SharedRuntimePlugin::new(plugin);
    let bearer = |builder: OperationBuilder| builder.runtime_plugin(plugin.clone());
    Ok(Arc::new(Aws {
        operation: operation(&setup.api, Reqwest(reqwest_client()?), bearer),
        stubs: [operation(&setup.api, Stub, bearer), operation(&setup.api, Stub, OperationBuilder::no_auth)],
        api: setup.api,
    }))
}

#[async_trait::async_trait]
impl Peer for Aws {
    async fn get(&self) -> Result<StatusCode, BoxError> {
        Ok(self.operation.invoke(Call::get()).await?)
    }

    async fn upload(&self, url: &str, chunks: usize) -> Result<StatusCode, BoxError> {
        let path = url.strip_prefix(self.api.trim_end_matches('/')).ok_or("the URL is not of the API")?;
        let call = Call { method: Method::POST, path: path.to_owned(), body: in_memory(chunks) };
        Ok(self.operation.invoke(call).await?)
    }

    async fn stub(&self, requests: usize, through: bool) -> Result<(), BoxError> {
        let [with, without] = &self.stubs;
        let operation = if through { with } else { without };
        for _ in 0..requests {
            std::hint::black_box(operation.invoke(Call::get()).await?);
        }
        Ok(())
    }
}
