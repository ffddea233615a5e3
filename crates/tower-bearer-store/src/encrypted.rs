//! [`EncryptedStore`]: encrypts the records of another store.

use std::{fmt, sync::Arc, time::Duration};

use base64::{Engine, prelude::BASE64_STANDARD};
use chacha20poly1305::{
    KeyInit, XChaCha20Poly1305, XNonce,
    aead::{Aead, Generate, Payload},
};
use secrecy::zeroize::Zeroizing;

use tower_bearer::{
    Error,
    store::{Extension, Lease, NamespacedStore, Publication, Record, StoreError, TokenStore},
};

use crate::invalid;

/// The prefix of an encrypted text, with the version of the format.
const FORMAT: &str = "sealed-1";

/// Encrypts the records of any [`TokenStore`], so that read access to the store does not reveal the token.
///
/// The cipher is XChaCha20-Poly1305, with a random nonce for each record. A record is bound to the store's
/// [namespace](TokenStore::namespace) and to its version: a copy in another namespace, or with another version,
/// cannot be decrypted. The namespace of a `FileStore` is the absolute path of its file. That of a `RedisStore` has
/// neither the server nor the prefix of the keys: use other encryption keys there. A record that cannot be decrypted is
/// an [invalid one](tower_bearer::store::StoreErrorKind::InvalidRecord), which is [reported](tower_bearer::observability).
///
/// A record's lifetime and version are not secret. With write access to the store it is possible to delete the
/// record, restore an earlier one, change its lifetime, or take the lease. That costs calls, but reveals no token. A
/// process that has seen a newer record does not adopt an earlier one; any other process treats its token like any
/// token that the API rejects.
///
/// ```
/// use tower_bearer_store::{EncryptedStore, EncryptionKeys};
/// # use std::time::Duration;
/// # use tower_bearer::store::{Lease, Publication, Record, StoreError, TokenStore};
/// # fn your_key() -> [u8; 32] { [7; 32] }
/// # struct YourStore;
/// # impl TokenStore for YourStore {
/// #     fn namespace(&self) -> &str { "" }
/// #     async fn load(&self) -> Result<Option<Record>, StoreError> { Ok(None) }
/// #     async fn lease(&self, _: Duration) -> Result<Option<Lease>, StoreError> { Ok(None) }
/// #     async fn publish(&self, _: &Lease, _: Record) -> Result<Publication, StoreError> { Ok(Publication::Stored) }
/// #     async fn release(&self, _: Lease) -> Result<(), StoreError> { Ok(()) }
/// # }
/// // 32 random bytes, from the place where your program keeps its secrets.
/// let keys = EncryptionKeys::new("2026-11", &your_key())?;
/// let store = EncryptedStore::new(YourStore, keys);
/// # Ok::<(), tower_bearer::Error>(())
/// ```
#[derive(Debug)]
pub struct EncryptedStore<S> {
    store: S,
    keys: Arc<EncryptionKeys>,
}

/// The keys of an [`EncryptedStore`]. Each has an id, and a record names the id of its key.
///
/// # Rotation
///
/// 1. Give every process the new key for [decryption](Self::and_open_with).
/// 2. When all processes have it, use it for encryption and the old key for decryption.
/// 3. When the record has been replaced, remove the old key.
///
/// For a process that lacks a key, the record is an [invalid one](tower_bearer::store::StoreErrorKind::InvalidRecord).
///
/// Keys are overwritten in memory when they are dropped. `Debug` shows only their ids.
pub struct EncryptionKeys(Vec<(String, XChaCha20Poly1305)>);

impl EncryptionKeys {
    /// Creates a set with the key that encrypts and decrypts records: 32 bytes from a random generator or a key
    /// derivation.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] unless `id`, which is not secret, is 1 to 64 characters of `A-Z a-z 0-9 - _ .`.
    pub fn new(id: impl Into<String>, key: &[u8; 32]) -> Result<Self, Error> {
        let keys = Self(Vec::new()).and_open_with(id, key);
        keys.validate()?;
        Ok(keys)
    }

