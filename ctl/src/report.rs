//! What a migration says about itself: events for programs, text for people, exit codes for shells.
//!
//! The migration's driver owns the numbers and fills the structs of [`events`]; nothing here
//! measures anything, and nothing here decides.

pub mod events;
pub mod exit;
pub mod histograms;
mod human;
mod reporter;
pub mod timeline;

pub use reporter::{Reporter, reporter};
