//! The run's prompts: read from the user's files, named by content, kept with the run.

use anyhow::Context as _;

use distillery_common::ids::Digest;
use distillery_common::prompts::{self, Prompt};
use distillery_common::recipe::Recipe;
use distillery_common::run::PromptDigest;
use distillery_common::storage::layout::{self, PromptList};
use distillery_common::storage::{Created, Store};

/// The three lists of a run.
#[derive(Debug)]
pub(super) struct Lists {
    lists: [(PromptList, Vec<Prompt>); 3],
}

impl Lists {
    /// Each list with the name of its content.
    pub(super) fn iter(&self) -> impl Iterator<Item = (PromptList, PromptDigest)> + '_ {
        self.lists
            .iter()
            .map(|(list, prompts)| (*list, named(prompts)))
    }
}

/// Reads the files that the recipe names, and says what was left out.
pub(super) fn read(recipe: &Recipe) -> Result<Lists, prompts::Error> {
    let read = prompts::load_lists(&recipe.prompts, recipe.seed)?;
    for report in &read.reports {
        // A blank line is a slip; that prompts repeat, or are held out, is how lists are made.
        if report.blank.is_some() {
            tracing::warn!("{report}");
        } else if report.duplicate.is_some() || report.held_out > 0 {
            tracing::info!("{report}");
        }
    }
    Ok(Lists {
        lists: [
            (PromptList::Train, read.train),
            (PromptList::Holdout, read.holdout),
            (PromptList::Preview, read.preview),
        ],
    })
}

/// Keeps the lists with the run, for engines on other hosts. Lists that are there already must be the same.
pub(super) async fn store(store: &Store, lists: &Lists) -> anyhow::Result<()> {
    for (list, prompts) in &lists.lists {
        let key = layout::prompts(*list);
        if let Created::Exists(found) = store.create(&key, prompts::to_parquet(prompts)).await? {
            let kept =
                prompts::from_parquet(&found).with_context(|| format!("{}/{key}", store.uri()))?;
            anyhow::ensure!(
                named(&kept) == named(prompts),
                "{}/{key} holds other prompts than the recipe names; use another output, or put the old prompts back",
                store.uri()
            );
        }
    }
    Ok(())
}

/// Digest of all texts in order, each ended by a line feed, which no prompt contains.
fn named(prompts: &[Prompt]) -> PromptDigest {
    let mut text = String::new();
    for prompt in prompts {
        text.push_str(prompt.text());
        text.push('\n');
    }
    PromptDigest {
        digest: Digest::of(text.as_bytes()),
        count: prompts.len() as u64,
    }
}
