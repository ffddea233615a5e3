//! [`Landing`]: where callers wait for a flight, each of whom wakes the next once its outcome is there.
//!
//! One after the other, most of them on the thread that has the outcome at hand, is faster than all at once: ten thousand
//! that run into each other cost twice the time (`benches/stampede.rs`). That nobody depends on how soon another is polled
//! is seen to by the flight: it wakes more where a turn of its runtime has brought nobody on.

use std::{
    collections::VecDeque,
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll, Waker},
};

use tokio::task::yield_now;

use super::{shared_state::Lock, state::Outcome};

/// What is shared by a flight and those who wait for it.
#[derive(Default)]
pub(super) struct Queue {
    outcome: Option<Outcome>,
    /// In the order of their coming; one who has gone leaves its place empty.
    waiting: VecDeque<Option<Waker>>,
    /// How many have been called, and so the number of the first place.
    called: usize,
}

impl Queue {
    fn call(&mut self) -> Option<Waker> {
        loop {
            let place = self.waiting.pop_front()?;
            self.called += 1;
            if place.is_some() {
                return place;
            }
        }
    }

    /// The waiter at `place` waits no more: whom it has to wake, if it was called itself; else, its own waker.
    fn leave(&mut self, place: usize) -> (Option<Waker>, Option<Waker>) {
        match place.checked_sub(self.called) {
            None => (self.call(), None),
            Some(index) => (None, self.waiting[index].take()),
        }
    }

    /// Waits at `place`, or at the end of the queue; returns the waker that was there before.
    fn stay(&mut self, place: &mut Option<usize>, waker: &Waker) -> Option<Waker> {
        match place.and_then(|place| place.checked_sub(self.called)) {
            Some(index) => match &mut self.waiting[index] {
                Some(mine) if mine.will_wake(waker) => None,
                mine => mine.replace(waker.clone()),
            },
            None => {
                *place = Some(self.called + self.waiting.len());
                self.waiting.push_back(Some(waker.clone()));
                None
            }
        }
    }
}

/// A flight's end, for all who wait for it.
pub(super) struct Landing<M = Mutex<Queue>>(Arc<M>);

impl<M: Lock<Queue>> Landing<M> {
    pub(super) fn new() -> Self {
        Self(Arc::new(M::new(Queue::default())))
    }

    pub(super) fn wait(&self) -> Waiter<M> {
        Waiter { landing: self.clone(), place: None }
    }

    /// The flight has ended with `outcome`, which is handed over from here on.
    pub(super) fn land(self, outcome: Outcome) -> Handover<M> {
        self.0.with(|queue| queue.outcome = Some(outcome));
        self.call(1);
        Handover(self)
    }

    /// Wakes so many of those who wait.
    fn call(&self, count: usize) {
        for _ in 0..count {
            match self.0.with(Queue::call) {
                Some(waker) => waker.wake(),
                None => return,
            }
        }
    }
}

impl<M> Clone for Landing<M> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

/// Resolves with the outcome of the flight.
///
/// Cancel safe: one who is dropped after it was called wakes the next in its stead.
pub(super) struct Waiter<M: Lock<Queue> = Mutex<Queue>> {
    landing: Landing<M>,
    place: Option<usize>,
}

impl<M: Lock<Queue>> Future for Waiter<M> {
    type Output = Outcome;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Outcome> {
        let Self { landing, place } = self.get_mut();
        // Wakers are woken and dropped outside of the lock: they are others' code, which may end up here again.
        let (outcome, (next, _mine)) = landing.0.with(|queue| match &queue.outcome {
            Some(outcome) => {
                let outcome = outcome.clone();
                (Poll::Ready(outcome), place.take().map_or((None, None), |place| queue.leave(place)))
            }
            None => (Poll::Pending, (None, queue.stay(place, cx.waker()))),
        });
        if let Some(next) = next {
            next.wake();
        }
        outcome
    }
}

impl<M: Lock<Queue>> Drop for Waiter<M> {
    fn drop(&mut self) {
        let Some(place) = self.place else { return };
        let (next, _mine) = self.landing.0.with(|queue| queue.leave(place));
        if let Some(next) = next {
            next.wake();
        }
    }
}

/// Sees to it that all who wait are woken. Dropped, it wakes all who are left at once.
pub(super) struct Handover<M: Lock<Queue> = Mutex<Queue>>(Landing<M>);

impl<M: Lock<Queue>> Handover<M> {
    /// Waits until nobody waits any more, and wakes more and more of them in place of those who do not come.
    pub(super) async fn finish(self) {
        let (mut before, mut more) = (self.left(), 1);
        while before > 0 {
            yield_now().await;
            if self.left() < before {
                more = 1;
            } else {
                self.0.call(more);
                more *= 2;
            }
            before = self.left();
        }
    }

    fn left(&self) -> usize {
        self.0.0.with(|queue| queue.waiting.len())
    }
}

impl<M: Lock<Queue>> Drop for Handover<M> {
    fn drop(&mut self) {
        self.0.call(usize::MAX);
    }
}

