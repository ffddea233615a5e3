//! The links to the documentation of this project's packages lead to pages and items that exist.
//!
//! rustdoc checks the links within a package. Those from the guide to the other packages, and those of README.md, are URLs.

use std::{
    fs,
    path::{Path, PathBuf},
};

const DOCS: &str = "https://docs.rs/";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Adds the files with this extension, in this folder and beneath it.
fn add_files(folder: &Path, extensions: &[&str], files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            add_files(&path, extensions, files);
        } else if path.extension().is_some_and(|found| extensions.iter().any(|other| found == *other)) {
            files.push(path);
        }
    }
}

fn text_of(folder: &Path, extensions: &[&str]) -> String {
    let mut files = Vec::new();
    add_files(folder, extensions, &mut files);
    files.iter().map(|file| fs::read_to_string(file).unwrap()).collect()
}

/// The anchor of a heading.
fn anchor(heading: &str) -> String {
    let kept = heading.chars().filter(|char| char.is_alphanumeric() || " -_".contains(*char));
    kept.collect::<String>().trim().to_lowercase().replace(' ', "-")
}

/// Says why a URL such as `tower-bearer-store/latest/tower_bearer_store/struct.FileStore.html#locks` leads nowhere.
fn check(url: &str) -> Result<(), &'static str> {
    let (page, fragment) = url.split_once('#').unwrap_or((url, ""));
    let mut parts = page.trim_end_matches('/').split('/');
    let package = parts.next().unwrap();
    let folder = match package {
        "tower-bearer" => root().join("src"),
        _ => root().join("crates").join(package).join("src"),
    };
    if !folder.is_dir() {
        return Err("there is no such package");
    }
    let parts: Vec<_> = parts.skip(1).collect();
    let text = text_of(&folder, &["rs", "md"]);
    let Some((module, modules)) = parts.split_first() else { return Ok(()) };
    if *module != package.replace('-', "_") {
        return Err("the crate has another name");
    }
    for part in modules.iter().filter(|part| **part != "index.html") {
        let found = match part.strip_suffix(".html").and_then(|item| item.split_once('.')) {
            Some((kind, name)) => [" ", "<", "(", "{", ":", ";"]
                .iter()
                .any(|end| text.contains(&format!("pub {kind} {name}{end}"))),
            None => text.contains(&format!("pub mod {part}")),
        };
        if !found {
            return Err("there is no such item");
        }
    }
    let found = match fragment.split_once('.') {
        Some(("method", name)) => {
            text.contains(&format!("fn {name}(")) || text.contains(&format!("fn {name}<"))
        }
        _ => {
            let headings = text.lines().map(|line| line.trim().trim_start_matches(['/', '!', ' ']));
            fragment.is_empty()
                || headings.filter(|line| line.starts_with('#')).any(|line| anchor(line) == fragment)
        }
    };
    if found { Ok(()) } else { Err("the page has no such anchor") }
}

/// A link from one package to an item of another, which was renamed.
#[test]
fn links_to_own_packages_lead_somewhere() {
    let mut files: Vec<_> =
        ["README.md", "SECURITY.md", "CHANGELOG.md", "BENCHMARKING.md", "CONTRIBUTING.md"]
            .map(|file| root().join(file))
            .into();
    for folder in ["src", "crates", "examples"] {
        add_files(&root().join(folder), &["rs", "md"], &mut files);
    }
    let (mut checked, mut wrong) = (0, Vec::new());
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        let ends = |char: char| char.is_whitespace() || ")>\"`,".contains(char);
        for url in text.split(DOCS).skip(1).map(|rest| rest.split(ends).next().unwrap()) {
            if url.starts_with("tower-bearer") {
                checked += 1;
                if let Err(why) = check(url) {
                    wrong.push(format!("{}: {DOCS}{url}: {why}", file.display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(checked > 20, "{checked}");
}

/// The check itself: a wrong package, crate, item or anchor.
#[test]
fn wrong_links_are_found() {
    let store = "tower-bearer-store/latest/tower_bearer_store";
    for (url, why) in [
        ("tower-bearer-stores/latest/tower_bearer_stores", "there is no such package"),
        ("tower-bearer-store/latest/tower_bearer/struct.FileStore.html", "the crate has another name"),
        (&format!("{store}/struct.FilesStore.html"), "there is no such item"),
        (&format!("{store}/struct.FileStore.html#method.with_names"), "the page has no such anchor"),
        (&format!("{store}/struct.FileStore.html#lock"), "the page has no such anchor"),
    ] {
        assert_eq!(check(url), Err(why), "{url}");
    }
    assert_eq!(check(&format!("{store}/struct.FileStore.html#locks")), Ok(()));
}
