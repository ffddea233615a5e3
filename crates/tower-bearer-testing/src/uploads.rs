//! [`Uploads`]: the bytes of videos, raw or in a form, whole or in chunks.

use std::{
    collections::{BTreeMap, HashMap},
    ops::RangeInclusive,
};

use base64::{Engine, prelude::BASE64_STANDARD};
use bytes::{Bytes, BytesMut};
use http::{
    HeaderMap, StatusCode,
    header::{AUTHORIZATION, CONTENT_RANGE, CONTENT_TYPE},
};
use http_body_util::BodyExt;
use ring::digest::{Context, SHA256};
use serde_json::{Value, json};

use super::{random::hex, request_body::RequestBody};
use crate::BoxError;

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

/// The complete uploads, and what has arrived of each video.
#[derive(Debug, Default)]
pub(super) struct Uploads {
    pub(super) whole: Vec<Upload>,
    /// By video.
    received: HashMap<String, Received>,
}

/// What has arrived of a video.
struct Received {
    bytes: u64,
    /// The number of chunks before the first gap.
    chunks: u64,
    /// The digest of these chunks.
    digest: Context,
    /// The range that arrived last.
    last: Option<RangeInclusive<u64>>,
    /// Whether the chunks are parts. Otherwise, they are ranges of bytes.
    in_parts: bool,
    /// The parts after the first gap, by number.
    waiting: BTreeMap<u64, Bytes>,
    /// The number of all parts or bytes, if it is known.
    all: Option<u64>,
    /// The digest of the whole video.
    sha256: Option<String>,
}

impl Default for Received {
    fn default() -> Self {
        let digest = Context::new(&SHA256);
        let (last, waiting) = (None, BTreeMap::new());
        Self { bytes: 0, chunks: 0, digest, last, in_parts: false, waiting, all: None, sha256: None }
    }
}

impl std::fmt::Debug for Received {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Received")
            .field("bytes", &self.bytes)
            .field("chunks", &self.chunks)
            .finish_non_exhaustive()
    }
}

impl Received {
    fn add(&mut self, content: &[u8]) {
        self.bytes += content.len() as u64;
        self.chunks += 1;
        self.digest.update(content);
    }
}

/// The `Content-Range` of a chunk.
#[derive(Debug)]
pub(super) enum Chunk {
    /// `bytes <first>-<last>/<all>` (RFC 9110 §14.4). The ranges arrive in order.
    Bytes { range: RangeInclusive<u64>, all: u64 },
    /// `part <number>/<all>`, or `part <number>/*` while the number of parts is not known. api.video accepts the parts
    /// in any order.
    Part { number: u64, all: Option<u64> },
}

/// The response to an upload that is rejected.
pub(super) type Rejection = (StatusCode, &'static str);

impl Chunk {
    /// Parses the range of a request. `None` if the request has the whole video.
    pub(super) fn of(headers: &HeaderMap) -> Result<Option<Self>, Rejection> {
        let Some(value) = headers.get(CONTENT_RANGE) else { return Ok(None) };
        let chunk = value.to_str().ok().and_then(Self::parse);
        chunk.map(Some).ok_or((
            StatusCode::BAD_REQUEST,
            "Content-Range is neither `bytes <first>-<last>/<all>` nor `part <number>/<all>`.",
        ))
    }

    fn parse(value: &str) -> Option<Self> {
        let (unit, position) = value.split_once(' ')?;
        let (position, all) = position.split_once('/')?;
        match unit {
            "bytes" => {
                let (first, last) = position.split_once('-')?;
                let (range, all) = (number(first)?..=number(last)?, number(all)?);
                (!range.is_empty() && *range.end() < all).then_some(Self::Bytes { range, all })
            }
            "part" => {
                let part = number(position)?;
                let all = if all == "*" { None } else { Some(number(all)?) };
                (part > 0 && all.is_none_or(|all| part <= all)).then_some(Self::Part { number: part, all })
            }
            _ => None,
        }
    }
}

/// Parses digits. A sign is none, unlike in `str::parse`.
fn number(digits: &str) -> Option<u64> {
    digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok())?
}

