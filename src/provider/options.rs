//! [`ProviderParts`] and [`ProviderOptions`]: the options of a provider, their defaults, and which values are valid.

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};
use tokio::runtime::Handle;

use crate::error::{Error, Seconds};
use crate::login::check_refresh_token;
use crate::observability::{GroupReport, Reporter};
use crate::refresh_ahead::RefreshAhead;
use crate::retry::RetryPolicy;
use crate::retry_budget::RetryBudget;
use crate::store::{DynTokenStore, Role};
use crate::token::Token;

/// The name of all providers without one.
static DEFAULT_NAME: LazyLock<Arc<str>> = LazyLock::new(|| "default".into());

const HOUR: Duration = Duration::from_secs(60 * 60);

/// What a provider is made of, besides its source and its options.
pub(super) struct ProviderParts {
    /// `None` for the group's name, or the default.
    pub(super) name: Option<Arc<str>>,
    /// The refresh token of a user's login.
    pub(super) login: Option<SecretString>,
    /// A token that there is already.
    pub(super) initial: Option<Token>,
    pub(super) store: Option<Arc<dyn DynTokenStore>>,
    pub(super) role: Role,
    /// The length of a lease.
    pub(super) lease: Duration,
}

pub(super) struct ProviderOptions {
    /// The tenants that the provider belongs to.
    pub(super) group: Option<Arc<Group>>,
    pub(super) refresh_ahead: RefreshAhead,
    pub(super) keep_fresh: bool,
    pub(super) refresh_timeout: Duration,
    /// `None` for that of the caller.
    pub(super) runtime: Option<Handle>,
    pub(super) retry: RetryPolicy,
    /// `None` for no limit.
    pub(super) retry_budget: Option<RetryBudget>,
    /// The shortest and the longest.
    pub(super) cool_down: (Duration, Duration),
}

/// The group that the providers of many tenants belong to.
pub(crate) struct Group {
    pub(crate) report: Arc<GroupReport>,
    /// Evicts the providers that are idle.
    pub(crate) evict_idle: Arc<dyn Fn() + Send + Sync>,
}

impl ProviderParts {
    pub(super) fn reporter(&self, config: &ProviderOptions) -> Reporter {
        let group = config.group.as_ref().map(|group| &group.report);
        let name = self.name.as_ref().or(group.map(|group| &group.name)).unwrap_or(&DEFAULT_NAME);
        Reporter::new(Arc::clone(name), group.cloned())
    }

    pub(super) fn validate(&self) -> Result<(), Error> {
        let Self { name, login, initial: _, store, role, lease } = self;
        let is_named = name.as_ref().is_none_or(|name| !name.is_empty());
        Error::check(is_named, format_args!("name must be at least one character long, got none"))?;
        login.as_ref().map_or(Ok(()), |login| check_refresh_token(login.expose_secret()))?;
        let text = format_args!("a reader must have no login: it uses the tokens in its store");
        Error::check(login.is_none() || *role != Role::Reader, text)?;
        let text = format_args!("role {role:?} needs a store");
        Error::check(store.is_some() || *role == Role::Member, text)?;
        let text = format_args!("lease must be >= 0.1s and <= 1h, got {}", Seconds(*lease));
        Error::check((Duration::from_millis(100)..=HOUR).contains(lease), text)?;
        store.as_ref().map_or(Ok(()), |store| store.validate())
    }
}

impl Default for ProviderParts {
    fn default() -> Self {
        Self {
            name: None,
            login: None,
            initial: None,
            store: None,
            role: Role::Member,
            lease: Duration::from_secs(10),
        }
    }
}

impl ProviderOptions {
    pub(super) fn validate(&self) -> Result<(), Error> {
        self.refresh_ahead.validate()?;
        self.retry.validate()?;
        self.retry_budget.as_ref().map_or(Ok(()), RetryBudget::validate)?;
        let (timeout, (min, max)) = (self.refresh_timeout, self.cool_down);
        let text = format_args!("refresh_timeout must be > 0 and <= 1h, got {}", Seconds(timeout));
        Error::check(!timeout.is_zero() && timeout <= HOUR, text)?;
        let (least, most) = (Seconds(min), Seconds(max));
        let text = format_args!("cool_down: need 0 < min <= max <= 1h, got {least} and {most}");
        Error::check(!min.is_zero() && min <= max && max <= HOUR, text)
    }

    /// The runtime for a new task: that of the refreshes, or else that of the caller.
    pub(super) fn runtime(&self) -> Option<Handle> {
        self.runtime.clone().or_else(|| Handle::try_current().ok())
    }

    /// The options of a process that shares its token, by its role.
    pub(super) fn of_role(mut self, role: Role) -> Self {
        match role {
            Role::Member => {}
            Role::Publisher => self.keep_fresh = true,
            // The publisher refreshes as soon as the token is expiring. A reader that looks later finds the new one.
            Role::Reader => self.refresh_ahead = self.refresh_ahead.halved(),
        }
        self
    }
}

impl Default for ProviderOptions {
    fn default() -> Self {
        Self {
            group: None,
            refresh_ahead: RefreshAhead::new(),
            keep_fresh: false,
            refresh_timeout: Duration::from_secs(30),
            runtime: None,
            retry: RetryPolicy::new(),
            retry_budget: Some(RetryBudget::new(Duration::from_secs(10), 10, 0.2)),
            cool_down: (Duration::from_secs(1), Duration::from_secs(60)),
        }
    }
}
