//! [`TokenStore`]: where the processes that use one credential keep the token that they share.
//!
//! A store keeps one record and gives out one lease at a time; `shared_source` is the protocol by which a provider uses
//! the two, and asks its source only if it has to.

#[cfg(feature = "encryption")]
mod encrypted;
// For std's file locks.
#[clippy::msrv = "1.89"]
#[cfg(all(feature = "file-store", unix))]
mod file;
mod protocol;
mod record;
#[cfg(feature = "redis")]
mod redis;
mod shared_token;

use std::{future::Future, pin::Pin, sync::Arc, time::Duration};

#[cfg(feature = "encryption")]
#[cfg_attr(docsrs, doc(cfg(feature = "encryption")))]
pub use self::encrypted::{EncryptedStore, EncryptionKeys};
#[cfg(all(feature = "file-store", unix))]
#[cfg_attr(docsrs, doc(cfg(all(feature = "file-store", unix))))]
pub use self::file::FileStore;
pub(crate) use self::protocol::{NoSource, SharedSource};
pub use self::record::{Extension, Lease, Publication, Record};
#[cfg(feature = "redis")]
#[cfg_attr(docsrs, doc(cfg(feature = "redis")))]
pub use self::redis::RedisStore;

use crate::error::StoreError;

/// Where several processes that use one credential share its token: what you implement for a store of your own.
///
/// A store keeps one [`Record`], and gives out one [`Lease`] at a time. Given to
/// [`TokenProviderBuilder::store`](crate::TokenProviderBuilder::store), it makes any number of processes, on any number
/// of hosts, cost their auth endpoint one call per expiry.
///
/// # The protocol
///
/// Whenever a provider needs another token, it
///
/// 1. **reads** the record: if that is newer than its own token, and has not expired, it is adopted, and that is all;
/// 2. takes the **lease**; if another has it, it waits a little, and begins again;
/// 3. **reads again**: whoever had the lease before has published, most of the time;
/// 4. looks whether **enough of the lease is left**: half of it, for it may have been stopped since; if not, it begins
///    again;
/// 5. **asks its source**, with the refresh token of the newest record; where that is refused, it reads once more
///    before it uses its credential; while its source works, it **extends** the lease every third of its length, so that
///    an exchange may take longer than the lease;
/// 6. **publishes** the new token, with the fence of its lease;
/// 7. **releases** the lease.
///
/// # What makes it right
///
/// Not the lease: it saves calls, and no more. Its holder may be killed before or after it has asked, or be stopped for
/// longer than the lease lasts, or the store may forget it (a flush, a failover to a replica that had not heard of it).
/// The process that asks is the one that extends its lease: if it is killed or stopped, the lease ends by itself.
/// What makes it right is that a record is only ever put in the place of another by the newest lease's
/// [fence](Lease::fence), compared and set in one step; that a record is only ever adopted if it is newer and has not
/// expired; and that a token that is refused all the same heals: its 401 has the record read again, then the refresh
/// token tried, then the credential. Two holders at once, or a token lost with its holder, cost one refused refresh and
/// one authentication more.
///
/// # When the store fails
///
/// An operation that takes more than two seconds counts as failed, and so does a store that has no lease to give for as
/// long as five of them last. The process then goes on alone, with what it has, and says so
/// ([`observability`](crate::observability)); what it obtains alone is published as soon as that can be done. While its
/// token still works, it waits with that until half of the time is over that [`RefreshAhead`](crate::RefreshAhead) left
/// it: an outage that is shorter costs nothing.
///
/// # A store of your own
///
/// Every lock must end by itself: by time, or with the process that holds it. An instance belongs to one credential.
///
/// ```
/// use std::{sync::{Mutex, MutexGuard}, time::Duration};
/// use tokio::time::Instant;
/// use tower_bearer::{Extension, Lease, Publication, Record, StoreError, TokenStore};
///
/// /// For the providers of one process.
/// #[derive(Default)]
/// struct InMemory(Mutex<State>);
///
/// #[derive(Default)]
/// struct State {
///     record: Option<(Record, Instant)>,
///     fence: u64,
///     leased_until: Option<Instant>,
/// }
///
/// impl InMemory {
///     fn state(&self) -> MutexGuard<'_, State> {
///         self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
///     }
/// }
///
/// impl TokenStore for InMemory {
///     fn namespace(&self) -> &str {
///         "in-memory"
///     }
///
///     async fn load(&self) -> Result<Option<Record>, StoreError> {
///         Ok(self.state().record.as_ref().map(|(record, stored_at)| record.aged_by(stored_at.elapsed())))
///     }
///
///     async fn lease(&self, length: Duration) -> Result<Option<Lease>, StoreError> {
///         let mut state = self.state();
///         if state.leased_until.is_some_and(|until| Instant::now() < until) {
///             return Ok(None);
///         }
///         state.fence += 1;
///         state.leased_until = Some(Instant::now() + length);
///         Ok(Some(Lease::new(state.fence)))
///     }
///
///     async fn extend(&self, lease: &Lease, length: Duration) -> Result<Extension, StoreError> {
///         let mut state = self.state();
///         let lasts = state.leased_until.is_some_and(|until| Instant::now() < until);
///         if lease.fence() != state.fence || !lasts {
///             return Ok(Extension::Expired);
///         }
///         state.leased_until = Some(Instant::now() + length);
///         Ok(Extension::Extended)
///     }
///
///     async fn publish(&self, lease: &Lease, record: Record) -> Result<Publication, StoreError> {
///         let mut state = self.state();
///         if lease.fence() != state.fence {
///             return Ok(Publication::Superseded);
///         }
///         state.record = Some((record, Instant::now()));
///         Ok(Publication::Stored)
///     }
///
///     async fn release(&self, lease: Lease) -> Result<(), StoreError> {
///         let mut state = self.state();
///         if lease.fence() == state.fence {
///             state.leased_until = None;
///         }
///         Ok(())
///     }
/// }
///
/// # use tower_bearer::{SourceError, Token, TokenProvider, TokenRequest, TokenSource};
/// # struct Vault;
/// # impl TokenSource for Vault {
/// #     async fn fetch(&self, _: &TokenRequest<'_>) -> Result<Token, SourceError> {
/// #         static CALLS: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(1);
/// #         let call = CALLS.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
/// #         Ok(Token::builder(format!("token-{call}")).expires_in(Duration::from_secs(60)).build()?)
/// #     }
/// # }
/// # async fn run() -> Result<(), tower_bearer::Error> {
/// // Two providers stand for two processes.
/// let store = std::sync::Arc::new(InMemory::default());
/// let first = TokenProvider::builder(Vault).store(store.clone()).build()?;
/// let second = TokenProvider::builder(Vault).store(store).build()?;
/// assert_eq!(first.token().await?.access_token(), second.token().await?.access_token());
/// # Ok(())
/// # }
/// # tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(run()).unwrap();
/// ```
pub trait TokenStore: Send + Sync + 'static {
    /// What tells this credential's record from others' that are kept in the same place.
    ///
    /// An encrypted record is bound to it: it must be the same in every process, and hold no secret.
    fn namespace(&self) -> &str;

    /// The record, aged by how long it has been there; `None` if there is none.
    ///
    /// # Errors
    ///
    /// [`StoreError::InvalidRecord`] if there is one that cannot be read, which counts as none.
    ///
    /// # Cancel safety
    ///
    /// The future of this and the other operations may be dropped at any time, and its operation be done nevertheless.
    fn load(&self) -> impl Future<Output = Result<Option<Record>, StoreError>> + Send;

    /// The lease, which ends by itself after `length`; `None` if another has it.
    ///
    /// Its fence must be greater than that of any lease before, also of those that the store has forgotten: let it be
    /// the time in microseconds where that is more than the last one plus one.
    ///
    /// # Errors
    ///
    /// If none can be given out, such as by a store that cannot be written.
    fn lease(&self, length: Duration) -> impl Future<Output = Result<Option<Lease>, StoreError>> + Send;

    /// Has the lease end `length` after this call, unless it has ended, was given back, or a newer one has been given
    /// out: compared and set in one step.
    ///
    /// It is called every third of the lease's length while its holder asks the source. Default:
    /// [`Extension::Unsupported`], after which this lease is not extended again and ends at its time. Then let
    /// [`TokenProviderBuilder::lease`](crate::TokenProviderBuilder::lease) be longer than the longest exchange.
    ///
    /// # Errors
    ///
    /// If it is not known to be extended; it is tried again after another third of the lease's length.
    ///
    /// # Cancel safety
    ///
    /// The future is dropped when the source has answered. The operation may be done after the lease was given back, and
    /// must then have no effect.
    fn extend(
        &self,
        lease: &Lease,
        length: Duration,
    ) -> impl Future<Output = Result<Extension, StoreError>> + Send {
        let _ = (lease, length);
        std::future::ready(Ok(Extension::Unsupported))
    }

    /// Puts `record`, whose generation is the lease's fence, in the place of the one that is there, unless a newer lease
    /// has been given out: compared and set in one step.
    ///
    /// The record's [lifetime](Record::lifetime) counts from this call, however long it takes until it is written: a
    /// token must not live for longer in the store than it does.
    ///
    /// # Errors
    ///
    /// If it is not known to be written; it is published again under another lease.
    fn publish(
        &self,
        lease: &Lease,
        record: Record,
    ) -> impl Future<Output = Result<Publication, StoreError>> + Send;

    /// Gives the lease back, if no newer one has been given out.
    ///
    /// # Errors
    ///
    /// If that cannot be done; the lease then ends by itself.
    fn release(&self, lease: Lease) -> impl Future<Output = Result<(), StoreError>> + Send;
}

