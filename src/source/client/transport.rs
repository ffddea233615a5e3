//! [`Transport`]: sends one request by an HTTP client, within one deadline and a limit on the response.

use std::error::Error as StdError;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::Duration;
use std::{fmt, io};

use bytes::{Buf, Bytes};
use http::{Request, Response, header::CONTENT_ENCODING, response::Parts};
use http_body::Body;
use http_body_util::{BodyExt, combinators::UnsyncBoxBody};
use secrecy::zeroize::Zeroizing;
use tokio::time::{Instant, error::Elapsed, timeout, timeout_at};
use tower::{Service, ServiceExt, util::BoxCloneService};

use crate::error::{BoxError, ErrorChain, Facts, SourceError};

/// The maximum length of a response in bytes. A token response has two tokens of at most 16 KiB, and little else.
const MAX_RESPONSE: usize = 64 * 1024;

/// How long the body of an error is waited for. The status is known by then.
const ERROR_BODY_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a response is waited for at most, if the process was stopped when the deadline passed.
const LATE_TIMEOUT: Duration = Duration::from_secs(1);

const COMPRESSIONS: [&str; 5] = ["gzip", "deflate", "compress", "br", "zstd"];

type UnreadBody = UnsyncBoxBody<Bytes, BoxError>;

type Erased = BoxCloneService<Request<String>, Response<UnreadBody>, BoxError>;

/// The body of a response, which may contain a token. It is overwritten when dropped. `None` if it is the body of an
/// error that was not read, or could not be.
pub(super) type ReadBody = Option<Zeroizing<Vec<u8>>>;

/// Whether a request may have been sent. Before that, a credential in it is not spent. Clones share the answer.
#[derive(Clone, Default)]
pub(crate) struct Sent(Arc<Mutex<Option<IsSent>>>);

type IsSent = Box<dyn Fn() -> bool + Send + Sync>;

impl fmt::Debug for Sent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.get().fmt(f)
    }
}

impl Sent {
    /// Of a source that does not tell.
    pub(crate) fn unknown() -> Self {
        let sent = Self::default();
        sent.set(Some(Box::new(|| true)));
        sent
    }

    pub(crate) fn get(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).as_ref().is_some_and(|is_sent| is_sent())
    }

    /// Sets what knows whether the request was sent. `None` before it could be.
    pub(crate) fn set(&self, is_sent: Option<IsSent>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = is_sent;
    }
}

/// A response that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Unusable(&'static str);

/// An HTTP client for a token endpoint: any tower service, without its type.
#[derive(Clone)]
pub(super) struct Transport {
    /// Each exchange uses a clone. With the lock, the service does not have to be `Sync`.
    service: Arc<Mutex<Erased>>,
    /// Whether it is the default client, which sets the [`Sent`] among the request's extensions. With another one, a
    /// request counts as sent once the service is called.
    is_default: bool,
}

impl Transport {
    pub(super) fn new<S, ResBody>(service: S, is_default: bool) -> Self
    where
        S: Service<Request<String>, Response = Response<ResBody>, Error: Into<BoxError>, Future: Send>
            + Clone
            + Send
            + 'static,
        ResBody: Body<Data: Send, Error: Into<BoxError>> + Send + 'static,
    {
        let bytes = |mut data: ResBody::Data| data.copy_to_bytes(data.remaining());
        let boxed = move |response: Response<ResBody>| {
            let body = |body: ResBody| body.map_frame(move |frame| frame.map_data(bytes)).map_err(Into::into);
            response.map(|unread| body(unread).boxed_unsync())
        };
        let service = BoxCloneService::new(service.map_response(boxed).map_err(Into::into));
        Self { service: Arc::new(Mutex::new(service)), is_default }
    }

