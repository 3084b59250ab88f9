//! What crosses crates: the two agents as their users start them, around the laboratory of
//! `pageferry_ctl::lab`.
#![forbid(unsafe_code)]

pub mod agents;
pub mod fuzz;
pub mod scene;
pub mod synthetic;
pub mod torture;
