//! [`TokenStore`]: what a store does, and the [`Role`] of a process that uses one.

use std::{fmt, future::Future, pin::Pin, sync::Arc, time::Duration};

use super::{Extension, Lease, Publication, Record, StoreError};
use crate::error::Error;

/// A place where several processes that use one credential share its token. Implement it for a store of your own.
///
/// A store keeps one [`Record`] and grants one [`Lease`] at a time. With a store, any number of processes on any number
/// of hosts call the auth endpoint once per expiry.
///
/// # The protocol
///
/// When a provider needs another token, it
///
/// 1. **reads** the record. If the record is newer than its own token and has not expired, the provider adopts it and
///    is done;
/// 2. takes the **lease**. If another process has it, the provider reads the record again after 100 ms to 1 s at a time.
///    It asks for the lease again after half a second to a second, or after an eighth to a quarter of the lease's length
///    if that is less;
/// 3. **reads again**, because the previous holder has usually published a token;
/// 4. checks that at least **half of the lease is left**, because the process may have been stopped since. If less is
///    left, it starts again;
/// 5. for a user's [login](crate::TokenProviderBuilder::login), **marks** the refresh token in the record as presented. The
///    first refresh token of a new login is stored by this step. If it fails, the source is not asked;
/// 6. **asks its source**, with the refresh token of the newest record. If that is rejected, it reads once more before it
///    uses its credential, or ends the login. Meanwhile it **extends** the lease every third of its length, so that an
///    exchange may take longer than the lease;
/// 7. **publishes** the new token, with the fence of its lease;
/// 8. **releases** the lease.
///
/// A refresh token that another process has marked as presented may have been exchanged, and the store may have failed
/// since. So a process that finds one reads again for 3 s, for what the other one may be about to store, before it asks for
/// the lease. If it adopts the record's access token, that counts as expiring after 3 s: the process that has presented the
/// refresh token may have been killed, and a server accepts a spent one for a short time only.
///
/// # What makes it right
///
/// The lease only saves calls; correctness does not depend on it. Its holder may be killed before or after it has
/// asked, it may be stopped for longer than the lease lasts, or the store may forget the lease (a flush, a failover
/// to a replica that had not received it). The process that asks the source is the one that extends its lease: if it
/// is killed or stopped, the lease ends by itself.
///
/// Correctness depends on five rules:
///
/// * Only the newest lease can replace a record: its [fence](Lease::fence) is compared and the record set in one step.
/// * A record belongs to a [credential](crate::Credential), and no process with another one uses it.
/// * A record is adopted only if it is newer and has not expired.
/// * A store may lose its newest records. So which of two logins is newer is decided by which one has replaced the other,
///   and only then by the versions of their records. A rejection of a refresh token does not replace one that was granted
///   later.
/// * A token that the API rejects nevertheless is replaced: after its 401 the provider reads the record again, then
///   tries the refresh token, then the credential.
///
/// Two holders at once, or a token lost with its holder, cost one rejected refresh token and one more authentication. A
/// user's login has no other authentication: [`login`](crate::TokenProviderBuilder::login) says what ends one.
///
/// # When the store fails
///
/// An operation that takes more than two seconds counts as failed. So does a store that grants no lease for five lease
/// lengths. The process then refreshes without the store, unless it has a user's
/// [login](crate::TokenProviderBuilder::login), and reports it
/// ([`Status::store`](crate::Status#structfield.store), [`observability`](crate::observability)). It tries to publish the
/// token every few seconds, until the store has it or a newer one. During the first half of the expiring period
/// ([`RefreshAhead`](crate::RefreshAhead)) it waits for the store instead, because its own token still works. A reader
/// cannot refresh without the store. [`StoreStatus`](super::StoreStatus) defines when an outage begins and ends.
///
/// # A store of your own
///
/// Every lock must end by itself: after a time, or with the process that holds it. A record must stay for as long as it is
/// needed ([`Record::lifetime`], [`Record::outlives_token`]). One instance belongs to one credential; [`NamespacedStore`]
/// makes instances for others.
///
/// ```
/// use std::{sync::{Mutex, MutexGuard}, time::Duration};
/// use tokio::time::Instant;
/// use tower_bearer::store::{Extension, Lease, Publication, Record, StoreError, TokenStore};
///
/// /// Shares a token between the providers of one process.
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
///         // Enough here, because the fence and the record are lost together.
///         state.fence += 1;
///         state.leased_until = Some(Instant::now() + length);
///         Ok(Some(Lease::new(state.fence)))
///     }
///
///     async fn extend(&self, lease: &Lease, length: Duration) -> Result<Extension, StoreError> {
///         let mut state = self.state();
///         let is_held = state.leased_until.is_some_and(|until| Instant::now() < until);
///         if lease.fence() != state.fence || !is_held {
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
    /// Returns the name that distinguishes this credential's record from others in the same place.
    ///
    /// An encrypted record is bound to it. It must be the same in every process, and must not contain a secret.
    fn namespace(&self) -> &str;

    /// Checks the store's options. Default: `Ok`.
    ///
    /// [`TokenProviderBuilder::build`](crate::TokenProviderBuilder::build) calls it and returns its error.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if an option is out of range.
    fn validate(&self) -> Result<(), Error> {
        Ok(())
    }

    /// Returns the record, with the time since it was published subtracted from its lifetime; `None` if there is none.
    ///
    /// # Errors
    ///
    /// [`StoreErrorKind::InvalidRecord`](super::StoreErrorKind::InvalidRecord) if there is a record that cannot be read.
    ///
    /// # Cancel safety
    ///
    /// The future of this and of the other operations may be dropped at any time. The operation may still be performed.
    fn load(&self) -> impl Future<Output = Result<Option<Record>, StoreError>> + Send;

    /// Grants the lease, which ends by itself after `length`; `None` if another process has it.
    ///
    /// Its fence must be greater than that of any earlier lease, including leases that the store has forgotten. Use the
    /// maximum of the time in microseconds and the last fence plus one.
    ///
    /// # Errors
    ///
    /// If no lease can be granted, for example because the store cannot be written.
    fn lease(&self, length: Duration) -> impl Future<Output = Result<Option<Lease>, StoreError>> + Send;

    /// Extends the lease to end `length` after this call, unless it has ended, was released, or a newer one was
    /// granted. The check and the extension must be one step.
    ///
    /// The provider calls it every third of the lease's length while it asks the source. Default:
    /// [`Extension::Unsupported`], after which the provider does not extend this lease again. Then set
    /// [`TokenProviderBuilder::lease`](crate::TokenProviderBuilder::lease) to more than the longest exchange.
    ///
    /// # Errors
    ///
    /// If it is unknown whether the lease was extended. The provider tries again after another third of its length.
    ///
    /// # Cancel safety
    ///
    /// The provider drops the future when the source has answered. The operation may be performed after the lease was
    /// released, and must then have no effect.
    fn extend(
        &self,
        lease: &Lease,
        length: Duration,
    ) -> impl Future<Output = Result<Extension, StoreError>> + Send {
        let _ = (lease, length);
        std::future::ready(Ok(Extension::Unsupported))
    }

    /// Replaces the stored record with `record`, whose version is the lease's fence, unless a newer lease was granted.
    /// The check and the replacement must be one step.
    ///
    /// The record's [lifetime](Record::lifetime) counts from this call, not from the time of the write: otherwise the
    /// record would outlive its token.
    ///
    /// # Errors
    ///
    /// If it is unknown whether the record was written. The provider publishes it again, under this lease or another one.
    fn publish(
        &self,
        lease: &Lease,
        record: Record,
    ) -> impl Future<Output = Result<Publication, StoreError>> + Send;

    /// Releases the lease, unless a newer one was granted.
    ///
    /// # Errors
    ///
    /// If the lease cannot be released. It then ends by itself.
    fn release(&self, lease: Lease) -> impl Future<Output = Result<(), StoreError>> + Send;
}

