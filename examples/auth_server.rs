//! Runs the test server as a program, for clients in any language.
//!
//! ```text
//! cargo run --example auth_server -- --port 0 --token-lifetime 5
//! ```
//!
//! `.ci/api_video_clients` runs api.video's own clients for Python and Node against it. Their base URL is the address that
//! this program prints, without a slash at its end.
//!
//! It prints its address, its API key, and what an OAuth 2.0 client needs: the token endpoint, the client's ID and secret,
//! and the refresh token of a login. It ends with its counters on Ctrl-C.

use std::{process::ExitCode, time::Duration};

use tower_bearer::BoxError;
use tower_bearer_testing::AuthServer;

const USAGE: &str = "usage: auth_server [--port PORT] [--token-lifetime SECONDS] [--api-key KEY] [--tls]";

#[tokio::main]
async fn main() -> Result<ExitCode, BoxError> {
    let mut server = AuthServer::builder();
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
    tokio::signal::ctrl_c().await?;
    println!("{:#?}", server.counters());
    Ok(ExitCode::SUCCESS)
}
