//! [`FileStore`]: one token for the processes of one host, in a file that is theirs alone.

use std::{
    fmt,
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Read, Seek, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use rustix::{fs::OFlags, process::geteuid};
use secrecy::{ExposeSecret, SecretString, zeroize::Zeroizing};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{Extension, Lease, Publication, Record, TokenStore};
use crate::{
    error::{Error, StoreError},
    observability::millis,
};

/// The schema of the files. A file of another counts as absent.
const SCHEMA: u32 = 1;

/// The most that is read of a file.
const MAX_LEN: u64 = 512 * 1024;

/// How long the lock is waited for, which nobody holds for longer than it takes to write a file.
const TIMEOUT: Duration = Duration::from_secs(1);

/// The clock gives no such fence for two centuries: what holds it was not written here.
const NO_FENCE: u64 = 1 << 53;

/// As long as four numbers can make it; what is shorter is followed by spaces.
const LEASED_LEN: usize = 128;

/// Bits of a file's mode.
const GROUP_AND_OTHERS: u32 = 0o077;
const WRITABLE_BY_OTHERS: u32 = 0o022;
const STICKY: u32 = 0o1000;

/// The token in a file, for the processes that one user runs on one host: command-line tools, workers.
///
/// Beside the file are two others, whose names end in `.lock` and `.lease`; leave them there. A new file is written whole
/// beside the old one, and put in its place in one step, so that whoever reads has the one or the other. Use a local file
/// system: network file systems keep neither locks nor that promise well.
///
/// ```no_run
/// use tower_bearer::{ApiVideo, FileStore, TokenProvider};
///
/// let home = std::env::var("HOME").unwrap_or_default();
/// let store = FileStore::new(format!("{home}/.cache/your-tool/token"));
/// let provider = TokenProvider::builder(ApiVideo::new("your API key")).store(store).build()?;
/// # Ok::<(), tower_bearer::Error>(())
/// ```
///
/// # Who may read it
///
/// The user that runs the process, and nobody else: the files are made with mode 0600, and their folder, if there is
/// none, with mode 0700. A file that is a symbolic link, another user's, or open to others is
/// [refused](StoreError::Unsafe), with the reason, and so is a folder in which others could replace it; the process then
/// goes on alone. What the file holds is a secret as good as a password, until it expires:
/// [`EncryptedStore`](crate::EncryptedStore) has it encrypted (feature `encryption`).
///
/// # Locks
///
/// A lease ends with its time, or with its process, however that ends: the kernel lets go of its lock. Each operation
/// runs on a thread of tokio's for blocking work, and gives up when another process, which would have to be stopped in
/// the middle of writing, holds the lock for longer than the [timeout](Self::timeout).
pub struct FileStore {
    files: Arc<Files>,
    namespace: String,
}

#[derive(Clone)]
struct Files {
    record: PathBuf,
    /// Locked while a lease is given out, and while a record is written; holds the newest fence.
    lock: PathBuf,
    /// Locked by whoever has the lease, for as long as their process lives.
    lease: PathBuf,
    /// What is about to be the record.
    temporary: PathBuf,
    timeout: Duration,
}

/// What the record's file holds.
#[derive(Deserialize)]
struct Stored {
    generation: u64,
    stored_at: Millis,
    lifetime_ms: Option<u64>,
    record: SecretString,
}

#[derive(Serialize)]
struct ToStore<'a> {
    schema: u32,
    generation: u64,
    stored_at: Millis,
    lifetime_ms: Option<u64>,
    record: &'a str,
}

/// What the lock's file holds: the lease that was given out last.
#[derive(Default, Deserialize, Serialize)]
struct Leased {
    schema: u32,
    fence: u64,
    leased_at: Millis,
    length_ms: u64,
}

/// Milliseconds of the wall clock, which is the same in every process, and after a restart.
type Millis = u64;

impl FileStore {
    /// The token in the file at `path`. Neither it nor its folder need be there yet.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        let record = path.into();
        let namespace = record.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let beside = |suffix: &str| {
            let mut path = record.clone().into_os_string();
            path.push(suffix);
            PathBuf::from(path)
        };
        let (lock, lease, temporary) = (beside(".lock"), beside(".lease"), beside(".new"));
        let files = Files { record, lock, lease, temporary, timeout: TIMEOUT };
        Self { files: Arc::new(files), namespace }
    }

    /// Sets what an encrypted record is bound to ([`TokenStore::namespace`]). Default: the file's name.
    pub fn with_namespace(mut self, namespace: impl Into<String>) -> Self {
        self.namespace = namespace.into();
        self
    }

    /// Sets how long the lock is waited for. Default: 1 s.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if it is zero or more than a minute.
    pub fn timeout(mut self, timeout: Duration) -> Result<Self, Error> {
        if timeout.is_zero() || timeout > Duration::from_secs(60) {
            return Err(Error::InvalidOption("a file's lock is waited for up to a minute".into()));
        }
        Arc::make_mut(&mut self.files).timeout = timeout;
        Ok(self)
    }

    /// Runs `operation` where it may block.
    async fn run<T: Send + 'static>(
        &self,
        operation: impl FnOnce(&Files) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let files = Arc::clone(&self.files);
        tokio::task::spawn_blocking(move || operation(&files)).await.unwrap_or_else(|error| {
            Err(StoreError::unavailable("the token's file was not looked at").with_cause(error))
        })
    }
}