    /// Sends `request` and reads the response, both within `limit`.
    ///
    /// The body of an error is read if it may say what the status does not. If it is too long, slow or broken, it counts
    /// as not read.
    ///
    /// # Cancel safety
    ///
    /// `sent` is correct even if this future is dropped.
    pub(super) async fn send(
        &self,
        mut request: Request<String>,
        limit: Duration,
        sent: &Sent,
    ) -> Result<(Parts, ReadBody), SourceError> {
        let deadline = Instant::now() + limit;
        let answer = async {
            let mut service = self.service.lock().unwrap_or_else(PoisonError::into_inner).clone();
            request.extensions_mut().insert(sent.clone());
            service.ready().await?;
            if !self.is_default {
                sent.set(Some(Box::new(|| true)));
            }
            service.call(request).await
        };
        let mut answer = pin!(answer);
        // A process that was stopped, or a runtime that was not driven, may go on after the deadline. Then nothing may be sent,
        // but the response to what was sent is still read.
        let answer = poll_fn(|cx| match Instant::now() < deadline || sent.get() {
            true => answer.as_mut().poll(cx),
            false => Poll::Pending,
        });
        let exchange = async {
            let (head, unread) = answer.await?.into_parts();
            let coding = head.headers.get(CONTENT_ENCODING).and_then(|coding| coding.to_str().ok());
            let coding = coding.unwrap_or_default().to_ascii_lowercase();
            // Some servers name a coding that is none.
            let is_plain = !COMPRESSIONS.iter().any(|known| coding.contains(known));
            let body = match head.status.as_u16() {
                200..=299 => Some(read(unread, is_plain).await?),
                400..=599 => {
                    let left = match deadline.saturating_duration_since(Instant::now()) {
                        Duration::ZERO => LATE_TIMEOUT,
                        left => left.min(ERROR_BODY_TIMEOUT),
                    };
                    let reading = timeout(left, read(unread, is_plain));
                    reading.await.ok().and_then(Result::ok)
                }
                _ => None,
            };
            Ok((head, body))
        };
        let mut exchange = pin!(exchange);
        let mut result = timeout_at(deadline, exchange.as_mut()).await;
        if result.is_err() && sent.get() {
            // If the timer is late, the response may have arrived meanwhile, perhaps with the next refresh token. The task of
            // the connection has yet to read it.
            result = timeout(deadline.elapsed().min(LATE_TIMEOUT), exchange).await;
        }
        let result = result.unwrap_or_else(|elapsed| Err(elapsed.into()));
        result.map_err(|error: BoxError| self.failed(error.as_ref(), limit, sent))
    }

    /// Classifies an error. The text of a client's error may quote the request, if that was sent. Then only the kind of an
    /// I/O error is shown.
    fn failed(&self, error: &(dyn StdError + 'static), limit: Duration, sent: &Sent) -> SourceError {
        if let Some(error) = error.downcast_ref::<Unusable>() {
            return SourceError::invalid_response(error.0);
        }
        let mut is_unsent = !sent.get();
        let is_unconnected = is_unsent && self.is_default;
        let (mut is_connect, mut is_timeout) = (is_unconnected, false);
        let mut detail = is_unconnected.then(|| ErrorChain(error).to_string());
        let mut next = Some(error);
        while let Some(error) = next {
            if let Some(error) = error.downcast_ref::<io::Error>() {
                is_connect |= error.kind() == io::ErrorKind::ConnectionRefused;
                is_timeout |= error.kind() == io::ErrorKind::TimedOut;
                detail.get_or_insert_with(|| error.kind().to_string());
            }
            #[cfg(feature = "default-client")]
            if let Some(error) = error.downcast_ref::<hyper_util::client::legacy::Error>() {
                is_connect |= error.is_connect();
            }
            #[cfg(feature = "reqwest")]
            if let Some(error) = error.downcast_ref::<reqwest::Error>() {
                is_connect |= error.is_connect();
                is_timeout |= error.is_timeout();
            }
            is_timeout |= error.is::<Elapsed>() || error.is::<tower::timeout::error::Elapsed>();
            next = error.source();
        }
        is_unsent |= is_connect;
        let what = if is_unsent { "the request was not sent" } else { "the response was not complete" };
        let detail = match detail {
            _ if error.is::<Elapsed>() => format!(" within {limit:?}"),
            None if is_timeout => " in time".to_owned(),
            detail => detail.map(|detail| format!(": {detail}")).unwrap_or_default(),
        };
        let facts = Facts { is_unsent, is_connect, is_timeout, ..Facts::default() };
        SourceError::unavailable(format!("{what}{detail}")).with_facts(facts)
    }
}

async fn read(mut body: UnreadBody, is_plain: bool) -> Result<Zeroizing<Vec<u8>>, BoxError> {
    if !is_plain {
        return Err(Unusable("the response is compressed, which the request did not accept").into());
    }
    let mut read = Zeroizing::new(Vec::new());
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        if read.len() + data.len() > MAX_RESPONSE {
            return Err(Unusable("the response is longer than 65536 bytes").into());
        }
        read.extend_from_slice(&data);
    }
    // RFC 8259 §8.1 lets a parser ignore it.
    if read.starts_with("\u{feff}".as_bytes()) {
        read.drain(..3);
    }
    Ok(read)
}
