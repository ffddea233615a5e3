//! Tests of a recorded body, from the view of the connection that sends it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Wake;

use http::HeaderMap;
use http_body::Frame;
use http_body_util::{BodyExt, Channel, Empty, Full, channel::Sender, combinators::UnsyncBoxBody};

use super::super::recording::{CHUNK, LEAST_SHARED};
use super::*;

const LIMIT: usize = 100;

type Source = Channel<Bytes, BoxError>;

fn recorded() -> (Sender<Bytes, BoxError>, ReplayBody<Source>, Rewind<Source>) {
    recorded_up_to(LIMIT)
}

fn recorded_up_to(limit: usize) -> (Sender<Bytes, BoxError>, ReplayBody<Source>, Rewind<Source>) {
    let (sender, source) = Channel::new(16);
    let (body, rewind) = ReplayBody::record(source, limit);
    (sender, body, rewind.unwrap())
}

/// A frame that is not copied.
fn shared() -> Bytes {
    Bytes::from(vec![b'x'; LEAST_SHARED])
}

async fn send(sender: &mut Sender<Bytes, BoxError>, data: &'static str) {
    sender.send_data(Bytes::from_static(data.as_bytes())).await.unwrap();
}

async fn data<B: Body>(body: &mut ReplayBody<B>) -> Bytes {
    body.frame().await.unwrap().unwrap().into_data().expect("no data")
}

async fn trailers<B: Body>(body: &mut ReplayBody<B>) -> HeaderMap {
    body.frame().await.unwrap().unwrap().into_trailers().expect("no trailers")
}

fn is_pending<B: Body>(body: &mut ReplayBody<B>) -> bool {
    poll_once(body, Waker::noop()).is_pending()
}

fn poll_once<B: Body>(body: &mut ReplayBody<B>, waker: &Waker) -> Polled {
    Pin::new(body).poll_frame(&mut Context::from_waker(waker))
}

#[derive(Default)]
struct Woken(AtomicUsize);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// A retry sends all frames and trailers of the body again.
#[tokio::test]
async fn replays_frames_and_trailers() {
    let (mut sender, mut body, rewind) = recorded();
    send(&mut sender, "one").await;
    send(&mut sender, "two").await;
    let mut sent = HeaderMap::new();
    sent.insert("x-checksum", "abc".parse().unwrap());
    sender.send_trailers(sent.clone()).await.unwrap();
    drop(sender);
    assert_eq!(data(&mut body).await, "one");
    assert_eq!(data(&mut body).await, "two");
    assert_eq!(trailers(&mut body).await, sent);
    assert!(body.frame().await.is_none());
    for _ in 0..2 {
        body = rewind.rewind().unwrap();
        assert_eq!(data(&mut body).await, "onetwo");
        assert_eq!(trailers(&mut body).await, sent);
        assert!(body.frame().await.is_none());
        assert!(body.frame().await.is_none());
    }
}

/// Small frames are copied and large ones are shared: a retry keeps their order.
#[tokio::test]
async fn copied_and_shared_frames_keep_order() {
    let (mut sender, mut body, rewind) = recorded_up_to(8 * LEAST_SHARED);
    let mut sent = Vec::new();
    for at in 0..40_u8 {
        let length = [1, 0, CHUNK + 1, 4096, LEAST_SHARED][usize::from(at % 5)] / (1 + usize::from(at / 5));
        let frame = Bytes::from(vec![at; length]);
        sent.extend_from_slice(&frame);
        sender.send_data(frame.clone()).await.unwrap();
        assert_eq!(data(&mut body).await, frame);
        // Every attempt but the first starts while the body is partly read.
        if at % 3 == 2 {
            body = rewind.rewind().unwrap();
            let mut got = Vec::new();
            while got.len() < sent.len() {
                assert_eq!(body.size_hint().lower(), (sent.len() - got.len()) as u64);
                got.extend_from_slice(&data(&mut body).await);
            }
            assert!(got == sent, "other bytes after frame {at}");
        }
    }
    drop(sender);
    let again = rewind.rewind().unwrap().collect().await.unwrap().to_bytes();
    assert!(again == sent);
}

