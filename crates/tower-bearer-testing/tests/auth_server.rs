//! The test server follows api.video's contract and OAuth 2.0, and injects the faults that a test asks for.

mod client;

use std::time::{Duration, SystemTime};

use base64::{
    Engine,
    prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD},
};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use ring::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair},
};
use serde_json::{Value, json};
use tower_bearer_testing::{AuthServer, Fault, Route};

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
        Some(certificate) => client::https(certificate).request(request).await,
        None => client::http1().request(request).await,
    };
    let (head, body) = response.map_err(|error| client::chain(&error))?.into_parts();
    let body = body.collect().await.map_err(|error| client::chain(&error))?.to_bytes();
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
    authenticate_with(server, &server.api_key()).await
}

async fn authenticate_with(server: &AuthServer, api_key: &str) -> Answer {
    post(server, "auth/api-key", json!({ "apiKey": api_key })).await
}

async fn refresh(server: &AuthServer, refresh_token: &str) -> Answer {
    post(server, "auth/refresh", json!({ "refreshToken": refresh_token })).await
}

async fn list(server: &AuthServer, token: &str) -> Answer {
    send(server, request(server, Method::GET, "videos", token, "")).await.unwrap()
}

/// A refresh token is spent by its use, and by a new grant.
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

/// An access token ends with its expiry or its revocation.
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

/// A grant revokes the access tokens before it if the test asks for that.
#[tokio::test]
async fn grant_revokes_previous_if_asked() {
    for revoke in [false, true] {
        let server = AuthServer::builder().revoke_previous(revoke).start().await.unwrap();
        let first = authenticate(&server).await.text("access_token");
        authenticate(&server).await;
        assert_eq!(list(&server, &first).await.status == StatusCode::OK, !revoke);
    }
}

/// Two accounts spend only their own tokens.
#[tokio::test]
async fn accounts_spend_only_their_own_tokens() {
    let server = AuthServer::builder().revoke_previous(true).start().await.unwrap();
    let keys = [server.api_key(), server.add_account(), server.add_account()];
    assert!(keys[0] != keys[1] && keys[1] != keys[2] && keys.iter().all(|key| key.starts_with("test-key-")));
    let [first, second, third] = [
        authenticate_with(&server, &keys[0]).await,
        authenticate_with(&server, &keys[1]).await,
        authenticate_with(&server, &keys[2]).await,
    ];
    // A grant ends what this account had before, and nothing of the others.
    let next = refresh(&server, &second.text("refresh_token")).await;
    assert_eq!(next.status, StatusCode::OK);
    assert_eq!(refresh(&server, &second.text("refresh_token")).await.status, StatusCode::BAD_REQUEST);
    let valid =
        async |answer: &Answer| list(&server, &answer.text("access_token")).await.status == StatusCode::OK;
    assert!(valid(&first).await && !valid(&second).await && valid(&next).await && valid(&third).await);

    server.revoke_access_tokens_of(&keys[1]);
    assert!(valid(&first).await && !valid(&next).await && valid(&third).await);
    let healed = refresh(&server, &next.text("refresh_token")).await;
    assert!(valid(&healed).await);

    server.remove_account(&keys[1]);
    assert!(valid(&first).await && !valid(&healed).await && valid(&third).await);
    assert_eq!(refresh(&server, &healed.text("refresh_token")).await.status, StatusCode::BAD_REQUEST);
    assert_eq!(authenticate_with(&server, &keys[1]).await.status, StatusCode::BAD_REQUEST);
    assert_eq!(refresh(&server, &third.text("refresh_token")).await.status, StatusCode::OK);

    // The methods without a key mean the first account, or all.
    server.revoke_refresh_token();
    assert_eq!(refresh(&server, &first.text("refresh_token")).await.status, StatusCode::BAD_REQUEST);
    server.set_api_key("new");
    assert_eq!(authenticate_with(&server, &keys[0]).await.status, StatusCode::BAD_REQUEST);
    let last = [authenticate(&server).await, authenticate_with(&server, &keys[2]).await];
    assert!(valid(&last[0]).await && valid(&last[1]).await);
    server.revoke_access_tokens();
    assert!(!valid(&last[0]).await && !valid(&last[1]).await);
    server.remove_account("new");
    assert_eq!(server.api_key(), "");
    assert_eq!(authenticate_with(&server, "").await.status, StatusCode::BAD_REQUEST);
}

