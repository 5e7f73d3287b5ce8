//! The socket that an engine comes to: nobody but this user can reach it, whatever the umask, and whoever is somebody else is
//! sent away.
//!
//! The first message over it tells the group's secret, so it must not reach a stranger.

use std::fs::Permissions;
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use tokio::net::{UnixListener, UnixStream};

/// A socket in a folder of its own, which goes with it.
#[derive(Debug)]
pub(super) struct Socket {
    listener: UnixListener,
    path: PathBuf,
    /// The user whom this process runs as.
    owner: u32,
    /// Holds the socket's name.
    _folder: tempfile::TempDir,
}

impl Socket {
    /// Listens where only this user can connect.
    pub(super) fn new() -> io::Result<Self> {
        // Without a word of ours the umask alone would decide on both modes.
        let folder = tempfile::Builder::new()
            .prefix("distillery-")
            .permissions(Permissions::from_mode(0o700))
            .tempdir()?;
        let path = folder.path().join("engine.sock");
        let listener = UnixListener::bind(&path)?;
        std::fs::set_permissions(&path, Permissions::from_mode(0o600))?;
        // What this process has just made belongs to whom it runs as.
        let owner = std::fs::metadata(folder.path())?.uid();
        Ok(Self {
            listener,
            path,
            owner,
            _folder: folder,
        })
    }

    /// Where an engine connects.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Waits for the first connection by a process of this user. Others are told of, and sent away.
    ///
    /// # Errors
    /// Where the system cannot accept, or cannot say who came.
    pub(super) async fn accept_own(self) -> io::Result<UnixStream> {
        loop {
            let (stream, _) = self.listener.accept().await?;
            let peer = stream.peer_cred()?;
            if peer.uid() == self.owner {
                return Ok(stream);
            }
            tracing::error!(
                uid = peer.uid(),
                pid = peer.pid(),
                "refused: another user's process connected to an engine's socket; waiting on for the engine"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt as _;

    use super::*;

    #[tokio::test]
    async fn another_users_process_is_sent_away_and_the_own_one_still_gets_in() {
        let mut socket = Socket::new().expect("it listens");
        let path = socket.path().to_owned();
        let own = socket.owner;
        // Whoever connects here is somebody else, then.
        socket.owner = own + 1;
        let mut stranger = UnixStream::connect(&path).await.expect("it connects");
        let mut told = Vec::new();
        {
            let mut accepting = std::pin::pin!(socket.accept_own());
            tokio::select! {
                accepted = &mut accepting => panic!("let in: {accepted:?}"),
                heard = stranger.read_to_end(&mut told) => assert_eq!(heard.expect("it ends"), 0),
            }
        }

        let socket = Socket::new().expect("it listens");
        let path = socket.path().to_owned();
        let _engine = UnixStream::connect(&path).await.expect("it connects");
        socket.accept_own().await.expect("the own user's process");
        assert!(!path.exists(), "its name is gone with it");
    }
}
