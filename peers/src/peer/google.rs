//! google-cloud-auth: the credentials of a virtual machine. Their headers are added to requests of a reqwest client.

use std::sync::Arc;

use google_cloud_auth::credentials::{CacheableResource, Credentials, mds};
use http::{Extensions, HeaderMap, StatusCode, Uri};

use super::{BoxError, Peer, Setup, in_memory, reqwest_client, reqwest_status, stub_call};

struct Google {
    credentials: Credentials,
    client: reqwest::Client,
    videos: Uri,
}

pub(super) async fn build(setup: Setup) -> Result<Arc<dyn Peer>, BoxError> {
    Ok(Arc::new(Google {
        credentials: mds::Builder::default().with_endpoint(setup.metadata).build()?,
        client: reqwest_client()?,
        videos: format!("{}videos", setup.api).parse()?,
    }))
}

impl Google {
    async fn headers(&self) -> Result<HeaderMap, BoxError> {
        match self.credentials.headers(Extensions::new()).await? {
            CacheableResource::New { data, .. } => Ok(data),
            CacheableResource::NotModified => Err("the request had no tag".into()),
        }
    }
}

#[async_trait::async_trait]
impl Peer for Google {
    async fn get(&self) -> Result<StatusCode, BoxError> {
        let request = self.client.get(self.videos.to_string()).headers(self.headers().await?);
        reqwest_status(request.send().await?).await
    }

    async fn upload(&self, url: &str, chunks: usize) -> Result<StatusCode, BoxError> {
        let request = self.client.post(url).headers(self.headers().await?).body(in_memory(chunks));
        reqwest_status(request.send().await?).await
    }

    async fn stub(&self, requests: usize, through: bool) -> Result<(), BoxError> {
        for _ in 0..requests {
            let mut request = super::request(&self.videos);
            if through {
                request.headers_mut().extend(self.headers().await?);
            }
            std::hint::black_box(stub_call(request));
        }
        Ok(())
    }
}
