//! [`OriginHash`]: the origin of a request, in four bytes.

use std::hash::{DefaultHasher, Hasher};

use http::Uri;

use crate::origins::Parts;

/// Tells whether a response comes from the origin of its request, in four bytes: a request keeps no more of its URI. Two
/// origins may have one hash. Then one refresh may start that nobody needs: no token is sent because of a hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OriginHash(u32);

impl OriginHash {
    /// Not known, or no origin that [`Parts`] knows, such as that of a relative URI.
    pub(crate) const NONE: Self = Self(0);

    #[cold]
    pub(crate) fn of(uri: &Uri) -> Self {
        let Some(Parts { scheme, host, port, .. }) = Parts::of(uri) else { return Self::NONE };
        let mut hasher = DefaultHasher::new();
        hasher.write(scheme.as_str().as_bytes());
        host.bytes().for_each(|byte| hasher.write_u8(byte.to_ascii_lowercase()));
        hasher.write_u16(port);
        Self(hasher.finish() as u32 | 1)
    }

    /// Whether `uri` has the origin, or that is not known.
    #[cfg(feature = "tower-http")]
    pub(crate) fn is_of(self, uri: &Uri) -> bool {
        let other = Self::of(uri);
        self == other || self == Self::NONE || other == Self::NONE
    }
}
