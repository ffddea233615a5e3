//! `FileStore` with real files, locks and processes.
#![cfg(all(unix, feature = "file"))]

#[path = "../../../tests/support/processes.rs"]
mod processes;
#[path = "../../../tests/support/mod.rs"]
mod support;

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fs::{self, File, Permissions},
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, PermissionsExt, symlink},
    },
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use processes::Process;
#[cfg(target_os = "linux")]
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use support::folder::Folder;
use tower_bearer::{
    ApiVideo, Error, StaticToken, TokenProvider,
    store::{Extension, Lease, NamespacedStore, Publication, Record, StoreError, StoreErrorKind, TokenStore},
};
use tower_bearer_store::{EncryptedStore, EncryptionKeys, FileStore};
use tower_bearer_testing::{AuthServer, Fault, Route};

const MINUTE: Duration = Duration::from_secs(60);

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o777
}

async fn publish(store: &FileStore, text: &str) -> u64 {
    let mut lease = store.lease(MINUTE).await.unwrap();
    while lease.is_none() {
        // A process that another test is starting has this test's files open for a moment, locks included.
        tokio::task::yield_now().await;
        lease = store.lease(MINUTE).await.unwrap();
    }
    let lease = lease.unwrap();
    let record = Record::new(lease.fence(), text).expires_in(MINUTE);
    assert_eq!(store.publish(&lease, record).await.unwrap(), Publication::Stored);
    let fence = lease.fence();
    store.release(lease).await.unwrap();
    fence
}

/// The place of a file cannot be used: `ready` says so at the start.
#[tokio::test]
async fn ready_finds_unusable_place() {
    type Spoil = fn(&Folder);
    let file: Spoil = |folder| fs::write(folder.0.join("folder"), "a file in its way").unwrap();
    let cases: [(&str, StoreErrorKind, &str, Spoil); 5] = [
        ("folder/token", StoreErrorKind::Unavailable, "cannot open {}/folder/token: Not a directory", file),
        (
            "folder/of/token",
            StoreErrorKind::Unavailable,
            "cannot inspect {}/folder/of: Not a directory",
            file,
        ),
        (
            "/proc/tower-bearer/token",
            StoreErrorKind::Unavailable,
            "cannot create /proc/tower-bearer: ",
            |_| {},
        ),
        ("token", StoreErrorKind::Insecure, "{}/token is not a regular file", |folder| {
            fs::create_dir(folder.0.join("token")).unwrap();
        }),
        ("token", StoreErrorKind::Insecure, "{} is writable by other users", |folder| {
            fs::set_permissions(&folder.0, Permissions::from_mode(0o777)).unwrap();
        }),
    ];
    for (path, kind, why, spoil) in cases {
        if path.starts_with("/proc") && !cfg!(target_os = "linux") {
            continue;
        }
        let folder = Folder::new();
        spoil(&folder);
        let before = fs::read_dir(&folder.0).unwrap().count();
        let provider = TokenProvider::builder(StaticToken::new("abc"))
            .store(FileStore::new(folder.0.join(path)))
            .refresh_timeout(Duration::from_millis(500))
            .build()
            .unwrap();
        let error = provider.ready().await.unwrap_err();
        let why = why.replace("{}", folder.0.to_str().unwrap());
        let text = error.to_string();
        assert!(text.starts_with(&format!("the token store cannot be used: {why}")), "{text}");
        // The text has the cause already.
        assert!(std::error::Error::source(&error).is_none(), "{error:?}");
        let Error::Store(error) = error else { panic!("{error:?}") };
        assert_eq!(error.kind(), kind, "{why}");
        assert!(provider.token().await.is_ok());
        assert_eq!(fs::read_dir(&folder.0).unwrap().count(), before, "{why}: nothing is written");
    }
}

