//! Every row of the catalogue in `tests/README.md` and every promise in `SECURITY.md` names tests that exist.

use std::{collections::BTreeSet, fs, path::Path};

#[test]
fn catalogue_names_existing_tests() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let catalogue = fs::read_to_string(root.join("tests/README.md")).unwrap();
    let mut rows = BTreeSet::new();
    for line in catalogue.lines() {
        let columns: Vec<_> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        let Some(Ok(row)) = columns.first().map(|number| number.parse::<u32>()) else { continue };
        rows.insert(row);
        let tests: Vec<_> = columns[2].split(", ").map(|name| name.trim_matches('`')).collect();
        assert!(!tests.is_empty());
        for test in tests {
            let (file, name) = test.split_once("::").unwrap_or_else(|| panic!("row {row}: {test}"));
            let text = fs::read_to_string(root.join(file)).unwrap_or_else(|_| panic!("row {row}: {file}"));
            assert!(text.contains(&format!("fn {name}(")), "row {row}: no {name} in {file}");
        }
    }
    assert_eq!(rows, (1..=201).collect());
}

#[test]
fn security_promises_name_existing_tests() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let security = fs::read_to_string(root.join("SECURITY.md")).unwrap();
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
            text = fs::read_to_string(root.join(file)).unwrap_or_else(|_| panic!("no {file}"));
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
