//! Who may talk to a run: its token, its join string, and where both are kept.

use std::fs::{DirBuilder, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::Context as _;

use distillery_common::recipe::Secret;
use distillery_common::run::RunRecord;
use distillery_common::security::{self, Authority, Join, PageKey, Token};
use distillery_common::storage::{Store, layout};

/// Environment variable that holds a token.
const TOKEN_VARIABLE: &str = "DISTILLERY_TOKEN";

/// The secrets of one run, and the folder that keeps them.
#[derive(Debug)]
pub struct Access {
    run_id: String,
    token: Token,
    folder: PathBuf,
}

impl Access {
    /// The token that the recipe or the environment names, or the one kept beside the run; made if there is none.
    pub fn of_run(
        store: &Store,
        record: &RunRecord,
        given: Option<&Secret>,
    ) -> anyhow::Result<Self> {
        let run_id = record.run_id.to_string();
        let folder = state_folder(store, &run_id)?;
        make_private(&folder)?;
        let token = match given {
            Some(secret) => Token::parse(secret.reveal()).context("cluster.token")?,
            None => match std::env::var(TOKEN_VARIABLE) {
                Ok(text) => Token::parse(&text).context(TOKEN_VARIABLE)?,
                Err(_) => Token::load_or_create(&folder.join("token"))?,
            },
        };
        Ok(Self {
            run_id,
            token,
            folder,
        })
    }

    /// What the environment or the folder beside the run holds already, for whoever only looks; makes nothing. A token that
    /// only the recipe names stands in the join string that the coordinator wrote.
    pub fn find(store: &Store, record: &RunRecord) -> anyhow::Result<Option<Self>> {
        let run_id = record.run_id.to_string();
        let folder = state_folder(store, &run_id)?;
        let kept = folder.join("token");
        let token = match std::env::var(TOKEN_VARIABLE) {
            Ok(text) => Token::parse(&text).context(TOKEN_VARIABLE)?,
            Err(_) if kept.exists() => Token::load(&kept)?,
            Err(_) => match written_join(&folder)? {
                Some(join) if join.run_id() == run_id => join.token().clone(),
                Some(_) | None => return Ok(None),
            },
        };
        Ok(Some(Self {
            run_id,
            token,
            folder,
        }))
    }

    /// What admits to the run.
    pub fn token(&self) -> &Token {
        &self.token
    }

    /// How to reach the coordinator at `endpoint`.
    pub fn join(&self, endpoint: &str, tls: bool) -> Result<Join, security::Error> {
        Join::new(endpoint, &self.run_id, self.token.clone(), tls)
    }

    /// Keeps the join string in a file that only its owner may read, for workers that others start.
    pub fn write_join(&self, join: &Join) -> anyhow::Result<PathBuf> {
        self.write_private("join", &join.reveal())
    }

    fn write_private(&self, name: &str, text: &str) -> anyhow::Result<PathBuf> {
        let path = self.folder.join(name);
        let partial = self.folder.join(format!("{name}.partial"));
        let write = || {
            // A left-over may have other permissions.
            let _ = std::fs::remove_file(&partial);
            let mut file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&partial)?;
            writeln!(file, "{text}")?;
            std::fs::rename(&partial, &path)
        };
        write().with_context(|| format!("{} cannot be written", path.display()))?;
        Ok(path)
    }

    /// Keeps the link to the live page, key and all, in a file that only its owner may read.
    pub fn write_page(&self, link: &str) -> anyhow::Result<PathBuf> {
        self.write_private("page", link)
    }

    /// Keeps the page's key by itself, for scrapers of metrics, in a file that only its owner may read.
    pub fn write_page_key(&self, key: &PageKey) -> anyhow::Result<PathBuf> {
        self.write_private("page-key", key.reveal())
    }

    /// Keeps the certificate, no secret, by which scrapers and browsers know the page.
    pub fn write_page_authority(&self, authority: &Authority) -> anyhow::Result<PathBuf> {
        self.write_private("page-ca.pem", authority.certificate_pem().trim_end())
    }

    /// Folder for the logs of workers on this host.
    pub fn logs(&self) -> PathBuf {
        self.folder.join("logs")
    }
}

/// The join string that the last coordinator wrote, if one did.
fn written_join(folder: &Path) -> anyhow::Result<Option<Join>> {
    let path = folder.join("join");
    if !path.exists() {
        return Ok(None);
    }
    let text = security::read_private(&path)?;
    // It is only read for its token; nothing is sent on its account.
    let join = Join::parse(&text, true).with_context(|| path.display().to_string())?;
    Ok(Some(join))
}

/// Beside a run on disk; in the user's state folder for others.
fn state_folder(store: &Store, run_id: &str) -> anyhow::Result<PathBuf> {
    Ok(match store.local_file(&layout::run_record()) {
        Some(record) => record.parent().map(Path::to_path_buf).unwrap_or_default(),
        None => user_state_folder()?.join(run_id),
    })
}

fn make_private(folder: &Path) -> anyhow::Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .with_context(|| format!("{} cannot be made", folder.display()))
}

fn user_state_folder() -> anyhow::Result<PathBuf> {
    let state = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from);
    let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".local/state"));
    state
        .or_else(home)
        .map(|folder| folder.join("distillery"))
        .context("neither XDG_STATE_HOME nor HOME says where to keep the run's token")
}
