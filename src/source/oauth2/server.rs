//! [`Server`]: the authorization server: the URL of its token endpoint, or its issuer, whose metadata has that URL.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::{Request, Uri};
use tokio::time::Instant;

use super::super::check_text;
use super::super::client::{Sent, TokenClient};
use crate::debug::debug_fields;
use crate::error::{Facts, SourceError};
use crate::origins::{shown, shown_with_path};

/// How long metadata is used. A server may move its endpoints, and keep the old ones for some time.
const METADATA_LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);

/// How long old metadata is used, if it cannot be read again.
const METADATA_PAUSE: Duration = Duration::from_secs(10 * 60);

/// The time limit of reading the metadata in one place.
const METADATA_TIMEOUT: Duration = Duration::from_secs(5);

/// An authorization server (RFC 6749 §1.1): the URL of its token endpoint, or its issuer.
///
/// `Debug` shows the URL without its query.
#[derive(Clone)]
pub struct Server {
    /// The token endpoint or the issuer.
    pub(super) url: String,
    is_issuer: bool,
    /// The token endpoint in the issuer's metadata, and when that is read again. Clones share it.
    discovered: Arc<Mutex<Option<(Uri, Instant)>>>,
}

impl Server {
    /// Makes a server from the URL of its token endpoint (RFC 6749 §3.2).
    ///
    /// The URL is `https`, or `http` on loopback ([`TokenClient::allow_plaintext`]). It may have a query, but no user
    /// name. A URL that is not valid is an error of
    /// [`TokenProviderBuilder::build`](crate::TokenProviderBuilder::build), or else of the first use.
    pub fn token_endpoint(url: impl Into<String>) -> Self {
        Self { url: url.into(), is_issuer: false, discovered: Arc::default() }
    }

    /// Makes a server from its issuer identifier, such as `https://login.example.com/tenant`.
    ///
    /// The first use fetches the metadata: RFC 8414 (`/.well-known/oauth-authorization-server`), and if that fails in any
    /// way OpenID Connect Discovery (`/.well-known/openid-configuration`). The `issuer` in it must be exactly this one, a
    /// slash at its end included (RFC 8414 §3.3). Each place has 5 s at most. Clones share the metadata, once one of them has
    /// read it. It is read again after a day, and when the token endpoint in it cannot be reached or responds with 404, 405
    /// or 410. A failure is not remembered: an older token endpoint is used until there is another.
    ///
    /// The rules for the URL are those of [`token_endpoint`](Self::token_endpoint), but it has no query. They hold for
    /// the token endpoint in the metadata, too.
    pub fn issuer(url: impl Into<String>) -> Self {
        Self { is_issuer: true, ..Self::token_endpoint(url) }
    }

    /// Returns the audience of an assertion for the token endpoint with this URL: the issuer, if the server was made from it.
    pub(super) fn audience(&self, endpoint: &Uri) -> String {
        if self.is_issuer { self.url.clone() } else { endpoint.to_string() }
    }

