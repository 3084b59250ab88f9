//! `pageferry`: arguments, sockets and text around `pageferry-datapath`.
#![forbid(unsafe_code)]

pub mod agent;
pub mod bandwidth;
pub mod cancel;
pub mod cli;
pub mod cores;
pub mod demo;
pub mod drain;
pub mod host;
pub mod lab;
pub mod limits;
pub mod migrate;
pub mod pki;
pub mod privileges;
pub mod probe;
pub mod qemu;
pub mod qmp;
pub mod receive;
pub mod recover;
pub mod report;
pub mod settings;
pub mod status;
