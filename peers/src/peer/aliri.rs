//! aliri_tokens: a `TokenWatcher`, whose token is added to the requests of a reqwest client.

use std::sync::Arc;

use aliri_clock::DurationSecs;
use aliri_tokens::{
    ClientId, ClientSecret, RefreshToken, TokenLifetimeConfig, TokenWatcher,
    backoff::ErrorBackoffConfig,
    jitter::NullJitter,
    sources::oauth2::{
        ClientCredentialsTokenSource, RefreshTokenSource,
        dto::{ClientCredentials, ClientCredentialsWithAudience, RefreshTokenCredentialsSource},
    },
};
use http::{HeaderValue, StatusCode, Uri, header::AUTHORIZATION};

use super::{BoxError, Peer, Setup, in_memory, reqwest_client, reqwest_status, stub_call};

struct Aliri {
    watcher: TokenWatcher,
    client: reqwest::Client,
    videos: Uri,
}

pub(super) async fn build(setup: Setup) -> Result<Arc<dyn Peer>, BoxError> {
    let share_until_due = setup.share_until_due();
    let (client_id, client_secret) = (ClientId::new(setup.client_id), ClientSecret::new(setup.client_secret));
    let client = reqwest_012::Client::builder().no_proxy().build()?;
    let token_url = setup.token_endpoint.parse()?;
    let lifetime = match share_until_due {
        None => TokenLifetimeConfig::default(),
        // The default keeps a token for at least 30 s, however short it lives.
        Some(share) => TokenLifetimeConfig::new(share, DurationSecs(1)),
    };
    let backoff = ErrorBackoffConfig::default();
    // The jitter of the documentation's example is a minute, longer than the life of these tokens.
    let watcher = match setup.refresh_token {
        None => {
            let credentials = ClientCredentialsWithAudience {
                credentials: ClientCredentials { client_id, client_secret }.into(),
                audience: aliri::jwt::Audience::from_static("api"),
            };
            let source = ClientCredentialsTokenSource::new(client, token_url, credentials, lifetime);
            TokenWatcher::spawn_from_token_source(source.using_form_data(), NullJitter, backoff).await?
        }
        Some(refresh_token) => {
            let credentials = RefreshTokenCredentialsSource {
                client_id,
                client_secret: Some(client_secret),
                refresh_token: RefreshToken::new(refresh_token).into_boxed_ref(),
            };
            let source = RefreshTokenSource::new(client, token_url, credentials, lifetime);
            TokenWatcher::spawn_from_token_source(source.using_form_data(), NullJitter, backoff).await?
        }
    };
    Ok(Arc::new(Aliri {
        watcher,
        client: reqwest_client()?,
        videos: format!("{}videos", setup.api).parse()?,
    }))
}

impl Aliri {
    fn header(&self) -> Result<HeaderValue, BoxError> {
        let mut value =
            HeaderValue::try_from(format!("Bearer {}", self.watcher.token().access_token().as_str()))?;
        value.set_sensitive(true);
        Ok(value)
    }
}

#[async_trait::async_trait]
impl Peer for Aliri {
    async fn get(&self) -> Result<StatusCode, BoxError> {
        let request = self.client.get(self.videos.to_string()).header(AUTHORIZATION, self.header()?);
        reqwest_status(request.send().await?).await
    }

    async fn upload(&self, url: &str, chunks: usize) -> Result<StatusCode, BoxError> {
        let request = self.client.post(url).header(AUTHORIZATION, self.header()?).body(in_memory(chunks));
        reqwest_status(request.send().await?).await
    }

    async fn stub(&self, requests: usize, through: bool) -> Result<(), BoxError> {
        for _ in 0..requests {
            let mut request = super::request(&self.videos);
            if through {
                request.headers_mut().insert(AUTHORIZATION, self.header()?);
            }
            std::hint::black_box(stub_call(request));
        }
        Ok(())
    }
}
