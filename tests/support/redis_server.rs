//! A Redis server of the test's own, on a free port of loopback; it ends with this.
#![allow(dead_code, unreachable_pub)]

use std::{
    io::ErrorKind,
    net::{Ipv4Addr, TcpListener},
    process::{Child, Command, Stdio},
    time::Duration,
};

use redis::FromRedisValue;

pub struct RedisServer {
    server: Child,
    pub port: u16,
    options: Vec<String>,
}

impl RedisServer {
    pub async fn start() -> Self {
        Self::with(&[]).await
    }

    pub async fn with(options: &[&str]) -> Self {
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
        let options: Vec<_> = options.iter().map(|option| (*option).to_owned()).collect();
        let server = Self { server: spawn(port, &options), port, options };
        server.answers().await;
        server
    }

    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// Ends it, with all that it keeps.
    pub fn kill(&mut self) {
        self.server.kill().unwrap();
        self.server.wait().unwrap();
    }

    pub async fn restart(&mut self) {
        self.server = spawn(self.port, &self.options);
        self.answers().await;
    }

    async fn answers(&self) {
        let client = redis::Client::open(self.url()).unwrap();
        for _ in 0..1000 {
            if client.get_multiplexed_async_connection().await.is_ok() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("redis-server does not answer on port {}", self.port);
    }

    /// Runs one command, such as `CONFIG GET port`.
    pub async fn run<T: FromRedisValue>(&self, command: &[&str]) -> T {
        let client = redis::Client::open(self.url()).unwrap();
        // Of a server that is paused, too.
        let config = redis::AsyncConnectionConfig::new()
            .set_connection_timeout(Some(Duration::from_secs(30)))
            .set_response_timeout(Some(Duration::from_secs(30)));
        let mut connection = client.get_multiplexed_async_connection_with_config(&config).await.unwrap();
        let mut cmd = redis::cmd(command[0]);
        cmd.arg(&command[1..]);
        cmd.query_async(&mut connection).await.unwrap()
    }
}

fn spawn(port: u16, options: &[String]) -> Child {
    let spawned = Command::new("redis-server")
        .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])
        .args(["--dir", std::env::temp_dir().to_str().unwrap(), "--enable-debug-command", "yes"])
        .args(options)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    match spawned {
        Ok(server) => server,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            panic!("these tests need redis-server on the PATH: apt-get install redis-server")
        }
        Err(error) => panic!("redis-server does not start: {error}"),
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}
