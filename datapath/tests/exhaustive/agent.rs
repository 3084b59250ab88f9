//! What both agents of this world have: a machine, commands to carry out, and what comes to them.

use std::collections::VecDeque;

/// Whether an agent's process is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Process {
    Works,
    /// It has come to its end by itself.
    Ended,
    Dead,
}

#[derive(Clone)]
pub(crate) struct Agent<M, C, I> {
    pub(crate) machine: M,
    pub(crate) process: Process,
    /// Commands, carried out in order.
    pub(crate) todo: VecDeque<C>,
    /// Steps made of the first one.
    pub(crate) half: u8,
    /// Answers, heard when no command is left.
    pub(crate) ready: VecDeque<I>,
    /// What comes from lanes and from threads of its own.
    pub(crate) inbox: VecDeque<I>,
    /// It was told that the control connection has ended.
    pub(crate) told: bool,
    /// The next command fails.
    pub(crate) fails: bool,
}

impl<M, C, I> Agent<M, C, I> {
    pub(crate) fn new(machine: M, todo: Vec<C>) -> Self {
        Self {
            machine,
            process: Process::Works,
            todo: todo.into(),
            half: 0,
            ready: VecDeque::new(),
            inbox: VecDeque::new(),
            told: false,
            fails: false,
        }
    }

    pub(crate) fn works(&self) -> bool {
        self.process == Process::Works
    }

    /// It waits for what comes.
    pub(crate) fn waits(&self) -> bool {
        self.works() && self.todo.is_empty()
    }

    pub(crate) fn tell(&mut self, input: I) {
        if self.works() {
            self.inbox.push_back(input);
        }
    }

    pub(crate) fn leave(&mut self, process: Process) {
        self.process = process;
        self.todo.clear();
        self.ready.clear();
        self.inbox.clear();
        (self.half, self.told, self.fails) = (0, false, false);
    }
}
