//! `StaticToken`, which is never renewed, and `TokenFile`, whose file another process rotates.

#[path = "support/folder.rs"]
mod folder;
mod support;

use std::{fs, path::Path, time::Duration};

use folder::Folder;
use http::StatusCode;
use support::{Api, at_once, chain, get};
use tokio::time::{advance, sleep};
use tower::{Layer, ServiceExt};
use tower_bearer::{BearerAuthLayer, Error, StaticToken, TokenFile, TokenProvider, TokenSource};

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);

/// Replaces the file by renaming a new one, as a rotation does.
fn rotate(path: &Path, content: impl AsRef<[u8]>) {
    let new = path.with_extension("new");
    fs::write(&new, content).unwrap();
    fs::rename(new, path).unwrap();
}

#[tokio::test(start_paused = true)]
async fn static_token_is_never_replaced() {
    let api = Api::default();
    api.accept("personal-token");
    let provider = TokenProvider::new(StaticToken::new("personal-token"));
    let service = BearerAuthLayer::with_provider(provider.clone()).layer(api.service());
    for _ in 0..3 {
        assert_eq!(service.clone().oneshot(get()).await.unwrap().status(), StatusCode::OK);
        advance(1000 * 24 * 60 * MINUTE).await;
    }
    assert_eq!(provider.status().refreshes, 1);

    // Every challenge is the response, and no further refresh starts.
    api.revoke_all();
    for _ in 0..3 {
        assert_eq!(service.clone().oneshot(get()).await.unwrap().status(), StatusCode::UNAUTHORIZED);
    }
    assert_eq!(provider.status().refreshes, 2, "one after the first challenge, then the cool-down");
    let token = provider.token().await.unwrap();
    let error = provider.refresh(&token).await.unwrap_err();
    assert!(!error.is_transient() && chain(&error).contains("no other"), "{error:?}");
}

#[tokio::test]
async fn invalid_static_token_is_typed_error() {
    for text in ["", "two words", "line\nbreak", "ü"] {
        let error = TokenProvider::new(StaticToken::new(text)).token().await.unwrap_err();
        assert!(matches!(&error, Error::Source(source) if !source.is_transient()), "{error:?}");
    }
    assert!(!format!("{:?}", StaticToken::new("canary")).contains("canary"));
    assert!(StaticToken::new("two words").validate().is_err() && StaticToken::new("word").validate().is_ok());
}

#[tokio::test(start_paused = true)]
async fn rereads_token_file_within_minute() {
    let folder = Folder::new();
    fs::write(folder.token(), " first\n").unwrap();
    let provider = TokenProvider::builder(TokenFile::new(folder.token())).keep_fresh(true).build().unwrap();
    assert_eq!(provider.ready().await.unwrap().access_token(), "first");
    rotate(&folder.token(), "second\n");
    sleep(MINUTE).await;
    assert_eq!(provider.current().unwrap().access_token(), "second");
    assert_eq!(provider.current().unwrap().generation(), 2);
    // A file that has not changed has no new token.
    sleep(10 * MINUTE).await;
    assert_eq!(provider.current().unwrap().generation(), 2);
}

#[tokio::test(start_paused = true)]
async fn challenge_rereads_token_file() {
    let folder = Folder::new();
    fs::write(folder.token(), "first").unwrap();
    let api = Api::default();
    api.accept("first");
    let provider = TokenProvider::new(TokenFile::new(folder.token()));
    let service = BearerAuthLayer::with_provider(provider.clone()).layer(api.service());
    assert_eq!(service.clone().oneshot(get()).await.unwrap().status(), StatusCode::OK);
    api.revoke_all();
    api.accept("second");
    rotate(&folder.token(), "second");
    assert_eq!(service.oneshot(get()).await.unwrap().status(), StatusCode::OK);
    assert_eq!(api.tokens(), ["first", "first", "second"]);
}

#[tokio::test(start_paused = true)]
async fn unreadable_file_keeps_good_token() {
    let folder = Folder::new();
    fs::write(folder.token(), "good").unwrap();
    let provider = TokenProvider::builder(TokenFile::new(folder.token())).keep_fresh(true).build().unwrap();
    provider.ready().await.unwrap();
    let too_long = "a".repeat(1 << 20);
    for content in ["", "half a tok", "\u{0}\u{1}", &too_long] {
        rotate(&folder.token(), content);
        for _ in 0..20 {
            sleep(9 * SECOND).await;
            assert_eq!(at_once(provider.token()).unwrap().unwrap().access_token(), "good");
        }
    }
    rotate(&folder.token(), [0xff, 0xfe]);
    sleep(2 * MINUTE).await;
    fs::remove_file(folder.token()).unwrap();
    sleep(2 * MINUTE).await;
    fs::create_dir(folder.token()).unwrap();
    sleep(2 * MINUTE).await;
    assert_eq!(provider.current().unwrap().access_token(), "good");
    fs::remove_dir(folder.token()).unwrap();
    fs::write(folder.token(), "better").unwrap();
    sleep(2 * MINUTE).await;
    assert_eq!(provider.current().unwrap().access_token(), "better");
    assert_eq!(provider.status().failed_refreshes, 0);
}

#[tokio::test(start_paused = true)]
async fn ready_waits_for_missing_token_file() {
    let folder = Folder::new();
    let provider = TokenProvider::new(TokenFile::new(folder.token()));
    let error = provider.token().await.unwrap_err();
    assert!(error.is_transient() && chain(&error).contains("cannot be read"), "{error:?}");
    let waiting = tokio::spawn({
        let provider = provider.clone();
        async move { provider.ready().await.map(|token| token.access_token().to_owned()) }
    });
    sleep(2 * SECOND).await;
    fs::write(folder.token(), "there").unwrap();
    assert_eq!(waiting.await.unwrap().unwrap(), "there");
}

/// Opening a pipe would block until another process writes to it.
#[cfg(unix)]
#[tokio::test]
async fn a_pipe_is_no_token_file() {
    let folder = Folder::new();
    assert!(std::process::Command::new("mkfifo").arg(folder.token()).status().unwrap().success());
    let provider = TokenProvider::builder(TokenFile::new(folder.token()))
        .retry(tower_bearer::RetryPolicy::new().max_retries(0))
        .build()
        .unwrap();
    let error = provider.token().await.unwrap_err();
    assert!(chain(&error).contains("not a regular file"), "{error:?}");
}

#[tokio::test]
async fn reload_interval_is_bounded() {
    for (interval, fits) in
        [(SECOND / 2, false), (SECOND, true), (1440 * MINUTE, true), (1441 * MINUTE, false)]
    {
        let source = TokenFile::new("token").reload_interval(interval);
        assert_eq!(source.validate().is_ok(), fits, "{interval:?}");
    }
    let source = TokenFile::new("token").reload_interval(Duration::ZERO);
    let expected = "reload_interval must be >= 1s and <= 1d, got 0s";
    assert_eq!(source.validate().unwrap_err().to_string(), expected);
    assert!(chain(&TokenProvider::new(source).token().await.unwrap_err()).contains(expected));
}
