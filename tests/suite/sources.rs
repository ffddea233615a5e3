//! `StaticToken`, which is never renewed, and `TokenFile`, whose file another process rotates.

use std::{fs, io::Write, path::Path, time::Duration};

use http::StatusCode;
use tokio::time::{advance, sleep};
use tower::ServiceExt;
use tower_bearer::{Error, SourceErrorKind, StaticToken, TokenFile, TokenProvider, TokenSource};

use crate::support::{MINUTE, SECOND, Scene, at_once, chain, folder::Folder, get, scene_of};

/// Replaces the file by renaming a new one, as a rotation does.
fn rotate(path: &Path, content: impl AsRef<[u8]>) {
    let new = path.with_extension("new");
    fs::write(&new, content).unwrap();
    fs::rename(new, path).unwrap();
}

/// The API challenges a static token.
#[tokio::test(start_paused = true)]
async fn static_token_is_never_replaced() {
    let scene = scene_of(StaticToken::new("personal-token")).accept(["personal-token"]);
    let Scene { api, provider, service, .. } = scene.build();
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

/// A static token has characters that a header cannot have.
#[tokio::test]
async fn invalid_static_token_is_typed_error() {
    for text in ["", "two words", "line\nbreak", "ü"] {
        let error = TokenProvider::new(StaticToken::new(text)).token().await.unwrap_err();
        assert!(matches!(&error, Error::Source(source) if !source.is_transient()), "{error:?}");
    }
    assert!(!format!("{:?}", StaticToken::new("canary")).contains("canary"));
    assert!(StaticToken::new("two words").validate().is_err() && StaticToken::new("word").validate().is_ok());
}

/// Another program replaces the token in a file.
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

/// The API challenges the token of a file, which was replaced meanwhile.
#[tokio::test(start_paused = true)]
async fn challenge_rereads_token_file() {
    let folder = Folder::new();
    fs::write(folder.token(), "first").unwrap();
    let Scene { api, service, .. } = scene_of(TokenFile::new(folder.token())).accept(["first"]).build();
    assert_eq!(service.clone().oneshot(get()).await.unwrap().status(), StatusCode::OK);
    api.revoke_all();
    api.accept("second");
    rotate(&folder.token(), "second");
    assert_eq!(service.oneshot(get()).await.unwrap().status(), StatusCode::OK);
    assert_eq!(api.tokens(), ["first", "first", "second"]);
}

/// The token file disappears: the last good token stays.
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

/// A token file is empty, half written, or has more than a token: the error names the reason and quotes nothing, and
/// the last good token stays.
#[tokio::test(start_paused = true)]
async fn bad_token_file_is_named() {
    let utf16 = |text: &str| -> Vec<u8> { text.encode_utf16().flat_map(u16::to_le_bytes).collect() };
    let header = "eyJhbGciOiJSUzI1NiJ9";
    let cases: [(Vec<u8>, &str); 25] = [
        (b" \n".to_vec(), "it is empty"),
        (b"\xef\xbb\xbfcanary".to_vec(), "it starts with a byte order mark"),
        ([b"\xff\xfe".to_vec(), utf16("canary")].concat(), "it is UTF-16"),
        (b"\xfe\xff\0c\0a".to_vec(), "it is UTF-16"),
        (utf16("canary"), "it has a NUL byte"),
        (b"canary\0".to_vec(), "it has a NUL byte"),
        (vec![0; 64], "it has a NUL byte"),
        (b"canary\xe9".to_vec(), "it is not UTF-8"),
        (b"Bearer canary".to_vec(), "it has `Bearer` before the token"),
        (b"bearer\tcanary".to_vec(), "it has `Bearer` before the token"),
        (b"Bearer: canary".to_vec(), "it has `Bearer` before the token"),
        (b"Bearer".to_vec(), "it has `Bearer` before the token"),
        (b"\"canary\"\n".to_vec(), "it has quotes"),
        (b"'canary'".to_vec(), "it has quotes"),
        (b"TOKEN=\"canary\"".to_vec(), "it has quotes"),
        (b"{\"access_token\":\"canary\"}".to_vec(), "it is JSON"),
        (b"canary\ncanary\n".to_vec(), "it has more than one line"),
        (b"canary canary".to_vec(), "it has more than one word"),
        ("canary\u{200b}".into(), "other than visible ASCII"),
        (b"eyJhbGciOi".to_vec(), "it is half written"),
        (b"eyJh".to_vec(), "it is half written"),
        (header.into(), "it is half written"),
        (format!("{header}.eyJzdWIiOiJjYW5hcnki").into(), "it is half written"),
        (format!("{header}.eyJzdWIiOiJjYW5hcnkifQ.").into(), "it is half written"),
        (format!("{header}..iv.canary").into(), "it is half written"),
    ];
    let folder = Folder::new();
    let good = format!("{header}.eyJzdWIiOiJjYW5hcnkifQ.c2ln");
    fs::write(folder.token(), format!("\n{good}\r\n")).unwrap();
    let provider = TokenProvider::new(TokenFile::new(folder.token()));
    assert_eq!(provider.token().await.unwrap().access_token(), good);
    for (content, why) in cases {
        rotate(&folder.token(), &content);
        let fresh = TokenProvider::builder(TokenFile::new(folder.token()))
            .retry(tower_bearer::RetryPolicy::new().max_retries(0))
            .build()
            .unwrap();
        let error = fresh.token().await.unwrap_err();
        let text = chain(&error);
        assert!(text.contains(&folder.token().display().to_string()) && text.contains(why), "{why}: {text}");
        let shown = format!("{text}{error:?}");
        assert!(!shown.contains("canary") && !shown.contains("eyJ"), "{shown}");
        let Error::Source(error) = error else { panic!("{error:?}") };
        assert!(error.is_transient() && error.kind() == SourceErrorKind::InvalidResponse, "{error:?}");
        sleep(2 * MINUTE).await;
        assert_eq!(provider.token().await.unwrap().access_token(), good, "{why}");
    }
    // What only resembles these.
    for good in
        ["bearer-canary", "eyJpdiI6IkFBIn0", "eyJ1c2VyIjoxfQ.c2ln", "eyJhbGciOiJkaXIi..a.b.c", "a.b.", "a\"b"]
    {
        rotate(&folder.token(), good);
        let fresh = TokenProvider::new(TokenFile::new(folder.token()));
        assert_eq!(fresh.token().await.unwrap().access_token(), good);
    }
}

/// A token file is written in place, a few bytes at a time.
#[tokio::test]
async fn file_is_read_when_it_is_whole() {
    let folder = Folder::new();
    let path = folder.token();
    let token = |number: u32| format!("{number:04}").repeat(50);
    fs::write(&path, token(0)).unwrap();
    let writes = tokio::task::spawn_blocking(move || {
        for number in 1..=10 {
            let mut file = fs::File::create(&path).unwrap();
            for part in token(number).as_bytes().chunks(70) {
                file.write_all(part).unwrap();
                std::thread::sleep(Duration::from_millis(1));
            }
            std::thread::sleep(Duration::from_millis(30));
        }
    });
    while !writes.is_finished() {
        let read = TokenProvider::new(TokenFile::new(folder.token())).token().await.unwrap();
        let number = read.access_token()[..4].parse().unwrap();
        assert_eq!(read.access_token(), token(number));
    }
    writes.await.unwrap();
}

/// The token file does not exist yet when the program starts.
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

/// The path of a token file is a pipe, which would block until another process writes to it.
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

/// The reload interval of a token file is out of its range.
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
