//! [`FileStore`]: one token for the processes of one user on one host, in a file.

use std::{
    fmt,
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Read, Seek, Write},
    os::unix::{
        ffi::OsStrExt,
        fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use rustix::{
    fs::OFlags,
    process::geteuid,
    time::{ClockId, clock_gettime},
};
use secrecy::{ExposeSecret, SecretString, zeroize::Zeroizing};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{Extension, Lease, NamespacedStore, Publication, Record, StoreError, StoreErrorKind, TokenStore};
use crate::{
    error::{Error, seconds},
    observability::millis,
};

/// The schema of the files. A file with another schema counts as absent.
const SCHEMA: u32 = 1;

/// The maximum length of a file that is read.
const MAX_LEN: u64 = 512 * 1024;

/// The default time to wait for the lock. A process holds it only while it writes a file.
const TIMEOUT: Duration = Duration::from_secs(1);
const MAX_TIMEOUT: Duration = Duration::from_secs(60);

/// The maximum length of the file's name: that of a file system, without the suffix of the other files.
const MAX_NAME_LEN: usize = 255 - ".lease".len();

/// A fence from here on was not written by this crate: the clock does not reach it for two centuries.
const INVALID_FENCE: u64 = 1 << 53;

/// The length of the lock's file: enough for its four numbers, padded with spaces.
const LEASED_LEN: usize = 128;

/// Bits of a file's mode.
const GROUP_AND_OTHERS: u32 = 0o077;
const WRITABLE_BY_OTHERS: u32 = 0o022;
const STICKY: u32 = 0o1000;

/// Keeps the token in a file, for the processes that one user runs on one host: command-line tools, workers.
///
/// Two more files are kept next to it, whose names end in `.lock` and `.lease`. Do not remove them. A new record is
/// written to a temporary file, which then replaces the old one in one step, so a reader sees either the old or the
/// new record. Use a local file system: network file systems guarantee neither locks nor this replacement.
///
/// ```no_run
/// use tower_bearer::{ApiVideo, TokenProvider, store::FileStore};
///
/// let home = std::env::var("HOME").unwrap_or_default();
/// let store = FileStore::new(format!("{home}/.local/state/your-tool/token"));
/// let provider = TokenProvider::builder(ApiVideo::new("your-api-key")).store(store).build()?;
/// # Ok::<(), tower_bearer::Error>(())
/// ```
///
/// # Permissions
///
/// Only the user that runs the process can read the files. They are created with mode 0600, and a missing directory
/// with mode 0700. A file is [rejected](StoreErrorKind::Insecure), with the reason, if it is a symbolic link, belongs
/// to another user, or is accessible to other users. So is a directory in which other users could replace the file.
/// The process then refreshes without the store, unless it has a user's [login](crate::TokenProviderBuilder::login). The
/// file's content is as sensitive as a password until the token expires, or until a user's login ends:
/// [`EncryptedStore`](super::EncryptedStore) encrypts it (feature `encryption`).
///
/// # Locks
///
/// A lease ends after its length, or when its process ends in any way, because the kernel then releases the file
/// lock. The length is measured with the system's monotonic clock, which all processes share and nobody can set: a step
/// of the wall clock ends no lease. A record ages by the wall clock, which survives a restart, and at least by the time
/// since this store has loaded it first.
///
/// Each operation runs on a thread of tokio's blocking pool. It fails if another process holds the lock for longer than
/// the [timeout](Self::timeout), which happens only if that process was stopped while it wrote.
///
/// # Many credentials
///
/// [`for_namespace`](NamespacedStore::for_namespace) puts the record of another credential next to the file at `path`.
/// Its name is that of the file, `@`, and the namespace: `token@acme`. Lower-case ASCII letters, digits, `-` and `_`
/// stay. Each other byte of the namespace is percent-encoded, such as `%2e` for a dot. Two namespaces therefore never
/// share a file, even on a file system that ignores case or normalizes Unicode. The namespace must have at least one
/// byte, and the file's name at most 249.
///
/// The file at `path` is not the record of any handle.
///
/// # Encrypted records
///
/// An encrypted record is bound to the absolute path of its file: a copy in another place does not open. So all
/// processes must use the same path, without different links. If they do not, or if the folder is moved or renamed, use
/// [`with_namespace`](Self::with_namespace). Otherwise the record cannot be decrypted in its new place, which costs a
/// user's login.
pub struct FileStore {
    files: Arc<Files>,
    namespace: String,
}

#[derive(Clone)]
struct Files {
    /// The path that [`FileStore::new`] was called with. The record of another namespace is next to it.
    base: PathBuf,
    /// That of [`FileStore::with_namespace`].
    name: Option<String>,
    record: PathBuf,
    /// Locked while a lease is granted or extended, and while a record is written. Contains the newest lease.
    lock: PathBuf,
    /// Locked by the process that has the lease, until it releases the lease or ends.
    lease: PathBuf,
    /// The next record while it is written. Only the holder of `lock` writes it.
    temporary: PathBuf,
    timeout: Duration,
    /// The version of the record that was loaded last, and when it was loaded first.
    seen: Arc<Mutex<Option<(u64, Instant)>>>,
}

/// The content of the record's file.
#[derive(Deserialize)]
struct Stored {
    /// Stored as `generation`: renaming the field in the file would make existing records unreadable.
    #[serde(rename = "generation")]
    version: u64,
    /// By the wall clock.
    stored_at: Millis,
    lifetime_ms: Option<u64>,
    record: SecretString,
}

#[derive(Serialize)]
struct ToStore<'a> {
    schema: u32,
    #[serde(rename = "generation")]
    version: u64,
    stored_at: Millis,
    lifetime_ms: Option<u64>,
    record: &'a str,
}