impl<T: TokenStore> TokenStore for Arc<T> {
    fn namespace(&self) -> &str {
        T::namespace(self)
    }

    fn validate(&self) -> Result<(), Error> {
        T::validate(self)
    }

    async fn load(&self) -> Result<Option<Record>, StoreError> {
        T::load(self).await
    }

    async fn lease(&self, length: Duration) -> Result<Option<Lease>, StoreError> {
        T::lease(self, length).await
    }

    async fn extend(&self, lease: &Lease, length: Duration) -> Result<Extension, StoreError> {
        T::extend(self, lease, length).await
    }

    async fn publish(&self, lease: &Lease, record: Record) -> Result<Publication, StoreError> {
        T::publish(self, lease, record).await
    }

    async fn release(&self, lease: Lease) -> Result<(), StoreError> {
        T::release(self, lease).await
    }
}

/// A store that keeps the records of many credentials in one place, such as one token per tenant.
///
/// Handles share the connection, the folder or the keys, and the options, of the store that they are made from.
///
/// ```
/// # mod example {
/// use tower_bearer::{ApiVideo, Error, TokenProvider, store::NamespacedStore};
///
/// // One store for all tenants, such as `RedisStore::new("rediss://user:password@redis.example", "tenants")?`.
/// fn provider(store: &impl NamespacedStore, tenant: &str, api_key: &str) -> Result<TokenProvider, Error> {
///     TokenProvider::builder(ApiVideo::new(api_key)).store(store.for_namespace(tenant)).build()
/// }
/// # }
/// ```
pub trait NamespacedStore: TokenStore + Sized {
    /// Returns a handle for the record of the credential named `namespace`, in the same place.
    ///
    /// The namespace replaces that of this store. Two handles with the same namespace have the same record and the same
    /// lease, those with different namespaces never. The namespace must not contain a secret.
    ///
    /// An invalid namespace is an error of [`validate`](TokenStore::validate), and so of
    /// [`TokenProviderBuilder::build`](crate::TokenProviderBuilder::build).
    fn for_namespace(&self, namespace: impl Into<String>) -> Self;
}