#[cfg(test)]
mod tests {
    use std::task::Wake;

    use super::*;
    use crate::error::Error;

    fn landing() -> Landing {
        Landing::new()
    }

    fn poll(waiter: &mut Waiter) -> Poll<Outcome> {
        Pin::new(waiter).poll(&mut Context::from_waker(Waker::noop()))
    }

    fn is_interrupted(outcome: Poll<Outcome>) -> bool {
        matches!(outcome, Poll::Ready(Err(Error::Interrupted)))
    }

    /// Counts how often it was woken.
    #[derive(Default)]
    struct Woken(std::sync::atomic::AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        }
    }

    impl Woken {
        fn wait(self: &Arc<Self>, landing: &Landing) -> Waiter {
            let mut waiter = landing.wait();
            let waker = Waker::from(Arc::clone(self));
            assert!(Pin::new(&mut waiter).poll(&mut Context::from_waker(&waker)).is_pending());
            waiter
        }

        fn count(&self) -> usize {
            self.0.load(std::sync::atomic::Ordering::SeqCst)
        }
    }

    #[test]
    fn each_wakes_the_next_and_one_who_is_dropped_does_so_too() {
        let landing = landing();
        let woken: [Arc<Woken>; 4] = Default::default();
        let mut waiters: Vec<_> = woken.iter().map(|woken| Some(woken.wait(&landing))).collect();
        let count = || woken.each_ref().map(|woken| woken.count());
        // One who goes before anybody was called wakes nobody, nor is it woken.
        waiters[1] = None;
        let handover = landing.clone().land(Err(Error::Interrupted));
        assert_eq!(count(), [1, 0, 0, 0]);
        // Out of turn: it has its outcome, and whom it would have woken is still the first one's to wake.
        assert!(is_interrupted(poll(waiters[3].as_mut().unwrap())));
        assert_eq!(count(), [1, 0, 0, 0]);
        assert!(is_interrupted(poll(waiters[0].as_mut().unwrap())));
        assert_eq!(count(), [1, 0, 1, 0]);
        waiters[2] = None;
        drop((handover, waiters));
        assert_eq!(count(), [1, 0, 1, 0]);
        assert!(is_interrupted(poll(&mut landing.wait())));
    }

    #[test]
    fn a_handover_that_is_dropped_wakes_all_who_are_left() {
        let landing = landing();
        let woken = Arc::new(Woken::default());
        let _waiters: Vec<_> = (0..100).map(|_| woken.wait(&landing)).collect();
        drop(landing.land(Err(Error::Interrupted)));
        assert_eq!(woken.count(), 100);
    }

    #[tokio::test]
    async fn one_who_is_woken_and_not_polled_holds_up_nobody() {
        let landing = landing();
        let stuck = Arc::new(Woken::default());
        let _stuck: Vec<_> = (0..10).map(|_| stuck.wait(&landing)).collect();
        let waiters: Vec<_> = (0..1000).map(|_| tokio::spawn(landing.wait())).collect();
        tokio::task::yield_now().await;
        landing.land(Err(Error::Interrupted)).finish().await;
        for waiter in waiters {
            assert!(waiter.await.unwrap().is_err());
        }
        assert_eq!(stuck.count(), 10);
    }

    #[test]
    fn a_waiter_that_moves_to_another_task_is_woken_there() {
        let landing = landing();
        let (before, now) = (Arc::new(Woken::default()), Arc::new(Woken::default()));
        let mut waiter = before.wait(&landing);
        assert!(
            Pin::new(&mut waiter).poll(&mut Context::from_waker(&Waker::from(Arc::clone(&now)))).is_pending()
        );
        let _handover = landing.land(Err(Error::Interrupted));
        assert_eq!((before.count(), now.count()), (0, 1));
    }

    struct QueueLock(loom::sync::Mutex<Queue>);

    impl Lock<Queue> for QueueLock {
        fn new(value: Queue) -> Self {
            Self(loom::sync::Mutex::new(value))
        }

        fn with<R>(&self, change: impl FnOnce(&mut Queue) -> R) -> R {
            change(&mut self.0.lock().unwrap())
        }
    }

    /// Three threads: one who waits, one who waits and is dropped at its second poll, and the flight. A waiter who is never
    /// woken is a deadlock, which loom finds.
    #[test]
    fn nobody_waits_for_ever_however_the_threads_meet() {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(|| {
            let landing = Landing::<QueueLock>::new();
            let (stays, mut goes) = (landing.wait(), landing.wait());
            let stays = loom::thread::spawn(move || loom::future::block_on(stays));
            let goes = loom::thread::spawn(move || {
                let _ = Pin::new(&mut goes).poll(&mut Context::from_waker(Waker::noop()));
            });
            // Without the flight's help: the chain alone has to reach everyone.
            std::mem::forget(landing.land(Err(Error::Interrupted)));
            assert!(stays.join().unwrap().is_err());
            goes.join().unwrap();
        });
    }
}
