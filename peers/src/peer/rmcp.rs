//! rmcp: `AuthClient` over its `AuthorizationManager`, with stored credentials. A request of the scenarios takes the
//! place of a message.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU16, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use futures_util::{StreamExt, stream::BoxStream};
use http::{
    HeaderName, HeaderValue, Method, StatusCode, Uri,
    header::{AUTHORIZATION, WWW_AUTHENTICATE},
};
use rmcp::{
    model::{ClientJsonRpcMessage, ClientNotification},
    transport::{
        auth::{
            AuthClient, AuthError, AuthorizationManager, CredentialStore, InMemoryCredentialStore,
            OAuthClientConfig, StoredCredentials,
        },
        streamable_http_client::{
            AuthRequiredError, SseError, StreamableHttpClient, StreamableHttpError,
            StreamableHttpPostResponse,
        },
    },
};
use serde_json::json;

use super::{BoxError, Peer, Setup, in_memory, reqwest_client, stub_call};

/// A token of a longer life than a minute is refreshed when it ends within this time: `REFRESH_BUFFER_SECS` in
/// auth.rs. The manager counts whole seconds.
pub(super) const MARGIN: Duration = Duration::from_secs(30);

/// The timeout of the manager's own client, which would use a proxy of the environment.
const TIMEOUT: Duration = Duration::from_secs(30);

type Error = StreamableHttpError<reqwest::Error>;

/// What is sent for a message. The trait has no place for the status of a success.
#[derive(Clone)]
enum Api {
    Request { client: reqwest::Client, method: Method, url: String, body: Bytes, status: Arc<AtomicU16> },
    Stub { videos: Uri },
}

impl StreamableHttpClient for Api {
    type Error = reqwest::Error;

    async fn post_message(
        &self,
        _: Arc<str>,
        _: ClientJsonRpcMessage,
        _: Option<Arc<str>>,
        token: Option<String>,
        _: HashMap<HeaderName, HeaderValue>,
    ) -> Result<StreamableHttpPostResponse, Error> {
        match self {
            Self::Request { client, method, url, body, status } => {
                let mut request = client.request(method.clone(), url).body(body.clone());
                if let Some(token) = token {
                    request = request.bearer_auth(token);
                }
                let response = request.send().await.map_err(Error::Client)?;
                if response.status() == StatusCode::UNAUTHORIZED {
                    let challenge = response.headers().get(WWW_AUTHENTICATE);
                    let challenge = challenge.and_then(|value| value.to_str().ok()).unwrap_or_default();
                    return Err(Error::AuthRequired(AuthRequiredError::new(challenge.to_owned())));
                }
                let response = response.error_for_status().map_err(Error::Client)?;
                status.store(response.status().as_u16(), Ordering::Relaxed);
                response.bytes().await.map_err(Error::Client)?;
            }
            Self::Stub { videos } => {
                let mut request = super::request(videos);
                if let Some(token) = token {
                    let value = HeaderValue::try_from(format!("Bearer {token}")).expect("a token");
                    request.headers_mut().insert(AUTHORIZATION, value);
                }
                std::hint::black_box(stub_call(request));
            }
        }
        Ok(StreamableHttpPostResponse::Accepted)
    }

    async fn delete_session(
        &self,
        _: Arc<str>,
        _: Arc<str>,
        _: Option<String>,
        _: HashMap<HeaderName, HeaderValue>,
    ) -> Result<(), Error> {
        Ok(())
    }

    async fn get_stream(
        &self,
        _: Arc<str>,
        _: Option<Arc<str>>,
        _: Option<String>,
        _: Option<String>,
        _: HashMap<HeaderName, HeaderValue>,
    ) -> Result<BoxStream<'static, Result<sse_stream::Sse, SseError>>, Error> {
        Ok(futures_util::stream::empty().boxed())
    }
}

/// The credentials in a file. rmcp has the trait, and a store in memory.
struct InFile(PathBuf);

fn store_error(error: impl ToString) -> AuthError {
    AuthError::CredentialStoreError(error.to_string())
}

#[async_trait::async_trait]
impl CredentialStore for InFile {
    async fn load(&self) -> Result<Option<StoredCredentials>, AuthError> {
        match std::fs::read(&self.0) {
            Ok(credentials) => serde_json::from_slice(&credentials).map_err(store_error),
            Err(_) => Ok(None),
        }
    }

    async fn save(&self, credentials: StoredCredentials) -> Result<(), AuthError> {
        let credentials = serde_json::to_vec(&credentials).map_err(store_error)?;
        std::fs::write(&self.0, credentials).map_err(store_error)
    }