/// An exchange takes longer than its lease, which is extended until another process has the next one.
#[tokio::test]
async fn lease_extends_until_next_is_given() {
    let folder = Folder::new();
    let (one, other) = (FileStore::new(folder.token()), FileStore::new(folder.token()));
    let short = Duration::from_millis(200);
    let held = one.lease(short).await.unwrap().unwrap();
    assert_eq!(one.extend(&held, MINUTE).await.unwrap(), Extension::Extended);
    tokio::time::sleep(short * 2).await;
    assert!(other.lease(MINUTE).await.unwrap().is_none());
    // The time counts from the extension.
    assert_eq!(one.extend(&held, short).await.unwrap(), Extension::Extended);
    tokio::time::sleep(short * 2).await;
    assert_eq!(one.extend(&held, MINUTE).await.unwrap(), Extension::Expired);
    let newer = other.lease(MINUTE).await.unwrap().unwrap();
    assert_eq!(one.extend(&held, MINUTE).await.unwrap(), Extension::Expired);
    assert_eq!(other.extend(&newer, MINUTE).await.unwrap(), Extension::Extended);
    // Extending a released lease does not block others.
    let fence = newer.fence();
    other.release(newer).await.unwrap();
    let _ = other.extend(&Lease::new(fence), MINUTE).await.unwrap();
    assert!(one.lease(MINUTE).await.unwrap().is_some());
}

/// Other users of the host can read the stored tokens.
#[tokio::test]
async fn files_are_private_to_the_user() {
    let folder = Folder::new();
    let path = folder.0.join("of/a/tool/token");
    let store = FileStore::new(&path);
    assert!(store.load().await.unwrap().is_none());
    let first = publish(&store, "first").await;
    let second = publish(&store, "second").await;
    assert!(second > first);
    let record = store.load().await.unwrap().unwrap();
    assert_eq!((record.version(), record.text()), (second, "second"));
    assert!(record.lifetime().unwrap() <= MINUTE && record.lifetime().unwrap() > MINUTE / 2);

    let made = path.parent().unwrap();
    assert_eq!(mode(made), 0o700);
    let mut files: Vec<_> = fs::read_dir(made).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let names: Vec<_> = files.iter().map(|path| path.file_name().unwrap().to_str().unwrap()).collect();
    assert_eq!(names, ["token", "token.lease", "token.lock"]);
    assert!(files.iter().all(|file| mode(file) == 0o600), "{files:?}");
    for file in &files[1..] {
        assert!(!fs::read_to_string(file).unwrap().contains("second"));
    }
}

