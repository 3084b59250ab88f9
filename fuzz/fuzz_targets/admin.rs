//! libFuzzer on `pageferry_tests::fuzz`, target `admin`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| (pageferry_tests::fuzz::by_name("admin").run)(bytes));
