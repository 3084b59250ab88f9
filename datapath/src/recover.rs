//! Whose is the guest, after an agent, a host or the network was lost: decided from the records.
//!
//! Decisions only. A side looks at its own record and at its monitor, asks the other side for the
//! word of its record if it can be reached, and is told here what to do, step by step:
//!
//! ```text
//! source's record   target's record              the guest is the
//! handed-over       attempting, ready, running   target's
//! handed-over       aborted                      source's
//! handed-over       none                         nobody's: whose it is was forgotten there
//! handed-over       ready, its monitor is gone   nobody's: it may have run there (--peer-is-dead)
//! any other         any                          source's
//! any               running                      target's
//! ```
//!
//! Both sides come to the same answer whoever asks first: who asks tells its word, and whoever is
//! asked acts on it before it answers. The source never lets a guest go on that the target may have
//! loaded without writing `aborted` first; so a source whose monitor is gone and whose record says
//! `attempting` may still hand over: the guest has not run since it was paused for the target.

use crate::control::Word;

/// A guest on one side, as its monitor shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Guest {
    /// It runs.
    Runs,
    /// It is paused and whole.
    Whole,
    /// There is none: its monitor is gone, or nothing was loaded into it.
    Absent,
}

/// What is known of the other side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Peer {
    /// Nobody listens there.
    Unreachable,
    /// Somebody listens there, and gave no answer: it may act on what it was told.
    Silent,
    /// It is gone for good: the operator's word.
    Dead,
    /// Its record says this.
    Says(Word),
}

/// One thing to do; in the order given, and nothing after one that fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// Write this down, durably.
    Record(Word),
    /// Let the guest run here.
    Run,
    /// Leave nothing of the attempt in the monitor.
    Release,
    /// Tell the other side the word of the record here; it does not matter whether it hears it.
    Tell,
    /// Remove the record: both sides know.
    Forget,
}

/// Where that leaves the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum End {
    /// It runs here.
    RunsHere,
    /// It is the other side's.
    TheOthers,
    /// It is paused and whole on either side or both, and only the other side knows whose it is.
    Unknown,
    /// It is nowhere any more: its monitor ended before it was loaded elsewhere.
    Gone,
    /// It runs on both sides, against the records.
    RunsTwice,
}

/// What to do, and where it leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// In this order.
    pub steps: Vec<Step>,
    /// When they are done.
    pub end: End,
}

impl Plan {
    fn new(steps: impl Into<Vec<Step>>, end: End) -> Self {
        Self { steps: steps.into(), end }
    }
}

/// What the source tells the target when it asks: the decision that its record and its monitor
/// amount to. `None` if it must be on record before it is told.
pub fn source_word(own: Word, guest: Guest) -> (Word, Option<Step>) {
    match (own, guest) {
        (Word::Attempting, Guest::Absent) => {
            (Word::HandedOver, Some(Step::Record(Word::HandedOver)))
        }
        (Word::Attempting, _) => (Word::Aborted, Some(Step::Record(Word::Aborted))),
        (own, _) => (own, None),
    }
}

/// Whether a target that answers with this has acted on what it was told. One whose session has just
/// ended without knowing whose the guest is has not: it does when it is asked again. One whose monitor
/// is gone, and may have run the guest before, can't.
pub fn has_acted(word: Word) -> bool {
    !matches!(word, Word::Attempting | Word::Ready)
}