/// Two accounts see only their own videos.
#[tokio::test]
async fn accounts_see_only_their_own_videos() {
    let server = AuthServer::start().await.unwrap();
    let own = authenticate(&server).await.text("access_token");
    let other_key = server.add_account();
    let other = authenticate_with(&server, &other_key).await.text("access_token");
    let post = async |path: &str, token: &str, body: &str| {
        send(&server, request(&server, Method::POST, path, token, body)).await.unwrap()
    };
    let titles = async |token: &str| -> Vec<String> {
        let videos = list(&server, token).await.json();
        let videos = videos["data"].as_array().unwrap();
        videos.iter().map(|video| video["title"].as_str().unwrap().to_owned()).collect()
    };
    let id = post("videos", &own, r#"{"title": "a film"}"#).await.text("videoId");
    assert_eq!((titles(&own).await, titles(&other).await), (vec!["a film".to_owned()], vec![]));
    let path = format!("videos/{id}/source");
    assert_eq!(post(&path, &other, "hello").await.status, StatusCode::NOT_FOUND);
    assert_eq!(post(&path, &own, "hello").await.status, StatusCode::CREATED);

    // A delegated upload goes to the account of the upload token.
    let upload_token = post("upload-tokens", &other, "{}").await.text("token");
    let upload = format!("upload?token={upload_token}");
    assert_eq!(post(&upload, "", "hello").await.status, StatusCode::CREATED);
    assert_eq!((titles(&own).await.len(), titles(&other).await.len()), (1, 1));
    server.remove_account(&other_key);
    assert_eq!(post(&upload, "", "hello").await.status, StatusCode::UNAUTHORIZED);
}

/// A test that names an unknown account panics.
#[tokio::test]
#[should_panic(expected = "an account has the API key")]
async fn unknown_account_is_a_panic() {
    AuthServer::start().await.unwrap().remove_account("no");
}

/// A client creates, lists and uploads videos.
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

/// The server reports its rate limit, and then responds with 429.
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

/// Injected faults happen in order, until they are cleared.
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

/// A fault that resets the connection prevents the grant, and no other fault does.
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

/// A response that is sent byte by byte arrives whole.
#[tokio::test]
async fn dripping_answer_arrives_whole() {
    let server = AuthServer::start().await.unwrap();
    server.inject(Route::ApiKeyGrant, Fault::Drip(Duration::from_micros(1)));
    assert_eq!(authenticate(&server).await.text("token_type"), "Bearer");
}

/// The server ends when it is dropped.
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

/// Sends a request with the account's key as the user of Basic authentication.
async fn send_with_key(server: &AuthServer, key: &str, method: Method, path: &str, body: &str) -> Answer {
    let mut request = request(server, method, path, "", body);
    let authorization = format!("Basic {}", BASE64_STANDARD.encode(format!("{key}:")));
    request.headers_mut().insert("authorization", authorization.parse().unwrap());
    send(server, request).await.unwrap()
}

async fn create(server: &AuthServer, video: Value) -> Answer {
    send_with_key(server, &server.api_key(), Method::POST, "videos", &video.to_string()).await
}

/// The API key is accepted as the user name of Basic authentication.
#[tokio::test]
async fn key_is_accepted_as_basic_user() {
    let server = AuthServer::start().await.unwrap();
    let keys = [server.api_key(), server.add_account()];
    let created = create(&server, json!({ "title": "of the first account" })).await;
    assert_eq!(created.status, StatusCode::CREATED);
    for (key, videos) in keys.iter().zip([1, 0]) {
        let list = send_with_key(&server, key, Method::GET, "videos", "").await;
        assert_eq!(list.json()["pagination"]["itemsTotal"], videos);
    }
    for wrong in ["", "no", "test-key-"] {
        let challenged = send_with_key(&server, wrong, Method::GET, "videos", "").await;
        assert_eq!(
            (challenged.status, challenged.json()["status"].as_u64()),
            (StatusCode::UNAUTHORIZED, Some(401))
        );
        assert_eq!(challenged.headers["www-authenticate"], "Bearer");
    }
    assert_eq!((server.counters().accepted, server.counters().challenged), (3, 3));
}

/// A video has the fields of api.video's published schema, with their defaults.
#[tokio::test]
async fn video_has_fields_of_the_schema() {
    let server = AuthServer::start().await.unwrap();
    let created = create(&server, json!({ "title": "a film" })).await.json();
    let (id, date) = (created["videoId"].as_str().unwrap(), created["createdAt"].as_str().unwrap());
    // In whole seconds of UTC, such as 2019-12-16T08:25:51Z.
    assert_eq!((date.len(), &date[10..11], &date[19..]), (20, "T", "Z"));
    let player = format!("{}/vod/{id}", server.issuer());
    let expected = json!({
        "videoId": id, "title": "a film", "description": "", "public": true, "panoramic": false, "mp4Support": true,
        "tags": [], "metadata": [], "discarded": false, "createdAt": date, "publishedAt": date, "updatedAt": date,
        "source": { "type": "upload", "uri": format!("/videos/{id}/source") },
        "assets": {
            "hls": format!("{player}/hls/manifest.m3u8"), "iframe": format!("<iframe src=\"{player}\"></iframe>"),
            "player": player, "thumbnail": format!("{player}/thumbnail.jpg"),
            "mp4": format!("{player}/mp4/source.mp4"),
        },
    });
    assert_eq!(created, expected);
    let key = server.api_key();
    let get = async |path: &str| send_with_key(&server, &key, Method::GET, path, "").await;
    assert_eq!(get(&format!("videos/{id}")).await.json(), expected);
    assert_eq!(get("videos").await.json()["data"], json!([expected]));

    let given = json!({
        "title": "t", "description": "d", "public": false, "panoramic": true, "mp4Support": false,
        "tags": ["a", "b c"], "metadata": [{ "key": "k", "value": "v" }],
    });
    let created = create(&server, given.clone()).await.json();
    for (name, value) in given.as_object().unwrap() {
        assert_eq!(&created[name], value, "{name}");
    }
    assert!(created["assets"].get("mp4").is_none());

    for (video, name) in
        [(json!({}), "title"), (json!({ "title": 1 }), "title"), (json!({ "title": "t", "tags": "t" }), "")]
    {
        let rejected = create(&server, video).await;
        assert_eq!((rejected.status, rejected.text("name")), (StatusCode::BAD_REQUEST, name.to_owned()));
        assert_eq!(rejected.headers["content-type"], "application/problem+json");
    }
}

/// A deleted video is gone.
#[tokio::test]
async fn deleted_video_is_gone() {
    let server = AuthServer::start().await.unwrap();
    let (key, other) = (server.api_key(), server.add_account());
    let path = format!("videos/{}", create(&server, json!({ "title": "t" })).await.text("videoId"));
    let send =
        async |key: &str, method: Method, path: &str| send_with_key(&server, key, method, path, "x").await;
    for (method, path) in
        [(Method::GET, path.clone()), (Method::GET, format!("{path}/status")), (Method::DELETE, path.clone())]
    {
        let other = send(&other, method, &path).await;
        assert_eq!(other.status, StatusCode::NOT_FOUND, "it is another account's");
    }
    let deleted = send(&key, Method::DELETE, &path).await;
    assert_eq!((deleted.status, deleted.body.len()), (StatusCode::NO_CONTENT, 0));
    assert!(!deleted.headers.contains_key("content-type"));
    for (method, path) in [
        (Method::GET, path.clone()),
        (Method::GET, format!("{path}/status")),
        (Method::POST, format!("{path}/source")),
        (Method::DELETE, path.clone()),
    ] {
        let gone = send(&key, method, &path).await;
        let expected = json!({
            "type": "https://docs.api.video/reference/resource-not-found",
            "title": "The requested resource was not found.", "name": "videoId", "status": 404,
        });
        assert_eq!((gone.status, gone.json()), (StatusCode::NOT_FOUND, expected), "{path}");
    }
    assert_eq!(server.counters().videos_deleted, 1);
}

/// The list of videos has pages, links and filters.
#[tokio::test]
async fn list_has_pages_links_and_filters() {
    let server = AuthServer::start().await.unwrap();
    for (title, tags, author) in
        [("c d", json!(["x", "y"]), "A&B"), ("a", json!(["x"]), "C"), ("b", json!([]), "C")]
    {
        let metadata = json!([{ "key": "author", "value": author }]);
        create(
            &server,
            json!({ "title": title, "description": "of it", "tags": tags, "metadata": metadata }),
        )
        .await;
    }
    let key = server.api_key();
    let list =
        async |query: &str| send_with_key(&server, &key, Method::GET, &format!("videos?{query}"), "").await;
    let titles = async |query: &str| -> Vec<String> {
        let videos = list(query).await.json()["data"].take();
        videos.as_array().unwrap().iter().map(|video| video["title"].as_str().unwrap().to_owned()).collect()
    };
    let all = ["a", "b", "c d"];
    assert_eq!(titles("sortBy=title").await, all);
    assert_eq!(titles("sortBy=title&sortOrder=desc").await, ["c d", "b", "a"]);
    for sort_by in ["createdAt", "publishedAt", "updatedAt"] {
        assert_eq!(titles(&format!("sortBy={sort_by}&sortOrder=asc")).await, ["c d", "a", "b"]);
    }
    assert_eq!(titles("title=c+d").await, ["c d"]);
    assert_eq!(titles("tags[]=x&sortBy=title").await, ["a", "c d"]);
    assert_eq!(titles("tags%5B%5D=x&tags%5B%5D=y").await, ["c d"]);
    assert_eq!(titles("metadata[author]=A%26B").await, ["c d"]);
    assert_eq!(titles("description=no").await, [""; 0]);

    let link = |rel: &str, page: usize| json!({ "rel": rel, "uri": format!("/videos?currentPage={page}&pageSize=2&sortBy=title&title=") });
    let (first, last) = (link("first", 1), link("last", 2));
    let page = list("sortBy=title&pageSize=2&title=").await.json();
    let links = json!([link("self", 1), first, link("next", 2), last]);
    let expected = json!({
        "currentPage": 1, "currentPageItems": 2, "pageSize": 2, "pagesTotal": 2, "itemsTotal": 3, "links": links
    });
    assert_eq!(page["pagination"], expected);
    // A link leads to the page that it names.
    let next = links[2]["uri"].as_str().unwrap().strip_prefix("/videos?").unwrap();
    let page = list(next).await.json();
    assert_eq!((&page["data"][0]["title"], page["data"].as_array().unwrap().len()), (&json!("c d"), 1));
    assert_eq!(page["pagination"]["links"], json!([link("self", 2), first, link("previous", 1), last]));

    let empty = list("title=no").await.json();
    assert_eq!(empty["pagination"]["pagesTotal"], 1);
    assert_eq!(empty["pagination"]["links"].as_array().unwrap().len(), 3);
    assert_eq!(titles("currentPage=3&pageSize=2").await, [""; 0]);
    for (query, name) in [
        ("currentPage=0", "currentPage"),
        ("currentPage=x", "currentPage"),
        ("pageSize=0", "pageSize"),
        ("pageSize=101", "pageSize"),
        ("sortBy=size", "sortBy"),
        ("sortOrder=up", "sortOrder"),
    ] {
        let rejected = list(query).await;
        assert_eq!((rejected.status, rejected.text("name")), (StatusCode::BAD_REQUEST, name.to_owned()));
    }
}

/// A part as api.video's Node client sends it: the name of the field is the name of the file.
async fn send_part(
    server: &AuthServer,
    path: &str,
    range: &str,
    content: &str,
    video_id: Option<&str>,
) -> Answer {
    let video_id = video_id.map_or_else(String::new, |id| {
        format!("\r\n--b\r\ncontent-disposition: form-data; name=\"videoId\"\r\n\r\n{id}")
    });
    let form = format!(
        "--b\r\ncontent-disposition: form-data; name=\"a.mp4\"; filename=\"a.mp4\"\r\n\r\n{content}{video_id}\r\n--b--\r\n"
    );
    let token = if path.starts_with("upload") {
        String::new()
    } else {
        authenticate(server).await.text("access_token")
    };
    let mut request = request(server, Method::POST, path, &token, &form);
    request.headers_mut().insert("content-type", "multipart/form-data; boundary=b".parse().unwrap());
    request.headers_mut().insert("content-range", range.parse().unwrap());
    send(server, request).await.unwrap()
}

const SHA256_OF_HELLO: &str = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";

/// The parts of an upload arrive in any order.
#[tokio::test]
async fn parts_arrive_in_any_order() {
    let server = AuthServer::start().await.unwrap();
    for parts in [
        [("part 1/3", "he"), ("part 2/3", "l"), ("part 3/3", "lo")],
        [("part 3/3", "lo"), ("part 1/3", "he"), ("part 2/3", "l")],
        [("part 2/*", "l"), ("part 3/3", "lo"), ("part 1/*", "he")],
        // The number of parts is known only at the end.
        [("part 1/*", "he"), ("part 2/*", "l"), ("part 3/3", "lo")],
    ] {
        let id = create(&server, json!({ "title": "t" })).await.text("videoId");
        let path = format!("videos/{id}/source");
        let send = async |range: &str, content: &str| send_part(&server, &path, range, content, None).await;
        let before = server.uploads().len();
        for (range, content) in &parts[..2] {
            for _ in 0..2 {
                let taken = send(range, content).await;
                assert_eq!((taken.status, taken.text("videoId")), (StatusCode::CREATED, id.clone()));
                assert_eq!(taken.json()["sha256"], Value::Null);
            }
        }
        assert_eq!(server.uploads().len(), before);
        for _ in 0..2 {
            let last = send(parts[2].0, parts[2].1).await;
            assert_eq!((last.status, &*last.text("sha256")), (StatusCode::CREATED, SHA256_OF_HELLO));
        }
        let uploads = server.uploads();
        assert_eq!(uploads.len(), before + 1, "a part that is sent again is not another upload");
        let upload = uploads.last().unwrap();
        assert_eq!((&upload.video_id, upload.bytes, upload.chunks), (&id, 5, 3));
        assert_eq!(upload.sha256, SHA256_OF_HELLO);
        assert_eq!(server.counters().uploads, uploads.len() as u64);
    }

    // The client learns only after the response that the part was the last.
    let id = create(&server, json!({ "title": "t" })).await.text("videoId");
    let path = format!("videos/{id}/source");
    assert_eq!(send_part(&server, &path, "part 1/*", "hello", None).await.json()["sha256"], Value::Null);
    assert_eq!(send_part(&server, &path, "part 1/1", "hello", None).await.text("sha256"), SHA256_OF_HELLO);

    let id = create(&server, json!({ "title": "t" })).await.text("videoId");
    let path = format!("videos/{id}/source");
    for (range, status) in [
        ("part 3/*", StatusCode::CREATED),
        ("part 1/2", StatusCode::BAD_REQUEST),
        ("part 1/4", StatusCode::CREATED),
        ("part 2/5", StatusCode::BAD_REQUEST),
        ("part 5/*", StatusCode::BAD_REQUEST),
    ] {
        assert_eq!(send_part(&server, &path, range, "x", None).await.status, status, "{range}");
    }
}

/// The status of a video says which bytes have arrived.
#[tokio::test]
async fn status_says_what_has_arrived() {
    let server = AuthServer::start().await.unwrap();
    let (key, token) = (server.api_key(), authenticate(&server).await.text("access_token"));
    let new_video =
        async || format!("videos/{}", create(&server, json!({ "title": "t" })).await.text("videoId"));
    let ingest = async |path: &str| {
        let status = send_with_key(&server, &key, Method::GET, &format!("{path}/status"), "").await.json();
        assert_eq!(status["encoding"], json!({ "playable": false, "qualities": [], "metadata": {} }));
        status["ingest"].clone()
    };
    let path = new_video().await;
    let source = format!("{path}/source");
    assert_eq!(ingest(&path).await, json!({ "filesize": null, "receivedBytes": [] }));
    send_part(&server, &source, "part 3/*", "lo", None).await;
    send_part(&server, &source, "part 1/*", "he", None).await;
    let parts = |parts: &[u8], total: Option<u8>| json!({ "parts": parts, "total": total });
    let expected = json!({ "status": "uploading", "filesize": null, "receivedParts": parts(&[1, 3], None) });
    assert_eq!(ingest(&path).await, expected);
    send_part(&server, &source, "part 2/3", "l", None).await;
    let expected =
        json!({ "status": "uploaded", "filesize": 5, "receivedParts": parts(&[1, 2, 3], Some(3)) });
    assert_eq!(ingest(&path).await, expected);

    let path = new_video().await;
    let source = format!("{path}/source");
    let send = async |range: Option<&str>, content: &str| {
        let mut request = request(&server, Method::POST, &source, &token, content);
        range.map(|range| request.headers_mut().insert("content-range", range.parse().unwrap()));
        send(&server, request).await.unwrap().status
    };
    // A range that is rejected leaves nothing.
    assert_eq!(send(Some("bytes 2-4/5"), "llo").await, StatusCode::RANGE_NOT_SATISFIABLE);
    assert_eq!(ingest(&path).await["receivedBytes"], json!([]));
    assert_eq!(send(Some("bytes 0-1/5"), "he").await, StatusCode::CREATED);
    let range = json!([{ "from": 0, "to": 1, "total": 5 }]);
    assert_eq!(ingest(&path).await, json!({ "status": "uploading", "filesize": 5, "receivedBytes": range }));
    assert_eq!(send(None, "hello").await, StatusCode::CREATED);
    let range = json!([{ "from": 0, "to": 4, "total": 5 }]);
    assert_eq!(ingest(&path).await, json!({ "status": "uploaded", "filesize": 5, "receivedBytes": range }));
}

/// A delegated upload continues the video that it has begun.
#[tokio::test]
async fn delegated_upload_continues_its_video() {
    let server = AuthServer::start().await.unwrap();
    let (key, other) = (server.api_key(), server.add_account());
    let token = async |key: &str, ttl: Value| {
        let body = json!({ "ttl": ttl }).to_string();
        send_with_key(&server, key, Method::POST, "upload-tokens", &body).await
    };
    let created = token(&key, json!(3600)).await.json();
    assert_eq!((created["ttl"].as_u64(), created["createdAt"].as_str().unwrap().len()), (Some(3600), 20));
    assert!(created["expiresAt"].as_str().unwrap() > created["createdAt"].as_str().unwrap());
    let unlimited = token(&key, json!(0)).await.json();
    assert!(unlimited.get("expiresAt").is_none());
    for ttl in [json!(-1), json!("1"), json!(1_u64 << 31)] {
        let rejected = token(&key, ttl).await;
        assert_eq!((rejected.status, rejected.text("name")), (StatusCode::BAD_REQUEST, "ttl".to_owned()));
    }

    for body in ["", "{", "[]"] {
        let rejected = send_with_key(&server, &key, Method::POST, "upload-tokens", body).await;
        assert_eq!(rejected.status, StatusCode::BAD_REQUEST, "{body:?}");
    }

    let path = format!("upload?token={}", created["token"].as_str().unwrap());
    let first = send_part(&server, &path, "part 1/*", "hel", None).await;
    let id = first.text("videoId");
    assert_eq!((first.status, first.text("title")), (StatusCode::CREATED, "a.mp4".to_owned()));
    let others_token = token(&other, json!(0)).await.text("token");
    let others_path = format!("upload?token={others_token}");
    for (path, id) in [(&path, "vi0"), (&others_path, &*id)] {
        assert_eq!(send_part(&server, path, "part 2/2", "lo", Some(id)).await.status, StatusCode::NOT_FOUND);
    }
    let last = send_part(&server, &path, "part 2/2", "lo", Some(&id)).await;
    assert_eq!((last.text("videoId"), &*last.text("sha256")), (id.clone(), SHA256_OF_HELLO));
    // Without the ID of the first response, a part belongs to a new video.
    let lost = send_part(&server, &path, "part 2/2", "lo", None).await;
    assert_ne!(lost.text("videoId"), id);
    let counters = server.counters();
    assert_eq!((counters.delegated_uploads, counters.uploads, counters.upload_tokens), (2, 1, 3));
}

/// A chunk that arrives twice is stored once.
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

    for range in [
        "bytes 0-9/5",
        "bytes 5-1/10",
        "bytes 0-1",
        "bytes 0-7/20",
        "part 0/2",
        "part 3/2",
        "part 1",
        "part one/2",
        "part +1/2",
        "bytes +0-8/9",
        "item 1/2",
    ] {
        assert_eq!(put(range, "nine byte").await.status, StatusCode::BAD_REQUEST, "{range}");
    }

    // A whole range that is sent again is no other upload, and a range of another length does not continue it.
    for _ in 0..2 {
        assert_eq!(put("bytes 0-8/9", "nine byte").await.status, StatusCode::CREATED);
    }
    assert_eq!(server.uploads().len(), 3);
    assert_eq!(put("bytes 0-8/20", "nine byte").await.status, StatusCode::CREATED);
    assert_eq!(put("bytes 9-17/18", "nine byte").await.status, StatusCode::RANGE_NOT_SATISFIABLE);
}

