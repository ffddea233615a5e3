//! [`AllowedOrigins`]: which origins may see the token.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use http::Uri;
use http::uri::{Authority, Scheme};

use crate::error::Error;

/// The origins that may see the token: scheme, host and port (RFC 6454 §4), compared exactly.
///
/// A request to any other origin is sent without the token, and its response is never a challenge. A redirect, or a URI
/// from a user's input, therefore cannot send the token to another host. Default:
/// [`TokenSource::allowed_origins`](crate::TokenSource::allowed_origins) of the provider's source.
///
/// ```
/// use tower_bearer::AllowedOrigins;
///
/// let allowed = AllowedOrigins::origins(["https://ws.api.video", "https://upload.example:8443"])?;
/// assert!(AllowedOrigins::origins(["ws.api.video"]).is_err());
/// # Ok::<(), tower_bearer::Error>(())
/// ```
///
/// # What is compared
///
/// - The host is compared without regard to case, and an IP address by its value. A subdomain is another host, and so
///   is a name with a trailing dot.
/// - A missing port is the default port of the scheme.
/// - A name with characters outside of ASCII is compared in its IDNA form (`xn--…`), the only one that a URI can have.
/// - A user name in the URI is not part of its origin.
///
/// A request with a relative URI has no origin. It gets the token, because the inner service decides where it goes.
#[derive(Clone)]
pub struct AllowedOrigins(Allowed);

#[derive(Clone)]
enum Allowed {
    Origins(Arc<[Origin]>),
    Https,
    Any,
}

#[derive(Clone, PartialEq, Eq)]
struct Origin {
    scheme: Scheme,
    /// The form that requests usually have: the name in lower case or the address in its shortest form, and the port only if
    /// it is not the scheme's default. Equal origins have the same.
    authority: String,
}

impl AllowedOrigins {
    /// Allows these origins only, such as `https://ws.api.video`. Plaintext `http` is allowed only for an origin that
    /// has it.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] unless every text is `http` or `https`, a host and optionally a port. A path other than
    /// `/`, a query, a user name and a host that is not in ASCII are errors. For a URI with a path, such as the base of an
    /// API, use [`of`](Self::of).
    pub fn origins<I: IntoIterator<Item: AsRef<str>>>(origins: I) -> Result<Self, Error> {
        let parsed = origins.into_iter().map(|text| Origin::parse(text.as_ref()));
        Ok(Self(Allowed::Origins(parsed.collect::<Result<_, _>>()?)))
    }

    /// Allows the origin of `uri` only, whatever its path and its query are.
    ///
    /// ```
    /// use tower_bearer::AllowedOrigins;
    ///
    /// let allowed = AllowedOrigins::of(&"https://rancher.example/k8s/clusters/c-1".parse()?)?;
    /// assert_eq!(format!("{allowed:?}"), "{https://rancher.example}");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] unless it is `http` or `https`, and has a host without a wildcard and a valid port.
    pub fn of(uri: &Uri) -> Result<Self, Error> {
        Ok(Self(Allowed::Origins(Arc::new([Origin::checked(uri)?]))))
    }

    /// Allows every `https` origin, and `http` on loopback (`localhost`, 127.0.0.0/8, `::1`).
    pub fn https() -> Self {
        Self(Allowed::Https)
    }

    /// Allows every origin, including plaintext ones. Anyone on the network path can then read the token.
    ///
    /// Meant for a service whose requests something else routes, such as the sidecar of a mesh.
    pub fn any_insecure() -> Self {
        Self(Allowed::Any)
    }

    /// Allows the origin of `uri` only. If `uri` has no origin, no origin is allowed.
    pub(crate) fn origin_of(uri: &Uri) -> Self {
        Self(Allowed::Origins(Origin::of(uri).into_iter().collect()))
    }

    /// Whether a request to `uri` may carry the token.
    #[inline]
    pub(crate) fn covers(&self, uri: &Uri) -> bool {
        // The fast path for nearly every request.
        (matches!(self.0, Allowed::Https) && uri.scheme_str() == Some("https")) || self.covers_otherwise(uri)
    }

    fn covers_otherwise(&self, uri: &Uri) -> bool {
        let (scheme, Some(authority)) = (uri.scheme(), uri.authority()) else { return true };
        let usual =
            |origin: &Origin| authority.as_str() == origin.authority && scheme == Some(&origin.scheme);
        match &self.0 {
            Allowed::Any => true,
            Allowed::Https => scheme == Some(&Scheme::HTTPS) || is_loopback(authority.host()),
            Allowed::Origins(origins) => origins.iter().any(usual) || names(origins, uri),
        }
    }
}

