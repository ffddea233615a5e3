//! [`ReplayBody`]: a body that records what is read from it, so that it can be sent again from the start.
//!
//! An attempt is one transmission of the body. All attempts share one [`Recording`], which holds the original body:
//! the source. Each attempt has a number, and only the newest attempt reads on. When a new attempt starts, the next
//! poll of the previous one returns an error, so its connection stops sending (over HTTP/1 the connection closes,
//! over HTTP/2 the stream is reset). The new attempt replays the recorded frames, then continues to read the source.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http_body::{Body, SizeHint};

use super::recording::{Polled, Recording};
use crate::{debug::debug_fields, error::BoxError};

/// A request body that can be sent again: the inner service's body with
/// [`.buffered(limit)`](crate::BearerAuthLayer::buffered) and
/// [`.replay_with(limit, wrap)`](crate::BearerAuthLayer::replay_with).
///
/// Frames are passed on as they arrive, trailers included. Size hint and end of stream are those of the original
/// body. Frames are recorded until it is known that the body will not be sent again. The type is `Send` and `Sync` if
/// the original body is `Send`.
///
/// # Memory
///
/// The bytes of the data and the trailers count against the limit. Bookkeeping adds at most 1 % of the limit and
/// 1 KiB.
///
/// * A data frame of less than 512 KiB is copied; adjacent small frames share one buffer. A frame that is a slice
///   of a large buffer does not keep that buffer alive. A retry gets the same bytes, but not the same frames.
/// * A larger frame is kept by reference count if the original's data is [`Bytes`]. If it is a slice, the whole
///   buffer stays alive.
/// * An empty frame is not recorded.
/// * Trailers count with their names and values, 6 bytes for each and some bytes in total. If a frame follows the
///   trailers, it is passed on, but the body cannot be sent again: a body ends with its trailers (RFC 9110 §6.5).
///
/// # Errors
///
/// The original body's error, boxed; [`Superseded`] if another attempt has started.
pub struct ReplayBody<B: Body> {
    /// Compared with the recording's: a smaller one was superseded.
    attempt: u64,
    /// `None` for an empty body: there is nothing to send, and nothing to record.
    recording: Option<Arc<Mutex<Recording<B>>>>,
}

/// The error of an attempt to send a body after another attempt has started, because of a 401.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the request is being sent again with a new token; this attempt to send its body has ended")]
#[non_exhaustive]
pub struct Superseded;

/// A handle that sends a [`ReplayBody`] again. Dropping it stops the recording.
#[expect(missing_debug_implementations, reason = "its name cannot be written outside of the crate")]
pub struct Rewind<B: Body> {
    /// `None` for an empty body.
    recording: Option<Arc<Mutex<Recording<B>>>>,
}

impl<B: Body<Error: Into<BoxError>>> ReplayBody<B> {
    /// Starts the first attempt. Without a [`Rewind`] if the body's size hint exceeds the limit: nothing is recorded
    /// then.
    pub(super) fn record(body: B, limit: usize) -> (Self, Option<Rewind<B>>) {
        if body.is_end_stream() {
            return (Self { attempt: 0, recording: None }, Some(Rewind { recording: None }));
        }
        let recording = Recording::new(body, limit);
        let can_rewind = recording.can_rewind;
        let recording = Arc::new(Mutex::new(recording));
        let rewind = can_rewind.then(|| Rewind { recording: Some(Arc::clone(&recording)) });
        (Self { attempt: 0, recording: Some(recording) }, rewind)
    }
}

impl<B: Body> Rewind<B> {
    /// Pauses the newest attempt, and returns whether the body can be sent again.
    ///
    /// While it is paused nothing is read from the source. Otherwise an upload that continues after an early 401 could
    /// exceed the limit before the retry starts.
    pub(super) fn hold(&self) -> bool {
        let Some(recording) = &self.recording else { return true };
        let mut recording = lock(recording);
        recording.held = recording.can_rewind;
        recording.can_rewind
    }

    /// Ends the pause of the newest attempt, and the attempt itself if it `ends`.
    pub(super) fn release(&self, ends: bool) {
        let Some(recording) = &self.recording else { return };
        let waker = {
            let mut recording = lock(recording);
            recording.held = false;
            recording.attempt += u64::from(ends);
            recording.waker.take()
        };
        waker.into_iter().for_each(Waker::wake);
    }

    /// Starts another attempt, and ends the previous one; `None` if the body cannot be sent again.
    pub(super) fn rewind(&self) -> Option<ReplayBody<B>> {
        let Some(recording) = &self.recording else {
            return Some(ReplayBody { attempt: 0, recording: None });
        };
        let (attempt, waker) = {
            let mut recording = lock(recording);
            (recording.rewind()?, recording.waker.take())
        };
        // Wakes the previous attempt, whose poll then returns an error. Outside the lock: the waker may poll the
        // attempt at once, which takes the lock.
        waker.into_iter().for_each(Waker::wake);
        Some(ReplayBody { attempt, recording: Some(Arc::clone(recording)) })
    }
}

impl<B: Body> Drop for Rewind<B> {
    fn drop(&mut self) {
        let Some(recording) = &self.recording else { return };
        let waker = {
            let mut recording = lock(recording);
            recording.stop();
            if std::mem::take(&mut recording.held) { recording.waker.take() } else { None }
        };
        waker.into_iter().for_each(Waker::wake);
    }
}

impl<B: Body> Body for ReplayBody<B> {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Polled {
        let Some(recording) = &self.recording else { return Poll::Ready(None) };
        let mut recording = lock(recording);
        if recording.attempt != self.attempt {
            return Poll::Ready(Some(Err(Superseded.into())));
        }
        recording.poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        let Some(recording) = &self.recording else { return true };
        let recording = lock(recording);
        recording.attempt == self.attempt && recording.is_at_end()
    }

    fn size_hint(&self) -> SizeHint {
        let Some(recording) = &self.recording else { return SizeHint::with_exact(0) };
        let recording = lock(recording);
        if recording.attempt == self.attempt { recording.size_hint() } else { SizeHint::default() }
    }
}

/// Ignores poisoning: a source that panics in its poll leaves the recording unchanged.
fn lock<B: Body>(recording: &Mutex<Recording<B>>) -> MutexGuard<'_, Recording<B>> {
    recording.lock().unwrap_or_else(PoisonError::into_inner)
}

debug_fields!(ReplayBody<B: Body> |it| { attempt: it.recording.as_ref().map(|_| it.attempt) });

#[cfg(test)]
mod tests;