/// A body is exactly as long as the limit.
#[tokio::test]
async fn replays_body_at_limit() {
    for (limit, frame) in [
        (LIMIT, 1),
        (3 * CHUNK, CHUNK - 1),
        (3 * CHUNK, 2 * CHUNK),
        (LEAST_SHARED, 100),
        (LEAST_SHARED, LEAST_SHARED),
        (3 * LEAST_SHARED, 1000),
    ] {
        let (mut sender, mut body, rewind) = recorded_up_to(limit);
        let whole = Bytes::from((0..limit).map(|at| at as u8).collect::<Vec<_>>());
        for frame in whole.chunks(frame) {
            sender.send_data(whole.slice_ref(frame)).await.unwrap();
            data(&mut body).await;
        }
        drop(sender);
        let again = rewind.rewind().unwrap().collect().await.unwrap().to_bytes();
        assert!(again == whole, "{limit} bytes in frames of {frame}");
    }
}

/// A retry changes the order of trailers, or loses their sensitive marks.
#[tokio::test]
async fn trailers_keep_order_and_sensitivity() {
    let (mut sender, mut body, rewind) = recorded_up_to(1000);
    let mut sent = HeaderMap::new();
    sent.append("x-repeated", "1".parse().unwrap());
    sent.insert("x-secret", "abc".parse().unwrap());
    sent.get_mut("x-secret").unwrap().set_sensitive(true);
    sent.append("x-repeated", "2".parse().unwrap());
    sender.send_trailers(sent.clone()).await.unwrap();
    trailers(&mut body).await;
    let again = trailers(&mut rewind.rewind().unwrap()).await;
    assert_eq!(again, sent);
    assert_eq!(again.get_all("x-repeated").iter().collect::<Vec<_>>(), ["1", "2"]);
    assert!(again["x-secret"].is_sensitive() && !again["x-repeated"].is_sensitive());
}

/// A body has a frame after its trailers.
#[tokio::test]
async fn frame_after_trailers_stops_replay() {
    for is_data in [true, false] {
        let (mut sender, mut body, rewind) = recorded();
        send(&mut sender, "one").await;
        sender.send_trailers(HeaderMap::new()).await.unwrap();
        assert_eq!(data(&mut body).await, "one");
        trailers(&mut body).await;
        assert!(rewind.hold());
        let mut body = rewind.rewind().unwrap();
        assert_eq!(data(&mut body).await, "one");
        trailers(&mut body).await;
        if is_data {
            sender.send_data(Bytes::new()).await.unwrap();
            assert_eq!(data(&mut body).await, "");
        } else {
            sender.send_trailers(HeaderMap::new()).await.unwrap();
            trailers(&mut body).await;
        }
        assert!(!rewind.hold());
        assert!(rewind.rewind().is_none());
    }
}

/// Large frames are recorded without a copy.
#[tokio::test]
async fn large_frames_are_shared() {
    let (mut sender, mut body, rewind) = recorded_up_to(LEAST_SHARED);
    sender.send_data(shared()).await.unwrap();
    let first = data(&mut body).await;
    let second = data(&mut rewind.rewind().unwrap()).await;
    assert_eq!(first.as_ptr(), second.as_ptr());
}

/// A 401 arrives while the body is being sent: the retry replays the recorded part, then continues the stream.
#[tokio::test]
async fn retry_replays_then_continues() {
    let (mut sender, mut old, rewind) = recorded();
    send(&mut sender, "one").await;
    assert_eq!(data(&mut old).await, "one");
    let woken = Arc::new(Woken::default());
    assert!(poll_once(&mut old, &Arc::clone(&woken).into()).is_pending());

    let mut new = rewind.rewind().unwrap();
    assert_eq!(woken.0.load(Ordering::Relaxed), 1, "the old attempt is not told of its end");
    let error = old.frame().await.unwrap().err().unwrap();
    assert!(error.is::<Superseded>());
    assert!(!old.is_end_stream());

    send(&mut sender, "two").await;
    assert_eq!(data(&mut new).await, "one");
    assert_eq!(data(&mut new).await, "two");
    assert!(old.frame().await.unwrap().err().unwrap().is::<Superseded>());
}

