//! Builds the agents, feeds them signals, and waits for them.

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use distillery_common::telemetry::Format;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::agent::{Agent, Alive, Ending, Host, JoinSource, Leave, Outside};
use crate::engine_process::Device;
use crate::logs::Keeper;

/// Exit code that asks whoever started this worker to start it again.
const TRY_AGAIN: u8 = 75;

/// How long a signal from a scheduler may echo.
const ECHO: Duration = Duration::from_secs(1);

/// How long the last output of engines may take to be kept with the run.
const LAST_LINES: Duration = Duration::from_secs(2);

/// Checked settings of this process.
#[derive(Debug, Clone)]
pub struct Config {
    /// How the coordinator is found.
    pub join: JoinSource,
    /// Whether a coordinator on another host may do without TLS.
    pub insecure: bool,
    /// Name for people, logs and keys.
    pub name: String,
    /// The host's name.
    pub host: String,
    /// What is lent; each gets an agent and an engine.
    pub devices: Vec<Device>,
    /// The engine's program.
    pub engine: PathBuf,
    /// Threads of each CPU engine.
    pub threads: Option<u32>,
    /// This host's address for the engines of other hosts; the one that faces the coordinator when none.
    pub advertise: Option<IpAddr>,
    /// Time to finish the work in hand when told to leave.
    pub drain_grace: Duration,
    /// Exit code after a signal to leave.
    pub signal_exit_code: u8,
    /// Whether to end when the standard input closes.
    pub parent_stdin: bool,
    /// The file that shows that this process does not hang, where somebody looks at it.
    pub alive: Option<PathBuf>,
}

impl Config {
    /// Name of the agent for `device`: this worker's, with the ordinal when there are several.
    pub fn agent_name(&self, device: Device) -> String {
        match device {
            Device::Cuda(ordinal) if self.devices.len() > 1 => format!("{}.{ordinal}", self.name),
            Device::Cpu | Device::Cuda(_) => self.name.clone(),
        }
    }
}

/// Runs until every agent has ended; logs are in `format`.
pub fn run(config: Config, format: Format) -> anyhow::Result<ExitCode> {
    tracing::debug!(?config.devices, "starting");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("the runtime cannot start")?;
    let code = runtime.block_on(serve(config, format));
    // A read of the standard input cannot be called back.
    runtime.shutdown_timeout(Duration::from_millis(100));
    code
}

async fn serve(config: Config, format: Format) -> anyhow::Result<ExitCode> {
    let config = Arc::new(config);
    let (keeper, kept) = Keeper::new();
    let host: Arc<dyn Outside> = Arc::new(Host::new(keeper, format));
    let (leave, told) = watch::channel(Leave::Stay);
    let watching = tokio::spawn(watch_for_reasons_to_leave(config.parent_stdin, leave));
    let alive = match config.alive.clone().map(Alive::at) {
        None => None,
        Some(Ok(alive)) => Some(alive),
        Some(Err(error)) => return Err(error).context("the file of --alive cannot be made"),
    };
    let agents: Vec<_> = config
        .devices
        .iter()
        .map(|&device| {
            let agent = Agent::new(Arc::clone(&config), device, Arc::clone(&host));
            let agent = agent.showing(alive.as_ref().map(Alive::begin));
            tokio::spawn(agent.run(told.clone()))
        })
        .collect();
    let (mut deserted, mut interrupted) = (false, false);
    let mut failure = None;
    for agent in agents {
        match agent.await.context("an agent panicked")? {
            Ok(Ending::Left) => {}
            Ok(Ending::Deserted) => deserted = true,
            Ok(Ending::Interrupted) => interrupted = true,
            Err(error) => failure = failure.or(Some(error)),
        }
    }
    watching.abort();
    drop(host);
    kept.within(LAST_LINES).await;
    match failure {
        Some(error) => Err(error),
        None if deserted => Ok(ExitCode::from(TRY_AGAIN)),
        // As if the signal had come here, where whoever started this worker asks for a code of its own.
        None if interrupted => Ok(ExitCode::from(match config.signal_exit_code {
            0 => TRY_AGAIN,
            code => code,
        })),
        None if *told.borrow() == Leave::Stay => Ok(ExitCode::SUCCESS),
        None => Ok(ExitCode::from(config.signal_exit_code)),
    }
}

/// The first signal drains, the second ends at once; so does a parent's end. A scheduler's signal that comes again within
/// a moment is the same one: it goes to a script and its children, and the script passes it on.
async fn watch_for_reasons_to_leave(
    parent_stdin: bool,
    leave: watch::Sender<Leave>,
) -> anyhow::Result<()> {
    let kinds = [
        (SignalKind::terminate(), "SIGTERM"),
        (SignalKind::interrupt(), "SIGINT"),
        (SignalKind::hangup(), "SIGHUP"),
        (SignalKind::user_defined1(), "SIGUSR1"),
        (SignalKind::user_defined2(), "SIGUSR2"),
    ];
    let (sender, mut signals) = tokio::sync::mpsc::channel(8);
    for (kind, name) in kinds {
        let mut stream = signal(kind).with_context(|| format!("{name} cannot be watched"))?;
        let sender = sender.clone();
        tokio::spawn(async move {
            while stream.recv().await.is_some() {
                let _ = sender.send(name).await;
            }
        });
    }
    let parent = async {
        if parent_stdin {
            parent_ended().await;
        } else {
            std::future::pending::<()>().await;
        }
    };
    tokio::pin!(parent);
    let mut echo = None;
    loop {
        tokio::select! {
            Some(name) = signals.recv() => {
                if echo.is_some() && name != "SIGINT" {
                    tracing::debug!(signal = name, "told to leave again at once");
                    continue;
                }
                echo = Some(Box::pin(tokio::time::sleep(ECHO)));
                tracing::info!(signal = name, "told to leave");
                leave.send_modify(|leave| {
                    *leave = if *leave == Leave::Stay { Leave::Drain } else { Leave::Now };
                });
            }
            () = async {
                match &mut echo {
                    Some(echo) => echo.await,
                    None => std::future::pending().await,
                }
            } => echo = None,
            () = &mut parent => {
                tracing::info!("the parent process ended");
                leave.send_replace(Leave::Now);
                return Ok(());
            }
        }
    }
}

/// Waits for the end of the standard input on a thread of its own, which nothing can call back.
async fn parent_ended() {
    let (ended, heard) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
        let _ = ended.send(());
    });
    let _ = heard.await;
}
