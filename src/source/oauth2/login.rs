//! [`Login`]: the refresh tokens of a user's login, and which of them is presented next.
//!
//! Each refresh token is granted for the one before it, and the first one, the seed, for the login. A server may revoke
//! them all if one is presented that is spent. So there is one exchange at a time, in a task that no caller can cancel,
//! and its result is kept until somebody takes it.

use std::{
    collections::VecDeque,
    future::poll_fn,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::Poll,
    time::Duration,
};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use secrecy::{ExposeSecret, SecretString};
use sha2::{Digest, Sha256};
use tokio::{
    sync::OwnedMutexGuard,
    time::{Instant, timeout, timeout_at},
};

use super::{
    super::presented::{Count, Failure, MAX_PRESENTED, Means, Presented},
    form::check_text,
};
use crate::{error::SourceError, token::Token};

/// How many refresh tokens are remembered after others have replaced them.
const MAX_REPLACED: usize = 64;

pub(super) struct Login {
    state: Mutex<State>,
}

/// Held while a refresh token is exchanged.
pub(super) type Turn = OwnedMutexGuard<()>;

struct State {
    /// The refresh token that the newest login gave.
    seed: SecretString,
    /// How often the seed was replaced.
    revision: u64,
    /// Whether the seed can still be presented: no token was granted for it, here or in another process.
    is_seed_left: bool,
    /// Whether the seed was set after the start, and not presented yet. It then goes before all others.
    is_pending: bool,
    /// The newest refresh token, which is presented next.
    newest: Option<Newest>,
    /// The refresh tokens that it has replaced, the newest last.
    replaced: VecDeque<SecretString>,
    /// The token of an exchange that nobody has waited for.
    untaken: Option<Token>,
    /// Whose turn it is to exchange a refresh token. Replaced if an exchange is given up.
    turn: Arc<tokio::sync::Mutex<()>>,
    /// Until when the running exchange, or the one before, counts as driven by its runtime.
    driven_until: Instant,
}

struct Newest {
    refresh_token: SecretString,
    /// The fingerprint of its seed; `None` if that is not known.
    login: Option<Arc<str>>,
    /// How often it was presented.
    presented: u8,
}

impl Newest {
    fn is(&self, refresh_token: &str) -> bool {
        self.refresh_token.expose_secret() == refresh_token
    }
}

