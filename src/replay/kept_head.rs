//! [`KeptHead`]: a copy of everything in a request but its body. [`KeepHead`]: such a copy, or nothing.
//! [`FlatHeaders`]: a header map as one buffer.
//!
//! Cloning a `HeaderMap` costs an allocation for nearly every value that was never cloned, and a hash for each name.
//! Here names and values are written to one buffer, and parsed again only if the request is sent again, which is
//! rare.

use std::convert::Infallible;

use http::{Extensions, HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, Version};

/// The bit in a value's length that marks the value as sensitive. No value is that long.
const SENSITIVE: u32 = 1 << 31;

/// The expected size of one header: a name and its value are about 50 bytes on average.
const TYPICAL_LENGTH: usize = 48;

/// Everything in a request but its body. It is copied before the token is added, so it never contains the token.
#[expect(missing_debug_implementations, reason = "the caller's headers may be secret")]
pub struct KeptHead {
    method: Method,
    uri: Uri,
    version: Version,
    extensions: Extensions,
    headers: FlatHeaders,
}

/// The content of a [`HeaderMap`].
pub(super) struct FlatHeaders {
    /// For each header: the name's length (2 bytes), the value's length and sensitive mark (4 bytes), the name, the
    /// value.
    flat: Vec<u8>,
    count: usize,
}

/// Keeps the head of a request, or nothing.
///
/// What is kept for a retry is an `Option` of a head and a spare. It takes no space if both are [`Infallible`]: an enum leaves
/// out a variant only if it has no value and no field with a size.
pub trait KeepHead: Sized {
    fn of<B>(request: &Request<B>) -> Option<Self>;

    /// Creates a request with this head and `body`.
    fn request<B>(&self, body: B) -> Request<B>;
}

impl KeepHead for KeptHead {
    #[inline]
    fn of<B>(request: &Request<B>) -> Option<Self> {
        Some(Self {
            method: request.method().clone(),
            uri: request.uri().clone(),
            version: request.version(),
            extensions: request.extensions().clone(),
            headers: FlatHeaders::of(request.headers()),
        })
    }

    fn request<B>(&self, body: B) -> Request<B> {
        let mut request = Request::new(body);
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = self.uri.clone();
        *request.version_mut() = self.version;
        *request.extensions_mut() = self.extensions.clone();
        // Room for the Authorization header.
        *request.headers_mut() = self.headers.headers(1);
        request
    }
}

impl KeepHead for Infallible {
    #[inline]
    fn of<B>(_: &Request<B>) -> Option<Self> {
        None
    }

    fn request<B>(&self, _: B) -> Request<B> {
        match *self {}
    }
}

impl FlatHeaders {
    #[inline]
    pub(super) fn of(headers: &HeaderMap) -> Self {
        // Enough for most requests. Computing the exact size would cost more than growing the buffer once when it is not.
        let mut flat = Vec::with_capacity(headers.len() * TYPICAL_LENGTH);
        for (name, value) in headers {
            let name = name.as_str().as_bytes();
            // `http` limits a name to 2¹⁶-1 bytes. A value of 2 GiB could not be sent.
            let (name_length, value_length) = (name.len() as u16, value.len() as u32 & !SENSITIVE);
            let mark = if value.is_sensitive() { SENSITIVE } else { 0 };
            let [n0, n1] = name_length.to_le_bytes();
            let [v0, v1, v2, v3] = (value_length | mark).to_le_bytes();
            flat.extend_from_slice(&[n0, n1, v0, v1, v2, v3]);
            flat.extend_from_slice(name);
            flat.extend_from_slice(&value.as_bytes()[..value_length as usize]);
        }
        Self { flat, count: headers.len() }
    }

    /// Frees unused capacity.
    pub(super) fn shrunk(mut self) -> Self {
        self.flat.shrink_to_fit();
        self
    }

    /// Returns the size in bytes.
    pub(super) fn len(&self) -> usize {
        self.flat.len()
    }

