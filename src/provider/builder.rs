//! [`TokenProviderBuilder`]: sets the options of a provider, and builds it.

use std::{sync::Arc, time::Duration};

use secrecy::{ExposeSecret, SecretString};
use tokio::runtime::Handle;

use super::TokenProvider;
use super::options::{Group, ProviderOptions, ProviderParts};
use crate::debug::debug_fields;
use crate::error::Error;
use crate::login::NO_LOGINS;
use crate::refresh_ahead::RefreshAhead;
use crate::retry::RetryPolicy;
use crate::retry_budget::RetryBudget;
use crate::source::{NoSource, TokenSource};
use crate::store::{Role, TokenStore};
use crate::token::Token;

impl TokenProvider {
    /// Starts to build a provider with other options.
    pub fn builder<T: TokenSource>(source: T) -> TokenProviderBuilder<T> {
        TokenProviderBuilder { source, parts: ProviderParts::default(), config: ProviderOptions::default() }
    }

    /// Starts to build a provider without a credential: it uses the tokens that other processes publish in `store`
    /// ([`Role::Reader`]).
    ///
    /// Its source names no origins: name them with
    /// [`BearerAuthLayer::allowed_origins`](crate::BearerAuthLayer::allowed_origins). By default the token goes to every
    /// `https` origin, and to loopback.
    pub fn reader(store: impl TokenStore) -> TokenProviderBuilder<NoSource> {
        Self::builder(NoSource(())).store(store).role(Role::Reader)
    }
}

/// Builds a [`TokenProvider`](crate::TokenProvider); see [`TokenProvider::builder`](crate::TokenProvider::builder).
///
/// The setters accept any value; [`build`](Self::build) checks all of them.
#[must_use = "a builder does nothing until `build` is called"]
pub struct TokenProviderBuilder<T> {
    source: T,
    parts: ProviderParts,
    config: ProviderOptions,
}

impl<T: TokenSource> TokenProviderBuilder<T> {
    /// Names the provider in events and metrics ([`observability`](crate::observability)). Default: `default`. At least
    /// one character.
    ///
    /// The name is shown as it is: it must not contain a secret.
    pub fn name(mut self, name: impl AsRef<str>) -> Self {
        self.parts.name = Some(name.as_ref().into());
        self
    }

    /// Makes the provider one of a group.
    #[cfg_attr(not(feature = "tenants"), allow(dead_code))]
    pub(crate) fn member_of(mut self, group: &Arc<Group>) -> Self {
        self.config.group = Some(Arc::clone(group));
        self
    }

    /// Sets how long before its expiry a token is replaced in the background. Default: [`RefreshAhead::new`].
    pub fn refresh_ahead(mut self, ahead: RefreshAhead) -> Self {
        self.config.refresh_ahead = ahead;
        self
    }

    /// Sets whether the token is refreshed even if no request is sent. Default: no.
    ///
    /// A background task obtains the first token as soon as it runs, and the next one as soon as the current one is
    /// expiring. No failure ends the task: it asks a source that is down again after the backoff, and a source that
    /// rejects the credential after each cool-down, or within a second of the credential's replacement. If the refresh
    /// of a challenged token fails, the next challenge starts another.
    ///
    /// The task starts in [`build`](Self::build) if that is called within a tokio runtime, or if the provider has a
    /// [runtime](Self::runtime), else with the first request that waits for a token. It ends with the provider's last
    /// handle, or by [`shutdown`](crate::TokenProvider::shutdown). If its runtime ends while handles live on another
    /// runtime, the next refresh starts the task again.
    pub fn keep_fresh(mut self, keep_fresh: bool) -> Self {
        self.config.keep_fresh = keep_fresh;
        self
    }

    /// Sets how long one refresh may take, its retries included. Default: 30 s. More than zero, at most an hour.
    ///
    /// No caller waits more than 100 ms longer for a refresh. If it has not ended by then, because nobody drives its
    /// runtime, the next caller starts another ([`TokenProvider`](crate::TokenProvider#rules)).
    pub fn refresh_timeout(mut self, timeout: Duration) -> Self {
        self.config.refresh_timeout = timeout;
        self
    }