impl<T: NamespacedStore> NamespacedStore for Arc<T> {
    fn for_namespace(&self, namespace: impl Into<String>) -> Self {
        Arc::new(T::for_namespace(self, namespace))
    }
}

/// What a process does with the token that it shares by a [`TokenStore`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Role {
    /// Uses the token, and refreshes it if no other process has.
    #[default]
    Member,
    /// Refreshes the token even if it has no callers ([`keep_fresh`](crate::TokenProviderBuilder::keep_fresh)): for
    /// example a cron job that provides the token for the services that send the requests. There may also be members,
    /// and other publishers; one of them refreshes at a time.
    ///
    /// A publisher that sends no requests does not notice a revoked token, and readers cannot report it. If tokens
    /// may be revoked, let the publisher send a request from time to time, or add a member.
    Publisher,
    /// Has no credential: it uses the token that the others publish. When the API rejects it, a refresh waits for a
    /// newer one for up to one [lease](crate::TokenProviderBuilder::lease) length. See
    /// [`TokenProvider::reader`](crate::TokenProvider::reader).
    Reader,
}

type StoreFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 'a>>;

/// [`TokenStore`] with boxed futures, so that the provider needs no type parameter for its store.
pub(crate) trait DynTokenStore: Send + Sync {
    fn validate(&self) -> Result<(), Error>;
    fn load(&self) -> StoreFuture<'_, Option<Record>>;
    fn lease(&self, length: Duration) -> StoreFuture<'_, Option<Lease>>;
    fn extend<'a>(&'a self, lease: &'a Lease, length: Duration) -> StoreFuture<'a, Extension>;
    fn publish<'a>(&'a self, lease: &'a Lease, record: Record) -> StoreFuture<'a, Publication>;
    fn release(&self, lease: Lease) -> StoreFuture<'_, ()>;
}

/// Shows nothing of the store, whose type is foreign.
impl fmt::Debug for dyn DynTokenStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenStore").finish_non_exhaustive()
    }
}

impl<T: TokenStore> DynTokenStore for T {
    fn validate(&self) -> Result<(), Error> {
        TokenStore::validate(self)
    }

    fn load(&self) -> StoreFuture<'_, Option<Record>> {
        Box::pin(TokenStore::load(self))
    }

    fn lease(&self, length: Duration) -> StoreFuture<'_, Option<Lease>> {
        Box::pin(TokenStore::lease(self, length))
    }

    fn extend<'a>(&'a self, lease: &'a Lease, length: Duration) -> StoreFuture<'a, Extension> {
        Box::pin(TokenStore::extend(self, lease, length))
    }

    fn publish<'a>(&'a self, lease: &'a Lease, record: Record) -> StoreFuture<'a, Publication> {
        Box::pin(TokenStore::publish(self, lease, record))
    }

    fn release(&self, lease: Lease) -> StoreFuture<'_, ()> {
        Box::pin(TokenStore::release(self, lease))
    }
}
