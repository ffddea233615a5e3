//! `tests/CATALOGUE.md` is generated from the doc comments of all tests, and the list of features from `Cargo.toml`.
//! `SECURITY.md` names tests that exist, and the pages for a new user stay short.

use std::{
    collections::BTreeSet,
    env,
    fmt::Write,
    fs,
    path::{Path, PathBuf},
};

const HEAD: &str = "\
# The catalogue of tests

Each test with the first sentence of its doc comment: the fault that it covers, or what it shows. This file is generated
from the tests: `TEST_CATALOGUE=write cargo test --test suite catalogue`.
";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Adds all Rust files below a folder.
fn add_sources(folder: &Path, sources: &mut BTreeSet<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            add_sources(&path, sources);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            sources.insert(path);
        }
    }
}

/// The first sentence of a comment.
fn first_sentence<'a>(comment: impl IntoIterator<Item = &'a str>) -> String {
    let lines: Vec<_> = comment.into_iter().map(str::trim).take_while(|line| !line.is_empty()).collect();
    let mut text = lines.join(" ").replace("[`", "`");
    // The links of the documentation lead nowhere in the catalogue.
    while let Some(start) = text.find("`](") {
        let end = start + text[start..].find(')').unwrap();
        text.replace_range(start + 1..=end, "");
    }
    let text = text.replace("`]", "`");
    let end = [". ", "? "].iter().filter_map(|end| text.find(end)).min();
    end.map_or(text.clone(), |end| text[..=end].to_owned())
}

/// Returns the tests of a file, each with the first sentence of its doc comment.
fn tests_of(source: &str) -> Vec<(&str, String)> {
    let (mut tests, mut comment, mut is_test, mut attributes) = (Vec::new(), Vec::new(), false, 0);
    for line in source.lines().map(str::trim) {
        let function = line.strip_prefix("async ").unwrap_or(line).strip_prefix("fn ");
        if let Some(text) = line.strip_prefix("///") {
            comment.push(text);
        } else if line.starts_with("#[") {
            let marks_test = line.starts_with("#[test]") || line.starts_with("#[tokio::test");
            attributes += usize::from(marks_test);
            is_test |= marks_test;
        } else {
            if let Some(function) = function.filter(|_| is_test) {
                tests.push((function.split('(').next().unwrap(), first_sentence(comment.drain(..))));
            }
            (comment, is_test) = (Vec::new(), false);
        }
    }
    assert_eq!(tests.len(), attributes, "a test was not found: {tests:?}");
    tests
}

/// The catalogue differs from the tests, or a test has no doc comment.
#[test]
fn catalogue_is_that_of_the_tests() {
    let mut sources = BTreeSet::new();
    for folder in ["src", "tests", "crates"] {
        add_sources(&root().join(folder), &mut sources);
    }
    let mut catalogue = HEAD.to_owned();
    for path in sources {
        let source = fs::read_to_string(&path).unwrap();
        let tests = tests_of(&source);
        if tests.is_empty() {
            continue;
        }
        let path = path.strip_prefix(root()).unwrap().to_string_lossy().replace('\\', "/");
        let about = source.lines().map_while(|line| line.strip_prefix("//!"));
        write!(catalogue, "\n## `{path}`\n\n{}\n\n", first_sentence(about)).unwrap();
        for (name, fault) in tests {
            assert!(!fault.is_empty(), "{path}::{name} has no doc comment, which says the fault");
            writeln!(catalogue, "- `{name}`: {fault}").unwrap();
        }
    }
    expect_generated("tests/CATALOGUE.md", &catalogue);
}

/// Writes the file, if the environment says so, and checks that it has this text.
fn expect_generated(path: &str, text: &str) {
    let file = root().join(path);
    if env::var_os("TEST_CATALOGUE").is_some_and(|what| what == "write") {
        fs::write(&file, text).unwrap();
    }
    let recorded = fs::read_to_string(&file).unwrap_or_default();
    let differs = text.lines().zip(recorded.lines()).find(|(now, before)| now != before);
    assert!(
        text == recorded,
        "{path}: run TEST_CATALOGUE=write cargo test --test suite catalogue; the first difference: {differs:?}"
    );
}

/// A feature is not in the documentation, or is described otherwise than in `Cargo.toml`.
#[test]
fn features_are_those_of_the_manifest() {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let section = manifest.split("[features]\n").nth(1).unwrap().split("\n\n").next().unwrap();
    let (mut list, mut comment, mut default) = (String::new(), "", "");
    for line in section.lines() {
        match line.split_once(" = ") {
            _ if line.starts_with("# ") => comment = &line[2..],
            Some(("default", features)) => default = features,
            Some((feature, _)) => {
                assert!(!comment.is_empty(), "{feature} has no comment");
                let mark = if default.contains(&format!("\"{feature}\"")) { ", on by default" } else { "" };
                writeln!(list, "- `{feature}`{mark}: {}", std::mem::take(&mut comment)).unwrap();
            }
            None => panic!("{line}"),
        }
    }
    expect_generated("src/guide/features.md", &list);
}

