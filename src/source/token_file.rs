//! [`TokenFile`]: a token in a file that another process rotates.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use secrecy::zeroize::Zeroizing;

use super::{TokenRequest, TokenSource};
use crate::{
    error::{SourceError, seconds},
    observability,
    token::Token,
};

const RELOAD_INTERVAL: Duration = Duration::from_secs(60);

/// A [`TokenSource`] that reads an access token from a file that another process rotates.
///
/// Kubernetes rotates the tokens that it
/// [projects](https://kubernetes.io/docs/concepts/storage/projected-volumes/#serviceaccounttoken) into a pod in this
/// way.
///
/// The file is read again in the background before the [interval](Self::reload_interval) ends, and when the API
/// challenges the token. If the file cannot be read (it is missing, empty or half written), the last good token remains
/// in use.
///
/// ```
/// use tower_bearer::{BearerAuthLayer, AllowedOrigins, TokenFile, TokenProvider};
///
/// let source = TokenFile::new("/var/run/secrets/tokens/vault-token");
/// let layer = BearerAuthLayer::with_provider(TokenProvider::new(source))
///     .allowed_origins(AllowedOrigins::origins(["https://vault.example"])?);
/// # Ok::<(), tower_bearer::Error>(())
/// ```
///
/// # What is read
///
/// A regular file, or a link to one, of at most [`Token::MAX_LEN`] bytes without the white space around the token. The
/// file's owner and permissions are not checked.
///
/// # Which origins see the token
///
/// The same as for [`StaticToken`](crate::StaticToken#which-origins-see-the-token).
#[derive(Clone, Debug)]
pub struct TokenFile {
    path: Arc<Path>,
    reload_interval: Duration,
    /// How often in a row the file could not be read. Clones share it, as they share the file.
    failures: Arc<AtomicU64>,
}

impl TokenFile {
    /// Makes a source that reads the file at `path`.
    ///
    /// A file that does not exist yet is a transient error of the first use.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into().into(), reload_interval: RELOAD_INTERVAL, failures: Arc::default() }
    }

    /// Sets the interval after which the file is read again. Default: 1 min, like Kubernetes' own clients.
    ///
    /// It must be at least a second and at most a day. Otherwise it is an error of
    /// [`TokenProviderBuilder::build`](crate::TokenProviderBuilder::build), or else of the first use.
    pub fn reload_interval(mut self, interval: Duration) -> Self {
        self.reload_interval = interval;
        self
    }

    async fn read(&self) -> Result<Token, SourceError> {
        let (path, shown) = (Arc::clone(&self.path), self.path.display());
        // The file may be on a slow disk or on a network.
        let read = tokio::task::spawn_blocking(move || read(&path)).await;
        let text = read
            .unwrap_or_else(|error| Err(io::Error::other(error)))
            .map_err(|error| SourceError::unavailable(format!("{shown} cannot be read: {error}")))?;
        Token::builder(text.trim()).expires_in(self.reload_interval).build().map_err(|error| {
            SourceError::invalid_response(format!("{shown} does not contain a valid access token: {error}"))
        })
    }
}

impl TokenSource for TokenFile {
    async fn fetch(&self, request: &TokenRequest<'_>) -> Result<Token, SourceError> {
        self.validate()?;
        match (self.read().await, request.previous()) {
            (Err(error), Some(last_good)) => {
                observability::token_file_unreadable(
                    &error,
                    self.failures.fetch_add(1, Ordering::Relaxed) + 1,
                );
                Ok(Token::builder(last_good.access_token()).expires_in(self.reload_interval).build()?)
            }
            (read, _) => read.inspect(|_| match self.failures.swap(0, Ordering::Relaxed) {
                0 => {}
                failures => observability::token_file_readable(failures),
            }),
        }
    }

    fn validate(&self) -> Result<(), SourceError> {
        if (Duration::from_secs(1)..=Duration::from_secs(24 * 60 * 60)).contains(&self.reload_interval) {
            return Ok(());
        }
        let got = seconds(self.reload_interval);
        Err(SourceError::configuration(format!("reload_interval must be >= 1s and <= 1d, got {got}")))
    }
}

fn read(path: &Path) -> io::Result<Zeroizing<String>> {
    // Checked before the file is opened, because opening a pipe would block until another process writes to it.
    if !path.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    // The capacity has room for white space. It is reserved at once, because growth would leave a copy of the token in
    // memory.
    let max = Token::MAX_LEN + 1024;
    let mut text = Zeroizing::new(String::with_capacity(max + 1));
    File::open(path)?.take(max as u64 + 1).read_to_string(&mut text)?;
    if text.len() > max {
        return Err(io::Error::other("it is longer than an access token can be"));
    }
    Ok(text)
}
