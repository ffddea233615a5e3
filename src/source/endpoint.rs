//! One bounded exchange with an auth endpoint: one deadline for all of it, and no more of the answer than fits.

use std::{
    convert::Infallible,
    error::Error as StdError,
    future::{Future, poll_fn},
    io,
    pin::{Pin, pin},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Buf, Bytes};
use http::{HeaderMap, Request, Response, StatusCode, header::CONTENT_ENCODING};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt, Full};
use secrecy::zeroize::Zeroizing;
use tower_service::Service;

use crate::error::BoxError;

/// The most that is read of an answer. A token response has two tokens of at most 16 KiB, and little else.
const MAX_ANSWER: usize = 64 * 1024;

/// An answer: whole if it is a success, else its head alone. Its body may hold a token, so it is overwritten when dropped.
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Zeroizing<Vec<u8>>,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum ExchangeError {
    /// The request was never sent: whatever it would have spent is not spent.
    #[error("the request was not sent")]
    NotSent(#[source] BoxError),
    /// The request may have been acted upon.
    #[error("the connection was lost before the answer was complete")]
    Lost(#[source] BoxError),
    #[error("no answer arrived within {0:?}")]
    TooSlow(Duration),
    #[error("the answer is longer than {MAX_ANSWER} bytes")]
    TooLong,
    #[error("the answer is compressed, though that was not asked for")]
    Compressed,
}

type Exchange = Pin<Box<dyn Future<Output = Result<Answer, ExchangeError>> + Send>>;

/// Whether a request may have left this process; until then, it has spent nothing.
#[derive(Clone, Debug, Default)]
pub(super) struct Sent(Arc<AtomicBool>);

impl Sent {
    pub(super) fn get(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    fn set(&self) {
        self.0.store(true, Ordering::Release);
    }
}

/// A request body that says when a connection has come to need it: not before it is established.
pub(super) struct ReportingBody {
    body: Full<Bytes>,
    sent: Sent,
}

impl Body for ReportingBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.sent.set();
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// An HTTP client for the auth endpoint: any tower service, without its type.
#[derive(Clone)]
pub(super) struct Endpoint(Arc<dyn Fn(Request<String>, Sent) -> Exchange + Send + Sync>);

impl Endpoint {
    /// A client of the user's. A request that it was called with may have been sent.
    pub(super) fn new<C, ResBody>(client: C) -> Self
    where
        C: Service<Request<String>, Response = Response<ResBody>> + Clone + Send + 'static,
        C::Error: Into<BoxError>,
        C::Future: Send,
        ResBody: Body + Send + 'static,
        ResBody::Data: Send,
        ResBody::Error: Into<BoxError>,
    {
        // Each exchange has a clone of its own. The lock is there so that a client need not be `Sync`.
        let template = Mutex::new(client);
        Self(Arc::new(move |request, sent| {
            let client = template.lock().unwrap_or_else(PoisonError::into_inner).clone();
            Box::pin(exchange(client, request, move || sent.set()))
        }))
    }

    /// A client that asks for the body once it has a connection: what goes before, such as a TLS handshake that hangs,
    /// sends nothing.
    pub(super) fn reporting<C, ResBody>(client: C) -> Self
    where
        C: Service<Request<ReportingBody>, Response = Response<ResBody>> + Clone + Send + Sync + 'static,
        C::Error: Into<BoxError>,
        C::Future: Send,
        ResBody: Body + Send + 'static,
        ResBody::Data: Send,
        ResBody::Error: Into<BoxError>,
    {
        Self(Arc::new(move |request, sent| {
            let request = request.map(|body| ReportingBody { body: body.into(), sent });
            Box::pin(exchange(client.clone(), request, || {}))
        }))
    }

    /// Sends `request` and reads the answer, all within `deadline`; `sent` says whether it may have been sent, also when
    /// this future is dropped.
    pub(super) async fn send(
        &self,
        request: Request<String>,
        deadline: Duration,
        sent: &Sent,
    ) -> Result<Answer, ExchangeError> {
        let answer = tokio::time::timeout(deadline, (self.0)(request, sent.clone())).await;
        match answer.unwrap_or(Err(ExchangeError::TooSlow(deadline))) {
            Err(ExchangeError::NotSent(error)) => Err(ExchangeError::NotSent(error)),
            Err(error) if !sent.get() => Err(ExchangeError::NotSent(error.into())),
            answer => answer,
        }
    }
}

async fn exchange<C, B, ResBody>(
    mut client: C,
    request: Request<B>,
    before_call: impl FnOnce(),
) -> Result<Answer, ExchangeError>
where
    C: Service<Request<B>, Response = Response<ResBody>>,
    C::Error: Into<BoxError>,
    ResBody: Body,
    ResBody::Error: Into<BoxError>,
{
    poll_fn(|cx| client.poll_ready(cx)).await.map_err(|error| ExchangeError::NotSent(error.into()))?;
    before_call();
    let response = client.call(request).await.map_err(|error| lost(error.into()))?;
    let (head, body) = response.into_parts();
    let mut read = Zeroizing::new(Vec::new());
    if !head.status.is_success() {
        // All that counts is in the head: no body is too long, too slow or too broken to hide a refusal.
        return Ok(Answer { status: head.status, headers: head.headers, body: read });
    }
    if head.headers.get(CONTENT_ENCODING).is_some_and(|coding| coding != "identity") {
        return Err(ExchangeError::Compressed);
    }
    let mut body = pin!(body);
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| ExchangeError::Lost(error.into()))?;
        let Ok(mut data) = frame.into_data() else { continue };
        if read.len() + data.remaining() > MAX_ANSWER {
            return Err(ExchangeError::TooLong);
        }
        while data.has_remaining() {
            let chunk = data.chunk();
            read.extend_from_slice(chunk);
            let length = chunk.len();
            data.advance(length);
        }
    }
    Ok(Answer { status: head.status, headers: head.headers, body: read })
}

/// A client's error, by whether the request had been sent. Where the error does not tell, it may have been.
fn lost(error: BoxError) -> ExchangeError {
    if is_connect(error.as_ref()) { ExchangeError::NotSent(error) } else { ExchangeError::Lost(error) }
}

fn is_connect(error: &(dyn StdError + 'static)) -> bool {
    let client = error.downcast_ref::<hyper_util::client::legacy::Error>();
    let io = error.downcast_ref::<io::Error>();
    client.is_some_and(|error| error.is_connect())
        || io.is_some_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
        || error.source().is_some_and(is_connect)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEADLINE: Duration = Duration::from_secs(10);

    fn request(uri: &str) -> Request<String> {
        Request::post(uri).body("body".to_owned()).unwrap()
    }

    /// A client that never answers, and takes the body first if it is to.
    fn silent(
        takes_body: bool,
    ) -> impl Service<
        Request<ReportingBody>,
        Response = Response<Full<Bytes>>,
        Error = Infallible,
        Future: Send,
    > + Clone
    + Send
    + Sync {
        tower::service_fn(move |request: Request<ReportingBody>| async move {
            if takes_body {
                let _ = request.into_body().collect().await;
            }
            std::future::pending().await
        })
    }

    /// Row 68.
    #[tokio::test(start_paused = true)]
    async fn untaken_body_counts_as_not_sent() {
        for takes_body in [false, true] {
            let sent = Sent::default();
            let endpoint = Endpoint::reporting(silent(takes_body));
            let error = endpoint.send(request("https://api.example"), DEADLINE, &sent).await.err().unwrap();
            assert_eq!(matches!(error, ExchangeError::NotSent(_)), !takes_body, "{error:?}");
            assert_eq!(sent.get(), takes_body);
            assert!(crate::observability::chain(&error).contains("within 10s"), "{error:?}");
        }
    }

    /// Row 68: the default client, and a peer that accepts connections and says nothing.
    #[tokio::test]
    async fn a_tls_handshake_that_hangs_sends_nothing() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        for (scheme, is_sent) in [("https", false), ("http", true)] {
            let sent = Sent::default();
            let endpoint = Endpoint::reporting(super::super::client::default_client().unwrap());
            let deadline = Duration::from_millis(200);
            let uri = format!("{scheme}://{address}");
            let error = endpoint.send(request(&uri), deadline, &sent).await.err().unwrap();
            assert_eq!(matches!(error, ExchangeError::NotSent(_)), !is_sent, "{error:?}");
            assert_eq!(sent.get(), is_sent);
        }
    }
}
