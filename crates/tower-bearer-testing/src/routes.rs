//! The routes: the grants, the API behind the token check, and the faults that change a response.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use http::{
    HeaderValue, Method, Request, Response, StatusCode, Version,
    header::{AUTHORIZATION, CACHE_CONTROL},
};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use serde_json::Value;

use super::{
    Fault, Route,
    authority::Authority,
    authorization::AUTHORIZATION_PATH,
    credential::Credential,
    oauth2::{METADATA_PATH, TOKEN_PATH},
    request_body::{CheckFailed, RequestBody},
    request_record::Observer,
    responses::{
        Body, answer, broken, challenged_token, dripping, problem, rejected_grant, token_error,
        token_response, truncated, whole, with_rate,
    },
    service::ApiService,
};
use crate::BoxError;

/// The maximum length of a JSON request or a form in bytes.
const MAX_TEXT: usize = 64 * 1024;

/// The error that resets a connection instead of a response.
type Broken = io::Error;

/// A handle of the server, which responds to requests.
#[derive(Clone, Debug)]
pub(super) struct Server {
    authority: Arc<Mutex<Authority>>,
    options: Arc<Options>,
}

/// The options that do not change while the server runs.
#[derive(Debug, Default)]
pub(super) struct Options {
    /// Whether a request is read to its end before it is challenged.
    pub(super) challenge_late: bool,
    /// Whether the token is checked again at the end of a request's body.
    pub(super) check_after_body: bool,
    /// What the API is instead of the videos.
    pub(super) service: Option<ApiService>,
    pub(super) observer: Option<Observer>,
}

impl Server {
    pub(super) fn new(authority: Authority, options: Options) -> Self {
        Self { authority: Arc::new(Mutex::new(authority)), options: Arc::new(options) }
    }

    pub(super) fn authority(&self) -> MutexGuard<'_, Authority> {
        self.authority.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn connected(&self) {
        self.authority().counters.connections += 1;
    }

    /// Responds to a request, and reports it.
    pub(super) async fn answer(&self, request: Request<Incoming>) -> Result<Response<Body>, Broken> {
        let mut watch = self.options.observer.as_ref().map(|observer| observer.watch(&request));
        let answer = self.answer_unwatched(request).await;
        if let Some(watch) = &mut watch {
            watch.record.status = answer.as_ref().ok().map(Response::status);
        }
        answer
    }

    /// Responds to a request, with the faults and the rate limit.
    async fn answer_unwatched(&self, request: Request<Incoming>) -> Result<Response<Body>, Broken> {
        let route = match request.uri().path() {
            "/auth/api-key" => Route::ApiKeyGrant,
            "/auth/refresh" => Route::RefreshGrant,
            AUTHORIZATION_PATH => Route::OAuthAuthorization,
            TOKEN_PATH => Route::OAuthToken,
            METADATA_PATH => Route::Metadata,
            _ => Route::Api,
        };
        let (rate, fault) = {
            let mut authority = self.authority();
            let rate = authority.rate_limit.count();
            authority.counters.rate_limited += u64::from(rate.exceeded);
            authority.counters.http2_requests += u64::from(request.version() == Version::HTTP_2);
            (rate, authority.fault(route))
        };
        let response = match &fault {
            _ if rate.exceeded => problem(StatusCode::TOO_MANY_REQUESTS, "Too many requests.").map(whole),
            Some(Fault::Status(status)) => problem(*status, "A fault was injected.").map(whole),
            Some(Fault::Answer(answer)) => answer.clone().map(whole),
            Some(Fault::Hang) => std::future::pending().await,
            Some(Fault::Reset) => return Err(io::ErrorKind::ConnectionReset.into()),
            Some(Fault::Delay(delay)) => {
                tokio::time::sleep(*delay).await;
                self.act(route, request).await
            }
            Some(Fault::LoseAnswer | Fault::Truncate | Fault::Drip(_)) | None => {
                self.act(route, request).await
            }
        };
        let response = with_rate(response, &rate);
        Ok(match fault {
            _ if rate.exceeded => response,
            Some(Fault::LoseAnswer) => return Err(io::ErrorKind::ConnectionReset.into()),
            Some(Fault::Truncate) => broken(read(response).await?, truncated),
            Some(Fault::Drip(pause)) => broken(read(response).await?, |body| dripping(body, pause)),
            _ => response,
        })
    }

