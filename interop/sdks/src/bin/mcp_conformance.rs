//! A client for MCP's conformance suite: the client of the page `guide::mcp`, with a source for each scenario.
//!
//! ```text
//! bash .ci/mcp_conformance
//! ```
//!
//! The suite starts this program with the URL of an MCP server, and says in the environment which scenario it is and which
//! credentials there are.

use std::{collections::HashMap, env, io, sync::Arc};

use futures_core::stream::BoxStream;
use http::{HeaderName, HeaderValue};
use reqwest::redirect::Policy;
use rmcp::{
    ServiceExt,
    model::ClientJsonRpcMessage,
    transport::streamable_http_client::{
        SseError, StreamableHttpClient, StreamableHttpClientTransport, StreamableHttpClientTransportConfig,
        StreamableHttpError, StreamableHttpPostResponse,
    },
};
use serde_json::Value;
use sse_stream::Sse;
use tower_bearer::{
    BoxError, OAuth2, StaticToken, Token, TokenProvider,
    challenge::Challenge,
    oauth2::{ClientAuth, Server, SigningKey},
};

include!("../mcp_client.rs");

type BoxResult<T> = std::result::Result<T, BoxError>;

/// What an MCP server says of itself (RFC 9728).
struct Resource {
    issuer: String,
    url: String,
    scopes: Vec<String>,
}

/// Asks an MCP server without a token, and reads the metadata that its challenge names.
async fn discover(client: &reqwest::Client, mcp: &str) -> BoxResult<Resource> {
    let response = client.post(mcp).send().await?;
    let challenge = Challenge::from_headers(response.headers()).ok_or("the server does not challenge")?;
    let metadata = challenge.parameter("resource_metadata").ok_or("the challenge names no metadata")?;
    let metadata: Value = client.get(metadata).send().await?.error_for_status()?.json().await?;
    let scopes = challenge.scope().unwrap_or_default().split_ascii_whitespace();
    Ok(Resource {
        issuer: text(&metadata["authorization_servers"][0])?,
        url: text(&metadata["resource"])?,
        scopes: scopes.map(str::to_owned).collect(),
    })
}

fn text(value: &Value) -> BoxResult<String> {
    Ok(value.as_str().ok_or("the JSON lacks a text")?.to_owned())
}

/// The source for a scenario. The context has the credentials.
fn source(scenario: &str, context: &Value, resource: Resource) -> BoxResult<OAuth2> {
    let Resource { issuer, url, scopes } = resource;
    let of = |name: &str| text(&context[name]);
    let server = Server::issuer(&issuer);
    let source = match scenario {
        "auth/client-credentials-basic" => {
            OAuth2::client_credentials(server, ClientAuth::basic(of("client_id")?, of("client_secret")?))
        }
        "auth/client-credentials-jwt" => {
            let key = SigningKey::es256(&of("private_key_pem")?);
            // The suite takes the issuer as the audience (draft-ietf-oauth-rfc7523bis §4).
            let client = ClientAuth::private_key_jwt(of("client_id")?, key);
            OAuth2::client_credentials(server, client.assertion(|jwt| jwt.audience(issuer)))
        }
        "auth/wif-jwt-bearer" => {
            let client = ClientAuth::public(of("client_id")?);
            OAuth2::jwt_bearer(server, client, StaticToken::new(of("valid_jwt")?))
        }
        "auth/enterprise-managed-authorization" => {
            let idp = Server::token_endpoint(of("idp_token_endpoint")?);
            let subject = StaticToken::new(of("idp_id_token")?);
            let grant = OAuth2::token_exchange(idp, ClientAuth::public(of("idp_client_id")?), subject)
                .subject_token_type("urn:ietf:params:oauth:token-type:id_token")
                .parameter("requested_token_type", "urn:ietf:params:oauth:token-type:id-jag")
                .audience(issuer)
                .resources([&url]);
            OAuth2::jwt_bearer(server, ClientAuth::basic(of("client_id")?, of("client_secret")?), grant)
        }
        _ => return Err(format!("{scenario} is not one of this client's").into()),
    };
    Ok(source.resources([url]).scopes(scopes))
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> BoxResult<()> {
    tower_bearer_sdks::install_cryptography();
    let mcp = env::args().nth(1).ok_or("usage: mcp_conformance URL")?;
    let scenario = env::var("MCP_CONFORMANCE_SCENARIO")?;
    let context = serde_json::from_str(&env::var("MCP_CONFORMANCE_CONTEXT")?)?;
    let client =
        reqwest::Client::builder().redirect(Policy::none()).pool_max_idle_per_host(0).no_proxy().build()?;
    let source = source(&scenario, &context, discover(&client, &mcp).await?)?;
    let client = WithToken { client, provider: TokenProvider::builder(source).build()? };
    let config = StreamableHttpClientTransportConfig::with_uri(mcp);
    let server = ().serve(StreamableHttpClientTransport::with_client(client, config)).await?;
    for tool in server.list_all_tools().await? {
        println!("{}", tool.name);
    }
    server.cancel().await?;
    Ok(())
}