/// The content of the lock's file: the lease that was granted last.
#[derive(Default, Deserialize, Serialize)]
struct Leased {
    schema: u32,
    fence: u64,
    /// When the lease was granted or extended, by the monotonic clock. It is not that of an earlier boot: then no process
    /// has the lock.
    #[serde(default)]
    monotonic: Millis,
    length_ms: u64,
}

type Millis = u64;

impl FileStore {
    /// Creates a store with its record in the file at `path`. The file and its directory need not exist yet.
    ///
    /// `path` must end with the name of a file, of at most 249 bytes: otherwise
    /// [`build`](crate::TokenProviderBuilder::build) returns an error. A place that cannot be used, such as a directory
    /// that cannot be created, is an error of [`ready`](crate::TokenProvider::ready).
    pub fn new(path: impl Into<PathBuf>) -> Self {
        let base = path.into();
        Self { namespace: place(&base), files: Arc::new(Files::new(base.clone(), base, None, TIMEOUT)) }
    }

    /// Sets the name that an encrypted record is bound to ([`TokenStore::namespace`]). Default: the absolute path of the
    /// record's file, when this store was created.
    ///
    /// Handles that are made of this store for a namespace have this name, `@`, and their namespace.
    pub fn with_namespace(mut self, namespace: impl Into<String>) -> Self {
        self.namespace = namespace.into();
        Arc::make_mut(&mut self.files).name = Some(self.namespace.clone());
        self
    }

    /// Sets how long an operation waits for the lock: > 0 and <= 1 min. Default: 1 s.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        Arc::make_mut(&mut self.files).timeout = timeout;
        self
    }

    /// Runs `operation` on a thread that may block.
    async fn run<T: Send + 'static>(
        &self,
        operation: impl FnOnce(&Files) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let files = Arc::clone(&self.files);
        tokio::task::spawn_blocking(move || operation(&files)).await.unwrap_or_else(|error| {
            Err(StoreError::unavailable("the operation on the token file was interrupted").with_cause(error))
        })
    }
}

impl TokenStore for FileStore {
    fn namespace(&self) -> &str {
        &self.namespace
    }

    fn validate(&self) -> Result<(), Error> {
        let Files { base, record, .. } = &*self.files;
        let path = base.as_os_str();
        // `file_name` ignores what follows it: `folder/` and `folder/.` are the folder.
        let name = base.file_name().filter(|name| path.as_bytes().ends_with(name.as_bytes()));
        let fits = name.is_some_and(|name| name.len() <= MAX_NAME_LEN) && !path.as_bytes().contains(&0);
        if !fits {
            let accepted = format!(
                "a path that ends with the name of a file of at most {MAX_NAME_LEN} bytes, none of which is 0"
            );
            return Err(Error::out_of_range("FileStore::new", &accepted, format_args!("{path:?}")));
        }
        let name = record.file_name().unwrap_or_default();
        if record != base && (name.len() > MAX_NAME_LEN || name.as_bytes().ends_with(b"@")) {
            let accepted = format!(
                "a namespace of at least one byte whose file's name has at most {MAX_NAME_LEN} bytes"
            );
            let got = format_args!("the name {name:?} of {} bytes", name.len());
            return Err(Error::out_of_range("FileStore::for_namespace", &accepted, got));
        }
        let timeout = self.files.timeout;
        if timeout.is_zero() || timeout > MAX_TIMEOUT {
            return Err(Error::out_of_range("FileStore::timeout", "> 0 and <= 1min", seconds(timeout)));
        }
        Ok(())
    }

