//! The single flight: who may start one, who joins it, and what its end does to the current token.
//!
//! Every decision is made in [`Core::decide`] and [`Core::land`], under one lock that no foreign code runs under. The
//! happy path takes no lock: [`Core::header`] reads the current token with one atomic load.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use arc_swap::ArcSwapOption;
use tokio::{
    runtime::Handle,
    sync::watch,
    time::{Instant, sleep_until, timeout},
};
use tower::retry::backoff::{Backoff, ExponentialBackoff};

use super::{cool_down::CoolDown, lifetime, status::Status};
use crate::{
    error::{Error, SourceError},
    retry::RetryPolicy,
    source::TokenSource,
    token::{self, Token, TokenId},
};

/// The longest that a source's own wish to be left alone is followed.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);

/// How long the provider waits after a flight that was interrupted or timed out, of which no backoff was taken.
const AFTER_INTERRUPTION: Duration = Duration::from_millis(100);

/// What a flight ends with; everyone who waits for it gets a clone.
type Outcome = Result<Token, Error>;

/// Resolves with the outcome of a flight, or with what was decided without one.
pub(crate) type Waiting = Pin<Box<dyn Future<Output = Outcome> + Send + Sync>>;

#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub(super) refresh_timeout: Duration,
    pub(super) retry: RetryPolicy,
    pub(super) cool_down: (Duration, Duration),
}

/// The state that all handles of one provider share.
pub(super) struct Core {
    current: ArcSwapOption<token::Inner>,
    flights: Mutex<Flights>,
    source: Box<dyn DynTokenSource>,
    settings: Settings,
}

/// What is known of the flights so far.
struct Flights {
    /// Set from the start of a flight until it lands; its receiver gets the outcome.
    in_progress: Option<watch::Receiver<Option<Outcome>>>,
    generation: u64,
    started: u64,
    failed: u64,
    last_error: Option<Error>,
    /// After a permanent failure: until when callers are told so at once.
    permanent: CoolDown,
    /// The failure that they are told, and the source's revision that it holds for.
    permanent_error: Option<(Error, u64)>,
    /// After a flight that a challenge caused: until when no other challenge may cause one.
    challenged: CoolDown,
    /// Goes on from flight to flight until one succeeds.
    backoff: ExponentialBackoff,
    /// The source is not asked before this.
    not_before: Option<Instant>,
}

/// Why a caller asks, and so which token will do.
#[derive(Clone, Copy)]
pub(super) enum Need {
    /// Any token that has not expired.
    Any,
    /// Any but this one, which the API has refused.
    OtherThan(TokenId),
    /// The current one still does, but is ageing.
    Ahead,
}

enum Decision {
    Done(Outcome),
    Wait(watch::Receiver<Option<Outcome>>),
}

impl Core {
    pub(super) fn new(source: impl TokenSource, settings: Settings) -> Self {
        let (min, max) = settings.cool_down;
        Self {
            current: ArcSwapOption::empty(),
            flights: Mutex::new(Flights {
                in_progress: None,
                generation: 0,
                started: 0,
                failed: 0,
                last_error: None,
                permanent: CoolDown::new(min, max),
                permanent_error: None,
                challenged: CoolDown::new(min, max),
                backoff: settings.retry.make_backoff(),
                not_before: None,
            }),
            source: Box::new(source),
            settings,
        }
    }

    /// The token as it was published last, whatever has become of it.
    pub(super) fn published(&self) -> Option<Token> {
        self.current.load_full().map(Token)
    }

    /// The current token, unless it has expired.
    pub(super) fn working(&self) -> Option<Token> {
        self.published().filter(|token| !token.0.is_expired(Instant::now()))
    }

    /// The current token, unless it has expired; one that is ageing is renewed behind the caller's back.
    pub(super) fn usable(self: &Arc<Self>) -> Option<Token> {
        self.published().filter(|token| token.0.is_fresh() || self.renew_ahead(&token.0))
    }

    /// Whether a token that is not fresh will do all the same; if so, it is renewed behind the caller's back.
    ///
    /// The answer is of this very token: another may have been published since it was read.
    #[cold]
    pub(super) fn renew_ahead(self: &Arc<Self>, token: &token::Inner) -> bool {
        let will_do = !token.is_expired(Instant::now());
        if will_do {
            self.request(Need::Ahead);
        }
        will_do
    }