/// The inner service keeps reading the body of a challenged attempt.
#[tokio::test]
async fn held_attempt_waits_for_release() {
    let (mut sender, mut body, rewind) = recorded();
    send(&mut sender, "one").await;
    assert!(rewind.hold());
    let woken = Arc::new(Woken::default());
    assert!(poll_once(&mut body, &Arc::clone(&woken).into()).is_pending());
    drop(rewind);
    assert_eq!(woken.0.load(Ordering::Relaxed), 1, "the attempt is not told to go on");
    assert_eq!(data(&mut body).await, "one");
}

/// The inner service keeps the body of a challenged attempt after the retry has begun.
#[tokio::test]
async fn held_attempt_is_superseded() {
    let (mut sender, mut old, rewind) = recorded();
    assert!(rewind.hold());
    assert!(is_pending(&mut old));
    let mut new = rewind.rewind().unwrap();
    assert!(old.frame().await.unwrap().is_err());
    send(&mut sender, "one").await;
    assert_eq!(data(&mut new).await, "one");
}

/// A body exceeds the limit: what was recorded is freed.
#[tokio::test]
async fn exceeding_limit_frees_record() {
    let (mut sender, mut body, rewind) = recorded_up_to(LEAST_SHARED);
    let full = shared();
    sender.send_data(full.clone()).await.unwrap();
    assert_eq!(data(&mut body).await, full);
    assert!(rewind.hold());
    body = rewind.rewind().unwrap();
    assert_eq!(data(&mut body).await, full);

    send(&mut sender, "y").await;
    assert_eq!(data(&mut body).await, "y");
    assert!(full.is_unique(), "the record is still held");
    assert!(!rewind.hold());
    assert!(rewind.rewind().is_none());
    send(&mut sender, "z").await;
    assert_eq!(data(&mut body).await, "z");
    drop(sender);
    assert!(body.frame().await.is_none());
}

/// The trailers of a body exceed the limit.
#[tokio::test]
async fn trailers_count_against_limit() {
    let (mut sender, mut body, rewind) = recorded();
    let mut sent = HeaderMap::new();
    sent.insert("x-long", "x".repeat(LIMIT).parse().unwrap());
    sender.send_trailers(sent.clone()).await.unwrap();
    assert_eq!(trailers(&mut body).await, sent);
    assert!(rewind.rewind().is_none());
}

/// A body declares a length above the limit: nothing is recorded, and nothing kept for a retry.
#[tokio::test]
async fn declared_oversize_is_not_kept() {
    let frame = Bytes::from(vec![0; LIMIT + 1]);
    let (mut body, rewind) = ReplayBody::record(Full::new(frame.clone()), LIMIT);
    assert!(rewind.is_none());
    assert_eq!(body.size_hint().exact(), Some(LIMIT as u64 + 1));
    let sent = data(&mut body).await;
    assert_eq!((sent.as_ptr(), sent.len()), (frame.as_ptr(), LIMIT + 1), "a copy");
    drop(sent);
    assert!(frame.is_unique(), "the frame is still held");
    assert!(body.frame().await.is_none());
}

/// The inner service's own body type, such as reqwest's, requires a body that is `Sync`.
#[test]
fn body_is_sync_if_original_is_send() {
    fn is_send_and_sync<T: Send + Sync>() {}

    is_send_and_sync::<ReplayBody<UnsyncBoxBody<Bytes, BoxError>>>();
}