const EXCHANGE: &str = "urn:ietf:params:oauth:grant-type:token-exchange";
const JWT_BEARER: &str = "urn:ietf:params:oauth:grant-type:jwt-bearer";
const JWT_CLIENT: &str = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer";
const ACCESS_TOKEN: &str = "urn:ietf:params:oauth:token-type:access_token";
const JWT: &str = "urn:ietf:params:oauth:token-type:jwt";

/// A request to the token endpoint. The values of the form are sent as they are.
fn token_request(server: &AuthServer, form: &[(&str, &str)]) -> Request<Full<Bytes>> {
    let body: Vec<_> = form.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let mut request = request(server, Method::POST, "oauth/token", "", &body.join("&"));
    request.headers_mut().insert("content-type", "application/x-www-form-urlencoded".parse().unwrap());
    request
}

async fn token(server: &AuthServer, form: &[(&str, &str)]) -> Answer {
    send(server, token_request(server, form)).await.unwrap()
}

/// A request of the client, which authenticates with its secret in the form.
async fn client_token(server: &AuthServer, form: &[(&str, &str)]) -> Answer {
    let (id, secret) = (server.client_id(), server.client_secret());
    token(server, &[form, &[("client_id", &id), ("client_secret", &secret)]].concat()).await
}

async fn basic_token(server: &AuthServer, authorization: &str) -> Answer {
    let mut request = token_request(server, &[("grant_type", "client_credentials")]);
    request.headers_mut().insert("authorization", authorization.parse().unwrap());
    send(server, request).await.unwrap()
}