    /// Where tokens are published.
    #[inline]
    pub(super) fn current(&self) -> &ArcSwapOption<token::Inner> {
        &self.current
    }

    /// What `need` comes to, without waiting longer than for the flight that it joins or starts.
    ///
    /// The flight, if one is to start, has started when this returns: dropping the future does not stop it.
    pub(super) fn obtain(self: &Arc<Self>, need: Need) -> Waiting {
        match self.decide(need) {
            Decision::Done(outcome) => Box::pin(std::future::ready(outcome)),
            Decision::Wait(mut flight) => Box::pin(async move {
                // The sender is dropped only after it has sent: `Landing` sees to that.
                match flight.wait_for(Option::is_some).await.as_deref() {
                    Ok(Some(outcome)) => outcome.clone(),
                    _ => Err(Error::Interrupted),
                }
            }),
        }
    }

    /// Starts a flight for `need` if one has to be, and does not wait for it.
    pub(super) fn request(self: &Arc<Self>, need: Need) {
        self.decide(need);
    }

    fn decide(self: &Arc<Self>, need: Need) -> Decision {
        let now = Instant::now();
        let revision = self.source.revision();
        let mut flights = self.lock();
        // Read under the lock, which every publication holds: a flight that has just landed is not flown again.
        let current = self.published();
        let working = current.clone().filter(|token| !token.0.is_expired(now));
        match (need, &working) {
            (Need::Any, Some(token)) => return Decision::Done(Ok(token.clone())),
            (Need::Ahead, Some(token)) if token.0.is_fresh() => return Decision::Done(Ok(token.clone())),
            // A late challenge: that token has been replaced already.
            (Need::OtherThan(refused), Some(token)) if token.id() != refused => {
                return Decision::Done(Ok(token.clone()));
            }
            _ => {}
        }
        if let Some(flight) = &flights.in_progress {
            return Decision::Wait(flight.clone());
        }
        if let Some(error) = flights.permanent_error(now, revision) {
            return Decision::Done(Err(error));
        }
        match (need, working) {
            // The API refuses the newest token too: another would fare no better, so the source is left alone.
            (Need::OtherThan(_), Some(token)) if flights.challenged.is_active(now) => {
                return Decision::Done(Ok(token));
            }
            // Nobody waits for this one, so it need not hurry.
            (Need::Ahead, Some(token)) if flights.not_before.is_some_and(|at| now < at) => {
                return Decision::Done(Ok(token));
            }
            _ => {}
        }
        let Ok(runtime) = Handle::try_current() else {
            return Decision::Done(Err(Error::NoRuntime));
        };
        let (sender, receiver) = watch::channel(None);
        flights.in_progress = Some(receiver.clone());
        flights.started += 1;
        drop(flights);
        let landing = Landing {
            core: Arc::clone(self),
            sender,
            challenged: matches!(need, Need::OtherThan(_)),
            revision,
            landed: false,
        };
        // Not under the lock: a runtime that is shutting down drops the flight at once, which lands it.
        runtime.spawn(landing.fly(current));
        Decision::Wait(receiver)
    }

    /// Asks the source until it gives a token, fails for good, or has failed too often.
    async fn attempt(&self, previous: Option<Token>) -> Outcome {
        let deadline = Instant::now() + self.settings.refresh_timeout;
        let mut retries = 0;
        loop {
            let (not_before, last_error) = {
                let flights = self.lock();
                (flights.not_before, flights.last_error.clone())
            };
            match (not_before, last_error) {
                (Some(at), Some(error)) if at > deadline => return Err(error),
                (Some(at), _) => sleep_until(at).await,
                (None, _) => {}
            }
            let error = match self.source.fetch(previous.as_ref()).await {
                Ok(token) => return Ok(token),
                Err(error) if !error.is_transient() => return Err(error.into()),
                Err(error) => error,
            };
            let error = self.back_off(error);
            if retries >= self.settings.retry.retries() {
                return Err(error);
            }
            retries += 1;
        }
    }