impl Login {
    pub(super) fn new(seed: String) -> Arc<Self> {
        let state = State {
            is_seed_left: !seed.is_empty(),
            seed: seed.into(),
            revision: 0,
            is_pending: false,
            newest: None,
            replaced: VecDeque::new(),
            untaken: None,
            turn: Arc::default(),
            driven_until: Instant::now(),
        };
        Arc::new(Self { state: Mutex::new(state) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the refresh token of a new login. An empty one is none.
    pub(super) fn set_seed(&self, seed: String) {
        let mut state = self.state();
        (state.is_seed_left, state.is_pending) = (!seed.is_empty(), !seed.is_empty());
        state.seed = seed.into();
        state.revision += 1;
        state.untaken = None;
    }

    pub(super) fn revision(&self) -> u64 {
        self.state().revision
    }

    /// Checks the seed. An empty one is none.
    pub(super) fn check(&self) -> Result<(), SourceError> {
        let seed = self.state().seed.clone();
        if seed.expose_secret().len() > Token::MAX_LEN {
            return Err(SourceError::configuration("the refresh token must be at most 16384 bytes long"));
        }
        check_text("the refresh token", seed.expose_secret())
    }

    /// Returns the refresh token that is presented if there is no previous token.
    pub(super) fn next(&self) -> Option<Token> {
        let state = self.state();
        let newest =
            state.newest.as_ref().filter(|newest| !state.is_pending && newest.presented < MAX_PRESENTED);
        let (refresh_token, login) = match newest {
            Some(newest) => (newest.refresh_token.clone(), newest.login.clone()),
            None if state.is_seed_left => (state.seed.clone(), Some(fingerprint(&state.seed))),
            None => return None,
        };
        Some(Token::of_refresh_token(refresh_token).with_login(login))
    }

    /// Waits until no exchange is running, or the runtime of one has not been driven for as long as an exchange may take.
    /// That one is then given up, for all who wait.
    pub(super) async fn turn(&self, limit: Duration) -> Turn {
        loop {
            let (turn, driven_until) = {
                let state = self.state();
                (Arc::clone(&state.turn), state.driven_until)
            };
            let guard = timeout_at(driven_until.max(Instant::now()), Arc::clone(&turn).lock_owned()).await;
            let mut state = self.state();
            match guard {
                Ok(guard) if Arc::ptr_eq(&turn, &state.turn) => {
                    state.driven_until = Instant::now() + limit;
                    return guard;
                }
                Err(_) if state.driven_until == driven_until => state.turn = Arc::default(),
                _ => {}
            }
        }
    }

    /// Runs `exchange`, and shows at intervals that its runtime is driven. `None` if it was given up meanwhile: another one
    /// has presented its refresh token, so it does not go on.
    pub(super) async fn driven<T>(
        &self,
        turn: &Turn,
        limit: Duration,
        exchange: impl Future<Output = T>,
    ) -> Option<T> {
        let mut exchange = pin!(exchange);
        let has_turn = || Arc::ptr_eq(OwnedMutexGuard::mutex(turn), &self.state().turn);
        let mut guarded =
            poll_fn(|cx| if has_turn() { exchange.as_mut().poll(cx).map(Some) } else { Poll::Ready(None) });
        loop {
            if let Ok(output) = timeout(limit / 4, &mut guarded).await {
                return output;
            }
            self.state().driven_until = Instant::now() + limit;
        }
    }

    /// Takes the token of an exchange whose caller was dropped, unless it is no longer the newest.
    pub(super) fn take_untaken(&self) -> Option<Token> {
        let mut state = self.state();
        let token = state.untaken.take()?;
        let newest = state.newest.as_ref()?;
        token.refresh_token().is_some_and(|refresh_token| newest.is(refresh_token)).then_some(token)
    }

    /// Chooses the refresh token to present in place of `asked`, and counts it as presented. `None` if there is none.
    ///
    /// It is `asked` itself, unless another one has replaced that.
    pub(super) fn present(self: &Arc<Self>, asked: &Token) -> Option<Exchange> {
        let mut state = self.state();
        let newest = state.choose(asked.refresh_token()?, asked.login())?;
        newest.presented += 1;
        let (refresh_token, login) = (newest.refresh_token.clone(), newest.login.clone());
        drop(state);
        Some(Exchange { presented: Presented::new(Arc::clone(self), refresh_token), login })
    }

    /// Records that `next` was granted for `refresh_token` of this login, which may be the same one.
    fn replace(&self, refresh_token: &str, login: Option<Arc<str>>, next: &str) {
        let mut state = self.state();
        // The seed of the same login may have been set once more meanwhile. It is spent.
        if login == Some(fingerprint(&state.seed)) {
            (state.is_seed_left, state.is_pending) = (false, false);
        }
        if state.newest.as_ref().is_some_and(|newest| newest.is(refresh_token)) {
            state.set_newest(next, login);
            state.newest.iter_mut().for_each(|newest| newest.presented = 0);
        }
    }
}

/// A refresh token that is being exchanged, and the login that it belongs to.
pub(super) struct Exchange {
    pub(super) presented: Presented<Arc<Login>>,
    login: Option<Arc<str>>,
}

impl Exchange {
    /// Records that `token` was granted for the refresh token, and keeps it until it is taken.
    pub(super) fn granted(self, token: Token) {
        let (owner, login) = (&self.presented.count, self.login);
        let next = token.refresh_token().unwrap_or_default();
        owner.replace(self.presented.refresh_token(), login.clone(), next);
        let mut state = owner.state();
        let is_of_newest_login = !state.is_pending;
        state.untaken = Some(token.with_login(login)).filter(|_| is_of_newest_login);
    }

    /// Records how the exchange failed. Returns `None` if the refresh token must not be presented again.
    pub(super) fn failed(self, failure: Failure) -> Option<SourceError> {
        if let Means::Replaced(next) = &failure.means {
            let refresh_token = self.presented.refresh_token();
            self.presented.count.replace(refresh_token, self.login, next.expose_secret());
        }
        self.presented.failed(failure).ok()
    }
}

impl State {
    /// Returns the refresh token that is presented in place of `asked`, which another process may have got. `None` if it
    /// must not be presented.
    fn choose(&mut self, asked: &str, login: Option<Arc<str>>) -> Option<&mut Newest> {
        let is_seed = asked == self.seed.expose_secret();
        if !is_seed && login.as_ref().is_some_and(|login| *login == fingerprint(&self.seed)) {
            // Another process has presented the seed.
            (self.is_seed_left, self.is_pending) = (false, false);
        }
        // A new login may be another user's, whose tokens the old refresh token does not give.
        if self.is_pending && !is_seed {
            return None;
        }
        if is_seed && self.is_seed_left {
            self.set_newest(asked, Some(fingerprint(&self.seed)));
            // It may have been rejected before. The user says that it is good.
            self.newest.iter_mut().for_each(|newest| newest.presented = 0);
            (self.is_seed_left, self.is_pending) = (false, false);
        } else if self.newest.is_none() || !(is_seed || self.was_replaced(asked)) {
            // If it is not known here, another process has got it later than this one has got its newest.
            self.set_newest(asked, login);
        }
        self.newest.as_mut().filter(|newest| newest.presented < MAX_PRESENTED)
    }

    fn was_replaced(&self, refresh_token: &str) -> bool {
        self.replaced.iter().any(|replaced| replaced.expose_secret() == refresh_token)
    }

    fn set_newest(&mut self, refresh_token: &str, login: Option<Arc<str>>) {
        if self.newest.as_ref().is_some_and(|newest| newest.is(refresh_token)) {
            return;
        }
        let newest = Newest { refresh_token: refresh_token.into(), login, presented: 0 };
        if let Some(replaced) = self.newest.replace(newest) {
            if self.replaced.len() == MAX_REPLACED {
                self.replaced.pop_front();
            }
            self.replaced.push_back(replaced.refresh_token);
        }
        // A server may grant the same one again.
        self.replaced.retain(|replaced| replaced.expose_secret() != refresh_token);
    }
}

impl Count for Arc<Login> {
    fn change(&self, refresh_token: &str, change: impl FnOnce(&mut u8)) {
        if let Some(newest) = self.state().newest.as_mut().filter(|newest| newest.is(refresh_token)) {
            change(&mut newest.presented);
        }
    }
}

/// Identifies a login in a stored record, without the seed itself.
fn fingerprint(seed: &SecretString) -> Arc<str> {
    let hash = Sha256::digest(seed.expose_secret());
    BASE64_URL_SAFE_NO_PAD.encode(&hash[..16]).into()
}
