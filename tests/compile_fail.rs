//! The compiler errors of common mistakes name the mistake and its remedy.
//!
//! Each file in `tests/ui` has one mistake, except `remedies.rs`, which compiles. rustc checks these files against the
//! libraries that this test was built with. Only texts of this crate are compared, so any release of rustc will do.

use std::{
    collections::BTreeSet,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

/// The crates that the files use.
const CRATES: [&str; 6] = ["bytes", "http", "http_body_util", "hyper_util", "tower", "tower_bearer"];

/// For each file, the texts that its error contains: the mistake, and the remedy.
const MISTAKES: [(&str, [&str; 2]); 6] = [
    (
        "body_is_not_clone",
        [
            "this body cannot be sent again after a 401 by `tower_bearer::replay::Cloned`",
            "`.buffered(limit)`",
        ],
    ),
    (
        "fixed_body_under_buffered",
        [
            "this inner service takes another body, or does not answer with `http::Response`",
            "`.replay_with(limit, InnerBody::new)`",
        ],
    ),
    ("inner_service_is_not_clone", ["which is not `Clone`", ".buffer(1024)"]),
    // The error that names the feature comes from the compiler.
    ("missing_feature", ["`tower_bearer::ReqwestService`", "feature = \"reqwest\""]),
    (
        "service_ext_as_function",
        [
            "this body cannot be sent again after a 401 by `tower_bearer::replay::Cloned`",
            "`.buffered(limit)`",
        ],
    ),
    (
        "wrong_layer_order",
        [
            "this inner service takes another body, or does not answer with `http::Response`",
            "go outside of `BearerAuthLayer`",
        ],
    ),
];

/// The library of a crate that this test was built with, by cargo's records of what it has built: the folder also has those
/// of other features.
fn library(program: &Path, name: &str) -> PathBuf {
    let libraries = program.parent().unwrap();
    let records = libraries.with_file_name(".fingerprint");
    let (_, hash) = program.file_stem().unwrap().to_str().unwrap().rsplit_once('-').unwrap();
    let own = records.join(format!("tower-bearer-{hash}/test-integration-test-compile_fail.json"));
    let own: Value = serde_json::from_slice(&fs::read(own).unwrap()).unwrap();
    let mut dependencies = own["deps"].as_array().unwrap().iter();
    let built = dependencies.find(|of| of[1] == name).and_then(|of| of[3].as_u64()).unwrap();
    let built: String = built.to_le_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
    let is_built =
        |record: &Path| fs::read_to_string(record.join(format!("lib-{name}"))).is_ok_and(|of| of == built);
    let record =
        fs::read_dir(&records).unwrap().map(|entry| entry.unwrap().path()).find(|record| is_built(record));
    let record = record.unwrap_or_else(|| panic!("no library of {name} in {}", libraries.display()));
    let (_, hash) = record.to_str().unwrap().rsplit_once('-').unwrap();
    libraries.join(format!("lib{name}-{hash}.rlib"))
}

/// Compiles `tests/ui/<name>.rs`. Returns the errors if it does not compile.
fn compile(name: &str) -> Result<(), String> {
    let program = env::current_exe().unwrap();
    let libraries = program.parent().unwrap();
    let output = env::temp_dir().join(format!("tower-bearer-{}-{name}", std::process::id()));
    let result = Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()))
        .args(["--edition", "2024", "--crate-type", "bin", "--emit", "metadata", "--color", "never"])
        // As wide as needed, so that the compiler abbreviates no text.
        .args(["--diagnostic-width", "1000", "--out-dir"])
        .arg(&output)
        .arg("-L")
        .arg(format!("dependency={}", libraries.display()))
        .args(CRATES.iter().flat_map(|name| {
            ["--extern".to_owned(), format!("{name}={}", library(&program, name).display())]
        }))
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/ui/{name}.rs")))
        .output()
        .unwrap();
    let _ = fs::remove_dir_all(output);
    let errors = String::from_utf8(result.stderr).unwrap();
    if result.status.success() { Ok(()) } else { Err(errors) }
}

/// A compiler error leads nowhere: it does not name the mistake, or not the remedy.
#[test]
fn compiler_names_remedy() {
    for (name, texts) in MISTAKES {
        if name == "missing_feature" && cfg!(feature = "reqwest") {
            continue;
        }
        let Err(errors) = compile(name) else { panic!("{name} compiles") };
        for text in texts {
            assert!(errors.contains(text), "{name}: no '{text}' in: {errors}");
        }
    }
}

/// A remedy that an error names does not compile either.
#[test]
fn remedies_compile() {
    assert_eq!(compile("remedies"), Ok(()));
}

/// A mistake in `tests/ui` is not tested.
#[test]
fn each_file_is_tested() {
    let ui = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/ui");
    let files: BTreeSet<_> = fs::read_dir(ui).unwrap().map(|file| file.unwrap().file_name()).collect();
    let tested = MISTAKES.iter().map(|(name, _)| *name).chain(["remedies"]);
    assert_eq!(files, tested.map(|name| format!("{name}.rs").into()).collect());
}
