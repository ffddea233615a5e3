//! The test server follows api.video's contract and injects the faults that a test asks for.

mod support;

use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use serde_json::{Value, json};
use tower_bearer::testing::{AuthServer, Fault, Route};

struct Answer {
    status: StatusCode,
    headers: http::HeaderMap,
    body: Bytes,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    fn text(&self, field: &str) -> String {
        self.json()[field].as_str().unwrap_or_else(|| panic!("no {field}")).to_owned()
    }
}

async fn send(server: &AuthServer, request: Request<Full<Bytes>>) -> Result<Answer, String> {
    let response = match server.certificate() {
        Some(certificate) => support::https(certificate).request(request).await,
        None => support::http1().request(request).await,
    };
    let (head, body) = response.map_err(|error| support::chain(&error))?.into_parts();
    let body = body.collect().await.map_err(|error| support::chain(&error))?.to_bytes();
    Ok(Answer { status: head.status, headers: head.headers, body })
}

fn request(server: &AuthServer, method: Method, path: &str, token: &str, body: &str) -> Request<Full<Bytes>> {
    let builder = Request::builder().method(method).uri(format!("{}{path}", server.uri()));
    let builder =
        if token.is_empty() { builder } else { builder.header("authorization", format!("Bearer {token}")) };
    builder.body(Full::from(body.to_owned())).unwrap()
}

async fn post(server: &AuthServer, path: &str, body: Value) -> Answer {
    send(server, request(server, Method::POST, path, "", &body.to_string())).await.unwrap()
}

async fn authenticate(server: &AuthServer) -> Answer {
    post(server, "auth/api-key", json!({ "apiKey": server.api_key() })).await
}

async fn refresh(server: &AuthServer, refresh_token: &str) -> Answer {
    post(server, "auth/refresh", json!({ "refreshToken": refresh_token })).await
}

async fn list(server: &AuthServer, token: &str) -> Answer {
    send(server, request(server, Method::GET, "videos", token, "")).await.unwrap()
}

#[tokio::test]
async fn use_or_new_grant_spends_refresh_token() {
    for tls in [false, true] {
        let server = AuthServer::builder().tls(tls).start().await.unwrap();
        let first = authenticate(&server).await;
        assert_eq!(first.status, StatusCode::OK);
        assert_eq!(first.text("token_type"), "Bearer");
        assert_eq!(first.json()["expires_in"], 3600);
        let second = refresh(&server, &first.text("refresh_token")).await;
        assert_eq!(second.status, StatusCode::OK);
        assert_ne!(second.text("access_token"), first.text("access_token"));

        let spent = refresh(&server, &first.text("refresh_token")).await;
        assert_eq!(spent.status, StatusCode::BAD_REQUEST);
        assert_eq!(spent.headers["content-type"], "application/problem+json");
        assert_eq!(spent.text("title"), "The user credentials were incorrect.");
        authenticate(&server).await;
        assert_eq!(refresh(&server, &second.text("refresh_token")).await.status, StatusCode::BAD_REQUEST);

        assert_eq!(post(&server, "auth/api-key", json!({ "apiKey": "no" })).await.status, 400);
        assert_eq!(post(&server, "auth/api-key", json!("no object")).await.status, 400);
        let counters = server.counters();
        assert_eq!((counters.api_key_grants, counters.refresh_grants), (2, 1));
        assert_eq!((counters.rejected_api_keys, counters.rejected_refresh_tokens), (2, 2));
    }
}

#[tokio::test]
async fn expiry_or_revocation_ends_token() {
    let server = AuthServer::start().await.unwrap();
    let token = authenticate(&server).await.text("access_token");
    assert_eq!(list(&server, &token).await.status, StatusCode::OK);
    server.revoke_access_tokens();
    let challenged = list(&server, &token).await;
    assert_eq!(challenged.status, StatusCode::UNAUTHORIZED);
    assert_eq!(challenged.headers["www-authenticate"], "Bearer error=\"invalid_token\"");
    assert_eq!(list(&server, "").await.headers["www-authenticate"], "Bearer");

    server.set_token_lifetime(Duration::ZERO);
    let expired = authenticate(&server).await.text("access_token");
    assert_eq!(list(&server, &expired).await.status, StatusCode::UNAUTHORIZED);
    assert_eq!((server.counters().accepted, server.counters().challenged), (1, 3));
}

