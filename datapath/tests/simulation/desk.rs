//! What an agent has before it: inputs that came, commands to carry out, the one it is at.

use std::collections::VecDeque;
use std::time::Duration;

use pageferry_datapath::ids::RoundIndex;

/// Something for an agent.
pub(crate) enum Mail<I> {
    Input(I),
    /// One lane has placed its part of this round.
    Lane(RoundIndex),
}

/// A command on its way.
pub(crate) struct Busy<C> {
    pub(crate) command: C,
    pub(crate) number: u64,
    pub(crate) fails: bool,
    /// It has taken effect.
    pub(crate) effective: bool,
}

pub(crate) struct Desk<C, I> {
    /// The process is there.
    pub(crate) alive: bool,
    /// It has come to its end by itself.
    pub(crate) ended: bool,
    pub(crate) todo: VecDeque<C>,
    pub(crate) busy: Option<Busy<C>>,
    /// Answers of commands: they come before anything else.
    pub(crate) ready: VecDeque<I>,
    mailbox: VecDeque<Mail<I>>,
    pub(crate) begun: u64,
    pub(crate) fail_next: bool,
    pub(crate) drag_next: Duration,
    pub(crate) tick_at: Option<Duration>,
}

impl<C, I> Default for Desk<C, I> {
    fn default() -> Self {
        Self {
            alive: true,
            ended: false,
            todo: VecDeque::new(),
            busy: None,
            ready: VecDeque::new(),
            mailbox: VecDeque::new(),
            begun: 0,
            fail_next: false,
            drag_next: Duration::ZERO,
            tick_at: None,
        }
    }
}

impl<C, I> Desk<C, I> {
    pub(crate) fn is_open(&self) -> bool {
        self.alive && !self.ended
    }

    pub(crate) fn post(&mut self, mail: Mail<I>) {
        if self.is_open() {
            self.mailbox.push_back(mail);
        }
    }

    pub(crate) fn next_mail(&mut self) -> Option<Mail<I>> {
        self.ready.pop_front().map(Mail::Input).or_else(|| self.mailbox.pop_front())
    }

    pub(crate) fn at(&mut self, number: u64) -> Option<&mut Busy<C>> {
        self.busy.as_mut().filter(|busy| busy.number == number)
    }

    pub(crate) fn done(&mut self, number: u64) -> Option<Busy<C>> {
        self.busy.take_if(|busy| busy.number == number)
    }

    /// Whether everything told to do is done.
    pub(crate) fn is_idle(&self) -> bool {
        self.todo.is_empty() && self.busy.is_none()
    }
}