/// A challenged request has an empty body.
#[tokio::test]
async fn empty_body_is_replayed() {
    let (body, rewind) = ReplayBody::record(Empty::<Bytes>::new(), 1);
    let rewind = rewind.unwrap();
    assert!(rewind.hold());
    for body in [body, rewind.rewind().unwrap(), rewind.rewind().unwrap()] {
        assert!(body.is_end_stream());
        assert_eq!(body.size_hint().exact(), Some(0));
        assert!(body.collect().await.unwrap().to_bytes().is_empty());
    }
}

/// The end of the stream and an exact length get lost, so that the client sends chunks.
#[tokio::test]
async fn keeps_end_of_stream_and_exact_length() {
    let (mut body, rewind) = ReplayBody::record(Full::new(Bytes::from_static(b"hello")), LIMIT);
    let rewind = rewind.unwrap();
    for _ in 0..2 {
        assert!(!body.is_end_stream());
        assert_eq!(body.size_hint().exact(), Some(5));
        assert_eq!(data(&mut body).await, "hello");
        // Directly after the last frame, otherwise HTTP/2 would send an empty one.
        assert!(body.is_end_stream());
        assert_eq!(body.size_hint().exact(), Some(0));
        body = rewind.rewind().unwrap();
    }
}

/// The length of a retry's body counts the recorded and the unread bytes.
#[tokio::test]
async fn length_counts_recorded_and_unread() {
    /// Two frames with an exact length.
    struct Two(Vec<&'static str>);

    impl Body for Two {
        type Data = Bytes;
        type Error = BoxError;

        fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Polled {
            Poll::Ready(self.0.pop().map(|data| Ok(Frame::data(data.into()))))
        }

        fn size_hint(&self) -> SizeHint {
            SizeHint::with_exact(self.0.iter().map(|data| data.len() as u64).sum())
        }
    }

    let (mut body, rewind) = ReplayBody::record(Two(vec!["world", "hi"]), LIMIT);
    let rewind = rewind.unwrap();
    let mut lengths = vec![body.size_hint().exact()];
    data(&mut body).await;
    lengths.push(body.size_hint().exact());
    body = rewind.rewind().unwrap();
    lengths.push(body.size_hint().exact());
    data(&mut body).await;
    lengths.push(body.size_hint().exact());
    drop(rewind);
    data(&mut body).await;
    lengths.push(body.size_hint().exact());
    assert_eq!(lengths, [Some(7), Some(5), Some(7), Some(5), Some(0)]);
}

/// A body fails midway: it is not sent again.
#[tokio::test]
async fn failed_body_is_not_replayed() {
    let (mut sender, mut body, rewind) = recorded();
    send(&mut sender, "half").await;
    assert_eq!(data(&mut body).await, "half");
    sender.abort(std::io::Error::other("the disk is gone").into());
    let error = body.frame().await.unwrap().err().unwrap();
    assert_eq!(error.downcast_ref::<std::io::Error>().unwrap().to_string(), "the disk is gone");
    assert!(!rewind.hold());
    assert!(rewind.rewind().is_none());
}

/// No retry is possible any more: recording stops.
#[tokio::test]
async fn dropped_handle_stops_recording() {
    let (mut sender, mut body, rewind) = recorded_up_to(2 * LEAST_SHARED);
    let kept = shared();
    sender.send_data(kept.clone()).await.unwrap();
    drop(data(&mut body).await);
    assert!(!kept.is_unique());
    let mut body = rewind.rewind().unwrap();
    drop(rewind);
    assert_eq!(data(&mut body).await, kept);
    assert!(kept.is_unique(), "a frame that was given for the last time is still held");
    send(&mut sender, "more").await;
    assert_eq!(data(&mut body).await, "more");
}

/// The body of the caller panics while it is read.
#[tokio::test]
async fn source_panic_poisons_nothing() {
    struct Panics;

    impl Body for Panics {
        type Data = Bytes;
        type Error = BoxError;

        fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Polled {
            panic!("panic in the source")
        }
    }

    let (mut body, rewind) = ReplayBody::record(Panics, LIMIT);
    let polled = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| is_pending(&mut body)));
    assert!(polled.is_err());
    assert!(!body.is_end_stream());
    drop(rewind);
}
