//! What an agent reaches beyond itself: a coordinator, a store, engines.
//!
//! A trait because two worlds are needed: this host, and one in which a whole fleet runs on one thread in virtual
//! time. Nothing here knows what the agent wants with what it reaches, and nothing here decides.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::sync::Arc;

use distillery_common::proto::engine_link::Setup;
use distillery_common::security::Join;
use distillery_common::storage::{self, Store, layout};
use distillery_common::telemetry::Format;
use tokio::sync::mpsc;

use super::client::{self, Closed, Heard, Said};
use crate::engine_process::{Engine, Output, Printed, Program, Tail};
use crate::logs::Keeper;
use crate::secrets::Secrets;

/// The world round an agent.
#[tonic::async_trait]
pub trait Outside: Send + Sync {
    /// Opens a stream to the coordinator of `join`: what is `said` reaches it in order, and what it says comes back.
    async fn open_session(&self, join: &Join, said: Said) -> Result<Heard, Closed>;

    /// Opens the store of a run.
    fn open_store(&self, uri: &str) -> Result<Store, storage::Error>;

    /// Starts an engine; see [`Engine::start`].
    fn start_engine(
        &self,
        id: u64,
        program: &Program,
        setup: Setup,
        outputs: mpsc::Sender<(u64, Output)>,
    ) -> io::Result<Engine>;

    /// The address of this host that faces `address` (`host:port`): what others on the way there can reach it by.
    fn facing(&self, address: &str) -> io::Result<IpAddr>;

    /// Memory of this process and of the engine with this process id.
    fn resident_bytes(&self, engine: Option<u32>) -> u64;

    /// The id of this process.
    fn process_id(&self) -> u32;
}

/// This host, and the network that it is connected to.
#[derive(Debug)]
pub struct Host {
    keeper: Keeper,
    secrets: Arc<Secrets>,
    format: Format,
}

impl Host {
    /// The host, whose engines' output `keeper` keeps and the worker's log shows in `format`.
    pub fn new(keeper: Keeper, format: Format) -> Self {
        Self {
            keeper,
            secrets: Arc::new(Secrets::of_environment()),
            format,
        }
    }

    /// Where what engine `id` prints goes. An engine works whether it can be kept or not.
    fn printed(&self, id: u64, setup: &Setup) -> Printed {
        let folder = layout::engine_log(&setup.worker, setup.incarnation, id);
        let intake = match Store::open(&setup.run_uri) {
            Ok(store) => Some(self.keeper.keep(store, folder)),
            Err(error) => {
                tracing::warn!(%error, "output of the engine cannot be kept with the run");
                None
            }
        };
        Printed {
            engine: (setup.worker.clone(), id),
            format: self.format,
            secrets: Arc::clone(&self.secrets),
            intake,
            tail: Tail::default(),
        }
    }
}

#[tonic::async_trait]
impl Outside for Host {
    async fn open_session(&self, join: &Join, said: Said) -> Result<Heard, Closed> {
        // An engine starts only after a coordinator has answered.
        self.secrets.learn(join);
        client::dial(join, said).await
    }

    fn open_store(&self, uri: &str) -> Result<Store, storage::Error> {
        Store::open(uri)
    }

    fn start_engine(
        &self,
        id: u64,
        program: &Program,
        setup: Setup,
        outputs: mpsc::Sender<(u64, Output)>,
    ) -> io::Result<Engine> {
        let printed = self.printed(id, &setup);
        Engine::start(id, program, setup, outputs, printed)
    }

    fn facing(&self, address: &str) -> io::Result<IpAddr> {
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for peer in address.to_socket_addrs()? {
            let any: IpAddr = match peer {
                SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
                SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
            };
            // Connecting a datagram socket sends nothing: it asks the system for the way.
            let found = UdpSocket::bind((any, 0)).and_then(|socket| {
                socket.connect(peer)?;
                socket.local_addr()
            });
            match found {
                Ok(own) => return Ok(own.ip()),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    fn resident_bytes(&self, engine: Option<u32>) -> u64 {
        let engine = engine.map_or(0, |pid| resident_bytes(&pid.to_string()));
        resident_bytes("self") + engine
    }

    fn process_id(&self) -> u32 {
        std::process::id()
    }
}

/// Resident memory of a process as Linux counts it; 0 where it cannot be read.
fn resident_bytes(process: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}
