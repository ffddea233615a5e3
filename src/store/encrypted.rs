//! [`EncryptedStore`]: a store whose records only those can read who have the key.

use std::{fmt, time::Duration};

use base64::{Engine, prelude::BASE64_STANDARD};
use chacha20poly1305::{
    KeyInit, XChaCha20Poly1305, XNonce,
    aead::{Aead, Generate, Payload},
};
use secrecy::zeroize::Zeroizing;

use super::{Extension, Lease, Publication, Record, TokenStore};
use crate::error::{Error, StoreError};

/// Where a sealed text begins; the number is that of this format.
const FORMAT: &str = "sealed-1";

/// Any [`TokenStore`], with its records encrypted: whoever can read the store has no token.
///
/// The cipher is XChaCha20-Poly1305, with a random nonce for each record. A record is bound to the store's
/// [namespace](TokenStore::namespace) and to its generation: what is copied to another namespace, or passed off as newer
/// than it is, cannot be opened. A record that cannot be opened counts as absent, and [says so](crate::observability);
/// the next one takes its place.
///
/// Its lifetime and its generation are not secret. Whoever can write to the store can take the record away, put back a
/// whole one of before, change its lifetime, or claim the lease: that costs calls, and no token. Who has seen a newer
/// one adopts none of before; for all others it is a token like any that the API refuses.
///
/// ```
/// use tower_bearer::{EncryptedStore, EncryptionKeys};
/// # use std::time::Duration;
/// # use tower_bearer::{Lease, Publication, Record, StoreError, TokenStore};
/// # fn your_key() -> [u8; 32] { [7; 32] }
/// # struct YourStore;
/// # impl TokenStore for YourStore {
/// #     fn namespace(&self) -> &str { "" }
/// #     async fn load(&self) -> Result<Option<Record>, StoreError> { Ok(None) }
/// #     async fn lease(&self, _: Duration) -> Result<Option<Lease>, StoreError> { Ok(None) }
/// #     async fn publish(&self, _: &Lease, _: Record) -> Result<Publication, StoreError> { Ok(Publication::Stored) }
/// #     async fn release(&self, _: Lease) -> Result<(), StoreError> { Ok(()) }
/// # }
/// // 32 random bytes, from wherever your program keeps its secrets.
/// let keys = EncryptionKeys::new("2026-11", &your_key())?;
/// let store = EncryptedStore::new(YourStore, keys);
/// # Ok::<(), tower_bearer::Error>(())
/// ```
#[derive(Debug)]
pub struct EncryptedStore<S> {
    store: S,
    keys: EncryptionKeys,
}

/// The keys of an [`EncryptedStore`], each with an id by which records name the key that they are sealed with.
///
/// # Rotation
///
/// First give every process the new key to [open](Self::and_open_with) records with; when all have it, make it the one
/// that seals, and have the old one opened; when the record has been renewed, drop the old one. A process that lacks a
/// key takes the record for absent, and so costs an authentication: it harms nothing else.
///
/// Keys are overwritten in memory when they are dropped; `Debug` shows their ids alone.
pub struct EncryptionKeys(Vec<(String, XChaCha20Poly1305)>);

impl EncryptionKeys {
    /// The key that seals records, and opens them: 32 bytes that nobody can guess, of a generator or a key derivation.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] unless `id`, which is no secret, is 1 to 64 characters of `A-Z a-z 0-9 - _ .`.
    pub fn new(id: impl Into<String>, key: &[u8; 32]) -> Result<Self, Error> {
        Self(Vec::new()).and_open_with(id, key)
    }

    /// Adds a key that opens records, and seals none.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new), and if there is a key with this id.
    pub fn and_open_with(mut self, id: impl Into<String>, key: &[u8; 32]) -> Result<Self, Error> {
        let id = id.into();
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        if !(1..=64).contains(&id.len()) || !id.bytes().all(fits) {
            return Err(Error::InvalidOption("a key's id is 1 to 64 of A-Z a-z 0-9 - _ .".into()));
        }
        if self.find(&id).is_some() {
            return Err(Error::InvalidOption("no two keys have one id".into()));
        }
        self.0.push((id, XChaCha20Poly1305::new(key.into())));
        Ok(self)
    }

