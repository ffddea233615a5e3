//! [`Server`]: the authorization server: the URL of its token endpoint, or its issuer, whose metadata has that URL.

use std::{fmt, sync::Arc, time::Duration};

use http::{Request, StatusCode, Uri, header::ACCEPT};
use serde::Deserialize;
use tokio::sync::OnceCell;

use super::super::http::{Client, Sent, check_url, without_byte_order_mark};
use crate::error::{SourceError, SourceErrorKind};

/// The option that allows plaintext.
const ALLOW: &str = "Server::allow_plaintext";

/// An authorization server (RFC 6749 §1.1): the URL of its token endpoint, or its issuer.
///
/// `Debug` shows the URL without its query.
#[derive(Clone)]
pub struct Server {
    /// The token endpoint or the issuer.
    url: String,
    is_issuer: bool,
    plaintext_anywhere: bool,
    /// The token endpoint of the issuer's metadata. Clones share it.
    discovered: Arc<OnceCell<Uri>>,
}

impl Server {
    /// Makes a server from the URL of its token endpoint (RFC 6749 §3.2).
    ///
    /// The URL is `https`, or `http` on loopback. It may have a query, but no user name. A URL that is not valid is an
    /// error of [`TokenProviderBuilder::build`](crate::TokenProviderBuilder::build), or else of the first use.
    pub fn token_endpoint(url: impl Into<String>) -> Self {
        Self { url: url.into(), is_issuer: false, plaintext_anywhere: false, discovered: Arc::default() }
    }

    /// Makes a server from its issuer identifier, such as `https://login.example.com/tenant`.
    ///
    /// The first use fetches the metadata: RFC 8414 (`/.well-known/oauth-authorization-server`), or else OpenID Connect
    /// Discovery (`/.well-known/openid-configuration`). The `issuer` in it must be exactly this one, a slash at its end
    /// included (RFC 8414 §3.3). Clones share the metadata. A failure is not remembered.
    ///
    /// The rules for the URL are those of [`token_endpoint`](Self::token_endpoint), but it has no query. They hold for
    /// the token endpoint in the metadata, too.
    pub fn issuer(url: impl Into<String>) -> Self {
        Self { is_issuer: true, ..Self::token_endpoint(url) }
    }

    /// Allows plaintext `http` for any host. Default: on loopback only.
    ///
    /// Anyone on the network path can then read the credential. Meant for meshes whose sidecar does the TLS.
    pub fn allow_plaintext(mut self) -> Self {
        self.plaintext_anywhere = true;
        // What a clone has discovered by the stricter rule may differ.
        self.discovered = Arc::default();
        self
    }

    /// Returns the issuer, if the server was made from it.
    #[cfg(feature = "oauth2-jwt")]
    pub(super) fn issuer_identifier(&self) -> Option<&str> {
        self.is_issuer.then_some(self.url.as_str())
    }

    /// Returns the checked URL that the server was made from.
    ///
    /// # Errors
    ///
    /// [`SourceError::configuration`] if it is not valid.
    pub(super) fn checked_url(&self) -> Result<Uri, SourceError> {
        let option = if self.is_issuer { "the issuer" } else { "the token endpoint" };
        // Without the parser's error: its text is no help, and the URL may have a secret.
        let url: Uri = (self.url.parse()).map_err(|_| {
            SourceError::configuration(format!(
                "{option} must be a valid URL, such as https://login.example.com"
            ))
        })?;
        if self.url.contains('#') || (self.is_issuer && url.query().is_some()) {
            let parts = if self.is_issuer { "a query or a fragment" } else { "a fragment" };
            return Err(SourceError::configuration(format!("{option} must not have {parts}")));
        }
        check_url(&url, option, ALLOW, self.plaintext_anywhere)?;
        Ok(url)
    }

    /// Returns the URL of the token endpoint. The first call of an issuer fetches the metadata.
    pub(super) async fn endpoint(&self, client: &Client, limit: Duration) -> Result<Uri, SourceError> {
        let url = self.checked_url()?;
        if !self.is_issuer {
            return Ok(url);
        }
        self.discovered.get_or_try_init(|| self.discover(&url, client, limit)).await.cloned()
    }

