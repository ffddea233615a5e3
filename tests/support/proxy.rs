//! A TCP proxy on a free loopback port, in front of a server that fails in ways that only the network shows.
#![allow(dead_code, unreachable_pub)]

use std::net::Ipv4Addr;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
};

/// Runs until the test's runtime ends.
#[derive(Clone)]
pub struct Proxy {
    pub port: u16,
    state: watch::Sender<State>,
}

#[derive(Clone)]
struct State {
    upstream: u16,
    is_frozen: bool,
    /// How often all connections were closed.
    closed: usize,
    /// What each command is answered with, instead of by the server.
    reply: Option<&'static str>,
}

impl Proxy {
    /// Starts a proxy whose connections lead to the server at `upstream`.
    pub async fn start(upstream: u16) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let state = State { upstream, is_frozen: false, closed: 0, reply: None };
        let proxy = Self { port: listener.local_addr().unwrap().port(), state: watch::channel(state).0 };
        let accepting = proxy.clone();
        tokio::spawn(async move {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                tokio::spawn(accepting.clone().serve(client));
            }
        });
        proxy
    }

    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// Forwards nothing until [`thaw`](Self::thaw), which delivers what was sent meanwhile, also by connections that the
    /// client has closed.
    pub fn freeze(&self) {
        self.state.send_modify(|state| state.is_frozen = true);
    }

    pub fn thaw(&self) {
        self.state.send_modify(|state| state.is_frozen = false);
    }

    /// Closes all connections.
    pub fn close_all(&self) {
        self.state.send_modify(|state| state.closed += 1);
    }

    /// Leads new connections to another server. Those that are open stay where they are.
    pub fn switch(&self, upstream: u16) {
        self.state.send_modify(|state| state.upstream = upstream);
    }

    /// Answers each command on a new connection with `reply`, such as `-LOADING …`; `None` ends that.
    pub fn reply(&self, reply: Option<&'static str>) {
        self.state.send_modify(|state| state.reply = reply);
    }

    async fn serve(self, client: TcpStream) {
        let mut state = self.state.subscribe();
        let State { closed, reply, .. } = state.borrow().clone();
        let forward = async {
            match reply {
                Some(reply) => answer(client, reply).await,
                None => self.forward(client).await,
            }
        };
        tokio::select! {
            () = forward => {}
            _ = state.wait_for(|state| state.closed > closed) => {}
        }
    }

    async fn forward(&self, client: TcpStream) {
        let upstream = self.thawed().await.upstream;
        let Ok(server) = TcpStream::connect((Ipv4Addr::LOCALHOST, upstream)).await else { return };
        let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
        tokio::join!(self.copy(from_client, to_server), self.copy(from_server, to_client));
    }

    async fn copy(&self, mut from: OwnedReadHalf, mut to: OwnedWriteHalf) {
        let mut buffer = [0; 4096];
        while let Ok(1..) = async {
            let read = from.read(&mut buffer).await?;
            self.thawed().await;
            to.write_all(&buffer[..read]).await.map(|()| read)
        }
        .await
        {}
    }

    async fn thawed(&self) -> State {
        self.state.subscribe().wait_for(|state| !state.is_frozen).await.unwrap().clone()
    }
}

async fn answer(mut client: TcpStream, reply: &str) {
    let mut buffer = [0; 4096];
    while let Ok(read @ 1..) = client.read(&mut buffer).await {
        // No argument of these commands has a line that begins so.
        let commands = buffer[..read].split(|byte| *byte == b'\n').filter(|line| line.starts_with(b"*"));
        let replies = format!("{reply}\r\n").repeat(commands.count());
        if client.write_all(replies.as_bytes()).await.is_err() {
            return;
        }
    }
}
