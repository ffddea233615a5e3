//! [`timer`]: a timer, where there may be no tokio runtime.

use std::panic::{AssertUnwindSafe, catch_unwind};

use tokio::{
    runtime::Handle,
    time::{Instant, Sleep, sleep_until},
};

use crate::error::Error;

/// Makes a timer on the current runtime, or else on this one.
///
/// # Errors
///
/// [`Error::NoRuntime`] outside of a tokio runtime, or in one without time.
pub(crate) fn timer(at: Instant, runtime: Option<&Handle>) -> Result<Sleep, Error> {
    let runtime = Handle::try_current().ok().or_else(|| runtime.cloned()).ok_or(Error::NoRuntime)?;
    let _entered = runtime.enter();
    // tokio has no way to ask whether a runtime has time: without it, this panics.
    catch_unwind(AssertUnwindSafe(|| sleep_until(at))).map_err(|_| Error::NoRuntime)
}