impl<T: TokenStore> TokenStore for Arc<T> {
    fn namespace(&self) -> &str {
        T::namespace(self)
    }

    fn load(&self) -> impl Future<Output = Result<Option<Record>, StoreError>> + Send {
        T::load(self)
    }

    fn lease(&self, length: Duration) -> impl Future<Output = Result<Option<Lease>, StoreError>> + Send {
        T::lease(self, length)
    }

    fn extend(
        &self,
        lease: &Lease,
        length: Duration,
    ) -> impl Future<Output = Result<Extension, StoreError>> + Send {
        T::extend(self, lease, length)
    }

    fn publish(
        &self,
        lease: &Lease,
        record: Record,
    ) -> impl Future<Output = Result<Publication, StoreError>> + Send {
        T::publish(self, lease, record)
    }

    fn release(&self, lease: Lease) -> impl Future<Output = Result<(), StoreError>> + Send {
        T::release(self, lease)
    }
}

/// What a process does for the token that it shares with others, by a [`TokenStore`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Role {
    /// Uses the token, and renews it where no other has: whoever comes first.
    #[default]
    Member,
    /// Renews the token even while nobody asks for it ([`keep_fresh`](crate::TokenProviderBuilder::keep_fresh)): the
    /// cron job that hands the token to the services that make the requests. Members may be there as well, and other
    /// publishers, of whom one renews it at a time.
    ///
    /// One that sends nothing itself does not notice that the API refuses the token before its time, of which readers
    /// cannot tell it: where tokens are revoked, have it send a request now and then, or let there be a member.
    Publisher,
    /// Has no credential: uses the token that the others publish, and waits for theirs when it is refused, for as long
    /// as a [lease](crate::TokenProviderBuilder::lease) lasts at a time. See
    /// [`TokenProvider::reader`](crate::TokenProvider::reader).
    Reader,
}