fn basic(id: &str, secret: &str) -> String {
    format!("Basic {}", BASE64_STANDARD.encode(format!("{id}:{secret}")))
}

async fn refresh_login(server: &AuthServer, refresh_token: &str) -> Answer {
    let id = server.client_id();
    let form = [("grant_type", "refresh_token"), ("refresh_token", refresh_token), ("client_id", &id)];
    token(server, &form).await
}

async fn jwt_bearer(server: &AuthServer, assertion: &str) -> Answer {
    token(server, &[("grant_type", JWT_BEARER), ("assertion", assertion)]).await
}

fn seconds_from_now(seconds: i64) -> i64 {
    i64::try_from(SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs()).unwrap() + seconds
}

/// Claims that the server accepts, except that `changed` replaces some of them.
fn claims(server: &AuthServer, changed: Value) -> Value {
    let id = server.client_id();
    let exp = seconds_from_now(60);
    let mut claims = json!({ "iss": id, "sub": id, "aud": server.token_endpoint(), "exp": exp, "jti": "1" });
    claims.as_object_mut().unwrap().extend(changed.as_object().unwrap().clone());
    claims
}

fn signed(key: &str, header: &Value, claims: &Value) -> String {
    let der: String = key.lines().filter(|line| !line.starts_with('-')).collect();
    let der = BASE64_STANDARD.decode(der).unwrap();
    let random = SystemRandom::new();
    let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &der, &random).unwrap();
    let [header, claims] = [header, claims].map(|part| BASE64_URL_SAFE_NO_PAD.encode(part.to_string()));
    let signed = format!("{header}.{claims}");
    let signature = key.sign(&random, signed.as_bytes()).unwrap();
    format!("{signed}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature))
}

