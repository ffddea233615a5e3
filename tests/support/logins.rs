//! An authorization server with several users, in memory: it rotates refresh tokens, has a grace, and ends a user's login when a
//! spent one is presented.
#![allow(dead_code, unreachable_pub)]

use std::{
    collections::{HashMap, HashSet, VecDeque},
    io,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use tokio::time::{Instant, sleep};
use tower_bearer::{
    BoxError, Error, OAuth2, SourceErrorKind, Token, TokenClient, TokenProvider, TokenProviderBuilder,
    oauth2::{ClientAuth, Server},
};

pub use super::SECOND;
use super::fleet::{MemoryStore, POST};

#[derive(Clone, Copy, Debug)]
pub enum Act {
    /// Not processed: status, content type, body.
    Answer(u16, &'static str, &'static str),
    /// The same, after this.
    SlowAnswer(Duration, u16, &'static str),
    /// Not sent.
    Refused,
    /// Processed; the answer comes after this.
    Slow(Duration),
    /// Processed; the connection breaks after this.
    Lost(Duration),
    /// Processed; the access token is not usable.
    Unusable,
    /// Processed; a page is the answer.
    Page,
    /// Not processed: status, and `Retry-After`.
    Busy(u16, &'static str),
}

/// An authorization server with several users, which answers by a script.
#[derive(Clone, Default)]
pub struct Auth(Arc<Mutex<State>>);

#[derive(Default)]
pub struct State {
    /// The user of each refresh token, and when it was spent.
    pub tokens: HashMap<String, (String, Option<Instant>)>,
    pub granted: u32,
    pub grace: Duration,
    pub lenient: bool,
    pub reused: Vec<String>,
    pub presented: Vec<(Instant, String)>,
    /// The presented refresh tokens of the requests that were processed.
    pub processed: Vec<String>,
    pub acts: VecDeque<Act>,
    /// For each request, instead of `acts`.
    pub always: Option<Act>,
    /// What happens at random, if `acts` is empty.
    pub random: Option<Box<dyn FnMut() -> Act + Send>>,
    pub lifetime: u32,
    /// Whether the access token stays the same.
    pub same_access_token: bool,
    /// Further fields of a token response.
    pub further: &'static str,
    pub clients: Option<HashSet<String>>,
}

impl Auth {
    pub fn new(users: &[&str]) -> Self {
        let auth = Self::default();
        auth.state().lifetime = 60;
        for user in users {
            auth.user(user);
        }
        auth
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    pub fn user(&self, user: &str) {
        self.state().tokens.insert(user.to_owned(), (user.to_owned(), None));
    }

    pub fn presented(&self) -> Vec<String> {
        self.state().presented.iter().map(|(_, token)| token.clone()).collect()
    }

    pub fn processed(&self) -> Vec<String> {
        self.state().processed.clone()
    }

    /// How often a spent refresh token was presented too late.
    pub fn reused(&self) -> usize {
        self.state().reused.len()
    }

    pub fn grant(&self, refresh_token: &str) -> Option<(String, u32)> {
        let mut state = self.state();
        state.processed.push(refresh_token.to_owned());
        let grace = state.grace;
        let (user, spent) = state.tokens.get_mut(refresh_token)?;
        let user = user.clone();
        if spent.get_or_insert_with(Instant::now).elapsed() > grace {
            state.reused.push(refresh_token.to_owned());
            if !state.lenient {
                state.tokens.retain(|_, (of, _)| *of != user);
            }
            return None;
        }
        state.granted += 1;
        let n = state.granted;
        state.tokens.insert(format!("r-{user}-{n}"), (user.clone(), None));
        Some((user, n))
    }

    pub async fn answer(&self, request: Request<String>) -> Result<Response<Full<Bytes>>, BoxError> {
        // api.video's requests have JSON.
        let json: serde_json::Value = serde_json::from_str(request.body()).unwrap_or_default();
        let fields: HashMap<String, String> =
            form_urlencoded::parse(request.body().as_bytes()).into_owned().collect();
        let refresh_token =
            json["refreshToken"].as_str().unwrap_or_else(|| &fields["refresh_token"]).to_owned();
        let act = {
            let mut state = self.state();
            state.presented.push((Instant::now(), refresh_token.clone()));
            let bad = state
                .clients
                .as_ref()
                .is_some_and(|clients| !fields.get("client_id").is_some_and(|id| clients.contains(id)));
            if bad {
                Some(Act::Answer(401, "application/json", r#"{"error":"invalid_client"}"#))
            } else {
                let act = state.always.or_else(|| state.acts.pop_front());
                act.or_else(|| state.random.as_mut().map(|random| random()))
            }
        };
        let (mut unusable, mut takes) = (false, POST);
        match act {
            Some(Act::Answer(status, kind, body)) => {
                sleep(POST).await;
                return Ok(Response::builder()
                    .status(status)
                    .header("content-type", kind)
                    .body(Full::from(body))?);
            }
            Some(Act::SlowAnswer(takes, status, body)) => {
                sleep(takes).await;
                return Ok(Response::builder().status(status).body(Full::from(body))?);
            }
            Some(Act::Busy(status, retry_after)) => {
                let response = Response::builder().status(status).header("retry-after", retry_after);
                return Ok(response.body(Full::default())?);
            }
            Some(Act::Page) => {
                self.grant(&refresh_token);
                sleep(POST).await;
                return Ok(Response::new(Full::from("<html>")));
            }
            Some(Act::Refused) => return Err(io::Error::from(io::ErrorKind::ConnectionRefused).into()),
            Some(Act::Lost(takes)) => {
                self.grant(&refresh_token);
                sleep(takes).await;
                return Err(io::Error::from(io::ErrorKind::ConnectionReset).into());
            }
            Some(Act::Slow(by)) => takes = by,
            Some(Act::Unusable) => unusable = true,
            None => {}
        }
        let granted = self.grant(&refresh_token);
        sleep(takes).await;
        let (lifetime, same, further) = {
            let state = self.state();
            (state.lifetime, state.same_access_token, state.further)
        };
        let (status, body) = match granted {
            Some((user, n)) => {
                let access = match (unusable, same) {
                    (true, _) => "not valid".to_owned(),
                    (_, true) => "same".to_owned(),
                    _ => format!("acc-{user}-{n}"),
                };
                let lifetime =
                    if lifetime == 0 { String::new() } else { format!(r#","expires_in":{lifetime}"#) };
                let body = format!(
                    r#"{{"access_token":"{access}","refresh_token":"r-{user}-{n}"{lifetime}{further}}}"#
                );
                (200, body)
            }
            None => (400, r#"{"error":"invalid_grant"}"#.to_owned()),
        };
        Ok(Response::builder()
            .status(status)
            .header("content-type", "application/json")
            .body(Full::from(body))?)
    }

    pub fn client(&self) -> TokenClient {
        let auth = self.clone();
        TokenClient::with_service(tower::service_fn(move |request| {
            let auth = auth.clone();
            async move { auth.answer(request).await }
        }))
    }

    pub fn source_of(&self, id: &str) -> OAuth2 {
        let server = Server::token_endpoint("https://login.example/token");
        OAuth2::login(server, ClientAuth::public(id)).with_client(self.client())
    }

    pub fn source(&self) -> OAuth2 {
        self.source_of("id")
    }

    pub fn builder(&self, seed: &str) -> TokenProviderBuilder<OAuth2> {
        TokenProvider::builder(self.source()).login(seed)
    }

    pub fn process(&self, store: &MemoryStore, seed: &str) -> TokenProvider {
        self.builder(seed).store(store.clone()).build().unwrap()
    }

    pub fn single(&self, seed: &str) -> TokenProvider {
        self.builder(seed).build().unwrap()
    }
}

/// A server that accepts a spent refresh token for 30 s.
pub fn with_grace(users: &[&str]) -> (Auth, MemoryStore) {
    let auth = Auth::new(users);
    auth.state().grace = SECOND * 30;
    (auth, MemoryStore::default())
}

/// A refresh of this process is running.
pub async fn refreshing(process: &TokenProvider, auth: &Auth, takes: Duration) {
    auth.state().acts.push_back(Act::Slow(takes));
    let process = process.clone();
    tokio::spawn(async move { process.token().await });
    sleep(SECOND).await;
}

/// Exchanges the token of a login.
pub fn exchange(login: TokenProvider) -> TokenProviderBuilder<OAuth2> {
    let exchanged = tower::service_fn(|request: Request<String>| async move {
        let fields: HashMap<String, String> =
            form_urlencoded::parse(request.body().as_bytes()).into_owned().collect();
        let body = format!(r#"{{"access_token":"for-{}","expires_in":3600}}"#, fields["subject_token"]);
        Ok::<_, BoxError>(Response::new(Full::<Bytes>::from(body)))
    });
    let server = Server::token_endpoint("https://sts.example/token");
    let source = OAuth2::token_exchange(server, ClientAuth::none(), login);
    TokenProvider::builder(source.with_client(TokenClient::with_service(exchanged)))
}

pub fn user(token: &Token) -> String {
    let (user, _) = token.access_token().trim_start_matches("acc-").rsplit_once('-').unwrap();
    user.to_owned()
}

pub fn is_login(error: &Error) -> bool {
    matches!(error, Error::Source(error) if error.kind() == SourceErrorKind::LoginRequired)
}

pub fn stored(store: &MemoryStore) -> String {
    store.kept().record.map(|(record, _)| record.text().to_owned()).unwrap_or_default()
}
