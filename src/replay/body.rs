//! [`ReplayBody`]: a body that records what is read from it, so that it can be sent again from the start.
//!
//! An attempt is one transmission of the body. All attempts share one [`Recording`], which holds the original body:
//! the source. Each attempt has a number, and only the newest attempt reads on. When a new attempt starts, the next
//! poll of the previous one returns an error, so its connection stops sending (over HTTP/1 the connection closes,
//! over HTTP/2 the stream is reset). The new attempt replays the recorded frames, then continues to read the source.

use std::{
    collections::VecDeque,
    fmt,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker, ready},
};

use bytes::{Buf, Bytes};
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};

use super::request_head::FlatHeaders;
use crate::error::BoxError;

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

/// What all attempts to send one body share. Each attempt locks it once per frame.
struct Recording<B: Body> {
    /// The original body; `None` after it has ended or failed.
    source: Option<Pin<Box<B>>>,
    /// Boxes its error. Not a bound of [`ReplayBody`]'s `Body`: the compiler could not prove that a task with it is `Send`
    /// for any lifetime that an error may have.
    into_error: fn(B::Error) -> BoxError,
    /// The size hint of the original body at its start.
    hint: SizeHint,
    /// The frames that were read from the source. While the body can be rewound, they begin at its start; afterwards,
    /// they are those that the newest attempt has not been given yet.
    frames: VecDeque<Recorded>,
    /// The bytes of the small data frames that follow `frames`.
    ///
    /// Invariant: while it is not empty, the newest attempt has been given all of `frames` and all of these bytes,
    /// because a frame is recorded when it is given and a rewind moves these bytes to `frames`. `push`, `stop` and
    /// `is_at_end` rely on it.
    tail: Vec<u8>,
    /// How many of `frames` the newest attempt has been given.
    given: usize,
    /// The bytes of data that the newest attempt has been given.
    sent: u64,
    /// How many bytes of the limit are used.
    size: usize,
    limit: usize,
    /// Whether the body can still be rewound: the [`Rewind`] exists, everything fitted, and the source has not failed.
    /// While it is false, nothing is recorded.
    can_rewind: bool,
    /// Whether the newest attempt is paused.
    held: bool,
    /// The number of the newest attempt. An attempt with a smaller number must not read the source: frames that it
    /// takes would be missing from the newest attempt.
    attempt: u64,
    /// The waker of the newest attempt, if it is pending.
    waker: Option<Waker>,
}

enum Recorded {
    Data(Bytes),
    Trailers(FlatHeaders),
}

/// The length from which a data frame is kept by reference count. A shorter one is copied, because it may be a slice
/// of a much larger buffer. For a gateway, the client decides how much of hyper's HTTP/1 read buffer (at most 408 KiB
/// by default) is data and how much is framing. No frame from such a buffer reaches this length.
const LEAST_SHARED: usize = 512 * 1024;

/// The maximum length of one buffer of copied frames.
const CHUNK: usize = 64 * 1024;

/// A handle that sends a [`ReplayBody`] again. Dropping it stops the recording.
pub struct Rewind<B: Body> {
    /// `None` for an empty body.
    recording: Option<Arc<Mutex<Recording<B>>>>,
}

impl<B> ReplayBody<B>
where
    B: Body,
    B::Error: Into<BoxError>,
{
    /// Starts the first attempt. Without a [`Rewind`] if the body's size hint exceeds the limit: nothing is recorded
    /// then.
    pub(super) fn record(body: B, limit: usize) -> (Self, Option<Rewind<B>>) {
        if body.is_end_stream() {
            return (Self { attempt: 0, recording: None }, Some(Rewind { recording: None }));
        }
        let hint = body.size_hint();
        let can_rewind = hint.lower() <= limit as u64;
        let recording = Arc::new(Mutex::new(Recording {
            source: Some(Box::pin(body)),
            into_error: Into::into,
            hint,
            frames: VecDeque::new(),
            tail: Vec::new(),
            given: 0,
            sent: 0,
            size: 0,
            limit,
            can_rewind,
            held: false,
            attempt: 0,
            waker: None,
        }));
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
        wake(waker);
    }

    /// Starts another attempt, and ends the previous one; `None` if the body cannot be sent again.
    pub(super) fn rewind(&self) -> Option<ReplayBody<B>> {
        let Some(recording) = &self.recording else {
            return Some(ReplayBody { attempt: 0, recording: None });
        };
        let (attempt, waker) = {
            let mut recording = lock(recording);
            if !recording.can_rewind {
                return None;
            }
            recording.attempt += 1;
            recording.freeze_tail();
            recording.given = 0;
            recording.sent = 0;
            recording.held = false;
            (recording.attempt, recording.waker.take())
        };
        // Wakes the previous attempt, whose poll then returns an error. Outside the lock: the waker may poll the
        // attempt at once, which takes the lock.
        wake(waker);
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
        wake(waker);
    }
}

impl<B: Body> Recording<B> {
    /// Stops recording, and frees all frames but those that the newest attempt has not been given yet.
    fn stop(&mut self) {
        self.can_rewind = false;
        let given = std::mem::take(&mut self.given);
        self.frames.drain(..given);
        // By the invariant of `tail`, the newest attempt has been given its bytes.
        self.tail = Vec::new();
    }

    fn next_recorded(&mut self) -> Option<Frame<Bytes>> {
        let frame = if self.can_rewind {
            let frame = self.frames.get(self.given)?.frame();
            self.given += 1;
            frame
        } else {
            self.frames.pop_front()?.frame()
        };
        Some(frame)
    }