fn jwt(server: &AuthServer, changed: Value) -> String {
    signed(&server.signing_key(), &json!({ "alg": "ES256" }), &claims(server, changed))
}

/// JWTs that the server does not accept, with what is wrong.
fn bad_jwts(server: &AuthServer) -> Vec<(&'static str, String)> {
    let (key, good) = (server.signing_key(), claims(server, json!({})));
    let other = rcgen::KeyPair::generate().unwrap().serialize_pem();
    vec![
        ("no JWT", "x".to_owned()),
        ("no JSON", "e.e.e".to_owned()),
        ("no signature", jwt(server, json!({})).rsplit_once('.').unwrap().0.to_owned() + "."),
        ("another key", signed(&other, &json!({ "alg": "ES256" }), &good)),
        ("another algorithm", signed(&key, &json!({ "alg": "none" }), &good)),
        ("a critical extension", signed(&key, &json!({ "alg": "ES256", "crit": ["b64"] }), &good)),
        ("another audience", jwt(server, json!({ "aud": "https://example.com" }))),
        ("no audience", jwt(server, json!({ "aud": [] }))),
        ("expired", jwt(server, json!({ "exp": seconds_from_now(-1) }))),
        ("no expiry", jwt(server, json!({ "exp": null }))),
        ("not valid yet", jwt(server, json!({ "nbf": seconds_from_now(60) }))),
    ]
}

fn assert_error(answer: &Answer, code: &str, what: &str) {
    assert_eq!(answer.text("error"), code, "{what}");
    assert!(!answer.text("error_description").is_empty());
    assert_eq!(answer.status, if code == "invalid_client" { 401 } else { 400 }, "{what}");
    assert_eq!(answer.headers["cache-control"], "no-store");
}

