//! huskarl: `HttpAuthorizer` over `InMemoryTokenCache`, with the request loop of its guide and a reqwest client.

use std::{path::PathBuf, sync::Arc, time::Duration};

use http::{Method, StatusCode, Uri};
use huskarl::{
    authorizer::HttpAuthorizer,
    cache::{
        GrantTokenSource, InMemoryRefreshTokenStore, InMemoryTokenCache, NoSource, Recovery,
        RefreshTokenStore, TokenError,
    },
    core::{
        Error, RetryAdvice,
        client_auth::ClientSecret,
        platform::MaybeSendBoxFuture,
        secrets::{ProvidedSecret, SecretString},
    },
    grant::client_credentials::{ClientCredentialsGrant, ClientCredentialsGrantParameters},
    token::RefreshToken,
};
use huskarl_reqwest::ReqwestClient;

use super::{BoxError, Peer, Setup, in_memory, reqwest_client, reqwest_status, stub_call};

/// The refresh token in a file. huskarl has the trait, and a store in memory.
struct InFile(PathBuf);

impl RefreshTokenStore for InFile {
    fn get(&self) -> MaybeSendBoxFuture<'_, Result<Option<RefreshToken>, Error>> {
        let token = std::fs::read_to_string(&self.0).ok();
        Box::pin(async { Ok(token.map(|token| RefreshToken::new(SecretString::new(token), None))) })
    }

    fn set<'a>(&'a self, token: &'a RefreshToken) -> MaybeSendBoxFuture<'a, Result<(), Error>> {
        let written = std::fs::write(&self.0, token.token().expose_secret());
        Box::pin(async { written.map_err(|error| Error::new(RetryAdvice::No, error)) })
    }

    fn clear(&self) -> MaybeSendBoxFuture<'_, Result<(), Error>> {
        let removed = std::fs::remove_file(&self.0);
        Box::pin(async { removed.map_err(|error| Error::new(RetryAdvice::No, error)) })
    }
}

struct Huskarl {
    authorizer: HttpAuthorizer,
    client: reqwest::Client,
    videos: Uri,
}

pub(super) async fn build(setup: Setup) -> Result<Arc<dyn Peer>, BoxError> {
    let client = reqwest_client()?;
    let secret = ProvidedSecret::new(SecretString::new(setup.client_secret));
    let grant = ClientCredentialsGrant::builder()
        .token_endpoint(setup.token_endpoint.parse()?)
        .client_id(setup.client_id)
        .client_auth(ClientSecret::new(secret))
        .http_client(ReqwestClient::from(client.clone()))
        .build();
    let refresh_store: Box<dyn RefreshTokenStore> = match setup.state {
        Some(folder) => Box::new(InFile(folder.join("huskarl"))),
        None => Box::new(InMemoryRefreshTokenStore::default()),
    };
    let source = GrantTokenSource::builder().grant(grant);
    let source = match setup.refresh_token {
        None => source.grant_parameters(ClientCredentialsGrantParameters::new()),
        Some(refresh_token) => {
            if refresh_store.get().await?.is_none() {
                refresh_store.set(&RefreshToken::new(SecretString::new(refresh_token), None)).await?;
            }
            source.grant_parameters(NoSource)
        }
    };
    let cache = InMemoryTokenCache::builder().source(source.refresh_store(refresh_store).build());
    let cache = match setup.ahead {
        None => cache.build(),
        // The defaults are 30 s and up to 30 s of jitter, which are made for tokens that live an hour.
        Some(ahead) => {
            cache.refresh_ahead(ahead).expires_margin(Duration::from_secs(1)).refresh_jitter(None).build()
        }
    };
    Ok(Arc::new(Huskarl {
        authorizer: HttpAuthorizer::builder().cache(cache).build(),
        client,
        videos: format!("{}videos", setup.api).parse()?,
    }))
}

impl Huskarl {
    /// The request loop of huskarl's guide: sends once more after a 401.
    async fn send(&self, method: Method, uri: &Uri, body: bytes::Bytes) -> Result<StatusCode, BoxError> {
        let send = async || {
            let headers = self.authorizer.get_headers(&method, uri).await?;
            let request = self.client.request(method.clone(), uri.to_string()).headers(headers);
            let response = request.body(body.clone()).send().await?;
            self.authorizer.process_response(uri, response.headers());
            Ok::<_, BoxError>(response)
        };
        let mut response = send().await?;
        if response.status() == StatusCode::UNAUTHORIZED {
            response = send().await?;
        }
        reqwest_status(response).await
    }
}

#[async_trait::async_trait]
impl Peer for Huskarl {
    async fn get(&self) -> Result<StatusCode, BoxError> {
        self.send(Method::GET, &self.videos, bytes::Bytes::new()).await
    }

    async fn upload(&self, url: &str, chunks: usize) -> Result<StatusCode, BoxError> {
        self.send(Method::POST, &url.parse()?, in_memory(chunks)).await
    }

    async fn stub(&self, requests: usize, through: bool) -> Result<(), BoxError> {
        for _ in 0..requests {
            let mut request = super::request(&self.videos);
            if through {
                request.headers_mut().extend(self.authorizer.get_headers(&Method::GET, &self.videos).await?);
            }
            let response = stub_call(request);
            if through {
                self.authorizer.process_response(&self.videos, response.headers());
            }
            std::hint::black_box(response);
        }
        Ok(())
    }

    fn asks_for_login(&self, outcome: &Result<StatusCode, BoxError>) -> bool {
        let error = outcome.as_ref().err().and_then(|error| error.downcast_ref::<TokenError>());
        error.is_some_and(|error| error.recovery() == Recovery::Reauthenticate)
    }
}
