//! Checks of the options of sources.

use std::{ops::RangeBounds, time::Duration};

use crate::error::{Seconds, SourceError};

pub(crate) const SECOND: Duration = Duration::from_secs(1);
pub(crate) const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Checks that a duration is in its range, which `accepted` describes.
///
/// # Errors
///
/// [`SourceError::configuration`].
pub(crate) fn check_duration(
    option: &str,
    value: Duration,
    range: impl RangeBounds<Duration>,
    accepted: &str,
) -> Result<(), SourceError> {
    match range.contains(&value) {
        true => Ok(()),
        false => {
            Err(SourceError::configuration(format!("{option} must be {accepted}, got {}", Seconds(value))))
        }
    }
}

/// Checks a text that goes into a request. A line break at the end of a file is easily taken along.
///
/// # Errors
///
/// [`SourceError::configuration`], without the text, which may be a secret.
pub(crate) fn check_text(option: &str, text: &str) -> Result<(), SourceError> {
    let is_blank = |char: char| char.is_whitespace() || char.is_control();
    if text.starts_with(is_blank) || text.ends_with(is_blank) {
        return Err(SourceError::configuration(format!(
            "{option} must not begin or end with white space or a control character: trim it"
        )));
    }
    Ok(())
}