impl TokenStore for FileStore {
    fn namespace(&self) -> &str {
        &self.namespace
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
        // Before the lock is waited for.
        let (fence, stored_at) = (lease.fence(), now_millis());
        self.run(move |files| files.publish(fence, &record, stored_at)).await
    }

    /// Dropping the lease is all: its file is unlocked.
    async fn release(&self, lease: Lease) -> Result<(), StoreError> {
        self.run(move |_| {
            drop(lease);
            Ok(())
        })
        .await
    }
}

impl Files {
    fn load(&self) -> Result<Option<Record>, StoreError> {
        let mut options = OpenOptions::new();
        let Some(mut file) = self.open(&self.record, options.read(true))? else { return Ok(None) };
        let stored: Stored = read(&mut file, &self.record)?;
        let record = Record::new(stored.generation, stored.record.expose_secret());
        Ok(Some(match stored.lifetime_ms {
            Some(lifetime) => {
                // A clock that was set back makes nothing younger than new.
                let age = now_millis().saturating_sub(stored.stored_at);
                record.expires_in(Duration::from_millis(lifetime.saturating_sub(age)))
            }
            None => record,
        }))
    }

    fn lease(&self, length: Duration) -> Result<Option<Lease>, StoreError> {
        self.make_folder()?;
        let mut lock = self.lock()?;
        let last = newest_lease(&mut lock, &self.lock)?;
        let now = now_millis();
        let guard = self.open_or_create(&self.lease)?;
        let guard = match guard.try_lock() {
            Ok(()) => guard,
            Err(TryLockError::WouldBlock) if last.lasts(now) => return Ok(None),
            Err(TryLockError::WouldBlock) => self.replace_lease()?,
            Err(TryLockError::Error(error)) => return Err(cannot("lock", &self.lease, error)),
        };
        // By the clock, so that it is greater than any that was forgotten with its file.
        let fence = (now * 1000).max(last.fence + 1);
        let length_ms = millis(length);
        write_leased(&mut lock, &Leased { schema: SCHEMA, fence, leased_at: now, length_ms })
            .map_err(|error| cannot("write", &self.lock, error))?;
        Ok(Some(Lease::new(fence).with_guard(guard)))
    }

    /// A lease that was given back may be extended here. That has no effect: the lock of its file is free, and so the next
    /// lease is given out whatever the time of this one.
    fn extend(&self, fence: u64, length: Duration) -> Result<Extension, StoreError> {
        let mut lock = self.lock()?;
        let newest = newest_lease(&mut lock, &self.lock)?;
        let now = now_millis();
        if newest.fence != fence || !newest.lasts(now) {
            return Ok(Extension::Expired);
        }
        let extended = Leased { leased_at: now, length_ms: millis(length), ..newest };
        write_leased(&mut lock, &extended).map_err(|error| cannot("write", &self.lock, error))?;
        Ok(Extension::Extended)
    }