    async fn clear(&self) -> Result<(), AuthError> {
        std::fs::remove_file(&self.0).map_err(store_error)
    }
}

struct Rmcp {
    client: AuthClient<Api>,
    http: reqwest::Client,
    videos: Uri,
}

pub(super) async fn build(setup: Setup) -> Result<Arc<dyn Peer>, BoxError> {
    let mut manager = AuthorizationManager::new(&setup.api).await?;
    manager.with_client(reqwest::Client::builder().no_proxy().timeout(TIMEOUT).build()?)?;
    manager.set_metadata(serde_json::from_value(json!({
        // Not used: a user has logged in.
        "authorization_endpoint": setup.api,
        "token_endpoint": setup.token_endpoint,
    }))?);
    let config = OAuthClientConfig::new(&setup.client_id, &setup.api);
    manager.configure_client(config.with_client_secret(&setup.client_secret))?;
    match &setup.state {
        Some(folder) => {
            let store = InFile(folder.join("rmcp.json"));
            if store.load().await?.is_none() {
                store.save(expired(&setup)?).await?;
            }
            manager.set_credential_store(store);
        }
        None => {
            let store = InMemoryCredentialStore::new();
            store.save(expired(&setup)?).await?;
            manager.set_credential_store(store.clone());
            if setup.ahead.is_some() {
                manager.refresh_token().await?;
                let mut stored = store.load().await?.ok_or("nothing is stored")?;
                // A token of DUE + 2 * MARGIN that is due after DUE.
                stored.token_received_at = stored.token_received_at.map(|at| at - MARGIN.as_secs() - 1);
                store.save(stored).await?;
            }
        }
    }
    let (http, videos) = (reqwest_client()?, format!("{}videos", setup.api).parse()?);
    let request = Api::Request {
        client: http.clone(),
        method: Method::GET,
        url: format!("{}videos", setup.api),
        body: Bytes::new(),
        status: Arc::default(),
    };
    Ok(Arc::new(Rmcp { client: AuthClient::new(request, manager), http, videos }))
}

/// The credentials after a login, with a token that has expired.
fn expired(setup: &Setup) -> Result<StoredCredentials, BoxError> {
    let refresh_token = setup.refresh_token.as_ref().unwrap_or(&setup.login);
    let token = json!({
        "access_token": "expired",
        "token_type": "bearer",
        "expires_in": 1,
        "refresh_token": refresh_token,
    });
    let received_at = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs() - 60;
    let token = Some(serde_json::from_value(token)?);
    Ok(StoredCredentials::new(setup.client_id.clone(), token, Vec::new(), Some(received_at)))
}

async fn send(client: &impl StreamableHttpClient<Error = reqwest::Error>) -> Result<StatusCode, BoxError> {
    let notification = ClientNotification::InitializedNotification(Default::default());
    let message = ClientJsonRpcMessage::notification(notification);
    match client.post_message("".into(), message, None, None, HashMap::new()).await {
        Ok(_) => Ok(StatusCode::OK),
        // A request to log in, with the API's challenge.
        Err(Error::AuthRequired(_)) => Ok(StatusCode::UNAUTHORIZED),
        Err(error) => Err(error.into()),
    }
}

#[async_trait::async_trait]
impl Peer for Rmcp {
    async fn get(&self) -> Result<StatusCode, BoxError> {
        send(&self.client).await
    }

    async fn upload(&self, url: &str, chunks: usize) -> Result<StatusCode, BoxError> {
        let (mut client, status) = (self.client.clone(), Arc::default());
        client.http_client = Api::Request {
            client: self.http.clone(),
            method: Method::POST,
            url: url.to_owned(),
            body: in_memory(chunks),
            status: Arc::clone(&status),
        };
        match send(&client).await? {
            StatusCode::OK => Ok(StatusCode::from_u16(status.load(Ordering::Relaxed))?),
            refused => Ok(refused),
        }
    }

    async fn stub(&self, requests: usize, through: bool) -> Result<(), BoxError> {
        let mut client = self.client.clone();
        client.http_client = Api::Stub { videos: self.videos.clone() };
        for _ in 0..requests {
            match through {
                true => send(&client).await?,
                false => send(&client.http_client).await?,
            };
        }
        Ok(())
    }

    fn asks_for_login(&self, outcome: &Result<StatusCode, BoxError>) -> bool {
        matches!(outcome, Ok(StatusCode::UNAUTHORIZED))
    }
}
