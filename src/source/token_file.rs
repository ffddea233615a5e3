//! [`TokenFile`]: a token in a file that another process rotates.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use std::{io, thread};

use secrecy::zeroize::Zeroizing;

use super::{DAY, SECOND, TokenRequest, TokenSource, check_duration};
use crate::{error::SourceError, observability, token::Token};

const RELOAD_INTERVAL: Duration = Duration::from_secs(60);

/// A file is read until two reads agree, this long apart, and at most so often.
const SETTLING: (Duration, usize) = (Duration::from_millis(10), 50);

/// What a JWT may begin with: the name of its header's first parameter (`alg`, `typ`, `kid`, `enc`, `cty`, `x5t`).
const JWT_HEADERS: [&str; 6] = ["eyJhbGci", "eyJ0eXAi", "eyJraWQi", "eyJlbmMi", "eyJjdHki", "eyJ4NXQi"];

/// A [`TokenSource`] that reads an access token from a file that another process rotates.
///
/// Kubernetes rotates the tokens that it
/// [projects](https://kubernetes.io/docs/concepts/storage/projected-volumes/#serviceaccounttoken) into a pod in this
/// way.
///
/// The file is read again in the background before the [interval](Self::reload_interval) ends, and when the API
/// challenges the token. If the file cannot be read, or has no token (it is missing, empty or half written), the last good
/// token remains in use, and a [log event](crate::observability) has the reason.
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
/// The file has the token alone: no `Bearer `, no quotes, no JSON, no byte order mark, no UTF-16. It should be replaced in
/// one step, by a rename. If it is written in place instead, it is read again until it stays the same for 10 ms, and a JWT
/// without its signature counts as half written. So does one with `alg: none`, which has an empty signature.
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
        let valid = access_token(&text).map_err(str::to_owned).and_then(|token| {
            let token = Token::builder(token).expires_in(self.reload_interval).build();
            token.map_err(|error| error.to_string())
        });
        valid.map_err(|why| {
            SourceError::invalid_response(format!("{shown} does not contain a valid access token: {why}"))
        })
    }
}

impl TokenSource for TokenFile {
    async fn fetch(&self, request: &TokenRequest<'_>) -> Result<Token, SourceError> {
        self.validate()?;
        match (self.read().await, request.previous()) {
            (Err(error), Some(last_good)) => {
                let failures = self.failures.fetch_add(1, Ordering::Relaxed) + 1;
                observability::token_file_unreadable(&error, failures);
                Ok(Token::builder(last_good.access_token()).expires_in(self.reload_interval).build()?)
            }
            (read, _) => read.inspect(|_| match self.failures.swap(0, Ordering::Relaxed) {
                0 => {}
                failures => observability::token_file_readable(failures),
            }),
        }
    }

    fn validate(&self) -> Result<(), SourceError> {
        check_duration("reload_interval", self.reload_interval, SECOND..=DAY, ">= 1s and <= 1d")
    }
}

/// Returns the text of the file without the white space around it, or why it is no token. No reason quotes it.
fn access_token(text: &[u8]) -> Result<&str, &'static str> {
    let utf8 = std::str::from_utf8(text);
    let token = utf8.unwrap_or_default().trim();
    let quotes = ['"', '\'', '`'];
    let first_word = token.split([' ', '\t', ':']).next().unwrap_or_default();
    let is_jwt = JWT_HEADERS.iter().any(|start| token.starts_with(start) || start.starts_with(token));
    // A signed JWT has three parts, an encrypted one five. The last is never empty.
    let is_whole = matches!(token.split('.').count(), 3 | 5) && !token.ends_with('.');
    let flaws = [
        (text.starts_with(b"\xef\xbb\xbf"), "it starts with a byte order mark"),
        (text.starts_with(b"\xff\xfe") || text.starts_with(b"\xfe\xff"), "it is UTF-16"),
        (text.contains(&0), "it has a NUL byte: it is binary, UTF-16 or half written"),
        (utf8.is_err(), "it is not UTF-8"),
        (token.is_empty(), "it is empty"),
        (token.starts_with(['{', '[']), "it is JSON"),
        (token.starts_with(quotes) || token.ends_with(quotes), "it has quotes"),
        (first_word.eq_ignore_ascii_case("Bearer"), "it has `Bearer` before the token"),
        (token.contains(['\r', '\n']), "it has more than one line"),
        (token.contains(char::is_whitespace), "it has more than one word"),
        (is_jwt && !is_whole, "it is a JWT without its end: it is half written"),
    ];
    flaws.into_iter().find(|(has, _)| *has).map_or(Ok(token), |(_, flaw)| Err(flaw))
}

/// Reads the file until two reads agree: it may be written meanwhile.
fn read(path: &Path) -> io::Result<Zeroizing<Vec<u8>>> {
    let (pause, most) = SETTLING;
    let mut text = read_once(path)?;
    for _ in 0..most {
        thread::sleep(pause);
        let again = read_once(path)?;
        if again == text {
            return Ok(text);
        }
        text = again;
    }
    Err(io::Error::other("it does not stop changing"))
}

fn read_once(path: &Path) -> io::Result<Zeroizing<Vec<u8>>> {
    // Checked before the file is opened, because opening a pipe would block until another process writes to it.
    if !path.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    // The capacity has room for white space. It is reserved at once, because growth would leave a copy of the token in
    // memory.
    let max = Token::MAX_LEN + 1024;
    let mut text = Zeroizing::new(Vec::with_capacity(max + 1));
    File::open(path)?.take(max as u64 + 1).read_to_end(&mut text)?;
    if text.len() > max {
        return Err(io::Error::other("it is longer than an access token can be"));
    }
    Ok(text)
}
