//! [`bearer_challenges`]: the Bearer challenges in a `WWW-Authenticate` field (RFC 9110 §11.6.1), as real servers write it.
//!
//! Fields in use break the grammar: commas are missing, quotes are not closed, bytes are not ASCII. So nothing is an error
//! here. What cannot be read is skipped, and a Bearer challenge before or after it is found.

/// The names and values of a challenge's parameters, names in lower case.
pub(crate) type Params = Vec<(String, String)>;

/// The schemes that are known where the comma before a challenge is missing.
const SCHEMES: [&[u8]; 6] = [b"basic", b"bearer", b"digest", b"dpop", b"negotiate", b"ntlm"];

/// Returns the parameters of each Bearer challenge in this field.
pub(crate) fn bearer_challenges(field: &[u8]) -> Vec<Params> {
    let mut rest = Reader(field);
    let mut found: Vec<Params> = Vec::new();
    let (mut is_bearer, mut is_after_comma) = (false, true);
    while let Some(separated_by_comma) = rest.skip_separators() {
        is_after_comma |= separated_by_comma;
        let name = rest.word();
        if rest.skip_equals() {
            // A token68 ends with the equals sign, and the scheme that follows is no value of it.
            match (rest.value(), found.last_mut()) {
                (Some(value), Some(params)) if is_bearer => params.push((lower_case(name), value)),
                _ => {}
            }
        } else if is_known(name) || (is_after_comma && rest.has_more_of_challenge()) {
            is_bearer = name.eq_ignore_ascii_case(b"bearer");
            found.extend(is_bearer.then(Params::new));
        }
        is_after_comma = false;
    }
    found
}

fn is_known(word: &[u8]) -> bool {
    SCHEMES.iter().any(|scheme| word.eq_ignore_ascii_case(scheme))
}

fn lower_case(name: &[u8]) -> String {
    String::from_utf8_lossy(name).to_ascii_lowercase()
}

/// The part of the field that is not read yet.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// Skips to the next word. Returns whether there was a comma. `None` at the end.
    fn skip_separators(&mut self) -> Option<bool> {
        let length = self.0.iter().position(|byte| !is_separator(*byte) && *byte != b'=')?;
        let (skipped, rest) = self.0.split_at(length);
        self.0 = rest;
        Some(skipped.contains(&b',') || skipped.contains(&b';'))
    }

    /// Takes a scheme, the name of a parameter, or a token68 without its padding.
    fn word(&mut self) -> &'a [u8] {
        let is_end = |byte: &u8| is_separator(*byte) || *byte == b'=';
        let (word, rest) = self.0.split_at(self.0.iter().position(is_end).unwrap_or(self.0.len()));
        self.0 = rest;
        word
    }

    /// Whether white space and something else than a comma follow a word, as they follow the scheme of a challenge.
    fn has_more_of_challenge(&self) -> bool {
        let rest = self.0.trim_ascii_start();
        rest.len() < self.0.len() && rest.first().is_some_and(|byte| !is_separator(*byte))
    }

    /// Skips an equals sign, with white space around it.
    fn skip_equals(&mut self) -> bool {
        let Some(rest) = self.0.trim_ascii_start().strip_prefix(b"=") else { return false };
        self.0 = rest;
        true
    }

    /// Takes the value of a parameter. `None` if another challenge follows.
    fn value(&mut self) -> Option<String> {
        let rest = self.0.trim_ascii_start();
        if let Some((value, after)) = Reader(rest).quoted() {
            self.0 = after;
            return Some(value);
        }
        let length = rest.iter().position(|byte| is_separator(*byte)).unwrap_or(rest.len());
        let (value, after) = rest.split_at(length);
        if value.eq_ignore_ascii_case(b"bearer") && Reader(after).has_more_of_challenge() {
            return None;
        }
        self.0 = after;
        // The quote was not closed.
        Some(String::from_utf8_lossy(value.strip_prefix(b"\"").unwrap_or(value)).into_owned())
    }

    /// Reads a quoted string, if it is closed, and what follows it. A quote inside a word, or before a value, closes
    /// nothing: an earlier one was not closed.
    fn quoted(&self) -> Option<(String, &'a [u8])> {
        let mut value = Vec::new();
        let mut bytes = self.0.strip_prefix(b"\"")?.iter();
        loop {
            match bytes.next()? {
                b'"' => break,
                b'\\' => value.push(*bytes.next()?),
                byte => value.push(*byte),
            }
        }
        let bytes = bytes.as_slice();
        let mut after = Reader(bytes);
        let word = after.word();
        let is_closed = word.is_empty() || is_known(word) || after.skip_equals();
        is_closed.then(|| (String::from_utf8_lossy(&value).into_owned(), bytes))
    }
}

