//! [`detached`]: a future that its caller cannot cancel.

use std::{future::Future, panic::resume_unwind};

use crate::{error::SourceError, observability};

/// Runs `future` to its end in a task of its own, in the current span. A panic is passed on.
///
/// # Errors
///
/// [`SourceError::unavailable`] if the runtime shuts down.
///
/// # Cancel safety
///
/// The future runs on if the returned one is dropped.
pub(crate) async fn detached<F>(future: F) -> Result<F::Output, SourceError>
where
    F: Future<Output: Send> + Send + 'static,
{
    let task = tokio::spawn(observability::within(observability::current_span(), future));
    task.await.map_err(|error| match error.try_into_panic() {
        Ok(panic) => resume_unwind(panic),
        Err(_) => SourceError::unavailable("the runtime of the token request was shut down"),
    })
}
