//! [`Endpoint`]: one exchange with a token endpoint, with one deadline and a limit on the response.

use std::{
    convert::Infallible,
    error::Error as StdError,
    future::{Future, poll_fn},
    io,
    pin::Pin,
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
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use secrecy::zeroize::Zeroizing;
use tokio::time::{Instant, timeout_at};
use tower_service::Service;

use crate::error::{BoxError, Chain, SourceError, seconds};

/// The maximum length of a response in bytes. A token response has two tokens of at most 16 KiB, and little else.
const MAX_RESPONSE: usize = 64 * 1024;

type UnreadBody = UnsyncBoxBody<Bytes, BoxError>;

/// The response of an exchange. The body is empty unless the status is a success.
///
/// The body may contain a token. It is overwritten when dropped.
pub(crate) struct BoundedResponse {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Zeroizing<Vec<u8>>,
    /// The body if the status is not a success.
    unread: UnreadBody,
    deadline: Instant,
}

// `ApiVideo` has no use for the body of an error.
#[cfg_attr(not(feature = "oauth2"), allow(dead_code))]
impl BoundedResponse {
    /// Reads the body of an error, within the deadline of the exchange. Returns an empty one if it is too long, slow or
    /// broken: the status decides then.
    pub(crate) async fn error_body(&mut self) -> Zeroizing<Vec<u8>> {
        let unread = std::mem::take(&mut self.unread);
        timeout_at(self.deadline, read(unread)).await.ok().and_then(Result::ok).unwrap_or_default()
    }
}

/// Why an exchange gave no response.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExchangeError {
    /// The request was not sent. A credential in it is not spent.
    #[error("the request was not sent")]
    NotSent(#[source] BoxError),
    /// The server may have processed the request.
    #[error("the connection was lost before the response was complete")]
    Lost(#[source] BoxError),
    #[error("no response within {0:?}")]
    TooSlow(Duration),
    #[error("the response is longer than {MAX_RESPONSE} bytes")]
    TooLong,
    #[error("the response is compressed, which the request did not accept")]
    Compressed,
}

impl ExchangeError {
    /// Converts the error. The text says what is missing, and has the whole chain of causes. The error has no source, so
    /// that each text is shown once.
    pub(crate) fn into_source_error(self, missing: &str) -> SourceError {
        let message = format!("{missing}: {}", Chain(&self));
        match self {
            Self::TooLong | Self::Compressed => SourceError::invalid_response(message),
            Self::NotSent(_) | Self::Lost(_) | Self::TooSlow(_) => SourceError::unavailable(message),
        }
    }
}

/// Checks the time limit of one exchange.
///
/// # Errors
///
/// [`SourceError::configuration`] if it is zero or more than an hour.
pub(crate) fn check_timeout(timeout: Duration) -> Result<(), SourceError> {
    if timeout.is_zero() || timeout > Duration::from_secs(60 * 60) {
        let got = seconds(timeout);
        return Err(SourceError::configuration(format!("timeout must be > 0 and <= 1h, got {got}")));
    }
    Ok(())
}

type Exchange = Pin<Box<dyn Future<Output = Result<Response<UnreadBody>, ExchangeError>> + Send>>;

/// Whether a request may have been sent. Before that, a credential in it is not spent. Clones share the flag.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sent(Arc<AtomicBool>);

impl Sent {
    /// A request without a credential, for which it does not matter.
    #[cfg(feature = "oauth2")]
    pub(crate) fn assumed() -> Self {
        Self(Arc::new(AtomicBool::new(true)))
    }

    pub(crate) fn get(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    fn set(&self) {
        self.0.store(true, Ordering::Release);
    }
}

/// A request body that sets [`Sent`] when it is polled. A connection polls the body once it is established.
pub(crate) struct ReportingBody {
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

/// An HTTP client for a token endpoint: any tower service, without its type.
#[derive(Clone)]
pub(crate) struct Endpoint(Arc<dyn Fn(Request<String>, Sent) -> Exchange + Send + Sync>);

impl Endpoint {
    /// Wraps a client of the user's. A request counts as sent once the client is called with it.
    pub(crate) fn new<C, ResBody>(client: C) -> Self
    where
        C: Service<Request<String>, Response = Response<ResBody>> + Clone + Send + 'static,
        C::Error: Into<BoxError>,
        C::Future: Send,
        ResBody: Body + Send + 'static,
        ResBody::Data: Send,
        ResBody::Error: Into<BoxError>,
    {
        // Each exchange uses its own clone. With the lock, the client does not have to be `Sync`.
        let template = Mutex::new(client);
        Self(Arc::new(move |request, sent| {
            let client = template.lock().unwrap_or_else(PoisonError::into_inner).clone();
            Box::pin(exchange(client, request, move || sent.set()))
        }))
    }

    /// Wraps a client that polls the body once it has a connection. A request counts as sent from then on, so that a
    /// TLS handshake that hangs does not count.
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

    /// Sends `request` and reads the response, both within `limit`. The body of an error is not read.
    ///
    /// # Cancel safety
    ///
    /// `sent` is correct even if this future is dropped.
    pub(crate) async fn send(
        &self,
        request: Request<String>,
        limit: Duration,
        sent: &Sent,
    ) -> Result<BoundedResponse, ExchangeError> {
        let deadline = Instant::now() + limit;
        let response = timeout_at(deadline, async {
            let (head, unread) = (self.0)(request, sent.clone()).await?.into_parts();
            let (status, headers) = (head.status, head.headers);
            if !status.is_success() {
                return Ok(BoundedResponse { status, headers, body: Zeroizing::default(), unread, deadline });
            }
            if headers.get(CONTENT_ENCODING).is_some_and(|coding| coding != "identity") {
                return Err(ExchangeError::Compressed);
            }
            let body = read(unread).await?;
            Ok(BoundedResponse { status, headers, body, unread: UnsyncBoxBody::default(), deadline })
        });
        match response.await.unwrap_or(Err(ExchangeError::TooSlow(limit))) {
            Err(ExchangeError::NotSent(error)) => Err(ExchangeError::NotSent(error)),
            Err(error) if !sent.get() => Err(ExchangeError::NotSent(error.into())),
            response => response,
        }
    }
}

async fn exchange<C, B, ResBody>(
    mut client: C,
    request: Request<B>,
    before_call: impl FnOnce(),
) -> Result<Response<UnreadBody>, ExchangeError>
where
    C: Service<Request<B>, Response = Response<ResBody>>,
    C::Error: Into<BoxError>,
    ResBody: Body + Send + 'static,
    ResBody::Error: Into<BoxError>,
{
    poll_fn(|cx| client.poll_ready(cx)).await.map_err(|error| ExchangeError::NotSent(error.into()))?;
    before_call();
    let response = client.call(request).await.map_err(|error| lost(error.into()))?;
    let bytes = |mut data: ResBody::Data| data.copy_to_bytes(data.remaining());
    Ok(response
        .map(|body| body.map_frame(move |frame| frame.map_data(bytes)).map_err(Into::into).boxed_unsync()))
}

async fn read(mut body: UnreadBody) -> Result<Zeroizing<Vec<u8>>, ExchangeError> {
    let mut read = Zeroizing::new(Vec::new());
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(ExchangeError::Lost)?.into_data() else { continue };
        if read.len() + data.len() > MAX_RESPONSE {
            return Err(ExchangeError::TooLong);
        }
        read.extend_from_slice(&data);
    }
    Ok(read)
}

/// Classifies a client's error: a failure to connect means that the request was not sent. Any other error may mean that
/// it was.
fn lost(error: BoxError) -> ExchangeError {
    if is_connect(error.as_ref()) { ExchangeError::NotSent(error) } else { ExchangeError::Lost(error) }
}

/// Whether the error, or one in its chain of causes, is a failure to connect.
fn is_connect(error: &(dyn StdError + 'static)) -> bool {
    let client = error.downcast_ref::<hyper_util::client::legacy::Error>();
    let io = error.downcast_ref::<io::Error>();
    client.is_some_and(|error| error.is_connect())
        || io.is_some_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
        || error.source().is_some_and(is_connect)
}

#[cfg(test)]
mod tests {
    use super::{super::client::Client, *};

    const DEADLINE: Duration = Duration::from_secs(10);

    fn request(uri: &str) -> Request<String> {
        Request::post(uri).body("body".to_owned()).unwrap()
    }

    /// A client that never responds. It reads the body first if `takes_body` is set.
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
            assert!(crate::error::Chain(&error).to_string().contains("within 10s"), "{error:?}");
        }
    }

    /// Row 68: the default client, and a peer that accepts connections and sends nothing.
    #[tokio::test]
    async fn a_tls_handshake_that_hangs_sends_nothing() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        for (scheme, is_sent) in [("https", false), ("http", true)] {
            let sent = Sent::default();
            let endpoint = Client::default().endpoint().unwrap();
            let deadline = Duration::from_millis(200);
            let uri = format!("{scheme}://{address}");
            let error = endpoint.send(request(&uri), deadline, &sent).await.err().unwrap();
            assert_eq!(matches!(error, ExchangeError::NotSent(_)), !is_sent, "{error:?}");
            assert_eq!(sent.get(), is_sent);
        }
    }
}