/// Whether `origins` contains the origin of `uri`, in any notation.
#[cold]
fn names(origins: &[Origin], uri: &Uri) -> bool {
    Origin::of(uri).is_some_and(|origin| origins.contains(&origin))
}

/// Returns the origin of a URI for display, without a user name, path or query, which may be secret.
pub(crate) fn shown(uri: &Uri) -> String {
    let host = uri.host().unwrap_or_default().to_ascii_lowercase();
    let port = uri.port_u16().map(|port| format!(":{port}")).unwrap_or_default();
    format!("{}://{host}{port}", uri.scheme_str().unwrap_or("?"))
}

/// Returns a URI for display with its path, but without a user name and a query, which may be secret.
pub(crate) fn shown_with_path(uri: &Uri) -> String {
    format!("{}{}", shown(uri), uri.path())
}

/// Whether the host is `localhost` or a loopback address.
pub(crate) fn is_loopback(host: &str) -> bool {
    address(host).map_or_else(|| host.eq_ignore_ascii_case("localhost"), |address| address.is_loopback())
}

/// Returns the IP address that a host is, if it is one.
fn address(host: &str) -> Option<IpAddr> {
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    bare.parse().ok()
}

/// What tells one origin from another, in the notation of its URI but for the port.
pub(crate) struct Parts<'a> {
    pub(crate) scheme: &'a Scheme,
    pub(crate) host: &'a str,
    pub(crate) port: u16,
    pub(crate) is_default_port: bool,
}

impl<'a> Parts<'a> {
    pub(crate) fn of(uri: &'a Uri) -> Option<Self> {
        let (scheme, authority) = (uri.scheme()?, uri.authority()?);
        let default = match scheme.as_str() {
            "https" => 443,
            "http" => 80,
            _ => return None,
        };
        let host = authority.host();
        if host.is_empty() {
            return None;
        }
        let port = match port(authority)? {
            "" => default,
            // Five digits may be more than the highest port.
            text => text.parse().ok()?,
        };
        Some(Self { scheme, host, port, is_default_port: port == default })
    }
}

impl Origin {
    fn of(uri: &Uri) -> Option<Self> {
        let Parts { scheme, host, port, is_default_port } = Parts::of(uri)?;
        let host = match address(host) {
            Some(IpAddr::V6(address)) => format!("[{address}]"),
            Some(address) => address.to_string(),
            None => host.to_ascii_lowercase(),
        };
        let authority = if is_default_port { host } else { format!("{host}:{port}") };
        Some(Self { scheme: scheme.clone(), authority })
    }

    /// Returns the origin of a URI that names one.
    fn checked(uri: &Uri) -> Result<Self, Error> {
        let Some(origin) = Self::of(uri) else {
            return invalid(
                "be http or https with a host and perhaps a port, such as https://ws.api.video:443",
            );
        };
        let host = uri.host().unwrap_or_default();
        let is_name = host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte));
        if !is_name && address(host).is_none() {
            return invalid(&format!("name its host, with no wildcards, got {}", shown(uri)));
        }
        Ok(origin)
    }

    fn parse(text: &str) -> Result<Self, Error> {
        if !text.is_ascii() {
            return invalid("be ASCII: write the host in its IDNA form, such as xn--bcher-kva.example");
        }
        let Ok(uri) = text.parse::<Uri>() else {
            return invalid("be a URL such as https://ws.api.video");
        };
        let origin = Self::checked(&uri)?;
        if uri.authority().is_some_and(|authority| authority.as_str().contains('@')) {
            return invalid("have no user name, such as https://ws.api.video");
        }
        if uri.path() != "/" || uri.query().is_some() {
            return invalid("have no path and no query, such as https://ws.api.video");
        }
        Ok(origin)
    }
}

/// The messages show at most the origin, because a user name or a query may be secret.
fn invalid<T>(what: &str) -> Result<T, Error> {
    Err(Error::InvalidOption(format!("an allowed origin must {what}").into()))
}

/// Returns the text of the port, which is empty if there is none. `None` if the authority has no valid form.
fn port(authority: &Authority) -> Option<&str> {
    let after_user = authority.as_str().rsplit('@').next()?;
    after_user.strip_prefix(authority.host()).map(|rest| rest.strip_prefix(':').unwrap_or(rest))
}

impl fmt::Debug for AllowedOrigins {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Allowed::Origins(origins) => f.debug_set().entries(origins.iter()).finish(),
            Allowed::Https => f.write_str("https and loopback"),
            Allowed::Any => f.write_str("any, insecure"),
        }
    }
}

