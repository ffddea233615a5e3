//! A token endpoint over real sockets, with and without TLS, whose connections can die without notice.
#![allow(dead_code, unreachable_pub)]

use std::{
    convert::Infallible,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::Full;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use rustls::{ServerConfig, pki_types::PrivateKeyDer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::watch,
};
use tokio_rustls::TlsAcceptor;

type Answer = dyn Fn(&Request<Incoming>) -> Response<String> + Send + Sync;

/// Runs until the process ends, on the runtime that has started it.
#[derive(Clone)]
pub struct TokenServer {
    pub address: SocketAddr,
    /// The certificate in PEM; empty without TLS.
    pub pem: String,
    pub connections: Arc<AtomicUsize>,
    /// How many TLS handshakes have resumed a session.
    pub resumed: Arc<AtomicUsize>,
    /// The path and the headers of each request.
    pub requests: Arc<Mutex<Vec<(String, HeaderMap)>>>,
    http2_only: bool,
    /// The number of the first connection that is alive.
    alive: watch::Sender<usize>,
}

impl TokenServer {
    /// Starts a server that responds with `answer`. TLS offers the protocols in `alpn`; without any, there is no TLS.
    pub async fn start(
        alpn: &[&str],
        answer: impl Fn(&Request<Incoming>) -> Response<String> + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key)
            .unwrap();
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        let acceptor = (!alpn.is_empty()).then(|| TlsAcceptor::from(Arc::new(config)));
        let server = Self {
            address: listener.local_addr().unwrap(),
            pem: if alpn.is_empty() { String::new() } else { made.cert.pem() },
            connections: Arc::default(),
            resumed: Arc::default(),
            requests: Arc::default(),
            http2_only: alpn == ["h2"],
            alive: watch::channel(0).0,
        };
        tokio::spawn(server.clone().accept(listener, acceptor, Arc::new(answer)));
        server
    }

    pub fn uri(&self) -> String {
        let scheme = if self.pem.is_empty() { "http" } else { "https" };
        format!("{scheme}://{}", self.address)
    }

    /// Lets all connections die: they stay open, and nothing is read or written any more.
    pub fn kill_connections(&self) {
        self.alive.send_replace(self.connections());
    }

    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    pub fn paths(&self) -> Vec<String> {
        self.requests.lock().unwrap().iter().map(|(path, _)| path.clone()).collect()
    }

    async fn accept(self, listener: TcpListener, acceptor: Option<TlsAcceptor>, answer: Arc<Answer>) {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let number = self.connections.fetch_add(1, Ordering::SeqCst);
            let (server, acceptor, answer) = (self.clone(), acceptor.clone(), Arc::clone(&answer));
            tokio::spawn(async move {
                let Some(acceptor) = acceptor else { return server.serve(stream, number, answer).await };
                let Ok(stream) = acceptor.accept(stream).await else { return };
                if stream.get_ref().1.handshake_kind() == Some(rustls::HandshakeKind::Resumed) {
                    server.resumed.fetch_add(1, Ordering::SeqCst);
                }
                server.serve(stream, number, answer).await;
            });
        }
    }

    async fn serve(
        self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        number: usize,
        answer: Arc<Answer>,
    ) {
        let requests = Arc::clone(&self.requests);
        let service = service_fn(move |request: Request<Incoming>| {
            let path = request.uri().path().to_owned();
            requests.lock().unwrap().push((path, request.headers().clone()));
            let answer = answer(&request).map(|body| Full::new(Bytes::from(body)));
            async { Ok::<_, Infallible>(answer) }
        });
        let builder = auto::Builder::new(TokioExecutor::new());
        let builder = if self.http2_only { builder.http2_only() } else { builder };
        let connection = builder.serve_connection(TokioIo::new(stream), service);
        let mut alive = self.alive.subscribe();
        let mut connection = std::pin::pin!(connection);
        tokio::select! {
            _ = &mut connection => {}
            () = async { _ = alive.wait_for(|first| *first > number).await } => {
                std::future::pending::<()>().await;
            }
        }
    }
}
