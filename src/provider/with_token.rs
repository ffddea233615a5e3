//! [`TokenProvider::with_token`]: sends with a token by a client that is no tower service.

use std::future::Future;

use tokio::time::Instant;

use super::TokenProvider;
use crate::error::Error;
use crate::retry::RetryPolicy;
use crate::token::Token;

impl TokenProvider {
    /// Sends by any client: calls `send` with a token, and once more with another token while `is_challenge` says that the
    /// API has challenged it.
    ///
    /// ```no_run
    /// # #[cfg(feature = "reqwest")]
    /// # async fn run(provider: tower_bearer::TokenProvider) -> Result<(), Box<dyn std::error::Error>> {
    /// let http = reqwest::Client::new();
    /// let response = provider
    ///     .with_token(
    ///         |token| http.get("https://ws.api.video/videos").bearer_auth(token.access_token()).send(),
    ///         |response| response.as_ref().is_ok_and(|response| response.status() == 401),
    ///     )
    ///     .await??;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// The rules are those of the layer with a default [`RetryPolicy`]: two retries, of which the first is immediate if
    /// there is a newer token, and the provider's [`retry_budget`](crate::TokenProviderBuilder::retry_budget). A refresh
    /// is paced as one of [`refresh`](Self::refresh). The program must send the token only to the
    /// [origins](crate::AllowedOrigins) that it is meant for. The metrics of challenges do not count it.
    ///
    /// A challenge is kept until the next call of `send`, since it is the result if there is no other token. If it keeps a connection, the token source must not need the same one.
    ///
    /// # Errors
    ///
    /// As for [`token`](Self::token), if there is no token for the first call. After that, the result is the last answer,
    /// also if it is a challenge.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future drops that of `send`. A refresh that is running goes on.
    pub async fn with_token<T, F, Fut>(
        &self,
        mut send: F,
        is_challenge: impl Fn(&T) -> bool,
    ) -> Result<T, Error>
    where
        F: FnMut(Token) -> Fut,
        Fut: Future<Output = T>,
    {
        let (core, policy) = (self.core(), RetryPolicy::new());
        let mut backoff = policy.make_backoff();
        let mut token = self.token().await?;
        let mut retry = 0;
        loop {
            retry += 1;
            let answer = send(token.clone()).await;
            if retry > policy.retries() || !is_challenge(&answer) {
                return Ok(answer);
            }
            core.retry_budget().inspect(|budget| budget.deposit());
            let Ok(next) = self.refresh(&token).await else { return Ok(answer) };
            let is_free = retry == 1 && next.id() != token.id();
            if !is_free {
                if core.retry_budget().is_some_and(|budget| !budget.withdraw()) {
                    return Ok(answer);
                }
                let is_last = retry == policy.retries();
                let now = Instant::now();
                let settled_at = core.settled_at(next.id().generation).filter(|_| is_last).unwrap_or(now);
                if let Some(backoff) = core.timer(settled_at.max(now) + backoff.next_delay()) {
                    backoff.await;
                }
            }
            // It may have expired during the backoff, or belong to another login.
            let Ok(next) = self.token().await else { return Ok(answer) };
            token = next;
        }
    }
}