/// The client's credentials give an access token and no refresh token.
#[tokio::test]
async fn client_credentials_give_access_token_only() {
    for tls in [false, true] {
        let server = AuthServer::builder().tls(tls).client("an id", "a+b%&=").start().await.unwrap();
        let post = [
            ("grant_type", "client_credentials"),
            ("client_id", "an+id"),
            ("client_secret", "a%2Bb%25%26%3D"),
        ];
        let answers =
            [basic_token(&server, &basic("an+id", "a%2Bb%25%26%3D")).await, token(&server, &post).await];
        for answer in answers {
            assert_eq!(answer.status, StatusCode::OK);
            assert_eq!(answer.headers["cache-control"], "no-store");
            let access_token = answer.text("access_token");
            let expected =
                json!({ "access_token": access_token, "token_type": "Bearer", "expires_in": 3600 });
            assert_eq!(answer.json(), expected);
            assert_eq!(list(&server, &access_token).await.status, StatusCode::OK);
        }
        assert_eq!(server.counters().client_credentials_grants, 2);
    }
}

/// The server rejects an unknown client, or a wrong secret.
#[tokio::test]
async fn unknown_client_is_rejected() {
    let server = AuthServer::start().await.unwrap();
    let (id, secret) = (server.client_id(), server.client_secret());
    assert!(secret.starts_with("test-secret-"));
    assert_eq!(basic_token(&server, &basic(&id, &secret)).await.status, StatusCode::OK);
    let bad = [basic("x", &secret), basic(&id, "x"), basic(&id, &format!("{secret}&")), "Basic x".to_owned()];
    for bad in [&bad[..], &[basic(&id, &secret).replace("Basic", "Bearer")]].concat() {
        let answer = basic_token(&server, &bad).await;
        assert_error(&answer, "invalid_client", &bad);
        assert_eq!(answer.headers["www-authenticate"], "Basic realm=\"token\"");
    }
    let assertion = jwt(&server, json!({}));
    let forms: [&[(&str, &str)]; 7] = [
        &[],
        &[("client_id", &id)],
        &[("client_id", "x")],
        &[("client_secret", &secret)],
        &[("client_id", "x"), ("client_secret", &secret)],
        &[("client_id", &id), ("client_secret", "x")],
        &[("client_assertion", &assertion), ("client_assertion_type", "x")],
    ];
    for form in forms {
        let answer = token(&server, &[&[("grant_type", "client_credentials")], form].concat()).await;
        assert_error(&answer, "invalid_client", &format!("{form:?}"));
        assert!(!answer.headers.contains_key("www-authenticate"));
    }
    server.set_client_secret("new");
    assert_error(&basic_token(&server, &basic(&id, &secret)).await, "invalid_client", "the old secret");
    assert_eq!(basic_token(&server, &basic(&id, "new")).await.status, StatusCode::OK);
    let counters = server.counters();
    assert_eq!((counters.rejected_clients, counters.rejected_oauth_grants), (13, 0));
}

/// A client's assertion is valid once.
#[tokio::test]
async fn client_assertion_is_valid_once() {
    let server = AuthServer::start().await.unwrap();
    let authenticate = async |assertion: &str| {
        let client = [("client_assertion_type", JWT_CLIENT), ("client_assertion", assertion)];
        token(&server, &[&[("grant_type", "client_credentials")], &client[..]].concat()).await
    };
    for audience in [json!(server.token_endpoint()), json!(["x", server.issuer()])] {
        let jti = audience.to_string();
        let assertion = jwt(&server, json!({ "aud": audience, "jti": jti }));
        assert_eq!(authenticate(&assertion).await.status, StatusCode::OK);
        assert_error(&authenticate(&assertion).await, "invalid_client", "a replay");
    }
    for changed in [json!({ "iss": "x" }), json!({ "sub": "x" }), json!({ "jti": null })] {
        let what = changed.to_string();
        assert_error(&authenticate(&jwt(&server, changed)).await, "invalid_client", &what);
    }
    for (what, bad) in bad_jwts(&server) {
        assert_error(&authenticate(&bad).await, "invalid_client", what);
    }
    assert_eq!(server.counters().client_credentials_grants, 2);
}

/// The server rejects a token request that is not valid.
#[tokio::test]
async fn malformed_token_request_is_rejected() {
    let server = AuthServer::start().await.unwrap();
    let grant = ("grant_type", "client_credentials");
    let cases: [(&[_], &str); 12] = [
        (&[], "invalid_request"),
        (&[("grant_type", "")], "invalid_request"),
        (&[grant, grant], "invalid_request"),
        (&[grant, ("client_assertion", "x")], "invalid_request"),
        (&[("grant_type", "password")], "unsupported_grant_type"),
        (&[("grant_type", "refresh_token")], "invalid_request"),
        (&[("grant_type", EXCHANGE)], "invalid_request"),
        (&[("grant_type", JWT_BEARER)], "invalid_request"),
        (&[grant, ("scope", "a++b")], "invalid_scope"),
        (&[grant, ("scope", "a%22")], "invalid_scope"),
        (&[grant, ("resource", "videos")], "invalid_target"),
        (&[grant, ("resource", "https://a.example/%23b")], "invalid_target"),
    ];
    for (form, code) in cases {
        assert_error(&client_token(&server, form).await, code, &format!("{form:?}"));
    }
    let mut json = token_request(&server, &[grant]);
    json.headers_mut().insert("content-type", "application/json".parse().unwrap());
    assert_error(&send(&server, json).await.unwrap(), "invalid_request", "no form");
    let long = "x".repeat(100_000);
    assert_error(&token(&server, &[grant, ("scope", &long)]).await, "invalid_request", "too long");
    assert_eq!(server.counters().rejected_oauth_grants, 14);

    for (method, path) in
        [(Method::GET, "oauth/token"), (Method::POST, ".well-known/oauth-authorization-server")]
    {
        let answer = send(&server, request(&server, method, path, "", "")).await.unwrap();
        assert_eq!(answer.status, StatusCode::METHOD_NOT_ALLOWED);
    }
}

