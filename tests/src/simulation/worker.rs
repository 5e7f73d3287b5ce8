//! Workers of a simulated fleet: the shipping agent, with the simulation for its outside, one process after another.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use object_store::memory::InMemory;
use tokio::sync::{mpsc, watch};
use tokio::time::sleep;

use distillery_common::proto::engine_link::Setup;
use distillery_common::security::Join;
use distillery_common::storage::{self, Store};
use distillery_worker::agent::{Agent, Closed, Heard, JoinSource, Leave, Outside, Said};
use distillery_worker::app::Config;
use distillery_worker::engine_process::{Device, Engine, Output, Program};

use super::world::{Host, Pid, Role, World};
use super::{engine, network, store};

/// Time to finish when told to leave.
const DRAIN: Duration = Duration::from_secs(25);

/// Starts a worker on a host, and another one whenever it has ended.
pub(super) fn start(world: &Arc<World>, objects: &Arc<InMemory>, worker: usize) {
    let pid = world.new_process(Host::Worker(worker), Role::Agent, None);
    let (leave, told) = watch::channel(Leave::Stay);
    {
        let mut state = world.state();
        state.account.workers += 1;
        state.leaves.insert(worker, leave);
    }
    let outside = Surroundings {
        world: Arc::clone(world),
        objects: Arc::clone(objects),
        pid,
        worker,
    };
    let agent = Agent::new(Arc::new(config(worker)), Device::Cpu, Arc::new(outside));
    let running = world.run_process(pid, agent.run(told));
    let (world, objects) = (Arc::clone(world), Arc::clone(objects));
    tokio::spawn(async move {
        let ended = running.await;
        world.remark(format_args!("worker {worker} ended: {ended:?}"));
        if ended.is_err_and(|error| error.is_panic()) {
            world.broken("panic", super::panics::take().unwrap_or_default());
        }
        world.kill(pid, false);
        let stream = world.new_stream();
        sleep(Duration::from_millis(200 + world.below(stream, 4_000))).await;
        start(&world, &objects, worker);
    });
}

fn config(worker: usize) -> Config {
    let token = "5a".repeat(32);
    Config {
        join: JoinSource::Text(format!("http://127.0.0.1:1/simulation#{token}")),
        insecure: false,
        name: format!("w{worker}"),
        host: format!("h{worker}"),
        devices: vec![Device::Cpu],
        engine: PathBuf::from("engine"),
        threads: None,
        advertise: None,
        drain_grace: DRAIN,
        signal_exit_code: 0,
        parent_stdin: false,
        alive: None,
    }
}

struct Surroundings {
    world: Arc<World>,
    objects: Arc<InMemory>,
    pid: Pid,
    worker: usize,
}

#[tonic::async_trait]
impl Outside for Surroundings {
    async fn open_session(&self, _: &Join, said: Said) -> Result<Heard, Closed> {
        network::dial(&self.world, self.pid, self.worker, said).await
    }

    fn open_store(&self, _: &str) -> Result<Store, storage::Error> {
        let host = Host::Worker(self.worker);
        Ok(store::open(&self.world, &self.objects, self.pid, host))
    }

    fn start_engine(
        &self,
        id: u64,
        _: &Program,
        _: Setup,
        outputs: mpsc::Sender<(u64, Output)>,
    ) -> io::Result<Engine> {
        let (handle, far) = Engine::between(id, None);
        engine::start(
            &self.world,
            &self.objects,
            self.pid,
            self.worker,
            id,
            far,
            outputs,
        );
        Ok(handle)
    }

    fn facing(&self, _: &str) -> io::Result<IpAddr> {
        Ok(Ipv4Addr::LOCALHOST.into())
    }

    fn resident_bytes(&self, _: Option<u32>) -> u64 {
        1
    }

    fn process_id(&self) -> u32 {
        self.pid.0
    }
}
