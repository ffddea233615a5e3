//! What stands before a server: a path whose connections die, and a proxy that compresses.

use std::{
    future::pending,
    io::Write,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use axum::{
    Router,
    body::{Body, to_bytes},
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use flate2::{Compression, write::GzEncoder};
use http::{
    HeaderMap, StatusCode, Uri,
    header::{ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_TYPE, HOST},
};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::watch,
};

use crate::BoxError;

/// The same URL at another address.
fn at(url: &str, listener: &TcpListener) -> Result<String, BoxError> {
    let mut parts = url.parse::<Uri>()?.into_parts();
    parts.authority = Some(listener.local_addr()?.to_string().parse()?);
    let url = Uri::from_parts(parts)?.to_string();
    Ok(url.trim_end_matches('/').to_owned())
}

/// Forwards connections until they die.
pub struct DyingPath(watch::Sender<()>);

impl DyingPath {
    pub fn new() -> Self {
        Self(watch::Sender::new(()))
    }

    /// Starts a path to the server of a URL. Returns the URL that leads through it.
    pub async fn to(&self, url: &str) -> Result<String, BoxError> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let through = at(url, &listener)?;
        let server = url.parse::<Uri>()?.authority().ok_or("the URL has no host")?.to_string();
        let death = self.0.subscribe();
        tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let (mut death, server) = (death.clone(), server.clone());
                death.mark_unchanged();
                tokio::spawn(async move {
                    let Ok(mut server) = TcpStream::connect(server).await else { return };
                    tokio::select! {
                        _ = copy_bidirectional(&mut client, &mut server) => {}
                        // Nothing is closed: the client is not told.
                        _ = death.changed() => pending::<()>().await,
                    }
                });
            }
        });
        Ok(through)
    }

    /// Makes all open connections silent. New ones work.
    pub fn die(&self) {
        self.0.send_replace(());
    }
}

/// Compresses each response, unless the request excludes that.
#[derive(Clone)]
pub struct Compressing {
    client: reqwest::Client,
    server: String,
    is_on: Arc<AtomicBool>,
}

impl Compressing {
    pub fn new() -> Result<Self, BoxError> {
        let client = reqwest::Client::builder().no_proxy().build()?;
        Ok(Self { client, server: String::new(), is_on: Arc::new(AtomicBool::new(true)) })
    }

    /// Starts a proxy to the server of a URL. Returns the URL that leads through it.
    pub async fn to(&self, url: &str) -> Result<String, BoxError> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let through = at(url, &listener)?;
        let authority = url.parse::<Uri>()?.authority().ok_or("the URL has no host")?.to_string();
        let proxy = Self { server: format!("http://{authority}"), ..self.clone() };
        let router = Router::new().fallback(Self::forward).with_state(proxy);
        tokio::spawn(async move { axum::serve(listener, router).await });
        Ok(through)
    }

    pub fn stop(&self) {
        self.is_on.store(false, Ordering::Relaxed);
    }

    async fn forward(State(proxy): State<Self>, request: Request) -> Response {
        match proxy.answer(request).await {
            Ok(response) => response,
            Err(error) => (StatusCode::BAD_GATEWAY, error.to_string()).into_response(),
        }
    }

    async fn answer(&self, request: Request<Body>) -> Result<Response, BoxError> {
        let (mut parts, body) = request.into_parts();
        let compress = self.is_on.load(Ordering::Relaxed) && accepts_gzip(&parts.headers);
        for name in [HOST, ACCEPT_ENCODING] {
            parts.headers.remove(name);
        }
        let url = format!("{}{}", self.server, parts.uri);
        let request = self.client.request(parts.method, url).headers(parts.headers);
        let response = request.body(to_bytes(body, 1 << 20).await?).send().await?;
        let mut forwarded = Response::builder().status(response.status());
        if let Some(value) = response.headers().get(CONTENT_TYPE) {
            forwarded = forwarded.header(CONTENT_TYPE, value);
        }
        let mut body = response.bytes().await?.to_vec();
        if compress {
            forwarded = forwarded.header(CONTENT_ENCODING, "gzip");
            let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
            encoder.write_all(&body)?;
            body = encoder.finish()?;
        }
        Ok(forwarded.body(Body::from(body))?)
    }
}

/// Without the header, each coding is acceptable (RFC 9110 §12.5.3).
fn accepts_gzip(headers: &HeaderMap) -> bool {
    let Some(value) = headers.get(ACCEPT_ENCODING) else { return true };
    value.to_str().is_ok_and(|value| value.contains("gzip") || value.contains('*'))
}
