//! Opens files that no other user can access, and reads them.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::Path,
};

use rustix::{fs::OFlags, process::geteuid};
use secrecy::zeroize::Zeroizing;
use serde::{Deserialize, de::DeserializeOwned};
use tower_bearer::store::StoreError;

/// The schema of the files. A file with another schema counts as absent.
pub(super) const SCHEMA: u32 = 1;

/// The maximum length of a file that is read.
const MAX_LEN: u64 = 512 * 1024;

/// Bits of a file's mode.
const GROUP_AND_OTHERS: u32 = 0o077;
const WRITABLE_BY_OTHERS: u32 = 0o022;
const STICKY: u32 = 0o1000;

pub(super) fn open_or_create(path: &Path) -> Result<File, StoreError> {
    let mut options = OpenOptions::new();
    let opened = open(path, options.read(true).write(true).create(true).truncate(false).mode(0o600))?;
    opened.ok_or_else(|| cannot("open", path, io::ErrorKind::NotFound.into()))
}

/// Opens a file, after checking that other users cannot access it; `None` if it does not exist.
pub(super) fn open(path: &Path, options: &mut OpenOptions) -> Result<Option<File>, StoreError> {
    check_directory(path)?;
    // Without NONBLOCK, opening a named pipe would wait for its other end.
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = match options.custom_flags(flags.bits() as i32).open(path) {
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
fn check_directory(path: &Path) -> Result<(), StoreError> {
    let directory = directory(path);
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

/// Returns the directory of a file.
pub(super) fn directory(path: &Path) -> &Path {
    path.parent().filter(|directory| !directory.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Reads a file's JSON, after checking its schema.
pub(super) fn read<T: DeserializeOwned>(file: &mut File, path: &Path) -> Result<T, StoreError> {
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

/// The text has the cause, and the error no source, so that a chain of sources shows the cause once.
pub(super) fn cannot(what: &str, path: &Path, error: io::Error) -> StoreError {
    StoreError::unavailable(format!("cannot {what} {}: {error}", path.display()))
}

fn insecure(path: &Path, why: &str) -> StoreError {
    StoreError::insecure(format!("{} {why}", path.display()))
}