/// Other users can read or replace the file of a record: the error names the reason, the file is not changed, and the
/// process refreshes without the store.
#[tokio::test]
async fn insecure_file_error_names_reason() {
    type Spoil = fn(&Folder);
    let cases: [(&str, Spoil); 9] = [
        ("token is a symbolic link", |folder| {
            fs::rename(folder.token(), folder.0.join("elsewhere")).unwrap();
            symlink(folder.0.join("elsewhere"), folder.token()).unwrap();
        }),
        ("token is accessible to other users: its mode is 640, expected 600", |folder| {
            fs::set_permissions(folder.token(), Permissions::from_mode(0o640)).unwrap();
        }),
        ("token is accessible to other users: its mode is 602, expected 600", |folder| {
            fs::set_permissions(folder.token(), Permissions::from_mode(0o602)).unwrap();
        }),
        ("token is not a regular file", |folder| {
            fs::remove_file(folder.token()).unwrap();
            rustix::fs::mknodat(
                rustix::fs::CWD,
                folder.token(),
                rustix::fs::FileType::Fifo,
                rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
                0,
            )
            .unwrap();
        }),
        ("token.lock is a symbolic link", |folder| {
            fs::remove_file(folder.0.join("token.lock")).unwrap();
            symlink(folder.token(), folder.0.join("token.lock")).unwrap();
        }),
        ("token.lock is accessible to other users: its mode is 666, expected 600", |folder| {
            fs::set_permissions(folder.0.join("token.lock"), Permissions::from_mode(0o666)).unwrap();
        }),
        ("token.lease is a symbolic link", |folder| {
            fs::remove_file(folder.0.join("token.lease")).unwrap();
            symlink("/dev/null", folder.0.join("token.lease")).unwrap();
        }),
        ("is writable by other users", |folder| {
            fs::set_permissions(&folder.0, Permissions::from_mode(0o777)).unwrap();
        }),
        ("token belongs to another user", |folder| {
            // Root can change the owner. Any other user replaces the file with one that root owns.
            if std::os::unix::fs::chown(folder.token(), Some(12345), None).is_err() {
                fs::remove_file(folder.token()).unwrap();
                fs::hard_link("/etc/hostname", folder.token())
                    .or_else(|_| symlink("/etc/hostname", folder.token()))
                    .unwrap();
            }
        }),
    ];
    let server = AuthServer::start().await.unwrap();
    for (number, (reason, spoil)) in (1..).zip(cases) {
        let folder = Folder::new();
        let store = FileStore::new(folder.token());
        publish(&store, "secret-canary").await;
        spoil(&folder);
        let before = fs::symlink_metadata(folder.token()).unwrap();
        let error = match store.load().await {
            Ok(_) => store.lease(MINUTE).await.unwrap_err(),
            Err(error) => error,
        };
        assert_eq!(error.kind(), StoreErrorKind::Insecure, "{reason}: {error:?}");
        let is_another_users = reason.contains("another user") && error.to_string().contains("symbolic link");
        assert!(error.to_string().contains(reason) || is_another_users, "{reason}: {error}");
        assert!(!format!("{error:?}").contains("canary"));

        let source = ApiVideo::new(server.api_key()).base_url(server.uri());
        let provider = TokenProvider::builder(source).store(store).build().unwrap();
        provider.token().await.unwrap();
        assert_eq!(server.counters().api_key_grants, number, "{reason}");
        let after = fs::symlink_metadata(folder.token()).unwrap();
        assert_eq!(
            (before.ino(), before.mode(), before.size()),
            (after.ino(), after.mode(), after.size()),
            "{reason}"
        );
    }
}