/// A refresh token that is presented twice ends its login.
#[tokio::test]
async fn reuse_of_refresh_token_revokes_family() {
    let server = AuthServer::start().await.unwrap();
    let (login, other) = (server.log_in(), server.log_in());
    assert!(login.starts_with("def50200"));
    let first = refresh_login(&server, &login).await;
    assert_eq!(first.status, StatusCode::OK);
    assert_eq!(first.headers["cache-control"], "no-store");
    let second = refresh_login(&server, &first.text("refresh_token")).await;
    let others = refresh_login(&server, &other).await;
    let access_token = second.text("access_token");
    assert_eq!(list(&server, &access_token).await.status, StatusCode::OK);

    assert_error(&refresh_login(&server, &login).await, "invalid_grant", "reuse");
    let next = second.text("refresh_token");
    assert_error(&refresh_login(&server, &next).await, "invalid_grant", "the family is revoked");
    assert_error(&refresh_login(&server, "x").await, "invalid_grant", "unknown");
    assert_eq!(list(&server, &access_token).await.status, StatusCode::UNAUTHORIZED);
    assert_eq!(list(&server, &others.text("access_token")).await.status, StatusCode::OK);
    assert_eq!(refresh_login(&server, &others.text("refresh_token")).await.status, StatusCode::OK);
    let counters = server.counters();
    assert_eq!((counters.oauth_refresh_grants, counters.reused_refresh_tokens), (4, 1));
    assert_eq!((counters.rejected_oauth_grants, counters.rejected_refresh_tokens), (3, 0));
}

/// A spent refresh token is accepted during the grace period.
#[tokio::test(start_paused = true)]
async fn spent_refresh_token_is_accepted_during_grace() {
    let grace = Duration::from_secs(30);
    let server = AuthServer::builder().refresh_token_grace(grace).start().await.unwrap();
    let login = server.log_in();
    let first = refresh_login(&server, &login).await.text("refresh_token");
    tokio::time::advance(grace - Duration::from_millis(1)).await;
    let further = refresh_login(&server, &login).await.text("refresh_token");
    assert_ne!(first, further);
    // Both successors are valid.
    for successor in [first, further] {
        assert_eq!(refresh_login(&server, &successor).await.status, StatusCode::OK);
    }
    assert_eq!(server.counters().reused_refresh_tokens, 0);
    tokio::time::advance(Duration::from_millis(1)).await;
    assert_error(&refresh_login(&server, &login).await, "invalid_grant", "reuse");
    assert_eq!(server.counters().reused_refresh_tokens, 1);
}

/// Without rotation, the refresh token stays the same.
#[tokio::test]
async fn without_rotation_refresh_token_stays() {
    let server = AuthServer::builder().rotate(false).start().await.unwrap();
    let login = server.log_in();
    for _ in 0..2 {
        let answer = refresh_login(&server, &login).await;
        assert_eq!(answer.status, StatusCode::OK);
        assert!(answer.json().get("refresh_token").is_none());
    }
    // The client may also authenticate.
    let form = [("grant_type", "refresh_token"), ("refresh_token", &*login)];
    assert_eq!(client_token(&server, &form).await.status, StatusCode::OK);
    assert_error(&token(&server, &form).await, "invalid_client", "no client");
}

/// The access tokens of a login outlive its revocation.
#[tokio::test]
async fn revoked_logins_keep_access_tokens() {
    let server = AuthServer::start().await.unwrap();
    let answer = refresh_login(&server, &server.log_in()).await;
    server.revoke_refresh_token();
    let answer = refresh_login(&server, &answer.text("refresh_token")).await;
    server.revoke_logins();
    let refresh_token = answer.text("refresh_token");
    assert_error(&refresh_login(&server, &refresh_token).await, "invalid_grant", "revoked");
    assert_eq!(server.counters().reused_refresh_tokens, 0);
    assert_eq!(list(&server, &answer.text("access_token")).await.status, StatusCode::OK);
    assert_eq!(refresh_login(&server, &server.log_in()).await.status, StatusCode::OK);
}

/// OAuth access tokens expire and are revoked.
#[tokio::test]
async fn oauth_access_tokens_expire_and_are_revoked() {
    let server = AuthServer::builder().revoke_previous(true).start().await.unwrap();
    let form = [("grant_type", "client_credentials")];
    let first = client_token(&server, &form).await.text("access_token");
    let second = client_token(&server, &form).await.text("access_token");
    assert_eq!(list(&server, &first).await.status, StatusCode::UNAUTHORIZED);
    assert_eq!(list(&server, &second).await.status, StatusCode::OK);
    server.revoke_access_tokens();
    assert_eq!(list(&server, &second).await.status, StatusCode::UNAUTHORIZED);
    server.set_token_lifetime(Duration::ZERO);
    let expired = client_token(&server, &form).await;
    assert_eq!(expired.json()["expires_in"], 0);
    assert_eq!(list(&server, &expired.text("access_token")).await.status, StatusCode::UNAUTHORIZED);
}

/// The server exchanges a JWT or an access token.
#[tokio::test]
async fn exchanges_jwt_or_access_token() {
    let server = AuthServer::start().await.unwrap();
    let exchange = async |subject: &str, token_type: &str, more: &[(&str, &str)]| {
        let form = [("grant_type", EXCHANGE), ("subject_token", subject), ("subject_token_type", token_type)];
        client_token(&server, &[&form, more].concat()).await
    };
    let good = jwt(&server, json!({}));
    let first = exchange(&good, JWT, &[]).await;
    assert_eq!((first.status, first.text("issued_token_type")), (StatusCode::OK, ACCESS_TOKEN.to_owned()));
    assert!(first.json().get("refresh_token").is_none());
    let subject = first.text("access_token");
    let targets =
        [("audience", "a"), ("audience", "b"), ("resource", "https://a.example"), ("resource", "urn:b")];
    let second = exchange(&subject, ACCESS_TOKEN, &targets).await;
    assert_eq!(list(&server, &second.text("access_token")).await.status, StatusCode::OK);
    let actor = [("actor_token", &*good), ("actor_token_type", JWT), ("requested_token_type", ACCESS_TOKEN)];
    assert_eq!(exchange(&subject, ACCESS_TOKEN, &actor).await.status, StatusCode::OK);
    assert_eq!(server.counters().token_exchanges, 3);

    let bad: [(&str, &str, &[_]); 6] = [
        ("x", ACCESS_TOKEN, &[]),
        (&subject, JWT, &[]),
        (&subject, "urn:x", &[]),
        (&subject, ACCESS_TOKEN, &[("actor_token", "x")]),
        (&subject, ACCESS_TOKEN, &[("actor_token", "x"), ("actor_token_type", JWT)]),
        (&subject, ACCESS_TOKEN, &[("requested_token_type", JWT)]),
    ];
    for (subject, token_type, more) in bad {
        let answer = exchange(subject, token_type, more).await;
        assert_error(&answer, "invalid_request", &format!("{token_type} {more:?}"));
    }
    for (what, bad) in bad_jwts(&server) {
        assert_error(&exchange(&bad, JWT, &[]).await, "invalid_request", what);
    }
    let id = server.client_id();
    let form = [
        ("grant_type", EXCHANGE),
        ("subject_token", &*good),
        ("subject_token_type", JWT),
        ("client_id", &*id),
    ];
    assert_error(&token(&server, &form).await, "invalid_client", "a public client");
    assert_eq!(server.counters().token_exchanges, 3);
}