    /// Records a frame that was just read, or stops recording. The newest attempt has been given all earlier frames.
    fn record(&mut self, frame: &Frame<Bytes>) {
        if !self.can_rewind {
            return;
        }
        let has_ended = matches!(self.frames.back(), Some(Recorded::Trailers(_)));
        let recorded = match (frame.data_ref(), frame.trailers_ref()) {
            _ if has_ended => false,
            (Some(data), _) => self.record_data(data),
            (_, Some(trailers)) => self.record_trailers(trailers),
            // A kind of frame that `http-body` may add.
            _ => false,
        };
        if !recorded {
            self.stop();
            self.frames = VecDeque::new();
        }
    }

    /// Records `data`; `false` if it exceeds the limit.
    fn record_data(&mut self, data: &Bytes) -> bool {
        if data.is_empty() {
            return true;
        }
        if !self.count(data.len()) {
            return false;
        }
        if data.len() >= LEAST_SHARED {
            self.freeze_tail();
            self.push(Recorded::Data(data.clone()));
            return true;
        }
        if self.tail.len() + data.len() > CHUNK {
            self.freeze_tail();
        }
        let needed = self.tail.len() + data.len();
        if needed > self.tail.capacity() {
            // At most the limit: `count` has checked that the needed bytes fit.
            let capacity = needed.max((2 * self.tail.capacity()).min(CHUNK).min(self.limit));
            self.tail.reserve_exact(capacity - self.tail.len());
        }
        self.tail.extend_from_slice(data);
        true
    }

    /// Records `trailers`; `false` if they exceed the limit.
    fn record_trailers(&mut self, trailers: &HeaderMap) -> bool {
        let trailers = FlatHeaders::of(trailers).shrunk();
        if !self.count(size_of::<Recorded>() + trailers.len()) {
            return false;
        }
        self.freeze_tail();
        self.push(Recorded::Trailers(trailers));
        true
    }

    /// Adds to the used bytes; `false` if they exceed the limit.
    fn count(&mut self, size: usize) -> bool {
        self.size = self.size.saturating_add(size);
        self.size <= self.limit
    }

    /// Moves the copied bytes to `frames`, from where they can be replayed.
    fn freeze_tail(&mut self) {
        if !self.tail.is_empty() {
            let mut tail = std::mem::take(&mut self.tail);
            tail.shrink_to_fit();
            self.push(Recorded::Data(tail.into()));
        }
    }

    /// Appends a frame that the newest attempt is given now, or has been given.
    fn push(&mut self, frame: Recorded) {
        self.frames.push_back(frame);
        self.given += 1;
    }

    fn is_at_end(&self) -> bool {
        self.given == self.frames.len() && self.source.as_ref().is_none_or(|source| source.is_end_stream())
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if self.held {
            self.wait(cx);
            return Poll::Pending;
        }
        let frame = ready!(self.poll_next(cx));
        if let Some(Ok(frame)) = &frame {
            self.sent += frame.data_ref().map_or(0, |data| data.len() as u64);
        }
        Poll::Ready(frame)
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if let Some(frame) = self.next_recorded() {
            return Poll::Ready(Some(Ok(frame)));
        }
        let Some(source) = &mut self.source else { return Poll::Ready(None) };
        let Poll::Ready(next) = source.as_mut().poll_frame(cx) else {
            // Woken by the source when it has more, or by a rewind when this attempt is superseded.
            self.wait(cx);
            return Poll::Pending;
        };
        match next {
            Some(Ok(frame)) => {
                let frame = frame.map_data(to_bytes);
                // Recorded before it is returned: the attempt may end directly afterwards, and the frame would be lost.
                self.record(&frame);
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(error)) => {
                // Never replayed: the part before the error could look like a complete body to the server.
                self.stop();
                self.source = None;
                Poll::Ready(Some(Err((self.into_error)(error))))
            }
            None => {
                self.source = None;
                Poll::Ready(None)
            }
        }
    }

    fn wait(&mut self, cx: &Context<'_>) {
        match &mut self.waker {
            Some(waker) => waker.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
    }
}

impl<B: Body> Body for ReplayBody<B> {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
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
        if recording.attempt != self.attempt {
            return SizeHint::default();
        }
        // Less what was sent, also if the source's own hint stays as it is while it is read. What is recorded is sure to come.
        let recorded: u64 = recording.frames.range(recording.given..).map(Recorded::data_len).sum();
        let mut hint = SizeHint::new();
        hint.set_lower(recording.hint.lower().saturating_sub(recording.sent).max(recorded));
        if let Some(upper) = recording.hint.upper() {
            hint.set_upper(upper.saturating_sub(recording.sent).max(hint.lower()));
        }
        hint
    }
}

impl Recorded {
    fn data_len(&self) -> u64 {
        match self {
            Self::Data(data) => data.len() as u64,
            Self::Trailers(_) => 0,
        }
    }

    fn frame(&self) -> Frame<Bytes> {
        match self {
            Self::Data(data) => Frame::data(data.clone()),
            Self::Trailers(trailers) => Frame::trailers(trailers.headers(0)),
        }
    }
}

/// Converts `data` to [`Bytes`], without a copy if it is `Bytes` already.
fn to_bytes<D: Buf>(mut data: D) -> Bytes {
    data.copy_to_bytes(data.remaining())
}

/// Ignores poisoning: a source that panics in its poll leaves the recording unchanged.
fn lock<B: Body>(recording: &Mutex<Recording<B>>) -> MutexGuard<'_, Recording<B>> {
    recording.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wake(waker: Option<Waker>) {
    if let Some(waker) = waker {
        waker.wake();
    }
}

impl<B: Body> fmt::Debug for ReplayBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let attempt = self.recording.as_ref().map(|_| self.attempt);
        f.debug_struct("ReplayBody").field("attempt", &attempt).finish_non_exhaustive()
    }
}

impl<B: Body> fmt::Debug for Rewind<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rewind").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