    /// Sets the runtime on which refreshes run. Default: that of the caller that starts one.
    ///
    /// For a program that makes a runtime for each call: a runtime that lives as long as the provider interrupts no
    /// refresh. It must have time enabled, and somebody has to drive it: while nobody does, no refresh ends, and callers
    /// without a token get [`Error::TimedOut`]. Once it has ended, they get [`Error::Interrupted`].
    pub fn runtime(mut self, runtime: Handle) -> Self {
        self.config.runtime = Some(runtime);
        self
    }

    /// Sets how a refresh retries after a transient failure of the source. Default: two retries, 100 ms to 5 s of
    /// backoff.
    ///
    /// A source's `Retry-After` is followed, up to a minute, and the backoff is added to it, so that clients that got
    /// the same date do not all return at that date. The backoff continues from one failed refresh to the next.
    pub fn retry(mut self, policy: RetryPolicy) -> Self {
        self.config.retry = policy;
        self
    }

    /// Sets what the retries of challenged requests may add to the API's load: `min_per_sec` retries per second, and
    /// `ratio` of the requests challenged within `ttl`. Default: 10 s, 10 per second, 0.2.
    ///
    /// `ttl` must be 1 to 60 seconds, `min_per_sec` at most a million, and `ratio` 0 to 0.5. All layers that share the
    /// provider share the budget ([`tower::retry::budget`]).
    ///
    /// The first retry of a request is free if it has a newer token than the challenged one: each token is challenged at
    /// most once per request, and challenges replace tokens at a bounded pace ([`TokenProvider`](crate::TokenProvider#rules)).
    /// Every further retry is charged.
    pub fn retry_budget(mut self, ttl: Duration, min_per_sec: u32, ratio: f32) -> Self {
        self.config.retry_budget = Some(RetryBudget::new(ttl, min_per_sec, ratio));
        self
    }

    /// Removes the retry budget. [`RetryPolicy::max_retries`] is then the only limit.
    pub fn without_retry_budget(mut self) -> Self {
        self.config.retry_budget = None;
        self
    }

    /// Sets the shortest and the longest cool-down. Default: 1 s, doubling to 60 s. `min` must be more than zero and at
    /// most `max`, and `max` at most an hour.
    ///
    /// - After a permanent failure, callers without a token get its error at once until the cool-down ends. It begins with
    ///   `min`.
    /// - After a refresh that a challenge has started, no challenge of a token that the API has never accepted starts
    ///   another ([`TokenProvider`](crate::TokenProvider#rules)). It begins with 2 s, within `min` and `max`, since an API
    ///   may know a token later than its issuer. The bucket of challenges gets one back in 5 s, within `min` and `max`.
    ///
    /// A token is accepted with the first 2xx response to a request that the layer has sent. A refresh that fails
    /// transiently begins no cool-down: its backoff spaces the attempts ([`retry`](Self::retry)).
    pub fn cool_down(mut self, min: Duration, max: Duration) -> Self {
        self.config.cool_down = (min, max);
        self
    }

