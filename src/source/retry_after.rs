//! How long an answer asks to be left alone: `Retry-After`, and api.video's own header where that is missing.

use std::time::{Duration, SystemTime};

use http::{HeaderMap, StatusCode, header::RETRY_AFTER};

/// RFC 9110 §10.2.3: seconds, or an HTTP date. api.video's 429 says it in seconds, in a header of its own.
///
/// Anything else is ignored. The provider clamps what is asked for.
pub(super) fn retry_after(status: StatusCode, headers: &HeaderMap) -> Option<Duration> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok()).map(str::trim);
    let seconds = |text: &str| text.parse().ok().map(Duration::from_secs);
    let date = |text: &str| {
        let at = httpdate::parse_http_date(text).ok()?;
        Some(at.duration_since(SystemTime::now()).unwrap_or_default())
    };
    text(RETRY_AFTER.as_str()).and_then(|text| seconds(text).or_else(|| date(text))).or_else(|| {
        (status == StatusCode::TOO_MANY_REQUESTS)
            .then(|| text("x-ratelimit-retry-after").and_then(seconds))
            .flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(status: u16, headers: &[(&'static str, &str)]) -> Option<Duration> {
        let headers =
            headers.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect();
        retry_after(StatusCode::from_u16(status).unwrap(), &headers)
    }

    #[test]
    fn reads_seconds_and_dates_only() {
        assert_eq!(asked(503, &[("retry-after", " 120 ")]), Some(Duration::from_secs(120)));
        assert_eq!(
            asked(503, &[("retry-after", &u64::MAX.to_string())]),
            Some(Duration::from_secs(u64::MAX))
        );
        assert_eq!(asked(503, &[("retry-after", "Wed, 21 Oct 2015 07:28:00 GMT")]), Some(Duration::ZERO));
        let later = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(1000));
        let asked_for = asked(503, &[("retry-after", &later)]).unwrap();
        assert!((990..=1000).contains(&asked_for.as_secs()), "{asked_for:?}");
        for nonsense in ["", "soon", "-1", "1.5", "99999999999999999999", "Wed, 99 Oct 2015 07:28:00 GMT"] {
            assert_eq!(asked(503, &[("retry-after", nonsense)]), None, "{nonsense:?}");
        }
    }

    #[test]
    fn rate_limit_header_counts_for_429() {
        let rate_limit = ("x-ratelimit-retry-after", "7");
        assert_eq!(asked(429, &[rate_limit]), Some(Duration::from_secs(7)));
        assert_eq!(asked(429, &[rate_limit, ("retry-after", "3")]), Some(Duration::from_secs(3)));
        assert_eq!(asked(429, &[rate_limit, ("retry-after", "soon")]), Some(Duration::from_secs(7)));
        assert_eq!(asked(503, &[rate_limit]), None);
    }
}
