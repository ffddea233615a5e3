//! What the compiler says to the mistakes that are made first, and that it names the remedy: `tests/ui/*.stderr`.
//!
//! Every release of rustc words its errors a little differently, so the record is compared with one release's. After a
//! change of ours: `TRYBUILD=overwrite cargo test --test compile_fail`.

#[rustversion::stable(1.95)]
#[test]
fn compiler_names_remedy() {
    let cases = trybuild::TestCases::new();
    cases.compile_fail("tests/ui/*.rs");
    if cfg!(not(feature = "reqwest")) {
        cases.compile_fail("tests/ui/without_reqwest/*.rs");
    }
}

/// The records are written by the compiler: that each of them says what to do is what counts.
#[test]
fn each_record_has_its_remedy() {
    for (record, remedy) in [
        (include_str!("ui/inner_service_is_not_clone.stderr"), ".buffer(1024)"),
        (include_str!("ui/body_is_not_clone.stderr"), "`.buffered(limit)`"),
        (include_str!("ui/fixed_body_under_buffered.stderr"), "`.replay_with(limit, InnerBody::new)`"),
        (include_str!("ui/wrong_layer_order.stderr"), "go outside of `BearerAuthLayer`"),
        (include_str!("ui/without_reqwest/missing_feature.stderr"), "feature = \"reqwest\""),
    ] {
        assert!(record.contains(remedy), "{remedy}");
    }
}
