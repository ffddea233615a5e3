//! Runs the test server as a program, for clients in any language.
//!
//! ```text
//! cargo run --example auth_server -- --port 0 --token-lifetime 5 --grace 30
//! ```
//!
//! It prints its address, its API key, and what an OAuth 2.0 client needs: the token endpoint, the client's ID and secret,
//! and the refresh token of a login. The base URL of api.video's own clients is the printed address, without a slash at its
//! end. `.ci/api_video_clients` runs those for Python and Node against it.
//!
//! Then it prints a line for each request that has ended: the method, the path without the query, and the status, or `lost`
//! if there was no response. It prints its counters and ends on Ctrl-C.
//!
//! # Commands
//!
//! Each line of standard input is a command. The end of standard input does not end the program. A shell suspends a
//! program in the background that reads from its terminal: start it with `</dev/null &`.
//!
//! | command | what it does |
//! |---|---|
//! | `revoke` | revokes all access tokens: requests with one get a 401 |
//! | `logout` | ends all logins: their refresh tokens are invalid |
//! | `login` | prints the refresh token of a new login |
//! | `fault ROUTE KIND` | injects a fault into the next request to a route |
//! | `fault ROUTE KIND always` | injects a fault into every request to a route |
//! | `clear` | removes all faults |
//! | `counters` | prints the number of calls of each kind |
//! | `help` | prints the commands |
//!
//! | `ROUTE` | requests |
//! |---|---|
//! | `api-key` | `POST /auth/api-key` |
//! | `refresh` | `POST /auth/refresh` |
//! | `token` | `POST /oauth/token` |
//! | `metadata` | `GET /.well-known/oauth-authorization-server` |
//! | `api` | all others |
//!
//! | `KIND` | fault |
//! |---|---|
//! | a status, such as `503` | responds with this status, and does not process the request |
//! | `delay=MS` | waits for this many milliseconds, then processes the request |
//! | `hang` | never responds |
//! | `reset` | resets the connection, and does not process the request |
//! | `lose` | processes the request, then resets the connection: the response is lost |
//! | `truncate` | processes the request, then breaks the connection in the middle of the response |
//! | `drip=MS` | sends the response one byte at a time, with this many milliseconds before each |

use std::{
    io::{self, Write},
    process::ExitCode,
    thread,
    time::Duration,
};

use http::StatusCode;
use tokio::sync::mpsc;
use tower_bearer::BoxError;
use tower_bearer_testing::{AuthServer, Fault, RequestRecord, Route};

const USAGE: &str = "usage: auth_server [--port PORT] [--token-lifetime SECONDS] [--grace SECONDS] \
                     [--api-key KEY] [--tls]";

const HELP: &str = "\
revoke                      revoke all access tokens
logout                      end all logins
login                       print the refresh token of a new login
fault ROUTE KIND [always]   inject a fault into the next request to ROUTE, or into all
                            ROUTE: api-key, refresh, authorize, token, metadata, api
                            KIND: a status, delay=MS, hang, reset, lose, truncate, drip=MS
clear                       remove all faults
counters                    print the number of calls of each kind
help                        print the commands";

#[tokio::main]
async fn main() -> Result<ExitCode, BoxError> {
    let mut server = AuthServer::builder().on_request_end(log);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        if argument == "--tls" {
            server = server.tls(true);
            continue;
        }
        let Some(value) = arguments.next() else {
            eprintln!("{USAGE}");
            return Ok(ExitCode::from(2));
        };
        server = match argument.as_str() {
            "--port" => server.port(value.parse()?),
            "--token-lifetime" => server.token_lifetime(Duration::try_from_secs_f64(value.parse()?)?),
            // As many servers have, for a response that was lost.
            "--grace" => server.refresh_token_grace(Duration::try_from_secs_f64(value.parse()?)?),
            "--api-key" => server.api_key(value),
            _ => {
                eprintln!("{USAGE}");
                return Ok(ExitCode::from(2));
            }
        };
    }
    let server = server.start().await?;
    println!("listening on {}", server.issuer());
    println!("API key      {}", server.api_key());
    println!("OAuth 2.0    {}", server.token_endpoint());
    println!("client ID    {}", server.client_id());
    println!("secret       {}", server.client_secret());
    println!("login        {}", server.log_in());
    println!("commands     type help");

    let mut commands = standard_input();
    let stopped = tokio::signal::ctrl_c();
    tokio::pin!(stopped);
    loop {
        tokio::select! {
            result = &mut stopped => {
                result?;
                say(&format!("{:#?}", server.counters()));
                return Ok(ExitCode::SUCCESS);
            }
            // None, and disabled for this turn, at the end of standard input.
            Some(line) = commands.recv() => say(&run(&server, line.trim()).unwrap_or_else(|error| error)),
        }
    }
}