    async fn load(&self) -> Result<Option<Record>, StoreError> {
        self.run(Files::load).await
    }

    async fn lease(&self, length: Duration) -> Result<Option<Lease>, StoreError> {
        self.run(move |files| files.lease(length)).await
    }

    async fn extend(&self, lease: &Lease, length: Duration) -> Result<Extension, StoreError> {
        let fence = lease.fence();
        self.run(move |files| files.extend(fence, length)).await
    }

    async fn publish(&self, lease: &Lease, record: Record) -> Result<Publication, StoreError> {
        // Before waiting for the lock, otherwise the wait would lengthen the token's life in the store.
        let (fence, stored_at) = (lease.fence(), wall_clock());
        self.run(move |files| files.publish(fence, &record, stored_at)).await
    }

    /// Drops the lease, which unlocks its file.
    async fn release(&self, lease: Lease) -> Result<(), StoreError> {
        self.run(move |_| {
            drop(lease);
            Ok(())
        })
        .await
    }
}

/// Uses the same folder, and the same timeout.
impl NamespacedStore for FileStore {
    fn for_namespace(&self, namespace: impl Into<String>) -> Self {
        let Files { base, name, timeout, .. } = &*self.files;
        let suffix = format!("@{}", encoded(&namespace.into()));
        // The encoded namespace has neither `@` nor a dot. So this is not the file of the base store, nor one of the
        // files that end in `.lock`, `.lease` or `.new`.
        let record = beside(base, &suffix);
        let namespace = name.as_ref().map_or_else(|| place(&record), |name| format!("{name}{suffix}"));
        Self { files: Arc::new(Files::new(base.clone(), record, name.clone(), *timeout)), namespace }
    }
}

/// Percent-encodes a namespace. No two results differ only in case, and none has a character that a file system may
/// normalize, a dot or a slash.
fn encoded(namespace: &str) -> String {
    let mut encoded = String::with_capacity(namespace.len());
    for byte in namespace.bytes() {
        match byte {
            b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' => encoded.push(byte.into()),
            _ => encoded.push_str(&format!("%{byte:02x}")),
        }
    }
    encoded
}

/// Returns the absolute path as a text that no other path has. Links are not resolved, so that the file need not exist.
fn place(path: &Path) -> String {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.into());
    absolute.as_os_str().as_bytes().escape_ascii().to_string()
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut path = path.as_os_str().to_owned();
    path.push(suffix);
    path.into()
}

impl Files {
    fn new(base: PathBuf, record: PathBuf, name: Option<String>, timeout: Duration) -> Self {
        let beside = |suffix| beside(&record, suffix);
        let (lock, lease, temporary) = (beside(".lock"), beside(".lease"), beside(".new"));
        Self { base, name, record, lock, lease, temporary, timeout, seen: Arc::default() }
    }

    fn stored(&self) -> Result<Option<Stored>, StoreError> {
        let file = self.open(&self.record, OpenOptions::new().read(true))?;
        file.map(|mut file| read(&mut file, &self.record)).transpose()
    }

    fn load(&self) -> Result<Option<Record>, StoreError> {
        let Some(stored) = self.stored()? else { return Ok(None) };
        // The wall clock may have been set back since, or the file may be from elsewhere: the record also ages while it
        // is seen here.
        let seen_for = {
            let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
            let first = seen.filter(|(version, _)| *version == stored.version);
            seen.insert(first.unwrap_or_else(|| (stored.version, Instant::now()))).1.elapsed()
        };
        let age = wall_clock().saturating_sub(stored.stored_at).max(millis(seen_for));
        let record = Record::new(stored.version, stored.record.expose_secret());
        Ok(Some(match stored.lifetime_ms {
            Some(lifetime) => record.expires_in(Duration::from_millis(lifetime.saturating_sub(age))),
            None => record,
        }))
    }

    fn lease(&self, length: Duration) -> Result<Option<Lease>, StoreError> {
        self.create_directory()?;
        let mut lock = self.lock()?;
        let last = newest_lease(&mut lock, &self.lock)?;
        let now = monotonic();
        let guard = self.open_or_create(&self.lease)?;
        let guard = match guard.try_lock() {
            Ok(()) => guard,
            Err(TryLockError::WouldBlock) if last.lasts(now) => return Ok(None),
            Err(TryLockError::WouldBlock) => self.replace_lease()?,
            Err(TryLockError::Error(error)) => return Err(cannot("lock", &self.lease, error)),
        };
        // Based on the wall clock and on the record, so that it is greater than any earlier fence even if the lock's file
        // was deleted or the clock was set back.
        let stored = self.stored().ok().flatten().filter(|stored| stored.version < INVALID_FENCE);
        let newest = stored.map_or(0, |stored| stored.version).max(last.fence);
        let fence = (wall_clock() * 1000).max(newest + 1);
        let length_ms = millis(length);
        write_leased(&mut lock, &Leased { schema: SCHEMA, fence, monotonic: now, length_ms })
            .map_err(|error| cannot("write", &self.lock, error))?;
        Ok(Some(Lease::new(fence).with_guard(guard)))
    }

