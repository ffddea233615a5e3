//! [`FileStore`]: one token for the processes of one user on one host, in a file.
//!
//! [`files`] has the operations on the files, and [`access`] opens a file that no other user can access.

mod access;
mod files;

use std::{
    fmt,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tower_bearer::{
    Error,
    store::{Extension, Lease, NamespacedStore, Publication, Record, StoreError, TokenStore},
};

use self::files::{Files, wall_clock};
use crate::invalid;

/// The default time to wait for the lock. A process holds it only while it writes a file.
const TIMEOUT: Duration = Duration::from_secs(1);
const MAX_TIMEOUT: Duration = Duration::from_secs(60);

/// The maximum length of the file's name: that of a file system, without the suffix of the other files.
const MAX_NAME_LEN: usize = 255 - ".lease".len();

/// Keeps the token in a file, for the processes that one user runs on one host: command-line tools, workers.
///
/// Two more files are kept next to it, whose names end in `.lock` and `.lease`. Do not remove them. A new record is
/// written to a temporary file, which then replaces the old one in one step, so a reader sees either the old or the
/// new record. Use a local file system: network file systems guarantee neither locks nor this replacement.
///
/// ```no_run
/// use tower_bearer::{ApiVideo, TokenProvider};
/// use tower_bearer_store::FileStore;
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
/// with mode 0700. A file is [rejected](tower_bearer::store::StoreErrorKind::Insecure), with the reason, if it is a symbolic link, belongs
/// to another user, or is accessible to other users. So is a directory in which other users could replace the file.
/// The process then refreshes without the store, unless it has a user's [login](tower_bearer::TokenProviderBuilder::login). The
/// file's content is as sensitive as a password until the token expires, or until a user's login ends:
/// [`EncryptedStore`](crate::EncryptedStore) encrypts it (feature `encryption`).
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

impl FileStore {
    /// Creates a store with its record in the file at `path`. The file and its directory need not exist yet.
    ///
    /// `path` must end with the name of a file, of at most 249 bytes: otherwise
    /// [`build`](tower_bearer::TokenProviderBuilder::build) returns an error. A place that cannot be used, such as a directory
    /// that cannot be created, is an error of [`ready`](tower_bearer::TokenProvider::ready).
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
            return Err(invalid(format!(
                "the path of the file store must be one that ends with the name of a file of at most {MAX_NAME_LEN} bytes, none of \
                 which is 0, got {path:?}"
            )));
        }
        let name = record.file_name().unwrap_or_default();
        if record != base && (name.len() > MAX_NAME_LEN || name.as_bytes().ends_with(b"@")) {
            let length = name.len();
            return Err(invalid(format!(
                "the namespace of the file store must be at least one byte whose file's name has at most \
                 {MAX_NAME_LEN} bytes, got the name {name:?} of {length} bytes"
            )));
        }
        let timeout = self.files.timeout;
        if timeout.is_zero() || timeout > MAX_TIMEOUT {
            let got = timeout.as_secs_f64();
            return Err(invalid(format!(
                "the timeout of the file store must be > 0 and <= 1min, got {got}s"
            )));
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

impl fmt::Debug for FileStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileStore")
            .field("path", &self.files.record)
            .field("timeout", &self.files.timeout)
            .field("namespace", &self.namespace)
            .finish()
    }
}
