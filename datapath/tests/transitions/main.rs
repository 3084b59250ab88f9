//! What both state machines make of every input in every situation, and that the table, the
//! drawings and the documentation say the same.

mod behaviours_source;
mod behaviours_target;
mod documentation;
mod snapshot;
mod source;
mod target;
