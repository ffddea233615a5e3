//! [`Settings`]: what the builder sets, and every flight follows.

use std::{sync::Arc, time::Duration};

use super::refresh_ahead::RefreshAhead;
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
        Ok(())
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
        }
    }
}
