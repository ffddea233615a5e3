//! [`ReplayBody`]: a body that records what is read of it, so that it can be sent again from the start.
//!
//! An attempt is one time that the body is sent. All attempts share one [`Recording`]; only the newest may read on. When
//! a new one begins, the one before it gets an error at its next poll, which makes its connection stop sending (over
//! HTTP/1 the connection closes, over HTTP/2 the stream is reset). The new attempt first gets what was recorded, then
//! reads on where the old one was: the upload goes on, it does not begin anew at its source.

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
use pin_project_lite::pin_project;

use super::request_head::FlatHeaders;
use crate::error::BoxError;

pin_project! {
    /// A request body that can be sent again: what the inner service gets under
    /// [`.buffered(limit)`](crate::BearerAuthLayer::buffered) and
    /// [`.replay_with(limit, wrap)`](crate::BearerAuthLayer::replay_with).
    ///
    /// Frames stream through as they come, trailers included; size hint and end of stream are the original's. What was
    /// read is kept only until it is known that the body is not sent again.
    ///
    /// # Memory
    ///
    /// The bytes of the data and the trailers count against the limit. Bookkeeping adds at most 1 % of the limit and 1 KiB:
    ///
    /// * A data frame of less than 512 KiB is copied, small ones into one buffer with their neighbours. A slice of a
    ///   large buffer does not keep that buffer alive. A retry gets the same bytes, but not the same frames.
    /// * A larger frame is kept by reference count where the original's data is [`Bytes`]. If it is a slice, the whole
    ///   buffer stays alive.
    /// * An empty frame is not kept.
    /// * Trailers count with their names, their values, 6 bytes for each and some bytes for all. A frame after the
    ///   trailers is handed on, and the body cannot be sent again: a body ends with its trailers (RFC 9110 §6.5).
    ///
    /// # Errors
    ///
    /// The original's error, boxed as it is; [`Superseded`] when another attempt has begun.
    pub struct ReplayBody<B> {
        #[pin]
        inner: Inner<B>,
    }
}

pin_project! {
    #[project = InnerProj]
    enum Inner<B> {
        /// Nothing to send, and so nothing to record.
        Empty,
        /// Not recorded: its size hint says that it would not fit.
        Plain {
            #[pin]
            body: B,
        },
        Recorded {
            attempt: u64,
            recording: Arc<Mutex<Recording<B>>>,
        },
    }
}

/// This attempt to send a body has been given up for another, after a 401.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the request is being sent again with a new token, so that this attempt to send its body has ended")]
#[non_exhaustive]
pub struct Superseded;

/// What all attempts to send one body share.
struct Recording<B> {
    /// The original; `None` once it has ended or failed.
    source: Option<Pin<Box<B>>>,
    /// What was read of the source, from the start of the body while it can be rewound.
    frames: VecDeque<Recorded>,
    /// The small data frames that follow `frames`, one after the other. While there are any, the newest attempt has been
    /// given all of `frames` and all of these: a frame is recorded as it is given, and a rewind moves them to `frames`.
    tail: Vec<u8>,
    /// How many of the frames the newest attempt has been given.
    given: usize,
    /// How many bytes of data are in the frames that it has not been given.
    ahead: u64,
    /// How much of the limit is used.
    size: usize,
    limit: usize,
    /// Whether the body can still be rewound: the rewind is alive, everything fitted, and the source has not failed.
    can_rewind: bool,
    /// Whether the newest attempt is held where it is.
    held: bool,
    /// The newest attempt.
    attempt: u64,
    /// Of the newest attempt, if it waits.
    waker: Option<Waker>,
}

enum Recorded {
    Data(Bytes),
    Trailers(FlatHeaders),
}

/// A data frame of at least this length is kept by reference count. A shorter one is copied, because it may be a slice of
/// a buffer that is many times its length: a client of a gateway decides how much of hyper's HTTP/1 read buffer (408 KiB
/// at most, unless configured otherwise) is data, and how much is framing. No frame out of such a buffer is as long.
const LEAST_SHARED: usize = 512 * 1024;

/// Copied frames are collected up to this length.
const CHUNK: usize = 64 * 1024;

