//! libFuzzer on `pageferry_tests::fuzz`, target `bitmap`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| (pageferry_tests::fuzz::by_name("bitmap").run)(bytes));
