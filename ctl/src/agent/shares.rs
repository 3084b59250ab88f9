//! Several migrations of one host, one budget: who gets how much of it.
//!
//! ```text
//!   RUNTIME_DIR/budgets/NAME/SESSION   {"weight":3,"budget":"1Gbit","said_at":...}   one a member
//! ```
//!
//! Each agent keeps a file, locked for as long as it lives, and looks at those of the others now and
//! then; its share is the budget times its weight over all weights. So nobody has to coordinate:
//! members come and go, and one that is killed lets go of its lock. The budget is what was said
//! last, by whichever member.

use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::admin::make_private;
use crate::bandwidth::Bandwidth;

/// Tries to lock a file of one's own, and the time between two of them: members look at each other's
/// for microseconds.
const CLAIMS_MAX: u32 = 50;
/// See [`CLAIMS_MAX`].
const CLAIM_AGAIN: Duration = Duration::from_millis(2);

/// A weight that a migration may have in a budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Weight(u32);

/// Not a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("weights are 1 to {}", Weight::MAX)]
pub struct WeightError;

impl Weight {
    /// The largest: a thousand times as much as another one gets is as good as all.
    pub const MAX: u32 = 1000;

    /// As a number.
    pub fn get(self) -> u32 {
        self.0
    }
}

impl TryFrom<u32> for Weight {
    type Error = WeightError;

    fn try_from(weight: u32) -> Result<Self, WeightError> {
        (1..=Self::MAX).contains(&weight).then_some(Self(weight)).ok_or(WeightError)
    }
}

impl From<Weight> for u32 {
    fn from(weight: Weight) -> Self {
        weight.0
    }
}

impl std::str::FromStr for Weight {
    type Err = WeightError;

    fn from_str(text: &str) -> Result<Self, WeightError> {
        text.parse::<u32>().map_err(|_| WeightError)?.try_into()
    }
}

/// One member of a budget. It leaves when dropped.
#[derive(Debug)]
pub struct Share {
    path: PathBuf,
    file: Flock<File>,
    own: Member,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct Member {
    weight: u32,
    budget: Option<Bandwidth>,
    /// Nanoseconds since 1970.
    said_at: u64,
}

impl Share {
    /// Takes part in the budget `name`, which from now on is `budget` if one is given.
    pub fn join(
        runtime_dir: &Path,
        name: &str,
        session: &str,
        weight: u32,
        budget: Option<Bandwidth>,
    ) -> io::Result<Self> {
        Self::enter(runtime_dir, name, session, weight.max(1), budget)
    }

    /// Keeps the budget `name` for members that come and go, and takes nothing of it.
    pub fn keep(
        runtime_dir: &Path,
        name: &str,
        who: &str,
        budget: Option<Bandwidth>,
    ) -> io::Result<Self> {
        Self::enter(runtime_dir, name, who, 0, budget)
    }

    fn enter(
        runtime_dir: &Path,
        name: &str,
        session: &str,
        weight: u32,
        budget: Option<Bandwidth>,
    ) -> io::Result<Self> {
        if name.is_empty() || name.starts_with('.') || name.contains('/') {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a budget's name is a word"));
        }
        make_private(runtime_dir)?;
        let dir = runtime_dir.join("budgets").join(name);
        fs::create_dir_all(&dir)?;
        let path = dir.join(session);
        let file = claim(&path)?;
        let own = Member { weight, budget, said_at: said_at(budget) };
        let mut share = Self { path, file, own };
        share.write()?;
        Ok(share)
    }

    /// Changes the budget for all its members.
    pub fn say(&mut self, budget: Option<Bandwidth>) -> io::Result<()> {
        self.own = Member { budget, said_at: now(), ..self.own };
        self.write()
    }

    /// Changes this member's own weight.
    pub fn weigh(&mut self, weight: Weight) -> io::Result<()> {
        self.own.weight = weight.get();
        self.write()
    }

    /// This member's own weight.
    pub fn weight(&self) -> u32 {
        self.own.weight
    }

    /// Repeats what another member said later than this one, so that it outlives that member.
    pub fn follow(&mut self) -> io::Result<()> {
        let last = self.others().into_iter().max_by_key(|member| member.said_at);
        let Some(last) = last.filter(|last| last.said_at > self.own.said_at) else { return Ok(()) };
        self.own = Member { budget: last.budget, said_at: last.said_at, ..self.own };
        self.write()
    }

    /// What this member may send now; `None` if there is no limit.
    pub fn bandwidth(&self) -> Option<Bandwidth> {
        let others = self.others();
        let weights: u64 = others.iter().chain([&self.own]).map(|it| u64::from(it.weight)).sum();
        let weights = weights.max(1);
        let said = others.iter().chain([&self.own]).max_by_key(|member| member.said_at)?;
        let budget = u128::from(said.budget?.bytes_per_second);
        let share = budget * u128::from(self.own.weight) / u128::from(weights);
        Some(Bandwidth { bytes_per_second: u64::try_from(share).unwrap_or(u64::MAX) })
    }

    /// The other members that live; what dead ones left is removed.
    fn others(&self) -> Vec<Member> {
        let entries = self.path.parent().and_then(|dir| fs::read_dir(dir).ok());
        let paths = entries.into_iter().flatten().flatten().map(|entry| entry.path());
        paths.filter(|path| *path != self.path).filter_map(|path| living(&path)).collect()
    }