/// The handle by which a [`ReplayBody`] is sent again; recording stops when it is dropped.
pub struct Rewind<B> {
    /// `None` for a body with nothing in it.
    recording: Option<Arc<Mutex<Recording<B>>>>,
}

impl<B> ReplayBody<B>
where
    B: Body,
{
    /// Starts the first attempt; without a rewind when the body says beforehand that it is over the limit.
    pub(super) fn record(body: B, limit: usize) -> (Self, Option<Rewind<B>>) {
        if body.is_end_stream() {
            return (Self { inner: Inner::Empty }, Some(Rewind { recording: None }));
        }
        if body.size_hint().lower() > limit as u64 {
            return (Self { inner: Inner::Plain { body } }, None);
        }
        let recording = Arc::new(Mutex::new(Recording {
            source: Some(Box::pin(body)),
            frames: VecDeque::new(),
            tail: Vec::new(),
            given: 0,
            ahead: 0,
            size: 0,
            limit,
            can_rewind: true,
            held: false,
            attempt: 0,
            waker: None,
        }));
        let rewind = Rewind { recording: Some(Arc::clone(&recording)) };
        (Self { inner: Inner::Recorded { attempt: 0, recording } }, Some(rewind))
    }
}

impl<B> Rewind<B> {
    /// Holds the newest attempt where it is, and says whether the body can be sent again.
    ///
    /// Nothing more is read of the source meanwhile, so that a server's early answer does not find the limit passed.
    pub(super) fn hold(&self) -> bool {
        let Some(recording) = &self.recording else { return true };
        let mut recording = lock(recording);
        recording.held = recording.can_rewind;
        recording.can_rewind
    }

    /// Starts another attempt, and ends the one before; `None` if the body cannot be sent again.
    pub(super) fn rewind(&self) -> Option<ReplayBody<B>> {
        let Some(recording) = &self.recording else { return Some(ReplayBody { inner: Inner::Empty }) };
        let (attempt, waker) = {
            let mut recording = lock(recording);
            if !recording.can_rewind {
                return None;
            }
            recording.attempt += 1;
            recording.freeze_tail();
            recording.given = 0;
            recording.ahead = recording.frames.iter().map(Recorded::data_len).sum();
            recording.held = false;
            (recording.attempt, recording.waker.take())
        };
        // The attempt before learns of its end; not under the lock, which its poll would take.
        wake(waker);
        Some(ReplayBody { inner: Inner::Recorded { attempt, recording: Arc::clone(recording) } })
    }
}

impl<B> Drop for Rewind<B> {
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

impl<B> Recording<B> {
    /// Keeps nothing from now on but what the newest attempt has still to be given.
    fn stop(&mut self) {
        self.can_rewind = false;
        let given = std::mem::take(&mut self.given);
        self.frames.drain(..given);
        // It has been given.
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
        self.ahead -= frame.data_ref().map_or(0, |data| data.len() as u64);
        Some(frame)
    }

    /// Keeps a frame that was just read, or stops recording. All before it have been given.
    fn record(&mut self, frame: &Frame<Bytes>) {
        if !self.can_rewind {
            return;
        }
        let has_ended = matches!(self.frames.back(), Some(Recorded::Trailers(_)));
        let recorded = match (frame.data_ref(), frame.trailers_ref()) {
            _ if has_ended => false,
            (Some(data), _) => self.record_data(data),
            (_, Some(trailers)) => self.record_trailers(trailers),
            // A kind of frame that is not known today.
            _ => false,
        };
        if !recorded {
            self.stop();
            self.frames = VecDeque::new();
        }
    }