    /// Puts off the next attempt, by the backoff or by what the source asks for, whichever is longer.
    fn back_off(&self, error: SourceError) -> Error {
        let mut flights = self.lock();
        let asked = error.retry_after().unwrap_or_default().min(MAX_RETRY_AFTER);
        let backoff = flights.backoff.next_backoff().deadline();
        flights.not_before = Some(backoff.max(Instant::now() + asked));
        let error = Error::from(error);
        flights.last_error = Some(error.clone());
        error
    }

    /// Ends a flight: publishes its token, or notes its failure, which never takes a token away.
    fn land(&self, outcome: Outcome, challenged: bool, revision: u64) -> Outcome {
        let now = Instant::now();
        let mut flights = self.lock();
        flights.in_progress = None;
        match outcome {
            Ok(token) => {
                flights.generation += 1;
                let (expires_at, ageing_at) = lifetime::instants(&token, now);
                let token = token.published(flights.generation, expires_at, ageing_at);
                self.current.store(Some(Arc::clone(&token.0)));
                flights.backoff = self.settings.retry.make_backoff();
                flights.not_before = None;
                flights.last_error = None;
                flights.permanent.reset();
                flights.permanent_error = None;
                if challenged {
                    flights.challenged.begin(now);
                }
                Ok(token)
            }
            Err(error) => {
                flights.failed += 1;
                flights.last_error = Some(error.clone());
                if !error.is_transient() {
                    flights.permanent.begin(now);
                    flights.permanent_error = Some((error.clone(), revision));
                } else if !matches!(error, Error::Source(_)) {
                    flights.not_before = flights.not_before.max(Some(now + AFTER_INTERRUPTION));
                }
                Err(error)
            }
        }
    }

    pub(super) fn status(&self) -> Status {
        let flights = self.lock();
        Status {
            generation: flights.generation,
            remaining: self.published().and_then(|token| token.remaining()),
            refreshing: flights.in_progress.is_some(),
            flights: flights.started,
            failed_flights: flights.failed,
            last_error: flights.last_error.clone(),
        }
    }

    /// A panic cannot leave the flights in a half-changed state, so a poisoned lock is as good as any.
    fn lock(&self) -> MutexGuard<'_, Flights> {
        self.flights.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Flights {
    /// The permanent failure that callers are told without a flight, while its cool-down lasts.
    ///
    /// A new credential ends the cool-down: the failure was another's.
    fn permanent_error(&mut self, now: Instant, revision: u64) -> Option<Error> {
        let (error, failed_revision) = self.permanent_error.as_ref()?;
        if *failed_revision != revision {
            self.permanent.reset();
            self.permanent_error = None;
            return None;
        }
        self.permanent.is_active(now).then(|| error.clone())
    }
}

/// The end of a flight, which comes to pass however the flight ends: by its outcome, a panic, or the runtime's end.
struct Landing {
    core: Arc<Core>,
    sender: watch::Sender<Option<Outcome>>,
    challenged: bool,
    revision: u64,
    landed: bool,
}

impl Landing {
    async fn fly(mut self, previous: Option<Token>) {
        let limit = self.core.settings.refresh_timeout;
        let outcome = match timeout(limit, self.core.attempt(previous)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Error::TimedOut(limit)),
        };
        self.land(outcome);
    }

    fn land(&mut self, outcome: Outcome) {
        self.landed = true;
        // The provider is told before the waiters: whoever wakes finds the token published.
        let outcome = self.core.land(outcome, self.challenged, self.revision);
        self.sender.send_replace(Some(outcome));
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        if !self.landed {
            self.land(Err(Error::Interrupted));
        }
    }
}

/// [`TokenSource`] behind a pointer, so that the provider, and with it the layer, has no type parameter for it.
trait DynTokenSource: Send + Sync {
    fn fetch<'a>(
        &'a self,
        previous: Option<&'a Token>,
    ) -> Pin<Box<dyn Future<Output = Result<Token, SourceError>> + Send + 'a>>;

    fn revision(&self) -> u64;
}

impl<T: TokenSource> DynTokenSource for T {
    fn fetch<'a>(
        &'a self,
        previous: Option<&'a Token>,
    ) -> Pin<Box<dyn Future<Output = Result<Token, SourceError>> + Send + 'a>> {
        Box::pin(TokenSource::fetch(self, previous))
    }

    fn revision(&self) -> u64 {
        TokenSource::revision(self)
    }
}
