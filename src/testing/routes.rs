//! The routes: the grants, the videos, and the faults that change a response.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version,
    header::{AUTHORIZATION, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, WWW_AUTHENTICATE},
};
use http_body_util::{BodyExt, Channel, Full, Limited, combinators::UnsyncBoxBody};
use hyper::body::Incoming;
use serde_json::{Value, json};

use super::{
    Fault, Route,
    authority::{AccountId, Authority, Granted, Rate},
    oauth2::{METADATA_PATH, TOKEN_PATH, TokenError},
    random::random,
    uploads::{Chunk, Read, Rejection},
};
use crate::error::BoxError;

/// The maximum length of a JSON request or a form in bytes.
const MAX_TEXT: usize = 64 * 1024;

type Body = UnsyncBoxBody<Bytes, BoxError>;

/// The error that resets a connection instead of a response.
type Broken = io::Error;

/// A handle of the server, which responds to requests.
#[derive(Clone, Debug)]
pub(super) struct Server {
    authority: Arc<Mutex<Authority>>,
    /// Whether a request is read to its end before it is challenged.
    challenge_late: bool,
}

impl Server {
    pub(super) fn new(authority: Authority, challenge_late: bool) -> Self {
        Self { authority: Arc::new(Mutex::new(authority)), challenge_late }
    }

    pub(super) fn authority(&self) -> MutexGuard<'_, Authority> {
        self.authority.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn connected(&self) {
        self.authority().counters.connections += 1;
    }