/// The file of a record contains something else.
#[tokio::test]
async fn invalid_file_is_replaced() {
    let folder = Folder::new();
    let store = FileStore::new(folder.token());
    for (text, reason) in [
        (String::new(), "does not contain a record"),
        ("canary".into(), "does not contain a record"),
        (r#"{"schema":1,"generation":"canary"}"#.into(), "does not contain a record"),
        (r#"{"schema":2,"canary":1}"#.into(), "has schema 2, expected 1"),
        ("canary".repeat(100_000), "is longer than"),
    ] {
        publish(&store, "first").await;
        fs::write(folder.token(), &text).unwrap();
        let error = store.load().await.unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::InvalidRecord, "{reason}: {error:?}");
        assert!(error.to_string().contains(reason) && !format!("{error:?}").contains("canary"), "{error:?}");
        publish(&store, "second").await;
        assert_eq!(store.load().await.unwrap().unwrap().text(), "second");

        // The same content in the lock's file: the next fence is based on the clock.
        let fence = publish(&store, "third").await;
        fs::write(folder.0.join("token.lock"), &text).unwrap();
        // The clock counts milliseconds here.
        tokio::time::sleep(Duration::from_millis(2)).await;
        assert!(publish(&store, "fourth").await > fence);
    }

    // The greatest possible fence.
    let leased = r#"{"schema":1,"fence":18446744073709551615,"monotonic":0,"length_ms":0}"#;
    fs::write(folder.0.join("token.lock"), leased).unwrap();
    let fence = publish(&store, "fifth").await;
    assert!(publish(&store, "sixth").await > fence);
}

/// A process that is stopped for longer than its lease still has the kernel's lock. Its fence is superseded.
#[tokio::test]
async fn lease_ends_while_holder_lives() {
    let folder = Folder::new();
    let store = FileStore::new(folder.token());
    let stopped = store.lease(Duration::ZERO).await.unwrap().unwrap();
    let lease = store.lease(MINUTE).await.unwrap().unwrap();
    assert!(lease.fence() > stopped.fence());
    let publication = store.publish(&stopped, Record::new(stopped.fence(), "stale")).await.unwrap();
    assert_eq!(publication, Publication::Superseded);
    // Releasing it does not release the newer lease.
    store.release(stopped).await.unwrap();
    assert!(store.lease(MINUTE).await.unwrap().is_none());
    assert_eq!(store.publish(&lease, Record::new(lease.fence(), "good")).await.unwrap(), Publication::Stored);
    let record = store.load().await.unwrap().unwrap();
    assert_eq!((record.text(), record.lifetime()), ("good", None));
}

/// A process ends while it holds the lock, which the kernel releases.
#[tokio::test]
async fn lease_ends_with_its_process() {
    let folder = Folder::new();
    let server = AuthServer::start().await.unwrap();
    let store = FileStore::new(folder.token());
    let mut process = Process::start("one_of_many", folder.token().to_str().unwrap(), &server);
    process.send("lease").await;
    assert_eq!(process.response().await, "leased");
    assert!(store.lease(MINUTE).await.unwrap().is_none());
    process.child.kill().await.unwrap();
    assert!(store.lease(MINUTE).await.unwrap().is_some());
}

/// A process never releases the lock.
#[tokio::test]
async fn held_lock_times_out() {
    let folder = Folder::new();
    let store = FileStore::new(folder.token()).timeout(Duration::from_millis(20));
    publish(&store, "first").await;
    let lock = File::options().write(true).open(folder.0.join("token.lock")).unwrap();
    lock.lock().unwrap();
    let error = store.lease(MINUTE).await.unwrap_err();
    assert!(error.to_string().contains("another process has held"), "{error}");
    // Loading needs no lock.
    assert_eq!(store.load().await.unwrap().unwrap().text(), "first");
    lock.unlock().unwrap();
    publish(&store, "second").await;
}

/// A publication waits for the lock, which must not lengthen the stored lifetime.
#[tokio::test]
async fn slow_publication_keeps_lifetime() {
    let folder = Folder::new();
    let store = FileStore::new(folder.token()).timeout(MINUTE);
    let lease = store.lease(MINUTE).await.unwrap().unwrap();
    let lock = File::options().write(true).open(folder.0.join("token.lock")).unwrap();
    lock.lock().unwrap();
    let held = Duration::from_millis(100);
    let (published, ()) =
        tokio::join!(store.publish(&lease, Record::new(lease.fence(), "text").expires_in(MINUTE)), async {
            tokio::time::sleep(held).await;
            lock.unlock().unwrap();
        });
    assert_eq!(published.unwrap(), Publication::Stored);
    let left = store.load().await.unwrap().unwrap().lifetime().unwrap();
    assert!(left <= MINUTE - held / 2, "{left:?}");
}

/// The disk is full when the lease is taken, or while the record is written.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn full_disk_loses_no_token() {
    for bytes_left in [0, 200] {
        let folder = Folder::new();
        let server = AuthServer::start().await.unwrap();
        let store = FileStore::new(folder.token());
        let mut process = Process::start("one_of_many", folder.token().to_str().unwrap(), &server);
        assert_eq!(process.request().await, "200");
        let first = store.load().await.unwrap().unwrap();
        assert!(fs::metadata(folder.token()).unwrap().len() > 200);

        let id = Pid::from_raw(process.child.id().unwrap().cast_signed());
        let full = Rlimit { current: Some(bytes_left), maximum: None };
        let before = prlimit(id, Resource::Fsize, full).unwrap();
        server.revoke_access_tokens();
        assert_eq!(process.request().await, "200");
        assert_eq!(store.load().await.unwrap().unwrap().text(), first.text());

        prlimit(id, Resource::Fsize, before).unwrap();
        while store.load().await.unwrap().unwrap().version() == first.version() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let counters = server.counters();
        assert_eq!((counters.api_key_grants, counters.refresh_grants), (1, 1));
    }
}

