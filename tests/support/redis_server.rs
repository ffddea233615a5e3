//! A Redis server for one test, on a free loopback port. Dropping it ends the server.
#![allow(dead_code, unreachable_pub)]

use std::{
    io::ErrorKind,
    net::{Ipv4Addr, TcpListener},
    process::{Child, Command, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};

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
        server.wait_until_ready().await;
        server
    }

    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// Kills the server, which loses all its data.
    pub fn kill(&mut self) {
        self.server.kill().unwrap();
        self.server.wait().unwrap();
    }

    /// Suspends the server until [`resume`](Self::resume).
    pub fn stop(&self) {
        self.signal(Signal::STOP);
    }

    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.server), signal).unwrap();
    }

    pub async fn restart(&mut self) {
        self.server = spawn(self.port, &self.options);
        self.wait_until_ready().await;
    }

    async fn wait_until_ready(&self) {
        for _ in 0..1000 {
            if self.cli(&["PING"]).await == "PONG" {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("redis-server does not answer on port {}", self.port);
    }

    /// Runs one command, such as `CONFIG GET port`. Returns the response as `redis-cli` prints it.
    pub async fn run(&self, command: &[&str]) -> String {
        let answer = self.cli(command).await;
        // Redis' errors begin with a code in capital letters.
        let code = answer.split(' ').next().unwrap_or_default();
        let is_error =
            code.len() > 2 && code.bytes().all(|byte| byte.is_ascii_uppercase()) && answer.len() > code.len();
        assert!(!is_error, "{command:?}: {answer}");
        answer
    }

    pub async fn cli(&self, command: &[&str]) -> String {
        let output = tokio::process::Command::new("redis-cli")
            .args(["-h", "127.0.0.1", "-p", &self.port.to_string()])
            .args(command)
            .output()
            .await
            .expect("redis-cli comes with redis-server");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }
}

fn spawn(port: u16, options: &[String]) -> Child {
    let spawned = Command::new("redis-server")
        .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])
        .args(["--dir", std::env::temp_dir().to_str().unwrap(), "--enable-debug-command", "yes"])
        // A replica writes this file, and another server would load it when it starts.
        .args(["--dbfilename", &dump(port), "--repl-diskless-sync-delay", "0"])
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

fn dump(port: u16) -> String {
    format!("tower-bearer-{}-{port}.rdb", std::process::id())
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
        let _ = std::fs::remove_file(std::env::temp_dir().join(dump(self.port)));
    }
}