    /// Responds to a request, with the faults and the rate limit.
    pub(super) async fn answer(&self, request: Request<Incoming>) -> Result<Response<Body>, Broken> {
        let route = match request.uri().path() {
            "/auth/api-key" => Route::ApiKeyGrant,
            "/auth/refresh" => Route::RefreshGrant,
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
            _ if rate.exceeded => problem(StatusCode::TOO_MANY_REQUESTS, "Too many requests."),
            Some(Fault::Status(status)) => problem(*status, "A fault was injected."),
            Some(Fault::Answer(answer)) => answer.clone(),
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
            _ if rate.exceeded => response.map(whole),
            Some(Fault::LoseAnswer) => return Err(io::ErrorKind::ConnectionReset.into()),
            Some(Fault::Truncate) => broken(response, truncated),
            Some(Fault::Drip(pause)) => broken(response, |body| dripping(body, pause)),
            _ => response.map(whole),
        })
    }

    async fn act(&self, route: Route, request: Request<Incoming>) -> Response<Bytes> {
        let allowed = match route {
            Route::Api => return self.api(request).await,
            Route::Metadata => Method::GET,
            Route::ApiKeyGrant | Route::RefreshGrant | Route::OAuthToken => Method::POST,
        };
        if request.method() != allowed {
            return problem(StatusCode::METHOD_NOT_ALLOWED, &format!("Only {allowed} is allowed."));
        }
        match route {
            Route::Metadata => answer(StatusCode::OK, &self.authority().metadata()),
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

    async fn api(&self, request: Request<Incoming>) -> Response<Bytes> {
        if request.uri().path() == "/upload" {
            return self.delegated_upload(request).await;
        }
        let (head, body) = request.into_parts();
        let token = bearer_token(&head.headers);
        let accepted = self.authority().accept(token);
        let Some(account) = accepted else {
            if self.challenge_late {
                discard(body).await;
            } else {
                // The body is read after the response. If the connection closed with unread bytes, it would be reset
                // and the response lost.
                tokio::spawn(discard(body));
            }
            return challenged_token(token.is_some());
        };
        let path: Vec<&str> = head.uri.path().split('/').skip(1).collect();
        match (&head.method, path.as_slice()) {
            (&Method::GET, ["videos"]) => self.list(account),
            (&Method::POST, ["videos"]) => self.create(account, body).await,
            (&Method::POST, ["videos", id, "source"]) => self.upload(account, id, &head.headers, body).await,
            (&Method::POST, ["upload-tokens"]) => self.create_upload_token(account, body).await,
            (_, ["videos" | "upload-tokens"] | ["videos", _, "source"]) => {
                problem(StatusCode::METHOD_NOT_ALLOWED, "This method is not allowed.")
            }
            _ => problem(StatusCode::NOT_FOUND, "There is nothing here."),
        }
    }

    fn list(&self, account: AccountId) -> Response<Bytes> {
        let mut authority = self.authority();
        authority.counters.videos_listed += 1;
        let videos: Vec<_> = authority.videos(account).iter().map(|(id, title)| video(id, title)).collect();
        let pagination = json!({ "currentPage": 1, "itemsTotal": videos.len(), "pagesTotal": 1 });
        answer(StatusCode::OK, &json!({ "data": videos, "pagination": pagination }))
    }

    async fn create(&self, account: AccountId, body: Incoming) -> Response<Bytes> {
        let body = json_of(body).await;
        let Some(title) = body.as_ref().and_then(|body| body.get("title")).and_then(Value::as_str) else {
            return problem(StatusCode::BAD_REQUEST, "This attribute is required: title.");
        };
        let id = format!("vi{}", random(11));
        let created = answer(StatusCode::CREATED, &video(&id, title));
        let mut authority = self.authority();
        authority.videos(account).insert(id, title.to_owned());
        authority.counters.videos_made += 1;
        created
    }

    async fn upload(
        &self,
        account: AccountId,
        id: &str,
        headers: &HeaderMap,
        body: Incoming,
    ) -> Response<Bytes> {
        if !self.authority().videos(account).contains_key(id) {
            return problem(StatusCode::NOT_FOUND, "There is no such video.");
        }
        let taken = self.take(id, headers, body).await;
        taken.unwrap_or_else(|(status, title)| problem(status, title))
    }

    async fn take(
        &self,
        id: &str,
        headers: &HeaderMap,
        body: Incoming,
    ) -> Result<Response<Bytes>, Rejection> {
        let chunk = Chunk::of(headers)?;
        let begun = self.authority().uploads.begin(id, chunk.as_ref())?;
        let Some(begun) = begun else {
            discard(body).await;
            return Ok(answer(StatusCode::CREATED, &json!({ "videoId": id })));
        };
        let read = Read::of(headers, body, chunk.as_ref(), &begun).await?;
        let bytes = read.bytes;
        let mut authority = self.authority();
        let sha256 = authority.uploads.end(id, chunk, begun, headers, read);
        authority.counters.uploads += u64::from(sha256.is_some());
        Ok(answer(StatusCode::CREATED, &json!({ "videoId": id, "bytes": bytes, "sha256": sha256 })))
    }

    /// `POST /upload-tokens`
    async fn create_upload_token(&self, account: AccountId, body: Incoming) -> Response<Bytes> {
        let body = json_of(body).await;
        let ttl = body.as_ref().and_then(|body| body.get("ttl")).map_or(Some(0), Value::as_u64);
        let Some(ttl) = ttl else {
            return problem(StatusCode::BAD_REQUEST, "This attribute is a number of seconds: ttl.");
        };
        let token = self.authority().delegate(account, (ttl > 0).then(|| Duration::from_secs(ttl)));
        answer(StatusCode::CREATED, &json!({ "token": token, "ttl": ttl }))
    }

    /// `POST /upload?token=…`, which has no bearer token.
    async fn delegated_upload(&self, request: Request<Incoming>) -> Response<Bytes> {
        let (head, body) = request.into_parts();
        let accepted = {
            let mut authority = self.authority();
            let token = head
                .uri
                .query()
                .and_then(|query| query.split('&').find_map(|field| field.strip_prefix("token=")));
            if head.method != Method::POST {
                Err((StatusCode::METHOD_NOT_ALLOWED, "Only POST is allowed."))
            } else if authority.reject_bearer_at_upload && head.headers.contains_key(AUTHORIZATION) {
                Err((StatusCode::BAD_REQUEST, "An upload token comes without an Authorization header."))
            } else {
                match authority.accept_upload_token(token) {
                    None => Err((StatusCode::UNAUTHORIZED, "The upload token is not valid.")),
                    Some(_) if head.headers.contains_key(CONTENT_RANGE) => {
                        Err((StatusCode::BAD_REQUEST, "Chunks are taken at /videos/{id}/source only."))
                    }
                    Some(account) => Ok(account),
                }
            }
        };
        let account = match accepted {
            Ok(account) => account,
            Err((status, title)) => {
                tokio::spawn(discard(body));
                return problem(status, title);
            }
        };
        let id = format!("vi{}", random(11));
        let taken = self.take(&id, &head.headers, body).await;
        let mut authority = self.authority();
        taken.map_or_else(
            |(status, title)| problem(status, title),
            |answer| {
                authority.videos(account).insert(id, "delegated".to_owned());
                authority.counters.delegated_uploads += 1;
                answer
            },
        )
    }
}

async fn discard(mut body: Incoming) {
    while let Some(Ok(_)) = body.frame().await {}
}

async fn text_of(body: Incoming) -> Option<Bytes> {
    Some(Limited::new(body, MAX_TEXT).collect().await.ok()?.to_bytes())
}

async fn json_of(body: Incoming) -> Option<Value> {
    serde_json::from_slice(&text_of(body).await?).ok()
}

fn bearer_token(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token)
}