type Operation<'a, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 'a>>;

/// [`TokenStore`] behind a pointer, so that the provider has no type parameter for it.
pub(crate) trait DynTokenStore: Send + Sync {
    fn load(&self) -> Operation<'_, Option<Record>>;
    fn lease(&self, length: Duration) -> Operation<'_, Option<Lease>>;
    fn extend<'a>(&'a self, lease: &'a Lease, length: Duration) -> Operation<'a, Extension>;
    fn publish<'a>(&'a self, lease: &'a Lease, record: Record) -> Operation<'a, Publication>;
    fn release(&self, lease: Lease) -> Operation<'_, ()>;
}

impl<T: TokenStore> DynTokenStore for T {
    fn load(&self) -> Operation<'_, Option<Record>> {
        Box::pin(TokenStore::load(self))
    }

    fn lease(&self, length: Duration) -> Operation<'_, Option<Lease>> {
        Box::pin(TokenStore::lease(self, length))
    }

    fn extend<'a>(&'a self, lease: &'a Lease, length: Duration) -> Operation<'a, Extension> {
        Box::pin(TokenStore::extend(self, lease, length))
    }

    fn publish<'a>(&'a self, lease: &'a Lease, record: Record) -> Operation<'a, Publication> {
        Box::pin(TokenStore::publish(self, lease, record))
    }

    fn release(&self, lease: Lease) -> Operation<'_, ()> {
        Box::pin(TokenStore::release(self, lease))
    }
}