    /// The name of the URL in errors.
    pub(super) fn option(&self) -> &'static str {
        if self.is_issuer { "the issuer" } else { "the token endpoint" }
    }

    /// Returns the checked URL that the server was made from.
    ///
    /// # Errors
    ///
    /// [`SourceError::configuration`] if it is not valid.
    pub(super) fn checked_url(&self, client: &TokenClient) -> Result<Uri, SourceError> {
        check_text(self.option(), &self.url)?;
        // Without the parser's error: its text is no help, and the URL may have a secret.
        let expected = format!("{} must be a valid URL, such as https://login.example.com", self.option());
        let url: Uri = self.url.parse().map_err(|_| SourceError::configuration(expected))?;
        if self.url.contains('#') || (self.is_issuer && url.query().is_some()) {
            let parts = if self.is_issuer { "a query or a fragment" } else { "a fragment" };
            return Err(SourceError::configuration(format!("{} must not have {parts}", self.option())));
        }
        client.check_url(&url, self.option())?;
        Ok(url)
    }

    /// Returns the URL of the token endpoint: that of the metadata, for an issuer.
    pub(super) async fn endpoint(&self, client: &TokenClient) -> Result<Uri, SourceError> {
        let url = self.checked_url(client)?;
        if !self.is_issuer {
            return Ok(url);
        }
        let known = self.discovered.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match known {
            Some((endpoint, due)) if Instant::now() < due => Ok(endpoint),
            Some((endpoint, _)) => Ok(self.discover(&url, client).await.unwrap_or_else(|_| {
                // Looked up again in a while, since each attempt may take its time.
                self.remember(&endpoint, METADATA_PAUSE);
                endpoint
            })),
            None => self.discover(&url, client).await,
        }
    }

    /// Returns the URL to which the token endpoint has moved from `old`, which does not respond, if the metadata has
    /// another one.
    pub(super) async fn moved_from(&self, old: &Uri, client: &TokenClient) -> Option<Uri> {
        let issuer = self.checked_url(client).ok().filter(|_| self.is_issuer)?;
        self.discover(&issuer, client).await.ok().filter(|new| new != old)
    }

    fn remember(&self, endpoint: &Uri, lifetime: Duration) {
        let discovered = Some((endpoint.clone(), Instant::now() + lifetime));
        *self.discovered.lock().unwrap_or_else(PoisonError::into_inner) = discovered;
    }

    /// Reads the metadata: in the first place, or else in the second.
    async fn discover(&self, issuer: &Uri, client: &TokenClient) -> Result<Uri, SourceError> {
        let path = issuer.path().trim_end_matches('/');
        // RFC 8414 §3.1 inserts the path after the well-known one, OpenID Connect Discovery 1.0 §4.1 appends it.
        let places = [
            format!("/.well-known/oauth-authorization-server{path}"),
            format!("{path}/.well-known/openid-configuration"),
        ];
        let mut errors = Vec::new();
        for place in places {
            match self.read(issuer, place, client).await {
                Ok(endpoint) => {
                    self.remember(&endpoint, METADATA_LIFETIME);
                    return Ok(endpoint);
                }
                Err(error) => errors.push(error),
            }
        }
        let reasons: Vec<_> = errors.iter().map(SourceError::to_string).collect();
        let message = format!("no metadata (RFC 8414, OpenID Connect Discovery): {}", reasons.join("; "));
        let delay = errors.iter().filter_map(SourceError::retry_after).max();
        let is_answer = errors.iter().all(|error| error.facts.is_answer);
        let Some(outage) = errors.into_iter().find(SourceError::is_transient) else {
            let text = format!("{message}: check the issuer {}, or set the token endpoint", self.url);
            return Err(SourceError::configuration(text).with_facts(Facts { is_answer, ..Facts::default() }));
        };
        let facts = Facts { is_unsent: true, is_answer: false, fate: None, ..outage.facts };
        let error = SourceError::unavailable(message).with_facts(facts);
        Err(delay.into_iter().fold(error, SourceError::with_retry_after))
    }

    /// Reads the metadata at `path`.
    async fn read(&self, issuer: &Uri, path: String, client: &TokenClient) -> Result<Uri, SourceError> {
        let request = Request::get(format!("{}{path}", shown(issuer))).body(String::new());
        let request = request.map_err(|_| SourceError::configuration("the issuer must have a valid path"))?;
        // Both places and the token request have to fit into one refresh.
        let client = client.bounded(METADATA_TIMEOUT, METADATA_TIMEOUT);
        let response = client.exchange(request, self.option(), &Sent::default()).await?;
        let invalid = |what: &str| SourceError::configuration(response.described(what));
        if !response.status().is_success() {
            let error = response.failure();
            // There is no credential that could be rejected.
            let is_transient = error.is_transient();
            return Err(if is_transient { error } else { invalid("is no metadata").with_facts(error.facts) });
        }
        let Some(metadata) = &response.fields else { return Err(invalid("is no metadata")) };
        if metadata.text("issuer") != Some(&self.url) {
            return Err(invalid(&format!(
                "is of another issuer than {}: the issuer must be set exactly as it is there, a slash at its end included",
                self.url
            )));
        }
        let named = metadata.text("token_endpoint").filter(|named| !named.contains('#')).unwrap_or_default();
        let Ok(endpoint) = named.parse::<Uri>() else { return Err(invalid("has no valid token_endpoint")) };
        client.check_url(&endpoint, &format!("the token_endpoint in the metadata at {}", response.url))?;
        Ok(endpoint)
    }
}

debug_fields!(Server |it| { url: it.url.parse().map(|url| shown_with_path(&url)).ok(), is_issuer: it.is_issuer });

#[cfg(test)]
mod tests {
    use super::*;

    /// The URL of an authorization server is not valid: the error has a hint.
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
            let error = server.checked_url(&TokenClient::new()).unwrap_err().to_string();
            assert!(error.starts_with(hint) && !error.contains("canary"), "{error}");
        }
        for good in [
            Server::token_endpoint("https://a/token?p=policy"),
            Server::token_endpoint("http://127.0.0.1:9/token"),
            Server::issuer("https://a/tenant/"),
        ] {
            assert!(good.checked_url(&TokenClient::new()).is_ok(), "{good:?}");
        }
        let plaintext = Server::token_endpoint("http://sts/token");
        assert!(plaintext.checked_url(&TokenClient::new().allow_plaintext()).is_ok());
        assert_eq!(shown_with_path(&Uri::from_static("https://a:1/token?p=canary")), "https://a:1/token");
    }
}