impl fmt::Debug for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scheme, self.authority)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn covers(allowed: &AllowedOrigins, uri: &str) -> bool {
        allowed.covers(&uri.parse().unwrap_or_else(|_| panic!("{uri}")))
    }

    /// A redirect or a user's input leads to an origin that looks like an allowed one.
    #[test]
    fn origin_is_scheme_host_and_port() {
        let allowed = AllowedOrigins::origins([
            "https://ws.api.video",
            "https://[2001:db8::1]:8443",
            "http://10.0.0.7:3000",
        ])
        .unwrap();
        for inside in [
            "https://ws.api.video",
            "https://ws.api.video/videos?a=b",
            "https://WS.API.Video:443/",
            "HTTPS://ws.api.video/",
            "https://anybody@ws.api.video/",
            "https://ws.api.video:/",
            "https://[2001:DB8::1]:8443/",
            "https://[2001:db8:0:0:0:0:0:1]:8443/",
            "http://10.0.0.7:3000/",
            "/videos",
        ] {
            assert!(covers(&allowed, inside), "{inside}");
        }
        for outside in [
            "http://ws.api.video/",
            "https://ws.api.video:8443/",
            "https://api.video/",
            "https://a.ws.api.video/",
            "https://evilws.api.video/",
            "https://ws.api.video.evil.example/",
            "https://ws.api.video./",
            "https://ws.api.video@evil.example/",
            "https://ws.api.video:443@evil.example/",
            "https://evil.example/ws.api.video",
            "https://[2001:db8::1]/",
            "https://[2001:db8::2]:8443/",
            "https://10.0.0.7:3000/",
            "http://10.0.0.7/",
            "ftp://ws.api.video/",
            "ws.api.video:443",
            "https://ws.api.video:99999/",
        ] {
            // A text that is not a URI cannot be sent.
            if let Ok(uri) = outside.parse() {
                assert!(!allowed.covers(&uri), "{outside}");
            }
        }
    }

    /// A token for any HTTPS origin is sent without encryption, except on loopback.
    #[test]
    fn https_is_every_https_origin_and_loopback() {
        for inside in [
            "https://evil.example/",
            "http://localhost:1/",
            "http://127.3.2.1/",
            "http://[::1]:80/",
            "/relative",
        ] {
            assert!(covers(&AllowedOrigins::https(), inside), "{inside}");
        }
        for outside in [
            "http://api.example/",
            "http://127.0.0.1.example/",
            "http://localhost.example/",
            "http://10.0.0.1/",
            "api.example:443",
        ] {
            assert!(!covers(&AllowedOrigins::https(), outside), "{outside}");
        }
        assert!(covers(&AllowedOrigins::any_insecure(), "http://evil.example/"));
        assert!(!covers(&AllowedOrigins::origins::<[&str; 0]>([]).unwrap(), "https://ws.api.video/"));
    }

    /// An allowed origin is not valid: the error has a hint.
    #[test]
    fn invalid_origin_error_has_hint() {
        for (wrong, hint) in [
            ("ws.api.video", "http or https"),
            ("https://", "such as https"),
            ("https://ws.api.video/videos", "no path"),
            ("https://ws.api.video?key=canary", "no query"),
            ("https://user:canary@ws.api.video", "user name"),
            ("ftp://ws.api.video", "http or https"),
            ("https://bücher.example", "IDNA"),
            ("https://*.api.video", "no wildcards"),
            ("", "such as https"),
        ] {
            match AllowedOrigins::origins([wrong]) {
                Err(Error::InvalidOption(text)) => {
                    assert!(text.contains(hint) && !text.contains("canary"), "{wrong}: {text}");
                }
                other => panic!("{wrong}: {other:?}"),
            }
        }
    }

    /// An allowed origin has a slash at its end, or is the base of an API.
    #[test]
    fn slash_and_base_uri_are_accepted() {
        let uri = |text: &str| text.parse::<Uri>().unwrap();
        for allowed in [
            AllowedOrigins::origins(["https://ws.api.video/"]).unwrap(),
            AllowedOrigins::of(&uri("https://ws.api.video")).unwrap(),
            AllowedOrigins::of(&uri("https://WS.api.video:443/base/v1?page=1")).unwrap(),
        ] {
            assert!(covers(&allowed, "https://ws.api.video/videos"), "{allowed:?}");
            assert!(!covers(&allowed, "https://other.api.video/base/v1"), "{allowed:?}");
        }
        for wrong in
            ["/videos", "ftp://ws.api.video/", "ws.api.video", "https://*.api.video/base", "https://h:99999/"]
        {
            assert!(matches!(AllowedOrigins::of(&uri(wrong)), Err(Error::InvalidOption(_))), "{wrong}");
        }
    }

    /// A URI with a password is shown as an origin.
    #[test]
    fn shown_origin_has_no_secret() {
        let uri: Uri = "https://user:canary@Evil.Example:8443/path?token=canary".parse().unwrap();
        assert_eq!(shown(&uri), "https://evil.example:8443");
    }
}