/// Returns the lines of standard input. A thread reads them: the program does not wait for it when it ends.
fn standard_input() -> mpsc::UnboundedReceiver<String> {
    let (sender, lines) = mpsc::unbounded_channel();
    thread::spawn(move || {
        let lines = io::stdin().lines().map_while(Result::ok);
        for line in lines.filter(|line| !line.trim().is_empty()) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    lines
}

/// Runs a command. Returns what to print.
fn run(server: &AuthServer, line: &str) -> Result<String, String> {
    let words: Vec<_> = line.split_whitespace().collect();
    Ok(match words[..] {
        ["revoke"] => {
            server.revoke_access_tokens();
            "all access tokens are revoked".to_owned()
        }
        ["logout"] => {
            server.revoke_logins();
            "all logins have ended".to_owned()
        }
        ["login"] => format!("login        {}", server.log_in()),
        ["fault", route_name, kind] => {
            server.inject(route(route_name)?, fault(kind)?);
            format!("{kind} at the next request to {route_name}")
        }
        ["fault", route_name, kind, "always"] => {
            server.inject_always(route(route_name)?, fault(kind)?);
            format!("{kind} at every request to {route_name}")
        }
        ["clear"] => {
            server.clear_faults();
            "all faults are removed".to_owned()
        }
        ["counters"] => format!("{:#?}", server.counters()),
        ["help"] => HELP.to_owned(),
        _ => return Err(format!("unknown command: {line}; `help` lists the commands")),
    })
}

fn route(name: &str) -> Result<Route, String> {
    Ok(match name {
        "api-key" => Route::ApiKeyGrant,
        "refresh" => Route::RefreshGrant,
        "token" => Route::OAuthToken,
        "authorize" => Route::OAuthAuthorization,
        "metadata" => Route::Metadata,
        "api" => Route::Api,
        _ => {
            return Err(format!(
                "ROUTE must be api-key, refresh, authorize, token, metadata or api, got {name}"
            ));
        }
    })
}

fn fault(kind: &str) -> Result<Fault, String> {
    let (name, value) = kind.split_once('=').unzip();
    let duration = value.and_then(|value| value.parse().ok()).map(Duration::from_millis);
    let status = kind.parse::<StatusCode>().ok().filter(|status| !status.is_informational());
    Ok(match (name.unwrap_or(kind), duration) {
        ("delay", Some(duration)) => Fault::Delay(duration),
        ("drip", Some(pause)) => Fault::Drip(pause),
        ("hang", None) => Fault::Hang,
        ("reset", None) => Fault::Reset,
        ("lose", None) => Fault::LoseAnswer,
        ("truncate", None) => Fault::Truncate,
        _ => Fault::Status(status.ok_or_else(|| {
            let kinds = "a status from 200 to 999, delay=MS, hang, reset, lose, truncate or drip=MS";
            format!("KIND must be {kinds}, got {kind}")
        })?),
    })
}

fn log(request: &RequestRecord) {
    let status = request.status.map_or_else(|| "lost".to_owned(), |status| status.as_u16().to_string());
    say(&format!("{} {} {status}", request.method, request.path));
}

/// Prints a text and a new line. If nobody reads it, the server continues.
fn say(text: &str) {
    let _ = writeln!(io::stdout(), "{text}");
}
