//! What the compiler says when a body does not fit: `tests/ui/*.stderr`.
//!
//! Every release of rustc words its errors a little differently, so the record is compared with one release's. After a
//! change of ours: `TRYBUILD=overwrite cargo test --test compile_fail`.

#[rustversion::stable(1.95)]
#[test]
fn the_compiler_says_what_to_do_about_a_body_that_cannot_be_sent_twice() {
    trybuild::TestCases::new().compile_fail("tests/ui/*.rs");
}