/// A newcomer has to read for long before the first program, and before the terms.
#[test]
fn first_pages_are_short() {
    let read = |path: &str| fs::read_to_string(root().join(path)).unwrap();
    let words =
        |text: &str| text.split_whitespace().filter(|word| word.contains(char::is_alphanumeric)).count();
    let readme = read("README.md");
    assert!(readme.lines().count() <= 90, "README.md has {} lines", readme.lines().count());
    assert!(readme.lines().position(|line| line.starts_with("```rust")).unwrap() < 25);
    assert!(readme.lines().all(|line| line.chars().count() <= 120), "a line of README.md is too long");
    let library = read("src/lib.rs");
    let front: String =
        library.lines().filter_map(|line| Some(line.strip_prefix("//!")?.to_owned() + "\n")).collect();
    let front = words(&front) + words(&read("src/guide/features.md"));
    assert!(front <= 600, "the front page has {front} words");
    let concepts = words(&read("src/guide/concepts.md"));
    assert!(concepts <= 500, "the page of the concepts has {concepts} words");
}

/// A promise in `SECURITY.md` names a test that does not exist.
#[test]
fn security_promises_name_existing_tests() {
    let security = fs::read_to_string(root().join("SECURITY.md")).unwrap();
    let promises = security.split("\n## What is not promised").next().unwrap();
    let (mut checked, mut text) = (0, String::new());
    for quoted in promises
        .lines()
        .filter(|line| line.starts_with("| "))
        .flat_map(|line| line.split('`').skip(1).step_by(2))
    {
        // Either `file::name`, or `file`, or the name of another test in the last file.
        let (file, name) = quoted.split_once("::").unwrap_or(("", quoted));
        let file = if quoted.ends_with(".rs") { quoted } else { file };
        if file.ends_with(".rs") {
            text = fs::read_to_string(root().join(file)).unwrap_or_else(|_| panic!("no {file}"));
        }
        let is_name = name.len() > 12
            && name.bytes().all(|byte| byte.is_ascii_lowercase() || b"_0123456789".contains(&byte));
        if is_name {
            assert!(text.contains(&format!("fn {name}(")), "no {name}");
            checked += 1;
        }
    }
    assert!(checked > 15, "{checked}");
}

/// The text of an error names a function, which a program's user does not know.
#[test]
fn error_texts_name_no_function() {
    let mut sources = BTreeSet::new();
    for folder in ["src", "crates/tower-bearer-store/src"] {
        add_sources(&root().join(folder), &mut sources);
    }
    let names_function = |text: &str| {
        let is_name = |rest: &str| rest.starts_with(|char: char| char.is_ascii_lowercase());
        let mut paths = text.split("::").skip(1);
        paths.any(is_name) || text.contains("()")
    };
    for path in sources {
        let source = fs::read_to_string(&path).unwrap();
        let code = source.split("#[cfg(test)]").next().unwrap().lines().map(str::trim);
        // The compiler shows these.
        let is_text = |line: &&str| {
            !["//", "note = ", "label = ", "message = ", "`."].iter().any(|start| line.starts_with(start))
        };
        for line in code.filter(is_text) {
            let line = line.replace("\\\"", "");
            let texts = line.split('"').skip(1).step_by(2);
            assert!(!texts.into_iter().any(names_function), "{}: {line}", path.display());
        }
    }
}

/// A recipe does not say which crates and features it needs.
#[test]
fn recipes_list_their_dependencies() {
    for (page, least) in
        [("recipes.md", 10), ("without_tower_clients.md", 6), ("oauth2.md", 6), ("oauth2_sdks.md", 2)]
    {
        // The first heading may be the first line.
        let page = "\n".to_owned() + &fs::read_to_string(root().join("src/guide").join(page)).unwrap();
        // The lines of code are between the fences.
        let text: String = page.split("```").step_by(2).collect();
        let sections = text.split("\n# ").skip(1).filter(|section| !section.starts_with("Recipes\n"));
        let sections: Vec<_> = sections.collect();
        assert!(sections.len() >= least, "{}", sections.len());
        for section in sections {
            let mut lines = section.lines();
            let heading = lines.next().unwrap();
            assert!(lines.nth(1).unwrap().starts_with("Dependencies: "), "{heading}");
        }
    }
}

/// A file of the sources grows until it has more than one thing.
#[test]
fn source_files_are_short() {
    let mut sources = BTreeSet::new();
    for folder in ["src", "crates/tower-bearer-store/src", "crates/tower-bearer-testing/src"] {
        add_sources(&root().join(folder), &mut sources);
    }
    for path in sources {
        let lines = fs::read_to_string(&path).unwrap().lines().count();
        assert!(lines <= 400, "{} has {lines} lines", path.display());
    }
}
