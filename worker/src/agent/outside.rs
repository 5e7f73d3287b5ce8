//! What an agent reaches beyond itself: a coordinator, a store, engines.
//!
//! A trait because two worlds are needed: this host, and one in which a whole fleet runs on one thread in virtual
//! time. Nothing here knows what the agent wants with what it reaches, and nothing here decides.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs, UdpSocket};

use distillery_common::proto::engine_link::Setup;
use distillery_common::security::Join;
use distillery_common::storage::{self, Store};
use tokio::sync::mpsc;

use super::client::{self, Closed, Heard, Said};
use crate::engine_process::{Engine, Output, Program};

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
#[derive(Debug, Clone, Copy)]
pub struct Host;

#[tonic::async_trait]
impl Outside for Host {
    async fn open_session(&self, join: &Join, said: Said) -> Result<Heard, Closed> {
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
        Engine::start(id, program, setup, outputs)
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