/// A process is killed while it writes a record.
#[tokio::test]
async fn leftover_temp_file_is_harmless() {
    let folder = Folder::new();
    let store = FileStore::new(folder.token());
    publish(&store, "first").await;
    fs::write(folder.0.join("token.new"), "half a rec").unwrap();
    assert_eq!(store.load().await.unwrap().unwrap().text(), "first");
    publish(&store, "second").await;
    assert_eq!(store.load().await.unwrap().unwrap().text(), "second");
    assert!(!folder.0.join("token.new").exists());
}

/// Sets a number in one of the store's files.
fn set(path: &Path, field: &str, number: u128) {
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    json[field] = u64::try_from(number).unwrap().into();
    fs::write(path, json.to_string()).unwrap();
}

/// A clock that is set back leaves a record of the future, which ages from the first time it is seen.
#[tokio::test]
async fn record_of_the_future_ages() {
    let folder = Folder::new();
    let store = FileStore::new(folder.token());
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    publish(&store, "text").await;
    set(&folder.token(), "stored_at", (now() + 60 * MINUTE).as_millis());
    let lifetime = || async { store.load().await.unwrap().unwrap().lifetime().unwrap() };
    assert_eq!(lifetime().await, MINUTE);
    tokio::time::sleep(Duration::from_millis(50)).await;
    let left = lifetime().await;
    assert!(left < MINUTE, "{left:?}");
    // The clock is corrected: it counts again.
    set(&folder.token(), "stored_at", (now() - MINUTE / 2).as_millis());
    assert!(lifetime().await <= MINUTE / 2);
    // Another record is seen for the first time.
    publish(&store, "newer").await;
    set(&folder.token(), "stored_at", (now() + 60 * MINUTE).as_millis());
    assert_eq!(lifetime().await, MINUTE);
    set(&folder.token(), "lifetime_ms", 20);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(lifetime().await, Duration::ZERO);
}

/// The clock is set back, and the lock's file, which has the last fence, is deleted: fences grow nevertheless.
#[tokio::test]
async fn fences_grow_after_clock_was_set_back() {
    let folder = Folder::new();
    let store = FileStore::new(folder.token());
    publish(&store, "text").await;
    let later = (SystemTime::now().duration_since(UNIX_EPOCH).unwrap() + 60 * MINUTE).as_micros();
    set(&folder.token(), "generation", later);
    fs::remove_file(folder.0.join("token.lock")).unwrap();
    let fence = publish(&store, "newer").await;
    assert_eq!(u128::from(fence), later + 1);
    // A version that this crate has not written is ignored.
    set(&folder.token(), "generation", u64::MAX.into());
    assert_eq!(u128::from(publish(&store, "newest").await), later + 2);
}

/// Moves the wall clock of a process by the seconds in the file that `TEST_CLOCK` names.
#[cfg(target_os = "linux")]
const CLOCK: &str = r#"
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t clock, struct timespec *time) {
    long result = syscall(SYS_clock_gettime, clock, time);
    const char *path = getenv("TEST_CLOCK");
    FILE *file = clock == CLOCK_REALTIME && path ? fopen(path, "r") : NULL;
    long seconds;
    if (file) {
        if (fscanf(file, "%ld", &seconds) == 1) time->tv_sec += seconds;
        fclose(file);
    }
    return (int)result;
}
"#;