fn is_separator(byte: u8) -> bool {
    byte.is_ascii_whitespace() || matches!(byte, b',' | b';')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(field: &str) -> Vec<String> {
        let shown = |params: Params| {
            let params: Vec<_> = params.into_iter().map(|(name, value)| format!("{name}={value}")).collect();
            params.join(" ")
        };
        bearer_challenges(field.as_bytes()).into_iter().map(shown).collect()
    }

    /// A `WWW-Authenticate` field has any form of the public collection of test cases for HTTP authentication (Julian
    /// Reschke's), for Bearer.
    #[test]
    fn forms_of_public_collection_are_read() {
        for (field, expected) in [
            (r#"Bearer realm="foo""#, &["realm=foo"][..]),
            ("Bearer\r\n realm=\"foo\"", &["realm=foo"]),
            (r#"BEARER REALM="foo""#, &["realm=foo"]),
            ("Bearer realm=foo", &["realm=foo"]),
            (r"Bearer realm=\f\o\o", &[r"realm=\f\o\o"]),
            ("Bearer realm='foo'", &["realm='foo'"]),
            (r#"Bearer realm="foo%20bar""#, &["realm=foo%20bar"]),
            (r#"Bearer , realm="foo""#, &["realm=foo"]),
            (r#"Bearer, realm="foo""#, &["realm=foo"]),
            ("Bearer", &[""]),
            (r#"Bearer realm="foo", realm="bar""#, &["realm=foo realm=bar"]),
            (r#"Bearer realm = "foo""#, &["realm=foo"]),
            (r#"Bearer realm="\f\o\o""#, &["realm=foo"]),
            (r#"Bearer realm="\"foo\"""#, &[r#"realm="foo""#]),
            (r#"Bearer realm="foo", bar="xyz",, a=b,,,c=d"#, &["realm=foo bar=xyz a=b c=d"]),
            (r#"Bearer bar="xyz", realm="foo""#, &["bar=xyz realm=foo"]),
            ("Bearer realm=\"foo-ä\"", &["realm=foo-ä"]),
            (r#"Bearer realm="=?ISO-8859-1?Q?foo-=E4?=""#, &["realm==?ISO-8859-1?Q?foo-=E4?="]),
            (r#"Bearer realm="b", Newauth realm="n""#, &["realm=b"]),
            (r#"Bearer realm="b", Newauth"#, &["realm=b"]),
            (r#"Newauth realm="n", Bearer realm="b""#, &["realm=b"]),
            (r#"Newauth, Bearer realm="b""#, &["realm=b"]),
            (r#",Bearer realm="b""#, &["realm=b"]),
            (r#"Newauth realm="apps", type=1, title="Login to \"apps\"", Bearer realm="b""#, &["realm=b"]),
            (r#"Newauth realm="n", bearer=foo, Bearer realm="b""#, &["realm=b"]),
            (r#"Newauth realm="newauth""#, &[]),
            ("A, B", &[]),
            ("A, Bearer", &[""]),
            ("Bearer, B", &[""]),
            (r#"Bearer foo="realm=other", realm="b""#, &["foo=realm=other realm=b"]),
            (r#"Bearer other="other", realm="b""#, &["other=other realm=b"]),
            (r#"Bearer realm="b"#, &["realm=b"]),
        ] {
            assert_eq!(read(field), expected, "{field}");
        }
        // A character of ISO-8859-1.
        assert_eq!(bearer_challenges(b"Bearer realm=\"\xe4\", error=a")[0][1].1, "a");
    }

    /// A `WWW-Authenticate` field of that collection, for Basic, has a Bearer challenge too.
    #[test]
    fn bearer_is_read_beside_each_form_of_public_collection() {
        const BEARER: &str =
            r#"Bearer error="insufficient_scope", scope="a, b", error_description="größer \"c\"""#;
        const READ: &str = r#"error=insufficient_scope scope=a, b error_description=größer "c""#;
        for (name, other) in [
            ("simplebasic", r#"Basic realm="foo""#),
            ("simplebasiclf", "Basic\r\n realm=\"foo\""),
            ("simplebasicucase", r#"BASIC REALM="foo""#),
            ("simplebasictok", "Basic realm=foo"),
            ("simplebasictokbs", r"Basic realm=\f\o\o"),
            ("simplebasicsq", "Basic realm='foo'"),
            ("simplebasicpct", r#"Basic realm="foo%20bar""#),
            ("simplebasiccomma", r#"Basic , realm="foo""#),
            ("simplebasiccomma2", r#"Basic, realm="foo""#),
            ("simplebasicnorealm", "Basic"),
            ("simplebasic2realms", r#"Basic realm="foo", realm="bar""#),
            ("simplebasicwsrealm", r#"Basic realm = "foo""#),
            ("simplebasicrealmsqc", r#"Basic realm="\f\o\o""#),
            ("simplebasicrealmsqc2", r#"Basic realm="\"foo\"""#),
            ("simplebasicnewparam1", r#"Basic realm="foo", bar="xyz",, a=b,,,c=d"#),
            ("simplebasicnewparam2", r#"Basic bar="xyz", realm="foo""#),
            ("simplebasicrealmutf8", r#"Basic realm="foo-ä""#),
            ("simplebasicrealmrfc2047", r#"Basic realm="=?ISO-8859-1?Q?foo-=E4?=""#),
            ("multibasicunknown", r#"Basic realm="basic", Newauth realm="newauth""#),
            ("multibasicunknownnoparam", r#"Basic realm="basic", Newauth"#),
            ("multibasicunknown2", r#"Newauth realm="newauth", Basic realm="basic""#),
            ("multibasicunknown2np", r#"Newauth, Basic realm="basic""#),
            ("multibasicempty", r#",Basic realm="basic""#),
            (
                "multibasicqs",
                r#"Newauth realm="apps", type=1, title="Login to \"apps\"", Basic realm="simple""#,
            ),
            ("multidisgscheme", r#"Newauth realm="Newauth Realm", basic=foo, Basic realm="Basic Realm""#),
            (
                "the same, of Bearer",
                r#"Newauth realm="Newauth Realm", bearer=foo, Basic realm="Basic Realm""#,
            ),
            ("unknown", r#"Newauth param="value""#),
            ("parametersnotrequired", "A, B"),
            ("disguisedrealm", r#"Basic foo="realm=nottherealm", realm="basic""#),
            ("a disguised challenge", r#"Basic foo="Bearer error=invalid_token", realm="basic""#),
            ("disguisedrealm2", r#"Basic nottherealm="nottherealm", realm="basic""#),
            ("missingquote", r#"Basic realm="basic"#),
            ("token68", "Negotiate YIIKjQ+/=="),
            ("unknown, token68", "Newauth YIIKjQ+/=="),
            ("an empty value", "Basic realm="),
            ("no scheme", r#"realm="basic""#),
            ("no words", r#"= , @[], "", ;"#),
        ] {
            assert_eq!(read(&format!("{other}, {BEARER}")), [READ], "{name}, before");
            // A parameter after it is its own.
            let after = if name == "no scheme" { " realm=basic" } else { "" };
            assert_eq!(read(&format!("{BEARER}, {other}")), [format!("{READ}{after}")], "{name}, after");
            // Without the comma, another scheme may be a word of a value that was not quoted.
            for field in [format!("{other} {BEARER}"), format!("{BEARER} {other}")] {
                let found = read(&field);
                assert!(found.len() == 1 && found[0].starts_with(READ), "{name}: {field}: {found:?}");
            }
        }
    }

    /// A `WWW-Authenticate` field breaks its grammar, as those of real servers do.
    #[test]
    fn broken_field_does_not_hide_challenge() {
        const SCOPE: &str = "error=insufficient_scope";
        for field in [
            r#"Bearer realm="a" error="insufficient_scope" scope="b c""#,
            "Bearer realm=a error=insufficient_scope scope=b",
            r#"Bearer error="insufficient_scope"; scope="b""#,
            r#"Bearer error="insufficient_scope"scope="b""#,
            r#"Bearer error="insufficient_scope", error_description="größer""#,
            r#"Negotiate YIIKjQ+/==, Bearer error="insufficient_scope""#,
            r#"Negotiate YIIKjQ==, NTLM, Bearer error="insufficient_scope""#,
            r#"Negotiate YIIKjQ== Bearer error="insufficient_scope""#,
            r#"Negotiate YIIKjQ= Bearer error="insufficient_scope""#,
            r#"Negotiate Bearer error="insufficient_scope""#,
            r#"Basic realm="a" Bearer error="insufficient_scope""#,
            r#"Basic realm="a, Bearer error="insufficient_scope""#,
            r#"Basic realm=, Bearer error="insufficient_scope""#,
            r#"Basic "a", Bearer error="insufficient_scope""#,
            r#"= , @[], "a, Bearer error="insufficient_scope""#,
            r#"Bearer error="insufficient_scope", Basic realm="a"#,
            r#"Bearer error="insufficient_scope", ="b", "c" Digest"#,
            r#"Bearer error="insufficient_scope"#,
            r#"Bearer error_description=token was not enough, error=insufficient_scope"#,
            r#"Bearer error_description=not enough, sorry, error=insufficient_scope"#,
            r#"Bearer error_description="say "hi, you", error="insufficient_scope""#,
            r#"Bearer error_description="a "b" c, d", error="insufficient_scope""#,
            r#"Bearer realm="a", foo, error="insufficient_scope""#,
            r#"Bearer realm="a", "x", @, /, error="insufficient_scope""#,
            r#"Basic realm="a"Bearer error="insufficient_scope""#,
            r#"Custom abc=Bearer error="insufficient_scope""#,
            r#"Bearer error=insufficient_scope Digest error=other"#,
            r#"Bearer realm="a", Bearer error="insufficient_scope""#,
        ] {
            let found = read(field);
            assert!(found.iter().any(|params| params.contains(SCOPE)), "{field}: {found:?}");
            assert!(!found.iter().any(|params| params.contains("other")), "{field}: {found:?}");
        }
        for field in [
            r#"Basic realm="a, Bearer error=\"insufficient_scope\"""#,
            r#"Basic realm="Bearer error=insufficient_scope""#,
            r#"Basic realm="a", error="insufficient_scope""#,
            r#"Bearer realm="a", Basic error="insufficient_scope""#,
            r#"Bearer error_description="error=insufficient_scope""#,
            "",
        ] {
            assert!(!read(field).iter().any(|params| params.starts_with(SCOPE)), "{field}");
        }
    }
}