    async fn act(&self, route: Route, request: Request<Incoming>) -> Response<Body> {
        match route {
            Route::Api => self.api(request).await,
            _ => self.token_route(route, request).await.map(whole),
        }
    }

    async fn token_route(&self, route: Route, request: Request<Incoming>) -> Response<Bytes> {
        let allowed = match route {
            Route::Metadata | Route::OAuthAuthorization => Method::GET,
            _ => Method::POST,
        };
        if request.method() != allowed {
            return problem(StatusCode::METHOD_NOT_ALLOWED, &format!("Only {allowed} is allowed."));
        }
        match route {
            Route::Metadata => answer(StatusCode::OK, &self.authority().metadata()),
            Route::OAuthAuthorization => {
                self.authority().authorize(request.uri().query().unwrap_or_default())
            }
            Route::OAuthToken => self.oauth_token(request).await,
            _ => self.api_video_token(route, request).await,
        }
    }

    async fn api_video_token(&self, route: Route, request: Request<Incoming>) -> Response<Bytes> {
        let Some(body) = json_of(request.into_body()).await else {
            return problem(StatusCode::BAD_REQUEST, "The request is not JSON.");
        };
        let field = |name: &str| body.get(name).and_then(Value::as_str).unwrap_or_default();
        let granted = match route {
            Route::ApiKeyGrant => self.authority().authenticate(field("apiKey")),
            _ => self.authority().refresh(field("refreshToken")),
        };
        granted.map_or_else(rejected_grant, token_response)
    }

    async fn oauth_token(&self, request: Request<Incoming>) -> Response<Bytes> {
        let (head, body) = request.into_parts();
        let body = text_of(body).await;
        let granted = self.authority().grant_token(&head.headers, body.as_deref());
        let authorized = head.headers.contains_key(AUTHORIZATION);
        let mut response = granted.map_or_else(|error| token_error(&error, authorized), token_response);
        response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        response
    }

    /// Checks the token of a request and sends it to the API.
    async fn api(&self, request: Request<Incoming>) -> Response<Body> {
        if self.options.service.is_none() && request.uri().path() == "/upload" {
            return self.delegated_upload(request.map(RequestBody::unchecked)).await.map(whole);
        }
        let (head, body) = request.into_parts();
        let credential = Credential::of(&head.headers);
        let has_token = credential.access_token.is_some();
        let accepted = self.authority().accept(&credential);
        let Some(account) = accepted else {
            if self.options.challenge_late {
                discard(body).await;
            } else {
                // The body is read after the response. If the connection closed with unread bytes, it would be reset
                // and the response lost.
                tokio::spawn(discard(body));
            }
            return challenged_token(has_token).map(whole);
        };
        let (body, failed) = if self.options.check_after_body {
            RequestBody::checked(body, self, credential)
        } else {
            (RequestBody::unchecked(body), CheckFailed::default())
        };
        let request = Request::from_parts(head, body);
        let response = match &self.options.service {
            Some(service) => service.call(request).await,
            None => self.videos(account, request).await.map(whole),
        };
        if failed.get() {
            self.authority().count_late_challenge();
            return challenged_token(has_token).map(whole);
        }
        response
    }
}

/// Reads the body of a response.
async fn read(response: Response<Body>) -> Result<Response<Bytes>, Broken> {
    let (head, body) = response.into_parts();
    Ok(Response::from_parts(head, body.collect().await.map_err(io::Error::other)?.to_bytes()))
}

/// Reads a body to its end.
pub(super) async fn discard(mut body: impl http_body::Body + Unpin) {
    while let Some(Ok(_)) = body.frame().await {}
}

async fn text_of(body: impl http_body::Body<Error: Into<BoxError>>) -> Option<Bytes> {
    Some(Limited::new(body, MAX_TEXT).collect().await.ok()?.to_bytes())
}

/// Reads a body as JSON. `None` if it is too long, breaks off, or is not JSON.
pub(super) async fn json_of(body: impl http_body::Body<Error: Into<BoxError>>) -> Option<Value> {
    serde_json::from_slice(&text_of(body).await?).ok()
}
