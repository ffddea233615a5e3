//! [`TokenFile`]: a token in a file that another process rotates.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use secrecy::zeroize::Zeroizing;

use super::{TokenRequest, TokenSource};
use crate::{
    error::{Error, SourceError},
    observability,
    token::Token,
};

const RELOAD_INTERVAL: Duration = Duration::from_secs(60);

/// An access token in a file that another process rotates, as Kubernetes does with the tokens that it
/// [projects](https://kubernetes.io/docs/concepts/storage/projected-volumes/#serviceaccounttoken) into a pod.
///
/// The file is read again before the [interval](Self::reload_interval) is over, behind the callers' backs, and when the API
/// refuses the token. What could not be read (the file is away, empty, or half written) takes nothing away: the last good
/// token is used on.
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
/// A regular file, or a link to one, of at most [`Token::MAX_LEN`] bytes, less the white space around the token. Who may
/// write there is not checked: whoever rotates the token decides.
///
/// # Which origins see the token
///
/// As for [`StaticToken`](crate::StaticToken): name them.
#[derive(Clone, Debug)]
pub struct TokenFile {
    path: Arc<Path>,
    reload_interval: Duration,
}

impl TokenFile {
    /// A file that is not there yet is a transient error when it is first used.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into().into(), reload_interval: RELOAD_INTERVAL }
    }

    /// Sets how long what was read is taken for new. Default: a minute, as Kubernetes' own clients do.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if it is less than a second or more than a day.
    pub fn reload_interval(mut self, interval: Duration) -> Result<Self, Error> {
        if !(Duration::from_secs(1)..=Duration::from_secs(24 * 60 * 60)).contains(&interval) {
            return Err(Error::InvalidOption("a token file is read again after a second to a day".into()));
        }
        self.reload_interval = interval;
        Ok(self)
    }

    async fn read(&self) -> Result<Token, SourceError> {
        let path = Arc::clone(&self.path);
        // A disk may be slow, or a network's.
        let read = tokio::task::spawn_blocking(move || read(&path)).await;
        let text = read.unwrap_or_else(|error| Err(io::Error::other(error))).map_err(|error| {
            SourceError::unavailable(format!("{} cannot be read", self.path.display())).with_cause(error)
        })?;
        Token::builder(text.trim()).expires_in(self.reload_interval).build().map_err(|error| {
            SourceError::invalid_response(format!("{} holds no access token", self.path.display()))
                .with_cause(error)
        })
    }
}

impl TokenSource for TokenFile {
    async fn fetch(&self, request: &TokenRequest<'_>) -> Result<Token, SourceError> {
        match (self.read().await, request.previous()) {
            (Err(error), Some(last_good)) => {
                observability::token_file_unreadable(error);
                Ok(Token::builder(last_good.access_token()).expires_in(self.reload_interval).build()?)
            }
            (read, _) => read,
        }
    }
}

fn read(path: &Path) -> io::Result<Zeroizing<String>> {
    // Before it is opened: to open a pipe is to wait for whoever writes there.
    if !path.metadata()?.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    // With room for white space, and all at once, so that no copy is left behind by its growth.
    let most = Token::MAX_LEN + 1024;
    let mut text = Zeroizing::new(String::with_capacity(most + 1));
    File::open(path)?.take(most as u64 + 1).read_to_string(&mut text)?;
    if text.len() > most {
        return Err(io::Error::other("it is longer than an access token may be"));
    }
    Ok(text)
}