    /// May extend a lease that was already released. That has no effect: the lease's file is unlocked, so the next
    /// lease is granted whatever time this one has left.
    fn extend(&self, fence: u64, length: Duration) -> Result<Extension, StoreError> {
        let mut lock = self.lock()?;
        let newest = newest_lease(&mut lock, &self.lock)?;
        let now = monotonic();
        if newest.fence != fence || !newest.lasts(now) {
            return Ok(Extension::Expired);
        }
        let extended = Leased { monotonic: now, length_ms: millis(length), ..newest };
        write_leased(&mut lock, &extended).map_err(|error| cannot("write", &self.lock, error))?;
        Ok(Extension::Extended)
    }

    /// Replaces the lease's file, which is still locked by a process that was stopped for longer than its lease.
    ///
    /// The caller must hold the lock. Otherwise two processes could each lock a new file and both have the lease.
    fn replace_lease(&self) -> Result<File, StoreError> {
        fs::remove_file(&self.lease).map_err(|error| cannot("replace", &self.lease, error))?;
        let file = self.open_or_create(&self.lease)?;
        file.try_lock().map_err(|error| cannot("lock", &self.lease, io::Error::from(error)))?;
        Ok(file)
    }

    fn publish(&self, fence: u64, record: &Record, stored_at: Millis) -> Result<Publication, StoreError> {
        let mut lock = self.lock()?;
        if newest_lease(&mut lock, &self.lock)?.fence > fence {
            return Ok(Publication::Superseded);
        }
        // Fails if the existing file is insecure: `load` would reject it, so it is not replaced either.
        self.open(&self.record, OpenOptions::new().read(true))?;
        let stored = ToStore {
            schema: SCHEMA,
            version: fence,
            stored_at,
            lifetime_ms: record.lifetime().map(millis),
            record: record.text(),
        };
        // Serializing a struct of strings and numbers cannot fail.
        let text = Zeroizing::new(serde_json::to_vec(&stored).unwrap_or_default());
        self.replace_record(&text).map_err(|error| cannot("write", &self.record, error))?;
        Ok(Publication::Stored)
    }

    fn replace_record(&self, text: &[u8]) -> io::Result<()> {
        // Left over by a process that was killed while it wrote.
        match fs::remove_file(&self.temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&self.temporary)?;
        file.write_all(text)?;
        file.sync_all()?;
        fs::rename(&self.temporary, &self.record)?;
        // Syncing the directory makes the rename survive a power failure.
        File::open(directory(&self.record))?.sync_all()
    }

