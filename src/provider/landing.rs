//! [`Landing`]: where callers wait for the outcome of a refresh.

use std::sync::{Arc, Mutex, PoisonError};

use futures_util::{FutureExt, future::Shared};
use tokio::sync::oneshot;

use super::state::Outcome;

/// Resolves with the outcome, or with an error if nobody will tell it any more. Cancel safe.
pub(super) type Waiter = Shared<oneshot::Receiver<Outcome>>;

/// The end of one refresh, for all who wait for it. The refresh itself sends the outcome, or the caller that abandons it.
#[derive(Clone)]
pub(super) struct Landing {
    sender: Arc<Mutex<Option<oneshot::Sender<Outcome>>>>,
    waiter: Waiter,
}

impl Landing {
    pub(super) fn new() -> Self {
        let (sender, receiver) = oneshot::channel();
        Self { sender: Arc::new(Mutex::new(Some(sender))), waiter: receiver.shared() }
    }

    pub(super) fn wait(&self) -> Waiter {
        self.waiter.clone()
    }

    /// Wakes all who wait; the first outcome counts.
    pub(super) fn land(&self, outcome: Outcome) {
        let sender = self.sender.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(sender) = sender {
            // Not under the lock, since wakers are foreign code. It fails if nobody waits.
            let _ = sender.send(outcome);
        }
    }
}
