//! [`Config`]: what the builder sets, its defaults and their validation.

use std::{sync::Arc, time::Duration};

use super::refresh_ahead::RefreshAhead;
#[cfg(feature = "store")]
use crate::store::{DynTokenStore, Role};
use crate::{
    error::{Error, seconds},
    observability::Reporter,
    retry::RetryPolicy,
};

const DEFAULT_NAME: &str = "default";

const HOUR: Duration = Duration::from_secs(60 * 60);

#[derive(Clone, Debug)]
pub(super) struct Config {
    /// `None` for the group's name, or the default.
    pub(super) name: Option<Arc<str>>,
    /// The tenants that the provider belongs to.
    pub(super) group: Option<Group>,
    pub(super) refresh_ahead: RefreshAhead,
    pub(super) keep_fresh: bool,
    pub(super) refresh_timeout: Duration,
    pub(super) retry: RetryPolicy,
    /// The shortest and the longest.
    pub(super) cool_down: (Duration, Duration),
    #[cfg(feature = "store")]
    pub(super) store: Option<Arc<dyn DynTokenStore>>,
    #[cfg(feature = "store")]
    pub(super) role: Role,
    #[cfg(feature = "store")]
    pub(super) lease: Duration,
}

/// The providers of many tenants.
#[derive(Clone, Debug)]
pub(crate) struct Group {
    pub(crate) name: Arc<str>,
    /// Whether the name is the label of the metrics of all providers. Otherwise that is each one's own name.
    pub(crate) is_label: bool,
}

impl Config {
    pub(super) fn reporter(&self) -> Reporter {
        let group = self.group.as_ref();
        let name = self.name.as_ref().or(group.map(|group| &group.name));
        let name = name.map_or_else(|| DEFAULT_NAME.into(), Arc::clone);
        Reporter::new(name, group.filter(|group| group.is_label).map(|group| Arc::clone(&group.name)))
    }

    pub(super) fn validate(&self) -> Result<(), Error> {
        if self.name.as_ref().is_some_and(|name| name.is_empty()) {
            return Err(Error::out_of_range("name", "at least one character long", "none"));
        }
        self.refresh_ahead.validate()?;
        self.retry.validate()?;
        if self.refresh_timeout.is_zero() || self.refresh_timeout > HOUR {
            return Err(Error::out_of_range(
                "refresh_timeout",
                "> 0 and <= 1h",
                seconds(self.refresh_timeout),
            ));
        }
        let (min, max) = self.cool_down;
        if min.is_zero() || min > max || max > HOUR {
            let got = format!("{} and {}", seconds(min), seconds(max));
            return Err(Error::InvalidOption(
                format!("cool_down: need 0 < min <= max <= 1h, got {got}").into(),
            ));
        }
        #[cfg(feature = "store")]
        if self.store.is_none() && self.role != Role::Member {
            let text = format!("role {:?} needs a store: set one with store()", self.role);
            return Err(Error::InvalidOption(text.into()));
        }
        #[cfg(feature = "store")]
        if self.lease < Duration::from_millis(100) || self.lease > HOUR {
            return Err(Error::out_of_range("lease", ">= 0.1s and <= 1h", seconds(self.lease)));
        }
        Ok(())
    }

    /// Whether the process uses the tokens of others, and never asks its source.
    pub(super) fn is_reader(&self) -> bool {
        #[cfg(feature = "store")]
        return self.role == Role::Reader;
        #[cfg(not(feature = "store"))]
        false
    }

    /// The options of a process that shares its token, by its role.
    #[cfg(feature = "store")]
    pub(super) fn shared(mut self) -> Self {
        match self.role {
            Role::Member => {}
            Role::Publisher => self.keep_fresh = true,
            // The publisher refreshes as soon as the token is expiring. A reader that looks later finds the new one.
            Role::Reader => self.refresh_ahead = self.refresh_ahead.halved(),
        }
        self
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            name: None,
            group: None,
            refresh_ahead: RefreshAhead::new(),
            keep_fresh: false,
            refresh_timeout: Duration::from_secs(30),
            retry: RetryPolicy::new(),
            cool_down: (Duration::from_secs(1), Duration::from_secs(60)),
            #[cfg(feature = "store")]
            store: None,
            #[cfg(feature = "store")]
            role: Role::Member,
            #[cfg(feature = "store")]
            lease: Duration::from_secs(10),
        }
    }
}
