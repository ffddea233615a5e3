//! [`Files`]: the record, the lock and the lease, each in a file.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Seek, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
    time::{ClockId, clock_gettime},
};
use secrecy::{ExposeSecret, SecretString, zeroize::Zeroizing};
use serde::{Deserialize, Serialize};
use tower_bearer::store::{Extension, Lease, Publication, Record, StoreError, StoreErrorKind};

use super::{
    access::{SCHEMA, cannot, directory, open, open_or_create, read},
    beside,
};
use crate::millis;

/// A fence from here on was not written by this crate: the clock does not reach it for two centuries.
const INVALID_FENCE: u64 = 1 << 53;

/// The length of the lock's file: enough for its four numbers, padded with spaces.
const LEASED_LEN: usize = 128;

#[derive(Clone)]
pub(super) struct Files {
    /// The path that [`FileStore::new`](super::FileStore::new) was called with. The record of another namespace is next to
    /// it.
    pub(super) base: PathBuf,
    /// That of [`FileStore::with_namespace`](super::FileStore::with_namespace).
    pub(super) name: Option<String>,
    pub(super) record: PathBuf,
    /// Locked while a lease is granted or extended, and while a record is written. Contains the newest lease.
    lock: PathBuf,
    /// Locked by the process that has the lease, until it releases the lease or ends.
    lease: PathBuf,
    /// The next record while it is written. Only the holder of `lock` writes it.
    temporary: PathBuf,
    pub(super) timeout: Duration,
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

pub(super) type Millis = u64;

impl Files {
    pub(super) fn new(base: PathBuf, record: PathBuf, name: Option<String>, timeout: Duration) -> Self {
        let beside = |suffix| beside(&record, suffix);
        let (lock, lease, temporary) = (beside(".lock"), beside(".lease"), beside(".new"));
        Self { base, name, record, lock, lease, temporary, timeout, seen: Arc::default() }
    }

    fn stored(&self) -> Result<Option<Stored>, StoreError> {
        let file = open(&self.record, OpenOptions::new().read(true))?;
        file.map(|mut file| read(&mut file, &self.record)).transpose()
    }

    pub(super) fn load(&self) -> Result<Option<Record>, StoreError> {
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

    pub(super) fn lease(&self, length: Duration) -> Result<Option<Lease>, StoreError> {
        self.create_directory()?;
        let mut lock = self.lock()?;
        let last = newest_lease(&mut lock, &self.lock)?;
        let now = monotonic();
        let guard = open_or_create(&self.lease)?;
        let guard = match try_lock(&guard) {
            Ok(true) => guard,
            Ok(false) if last.lasts(now) => return Ok(None),
            Ok(false) => self.replace_lease()?,
            Err(error) => return Err(cannot("lock", &self.lease, error)),
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
    pub(super) fn extend(&self, fence: u64, length: Duration) -> Result<Extension, StoreError> {
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
        let file = open_or_create(&self.lease)?;
        match try_lock(&file) {
            Ok(true) => Ok(file),
            Ok(false) => Err(cannot("lock", &self.lease, io::ErrorKind::WouldBlock.into())),
            Err(error) => Err(cannot("lock", &self.lease, error)),
        }
    }

    pub(super) fn publish(
        &self,
        fence: u64,
        record: &Record,
        stored_at: Millis,
    ) -> Result<Publication, StoreError> {
        let mut lock = self.lock()?;
        if newest_lease(&mut lock, &self.lock)?.fence > fence {
            return Ok(Publication::Superseded);
        }
        // Fails if the existing file is insecure: `load` would reject it, so it is not replaced either.
        open(&self.record, OpenOptions::new().read(true))?;
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
        let file = open_or_create(&self.lock)?;
        let begun = Instant::now();
        loop {
            match try_lock(&file) {
                Ok(true) => return Ok(file),
                Err(error) => return Err(cannot("lock", &self.lock, error)),
                Ok(false) if begun.elapsed() < self.timeout => thread::sleep(Duration::from_millis(2)),
                Ok(false) => {
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
}

impl Leased {
    /// Returns whether the lease has time left, if a process has its lock.
    fn lasts(&self, now: Millis) -> bool {
        now.saturating_sub(self.monotonic) < self.length_ms
    }
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

/// Locks a file, without waiting. Returns false if another process has it.
fn try_lock(file: &File) -> io::Result<bool> {
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

pub(super) fn wall_clock() -> Millis {
    millis(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}

/// Returns the time of the clock that all processes share, and that nobody can set.
fn monotonic() -> Millis {
    millis(clock_gettime(ClockId::Monotonic).try_into().unwrap_or_default())
}
