//! The primitives whose interleavings loom explores: the standard ones, or loom's under `--cfg tower_bearer_loom`.
//!
//! `provider::core` and `provider::state` use these names, so that loom runs the same code as users do.

use std::sync::PoisonError;

use crate::{error::Error, token::Token};

/// Locks a mutex. No panic leaves what is behind one half changed, so poisoning is ignored.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(not(all(test, tower_bearer_loom)))]
pub(crate) use self::real::*;

#[cfg(all(test, tower_bearer_loom))]
pub(crate) use self::mocked::*;

/// What a refresh ends with. Every waiter gets a clone.
pub(crate) type Outcome = Result<Token, Error>;

#[cfg(not(all(test, tower_bearer_loom)))]
mod real {
    use std::sync::Arc;

    use arc_swap::ArcSwapOption;
    use futures_util::{FutureExt, future::Shared};
    use tokio::sync::oneshot;

    use super::Outcome;
    use crate::token;

    pub(crate) use std::sync::{Mutex, MutexGuard, atomic::AtomicU32};

    /// Where the current token is. Read without a lock.
    pub(crate) type Published = ArcSwapOption<token::Inner>;
    /// The current token as one service saw it last: reading it again costs one atomic load.
    pub(crate) type Cache = arc_swap::Cache<Arc<Published>, Option<Arc<token::Inner>>>;
    pub(crate) type Sender = oneshot::Sender<Outcome>;
    /// Resolves with the outcome of a refresh, or with an error if its sender is gone.
    pub(crate) type Waiter = Shared<oneshot::Receiver<Outcome>>;

    pub(crate) fn channel() -> (Sender, Waiter) {
        let (sender, receiver) = oneshot::channel();
        (sender, receiver.shared())
    }
}

#[cfg(all(test, tower_bearer_loom))]
mod mocked {
    use std::future::Future;
    use std::pin::Pin;
    use std::task::{Context, Poll};

    use loom::sync::{Arc, Condvar};

    use super::Outcome;
    use crate::token;

    pub(crate) use loom::sync::{Mutex, MutexGuard, atomic::AtomicU32};

    pub struct Published(Mutex<Option<std::sync::Arc<token::Inner>>>);

    impl Published {
        pub(crate) fn empty() -> Self {
            Self(Mutex::new(None))
        }

        pub(crate) fn load_full(&self) -> Option<std::sync::Arc<token::Inner>> {
            self.0.lock().unwrap().clone()
        }

        pub(crate) fn swap(
            &self,
            token: Option<std::sync::Arc<token::Inner>>,
        ) -> Option<std::sync::Arc<token::Inner>> {
            std::mem::replace(&mut self.0.lock().unwrap(), token)
        }
    }

    #[derive(Clone)]
    pub struct Cache(std::sync::Arc<Published>, Option<std::sync::Arc<token::Inner>>);

    impl Cache {
        pub(crate) fn new(published: std::sync::Arc<Published>) -> Self {
            Self(published, None)
        }

        pub(crate) fn load(&mut self) -> &Option<std::sync::Arc<token::Inner>> {
            self.1 = self.0.load_full();
            &self.1
        }
    }

    pub(crate) struct Sender(Waiter);

    impl Sender {
        pub(crate) fn send(self, outcome: Outcome) -> Result<(), Outcome> {
            *self.0.0.0.lock().unwrap() = Some(outcome);
            self.0.0.1.notify_all();
            Ok(())
        }
    }

    #[derive(Clone)]
    pub(crate) struct Waiter(Arc<(Mutex<Option<Outcome>>, Condvar)>);

    impl Waiter {
        /// Blocks until the outcome is there. A wake-up that is lost is a deadlock, which loom reports.
        pub(crate) fn wait(&self) -> Outcome {
            let mut outcome = self.0.0.lock().unwrap();
            loop {
                match &*outcome {
                    Some(outcome) => return outcome.clone(),
                    None => outcome = self.0.1.wait(outcome).unwrap(),
                }
            }
        }
    }

    /// For the code that awaits, which loom does not run.
    impl Future for Waiter {
        type Output = Result<Outcome, ()>;

        fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Self::Output> {
            Poll::Ready(Ok(self.wait()))
        }
    }

    pub(crate) fn channel() -> (Sender, Waiter) {
        let waiter = Waiter(Arc::new((Mutex::new(None), Condvar::new())));
        (Sender(waiter.clone()), waiter)
    }
}