/// A JWT bearer grant needs no client.
#[tokio::test]
async fn jwt_bearer_needs_no_client() {
    let server = AuthServer::start().await.unwrap();
    let assertion = jwt(&server, json!({ "aud": server.issuer() }));
    let answer = jwt_bearer(&server, &assertion).await;
    assert_eq!(list(&server, &answer.text("access_token")).await.status, StatusCode::OK);
    let form = [("grant_type", JWT_BEARER), ("assertion", &*assertion)];
    assert_eq!(client_token(&server, &form).await.status, StatusCode::OK);
    assert_eq!(server.counters().jwt_bearer_grants, 2);
    let incomplete = ["iss", "sub"].map(|claim| (claim, jwt(&server, json!({ claim: null }))));
    for (what, bad) in bad_jwts(&server).into_iter().chain(incomplete) {
        assert_error(&jwt_bearer(&server, &bad).await, "invalid_grant", what);
    }
    assert_eq!(server.counters().jwt_bearer_grants, 2);
}

/// The metadata of the issuer names the token endpoint.
#[tokio::test]
async fn metadata_names_token_endpoint() {
    for tls in [false, true] {
        let server = AuthServer::builder().tls(tls).start().await.unwrap();
        let get = request(&server, Method::GET, ".well-known/oauth-authorization-server", "", "");
        let metadata = send(&server, get).await.unwrap().json();
        assert_eq!(server.uri().to_string(), format!("{}/", server.issuer()));
        assert_eq!(metadata["issuer"], server.issuer());
        assert_eq!(metadata["token_endpoint"], server.token_endpoint());
        assert_eq!(server.token_endpoint(), format!("{}/oauth/token", server.issuer()));
        let grants =
            json!(["authorization_code", "client_credentials", "refresh_token", EXCHANGE, JWT_BEARER]);
        assert_eq!(metadata["grant_types_supported"], grants);
        let methods = json!(["client_secret_basic", "client_secret_post", "private_key_jwt", "none"]);
        assert_eq!(metadata["token_endpoint_auth_methods_supported"], methods);
        assert_eq!(server.counters().metadata_requests, 1);
    }
}

/// Faults can be injected into the OAuth routes.
#[tokio::test]
async fn faults_apply_to_oauth_routes() {
    let server = AuthServer::builder().refresh_token_grace(Duration::MAX).start().await.unwrap();
    let login = server.log_in();
    let answer = Response::builder().status(418).body(Bytes::from_static(b"short")).unwrap();
    for (fault, status, grants) in [
        (Fault::Status(StatusCode::BAD_GATEWAY), Some(502), 0),
        (Fault::Answer(answer), Some(418), 0),
        (Fault::Delay(Duration::from_millis(1)), Some(200), 1),
        (Fault::Reset, None, 1),
        (Fault::LoseAnswer, None, 2),
        (Fault::Truncate, None, 3),
        (Fault::Drip(Duration::from_micros(1)), Some(200), 4),
    ] {
        server.inject(Route::OAuthToken, fault.clone());
        let id = server.client_id();
        let form = [("grant_type", "refresh_token"), ("refresh_token", &*login), ("client_id", &*id)];
        let answer = send(&server, token_request(&server, &form)).await;
        assert_eq!(answer.ok().map(|answer| answer.status.as_u16()), status, "{fault:?}");
        assert_eq!(server.counters().oauth_refresh_grants, grants, "{fault:?}");
    }
    server.inject_always(Route::Metadata, Fault::Status(StatusCode::NOT_FOUND));
    let get = request(&server, Method::GET, ".well-known/oauth-authorization-server", "", "");
    assert_eq!(send(&server, get).await.unwrap().status, StatusCode::NOT_FOUND);
    assert_eq!((server.counters().metadata_requests, server.counters().faults), (0, 8));
}

/// The recorded token requests contain no secret.
#[tokio::test]
async fn token_requests_omit_secrets() {
    let server = AuthServer::start().await.unwrap();
    let kept = [
        ("grant_type", "client_credentials"),
        ("scope", "a"),
        ("resource", "urn:a"),
        ("resource", "urn:b"),
        ("audience", "b"),
        ("claims", "c"),
        ("acr_values", "d"),
        ("x-unknown", "e"),
    ];
    let secrets = ["assertion", "client_assertion", "refresh_token", "subject_token", "actor_token"];
    let form: Vec<_> = kept.into_iter().chain(secrets.map(|name| (name, "secret"))).collect();
    client_token(&server, &form).await;
    let id = server.client_id();
    let expected: Vec<_> = kept
        .iter()
        .chain(&[("client_id", &*id)])
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect();
    assert_eq!(server.token_requests(), [expected]);
    for number in 1..=64 {
        token(&server, &[("number", &number.to_string())]).await;
    }
    let newest: Vec<_> = server.token_requests().iter().map(|form| form[0].1.clone()).collect();
    assert_eq!(newest, (1..=64).map(|number| number.to_string()).collect::<Vec<_>>());
}

/// The `Debug` output of the server contains no OAuth secret.
#[tokio::test]
async fn debug_output_has_no_oauth_secret() {
    let builder = AuthServer::builder().client("id", "client-secret");
    assert!(!format!("{builder:?}").contains("client-secret"));
    let server = builder.start().await.unwrap();
    let login = server.log_in();
    let answer = refresh_login(&server, &login).await;
    let key = server.signing_key();
    assert!(key.starts_with("-----BEGIN PRIVATE KEY-----"));
    let debug = format!("{server:?}");
    assert!(debug.contains("oauth_refresh_grants: 1"));
    let key = key.lines().nth(1).unwrap();
    for secret in ["client-secret", &login, &answer.text("access_token"), &answer.text("refresh_token"), key]
    {
        assert!(!debug.contains(secret));
    }
}