    /// Puts another file in the place of that which a process holds that has been stopped for longer than its lease.
    /// Whoever does so has the lock, so that there is one at a time.
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
        // A loader refuses what is there; so nothing is put in its place.
        self.open(&self.record, OpenOptions::new().read(true))?;
        let stored = ToStore {
            schema: SCHEMA,
            generation: fence,
            stored_at,
            lifetime_ms: record.lifetime().map(millis),
            record: record.text(),
        };
        // A text and numbers always serialize.
        let text = Zeroizing::new(serde_json::to_vec(&stored).unwrap_or_default());
        self.replace_record(&text).map_err(|error| cannot("write", &self.record, error))?;
        Ok(Publication::Stored)
    }

    fn replace_record(&self, text: &[u8]) -> io::Result<()> {
        // Of a process that was killed here.
        match fs::remove_file(&self.temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&self.temporary)?;
        file.write_all(text)?;
        file.sync_all()?;
        fs::rename(&self.temporary, &self.record)?;
        // The new name, too, is there after a power cut.
        File::open(folder(&self.record))?.sync_all()
    }

    /// The lock, as soon as nobody holds it.
    fn lock(&self) -> Result<File, StoreError> {
        let file = self.open_or_create(&self.lock)?;
        let deadline = Instant::now() + self.timeout;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::Error(error)) => return Err(cannot("lock", &self.lock, error)),
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                    thread::sleep(Duration::from_millis(2));
                }
                Err(TryLockError::WouldBlock) => {
                    return Err(StoreError::unavailable(format!(
                        "another process has held {} for longer than {:?}",
                        self.lock.display(),
                        self.timeout
                    )));
                }
            }
        }
    }

    fn make_folder(&self) -> Result<(), StoreError> {
        let folder = folder(&self.record);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .map_err(|error| cannot("make", folder, error))
    }

    fn open_or_create(&self, path: &Path) -> Result<File, StoreError> {
        let mut options = OpenOptions::new();
        let opened =
            self.open(path, options.read(true).write(true).create(true).truncate(false).mode(0o600))?;
        opened.ok_or_else(|| cannot("open", path, io::ErrorKind::NotFound.into()))
    }

    /// Opens a file that is safe to use; `None` if there is none.
    fn open(&self, path: &Path, options: &mut OpenOptions) -> Result<Option<File>, StoreError> {
        self.check_folder()?;
        // To open a pipe is to wait for its other end.
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file = match options.custom_flags(flags.bits().cast_signed()).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) => {
                return Err(not_safe(path, "is a symbolic link"));
            }
            Err(error) => return Err(cannot("open", path, error)),
        };
        let metadata = file.metadata().map_err(|error| cannot("look at", path, error))?;
        if !metadata.is_file() {
            return Err(not_safe(path, "is no regular file"));
        }
        if metadata.uid() != geteuid().as_raw() {
            return Err(not_safe(path, "is another user's"));
        }
        if metadata.mode() & GROUP_AND_OTHERS != 0 {
            let mode = metadata.mode() & 0o777;
            return Err(not_safe(path, &format!("is open to other users (mode {mode:03o}, not 600)")));
        }
        Ok(Some(file))
    }

    /// In a folder where others may write, they could put a file of their own in the place of ours.
    fn check_folder(&self) -> Result<(), StoreError> {
        let folder = folder(&self.record);
        let metadata = match fs::metadata(folder) {
            Ok(metadata) => metadata,
            // Then there is no file either.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(cannot("look at", folder, error)),
        };
        if metadata.uid() != geteuid().as_raw() && metadata.uid() != 0 {
            return Err(not_safe(folder, "is another user's"));
        }
        if metadata.mode() & WRITABLE_BY_OTHERS != 0 && metadata.mode() & STICKY == 0 {
            return Err(not_safe(folder, "can be written to by other users"));
        }
        Ok(())
    }
}

impl Leased {
    /// Whether its time is not over. A clock that was set back ends it: better two leases than none.
    fn lasts(&self, now: Millis) -> bool {
        now.checked_sub(self.leased_at).is_some_and(|age| age < self.length_ms)
    }
}

fn folder(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// The lease that was given out last; none if that cannot be read, so that the next fence is by the clock alone.
fn newest_lease(lock: &mut File, path: &Path) -> Result<Leased, StoreError> {
    match read(lock, path) {
        Ok(Leased { fence: NO_FENCE.., .. }) | Err(StoreError::InvalidRecord(_)) => Ok(Leased::default()),
        read => read,
    }
}

/// In one write of one length: a process that is killed here leaves the one or the other, and no fence is forgotten.
fn write_leased(lock: &mut File, leased: &Leased) -> io::Result<()> {
    let mut text = serde_json::to_vec(leased)?;
    text.resize(text.len().max(LEASED_LEN), b' ');
    lock.rewind()?;
    lock.write_all(&text)?;
    // What was longer was not written here.
    lock.set_len(text.len() as u64)
}

/// Reads the JSON of our schema.
fn read<T: DeserializeOwned>(file: &mut File, path: &Path) -> Result<T, StoreError> {
    #[derive(Deserialize)]
    struct Schema {
        schema: u32,
    }

    let invalid = |what: String| StoreError::InvalidRecord(format!("{} {what}", path.display()).into());
    let mut text = Zeroizing::new(Vec::new());
    file.take(MAX_LEN + 1).read_to_end(&mut text).map_err(|error| cannot("read", path, error))?;
    if text.len() as u64 > MAX_LEN {
        return Err(invalid(format!("is longer than {MAX_LEN} bytes")));
    }
    // serde's own messages could quote the text.
    let Schema { schema } = serde_json::from_slice(&text).map_err(|_| invalid("holds no record".into()))?;
    if schema != SCHEMA {
        return Err(invalid(format!("is of schema {schema}, not {SCHEMA}")));
    }
    serde_json::from_slice(&text).map_err(|_| invalid("holds no record".into()))
}

fn now_millis() -> Millis {
    millis(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}

fn cannot(what: &str, path: &Path, error: io::Error) -> StoreError {
    StoreError::unavailable(format!("cannot {what} {}", path.display())).with_cause(error)
}

fn not_safe(path: &Path, why: &str) -> StoreError {
    StoreError::Unsafe(format!("{} {why}: it is not used", path.display()).into())
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
