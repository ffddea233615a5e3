//! [`timer`]: a timer, where there may be no tokio runtime.

use std::panic::{AssertUnwindSafe, catch_unwind};

use tokio::runtime::Handle;
use tokio::time::{Instant, Sleep, sleep_until};

/// Makes a timer on the current runtime, or else on this one. `None` outside of a tokio runtime, or in one without time.
pub(crate) fn timer(at: Instant, runtime: Option<&Handle>) -> Option<Sleep> {
    let runtime = Handle::try_current().ok().or_else(|| runtime.cloned())?;
    let _entered = runtime.enter();
    // tokio has no way to ask whether a runtime has time: without it, this panics.
    catch_unwind(AssertUnwindSafe(|| sleep_until(at))).ok()
}