    /// Sets the refresh token that a user's login gave, such as one of the configuration. Default: none. An empty one is none.
    ///
    /// ```
    /// use tower_bearer::{OAuth2, TokenProvider, oauth2::{ClientAuth, Server}};
    ///
    /// # fn run(refresh_token: String) -> Result<(), tower_bearer::Error> {
    /// let source = OAuth2::login(Server::issuer("https://login.example.com"), ClientAuth::public("your-client-id"));
    /// let provider = TokenProvider::builder(source).login(refresh_token).build()?;
    /// # Ok(())
    /// # }
    /// # #[cfg(feature = "default-client")]
    /// # run("r".into()).unwrap();
    /// ```
    ///
    /// # A user's login
    ///
    /// A *login* is a first refresh token and all that the server grants for it, one after the other. The first one
    /// identifies it. If the newest is lost, a user has to log in again. Many servers end the login if one is presented that
    /// is spent. So the provider
    ///
    /// - presents the newest one, in one exchange at a time. A task of its own runs the exchange to its end, also when the
    ///   callers or the [refresh](Self::refresh_timeout) have ended. Only if the runtime of that task is not driven for 10 s,
    ///   the exchange is given up, and another one begins;
    /// - presents the same one again if the answer is lost or does not say that it is not valid ([`TokenSource::fetch`] has
    ///   the list). It waits for the backoff and a tenth of the outage so far, a minute at most. The count has no limit. Each
    ///   process counts the outage for itself;
    /// - uses nothing else. The source's credential, if it has one, does not give a token of the user. Give the login to each
    ///   process then: one that has none, and cannot read the store, does not know that there is a login, and uses the
    ///   credential.
    ///
    /// # A login in a store
    ///
    /// A process that restarts has only the first refresh token, which is spent. A [store](Self::store) has the newest, for
    /// the next process or for several: give each user one of their own. With a store,
    ///
    /// - a refresh token is presented under a lease, after the store has recorded that ([`TokenStore`]). No refresh token is
    ///   presented while the store cannot be read or written, or grants no lease. The current token is used until it
    ///   expires;
    /// - the next refresh token is stored before its access token is used: when [`token`](crate::TokenProvider::token) has
    ///   returned, the program may end. If the store fails then, this is tried again for one [lease](Self::lease). After that the access token is used, and the process keeps the lease until the store has
    ///   the refresh token. An access token whose whole lifetime has passed by then counts as one without a lifetime;
    /// - a record that cannot be read, such as with another encryption key, is a failure of the store, and is not replaced.
    ///
    /// # Which login is used
    ///
    /// A record has the login that is used, and remembers the last 16 that it has replaced. What becomes of a refresh token
    /// that is given, here or by [`log_in`]:
    ///
    /// | the login that it began | it |
    /// |---|---|
    /// | is used already | is ignored |
    /// | is one of those that were replaced, after a token was granted for the next one or by [`log_in`] | is ignored |
    /// | is new | replaces the login that is used |
    ///
    /// An INFO event says which login is used, and why ([`observability`](crate::observability)).
    ///
    /// The login before a configured one is kept until a token is granted for the configured one: a typing error in a
    /// configuration must not cost the login that works. It is used again if the configured one is rejected, which is then
    /// not presented again, or if the configuration is corrected, be it the refresh token, the server or the client's id. If
    /// the rejection is [doubtful](crate::OAuth2#refresh-tokens), the configured one stays. A login of [`log_in`] may be that
    /// of another user, so the login before it is not used again.
    ///
    /// The record of another server or client is not used. If its login is the configured one, or none is configured, each
    /// exchange fails as [`Configuration`](crate::SourceErrorKind::Configuration), and no refresh token is presented: restore
    /// the configuration, or log in. A program that has no login does not replace the record of one: for it the
    /// [store has failed](TokenStore#when-the-store-fails).
    ///
    /// # What ends a login besides a rejection
    ///
    /// - An answer is lost, and the server does not accept a spent refresh token for long enough
    ///   ([`OAuth2`](crate::OAuth2#refresh-tokens)). If the process has ended with its answer, another one presents the same
    ///   refresh token after the lease.
    /// - The store loses its newest record, such as by a flush, an eviction, or a failover to a replica that had not received
    ///   it. A process that runs and has the refresh token stores it again with its next refresh. Without one, it is lost.
    /// - An exchange takes longer than a lease, and the store cannot be reached for so long meanwhile: another process may
    ///   present the same refresh token.
    ///
    /// # Errors
    ///
    /// Each of these is an error of [`build`](Self::build): a refresh token that is not valid, one for a
    /// [reader](Role::Reader), and one for a source of this crate that presents none, such as
    /// [`OAuth2::client_credentials`](crate::OAuth2::client_credentials).
    ///
    /// [`TokenSource::fetch`]: crate::TokenSource::fetch
    /// [`log_in`]: crate::TokenProvider::log_in
    pub fn login(mut self, refresh_token: impl Into<String>) -> Self {
        self.parts.login = Some(refresh_token.into().into())
            .filter(|token: &SecretString| !token.expose_secret().is_empty());
        self
    }

