//! One bounded exchange with an auth endpoint: one deadline for all of it, and no more of the answer than fits.

use std::{
    error::Error as StdError,
    future::{Future, poll_fn},
    io,
    pin::{Pin, pin},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Buf;
use http::{HeaderMap, Request, Response, StatusCode, header::CONTENT_ENCODING};
use http_body::Body;
use http_body_util::BodyExt;
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
    #[error("no connection could be made")]
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

/// An HTTP client for the auth endpoint: any tower service, without its type.
#[derive(Clone)]
pub(super) struct Endpoint(Arc<dyn Fn(Request<String>) -> Exchange + Send + Sync>);

impl Endpoint {
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
        Self(Arc::new(move |request| {
            let client = template.lock().unwrap_or_else(PoisonError::into_inner).clone();
            Box::pin(exchange(client, request))
        }))
    }

    /// Sends `request` and reads the answer, all within `deadline`.
    pub(super) async fn send(
        &self,
        request: Request<String>,
        deadline: Duration,
    ) -> Result<Answer, ExchangeError> {
        tokio::time::timeout(deadline, (self.0)(request))
            .await
            .unwrap_or(Err(ExchangeError::TooSlow(deadline)))
    }
}

async fn exchange<C, ResBody>(mut client: C, request: Request<String>) -> Result<Answer, ExchangeError>
where
    C: Service<Request<String>, Response = Response<ResBody>>,
    C::Error: Into<BoxError>,
    ResBody: Body,
    ResBody::Error: Into<BoxError>,
{
    poll_fn(|cx| client.poll_ready(cx)).await.map_err(|error| ExchangeError::NotSent(error.into()))?;
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
