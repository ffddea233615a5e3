//! The compiler errors of common mistakes name the remedy. `tests/ui/*.stderr` has the recorded errors.
//!
//! The text of an error differs between releases of rustc, so only one release is compared with the record. After a
//! change of this crate, `TRYBUILD=overwrite cargo test --test compile_fail` records the errors again.

#[rustversion::stable(1.95)]
#[test]
fn compiler_names_remedy() {
    let cases = trybuild::TestCases::new();
    cases.compile_fail("tests/ui/*.rs");
    if cfg!(not(feature = "reqwest")) {
        cases.compile_fail("tests/ui/without_reqwest/*.rs");
    }
}

/// The compiler writes the records, so this test checks that each of them contains its remedy.
#[test]
fn each_record_has_its_remedy() {
    for (record, remedy) in [
        (include_str!("ui/inner_service_is_not_clone.stderr"), ".buffer(1024)"),
        (include_str!("ui/body_is_not_clone.stderr"), "`.buffered(limit)`"),
        (include_str!("ui/service_ext_as_function.stderr"), "`.buffered(limit)`"),
        (include_str!("ui/fixed_body_under_buffered.stderr"), "`.replay_with(limit, InnerBody::new)`"),
        (include_str!("ui/wrong_layer_order.stderr"), "go outside of `BearerAuthLayer`"),
        (include_str!("ui/without_reqwest/missing_feature.stderr"), "feature = \"reqwest\""),
    ] {
        assert!(record.contains(remedy), "{remedy}");
    }
}
