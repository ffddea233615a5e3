//! [`Settings`]: what the builder sets, and every refresh follows.

#[cfg(feature = "store")]
use std::fmt;
use std::{sync::Arc, time::Duration};

use super::refresh_ahead::RefreshAhead;
#[cfg(feature = "store")]
use crate::store::{DynTokenStore, Role};
use crate::{error::Error, retry::RetryPolicy};

const HOUR: Duration = Duration::from_secs(60 * 60);

#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub(super) name: Arc<str>,
    pub(super) refresh_ahead: RefreshAhead,
    pub(super) keep_fresh: bool,
    pub(super) refresh_timeout: Duration,
    pub(super) retry: RetryPolicy,
    pub(super) cool_down: (Duration, Duration),
    #[cfg(feature = "store")]
    pub(super) fleet: Fleet,
}

/// How the token is shared with other processes.
#[cfg(feature = "store")]
#[derive(Clone)]
pub(super) struct Fleet {
    pub(super) store: Option<Arc<dyn DynTokenStore>>,
    pub(super) role: Role,
    pub(super) lease: Duration,
}

impl Settings {
    pub(super) fn check(&self) -> Result<(), Error> {
        if self.name.is_empty() {
            return Err(Error::InvalidOption("a provider's name is not empty".into()));
        }
        if self.refresh_timeout.is_zero() || self.refresh_timeout > HOUR {
            return Err(Error::InvalidOption(
                "refresh_timeout is more than zero, and at most an hour".into(),
            ));
        }
        let (min, max) = self.cool_down;
        if min.is_zero() || min > max || max > HOUR {
            return Err(Error::InvalidOption(
                "cool_down's least is more than zero and at most its most, which is at most an hour".into(),
            ));
        }
        #[cfg(feature = "store")]
        self.fleet.check()?;
        Ok(())
    }
}

#[cfg(feature = "store")]
impl Fleet {
    fn check(&self) -> Result<(), Error> {
        if self.store.is_none() && self.role != Role::Member {
            return Err(Error::InvalidOption("a publisher and a reader need a store".into()));
        }
        if self.lease < Duration::from_millis(100) || self.lease > HOUR {
            return Err(Error::InvalidOption("a lease lasts for 100 ms to an hour".into()));
        }
        Ok(())
    }
}

/// Without the store, which is others' code.
#[cfg(feature = "store")]
impl fmt::Debug for Fleet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fleet").field("role", &self.role).field("lease", &self.lease).finish_non_exhaustive()
    }
}

#[cfg(feature = "store")]
impl Default for Fleet {
    fn default() -> Self {
        Self { store: None, role: Role::Member, lease: Duration::from_secs(10) }
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            name: "default".into(),
            refresh_ahead: RefreshAhead::new(),
            keep_fresh: false,
            refresh_timeout: Duration::from_secs(30),
            retry: RetryPolicy::new(),
            cool_down: (Duration::from_secs(1), Duration::from_secs(60)),
            #[cfg(feature = "store")]
            fleet: Fleet::default(),
        }
    }
}
