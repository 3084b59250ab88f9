//! Answers of a real monitor, recorded once and replayed where no QEMU is installed.
//!
//! For tests: what is concluded from QEMU's answers is tested against the answers of several
//! versions. Events and descriptors are not recorded.

use std::cell::RefCell;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Execute;
use crate::qmp::{QmpError, Version};

/// One command with its answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Exchange {
    command: String,
    args: Value,
    answer: Result<Value, Refused>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Refused {
    class: String,
    desc: String,
}

/// What a monitor answered.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Recording {
    version: (u32, u32, u32),
    exchanges: Vec<Exchange>,
}

impl Execute for Recording {
    fn version(&self) -> Version {
        let (major, minor, micro) = self.version;
        Version { major, minor, micro }
    }

    /// The recorded answer; [`QmpError::Closed`] for what was not recorded.
    fn execute(&self, command: &str, args: Value) -> Result<Value, QmpError> {
        let exchange = self
            .exchanges
            .iter()
            .find(|exchange| exchange.command == command && exchange.args == args)
            .ok_or_else(|| QmpError::Closed { doing: format!("replaying {command} {args}") })?;
        exchange.answer.clone().map_err(|Refused { class, desc }| QmpError::Refused {
            command: command.into(),
            class,
            desc,
        })
    }
}

impl Recording {
    /// Replaces the answer to `command`, whatever its arguments.
    pub fn set(&mut self, command: &str, answer: Value) {
        self.set_where(command, |_| true, answer);
    }

    /// Replaces the answers to `command` whose arguments `wanted` accepts.
    pub fn set_where(&mut self, command: &str, wanted: impl Fn(&Value) -> bool, answer: Value) {
        for exchange in &mut self.exchanges {
            if exchange.command == command && wanted(&exchange.args) {
                exchange.answer = Ok(answer.clone());
            }
        }
    }
}

/// Passes commands on and keeps the answers.
pub struct Recorder<'a> {
    inner: &'a dyn Execute,
    exchanges: RefCell<Vec<Exchange>>,
}

impl<'a> Recorder<'a> {
    /// Records what `inner` answers.
    pub fn new(inner: &'a dyn Execute) -> Self {
        Self { inner, exchanges: RefCell::default() }
    }

    /// What was recorded.
    pub fn finish(self) -> Recording {
        let Version { major, minor, micro } = self.inner.version();
        Recording { version: (major, minor, micro), exchanges: self.exchanges.into_inner() }
    }
}

impl Execute for Recorder<'_> {
    fn version(&self) -> Version {
        self.inner.version()
    }

    fn execute(&self, command: &str, args: Value) -> Result<Value, QmpError> {
        let result = self.inner.execute(command, args.clone());
        let answer = match &result {
            Ok(value) => Ok(value.clone()),
            Err(QmpError::Refused { class, desc, .. }) => {
                Err(Refused { class: class.clone(), desc: desc.clone() })
            }
            Err(_) => return result,
        };
        let mut exchanges = self.exchanges.borrow_mut();
        let exchange = Exchange { command: command.into(), args, answer };
        if !exchanges.contains(&exchange) {
            exchanges.push(exchange);
        }
        drop(exchanges);
        result
    }
}