    /// Waits until the lock is free, and takes it.
    fn lock(&self) -> Result<File, StoreError> {
        let file = self.open_or_create(&self.lock)?;
        let begun = Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::Error(error)) => return Err(cannot("lock", &self.lock, error)),
                Err(TryLockError::WouldBlock) if begun.elapsed() < self.timeout => {
                    thread::sleep(Duration::from_millis(2));
                }
                Err(TryLockError::WouldBlock) => {
                    return Err(StoreError::unavailable(format!(
                        "another process has held the lock {} for longer than {:?}",
                        self.lock.display(),
                        self.timeout
                    )));
                }
            }
        }
    }

    fn create_directory(&self) -> Result<(), StoreError> {
        let directory = directory(&self.record);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(|error| cannot("create", directory, error))
    }

    fn open_or_create(&self, path: &Path) -> Result<File, StoreError> {
        let mut options = OpenOptions::new();
        let opened =
            self.open(path, options.read(true).write(true).create(true).truncate(false).mode(0o600))?;
        opened.ok_or_else(|| cannot("open", path, io::ErrorKind::NotFound.into()))
    }

    /// Opens a file, after checking that other users cannot access it; `None` if it does not exist.
    fn open(&self, path: &Path, options: &mut OpenOptions) -> Result<Option<File>, StoreError> {
        self.check_directory()?;
        // Without NONBLOCK, opening a named pipe would wait for its other end.
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file = match options.custom_flags(flags.bits().cast_signed()).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) => {
                return Err(insecure(path, "is a symbolic link"));
            }
            Err(error) => return Err(cannot("open", path, error)),
        };
        let metadata = file.metadata().map_err(|error| cannot("inspect", path, error))?;
        if !metadata.is_file() {
            return Err(insecure(path, "is not a regular file"));
        }
        if metadata.uid() != geteuid().as_raw() {
            return Err(insecure(path, "belongs to another user"));
        }
        if metadata.mode() & GROUP_AND_OTHERS != 0 {
            let mode = metadata.mode() & 0o777;
            return Err(insecure(
                path,
                &format!("is accessible to other users: its mode is {mode:03o}, expected 600"),
            ));
        }
        Ok(Some(file))
    }

    /// Fails if other users can write to the directory, because they could replace the file.
    fn check_directory(&self) -> Result<(), StoreError> {
        let directory = directory(&self.record);
        let metadata = match fs::metadata(directory) {
            Ok(metadata) => metadata,
            // There is no file either.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(cannot("inspect", directory, error)),
        };
        if metadata.uid() != geteuid().as_raw() && metadata.uid() != 0 {
            return Err(insecure(directory, "belongs to another user"));
        }
        if metadata.mode() & WRITABLE_BY_OTHERS != 0 && metadata.mode() & STICKY == 0 {
            return Err(insecure(directory, "is writable by other users"));
        }
        Ok(())
    }
}

impl Leased {
    /// Returns whether the lease has time left, if a process has its lock.
    fn lasts(&self, now: Millis) -> bool {
        now.saturating_sub(self.monotonic) < self.length_ms
    }
}

fn directory(path: &Path) -> &Path {
    path.parent().filter(|directory| !directory.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Reads the lease that was granted last. If it cannot be read, it counts as none and the next fence is the clock's
/// time.
fn newest_lease(lock: &mut File, path: &Path) -> Result<Leased, StoreError> {
    match read(lock, path) {
        Ok(Leased { fence: INVALID_FENCE.., .. }) => Ok(Leased::default()),
        Err(error) if error.kind() == StoreErrorKind::InvalidRecord => Ok(Leased::default()),
        read => read,
    }
}

/// Writes the lease in one write of a fixed length. A process that is killed here leaves the old or the new content;
/// after a partial write, the newest fence would be lost.
fn write_leased(lock: &mut File, leased: &Leased) -> io::Result<()> {
    let mut text = serde_json::to_vec(leased)?;
    text.resize(text.len().max(LEASED_LEN), b' ');
    lock.rewind()?;
    lock.write_all(&text)?;
    // Truncates a file that this crate did not write.
    lock.set_len(text.len() as u64)
}

/// Reads a file's JSON, after checking its schema.
fn read<T: DeserializeOwned>(file: &mut File, path: &Path) -> Result<T, StoreError> {
    #[derive(Deserialize)]
    struct Schema {
        schema: u32,
    }

    let invalid = |what: String| StoreError::invalid_record(format!("{} {what}", path.display()));
    let mut text = Zeroizing::new(Vec::new());
    file.take(MAX_LEN + 1).read_to_end(&mut text).map_err(|error| cannot("read", path, error))?;
    if text.len() as u64 > MAX_LEN {
        return Err(invalid(format!("is longer than {MAX_LEN} bytes")));
    }
    // serde's own error messages are dropped because they could quote the text.
    let Schema { schema } =
        serde_json::from_slice(&text).map_err(|_| invalid("does not contain a record".into()))?;
    if schema != SCHEMA {
        return Err(invalid(format!("has schema {schema}, expected {SCHEMA}")));
    }
    serde_json::from_slice(&text).map_err(|_| invalid("does not contain a record".into()))
}

fn wall_clock() -> Millis {
    millis(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}

/// Returns the time of the clock that all processes share, and that nobody can set.
fn monotonic() -> Millis {
    millis(clock_gettime(ClockId::Monotonic).try_into().unwrap_or_default())
}

/// The text has the cause, and the error no source, so that a chain of sources shows the cause once.
fn cannot(what: &str, path: &Path, error: io::Error) -> StoreError {
    StoreError::unavailable(format!("cannot {what} {}: {error}", path.display()))
}

fn insecure(path: &Path, why: &str) -> StoreError {
    StoreError::insecure(format!("{} {why}", path.display()))
}

impl fmt::Debug for FileStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileStore")
            .field("path", &self.files.record)
            .field("timeout", &self.files.timeout)
            .field("namespace", &self.namespace)
            .finish()
    }
}