    fn find(&self, id: &str) -> Option<&XChaCha20Poly1305> {
        self.0.iter().find(|(of, _)| of == id).map(|(_, key)| key)
    }
}

impl fmt::Debug for EncryptionKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|(id, _)| id)).finish()
    }
}

impl<S: TokenStore> EncryptedStore<S> {
    /// Encrypts what `store` keeps.
    pub fn new(store: S, keys: EncryptionKeys) -> Self {
        Self { store, keys }
    }

    fn seal(&self, record: Record, fence: u64) -> Result<Record, StoreError> {
        let failed = || StoreError::unavailable("the record cannot be sealed");
        // There is one at least.
        let (id, key) = self.keys.0.first().ok_or_else(failed)?;
        let nonce = XNonce::try_generate().map_err(|error| {
            StoreError::unavailable("there is no randomness to seal the record with").with_cause(error)
        })?;
        let bound_to = self.bound_to(fence);
        let sealed = key
            .encrypt(&nonce, Payload { msg: record.text().as_bytes(), aad: &bound_to })
            .map_err(|_| failed())?;
        let text = format!("{FORMAT}:{id}:{}", BASE64_STANDARD.encode([&nonce[..], &sealed].concat()));
        Ok(record.with_text(text))
    }

    fn open(&self, record: Record) -> Result<Record, StoreError> {
        let invalid = |what: &'static str| StoreError::InvalidRecord(what.into());
        let mut parts = record.text().split(':');
        let (format, id, sealed) = (parts.next(), parts.next(), parts.next());
        let (Some(FORMAT), Some(id), Some(sealed), None) = (format, id, sealed, parts.next()) else {
            return Err(invalid("the stored record is not sealed"));
        };
        let key =
            self.keys.find(id).ok_or_else(|| invalid("the stored record is sealed with an unknown key"))?;
        let cannot =
            || invalid("the stored record cannot be opened: it was changed, or sealed for another place");
        let sealed = BASE64_STANDARD.decode(sealed).map_err(|_| cannot())?;
        let (nonce, sealed) = sealed.split_at_checked(size_of::<XNonce>()).ok_or_else(cannot)?;
        let bound_to = self.bound_to(record.generation());
        let opened = XNonce::try_from(nonce)
            .ok()
            .and_then(|nonce| key.decrypt(&nonce, Payload { msg: sealed, aad: &bound_to }).ok())
            .map(Zeroizing::new)
            .ok_or_else(cannot)?;
        let text = std::str::from_utf8(&opened).map_err(|_| cannot())?.to_owned();
        Ok(record.with_text(text))
    }

    /// What a record of this generation is bound to. Only the namespace is of no fixed length.
    fn bound_to(&self, generation: u64) -> Vec<u8> {
        [FORMAT.as_bytes(), self.store.namespace().as_bytes(), &generation.to_be_bytes()].concat()
    }
}

impl<S: TokenStore> TokenStore for EncryptedStore<S> {
    fn namespace(&self) -> &str {
        self.store.namespace()
    }

    async fn load(&self) -> Result<Option<Record>, StoreError> {
        self.store.load().await?.map(|record| self.open(record)).transpose()
    }

    fn lease(&self, length: Duration) -> impl Future<Output = Result<Option<Lease>, StoreError>> + Send {
        self.store.lease(length)
    }

    fn extend(
        &self,
        lease: &Lease,
        length: Duration,
    ) -> impl Future<Output = Result<Extension, StoreError>> + Send {
        self.store.extend(lease, length)
    }

    async fn publish(&self, lease: &Lease, record: Record) -> Result<Publication, StoreError> {
        self.store.publish(lease, self.seal(record, lease.fence())?).await
    }

    fn release(&self, lease: Lease) -> impl Future<Output = Result<(), StoreError>> + Send {
        self.store.release(lease)
    }
}