    /// In place: a reader in between sees no whole object, and looks again next time.
    fn write(&mut self) -> io::Result<()> {
        let text = serde_json::to_vec(&self.own)?;
        self.file.rewind()?;
        self.file.write_all(&text)?;
        self.file.set_len(text.len() as u64)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let _it_is_unlocked_anyway = fs::remove_file(&self.path);
    }
}

/// A file that is there, and locked. Until it is, another member may take it for one that a dead
/// one left, hold its lock for a moment and remove it: then again.
fn claim(path: &Path) -> io::Result<Flock<File>> {
    for _ in 0..CLAIMS_MAX {
        let file =
            File::options().create(true).truncate(false).read(true).write(true).open(path)?;
        if let Ok(file) = Flock::lock(file, FlockArg::LockExclusiveNonblock)
            && fs::metadata(path)
                .is_ok_and(|it| Some(it.ino()) == file.metadata().ok().map(|it| it.ino()))
        {
            return Ok(file);
        }
        thread::sleep(CLAIM_AGAIN);
    }
    Err(io::Error::new(io::ErrorKind::AlreadyExists, "the session takes part already"))
}

fn living(path: &Path) -> Option<Member> {
    let file = File::open(path).ok()?;
    match Flock::lock(file, FlockArg::LockSharedNonblock) {
        Ok(_nobody_holds_it) => {
            let _somebody_else_did = fs::remove_file(path);
            None
        }
        Err((mut file, _)) => {
            let mut text = String::new();
            file.read_to_string(&mut text).ok()?;
            serde_json::from_str(&text).ok()
        }
    }
}

/// Who joins without saying a budget takes that of the others.
fn said_at(budget: Option<Bandwidth>) -> u64 {
    budget.map_or(0, |_| now())
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    fn rate(text: &str) -> Option<Bandwidth> {
        Some(text.parse().unwrap())
    }

    #[test]
    fn a_budget_is_shared_by_weight_and_by_those_who_are_there() {
        let dir = TempDir::new().unwrap();
        let run = dir.path().join("run");
        let join = |session: &str, weight, budget| {
            Share::join(&run, "rack", session, weight, budget).unwrap()
        };
        let mut first = join("01", 3, rate("1G"));
        assert_eq!(first.bandwidth(), rate("1G"));
        let second = join("02", 1, None);
        assert_eq!((first.bandwidth(), second.bandwidth()), (rate("750M"), rate("250M")));
        // Somebody with the last word, in the middle of it.
        first.say(rate("2G")).unwrap();
        assert_eq!((first.bandwidth(), second.bandwidth()), (rate("1500M"), rate("500M")));
        // And one whose own part is to be another.
        let mut second = second;
        second.weigh(Weight(9)).unwrap();
        assert_eq!((first.bandwidth(), second.bandwidth()), (rate("500M"), rate("1500M")));
        second.weigh(Weight(1)).unwrap();
        let elsewhere = Share::join(&run, "other", "03", 9, None).unwrap();
        assert_eq!((elsewhere.bandwidth(), second.bandwidth()), (None, rate("500M")));
        drop(second);
        assert_eq!(first.bandwidth(), rate("2G"));
        first.say(None).unwrap();
        assert_eq!(first.bandwidth(), None);
    }

    #[test]
    fn weights_are_few() {
        for (text, weight) in [("1", Ok(Weight(1))), ("1000", Ok(Weight(1000)))] {
            assert_eq!(text.parse(), weight, "{text}");
        }
        for bad in ["0", "1001", "-1", "1.5", "heavy", ""] {
            assert_eq!(bad.parse::<Weight>(), Err(WeightError), "{bad}");
        }
    }

    #[test]
    fn a_keeper_takes_nothing_and_remembers_what_members_said() {
        let dir = TempDir::new().unwrap();
        let run = dir.path().join("run");
        let mut keeper = Share::keep(&run, "rack", "drain", rate("1G")).unwrap();
        let mut first = Share::join(&run, "rack", "01", 1, None).unwrap();
        assert_eq!(first.bandwidth(), rate("1G"));
        first.say(rate("2G")).unwrap();
        keeper.follow().unwrap();
        drop(first);
        let second = Share::join(&run, "rack", "02", 1, None).unwrap();
        assert_eq!(second.bandwidth(), rate("2G"));
        keeper.follow().unwrap();
        assert_eq!(second.bandwidth(), rate("2G"));
    }

    #[test]
    fn the_dead_leave_their_share_to_the_living() {
        let dir = TempDir::new().unwrap();
        let run = dir.path().join("run");
        let share = Share::join(&run, "rack", "01", 1, rate("1G")).unwrap();
        // Its owner was killed: the file is there, and nobody holds it.
        let left = run.join("budgets/rack/02");
        fs::write(&left, r#"{"weight":9,"budget":null,"said_at":18446744073709551615}"#).unwrap();
        assert_eq!(share.bandwidth(), rate("1G"));
        assert!(!left.exists());
        assert!(Share::join(&run, "../rack", "03", 1, None).is_err());
        assert!(Share::join(&run, "rack", "01", 1, None).is_err(), "joined twice");
    }
}