    /// `false` if `data` does not fit.
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
            // No more than the limit: `count` has compared it with what is needed.
            let capacity = needed.max((2 * self.tail.capacity()).min(CHUNK).min(self.limit));
            self.tail.reserve_exact(capacity - self.tail.len());
        }
        self.tail.extend_from_slice(data);
        true
    }

    /// `false` if they do not fit.
    fn record_trailers(&mut self, trailers: &HeaderMap) -> bool {
        let trailers = FlatHeaders::of(trailers).shrunk();
        if !self.count(size_of::<Recorded>() + trailers.len()) {
            return false;
        }
        self.freeze_tail();
        self.push(Recorded::Trailers(trailers));
        true
    }

    /// Adds to what is used of the limit; `false` if that is too much.
    fn count(&mut self, size: usize) -> bool {
        self.size = self.size.saturating_add(size);
        self.size <= self.limit
    }

    /// Moves the copied frames to where they can be given again.
    fn freeze_tail(&mut self) {
        if !self.tail.is_empty() {
            let mut tail = std::mem::take(&mut self.tail);
            tail.shrink_to_fit();
            self.push(Recorded::Data(tail.into()));
        }
    }

    /// Adds what the newest attempt is being given, or has been given.
    fn push(&mut self, frame: Recorded) {
        self.frames.push_back(frame);
        self.given += 1;
    }

    fn is_at_end(&self) -> bool
    where
        B: Body,
    {
        self.given == self.frames.len() && self.source.as_ref().is_none_or(|source| source.is_end_stream())
    }
}

impl<B> Recording<B>
where
    B: Body,
    B::Error: Into<BoxError>,
{
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if self.held {
            self.wait(cx);
            return Poll::Pending;
        }
        if let Some(frame) = self.next_recorded() {
            return Poll::Ready(Some(Ok(frame)));
        }
        let Some(source) = &mut self.source else { return Poll::Ready(None) };
        let Poll::Ready(next) = source.as_mut().poll_frame(cx) else {
            // The source wakes us when it has more, and a rewind when this attempt is over.
            self.wait(cx);
            return Poll::Pending;
        };
        match next {
            Some(Ok(frame)) => {
                let frame = frame.map_data(to_bytes);
                // Before it is handed on: the attempt may end the moment it is.
                self.record(&frame);
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(error)) => {
                // Sent again, what came before the error could look like a whole body.
                self.stop();
                self.source = None;
                Poll::Ready(Some(Err(error.into())))
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

impl<B> Body for ReplayBody<B>
where
    B: Body,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match self.project().inner.project() {
            InnerProj::Empty => Poll::Ready(None),
            InnerProj::Plain { body } => {
                let frame = ready!(body.poll_frame(cx));
                Poll::Ready(
                    frame.map(|frame| frame.map(|frame| frame.map_data(to_bytes)).map_err(Into::into)),
                )
            }
            InnerProj::Recorded { attempt, recording } => {
                let mut recording = lock(recording);
                if recording.attempt != *attempt {
                    return Poll::Ready(Some(Err(Superseded.into())));
                }
                recording.poll_frame(cx)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.inner {
            Inner::Empty => true,
            Inner::Plain { body } => body.is_end_stream(),
            Inner::Recorded { attempt, recording } => {
                let recording = lock(recording);
                recording.attempt == *attempt && recording.is_at_end()
            }
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.inner {
            Inner::Empty => SizeHint::with_exact(0),
            Inner::Plain { body } => body.size_hint(),
            Inner::Recorded { attempt, recording } => {
                let recording = lock(recording);
                if recording.attempt != *attempt {
                    return SizeHint::default();
                }
                let rest =
                    recording.source.as_ref().map_or(SizeHint::with_exact(0), |source| source.size_hint());
                let mut hint = SizeHint::new();
                hint.set_lower(recording.ahead.saturating_add(rest.lower()));
                if let Some(upper) = rest.upper() {
                    hint.set_upper(recording.ahead.saturating_add(upper));
                }
                hint
            }
        }
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

/// Without a copy where `data` is [`Bytes`].
fn to_bytes<D: Buf>(mut data: D) -> Bytes {
    data.copy_to_bytes(data.remaining())
}

/// A source that panicked while it was polled has left the recording as it was.
fn lock<B>(recording: &Mutex<Recording<B>>) -> MutexGuard<'_, Recording<B>> {
    recording.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wake(waker: Option<Waker>) {
    if let Some(waker) = waker {
        waker.wake();
    }
}

impl<B> fmt::Debug for ReplayBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let attempt = match &self.inner {
            Inner::Empty | Inner::Plain { .. } => None,
            Inner::Recorded { attempt, .. } => Some(attempt),
        };
        f.debug_struct("ReplayBody").field("attempt", &attempt).finish_non_exhaustive()
    }
}

impl<B> fmt::Debug for Rewind<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rewind").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
