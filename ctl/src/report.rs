//! What a migration says about itself: events for programs, text for people, exit codes for shells.
//!
//! The migration's driver owns the numbers and fills the structs of [`events`]; nothing here
//! measures anything, and nothing here decides.

pub mod compression;
pub mod events;
pub mod exit;
pub mod histograms;
pub mod narrowing;
pub mod progress;
mod reporter;
#[cfg(test)]
mod sample;
pub mod text;
pub mod timeline;
pub mod units;

pub use reporter::{Reporter, reporter};