/// The wall clock is stepped while a process holds the lease and asks the auth server: no other process asks meanwhile.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn clock_step_makes_no_second_holder() {
    let folder = Folder::new();
    let (source, library) = (folder.0.join("clock.c"), folder.0.join("clock.so"));
    fs::write(&source, CLOCK).unwrap();
    let compiled = std::process::Command::new("cc")
        .args(["-shared", "-fPIC", "-o"])
        .args([&library, &source])
        .status()
        .expect("this test needs a C compiler: apt-get install gcc");
    assert!(compiled.success());
    for seconds in [-10, 21, -100_000, 100_000] {
        let (folder, server) = (Folder::new(), AuthServer::start().await.unwrap());
        let clock = folder.0.join("clock");
        let step = |seconds: i64| {
            fs::write(folder.0.join("next"), seconds.to_string()).unwrap();
            fs::rename(folder.0.join("next"), &clock).unwrap();
        };
        step(0);
        let environment = [("LD_PRELOAD", &library), ("TEST_CLOCK", &clock)];
        let start = || {
            let store = folder.token();
            Process::start_in("one_of_many", store.to_str().unwrap(), &server, &environment)
        };
        let (mut holder, mut other) = (start(), start());
        // Both know their token, and that it has been revoked.
        assert_eq!(holder.request().await, "200");
        assert_eq!(other.request().await, "200");
        server.revoke_access_tokens();
        server.inject(Route::RefreshGrant, Fault::Delay(Duration::from_secs(2)));
        let granted = || fs::read(folder.0.join("token.lock")).unwrap();
        let before = granted();
        holder.send("request").await;
        let counters = || {
            let counters = server.counters();
            counters.refresh_grants + counters.rejected_refresh_tokens
        };
        while granted() == before {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        step(seconds);
        other.send("request").await;
        assert_eq!(holder.response().await, "200", "{seconds} s");
        assert_eq!(other.response().await, "200", "{seconds} s");
        assert_eq!((counters(), server.counters().api_key_grants), (1, 1), "{seconds} s");
    }
}

/// Four processes start, or find their token revoked, at one moment.
#[tokio::test]
async fn four_processes_share_one_token() {
    let folder = Folder::new();
    processes::four_processes_share_one_token("one_of_many", folder.token().to_str().unwrap()).await;
}

/// Runs a worker process if the environment says so; otherwise does nothing.
#[test]
fn one_of_many() {
    processes::work(|path| FileStore::new(path));
}

/// A stored token can be read by a person who has the file.
#[tokio::test]
async fn file_can_be_encrypted() {
    let folder = Folder::new();
    let server = AuthServer::start().await.unwrap();
    let build = || {
        let keys = EncryptionKeys::new("1", &[7; 32]).unwrap();
        let source = ApiVideo::new(server.api_key()).base_url(server.uri());
        TokenProvider::builder(source)
            .store(EncryptedStore::new(FileStore::new(folder.token()), keys))
            .build()
            .unwrap()
    };
    let token = build().token().await.unwrap();
    assert_eq!(build().token().await.unwrap().access_token(), token.access_token());
    let text = fs::read_to_string(folder.token()).unwrap();
    assert!(text.contains("sealed-1:1:") && !text.contains("eyJ0eXAi") && !text.contains("def502"), "{text}");
    assert_eq!(server.counters().api_key_grants, 1);
}

/// Namespaces that a file system, or a path, could confuse.
const HOSTILE: &[&str] = &[
    "a",
    "A",
    "ab",
    "aB",
    "a.lock",
    "a.lease",
    "a.new",
    "lock",
    ".lock",
    ".lease",
    ".new",
    "token",
    "token.lock",
    "@a",
    "token@a",
    "a@",
    "a/b",
    "a\\b",
    "a%2fb",
    "a%2Fb",
    "a%252fb",
    "%",
    "%%",
    "%25",
    ".",
    "..",
    "../token",
    "../../a",
    "/a",
    "a/",
    "-",
    "_",
    " ",
    "a ",
    "a\0",
    "\n",
    "\u{e9}",
    "e\u{301}",
    "\u{212b}",
    "\u{c5}",
    "\u{df}",
    "ss",
    "SS",
    "i",
    "I",
    "\u{131}",
    "\u{130}",
    "\u{17f}",
    "s",
    "con",
    "nul",
];

