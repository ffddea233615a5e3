//! Worker processes that share a store. Each is this test's own program, started again with environment variables.
#![allow(dead_code, unreachable_pub)]

use std::{env, path::PathBuf, process::Stdio, time::Duration};

use bytes::Bytes;
use http::Request;
use http_body_util::Empty;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
};
use tower::{Layer, ServiceExt};
use tower_bearer::{
    ApiVideo, BearerAuthLayer, TokenProvider, TokenProviderBuilder, TokenSource,
    store::{Lease, TokenStore},
};
use tower_bearer_testing::AuthServer;

const STORE: &str = "TEST_STORE";
const SERVER: &str = "TEST_SERVER";
const CREDENTIAL: &str = "TEST_CREDENTIAL";

/// A worker process. It runs one command per line of its standard input.
pub struct Process {
    pub child: Child,
    stdin: ChildStdin,
    stdout: Lines<BufReader<ChildStdout>>,
}

impl Process {
    /// Starts a process that shares `store`. `test` is the test that calls [`work`].
    pub fn start(test: &str, store: &str, server: &AuthServer) -> Self {
        Self::start_with(test, store, server, &server.api_key())
    }

    /// Starts a process that shares `store`, with more environment variables.
    pub fn start_in(test: &str, store: &str, server: &AuthServer, environment: &[(&str, &PathBuf)]) -> Self {
        Self::spawn(test, store, server, &server.api_key(), environment)
    }

    /// Starts a process that shares `store`, and gets its tokens with this credential.
    pub fn start_with(test: &str, store: &str, server: &AuthServer, credential: &str) -> Self {
        Self::spawn(test, store, server, credential, &[])
    }

    fn spawn(
        test: &str,
        store: &str,
        server: &AuthServer,
        credential: &str,
        environment: &[(&str, &PathBuf)],
    ) -> Self {
        // Ignoring XFSZ makes a write past the file size limit an error, as on a full disk, instead of a fatal signal.
        let mut child = Command::new("sh")
            .args(["-c", r#"trap "" XFSZ; exec "$0" "$@""#])
            .arg(env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture", "--test-threads", "1"])
            .envs([(STORE, store), (SERVER, &server.uri().to_string()), (CREDENTIAL, credential)])
            .envs(environment.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let (stdin, stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        Self { child, stdin, stdout: BufReader::new(stdout).lines() }
    }

    pub async fn send(&mut self, line: &str) {
        self.stdin.write_all(format!("{line}\n").as_bytes()).await.unwrap();
    }

    /// Returns its next response.
    pub async fn response(&mut self) -> String {
        loop {
            let line = self.stdout.next_line().await.unwrap().expect("the process has ended");
            // The test harness may print on the same line.
            if let Some((_, response)) = line.split_once("> ") {
                return response.to_owned();
            }
        }
    }

    /// Makes it send a request. Returns the status of the response.
    pub async fn request(&mut self) -> String {
        self.send("request").await;
        self.response().await
    }
}

/// Runs a worker process. Returns at once if the environment does not name a store.
pub fn work<S: TokenStore>(open: impl FnOnce(&str) -> S) {
    work_with(open, |server, key| ApiVideo::new(key).base_url(server.parse().unwrap()), |builder, _| builder);
}

/// As [`work`], with the source for the server's URL and the credential, and with options for the provider.
pub fn work_with<S: TokenStore, T: TokenSource>(
    open: impl FnOnce(&str) -> S,
    source: impl FnOnce(&str, &str) -> T,
    options: impl FnOnce(TokenProviderBuilder<T>, &str) -> TokenProviderBuilder<T>,
) {
    let (Ok(store), Ok(server), Ok(credential)) = (env::var(STORE), env::var(SERVER), env::var(CREDENTIAL))
    else {
        return;
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let store = std::sync::Arc::new(open(&store));
        let provider =
            TokenProvider::builder(source(&server, &credential)).store(std::sync::Arc::clone(&store));
        let provider = options(provider, &credential).build().unwrap();
        let client = Client::builder(TokioExecutor::new()).build_http();
        let service = BearerAuthLayer::with_provider(provider.clone()).layer(client);
        let mut lines = BufReader::new(tokio::io::stdin()).lines();
        let mut leases: Vec<Lease> = Vec::new();
        while let Some(line) = lines.next_line().await.unwrap() {
            match &*line {
                "request" => {
                    let request =
                        Request::get(format!("{server}videos")).body(Empty::<Bytes>::new()).unwrap();
                    match service.clone().oneshot(request).await {
                        Ok(response) => println!("> {}", response.status().as_u16()),
                        Err(error) => println!("> {error}"),
                    }
                }
                "refresh" => {
                    provider.invalidate();
                    match provider.token().await {
                        Ok(_) => println!("> 200"),
                        Err(error) => println!("> {error}"),
                    }
                }
                "lease" => {
                    let lease = store.lease(Duration::from_secs(60)).await.unwrap();
                    println!("> {}", if lease.is_some() { "leased" } else { "taken" });
                    leases.extend(lease);
                }
                other => panic!("unknown command: {other}"),
            }
        }
    });
}

/// Four processes start at once, then find their token revoked, then their token and their refresh token.
pub async fn four_processes_share_one_token(test: &str, store: &str) {
    let server = AuthServer::start().await.unwrap();
    let mut processes: Vec<_> = (0..4).map(|_| Process::start(test, store, &server)).collect();
    for (round, (refreshes, rejected, authentications)) in
        [(0, 0, 1), (1, 0, 1), (1, 1, 2)].into_iter().enumerate()
    {
        match round {
            0 => {}
            1 => server.revoke_access_tokens(),
            _ => {
                server.revoke_access_tokens();
                server.revoke_refresh_token();
            }
        }
        for process in &mut processes {
            process.send("request").await;
        }
        for process in &mut processes {
            assert_eq!(process.response().await, "200");
        }
        let counters = server.counters();
        assert_eq!(
            (counters.refresh_grants, counters.rejected_refresh_tokens, counters.api_key_grants),
            (refreshes, rejected, authentications),
            "round {round}"
        );
        // A second revocation within the cool-down of the first would look like an API that rejects every token.
        tokio::time::sleep(Duration::from_millis(1100)).await;
    }
}
