//! `Retry-After`: how long a server asks its clients to wait.

use std::time::{Duration, SystemTime};

use http::{HeaderMap, header::RETRY_AFTER};

/// Returns the delay in `Retry-After`: seconds, or an HTTP date (RFC 9110 §10.2.3).
///
/// Any other value is ignored. The provider limits the delay.
pub(crate) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let date = || {
        let at = httpdate::parse_http_date(text(headers, RETRY_AFTER.as_str())?).ok()?;
        Some(at.duration_since(SystemTime::now()).unwrap_or_default())
    };
    header_seconds(headers, RETRY_AFTER.as_str()).or_else(date)
}

/// Returns the value of a header that contains whole seconds. Any other value is ignored.
pub(crate) fn header_seconds(headers: &HeaderMap, name: &str) -> Option<Duration> {
    text(headers, name)?.parse().ok().map(Duration::from_secs)
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok().map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(value: &str) -> Option<Duration> {
        retry_after(&[(RETRY_AFTER, value.parse().unwrap())].into_iter().collect())
    }

    /// `Retry-After` is a number of seconds, a date, or something else.
    #[test]
    fn reads_seconds_and_dates_only() {
        assert_eq!(asked(" 120 "), Some(Duration::from_secs(120)));
        assert_eq!(asked(&u64::MAX.to_string()), Some(Duration::from_secs(u64::MAX)));
        assert_eq!(asked("Wed, 21 Oct 2015 07:28:00 GMT"), Some(Duration::ZERO));
        let later = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(1000));
        let asked_for = asked(&later).unwrap();
        assert!((990..=1000).contains(&asked_for.as_secs()), "{asked_for:?}");
        for nonsense in ["", "soon", "-1", "1.5", "99999999999999999999", "Wed, 99 Oct 2015 07:28:00 GMT"] {
            assert_eq!(asked(nonsense), None, "{nonsense:?}");
        }
    }
}
