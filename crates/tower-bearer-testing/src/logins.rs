//! [`Logins`]: the families of refresh tokens, one for each login of a user.

use std::{collections::HashMap, time::Duration};

use tokio::time::Instant;

use super::random::random;

/// The number of a login.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Login(u64);

/// The refresh tokens of all logins that have not ended.
pub(super) struct Logins {
    /// Whether a refresh token is spent by its use.
    pub(super) rotate: bool,
    /// How long a spent refresh token is still accepted.
    pub(super) grace: Duration,
    started: u64,
    /// The spent ones remain, so that their reuse is detected.
    refresh_tokens: HashMap<String, RefreshToken>,
}

struct RefreshToken {
    login: Login,
    spent: Option<Instant>,
}

/// Why a refresh token is rejected.
pub(super) enum Rejected {
    Unknown,
    /// The token was spent earlier. Its login has now ended.
    Reused(Login),
}

impl Logins {
    pub(super) fn new() -> Self {
        Self { rotate: true, grace: Duration::ZERO, started: 0, refresh_tokens: HashMap::new() }
    }

    /// Starts a login. Returns it with its first refresh token.
    pub(super) fn start(&mut self) -> (Login, String) {
        self.started += 1;
        let login = Login(self.started);
        (login, self.add(login))
    }

    /// Returns the login of a refresh token, and the token's successor if tokens rotate.
    pub(super) fn refresh(&mut self, refresh_token: &str) -> Result<(Login, Option<String>), Rejected> {
        let token = self.refresh_tokens.get_mut(refresh_token).ok_or(Rejected::Unknown)?;
        let login = token.login;
        if !self.rotate {
            return Ok((login, None));
        }
        match token.spent {
            None => token.spent = Some(Instant::now()),
            Some(spent) if spent.elapsed() < self.grace => {}
            Some(_) => {
                self.end(login);
                return Err(Rejected::Reused(login));
            }
        }
        Ok((login, Some(self.add(login))))
    }

    /// Ends a login.
    pub(super) fn end(&mut self, login: Login) {
        self.refresh_tokens.retain(|_, token| token.login != login);
    }

    /// Ends all logins.
    pub(super) fn end_all(&mut self) {
        self.refresh_tokens.clear();
    }

    fn add(&mut self, login: Login) -> String {
        // The form of api.video's own refresh tokens.
        let refresh_token = format!("def50200{}", random(32));
        self.refresh_tokens.insert(refresh_token.clone(), RefreshToken { login, spent: None });
        refresh_token
    }
}
