//! [`stated_code`]: which error code the texts of a response state, in the words of many servers.

use std::borrow::Cow;

use http::StatusCode;

use super::verdict::{codes, is_outage};

/// What a server says does not work: the nouns, and the code for it.
const NOUNS: [(&str, &str); 2] = [
    ("refresh_token grant token", "invalid_refresh_token"),
    ("client client_id client_secret client_credentials", "invalid_client"),
];

/// The words before or after a noun that say so.
const NEGATIONS: &str =
    "bad deleted expired inactive incorrect invalid reuse reused revoked unknown used wrong";

/// The words that say so after `not` or `no longer`.
const AFFIRMATIONS: &str = "active exist found known recognized valid";

/// The words that change nothing, as in "the provided refresh token has already been used", "missing or unknown refresh
/// token", and the name `InvalidGrantException`.
const FILLERS: &str =
    "a already an and been does exception given has is missing or provided supplied the was your";

/// The maximum length of a text that is a code or like one, in bytes.
const MAX_TEXT: usize = 128;

/// Returns the code that a response with this status states in one of `texts`. A code itself has precedence over a text that
/// is [like](like_code) one, which is no evidence in an outage.
pub(super) fn stated_code(texts: &[Cow<'_, str>], status: StatusCode) -> Option<&'static str> {
    let is_code = |text: &str| codes().find(|code| code.eq_ignore_ascii_case(text.trim()));
    let like = || texts.iter().filter(|_| !is_outage(status)).find_map(|text| like_code(text));
    texts.iter().find_map(|text| is_code(text)).or_else(like)
}

/// Returns the code that a text is like, such as `Invalid Grant`. Of a code with a prefix or with prose behind it, such as
/// `unauthorized.bad_refresh_token` and `invalid_client: it is disabled`, the code alone counts too.
fn like_code(text: &str) -> Option<&'static str> {
    let code = text.split_once(": ").map_or(text, |(code, _)| code).trim();
    let code = code.rsplit(['.', ':', '/']).next().filter(|_| !code.contains(' '));
    let texts = [Some(text), code].into_iter().flatten().filter(|text| text.len() <= MAX_TEXT);
    texts.map(|text| (words(text), text.contains(' '))).find_map(|(words, is_prose)| {
        let says = |word: &str| words.iter().any(|other| word.eq_ignore_ascii_case(other));
        // In prose, it may be a token of another kind.
        let is_other = is_prose && says("token") && !says("refresh");
        let code = || codes().find(|code| is(&words, code)).or_else(|| negated(&words));
        if is_other { None } else { code() }
    })
}

/// Returns the code for a noun and its negation, with nothing else beside them.
fn negated(words: &[&str]) -> Option<&'static str> {
    let words: Vec<_> = words.iter().copied().filter(|word| !has(FILLERS, word)).collect();
    let is_negated = |noun: &str| {
        let len = noun.split('_').count();
        words.len() > len && {
            let (first, after) = words.split_at(len);
            let (before, last) = words.split_at(words.len() - len);
            (is(first, noun) && negate(after)) || (is(last, noun) && negate(before))
        }
    };
    NOUNS.into_iter().find(|(nouns, _)| nouns.split(' ').any(is_negated)).map(|(_, code)| code)
}

/// Splits a text into words, such as `bad_refresh_token`, `Bad Request` and `invalidGrant`.
fn words(text: &str) -> Vec<&str> {
    let mut words = Vec::new();
    for mut rest in text.split(|char: char| !char.is_alphanumeric()) {
        let is_end = |pair: &[u8]| !pair[0].is_ascii_uppercase() && pair[1].is_ascii_uppercase();
        while let Some(end) = rest.as_bytes().windows(2).position(is_end) {
            words.push(&rest[..=end]);
            rest = &rest[end + 1..];
        }
        words.push(rest);
    }
    words.retain(|word| !word.is_empty());
    words
}

/// Whether these are the words of `name`, which are separated by `_`, in any case.
fn is(words: &[&str], name: &str) -> bool {
    words.len() == name.split('_').count()
        && words.iter().zip(name.split('_')).all(|(word, other)| word.eq_ignore_ascii_case(other))
}

fn has(list: &str, word: &str) -> bool {
    list.split(' ').any(|other| word.eq_ignore_ascii_case(other))
}

/// Whether there are words, and all of them are negations.
fn negate(words: &[&str]) -> bool {
    let (list, rest) = match words {
        [no, longer, rest @ ..] if is(&[no, longer], "no_longer") => (AFFIRMATIONS, rest),
        [not, rest @ ..] if has("not", not) => (AFFIRMATIONS, rest),
        rest => (NEGATIONS, rest),
    };
    rest.split_first().is_some_and(|(word, rest)| has(list, word) && (rest.is_empty() || negate(rest)))
}
