#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::www_authenticate(data));
