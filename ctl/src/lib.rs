//! `pageferry`: arguments, sockets and text around `pageferry-datapath`.
#![forbid(unsafe_code)]

pub mod agent;
pub mod cli;
pub mod cores;
pub mod host;
pub mod lab;
pub mod limits;
pub mod qemu;
pub mod qmp;
pub mod report;
