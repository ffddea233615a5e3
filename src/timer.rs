//! [`timer`]: a timer, where there may be no tokio runtime.

use std::panic::{AssertUnwindSafe, catch_unwind};

use tokio::{
    runtime::Handle,
    time::{Instant, Sleep, sleep_until},
};

use crate::error::Error;

/// Makes a timer on this runtime, or else on the current one.
///
/// # Errors
///
/// [`Error::NoRuntime`] outside of a tokio runtime, or in one without time.
pub(crate) fn timer(at: Instant, runtime: Option<&Handle>) -> Result<Sleep, Error> {
    let _entered = runtime.map(Handle::enter);
    Handle::try_current().map_err(|_| Error::NoRuntime)?;
    // tokio has no way to ask whether a runtime has time: without it, this panics.
    catch_unwind(AssertUnwindSafe(|| sleep_until(at))).map_err(|_| Error::NoRuntime)
}