/// The source's plan; `own` is the word after [`source_word`] was put on record.
pub fn source(own: Word, guest: Guest, peer: Peer) -> Plan {
    use End::*;
    use Step::*;
    match own {
        Word::HandedOver => match (peer, guest) {
            (Peer::Says(Word::Running), Guest::Runs) => Plan::new([], RunsTwice),
            (Peer::Says(Word::Running), _) => Plan::new([Release, Forget], TheOthers),
            (Peer::Says(Word::Aborted | Word::None), Guest::Absent) => Plan::new([Forget], Gone),
            (Peer::Says(Word::Aborted), _) => {
                Plan::new([Record(Word::Aborted), Run, Tell, Forget], RunsHere)
            }
            (Peer::Dead, Guest::Absent) => Plan::new([Record(Word::Aborted), Tell, Forget], Gone),
            (Peer::Says(Word::Ready), Guest::Absent) => Plan::new([], Gone),
            // The record stays: should the other side come back, it has to learn of this.
            (Peer::Dead, _) => Plan::new([Record(Word::Aborted), Run], RunsHere),
            // One that knows nothing of a guest that it said it had, has lost its records, or is another.
            (Peer::Unreachable | Peer::Silent | Peer::Says(_), _) => Plan::new([], Unknown),
        },
        Word::Aborted => match (peer, guest) {
            (Peer::Says(Word::Running), Guest::Runs) => Plan::new([], RunsTwice),
            (Peer::Says(Word::Running), _) => Plan::new([Release, Forget], TheOthers),
            (_, Guest::Absent) => Plan::new([], Gone),
            (Peer::Says(word), _) if has_acted(word) => Plan::new([Run, Forget], RunsHere),
            // The record stays: what is loaded there waits for its word.
            (Peer::Says(_), _) => Plan::new([Run], RunsHere),
            (Peer::Unreachable | Peer::Silent | Peer::Dead, _) => Plan::new([Run], RunsHere),
        },
        Word::None | Word::Attempting | Word::Ready | Word::Running => Plan::new([], Unknown),
    }
}

/// The target's plan: when it is asked, `peer` is what the source says; when its operator asks, what
/// is known of the source.
pub fn target(own: Word, guest: Guest, peer: Peer) -> Plan {
    use End::*;
    use Step::*;
    match own {
        Word::Running => match guest {
            Guest::Runs => Plan::new([], RunsHere),
            // It ran here and was paused or ended since, by whoever runs this host.
            Guest::Whole | Guest::Absent => Plan::new([], RunsHere),
        },
        Word::Aborted => match peer {
            Peer::Says(_) | Peer::Dead => Plan::new([Release], TheOthers),
            Peer::Unreachable | Peer::Silent => Plan::new([], TheOthers),
        },
        // It was loaded, and allowed to run; whether it did, before it was lost, nobody can know.
        Word::Ready
            if guest == Guest::Absent
                && matches!(
                    peer,
                    Peer::Unreachable | Peer::Silent | Peer::Says(Word::HandedOver)
                ) =>
        {
            Plan::new([], Unknown)
        }
        Word::Attempting | Word::Ready => match (peer, guest) {
            // Killed between letting it run and writing that down.
            (_, Guest::Runs) => Plan::new([Record(Word::Running)], RunsHere),
            (Peer::Says(Word::HandedOver), Guest::Whole) | (Peer::Dead, Guest::Whole) => {
                Plan::new([Record(Word::Ready), Run, Record(Word::Running)], RunsHere)
            }
            (Peer::Says(Word::HandedOver) | Peer::Says(_), _) => {
                Plan::new([Record(Word::Aborted), Release], TheOthers)
            }
            (Peer::Dead, Guest::Absent) => Plan::new([Record(Word::Aborted), Release], Gone),
            (Peer::Unreachable | Peer::Silent, Guest::Whole) => Plan::new([], Unknown),
            (Peer::Unreachable | Peer::Silent, Guest::Absent) => {
                Plan::new([Record(Word::Aborted), Release], TheOthers)
            }
        },
        Word::None | Word::HandedOver => Plan::new([], TheOthers),
    }
}

/// What the operator's word that the other side is dead makes of what was found there. Somebody who
/// listens is not dead; but whose monitor is gone, or who knows nothing, has no guest to speak for.
pub fn believed_dead(found: Peer) -> Peer {
    match found {
        Peer::Unreachable | Peer::Says(Word::Ready | Word::None) => Peer::Dead,
        found => found,
    }
}

