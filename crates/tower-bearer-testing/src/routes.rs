//! The routes: the grants, the videos, and the faults that change a response.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version,
    header::{AUTHORIZATION, CACHE_CONTROL},
};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use serde_json::{Value, json};

use super::{
    Fault, Route,
    authority::{AccountId, Authority},
    oauth2::{METADATA_PATH, TOKEN_PATH},
    random::random,
    responses::{
        Body, answer, broken, challenged_token, dripping, invalid, not_found, problem, rejected_grant,
        required, token_error, token_response, truncated, whole, with_rate,
    },
    uploads::{Chunk, Read, Rejection},
    videos::{self, Video},
};

/// The maximum length of a JSON request or a form in bytes.
const MAX_TEXT: usize = 64 * 1024;

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
        let (token, key) = (bearer_token(&head.headers), basic_key(&head.headers));
        let accepted = self.authority().accept(token, key.as_deref());
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
            (&Method::GET, ["videos"]) => self.list(account, head.uri.query().unwrap_or_default()),
            (&Method::POST, ["videos"]) => self.create(account, body).await,
            (&Method::POST, ["videos", id, "source"]) => {
                self.upload(account, Some(id), &head.headers, body).await
            }
            (&Method::POST, ["upload-tokens"]) => self.create_upload_token(account, body).await,
            (&Method::GET, ["videos", id]) => self.get(account, id),
            (&Method::GET, ["videos", id, "status"]) => self.status(account, id),
            (&Method::DELETE, ["videos", id]) => self.delete(account, id),
            (_, ["videos" | "upload-tokens"] | ["videos", _] | ["videos", _, "source" | "status"]) => {
                problem(StatusCode::METHOD_NOT_ALLOWED, "This method is not allowed.")
            }
            _ => problem(StatusCode::NOT_FOUND, "There is nothing here."),
        }
    }

    fn list(&self, account: AccountId, query: &str) -> Response<Bytes> {
        let mut authority = self.authority();
        let base = authority.issuer.clone();
        match videos::page(authority.videos(account), query, &base) {
            Ok(page) => {
                authority.counters.videos_listed += 1;
                answer(StatusCode::OK, &page)
            }
            Err(name) => invalid(name),
        }
    }

    async fn create(&self, account: AccountId, body: Incoming) -> Response<Bytes> {
        let body = json_of(body).await.unwrap_or_default();
        if !body["title"].is_string() {
            return required("title");
        }
        let Ok(properties) = serde_json::from_value(body) else { return invalid("") };
        let id = new_video_id();
        let video = Video::new(properties);
        let mut authority = self.authority();
        let created = answer(StatusCode::CREATED, &video.document(&id, &authority.issuer));
        authority.videos(account).insert(id, video);
        authority.counters.videos_made += 1;
        created
    }

    fn get(&self, account: AccountId, id: &str) -> Response<Bytes> {
        let mut authority = self.authority();
        let base = authority.issuer.clone();
        let video = authority.videos(account).get(id);
        video.map_or_else(|| not_found("videoId"), |video| answer(StatusCode::OK, &video.document(id, &base)))
    }

    /// The server encodes nothing, so no video is playable.
    fn status(&self, account: AccountId, id: &str) -> Response<Bytes> {
        let mut authority = self.authority();
        if !authority.videos(account).contains_key(id) {
            return not_found("videoId");
        }
        let encoding = json!({ "playable": false, "qualities": [], "metadata": {} });
        answer(StatusCode::OK, &json!({ "ingest": authority.uploads.ingest(id), "encoding": encoding }))
    }

    fn delete(&self, account: AccountId, id: &str) -> Response<Bytes> {
        let mut authority = self.authority();
        if authority.videos(account).remove(id).is_none() {
            return not_found("videoId");
        }
        authority.uploads.forget(id);
        authority.counters.videos_deleted += 1;
        let mut response = Response::new(Bytes::new());
        *response.status_mut() = StatusCode::NO_CONTENT;
        response
    }

    /// Receives the bytes of a video, or one chunk of it. Without an `id`, the upload is delegated: the form has the ID
    /// after the first chunk, and a request without an ID creates a video.
    async fn upload(
        &self,
        account: AccountId,
        id: Option<&str>,
        headers: &HeaderMap,
        body: Incoming,
    ) -> Response<Bytes> {
        if id.is_some_and(|id| !self.authority().videos(account).contains_key(id)) {
            tokio::spawn(discard(body));
            return not_found("videoId");
        }
        let (chunk, mut read) = match read(headers, body).await {
            Ok(read) => read,
            Err((status, title)) => return problem(status, title),
        };
        let (bytes, file_name) = (read.bytes, read.file_name.take());
        let given = id.map(str::to_owned).or_else(|| read.video_id.take());
        let mut authority = self.authority();
        if given.as_ref().is_some_and(|id| !authority.videos(account).contains_key(id)) {
            return not_found("videoId");
        }
        let id = given.clone().unwrap_or_else(new_video_id);
        let sha256 = match authority.uploads.receive(&id, chunk.as_ref(), headers, read) {
            Ok(sha256) => sha256,
            Err((status, title)) => return problem(status, title),
        };
        authority.counters.uploads = authority.uploads.whole.len() as u64;
        authority.counters.delegated_uploads += u64::from(given.is_none());
        let base = authority.issuer.clone();
        let video = authority.videos(account).entry(id.clone());
        let video =
            video.or_insert_with(|| Video::titled(file_name.unwrap_or_else(|| "delegated".to_owned())));
        video.updated = SystemTime::now();
        let mut document = video.document(&id, &base);
        document["bytes"] = bytes.into();
        document["sha256"] = sha256.into();
        answer(StatusCode::CREATED, &document)
    }

    /// `POST /upload-tokens`
    async fn create_upload_token(&self, account: AccountId, body: Incoming) -> Response<Bytes> {
        let Some(body) = json_of(body).await.filter(Value::is_object) else {
            return problem(StatusCode::BAD_REQUEST, "The request is not a JSON object.");
        };
        let ttl = body.get("ttl").map_or(Some(0), Value::as_u64);
        let Some(ttl) = ttl.filter(|ttl| *ttl <= videos::MAX_TTL) else { return invalid("ttl") };
        let token = self.authority().delegate(account, (ttl > 0).then(|| Duration::from_secs(ttl)));
        answer(StatusCode::CREATED, &videos::upload_token(&token, ttl))
    }

    /// `POST /upload?token=…`, which needs no bearer token.
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
                let account = authority.accept_upload_token(token);
                account.ok_or((StatusCode::UNAUTHORIZED, "The upload token is not valid."))
            }
        };
        match accepted {
            Ok(account) => self.upload(account, None, &head.headers, body).await,
            Err((status, title)) => {
                tokio::spawn(discard(body));
                problem(status, title)
            }
        }
    }
}

fn new_video_id() -> String {
    format!("vi{}", random(11))
}

async fn read(headers: &HeaderMap, body: Incoming) -> Result<(Option<Chunk>, Read), Rejection> {
    let chunk = Chunk::of(headers)?;
    let read = Read::of(headers, body, chunk.as_ref()).await?;
    Ok((chunk, read))
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

/// Returns the API key of a request that has it as the name of a user (RFC 7617). The password is not
/// used.
fn basic_key(headers: &HeaderMap) -> Option<String> {
    let (scheme, credentials) = headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    let decoded =
        BASE64_STANDARD.decode(credentials).ok().filter(|_| scheme.eq_ignore_ascii_case("basic"))?;
    Some(String::from_utf8(decoded).ok()?.split(':').next()?.to_owned())
}
