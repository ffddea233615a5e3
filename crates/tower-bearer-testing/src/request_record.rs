//! [`RequestRecord`]: what the server reports about each request.

use std::{fmt, sync::Arc};

use http::{Method, Request, StatusCode};

/// A request that has ended. It holds no secret: the query and the headers are omitted.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RequestRecord {
    /// The method.
    pub method: Method,
    /// The path, without the query.
    pub path: String,
    /// The status of the response. `None` if there is none: a [fault](crate::Fault) has reset the connection, or the client
    /// has closed it before.
    pub status: Option<StatusCode>,
}

/// The function that gets the records.
#[derive(Clone)]
pub(super) struct Observer(Arc<dyn Fn(&RequestRecord) + Send + Sync>);

impl Observer {
    pub(super) fn new(observer: impl Fn(&RequestRecord) + Send + Sync + 'static) -> Self {
        Self(Arc::new(observer))
    }

    /// Starts the record of a request.
    pub(super) fn watch<B>(&self, request: &Request<B>) -> Watch {
        let (method, path) = (request.method().clone(), request.uri().path().to_owned());
        Watch { observer: self.clone(), record: RequestRecord { method, path, status: None } }
    }
}

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Observer")
    }
}

/// The record of a request that runs. Its drop reports it, also if the connection ends before the response.
pub(super) struct Watch {
    observer: Observer,
    pub(super) record: RequestRecord,
}

impl Drop for Watch {
    fn drop(&mut self) {
        (self.observer.0)(&self.record);
    }
}