/// Whether the target may forget its record, which says `own`, once the source, whose word is
/// `source`, was told so: when that has no record any more, for then it has acted on the end. One that
/// was told and has not may be killed before it does, and finds nobody who knows when it asks again.
pub fn target_may_forget(own: Word, source: Word) -> bool {
    source == Word::None && has_acted(own)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORDS: [Word; 6] =
        [Word::None, Word::Attempting, Word::HandedOver, Word::Ready, Word::Running, Word::Aborted];
    const GUESTS: [Guest; 3] = [Guest::Runs, Guest::Whole, Guest::Absent];

    #[test]
    fn a_target_forgets_only_what_its_source_has_acted_on() {
        for (own, word) in WORDS.into_iter().flat_map(|own| WORDS.map(|word| (own, word))) {
            if target_may_forget(own, word) {
                assert_eq!(word, Word::None, "a source that has a record may ask again");
                assert!(has_acted(own), "{own:?}: somebody has to tell it yet");
            }
        }
    }

    /// One side: its record and its guest, changed by the steps of a plan.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Side {
        word: Word,
        guest: Guest,
    }

    impl Side {
        fn follow(&mut self, plan: &Plan) {
            for step in &plan.steps {
                match step {
                    Step::Record(word) => self.word = *word,
                    Step::Run => self.guest = Guest::Runs,
                    Step::Forget => self.word = Word::None,
                    Step::Release | Step::Tell => {}
                }
            }
        }
    }

    /// What can stand on disk and in the monitors after a crash at any moment.
    fn possible(source: Side, target: Side) -> bool {
        use Guest::*;
        let loaded = target.guest != Absent;
        let words: &[Word] = match source.word {
            Word::Attempting | Word::Aborted => {
                &[Word::None, Word::Attempting, Word::Ready, Word::Aborted]
            }
            Word::HandedOver => {
                &[Word::None, Word::Attempting, Word::Ready, Word::Aborted, Word::Running]
            }
            Word::None | Word::Ready | Word::Running => &[],
        };
        let sound = words.contains(&target.word);
        let source_runs = source.guest == Runs;
        let target_runs = target.guest == Runs;
        sound
            && !(source_runs && target_runs)
            // A paused guest is let go on at the source only after `aborted`, once it may be loaded.
            && !(source_runs && loaded && source.word == Word::Attempting)
            && !(source_runs && source.word == Word::HandedOver)
            && !(target_runs && source.word != Word::HandedOver)
            && !(target_runs && target.word == Word::Aborted)
            && (target.word != Word::Running || target_runs)
            && (target.word != Word::None || target.guest == Absent || target_runs)
            // Without a record and with nothing loaded the target has never said that it was ready.
            && !(source.word == Word::HandedOver && target.word == Word::None && !target_runs)
    }

    fn every(mut check: impl FnMut(Side, Side)) {
        let mut checked = 0;
        for (sw, sg, tw, tg) in worlds(&WORDS, &GUESTS) {
            let (source, target) = (Side { word: sw, guest: sg }, Side { word: tw, guest: tg });
            if possible(source, target) {
                checked += 1;
                check(source, target);
            }
        }
        assert!(checked > 20, "{checked}");
    }

    fn worlds(words: &[Word], guests: &[Guest]) -> Vec<(Word, Guest, Word, Guest)> {
        let mut all = Vec::new();
        for &a in words {
            for &b in guests {
                for &c in words {
                    all.extend(guests.iter().map(|&d| (a, b, c, d)));
                }
            }
        }
        all
    }

    /// The source asks; the target acts on its word, answers, and the source acts on that.
    fn source_asks(source: &mut Side, target: &mut Side) -> End {
        let (word, record) = source_word(source.word, source.guest);
        if let Some(Step::Record(word)) = record {
            source.word = word;
        }
        let plan = super::target(target.word, target.guest, Peer::Says(word));
        target.follow(&plan);
        let plan = super::source(source.word, source.guest, Peer::Says(target.word));
        source.follow(&plan);
        plan.end
    }

    #[test]
    fn after_both_were_asked_one_side_has_the_guest_and_never_two() {
        every(|source, target| {
            let (mut s, mut t) = (source, target);
            let end = source_asks(&mut s, &mut t);
            let running = [s.guest, t.guest].iter().filter(|g| **g == Guest::Runs).count();
            let alive = source.guest != Guest::Absent || target.guest != Guest::Absent;
            assert!(running <= 1, "{source:?} {target:?} -> {s:?} {t:?}");
            assert_ne!(end, End::RunsTwice, "{source:?} {target:?}");
            let lost = target == Side { word: Word::Ready, guest: Guest::Absent };
            let forgot = target == Side { word: Word::None, guest: Guest::Runs };
            if (lost || forgot) && s.word == Word::HandedOver && source.guest == Guest::Whole {
                return assert_eq!((s, t, end), (source, target, End::Unknown));
            }
            assert_ne!(end, End::Unknown, "{source:?} {target:?}");
            // What stands only at the target after the source took the guest back is an old copy.
            let stale = source.word == Word::Aborted && source.guest == Guest::Absent;
            let given_back = target.word == Word::Aborted && source.guest == Guest::Absent;
            if alive && !stale && !given_back {
                assert_eq!(running, 1, "{source:?} {target:?} -> {s:?} {t:?} {end:?}");
            }
        });
    }

    #[test]
    fn asking_again_changes_nothing() {
        every(|source, target| {
            let (mut s, mut t) = (source, target);
            source_asks(&mut s, &mut t);
            let (guest_here, guest_there) = (s.guest, t.guest);
            if s.word != Word::None {
                source_asks(&mut s, &mut t);
            }
            assert_eq!((s.guest, t.guest), (guest_here, guest_there), "{source:?} {target:?}");
        });
    }

    #[test]
    fn a_target_that_reaches_nobody_runs_nothing() {
        for word in WORDS {
            for guest in GUESTS {
                let plan = super::target(word, guest, Peer::Unreachable);
                assert!(!plan.steps.contains(&Step::Run), "{word:?} {guest:?}");
            }
        }
    }

    #[test]
    fn a_source_that_decided_and_reaches_nobody_runs_nothing() {
        for guest in GUESTS {
            for peer in [Peer::Unreachable, Peer::Silent] {
                let plan = super::source(Word::HandedOver, guest, peer);
                assert_eq!(plan, Plan::new([], End::Unknown));
            }
        }
    }

    #[test]
    fn what_may_have_run_at_the_target_is_run_again_by_the_operators_word_alone() {
        let there = super::target(Word::Ready, Guest::Absent, Peer::Says(Word::HandedOver));
        assert_eq!(there, Plan::new([], End::Unknown));
        for peer in [Peer::Says(Word::Ready), Peer::Says(Word::None), Peer::Unreachable] {
            let here = super::source(Word::HandedOver, Guest::Whole, peer);
            assert_eq!(here, Plan::new([], End::Unknown));
        }
        let word = super::source(Word::HandedOver, Guest::Whole, Peer::Dead);
        assert_eq!(word, Plan::new([Step::Record(Word::Aborted), Step::Run], End::RunsHere));
    }

    #[test]
    fn the_operators_word_is_not_believed_of_one_who_listens_and_has_a_guest() {
        assert_eq!(believed_dead(Peer::Silent), Peer::Silent);
        for word in [Word::Attempting, Word::Running, Word::Aborted] {
            assert_eq!(believed_dead(Peer::Says(word)), Peer::Says(word));
        }
    }

    #[test]
    fn what_is_nowhere_any_more_leaves_no_record() {
        for peer in [Peer::Dead, Peer::Says(Word::None), Peer::Says(Word::Aborted)] {
            let plan = super::source(Word::HandedOver, Guest::Absent, peer);
            assert_eq!((plan.steps.last(), plan.end), (Some(&Step::Forget), End::Gone));
        }
    }

    #[test]
    fn a_target_runs_nothing_before_it_is_on_record_that_it_may() {
        for (word, peer) in [Peer::Dead, Peer::Says(Word::HandedOver)]
            .into_iter()
            .flat_map(|peer| [Word::Attempting, Word::Ready].map(|word| (word, peer)))
        {
            let steps = super::target(word, Guest::Whole, peer).steps;
            assert_eq!(steps[..2], [Step::Record(Word::Ready), Step::Run]);
        }
    }

    #[test]
    fn a_source_keeps_its_word_until_the_target_has_acted_on_it() {
        for guest in [Guest::Runs, Guest::Whole] {
            let kept = super::source(Word::Aborted, guest, Peer::Says(Word::Attempting));
            assert_eq!(kept, Plan::new([Step::Run], End::RunsHere));
            for word in [Word::Aborted, Word::None] {
                let heard = super::source(Word::Aborted, guest, Peer::Says(word));
                assert_eq!(heard, Plan::new([Step::Run, Step::Forget], End::RunsHere));
            }
        }
    }

    #[test]
    fn what_runs_after_aborted_was_written_is_never_given_away() {
        let (word, record) = source_word(Word::Aborted, Guest::Absent);
        assert_eq!((word, record), (Word::Aborted, None));
        let plan = super::target(Word::Attempting, Guest::Whole, Peer::Says(Word::Aborted));
        assert!(!plan.steps.contains(&Step::Run), "the copy there is older than what ran here");
    }
}
