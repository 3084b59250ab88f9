//! What the control connection brings, sorted by who it is for.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crossbeam_channel::Sender;
use pageferry_datapath::control::{LanesPlaced, Message, NewLanes};
use pageferry_datapath::source::Input;

use crate::agent::backlog::Room;
use crate::agent::control::Event;
use crate::agent::monitor::StateStream;
use crate::agent::source::lost;

/// What the agent itself listens to.
pub(super) enum Said {
    NewLanes(NewLanes, Room),
    LanesPlaced(LanesPlaced, Room),
    Restored(Duration),
}

/// Sorts what the control connection brings. What the target's monitor answers to the source's goes
/// straight to it; everything that is not the agent's own is the machine's. The channels are not
/// bounded themselves: the control connection bounds what it hands on.
pub(super) fn listener(
    to_heard: Sender<(Input, Option<Room>)>,
    said: Sender<Said>,
    state: Arc<OnceLock<Arc<dyn StateStream>>>,
) -> impl FnMut(Event) + Send + 'static {
    move |event| {
        let heard = match event {
            Event::Message(Message::ReturnPath(bytes), _room) => {
                // A monitor that no longer listens says so by itself.
                let _its_own_failure = state.get().map(|stream| stream.write_all(&bytes));
                return;
            }
            Event::Message(Message::NewLanes(new), room) => {
                let _nobody_waits_after_the_end = said.send(Said::NewLanes(new, room));
                return;
            }
            Event::Message(Message::LanesPlaced(placed), room) => {
                let _nobody_waits_after_the_end = said.send(Said::LanesPlaced(placed, room));
                return;
            }
            Event::Restored { away } => {
                let _nobody_waits_after_the_end = said.send(Said::Restored(away));
                return;
            }
            Event::Cut(error) => {
                tracing::warn!(%error, "the target is cut off; trying to come back");
                return;
            }
            Event::Message(message, room) => (Input::Message(message), Some(room)),
            Event::Lost(error) => (Input::PeerLost(lost(&error)), None),
        };
        let target_is_out = is_out(&heard.0);
        let _nobody_waits_after_the_end = to_heard.send(heard);
        if target_is_out {
            // The agent may be waiting for its monitor, and that for the target's last word, which
            // will not come: the guest stands still meanwhile.
            let _the_monitor_has_ended = state.get().map(|stream| stream.finish());
        }
    }
}

/// The target is gone, or has given up.
pub(super) fn is_out(input: &Input) -> bool {
    matches!(input, Input::PeerLost(_) | Input::Message(Message::Abort(_)))
}
