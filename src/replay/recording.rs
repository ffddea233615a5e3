//! [`Recording`]: a body, what was read from it, and which attempt reads on.

use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};

use bytes::{Buf, Bytes};
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};

use super::kept_head::FlatHeaders;
use crate::error::BoxError;

/// What a poll of a recorded body returns.
pub(super) type Polled = Poll<Option<Result<Frame<Bytes>, BoxError>>>;

/// What all attempts to send one body share. Each attempt locks it once per frame.
pub(super) struct Recording<B: Body> {
    /// The original body; `None` after it has ended or failed.
    source: Option<Pin<Box<B>>>,
    /// Boxes its error. Not a bound of [`ReplayBody`](super::ReplayBody)'s `Body`: the compiler could not prove that a task with it is `Send`
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
    /// Whether the body can still be rewound: the [`Rewind`](super::body::Rewind) exists, everything fitted, and the source has not failed.
    /// While it is false, nothing is recorded.
    pub(super) can_rewind: bool,
    /// Whether the newest attempt is paused.
    pub(super) held: bool,
    /// The number of the newest attempt. An attempt with a smaller number must not read the source: frames that it
    /// takes would be missing from the newest attempt.
    pub(super) attempt: u64,
    /// The waker of the newest attempt, if it is pending.
    pub(super) waker: Option<Waker>,
}

pub(super) enum Recorded {
    Data(Bytes),
    Trailers(FlatHeaders),
}

/// The length from which a data frame is kept by reference count. A shorter one is copied, because it may be a slice
/// of a much larger buffer. For a gateway, the client decides how much of hyper's HTTP/1 read buffer (at most 408 KiB
/// by default) is data and how much is framing. No frame from such a buffer reaches this length.
pub(super) const LEAST_SHARED: usize = 512 * 1024;

/// The maximum length of one buffer of copied frames.
pub(super) const CHUNK: usize = 64 * 1024;

impl<B: Body> Recording<B> {
    pub(super) fn new(body: B, limit: usize) -> Self
    where
        B::Error: Into<BoxError>,
    {
        let hint = body.size_hint();
        Self {
            can_rewind: hint.lower() <= limit as u64,
            source: Some(Box::pin(body)),
            into_error: Into::into,
            hint,
            frames: VecDeque::new(),
            tail: Vec::new(),
            given: 0,
            sent: 0,
            size: 0,
            limit,
            held: false,
            attempt: 0,
            waker: None,
        }
    }

    /// Starts another attempt, and returns its number. `None` if the body cannot be sent again.
    pub(super) fn rewind(&mut self) -> Option<u64> {
        if !self.can_rewind {
            return None;
        }
        self.attempt += 1;
        self.freeze_tail();
        (self.given, self.sent, self.held) = (0, 0, false);
        Some(self.attempt)
    }

    /// Stops recording, and frees all frames but those that the newest attempt has not been given yet.
    pub(super) fn stop(&mut self) {
        self.can_rewind = false;
        let given = std::mem::take(&mut self.given);
        self.frames.drain(..given);
        // By the invariant of `tail`, the newest attempt has been given its bytes.
        self.tail = Vec::new();
    }

    fn next_recorded(&mut self) -> Option<Frame<Bytes>> {
        if !self.can_rewind {
            return self.frames.pop_front().map(|recorded| recorded.frame());
        }
        let frame = self.frames.get(self.given)?.frame();
        self.given += 1;
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

    pub(super) fn is_at_end(&self) -> bool {
        self.given == self.frames.len() && self.source.as_ref().is_none_or(|source| source.is_end_stream())
    }

    /// The size hint of the newest attempt: less what was sent, also if the source's own hint stays as it is while it is
    /// read. What is recorded is sure to come.
    pub(super) fn size_hint(&self) -> SizeHint {
        let recorded: u64 = self.frames.range(self.given..).map(Recorded::data_len).sum();
        let mut hint = SizeHint::new();
        hint.set_lower(self.hint.lower().saturating_sub(self.sent).max(recorded));
        if let Some(upper) = self.hint.upper() {
            hint.set_upper(upper.saturating_sub(self.sent).max(hint.lower()));
        }
        hint
    }

    pub(super) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Polled {
        let next = if self.held { Poll::Pending } else { self.poll_next(cx) };
        match &next {
            Poll::Ready(Some(Ok(frame))) => self.sent += frame.data_ref().map_or(0, |data| data.len() as u64),
            Poll::Ready(_) => {}
            // Woken by the source when it has more, by a rewind when this attempt is superseded, or when it is released.
            Poll::Pending => self.waker.get_or_insert_with(|| cx.waker().clone()).clone_from(cx.waker()),
        }
        next
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Polled {
        if let Some(frame) = self.next_recorded() {
            return Poll::Ready(Some(Ok(frame)));
        }
        let Some(source) = &mut self.source else { return Poll::Ready(None) };
        Poll::Ready(match ready!(source.as_mut().poll_frame(cx)) {
            Some(Ok(frame)) => {
                let frame = frame.map_data(|mut data| data.copy_to_bytes(data.remaining()));
                // Recorded before it is returned: the attempt may end directly afterwards, and the frame would be lost.
                self.record(&frame);
                Some(Ok(frame))
            }
            Some(Err(error)) => {
                // Never replayed: the part before the error could look like a complete body to the server.
                self.stop();
                self.source = None;
                Some(Err((self.into_error)(error)))
            }
            None => {
                self.source = None;
                None
            }
        })
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