    async fn discover(&self, issuer: &Uri, client: &Client, limit: Duration) -> Result<Uri, SourceError> {
        let path = issuer.path().trim_end_matches('/');
        // RFC 8414 §3.1 inserts the path after the well-known one, OpenID Connect Discovery 1.0 §4.1 appends it.
        let first =
            self.fetch(issuer, format!("/.well-known/oauth-authorization-server{path}"), client, limit);
        if let Some(endpoint) = first.await? {
            return Ok(endpoint);
        }
        let second = self.fetch(issuer, format!("{path}/.well-known/openid-configuration"), client, limit);
        second.await?.ok_or_else(|| {
            SourceError::configuration(format!(
                "{} has no metadata (RFC 8414, OpenID Connect Discovery): check the issuer, or use \
                 Server::token_endpoint",
                shown(issuer)
            ))
        })
    }

    /// Fetches the metadata at `path`. `None` if there is none.
    async fn fetch(
        &self,
        issuer: &Uri,
        path: String,
        client: &Client,
        limit: Duration,
    ) -> Result<Option<Uri>, SourceError> {
        #[derive(Deserialize)]
        struct Metadata {
            issuer: String,
            token_endpoint: Option<String>,
        }

        let mut parts = issuer.clone().into_parts();
        parts.path_and_query = path.parse().ok();
        let request = Uri::from_parts(parts)
            .map_err(http::Error::from)
            .and_then(|url| Request::get(url).header(ACCEPT, "application/json").body(String::new()))
            .map_err(|error| {
                SourceError::configuration("the issuer must have a valid path").with_cause(error)
            })?;
        let url = shown(request.uri());
        let response = client.endpoint()?.send(request, limit, &Sent::assumed()).await;
        let response =
            response.map_err(|error| error.into_source_error(&format!("no metadata from {url}")))?;
        if response.status != StatusCode::OK {
            let error = SourceError::of_response(response.status, &response.headers, &url, "the issuer");
            // Nothing but an outage is a reason not to look in the other place.
            return if error.kind() == SourceErrorKind::Unavailable { Err(error) } else { Ok(None) };
        }
        let body = without_byte_order_mark(&response.body);
        let Ok(metadata) = serde_json::from_slice::<Metadata>(body) else { return Ok(None) };
        if metadata.issuer != self.url {
            return Err(SourceError::configuration(format!(
                "the metadata at {url} is of another issuer than {}: the issuer must be set exactly as it is there, a \
                 slash at its end included",
                self.url
            )));
        }
        let named = metadata.token_endpoint.filter(|named| !named.contains('#')).unwrap_or_default();
        let endpoint: Uri = named.parse().map_err(|_| {
            SourceError::configuration(format!("the metadata at {url} has no valid token_endpoint"))
        })?;
        check_url(
            &endpoint,
            &format!("the token_endpoint in the metadata at {url}"),
            ALLOW,
            self.plaintext_anywhere,
        )?;
        Ok(Some(endpoint))
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let url = self.checked_url().map(|url| shown(&url)).ok();
        f.debug_struct("Server")
            .field("url", &url)
            .field("is_issuer", &self.is_issuer)
            .finish_non_exhaustive()
    }
}

/// A URL as errors show it: without its query, which may be a secret.
pub(super) fn shown(url: &Uri) -> String {
    let (scheme, authority) = (url.scheme_str().unwrap_or_default(), url.authority());
    format!("{scheme}://{}{}", authority.map_or("", |authority| authority.as_str()), url.path())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invalid_url_error_has_hint() {
        for (server, hint) in [
            (Server::token_endpoint(""), "the token endpoint must be a valid URL"),
            (Server::token_endpoint("https://a/b c canary"), "the token endpoint must be a valid URL"),
            (Server::token_endpoint("/token"), "the token endpoint must have a scheme and a host"),
            (
                Server::token_endpoint("https://u:canary@a/token"),
                "the token endpoint must not have a user name",
            ),
            (Server::token_endpoint("http://a/token"), "the token endpoint must not be plaintext http"),
            (Server::token_endpoint("https://a/token#canary"), "the token endpoint must not have a fragment"),
            (Server::issuer("https://a/?x=canary"), "the issuer must not have a query or a fragment"),
            (Server::issuer("ftp://a"), "the issuer must be https or http"),
        ] {
            let error = server.checked_url().unwrap_err().to_string();
            assert!(error.starts_with(hint) && !error.contains("canary"), "{error}");
        }
        for good in [
            Server::token_endpoint("https://a/token?p=policy"),
            Server::token_endpoint("http://127.0.0.1:9/token"),
            Server::token_endpoint("http://sts/token").allow_plaintext(),
            Server::issuer("https://a/tenant/"),
        ] {
            assert!(good.checked_url().is_ok(), "{good:?}");
        }
        assert_eq!(shown(&Uri::from_static("https://a:1/token?p=canary")), "https://a:1/token");
    }
}