    /// Sets a token that there is already, such as one of the configuration. Default: none.
    ///
    /// It is used until it is expiring or is challenged; then the source is asked. The rules are those of
    /// [`TokenProvider::set`](crate::TokenProvider::set): one that has expired is ignored.
    pub fn initial(mut self, token: Token) -> Self {
        self.parts.initial = Some(token);
        self
    }

    /// Shares the token with every other process that uses this store. Default: each process has its own token.
    ///
    /// Any number of processes then cost the auth endpoint one call per expiry; [`TokenStore`] documents how, and what
    /// happens when the store fails. A token is used only by a process with the same
    /// [credential](crate::TokenSource::credential), or by a [reader](Role::Reader).
    ///
    /// Without a store, processes that use one api.video key invalidate each other's refresh tokens: see
    /// [`ApiVideo`](crate::ApiVideo#method.key_only).
    pub fn store(mut self, store: impl TokenStore) -> Self {
        self.parts.store = Some(Arc::new(store));
        self
    }

    /// Sets what this process does for the token that it shares. Default: [`Role::Member`]. Every other role needs a
    /// [`store`](Self::store).
    pub fn role(mut self, role: Role) -> Self {
        self.parts.role = role;
        self
    }

    /// Sets how long the lease of a process that refreshes the token lasts. Default: 10 s. From 100 ms to an hour.
    ///
    /// The process extends its lease while it asks its source, so that an exchange may take longer. If the process is
    /// killed, another one refreshes at most a second after the end of the lease. If a process gets no lease for five lease
    /// lengths, the store counts as failed ([`TokenStore`]): set the lease to at least a fifth of the longest exchange. With
    /// a store that cannot extend a lease ([`TokenStore::extend`]), set it to more than the longest exchange: a longer one
    /// costs a rejected refresh and an authentication, or a user's login.
    pub fn lease(mut self, length: Duration) -> Self {
        self.parts.lease = length;
        self
    }

    /// Builds the provider. Nothing is fetched before the first request, unless the provider is to
    /// [keep fresh](Self::keep_fresh).
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if an option is out of its range, or a publisher or a reader has no store; the message names the
    /// option, its value and the accepted range; the store's options included. [`Error::Source`] if the source is set
    /// up wrongly ([`TokenSource::validate`]).
    pub fn build(self) -> Result<TokenProvider, Error> {
        let Self { source, parts, config } = self;
        parts.validate()?;
        config.validate()?;
        if parts.role != Role::Reader {
            source.validate()?;
        }
        let credential = source.credential();
        let text = format_args!("login: {NO_LOGINS}");
        Error::check(parts.login.is_none() || !credential.takes_no_login(), text)?;
        let (is_in_group, has_store) = (config.group.is_some(), parts.store.is_some());
        let is_login = parts.login.is_some() || credential.is_login();
        let text = format_args!(
            "a login in a group of providers needs a store: an idle provider is evicted, and with it the only copy of its \
             refresh token"
        );
        Error::check(!is_login || !is_in_group || has_store, text)?;
        let text = format_args!(
            "the login that is the subject of the exchange needs a store of its own: that of the exchange keeps no refresh \
             token of it"
        );
        Error::check(!credential.is_in_memory() || !(is_in_group || has_store), text)?;
        let config = config.of_role(parts.role);
        Ok(TokenProvider::made_of(source, parts, config))
    }
}

debug_fields!(TokenProviderBuilder<T> |it| { name: it.parts.name });