/// Two tenants use one file.
#[tokio::test]
async fn namespaces_have_files_of_their_own() {
    let folder = Folder::new();
    let inside = folder.0.join("in");
    let base = FileStore::new(inside.join("token"));
    let names = || -> BTreeSet<_> {
        let files = fs::read_dir(&inside).unwrap();
        files.map(|file| file.unwrap().file_name().into_string().unwrap()).collect()
    };
    publish(&base, "of the base").await;
    let mut seen = names();
    let mut leases = Vec::new();
    for (number, namespace) in HOSTILE.iter().enumerate() {
        let store = base.for_namespace(*namespace);
        assert!(store.load().await.unwrap().is_none(), "{namespace:?} has the record of another");
        // Each lease is kept, and blocks no other namespace.
        let lease = store.lease(MINUTE).await.unwrap().expect(namespace);
        store.publish(&lease, Record::new(lease.fence(), number.to_string())).await.unwrap();
        leases.push(lease);

        // Three files more, which a file system that ignores case or normalizes Unicode distinguishes as well.
        let now = names();
        let new: Vec<_> = now.difference(&seen).cloned().collect();
        assert_eq!(new.len(), 3, "{namespace:?}: {new:?}");
        assert!(
            new.iter().all(|name| name.is_ascii() && !name.bytes().any(|byte| byte.is_ascii_uppercase()))
        );
        assert_eq!(new[1..], [format!("{}.lease", new[0]), format!("{}.lock", new[0])], "{namespace:?}");
        seen = now;
    }
    for (number, namespace) in HOSTILE.iter().enumerate() {
        // The namespace replaces that of the handle.
        let store = base.for_namespace("another").for_namespace(*namespace);
        assert_eq!(store.load().await.unwrap().unwrap().text(), number.to_string(), "{namespace:?}");
        assert!(store.lease(MINUTE).await.unwrap().is_none(), "{namespace:?}");
    }
    assert_eq!(base.load().await.unwrap().unwrap().text(), "of the base");
    let outside: Vec<_> = fs::read_dir(&folder.0).unwrap().map(|file| file.unwrap().file_name()).collect();
    assert_eq!(outside, ["in"]);
    assert!(seen.contains("token@%2e%2e%2ftoken") && seen.contains("token@a"), "{seen:?}");
}

/// The names of namespaces are too long, too many or not valid.
#[tokio::test]
async fn namespaces_are_bounded() {
    let folder = Folder::new();
    let base = FileStore::new(folder.token());
    let build = |store: FileStore| TokenProvider::builder(StaticToken::new("abc")).store(store).build();
    // 249 bytes, less those of `token@`. An upper-case letter takes three.
    for namespace in ["n".repeat(243), "N".repeat(81)] {
        let store = base.for_namespace(&namespace);
        publish(&store, "long").await;
        assert_eq!(store.load().await.unwrap().unwrap().text(), "long");
        assert!(build(store).is_ok());
    }
    let escaped = "%4e".repeat(82);
    for (namespace, name, length) in
        [(String::new(), "", 6), ("n".repeat(244), &*"n".repeat(244), 250), ("N".repeat(82), &*escaped, 252)]
    {
        let error = build(base.for_namespace(namespace)).unwrap_err();
        let text = "the namespace of the file store must be at least one byte whose file's name has at most \
                    249 bytes, got the name";
        assert_eq!(error.to_string(), format!("invalid option: {text} \"token@{name}\" of {length} bytes"));
        assert!(matches!(error, Error::InvalidOption(_)));
    }
    // A handle of an invalid store is invalid, and a setter on a handle changes only that handle.
    assert!(build(FileStore::new("folder/").for_namespace("a")).is_err());
    assert!(build(FileStore::new("token").timeout(Duration::ZERO).for_namespace("a")).is_err());
    let handle = base.for_namespace("a");
    assert!(build(base.for_namespace("a").timeout(Duration::ZERO)).is_err());
    assert!(build(handle).is_ok() && build(base).is_ok());
}

/// An encrypted record is copied to another namespace with the same keys.
#[tokio::test]
async fn encrypted_record_opens_only_in_its_namespace() {
    let folder = Folder::new();
    let keys = EncryptionKeys::new("1", &[7; 32]).unwrap();
    let base = EncryptedStore::new(FileStore::new(folder.token()), keys);
    let (one, other) = (base.for_namespace("one"), base.for_namespace("other"));
    for store in [&base, &one] {
        let lease = store.lease(MINUTE).await.unwrap().unwrap();
        store.publish(&lease, Record::new(lease.fence(), "text")).await.unwrap();
    }
    assert_eq!(base.for_namespace("one").load().await.unwrap().unwrap().text(), "text");
    for copied in ["token@one", "token"] {
        fs::copy(folder.0.join(copied), folder.0.join("token@other")).unwrap();
        let error = other.load().await.unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::InvalidRecord, "{copied}: {error:?}");
    }
}

