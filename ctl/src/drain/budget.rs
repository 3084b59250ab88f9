//! One bandwidth budget for all guests of a drain: a group (`agent::shares`) that outlives each of
//! the migrations in it.

use super::args::DrainArgs;
use super::error::DrainError;
use crate::agent::admin;
use crate::agent::shares::Share;

/// Keeps the budget while guests come and go.
#[derive(Debug)]
pub(super) struct Budget {
    share: Option<Share>,
}

/// Name of the group.
pub(super) fn group(args: &DrainArgs) -> String {
    match &args.bandwidth_group {
        Some(name) => name.clone(),
        None => format!("drain-{}", std::process::id()),
    }
}

impl Budget {
    /// Begins to keep it. Without a budget there may be none later either: then it can't be set
    /// while the drain runs, and that is all.
    pub(super) fn keep(args: &DrainArgs) -> Result<Self, DrainError> {
        let dir = args.runtime_dir.clone().unwrap_or_else(admin::runtime_dir);
        let who = format!("drain-{}", std::process::id());
        match Share::keep(&dir, &group(args), &who, args.max_bandwidth) {
            Ok(share) => Ok(Self { share: Some(share) }),
            Err(source) if args.max_bandwidth.is_some() => Err(DrainError::Budget { dir, source }),
            Err(error) => {
                tracing::warn!(%error, "no budget can be set while guests are moved");
                Ok(Self { share: None })
            }
        }
    }

    /// What `pageferry set` told one of the migrations counts for those to come.
    pub(super) fn follow(&mut self) {
        if let Some(share) = &mut self.share
            && let Err(error) = share.follow()
        {
            tracing::warn!(%error, "the budget could not be written down");
        }
    }
}