#[tokio::test]
async fn grant_revokes_previous_if_asked() {
    for revoke in [false, true] {
        let server = AuthServer::builder().revoke_previous(revoke).start().await.unwrap();
        let first = authenticate(&server).await.text("access_token");
        authenticate(&server).await;
        assert_eq!(list(&server, &first).await.status == StatusCode::OK, !revoke);
    }
}

#[tokio::test]
async fn videos_are_made_listed_and_uploaded() {
    let server = AuthServer::start().await.unwrap();
    let token = authenticate(&server).await.text("access_token");
    let post = |path: &str, body: &str| request(&server, Method::POST, path, &token, body);
    let made = send(&server, post("videos", r#"{"title": "a film"}"#)).await.unwrap();
    assert_eq!(made.status, StatusCode::CREATED);
    let id = made.text("videoId");
    assert_eq!(list(&server, &token).await.json()["data"][0]["videoId"], *id);
    let path = format!("videos/{id}/source");
    let digest = "sha-256=:LPJNul+wow4m6DsqxbninhsWHlwfp0JecwQzYpOLmCQ=:";
    let sha256 = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";

    let mut raw = post(&path, "hello");
    raw.headers_mut().insert("content-digest", digest.parse().unwrap());
    let stored = send(&server, raw).await.unwrap();
    assert_eq!((stored.status, stored.text("sha256")), (StatusCode::CREATED, sha256.to_owned()));

    let form = "--b\r\ncontent-disposition: form-data; name=\"note\"\r\n\r\nno\r\n\
                --b\r\ncontent-disposition: form-data; name=\"file\"; filename=\"a.mp4\"\r\n\r\nhello\r\n--b--\r\n";
    let mut multipart = post(&path, form);
    multipart.headers_mut().insert("content-type", "multipart/form-data; boundary=b".parse().unwrap());
    assert_eq!(send(&server, multipart).await.unwrap().text("sha256"), sha256);

    let mut wrong = post(&path, "hallo");
    wrong.headers_mut().insert("content-digest", digest.parse().unwrap());
    assert_eq!(send(&server, wrong).await.unwrap().status, StatusCode::BAD_REQUEST);
    let uploads = server.uploads();
    assert_eq!(uploads.len(), 2);
    let counters = server.counters();
    assert_eq!((counters.videos_made, counters.videos_listed, counters.uploads), (1, 1, 2));
    assert!(uploads.iter().all(|upload| (upload.bytes, &*upload.sha256) == (5, sha256)));
    assert!(!format!("{uploads:?}{server:?}").contains(&token));

    for (request, status) in [
        (post("videos", "{}"), 400),
        (post("videos", "no JSON"), 400),
        (post("videos/vi0/source", "x"), 404),
        (post("nothing", ""), 404),
        (request(&server, Method::DELETE, "videos", &token, ""), 405),
        (request(&server, Method::GET, "auth/refresh", "", ""), 405),
    ] {
        let answer = send(&server, request).await.unwrap();
        assert_eq!(answer.status, status);
        assert_eq!(answer.json()["status"], status);
    }
}

#[tokio::test]
async fn reports_rate_limit_then_429() {
    let server = AuthServer::builder().rate_limit(2).start().await.unwrap();
    for remaining in ["1", "0"] {
        let answer = authenticate(&server).await;
        assert_eq!(answer.status, StatusCode::OK);
        assert_eq!(answer.headers["x-ratelimit-limit"], "2");
        assert_eq!(answer.headers["x-ratelimit-remaining"], remaining);
    }
    let limited = authenticate(&server).await;
    assert_eq!(limited.status, StatusCode::TOO_MANY_REQUESTS);
    let seconds: u64 = limited.headers["x-ratelimit-retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=60).contains(&seconds));
}

#[tokio::test]
async fn faults_run_in_order_until_cleared() {
    let server = AuthServer::start().await.unwrap();
    let teapot = Response::builder().status(418).body(Bytes::from_static(b"short")).unwrap();
    server.inject(Route::ApiKeyGrant, Fault::Answer(teapot));
    server.inject(Route::RefreshGrant, Fault::Status(StatusCode::BAD_GATEWAY));
    server.inject(Route::ApiKeyGrant, Fault::Delay(Duration::from_millis(1)));
    let answer = authenticate(&server).await;
    assert_eq!((answer.status.as_u16(), &*answer.body), (418, &b"short"[..]));
    assert_eq!(authenticate(&server).await.status, StatusCode::OK);
    assert_eq!(refresh(&server, "x").await.status, StatusCode::BAD_GATEWAY);

    server.inject_always(Route::Api, Fault::Status(StatusCode::INTERNAL_SERVER_ERROR));
    for _ in 0..3 {
        assert_eq!(list(&server, "").await.status, StatusCode::INTERNAL_SERVER_ERROR);
    }
    server.clear_faults();
    assert_eq!(list(&server, "").await.status, StatusCode::UNAUTHORIZED);
    assert_eq!(server.counters().faults, 6);
}

#[tokio::test]
async fn only_reset_prevents_grant() {
    for (fault, grants) in [(Fault::Reset, 0), (Fault::LoseAnswer, 1), (Fault::Truncate, 1)] {
        let server = AuthServer::start().await.unwrap();
        server.inject(Route::ApiKeyGrant, fault.clone());
        let body = json!({ "apiKey": server.api_key() }).to_string();
        let error = send(&server, request(&server, Method::POST, "auth/api-key", "", &body)).await;
        assert!(error.is_err(), "{fault:?}");
        assert_eq!(server.counters().api_key_grants, grants, "{fault:?}");
    }
}

#[tokio::test]
async fn dripping_answer_arrives_whole() {
    let server = AuthServer::start().await.unwrap();
    server.inject(Route::ApiKeyGrant, Fault::Drip(Duration::from_micros(1)));
    assert_eq!(authenticate(&server).await.text("token_type"), "Bearer");
}

#[tokio::test]
async fn a_server_ends_when_it_is_dropped() {
    let server = AuthServer::start().await.unwrap();
    let uri = server.uri();
    authenticate(&server).await;
    drop(server);
    let listens = || async {
        tokio::net::TcpStream::connect((uri.host().unwrap(), uri.port_u16().unwrap())).await.is_ok()
    };
    while listens().await {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn stores_each_chunk_once() {
    let server = AuthServer::start().await.unwrap();
    let token = authenticate(&server).await.text("access_token");
    let made =
        send(&server, request(&server, Method::POST, "videos", &token, r#"{"title": "t"}"#)).await.unwrap();
    let path = format!("videos/{}/source", made.text("videoId"));
    let video: String = (0..100_000).map(|number| char::from(b'a' + (number % 23) as u8)).collect();
    let put = async |range: &str, content: &str| {
        let mut request = request(&server, Method::POST, &path, &token, content);
        request.headers_mut().insert("content-range", range.parse().unwrap());
        send(&server, request).await.unwrap()
    };
    let chunk = async |first: usize, end: usize| {
        put(&format!("bytes {first}-{}/{}", end - 1, video.len()), &video[first..end]).await.status
    };
    assert_eq!(chunk(40_000, 60_000).await, StatusCode::RANGE_NOT_SATISFIABLE, "the first is missing");
    assert_eq!(chunk(0, 40_000).await, StatusCode::CREATED);
    assert_eq!(chunk(40_000, 80_000).await, StatusCode::CREATED);
    assert_eq!(chunk(40_000, 80_000).await, StatusCode::CREATED, "its answer may have been lost");
    assert_eq!(chunk(90_000, 100_000).await, StatusCode::RANGE_NOT_SATISFIABLE);
    assert!(server.uploads().is_empty());
    assert_eq!(chunk(80_000, 100_000).await, StatusCode::CREATED);
    let whole = send(&server, request(&server, Method::POST, &path, &token, &video)).await.unwrap();
    let uploads = server.uploads();
    assert_eq!(
        (uploads[0].bytes, uploads[0].chunks, &uploads[0].sha256),
        (100_000, 3, &whole.text("sha256"))
    );
    assert_eq!((uploads[1].chunks, &uploads[1].sha256), (1, &uploads[0].sha256));
    assert_eq!(server.counters().uploads, 2);

    for range in ["bytes 0-9/5", "bytes 5-1/10", "part 1/2", "bytes 0-1", "bytes 0-7/20"] {
        assert_eq!(put(range, "nine byte").await.status, StatusCode::BAD_REQUEST, "{range}");
    }
}