    /// Parses the headers, into a map with room for `more` of them.
    pub(super) fn headers(&self, more: usize) -> HeaderMap {
        // If that exceeds a map's maximum capacity, start with an empty map, which grows as the original did.
        let mut headers = HeaderMap::try_with_capacity(self.count + more).unwrap_or_default();
        let mut rest = self.flat.as_slice();
        while let Some((name, value, after)) = next_header(rest) {
            headers.append(name, value);
            rest = after;
        }
        headers
    }
}

fn next_header(flat: &[u8]) -> Option<(HeaderName, HeaderValue, &[u8])> {
    let (name_length, flat) = flat.split_first_chunk()?;
    let (value_length, flat) = flat.split_first_chunk()?;
    let value_length = u32::from_le_bytes(*value_length);
    let (name, flat) = flat.split_at_checked(u16::from_le_bytes(*name_length).into())?;
    let (value, flat) = flat.split_at_checked((value_length & !SENSITIVE) as usize)?;
    // Both were valid when they were written, so this never ends the iteration early.
    let name = HeaderName::from_bytes(name).ok()?;
    let mut value = HeaderValue::from_bytes(value).ok()?;
    value.set_sensitive(value_length & SENSITIVE != 0);
    Some((name, value, flat))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn restored(request: Request<()>) -> Request<()> {
        KeptHead::of(&request).unwrap().request(())
    }

    /// A retry has another method, URI, version, header or extension than the request.
    #[test]
    fn head_is_restored() {
        let mut request = Request::builder()
            .method("PURGE")
            .uri("https://example.com:8443/a?b=c")
            .version(Version::HTTP_2)
            .header("x-repeated", "1")
            .header("accept", "*/*")
            .header("x-repeated", "2")
            .header("x-repeated", "3")
            .header("x-empty", "")
            .header("x-latin", HeaderValue::from_bytes(b"caf\xe9").unwrap())
            .extension("kept")
            .body(())
            .unwrap();
        request.headers_mut().get_mut("accept").unwrap().set_sensitive(true);
        let expected = request.clone();
        let restored = restored(request);
        assert_eq!(restored.method(), "PURGE");
        assert_eq!(restored.uri(), expected.uri());
        assert_eq!(restored.version(), Version::HTTP_2);
        assert_eq!(restored.extensions().get::<&str>(), Some(&"kept"));
        assert_eq!(restored.headers(), expected.headers());
        let repeated: Vec<_> = restored.headers().get_all("x-repeated").iter().collect();
        assert_eq!(repeated, ["1", "2", "3"]);
        assert!(restored.headers()["accept"].is_sensitive());
        assert!(!restored.headers()["x-empty"].is_sensitive());
    }

    /// A retry has other headers than the request, whatever these are.
    #[test]
    fn any_headers_are_restored() {
        const CHARACTERS: &[u8] = b"abcdefghijklmnopqrstuvwxyz0123456789!#$%&'*+.^_`|~-";
        let mut state = 1_u64;
        let mut draw = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        for _ in 0..256 {
            let mut map = HeaderMap::new();
            for _ in 0..draw(60) {
                let name: Vec<u8> =
                    (0..=draw(40)).map(|_| CHARACTERS[draw(CHARACTERS.len() as u64) as usize]).collect();
                // Few names, so that some are repeated.
                let name = if draw(2) == 0 { vec![b'a' + draw(20) as u8] } else { name };
                let value: Vec<u8> = (0..draw(80)).map(|_| 32 + draw(224) as u8).collect();
                let (Ok(name), Ok(mut value)) =
                    (HeaderName::from_bytes(&name), HeaderValue::from_bytes(&value))
                else {
                    continue;
                };
                value.set_sensitive(draw(2) == 0);
                map.append(name, value);
            }
            let mut request = Request::new(());
            *request.headers_mut() = map.clone();
            let restored = restored(request);
            assert_eq!(restored.headers(), &map);
            for name in map.keys() {
                let marks = |map: &HeaderMap| -> Vec<bool> {
                    map.get_all(name).iter().map(HeaderValue::is_sensitive).collect()
                };
                assert_eq!(marks(restored.headers()), marks(&map));
            }
        }
    }
}
