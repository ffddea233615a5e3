//! [`Uploads`]: the bytes of videos, raw or in a form, whole or in chunks.

use std::{collections::HashMap, ops::RangeInclusive};

use base64::{Engine, prelude::BASE64_STANDARD};
use http::{
    HeaderMap, StatusCode,
    header::{AUTHORIZATION, CONTENT_RANGE, CONTENT_TYPE},
};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use ring::digest::{Context, SHA256};

use super::random::hex;
use crate::error::BoxError;

/// A complete upload.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Upload {
    /// The ID of the video.
    pub video_id: String,
    /// The number of bytes.
    pub bytes: u64,
    /// The number of requests, one for each chunk.
    pub chunks: u64,
    /// The SHA-256 of the bytes, in lower-case hexadecimal digits.
    pub sha256: String,
    /// The headers of the last request, including its token.
    pub headers: HeaderMap,
    /// The trailers of the last request.
    pub trailers: HeaderMap,
}

/// The complete uploads, and those that have started.
#[derive(Debug, Default)]
pub(super) struct Uploads {
    pub(super) whole: Vec<Upload>,
    /// By video.
    begun: HashMap<String, Begun>,
}

/// The chunks of a video that have arrived.
#[derive(Clone)]
pub(super) struct Begun {
    bytes: u64,
    chunks: u64,
    digest: Context,
    /// The chunk that arrived last.
    last: Option<RangeInclusive<u64>>,
}

impl Default for Begun {
    fn default() -> Self {
        Self { bytes: 0, chunks: 0, digest: Context::new(&SHA256), last: None }
    }
}

impl std::fmt::Debug for Begun {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Begun")
            .field("bytes", &self.bytes)
            .field("chunks", &self.chunks)
            .finish_non_exhaustive()
    }
}

/// `Content-Range: bytes <first>-<last>/<all>` (RFC 9110 §14.4), which api.video's documents specify for chunks.
#[derive(Clone, Debug)]
pub(super) struct Chunk {
    range: RangeInclusive<u64>,
    all: u64,
}

/// The response to an upload that is rejected.
pub(super) type Rejection = (StatusCode, &'static str);

impl Chunk {
    /// Parses the range of a request. `None` if the request has the whole video.
    pub(super) fn of(headers: &HeaderMap) -> Result<Option<Self>, Rejection> {
        let Some(value) = headers.get(CONTENT_RANGE) else { return Ok(None) };
        let parsed = value.to_str().ok().and_then(|value| {
            let (range, all) = value.strip_prefix("bytes ")?.split_once('/')?;
            let (first, last) = range.split_once('-')?;
            Some(Self { range: first.parse().ok()?..=last.parse().ok()?, all: all.parse().ok()? })
        });
        match parsed {
            Some(chunk) if !chunk.range.is_empty() && *chunk.range.end() < chunk.all => Ok(Some(chunk)),
            _ => Err((StatusCode::BAD_REQUEST, "Content-Range is not `bytes <first>-<last>/<all>`.")),
        }
    }
}

impl Uploads {
    /// Returns the upload that a request continues. `None` if the chunk has arrived before and only its response was
    /// lost.
    pub(super) fn begin(&self, video: &str, chunk: Option<&Chunk>) -> Result<Option<Begun>, Rejection> {
        let Some(chunk) = chunk.filter(|chunk| *chunk.range.start() > 0) else {
            return Ok(Some(Begun::default()));
        };
        match self.begun.get(video) {
            Some(begun) if begun.bytes == *chunk.range.start() => Ok(Some(begun.clone())),
            Some(begun) if begun.last.as_ref() == Some(&chunk.range) => Ok(None),
            _ => Err((StatusCode::RANGE_NOT_SATISFIABLE, "The chunks before this one are not here.")),
        }
    }

    /// Records a request that was read to its end. Returns the digest of the video if it is complete.
    pub(super) fn end(
        &mut self,
        video: &str,
        chunk: Option<Chunk>,
        mut begun: Begun,
        headers: &HeaderMap,
        read: Read,
    ) -> Option<String> {
        begun.bytes += read.bytes;
        begun.chunks += 1;
        begun.digest = read.all;
        if let Some(chunk) = chunk.filter(|chunk| begun.bytes < chunk.all) {
            begun.last = Some(chunk.range);
            self.begun.insert(video.to_owned(), begun);
            return None;
        }
        self.begun.remove(video);
        let sha256 = hex(begun.digest.finish().as_ref());
        let mut headers = headers.clone();
        if let Some(token) = headers.get_mut(AUTHORIZATION) {
            token.set_sensitive(true);
        }
        self.whole.push(Upload {
            video_id: video.to_owned(),
            bytes: begun.bytes,
            chunks: begun.chunks,
            sha256: sha256.clone(),
            headers,
            trailers: read.trailers,
        });
        Some(sha256)
    }
}

/// The bytes of one request.
pub(super) struct Read {
    pub(super) bytes: u64,
    /// The digest of this request's content.
    digest: Context,
    /// The digest of the video so far.
    all: Context,
    trailers: HeaderMap,
}

impl Read {
    /// Reads a request that continues `begun`, and checks its length and digest against the headers.
    pub(super) async fn of(
        headers: &HeaderMap,
        body: Incoming,
        chunk: Option<&Chunk>,
        begun: &Begun,
    ) -> Result<Self, Rejection> {
        let mut read = Self {
            bytes: 0,
            digest: Context::new(&SHA256),
            all: begun.digest.clone(),
            trailers: HeaderMap::new(),
        };
        let content_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let broken = match content_type.map(multer::parse_boundary) {
            Some(Ok(boundary)) => read.form(body, boundary).await,
            _ => read.raw(body).await,
        };
        broken.map_err(|_| (StatusCode::BAD_REQUEST, "The upload broke off, or has no file in it."))?;
        if chunk.is_some_and(|chunk| chunk.range.end() - chunk.range.start() + 1 != read.bytes) {
            return Err((StatusCode::BAD_REQUEST, "The content is not as long as Content-Range says."));
        }
        // RFC 9530 §2: the digest of this request's content, not of the whole video.
        let digest = format!("sha-256=:{}:", BASE64_STANDARD.encode(read.digest.clone().finish()));
        let claimed = headers.get("content-digest").or_else(|| read.trailers.get("content-digest"));
        if claimed.is_some_and(|claimed| claimed != digest.as_str()) {
            return Err((StatusCode::BAD_REQUEST, "The content does not match its digest."));
        }
        Ok(read)
    }

    fn add(&mut self, data: &[u8]) {
        self.bytes += data.len() as u64;
        self.digest.update(data);
        self.all.update(data);
    }

    async fn raw(&mut self, mut body: Incoming) -> Result<(), BoxError> {
        while let Some(frame) = body.frame().await {
            match frame?.into_data() {
                Ok(data) => self.add(&data),
                Err(frame) => self.trailers.extend(frame.into_trailers().unwrap_or_default()),
            }
        }
        Ok(())
    }

    async fn form(&mut self, body: Incoming, boundary: String) -> Result<(), BoxError> {
        let mut parts = multer::Multipart::new(body.into_data_stream(), boundary);
        while let Some(mut part) = parts.next_field().await? {
            if part.name() == Some("file") {
                while let Some(data) = part.chunk().await? {
                    self.add(&data);
                }
                return Ok(());
            }
        }
        Err("no file".into())
    }
}
