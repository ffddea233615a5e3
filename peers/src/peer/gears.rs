//! cf-gears-toolkit-auth: its client with `BearerAuthAutoRefreshLayer`.

use std::{sync::Arc, time::Duration};

use http::{StatusCode, Uri};
use toolkit_auth::oauth2::BearerAuthAutoRefreshLayer;
use toolkit_auth::{HttpClientBuilderExt, OAuthClientConfig, SecretString, TokenProvider};
use toolkit_http::{HttpClient, HttpClientBuilder, HttpError};
use tower::Layer;

use super::{BoxError, Peer, Setup, each, in_memory, stub};

struct Gears {
    layer: BearerAuthAutoRefreshLayer,
    client: HttpClient,
    videos: Uri,
}

pub(super) async fn build(setup: Setup) -> Result<Arc<dyn Peer>, BoxError> {
    let mut config = OAuthClientConfig {
        token_endpoint: Some(setup.token_endpoint.parse()?),
        client_id: setup.client_id,
        client_secret: SecretString::new(setup.client_secret),
        ..OAuthClientConfig::default()
    };
    if let Some(ahead) = setup.ahead {
        (config.refresh_offset, config.jitter_max) = (ahead, Duration::ZERO);
    }
    let provider = TokenProvider::new(config)?;
    Ok(Arc::new(Gears {
        layer: BearerAuthAutoRefreshLayer::new(provider.clone()),
        client: HttpClientBuilder::new()
            // By default, the client rejects requests while a hundred are running.
            .concurrency_limit(None)
            .with_bearer_auth_auto_refresh(provider)
            .build()?,
        videos: format!("{}videos", setup.api).parse()?,
    }))
}

#[async_trait::async_trait]
impl Peer for Gears {
    async fn get(&self) -> Result<StatusCode, BoxError> {
        let response = self.client.get(&self.videos.to_string()).send().await?;
        let status = response.status();
        response.bytes().await?;
        Ok(status)
    }

    async fn upload(&self, url: &str, chunks: usize) -> Result<StatusCode, BoxError> {
        Ok(self.client.post(url).body_bytes(in_memory(chunks)).send().await?.status())
    }

    async fn stub(&self, requests: usize, through: bool) -> Result<(), BoxError> {
        match through {
            true => each(self.layer.layer(stub::<HttpError>()), &self.videos, requests).await,
            false => each(stub::<HttpError>(), &self.videos, requests).await,
        }
    }
}
