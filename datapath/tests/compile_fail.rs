//! What the types forbid: programs that misuse leases don't compile, and for the right reason.

#[path = "../src/testing.rs"]
#[allow(dead_code)]
mod testing;

/// The compiler whose messages stand beside the programs.
const COMPILER: &str = "rustc 1.95.";

#[test]
fn leases_cannot_be_misused() {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let version = std::process::Command::new(rustc).arg("--version").output().unwrap().stdout;
    let version = String::from_utf8_lossy(&version);
    if !version.starts_with(COMPILER) {
        // The lease's own documentation has examples that must not compile, for any compiler.
        return testing::skip("compile_fail", &format!("messages of {COMPILER}x, not {version}"));
    }
    trybuild::TestCases::new().compile_fail("tests/compile_fail/*.rs");
}
