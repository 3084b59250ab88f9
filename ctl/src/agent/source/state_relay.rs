//! Device state on its way: from the monitor to the control connection as it comes.

use std::sync::Arc;
use std::thread;

use crossbeam_channel::Sender;
use pageferry_datapath::control::Message;
use pageferry_datapath::limits;
use pageferry_datapath::source::{Failure, Input};

use super::super::control::Control;
use super::super::failure;

use super::super::monitor::StateStream;
use super::lost;

/// The relay's thread; it ends when the monitor closes its end.
pub(super) struct StateRelay {
    thread: thread::JoinHandle<Result<u64, Failure>>,
}

impl StateRelay {
    /// Starts relaying; a failure goes to `inputs`.
    pub(super) fn start(
        stream: Arc<dyn StateStream>,
        control: Control,
        inputs: Sender<Input>,
    ) -> Self {
        let relay = move || {
            let relayed = relay(&*stream, &control);
            if let Err(failure) = &relayed {
                let _nobody_waits_after_the_end = inputs.send(Input::Failed(failure.clone()));
            }
            relayed
        };
        let thread = thread::Builder::new()
            .name("pf-state".into())
            .spawn(relay)
            .expect("the process can start threads");
        Self { thread }
    }

    /// Waits for its end: the bytes relayed, 0 if it failed.
    pub(super) fn join(self) -> u64 {
        self.thread.join().ok().and_then(Result::ok).unwrap_or(0)
    }
}

fn relay(stream: &dyn StateStream, control: &Control) -> Result<u64, Failure> {
    let mut chunk = vec![0; limits::STATE_CHUNK_BYTES_MAX];
    let mut total = 0;
    loop {
        let count =
            stream.read(&mut chunk).map_err(|error| failure::host("device state", &error, None))?;
        let message = match count {
            0 => Message::DeviceStateEnd,
            count => Message::DeviceState(chunk[..count].to_vec()),
        };
        control.send(&message).map_err(|error| lost(&error))?;
        if count == 0 {
            return Ok(total);
        }
        total += count as u64;
    }
}
