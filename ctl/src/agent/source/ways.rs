//! The ways to the target's control port: the address that was named, and, should that be cut, those
//! of the rails.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::super::link::{Link, LinkError};
use super::super::rails::Rail;
use super::super::tls::Caller;

/// Shared by the agent and whoever makes its connection anew.
#[derive(Clone)]
pub(super) struct Ways {
    named: String,
    caller: Caller,
    others: Arc<Mutex<Vec<SocketAddr>>>,
}

impl Ways {
    /// To a target that was named, and is believed to be it as `caller` says.
    pub(super) fn new(named: String, caller: Caller) -> Self {
        Self { named, caller, others: Arc::default() }
    }

    /// Lanes run over these, so the control connection may.
    pub(super) fn add(&self, rails: &[Rail]) {
        let mut others = self.others();
        for rail in rails {
            if !others.contains(&rail.to) {
                others.push(rail.to);
            }
        }
    }

    /// Connects by the first way that leads there; each has its part of the time.
    pub(super) fn connect(&self, within: Duration) -> Result<Link, LinkError> {
        let others = self.others().clone();
        let each = within / (others.len() as u32 + 1);
        let mut connected = Link::connect(&self.named, &self.caller, each);
        for other in others {
            if !matches!(connected, Err(LinkError::Connect { .. })) {
                break;
            }
            connected = Link::connect_at(other, &self.named, &self.caller, each);
        }
        connected
    }

    fn others(&self) -> MutexGuard<'_, Vec<SocketAddr>> {
        self.others.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
