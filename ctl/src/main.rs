//! The binary `pageferry`.
#![forbid(unsafe_code)]

fn main() {
    if std::env::args().nth(1).as_deref() == Some("guest-init") {
        pageferry_ctl::lab::guest_program::run();
    }
}