impl Uploads {
    /// Records a request that was read to its end. Returns the digest of the video if it is complete. A part that has
    /// arrived before, or the range that arrived last, changes nothing: only its response was lost.
    pub(super) fn receive(
        &mut self,
        video: &str,
        chunk: Option<&Chunk>,
        headers: &HeaderMap,
        read: Read,
    ) -> Result<Option<String>, Rejection> {
        let received = self.received.entry(video.to_owned()).or_default();
        let content = read.content.unwrap_or_default().freeze();
        match chunk {
            None => {
                let (bytes, digest) = (read.bytes, read.digest);
                *received = Received { bytes, chunks: 1, digest, all: Some(bytes), ..Received::default() };
            }
            Some(Chunk::Bytes { range, all }) => {
                let continues = received.all == Some(*all);
                if continues && received.last.as_ref() == Some(range) {
                    return Ok(received.sha256.clone());
                } else if *range.start() == 0 {
                    *received = Received::default();
                } else if received.in_parts || received.bytes != *range.start() || !continues {
                    let title = "The range does not continue the chunks that have arrived.";
                    return Err((StatusCode::RANGE_NOT_SATISFIABLE, title));
                }
                received.last = Some(range.clone());
                received.all = Some(*all);
                received.add(&content);
            }
            Some(Chunk::Part { number, all }) => {
                if !received.in_parts {
                    *received = Received { in_parts: true, ..Received::default() };
                }
                let seen = received.waiting.last_key_value().map_or(received.chunks, |(last, _)| *last);
                let changed = all.is_some() && received.all.is_some() && received.all != *all;
                let all = all.or(received.all);
                if changed || all.is_some_and(|all| all < seen.max(*number)) {
                    let title = "The number of parts contradicts an earlier Content-Range.";
                    return Err((StatusCode::BAD_REQUEST, title));
                }
                received.all = all;
                if received.sha256.is_some() {
                    return Ok(received.sha256.clone());
                }
                if *number > received.chunks {
                    received.waiting.insert(*number, content);
                }
                while let Some(content) = received.waiting.remove(&(received.chunks + 1)) {
                    received.add(&content);
                }
            }
        }
        let arrived = if received.in_parts { received.chunks } else { received.bytes };
        if received.all != Some(arrived) {
            return Ok(None);
        }
        let sha256 = hex(received.digest.clone().finish().as_ref());
        received.sha256 = Some(sha256.clone());
        let mut headers = headers.clone();
        if let Some(token) = headers.get_mut(AUTHORIZATION) {
            token.set_sensitive(true);
        }
        self.whole.push(Upload {
            video_id: video.to_owned(),
            bytes: received.bytes,
            chunks: received.chunks,
            sha256: sha256.clone(),
            headers,
            trailers: read.trailers,
        });
        Ok(Some(sha256))
    }

    /// Removes what has arrived of a video that is deleted. A complete upload remains in the list.
    pub(super) fn forget(&mut self, video: &str) {
        self.received.remove(video);
    }

    /// Returns what has arrived of a video, as api.video describes it.
    pub(super) fn ingest(&self, video: &str) -> Value {
        let arrived = |received: &&Received| received.chunks > 0 || !received.waiting.is_empty();
        let Some(received) = self.received.get(video).filter(arrived) else {
            return json!({ "filesize": null, "receivedBytes": [] });
        };
        let status = if received.sha256.is_some() { "uploaded" } else { "uploading" };
        if received.in_parts {
            let parts: Vec<_> = (1..=received.chunks).chain(received.waiting.keys().copied()).collect();
            let size = received.sha256.is_some().then_some(received.bytes);
            let parts = json!({ "parts": parts, "total": received.all });
            return json!({ "status": status, "filesize": size, "receivedParts": parts });
        }
        let range = json!({ "from": 0, "to": received.bytes.saturating_sub(1), "total": received.all });
        json!({ "status": status, "filesize": received.all, "receivedBytes": [range] })
    }
}

/// The content of one request.
pub(super) struct Read {
    pub(super) bytes: u64,
    /// The ID of the video and the name of the file, if a form has them.
    pub(super) video_id: Option<String>,
    pub(super) file_name: Option<String>,
    digest: Context,
    /// The bytes of a chunk, which may arrive before the chunk ahead of it. `None` for a whole video: it is not kept.
    content: Option<BytesMut>,
    trailers: HeaderMap,
}

impl Read {
    /// Reads a request, and checks its length and digest against the headers.
    pub(super) async fn of(
        headers: &HeaderMap,
        body: RequestBody,
        chunk: Option<&Chunk>,
    ) -> Result<Self, Rejection> {
        let mut read = Self {
            bytes: 0,
            video_id: None,
            file_name: None,
            digest: Context::new(&SHA256),
            content: chunk.map(|_| BytesMut::new()),
            trailers: HeaderMap::new(),
        };
        let content_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let broken = match content_type.map(multer::parse_boundary) {
            Some(Ok(boundary)) => read.form(body, boundary).await,
            _ => read.raw(body).await,
        };
        broken.map_err(|_| (StatusCode::BAD_REQUEST, "The upload broke off, or has no file in it."))?;
        if matches!(chunk, Some(Chunk::Bytes { range, .. }) if range.end() - range.start() + 1 != read.bytes)
        {
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
        if let Some(content) = &mut self.content {
            content.extend_from_slice(data);
        }
    }

    async fn raw(&mut self, mut body: RequestBody) -> Result<(), BoxError> {
        while let Some(frame) = body.frame().await {
            match frame?.into_data() {
                Ok(data) => self.add(&data),
                Err(frame) => self.trailers.extend(frame.into_trailers().unwrap_or_default()),
            }
        }
        Ok(())
    }

    /// Reads a form. The field of the file is `file` or has a file name: api.video's Node client calls it by the file's
    /// name. `videoId` is before the file or after it.
    async fn form(&mut self, mut body: RequestBody, boundary: String) -> Result<(), BoxError> {
        let mut has_file = false;
        let mut parts = multer::Multipart::new((&mut body).into_data_stream(), boundary);
        while let Some(mut part) = parts.next_field().await? {
            if part.name() == Some("videoId") {
                self.video_id = Some(part.text().await?);
            } else if !has_file && (part.name() == Some("file") || part.file_name().is_some()) {
                has_file = true;
                self.file_name = part.file_name().map(str::to_owned);
                while let Some(data) = part.chunk().await? {
                    self.add(&data);
                }
            }
        }
        drop(parts);
        // The form ends before the body, at whose end the token may be checked.
        while let Some(frame) = body.frame().await {
            frame?;
        }
        if has_file { Ok(()) } else { Err("no file".into()) }
    }
}
