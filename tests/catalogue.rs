//! The catalogue of faults in `tests/README.md` is whole, and names tests that are there.

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
    assert_eq!(rows, (1..=73).collect());
}
