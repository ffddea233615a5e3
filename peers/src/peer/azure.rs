//! azure_core: `BearerTokenAuthorizationPolicy` in a pipeline with its defaults, and an `OnChallenge`, without which
//! the policy sends no request again.

use std::sync::Arc;

use azure_core::{
    credentials::{AccessToken, TokenCredential, TokenRequestOptions},
    error::ErrorKind,
    http::{
        AsyncRawResponse, Body, ClientOptions, Context, HttpClient, Method, Pipeline, PipelineSendOptions,
        Request, StatusCode as AzureStatus, Transport, Url,
        headers::Headers,
        policies::{
            Policy, PolicyResult,
            auth::{Authorizer, BearerTokenAuthorizationPolicy, OnChallenge},
        },
    },
    stream::{BytesStream, SeekableStream},
    time::OffsetDateTime,
};
use http::StatusCode;
use tokio::time::Instant;

use super::{BoxError, Exchange, Peer, Setup, in_memory, reqwest_client};

const SCOPE: &str = "api";

/// Every call is an exchange, so that the figures are those of the policy. The credentials of azure_identity have a
/// cache of their own, which returns the same token also after a 401.
struct Credential(Exchange);

impl std::fmt::Debug for Credential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credential").finish_non_exhaustive()
    }
}

#[async_trait::async_trait]
impl TokenCredential for Credential {
    async fn get_token(
        &self,
        _: &[&str],
        _: Option<TokenRequestOptions<'_>>,
    ) -> azure_core::Result<AccessToken> {
        let token = self.0.token().await;
        let (token, ends) = token.map_err(|error| azure_core::Error::new(ErrorKind::Credential, error))?;
        let left = ends.saturating_duration_since(Instant::now().into_std());
        Ok(AccessToken::new(token, OffsetDateTime::now_utc() + left))
    }
}

/// Asks for another token. The policy has discarded the challenged one.
#[derive(Debug)]
struct AuthorizeAgain;

#[async_trait::async_trait]
impl OnChallenge for AuthorizeAgain {
    async fn on_challenge(
        &self,
        context: &Context,
        request: &mut Request,
        authorizer: &dyn Authorizer,
        _: &Headers,
    ) -> azure_core::Result<()> {
        let method_options =
            azure_core::http::ClientMethodOptions { context: context.to_borrowed().into_owned() };
        authorizer.authorize(request, &[SCOPE], TokenRequestOptions { method_options }).await
    }
}

/// The policy sends no token without TLS. The servers have none.
#[derive(Debug)]
struct Loopback(reqwest::Client);

#[async_trait::async_trait]
impl HttpClient for Loopback {
    async fn execute_request(&self, request: &Request) -> azure_core::Result<AsyncRawResponse> {
        let mut request = request.clone();
        let url = request.url().as_str().replacen("https:", "http:", 1);
        *request.url_mut() = url.parse().expect("the URL of a request");
        self.0.execute_request(&request).await
    }
}

#[derive(Debug)]
struct Stub;

#[async_trait::async_trait]
impl Policy for Stub {
    async fn send(&self, _: &Context, request: &mut Request, _: &[Arc<dyn Policy>]) -> PolicyResult {
        std::hint::black_box(request);
        Ok(AsyncRawResponse::from_bytes(AzureStatus::Ok, Headers::new(), ""))
    }
}

struct Azure {
    policy: Arc<dyn Policy>,
    pipeline: Pipeline,
    videos: Url,
}

pub(super) async fn build(setup: Setup) -> Result<Arc<dyn Peer>, BoxError> {
    let credential = Arc::new(Credential(Exchange::new(&setup)?));
    let policy = BearerTokenAuthorizationPolicy::new(credential, [SCOPE]);
    let policy: Arc<dyn Policy> = Arc::new(policy.with_on_challenge(Arc::new(AuthorizeAgain)));
    let transport = Some(Transport::new(Arc::new(Loopback(reqwest_client()?))));
    let options = ClientOptions { transport, ..ClientOptions::default() };
    let pipeline = Pipeline::new(None, None, options, Vec::new(), vec![Arc::clone(&policy)], None);
    let api = setup.api.replacen("http:", "https:", 1);
    Ok(Arc::new(Azure { policy, pipeline, videos: format!("{api}videos").parse()? }))
}

impl Azure {
    async fn send(&self, request: &mut Request) -> Result<StatusCode, BoxError> {
        let options = PipelineSendOptions { skip_checks: true, ..PipelineSendOptions::default() };
        let response = self.pipeline.send(&Context::new(), request, Some(options)).await?;
        Ok(StatusCode::from_u16(response.status().into())?)
    }
}

#[async_trait::async_trait]
impl Peer for Azure {
    async fn get(&self) -> Result<StatusCode, BoxError> {
        self.send(&mut Request::new(self.videos.clone(), Method::Get)).await
    }

    async fn upload(&self, url: &str, chunks: usize) -> Result<StatusCode, BoxError> {
        let mut request = Request::new(url.replacen("http:", "https:", 1).parse()?, Method::Post);
        let body: Box<dyn SeekableStream> = Box::new(BytesStream::new(in_memory(chunks)));
        request.set_body(Body::SeekableStream(body));
        self.send(&mut request).await
    }

    async fn stub(&self, requests: usize, through: bool) -> Result<(), BoxError> {
        let (context, next): (_, [Arc<dyn Policy>; 1]) = (Context::new(), [Arc::new(Stub)]);
        for _ in 0..requests {
            let mut request = Request::new(self.videos.clone(), Method::Get);
            let response = match through {
                true => self.policy.send(&context, &mut request, &next).await?,
                false => next[0].send(&context, &mut request, &[]).await?,
            };
            std::hint::black_box(response);
        }
        Ok(())
    }
}