/// An encrypted file is copied: the copy opens only in the place of the original, or under the same name.
#[tokio::test]
async fn encrypted_record_opens_only_in_its_place() {
    type Make = fn(FileStore) -> FileStore;
    let cases: [(&str, Make, bool); 4] = [
        ("token", |store| store, false),
        ("token@acme", |store| store.for_namespace("acme"), false),
        ("token", |store| store.with_namespace("acme"), true),
        ("token@acme", |store| store.with_namespace("tenants").for_namespace("acme"), true),
    ];
    for (name, make, opens) in cases {
        let folder = Folder::new();
        let store = |path: &Path| {
            let keys = EncryptionKeys::new("1", &[7; 32]).unwrap();
            EncryptedStore::new(make(FileStore::new(path)), keys)
        };
        let original = folder.0.join("acme").join("token");
        let lease = store(&original).lease(MINUTE).await.unwrap().unwrap();
        store(&original).publish(&lease, Record::new(lease.fence(), "text")).await.unwrap();
        assert_eq!(store(&original).load().await.unwrap().unwrap().text(), "text", "{name}");

        // In another folder, and in two whose names differ only in bytes that are no UTF-8.
        for place in [&b"emca"[..], b"\xff", b"\xfe"] {
            let copy = folder.0.join(OsStr::from_bytes(place)).join("token");
            // Creates the folder.
            drop(store(&copy).lease(MINUTE).await.unwrap());
            fs::copy(original.with_file_name(name), copy.with_file_name(name)).unwrap();
            let loaded = store(&copy).load().await;
            assert_eq!(loaded.is_ok(), opens, "{name} in {place:?}: {loaded:?}");
            let is_invalid = |error: &StoreError| error.kind() == StoreErrorKind::InvalidRecord;
            assert!(opens || loaded.as_ref().is_err_and(is_invalid), "{loaded:?}");
        }
        let (one, other) =
            (folder.0.join(OsStr::from_bytes(b"\xff")), folder.0.join(OsStr::from_bytes(b"\xfe")));
        if !opens {
            assert_ne!(store(&one.join("token")).namespace(), store(&other.join("token")).namespace());
        }
    }
}

/// An option of the store is out of its range.
#[test]
fn out_of_range_options_are_errors() {
    for timeout in [Duration::ZERO, MINUTE * 2] {
        let store = FileStore::new("token").timeout(timeout);
        let built = TokenProvider::builder(StaticToken::new("abc")).store(store).build();
        assert!(matches!(built, Err(Error::InvalidOption(_))), "{timeout:?}");
    }
    let too_long = format!("folder/{}", "n".repeat(250));
    for path in [
        "",
        "/",
        ".",
        "..",
        "folder/",
        "folder//",
        "folder/.",
        "folder/./",
        "folder/..",
        "a\0b",
        "a\0b/c",
        &too_long,
    ] {
        let error = TokenProvider::builder(StaticToken::new("abc")).store(FileStore::new(path)).build();
        let error = error.unwrap_err();
        let text = "the path of the file store must be one that ends with the name of a file of at most 249 bytes, none of \
                    which is 0, got ";
        assert_eq!(error.to_string(), format!("invalid option: {text}{path:?}"));
        assert!(matches!(error, Error::InvalidOption(_)));
    }
    let folder = std::env::current_dir().unwrap().display().to_string();
    let store = FileStore::new("./folder/token");
    assert_eq!(store.namespace(), format!("{folder}/folder/token"));
    assert_eq!(store.for_namespace("A").namespace(), format!("{folder}/folder/token@%41"));
    let store = store.with_namespace("other");
    assert_eq!(store.namespace(), "other");
    assert_eq!(store.for_namespace("A").for_namespace("b").namespace(), "other@b");
}
