//! [`Server`]: an authorization server that others wrote, in a process of its own.

use std::{
    io::{Error, ErrorKind},
    net::{Ipv4Addr, TcpListener},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use serde_json::Value;
use tokio::{
    net::TcpStream,
    process::{Child, Command},
    time::{sleep, timeout},
};
use tower_bearer::{BoxError, oauth2::ClientAuth};

/// The lifetime of its access tokens, in seconds.
const LIFETIME: u64 = 2;

/// How long a server with a grace period accepts a spent refresh token, in seconds.
const GRACE: u64 = 30;

/// The servers, and what differs between them.
pub struct Kind {
    pub name: &'static str,
    /// The file in `interop/servers` that runs it.
    file: &'static str,
    pub has_grace: bool,
    token_endpoint: &'static str,
    secret: Option<&'static str>,
    login: Login,
}

/// How a user logs in.
enum Login {
    /// By the password grant (RFC 6749 §4.3), with these parameters.
    Password(&'static [(&'static str, &'static str)]),
    /// By this path, which returns a refresh token.
    Path(&'static str),
}

const USER: Login = Login::Password(&[("username", "user"), ("password", "password")]);
const ADMIN: Login =
    Login::Password(&[("username", "admin"), ("password", "password"), ("scope", "g_profile")]);

pub static SERVERS: [Kind; 4] = [
    Kind {
        name: "oidc-provider",
        file: "oidc_provider.mjs",
        has_grace: true,
        token_endpoint: "/token",
        secret: None,
        login: Login::Path("/test/login?client_id=app"),
    },
    Kind {
        name: "django-oauth-toolkit",
        file: "django_toolkit.py",
        has_grace: true,
        token_endpoint: "/token",
        secret: Some("secret"),
        login: USER,
    },
    Kind {
        name: "@node-oauth/oauth2-server",
        file: "node_oauth.mjs",
        has_grace: false,
        token_endpoint: "/token",
        secret: Some("secret"),
        login: USER,
    },
    Kind {
        name: "glewlwyd",
        file: "glewlwyd.py",
        has_grace: false,
        token_endpoint: "/api/oidc/token",
        secret: Some("secret"),
        login: ADMIN,
    },
];

impl Kind {
    pub fn find(name: &str) -> Option<&'static Self> {
        SERVERS.iter().find(|kind| kind.name == name)
    }

    pub fn client_auth(&self) -> ClientAuth {
        match self.secret {
            Some(secret) => ClientAuth::basic("app", secret),
            None => ClientAuth::public("app"),
        }
    }
}

/// A running server. It ends when this is dropped.
pub struct Server {
    kind: &'static Kind,
    command: Vec<String>,
    port: u16,
    process: Child,
    client: reqwest::Client,
}

impl Server {
    pub async fn start(kind: &'static Kind, has_grace: bool, folder: &Path) -> Result<Self, BoxError> {
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        let program = if kind.file.ends_with(".mjs") { "node".into() } else { python() };
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("servers").join(kind.file);
        let grace = if has_grace { GRACE } else { 0 };
        let paths = [program, file, port.to_string().into(), folder.into()];
        let mut command = paths.map(|path| path.display().to_string()).to_vec();
        command.extend([LIFETIME.to_string(), grace.to_string()]);
        let client = reqwest::Client::builder().no_proxy().pool_max_idle_per_host(0).build()?;
        let server = Self { kind, process: spawn(&command)?, command, port, client };
        server.is_ready().await?;
        Ok(server)
    }

    pub fn token_endpoint(&self) -> String {
        format!("http://127.0.0.1:{}{}", self.port, self.kind.token_endpoint)
    }

    /// Kills the server, and starts it again. What it has written stays.
    pub async fn restart(&mut self) -> Result<(), BoxError> {
        self.process.kill().await?;
        self.process = spawn(&self.command)?;
        self.is_ready().await
    }

    async fn is_ready(&self) -> Result<(), BoxError> {
        let connected = async {
            while TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).await.is_err() {
                sleep(Duration::from_millis(20)).await;
            }
        };
        let waited = timeout(Duration::from_secs(60), connected).await;
        waited.map_err(|_| format!("{:?} does not start", self.command).into())
    }

    /// Logs a user in. Returns the first refresh token.
    pub async fn log_in(&self) -> Result<String, BoxError> {
        let token = match self.kind.login {
            Login::Path(path) => {
                let url = format!("http://127.0.0.1:{}{path}", self.port);
                self.client.get(url).send().await?.error_for_status()?.json::<Value>().await?
            }
            Login::Password(parameters) => {
                let form = [("grant_type", "password")].into_iter().chain(parameters.iter().copied());
                let form: String = form.map(|(name, value)| format!("{name}={value}&")).collect();
                let request = self.client.post(self.token_endpoint()).basic_auth("app", self.kind.secret);
                let request = request.header("content-type", "application/x-www-form-urlencoded").body(form);
                request.send().await?.error_for_status()?.json::<Value>().await?["refresh_token"].take()
            }
        };
        Ok(token.as_str().ok_or("the login has no refresh token")?.to_owned())
    }
}

/// The Python that has the servers' packages.
fn python() -> PathBuf {
    std::env::var_os("FOREIGN_SERVERS_PYTHON").map_or_else(|| "python3".into(), PathBuf::from)
}

fn spawn(command: &[String]) -> Result<Child, BoxError> {
    let spawned = Command::new(&command[0])
        .args(&command[1..])
        // Some end when this pipe is closed, even if this process is killed.
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn();
    Ok(spawned.map_err(|error| match error.kind() {
        ErrorKind::NotFound => Error::other(format!("{} is not installed", command[0])),
        _ => error,
    })?)
}
