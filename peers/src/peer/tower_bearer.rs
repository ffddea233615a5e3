//! tower-bearer: the layer with its defaults, over hyper-util's client.

use std::sync::Arc;

use http::{Request, Response, StatusCode, Uri};
use hyper::body::Incoming;
use tower::{Layer, ServiceExt, util::BoxCloneSyncService};
use tower_bearer::{
    BearerAuthLayer, Error, OAuth2, RefreshAhead, SourceErrorKind, TokenProvider,
    oauth2::{ClientAuth, Server},
};
use tower_bearer_store::FileStore;

use super::{BoxError, Peer, Setup, each, http_client, status, streamed, stub};

struct TowerBearer {
    layer: BearerAuthLayer,
    client: BoxCloneSyncService<Request<super::Body>, Response<Incoming>, BoxError>,
    videos: Uri,
}

pub(super) async fn build(setup: Setup) -> Result<Arc<dyn Peer>, BoxError> {
    let share_until_due = setup.share_until_due();
    let login = Server::token_endpoint(&setup.token_endpoint);
    let client = ClientAuth::basic(&setup.client_id, &setup.client_secret);
    let mut provider = match setup.refresh_token {
        None => TokenProvider::builder(OAuth2::client_credentials(login, client)),
        Some(refresh_token) => TokenProvider::builder(OAuth2::login(login, client)).login(refresh_token),
    };
    if let Some(folder) = setup.state {
        provider = provider.store(FileStore::new(folder.join("tower-bearer")));
    }
    if let Some(share) = share_until_due {
        provider = provider.refresh_ahead(RefreshAhead::new().share(1.0 - share).jitter(0.0));
    }
    let layer = BearerAuthLayer::with_provider(provider.build()?);
    let client = layer.layer(http_client::<super::Body>()).map_err(Into::into);
    Ok(Arc::new(TowerBearer {
        client: BoxCloneSyncService::new(client),
        layer,
        videos: format!("{}videos", setup.api).parse()?,
    }))
}

#[async_trait::async_trait]
impl Peer for TowerBearer {
    async fn get(&self) -> Result<StatusCode, BoxError> {
        let client = self.client.clone();
        status(client.oneshot(super::request(&self.videos)).await?).await
    }

    async fn upload(&self, url: &str, chunks: usize) -> Result<StatusCode, BoxError> {
        let client = self.layer.clone().buffered(1024 * 1024).layer(http_client());
        status(client.oneshot(Request::post(url).body(streamed(chunks))?).await?).await
    }

    async fn stub(&self, requests: usize, through: bool) -> Result<(), BoxError> {
        match through {
            true => each(self.layer.layer(stub::<std::convert::Infallible>()), &self.videos, requests).await,
            false => each(stub::<std::convert::Infallible>(), &self.videos, requests).await,
        }
    }

    fn asks_for_login(&self, outcome: &Result<StatusCode, BoxError>) -> bool {
        let error = outcome.as_ref().err().and_then(|error| error.downcast_ref());
        matches!(error, Some(Error::Source(error)) if error.kind() == SourceErrorKind::LoginRequired)
    }
}