    /// Adds a key that only decrypts records. Its id must differ from the others and follow the rule of
    /// [`new`](Self::new).
    ///
    /// [`TokenProviderBuilder::build`](tower_bearer::TokenProviderBuilder::build) checks the id.
    pub fn and_open_with(mut self, id: impl Into<String>, key: &[u8; 32]) -> Self {
        self.0.push((id.into(), XChaCha20Poly1305::new(key.into())));
        self
    }

    fn validate(&self) -> Result<(), Error> {
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        for (position, (id, _)) in self.0.iter().enumerate() {
            if !(1..=64).contains(&id.len()) || !id.bytes().all(fits) {
                return Err(invalid(format!(
                    "an encryption key's id must be 1 to 64 characters of A-Z a-z 0-9 - _ ., got {id:?}"
                )));
            }
            if self.0[..position].iter().any(|(other, _)| other == id) {
                return Err(invalid(format!("the ids of encryption keys must differ, got {id:?} twice")));
            }
        }
        Ok(())
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
    /// Creates a store that encrypts the records of `store`.
    pub fn new(store: S, keys: EncryptionKeys) -> Self {
        Self { store, keys: Arc::new(keys) }
    }

    fn seal(&self, record: Record, fence: u64) -> Result<Record, StoreError> {
        let failed = || StoreError::unavailable("the record cannot be encrypted");
        // `EncryptionKeys::new` adds the first key, so there is at least one.
        let (id, key) = self.keys.0.first().ok_or_else(failed)?;
        let nonce = XNonce::try_generate().map_err(|error| {
            StoreError::unavailable("the system provides no random nonce for the encryption")
                .with_cause(error)
        })?;
        let bound_to = self.bound_to(fence);
        let sealed = key
            .encrypt(&nonce, Payload { msg: record.text().as_bytes(), aad: &bound_to })
            .map_err(|_| failed())?;
        let text = format!("{FORMAT}:{id}:{}", BASE64_STANDARD.encode([&nonce[..], &sealed].concat()));
        Ok(record.with_text(text))
    }

    fn open(&self, record: Record) -> Result<Record, StoreError> {
        let not_a_record = |what: &'static str| StoreError::invalid_record(what);
        let mut parts = record.text().split(':');
        let (format, id, sealed) = (parts.next(), parts.next(), parts.next());
        let (Some(FORMAT), Some(id), Some(sealed), None) = (format, id, sealed, parts.next()) else {
            return Err(not_a_record("the stored record is not encrypted"));
        };
        let key = self
            .keys
            .find(id)
            .ok_or_else(|| not_a_record("the stored record is encrypted with an unknown key"))?;
        let cannot = || {
            not_a_record(
                "the stored record cannot be decrypted: it was changed, or is a copy of another record",
            )
        };
        let sealed = BASE64_STANDARD.decode(sealed).map_err(|_| cannot())?;
        let (nonce, sealed) = sealed.split_at_checked(size_of::<XNonce>()).ok_or_else(cannot)?;
        let bound_to = self.bound_to(record.version());
        let opened = XNonce::try_from(nonce)
            .ok()
            .and_then(|nonce| key.decrypt(&nonce, Payload { msg: sealed, aad: &bound_to }).ok())
            .map(Zeroizing::new)
            .ok_or_else(cannot)?;
        let text = std::str::from_utf8(&opened).map_err(|_| cannot())?.to_owned();
        Ok(record.with_text(text))
    }

    /// Returns the associated data for a record with this version.
    ///
    /// It is unambiguous without separators, because only the namespace has no fixed length.
    fn bound_to(&self, version: u64) -> Vec<u8> {
        [FORMAT.as_bytes(), self.store.namespace().as_bytes(), &version.to_be_bytes()].concat()
    }
}

impl<S: TokenStore> TokenStore for EncryptedStore<S> {
    fn namespace(&self) -> &str {
        self.store.namespace()
    }

    fn validate(&self) -> Result<(), Error> {
        self.keys.validate()?;
        self.store.validate()
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

/// Shares the keys. A record can be decrypted only in the namespace of its handle.
impl<S: NamespacedStore> NamespacedStore for EncryptedStore<S> {
    fn for_namespace(&self, namespace: impl Into<String>) -> Self {
        Self { store: self.store.for_namespace(namespace), keys: Arc::clone(&self.keys) }
    }
}
