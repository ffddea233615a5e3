//! api.video's API: the videos, their uploads, and the upload tokens.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode, header::AUTHORIZATION};
use serde_json::{Value, json};

use super::{
    authority::AccountId,
    random::random,
    request_body::RequestBody,
    responses::{answer, invalid, not_found, problem, required},
    routes::{Server, discard, json_of},
    uploads::{Chunk, Read, Rejection},
    videos::{self, Video},
};

impl Server {
    /// Responds to a request whose token is that of `account`.
    pub(super) async fn videos(&self, account: AccountId, request: Request<RequestBody>) -> Response<Bytes> {
        let (head, body) = request.into_parts();
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

    async fn create(&self, account: AccountId, body: RequestBody) -> Response<Bytes> {
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
        body: RequestBody,
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
    async fn create_upload_token(&self, account: AccountId, body: RequestBody) -> Response<Bytes> {
        let Some(body) = json_of(body).await.filter(Value::is_object) else {
            return problem(StatusCode::BAD_REQUEST, "The request is not a JSON object.");
        };
        let ttl = body.get("ttl").map_or(Some(0), Value::as_u64);
        let Some(ttl) = ttl.filter(|ttl| *ttl <= videos::MAX_TTL) else { return invalid("ttl") };
        let token = self.authority().delegate(account, (ttl > 0).then(|| Duration::from_secs(ttl)));
        answer(StatusCode::CREATED, &videos::upload_token(&token, ttl))
    }

    /// `POST /upload?token=…`, which needs no bearer token.
    pub(super) async fn delegated_upload(&self, request: Request<RequestBody>) -> Response<Bytes> {
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

async fn read(headers: &HeaderMap, body: RequestBody) -> Result<(Option<Chunk>, Read), Rejection> {
    let chunk = Chunk::of(headers)?;
    let read = Read::of(headers, body, chunk.as_ref()).await?;
    Ok((chunk, read))
}
