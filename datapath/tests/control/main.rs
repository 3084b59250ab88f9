//! The control protocol from outside: its bytes as they are kept, and what no bytes may do.

mod documentation;
mod frames;
mod golden;
mod hostile;
mod messages;
mod properties;
