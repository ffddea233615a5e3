//! When a token counts as ageing and as expired, told once as it is published.

use std::time::Duration;

use tokio::time::Instant;
use tower::util::rng::{HasherRng, Rng};

use crate::token::Token;

/// The last part of its life in which a token is renewed behind the callers' backs.
const AHEAD: f64 = 0.1;

/// That part varies by this much either way, so that a fleet does not renew at once.
const JITTER: f64 = 0.1;

/// A token is used for at least this long, whatever lifetime it states: one that expires at once would otherwise cost
/// a flight per request. If the API refuses it, its 401 says so.
const LEAST: Duration = Duration::from_secs(1);

/// The instants at which `token`, received now, expires and begins to age.
pub(super) fn instants(token: &Token, now: Instant) -> (Option<Instant>, Option<Instant>) {
    let Some(expires_at) = token.expires_at() else {
        return (None, None);
    };
    let life = expires_at.saturating_duration_since(now).max(LEAST);
    let spread = 1.0 + JITTER * (2.0 * HasherRng::new().next_f64() - 1.0);
    let ahead = life.mul_f64(AHEAD * spread);
    (Some(now + life), Some(now + (life - ahead)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn life_and_ahead(expires_in: Duration) -> (Duration, Duration) {
        let token = Token::builder("abc").expires_in(expires_in).build().unwrap();
        let now = Instant::now();
        match instants(&token, now) {
            (Some(expires_at), Some(ageing_at)) => (expires_at - now, expires_at - ageing_at),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_ages_in_the_last_tenth_of_its_life_give_or_take_a_tenth() {
        for seconds in [3600, 60, 2] {
            let (life, ahead) = life_and_ahead(Duration::from_secs(seconds));
            assert_eq!(life, Duration::from_secs(seconds));
            let share = ahead.as_secs_f64() / life.as_secs_f64();
            assert!((0.09..=0.11).contains(&share), "{seconds} s: {share}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_lifetime_of_nothing_lasts_a_second() {
        assert_eq!(life_and_ahead(Duration::ZERO).0, LEAST);
    }

    #[tokio::test(start_paused = true)]
    async fn an_absurd_lifetime_does_not_overflow() {
        assert!(life_and_ahead(Duration::MAX).0 > Duration::from_secs(365 * 24 * 60 * 60));
    }

    #[test]
    fn a_token_without_a_lifetime_neither_ages_nor_expires() {
        let token = Token::builder("abc").build().unwrap();
        assert_eq!(instants(&token, Instant::now()), (None, None));
    }
}
