//! Four grants of OAuth 2.0, and what happens to a user's login, against the crate's test server on loopback.
//!
//! ```text
//! cargo run --example oauth2
//! ```

use std::{process::ExitCode, time::Duration};

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::Empty;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tokio::task::JoinSet;
use tower::{Layer, ServiceExt};
use tower_bearer::{
    BearerAuthLayer, BoxError, OAuth2, TokenProvider,
    oauth2::{Assertion, ClientAuth, Server, SigningKey},
};
use tower_bearer_testing::{AuthServer, Fault, Route};

const REQUESTS: usize = 200;

#[tokio::main]
async fn main() -> Result<ExitCode, BoxError> {
    let server = AuthServer::builder().refresh_token_grace(Duration::from_secs(30)).start().await?;
    println!("authorization server and API: {}", server.issuer());
    println!(
        "{REQUESTS} concurrent requests with each grant, and {REQUESTS} more after their token is revoked\n"
    );
    println!("{:<20} {:>8} {:>8} {:>15}", "grant", "HTTP 200", "HTTP 401", "token requests");

    let issuer = || Server::issuer(server.issuer());
    let client = || ClientAuth::basic(server.client_id(), server.client_secret());
    let key = || SigningKey::es256(&server.signing_key());
    let assertion = || Assertion::new(key()).issuer("app").subject("user").audience(server.issuer());
    let mut is_as_promised = true;
    for (name, source) in [
        ("client credentials", OAuth2::client_credentials(issuer(), client()).scopes(["videos:read"])),
        (
            "private_key_jwt",
            OAuth2::client_credentials(issuer(), ClientAuth::private_key_jwt(server.client_id(), key())),
        ),
        ("login", OAuth2::login(issuer(), client())),
        ("token exchange", OAuth2::token_exchange(issuer(), client(), assertion())),
        ("JWT bearer", OAuth2::jwt_bearer(issuer(), ClientAuth::none(), assertion())),
    ] {
        let before = token_requests(&server);
        let builder = TokenProvider::builder(source);
        let builder = if name == "login" { builder.login(server.log_in()) } else { builder };
        let provider = builder.build()?;
        let mut answers = requests(&server, &provider).await?;
        server.revoke_access_tokens();
        answers.extend(requests(&server, &provider).await?);
        let count = |status: StatusCode| answers.iter().filter(|answer| **answer == status).count();
        let (accepted, rejected) = (count(StatusCode::OK), count(StatusCode::UNAUTHORIZED));
        let asked = token_requests(&server) - before;
        println!("{name:<20} {accepted:>8} {rejected:>8} {asked:>15}");
        is_as_promised &= accepted == 2 * REQUESTS && asked == 2;
    }

    println!("\nThe login, whose refresh token is spent by each use:");
    let provider =
        TokenProvider::builder(OAuth2::login(issuer(), client())).login(server.log_in()).build()?;
    let token = provider.token().await?;
    server.inject(Route::OAuthToken, Fault::LoseAnswer);
    provider.refresh(&token).await?;
    println!(
        "- a response was lost: the refresh token was presented once more, within the grace of the server"
    );

    server.revoke_logins();
    provider.invalidate();
    let error = provider.token().await.err();
    println!("- the login was revoked: {}", error.map(|error| error.to_string()).unwrap_or_default());

    provider.log_in(server.log_in());
    let statuses = requests(&server, &provider).await?;
    println!("- a user has logged in: {} of {REQUESTS} requests answered 200", statuses.len());
    is_as_promised &= statuses.iter().all(|status| *status == StatusCode::OK);
    is_as_promised &= server.counters().reused_refresh_tokens == 0;
    Ok(if is_as_promised { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Sends requests at once, and returns their status.
async fn requests(server: &AuthServer, provider: &TokenProvider) -> Result<Vec<StatusCode>, BoxError> {
    let client = Client::builder(TokioExecutor::new()).http2_only(true).build_http();
    let client = BearerAuthLayer::with_provider(provider.clone()).layer(client);
    let mut sent = JoinSet::new();
    for _ in 0..REQUESTS {
        let request = Request::get(format!("{}videos", server.uri())).body(Empty::<Bytes>::new())?;
        sent.spawn(client.clone().oneshot(request));
    }
    sent.join_all().await.into_iter().map(|response| Ok(response?.status())).collect()
}

fn token_requests(server: &AuthServer) -> u64 {
    let counters = server.counters();
    counters.client_credentials_grants
        + counters.oauth_refresh_grants
        + counters.token_exchanges
        + counters.jwt_bearer_grants
        + counters.rejected_clients
        + counters.rejected_oauth_grants
}
