//! The one exchange at a time: that of a login goes on if its refresh is dropped, as long as its runtime is driven.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use futures_util::future::FutureExt;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout, timeout_at};

use super::{Login, memory::Running};
use crate::{detached::detached, error::SourceError, source::TokenRequest, store::Lease, token::Token};

/// An exchange that has shown no sign of life for so long is on a runtime that is not driven.
const ALIVE: Duration = Duration::from_secs(10);

/// Ends an exchange when it is dropped, also if its runtime shuts down.
struct Ending {
    login: Arc<Login>,
    number: u32,
    _ended: oneshot::Sender<()>,
}

impl Drop for Ending {
    fn drop(&mut self) {
        let mut state = self.login.state();
        state.more().exchange.take_if(|exchange| exchange.number == self.number);
    }
}

impl Login {
    /// Waits until no exchange of a login is running, or the runtime of one is not driven. That one is then given up.
    pub(crate) async fn turn(&self) {
        loop {
            let (number, alive_until, ended) = match self.state().exchange() {
                Some(exchange) => (exchange.number, exchange.alive_until, exchange.ended.clone()),
                None => return,
            };
            let is_late = timeout_at(alive_until.max(Instant::now()), ended).await.is_err();
            let is_dead = |exchange: &mut Running| {
                exchange.number == number && (!is_late || exchange.alive_until == alive_until)
            };
            self.state().more().exchange.take_if(is_dead);
        }
    }

    /// Asks the source. For a login, in a task that goes on if the refresh is dropped, as long as its runtime is driven.
    pub(super) async fn exchange(
        self: &Arc<Self>,
        request: &TokenRequest<'_>,
        lease: Option<Lease>,
    ) -> Result<Token, SourceError> {
        if !self.is_login() {
            return self.ask_and_publish(request, lease).await;
        }
        let (sender, ended) = oneshot::channel();
        let number = {
            let mut state = self.state();
            let more = state.more();
            if more.exchange.is_some() {
                drop(state);
                self.release_later(lease);
                return Err(SourceError::unavailable("another exchange of the login is running"));
            }
            more.exchanges = more.exchanges.wrapping_add(1);
            let (number, alive_until) = (more.exchanges, Instant::now() + ALIVE);
            more.exchange = Some(Running { number, alive_until, ended: ended.shared() });
            number
        };
        let ending = Ending { login: Arc::clone(self), number, _ended: sender };
        let request = request.clone().into_owned();
        let exchanged = detached(async move {
            let login = &ending.login;
            let result = login.driven(number, login.ask_and_publish(&request, lease)).await;
            if let Some(Err(error)) = &result {
                let holds_for = error.retry_after().unwrap_or(ALIVE);
                login.state().more().untaken = Some((error.clone(), Instant::now() + holds_for));
            }
            result
        });
        let result = exchanged.await?;
        self.state().more().untaken = None;
        result.unwrap_or_else(|| {
            Err(SourceError::unavailable("the token request was given up: its runtime was not driven"))
        })
    }

    /// Runs `exchange`, and shows at intervals that its runtime is driven. `None` if it was given up meanwhile: another one
    /// has presented its refresh token, so it does not go on.
    async fn driven<T>(&self, number: u32, exchange: impl Future<Output = T>) -> Option<T> {
        let mut exchange = pin!(exchange);
        let has_turn = || self.state().exchange().is_some_and(|running| running.number == number);
        let mut guarded =
            poll_fn(|cx| if has_turn() { exchange.as_mut().poll(cx).map(Some) } else { Poll::Ready(None) });
        loop {
            if let Ok(output) = timeout(ALIVE / 4, &mut guarded).await {
                return output;
            }
            let mut state = self.state();
            if let Some(running) = state.more().exchange.as_mut().filter(|running| running.number == number) {
                running.alive_until = Instant::now() + ALIVE;
            }
        }
    }
}