fn video(id: &str, title: &str) -> Value {
    json!({ "videoId": id, "title": title })
}

fn token_response(granted: Granted) -> Response<Bytes> {
    // A whole number if possible, like api.video's.
    let expires_in = match granted.lifetime.subsec_nanos() {
        0 => json!(granted.lifetime.as_secs()),
        _ => json!(granted.lifetime.as_secs_f64()),
    };
    let mut body = json!({
        "token_type": "Bearer",
        "expires_in": expires_in,
        "access_token": granted.access_token,
    });
    if let Some(refresh_token) = granted.refresh_token {
        body["refresh_token"] = refresh_token.into();
    }
    if let Some(token_type) = granted.issued_token_type {
        body["issued_token_type"] = token_type.into();
    }
    answer(StatusCode::OK, &body)
}

/// The response to a token request that is rejected (RFC 6749 §5.2).
fn token_error(error: &TokenError, authorized: bool) -> Response<Bytes> {
    let body = json!({ "error": error.code, "error_description": error.description });
    if error.code != "invalid_client" {
        return answer(StatusCode::BAD_REQUEST, &body);
    }
    let mut response = answer(StatusCode::UNAUTHORIZED, &body);
    if authorized {
        response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Basic realm=\"token\""));
    }
    response
}

/// The response to a rejected key or refresh token, which is a 400.
fn rejected_grant() -> Response<Bytes> {
    answer_as(
        "application/problem+json",
        StatusCode::BAD_REQUEST,
        &json!({
            "type": "https://docs.api.video/reference/authentication-invalid-user-credentials",
            "title": "The user credentials were incorrect.",
            "name": "",
            "status": 400,
        }),
    )
}

/// The response to a challenged request. It has an error code only if the request had a token (RFC 6750 §3).
fn challenged_token(had_token: bool) -> Response<Bytes> {
    let mut response = problem(StatusCode::UNAUTHORIZED, "The access token is missing, expired or revoked.");
    let challenge = if had_token { "Bearer error=\"invalid_token\"" } else { "Bearer" };
    response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
    response
}

fn problem(status: StatusCode, title: &str) -> Response<Bytes> {
    answer_as(
        "application/problem+json",
        status,
        &json!({ "type": "about:blank", "title": title, "name": "", "status": status.as_u16() }),
    )
}

fn answer(status: StatusCode, body: &Value) -> Response<Bytes> {
    answer_as("application/json", status, body)
}

fn answer_as(content_type: &'static str, status: StatusCode, body: &Value) -> Response<Bytes> {
    let mut response = Response::new(Bytes::from(body.to_string()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

fn with_rate(mut response: Response<Bytes>, rate: &Rate) -> Response<Bytes> {
    let headers = response.headers_mut();
    headers.insert("x-ratelimit-limit", rate.limit.into());
    headers.insert("x-ratelimit-remaining", rate.remaining.into());
    // In whole seconds, rounded up.
    headers.insert("x-ratelimit-retry-after", (rate.retry_after.as_secs() + 1).into());
    response
}

fn whole(body: Bytes) -> Body {
    Full::new(body).map_err(Into::into).boxed_unsync()
}

/// Replaces the body of a response. The head keeps the length of the original body.
fn broken(response: Response<Bytes>, body: impl FnOnce(Bytes) -> Body) -> Response<Body> {
    let length = response.body().len();
    let mut response = response.map(body);
    response.headers_mut().insert(CONTENT_LENGTH, length.into());
    response
}

/// Returns the first half of the body, then an error that ends the connection.
fn truncated(body: Bytes) -> Body {
    let (mut sender, channel) = Channel::<Bytes, BoxError>::new(2);
    let _ = sender.try_send(http_body::Frame::data(body.slice(..body.len() / 2)));
    sender.abort(io::Error::from(io::ErrorKind::ConnectionReset).into());
    channel.boxed_unsync()
}

/// Returns the body one byte at a time, with a pause before each.
fn dripping(body: Bytes, pause: Duration) -> Body {
    let (mut sender, channel) = Channel::<Bytes, BoxError>::new(1);
    tokio::spawn(async move {
        for at in 0..body.len() {
            tokio::time::sleep(pause).await;
            if sender.send_data(body.slice(at..=at)).await.is_err() {
                return;
            }
        }
    });
    channel.boxed_unsync()
}
