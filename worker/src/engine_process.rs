//! One engine as a child process: started with a private socket, watched, killed when it must be.
//!
//! Everything the engine says comes out as [`Output`]s in order, its exit last. Knows nothing of leases: what an
//! exit means is the agent's to decide.

use std::fmt;
use std::net::IpAddr;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use distillery_common::proto::engine_link::{Command, CommitOutcome, Event, Setup};
use distillery_common::proto::{framing, wire};
use distillery_common::telemetry::{FORMAT_VARIABLE, Format};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;
use tokio::process::{Child, Command as Process};
use tokio::sync::{mpsc, watch};

use crate::secrets::Secrets;

mod messages;
mod output;
mod private;

pub use self::messages::{FromEngine, Request, from_wire};
pub use self::output::{Output as Printed, Tail};

/// Time from the start of the process until it must have opened its socket.
const CONNECT: Duration = Duration::from_secs(60);
/// Time that an engine whose socket has closed gets to end by itself.
const LAST_BREATH: Duration = Duration::from_secs(2);
/// Messages that may wait for an engine that does not read.
const QUEUE: usize = 256;

/// What an engine computes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// The host's processor.
    Cpu,
    /// A GPU by its ordinal.
    Cuda(u32),
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// What is started.
#[derive(Debug, Clone)]
pub struct Program {
    /// The engine.
    pub path: PathBuf,
    /// What it computes on.
    pub device: Device,
    /// Threads of a CPU engine; the recipe's when none.
    pub threads: Option<u32>,
    /// This host's address for the engines of other hosts; the engine's own choice when none.
    pub advertise: Option<IpAddr>,
}

/// What comes out of an engine.
#[derive(Debug)]
pub enum Output {
    /// It said something.
    Said(FromEngine),
    /// It has ended; nothing more comes.
    Exited(Exit),
}

/// How an engine ended.
#[derive(Debug, Clone)]
pub struct Exit {
    /// In words.
    pub how: String,
    /// Whether a signal from outside, or the host's memory killer, ended it rather than a fault of its own.
    pub killed: bool,
    /// Whether it ended by itself with exit code 0.
    pub clean: bool,
    /// Its last lines of output.
    pub tail: Vec<String>,
}

/// A running engine. Dropping it kills it.
#[derive(Debug)]
pub struct Engine {
    /// Tells this engine's outputs from those of its predecessors.
    pub id: u64,
    pid: Option<u32>,
    commands: mpsc::Sender<ToEngine>,
    kill: watch::Sender<bool>,
    tail: Tail,
}

/// What an engine is told.
#[derive(Debug, Clone, PartialEq)]
pub enum ToEngine {
    /// To do something.
    Command(Command),
    /// What became of a request to commit.
    Answer {
        /// Of the request.
        id: u64,
        /// What became of it.
        outcome: CommitOutcome,
    },
}

/// The far end of an [`Engine`]: whoever holds it does the work, or passes it on to who does.
#[derive(Debug)]
pub struct FarEnd {
    /// What the engine is told, in order.
    pub told: mpsc::Receiver<ToEngine>,
    /// True once the engine must end at once; its handle being gone means the same.
    pub killed: watch::Receiver<bool>,
}

impl Engine {
    /// The two ends of an engine that somebody else runs.
    pub fn between(id: u64, pid: Option<u32>) -> (Self, FarEnd) {
        let (commands, told) = mpsc::channel(QUEUE);
        let (kill, killed) = watch::channel(false);
        let engine = Self {
            id,
            pid,
            commands,
            kill,
            tail: Tail::default(),
        };
        (engine, FarEnd { told, killed })
    }

    /// Starts an engine; its outputs arrive at `outputs` with its `id`, and what it prints goes to `printed`.
    pub fn start(
        id: u64,
        program: &Program,
        setup: Setup,
        outputs: mpsc::Sender<(u64, Output)>,
        printed: Printed,
    ) -> std::io::Result<Self> {
        let socket = private::Socket::new()?;
        let mut child = spawn(program, socket.path(), printed.format)?;
        let pid = child.id();
        let piped = "the engine's output is a pipe";
        tokio::spawn(printed.clone().follow(child.stdout.take().expect(piped)));
        tokio::spawn(printed.clone().follow(child.stderr.take().expect(piped)));
        let (mut engine, far) = Self::between(id, pid);
        engine.tail = printed.tail.clone();
        let killed = far.killed;
        let watched = Watched { child, killed };
        let conversation = Conversation {
            id,
            setup,
            queued: far.told,
            outputs: outputs.clone(),
            secrets: Arc::clone(&printed.secrets),
        };
        tokio::spawn(async move {
            let exit = watched.run(socket, conversation, printed).await;
            let _ = outputs.send((id, Output::Exited(exit))).await;
        });
        Ok(engine)
    }

    /// Tells the engine. One that does not read any more is killed: its agent will hear of its exit.
    pub fn tell(&self, command: Command) {
        self.push(ToEngine::Command(command));
    }

    /// Answers a request to commit.
    pub fn answer(&self, request: u64, outcome: &CommitOutcome) {
        self.push(ToEngine::Answer {
            id: request,
            outcome: outcome.clone(),
        });
    }

    /// Ends the engine with SIGKILL.
    pub fn kill(&self) {
        self.kill.send_replace(true);
    }

    /// The last lines that it has printed.
    pub fn tail(&self) -> Vec<String> {
        self.tail.lines()
    }

    /// Its process id.
    pub fn pid(&self) -> Option<u32> {
        self.pid
    }

    fn push(&self, message: ToEngine) {
        if let Err(mpsc::error::TrySendError::Full(_)) = self.commands.try_send(message) {
            tracing::warn!("the engine does not read its socket; killing it");
            self.kill();
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.kill();
    }
}

fn spawn(program: &Program, socket: &Path, format: Format) -> std::io::Result<Child> {
    let mut process = Process::new(&program.path);
    process
        .arg("--socket")
        .arg(socket)
        .arg("--device")
        .arg(program.device.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // Not in the worker's process group: a Ctrl-C in the terminal is the worker's to handle.
        .process_group(0)
        .env_remove("DISTILLERY_JOIN")
        .env_remove("DISTILLERY_TOKEN")
        .env(FORMAT_VARIABLE, format.to_string())
        .kill_on_drop(true);
    if let Some(address) = program.advertise {
        process.arg("--advertise").arg(address.to_string());
    }
    if program.device == Device::Cpu {
        process.envs(steady_arithmetic());
    }
    if let Some(threads) = program.threads {
        process.env("OMP_NUM_THREADS", threads.to_string());
        process.env("MKL_NUM_THREADS", threads.to_string());
    }
    process.spawn()
}

/// Fixes the instruction set that the tensor library picks kernels for, so that hosts agree on every bit.
fn steady_arithmetic() -> Vec<(&'static str, &'static str)> {
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma")
        {
            return vec![
                ("ATEN_CPU_CAPABILITY", "avx2"),
                ("ONEDNN_MAX_CPU_ISA", "AVX2"),
                ("MKL_CBWR", "AVX2"),
            ];
        }
        vec![
            ("ATEN_CPU_CAPABILITY", "default"),
            ("ONEDNN_MAX_CPU_ISA", "SSE41"),
            ("MKL_CBWR", "COMPATIBLE"),
        ]
    }
    #[cfg(not(target_arch = "x86_64"))]
    vec![("ATEN_CPU_CAPABILITY", "default")]
}

/// What is said over the socket.
struct Conversation {
    id: u64,
    setup: Setup,
    queued: mpsc::Receiver<ToEngine>,
    outputs: mpsc::Sender<(u64, Output)>,
    secrets: Arc<Secrets>,
}

impl Conversation {
    /// Talks until either side closes the socket.
    async fn hold(self, socket: UnixStream) -> Result<(), framing::Error> {
        let (reading, mut writing) = socket.into_split();
        let mut queued = self.queued;
        let transmit = async {
            framing::write(&mut writing, &messages::to_wire(Command::Setup(self.setup))).await?;
            while let Some(message) = queued.recv().await {
                let message = match message {
                    ToEngine::Command(command) => messages::to_wire(command),
                    ToEngine::Answer { id, outcome } => messages::outcome_to_wire(id, &outcome),
                };
                framing::write(&mut writing, &message).await?;
            }
            Ok(())
        };
        tokio::select! {
            ended = transmit => ended,
            ended = receive(self.id, reading, self.outputs, &self.secrets) => ended,
        }
    }
}

async fn receive(
    id: u64,
    mut socket: OwnedReadHalf,
    outputs: mpsc::Sender<(u64, Output)>,
    secrets: &Secrets,
) -> Result<(), framing::Error> {
    while let Some(message) = framing::read::<_, wire::FromEngine>(&mut socket).await? {
        match messages::from_wire(message) {
            Ok(message) => {
                let message = without_secrets(message, secrets);
                let _ = outputs.send((id, Output::Said(message))).await;
            }
            Err(error) => tracing::error!(%error, "the engine sent a malformed message"),
        }
    }
    Ok(())
}

/// What an engine says went wrong may be the words of a library, too.
fn without_secrets(said: FromEngine, secrets: &Secrets) -> FromEngine {
    match said {
        FromEngine::Event(Event::TaskFailed { lease, failure }) => {
            let failure = secrets.hidden_in_failure(failure);
            FromEngine::Event(Event::TaskFailed { lease, failure })
        }
        FromEngine::Event(Event::GroupFailed {
            group,
            rank,
            failure,
        }) => {
            let failure = secrets.hidden_in_failure(failure);
            FromEngine::Event(Event::GroupFailed {
                group,
                rank,
                failure,
            })
        }
        said @ (FromEngine::Event(_) | FromEngine::Commit(_)) => said,
    }
}

struct Watched {
    child: Child,
    killed: watch::Receiver<bool>,
}

impl Watched {
    /// Waits for the socket, the exit or the order to kill, whichever comes first, and always reaps the child.
    async fn run(
        mut self,
        socket: private::Socket,
        conversation: Conversation,
        printed: Printed,
    ) -> Exit {
        let talk = async {
            // Its name has served then; nothing is left behind if this process is killed from there on.
            match tokio::time::timeout(CONNECT, socket.accept_own()).await {
                Ok(Ok(socket)) => conversation.hold(socket).await,
                Ok(Err(error)) => Err(error.into()),
                Err(_) => Err(framing::Error::Io(std::io::ErrorKind::TimedOut.into())),
            }
        };
        let asked = tokio::select! {
            ended = talk => {
                if let Err(error) = ended {
                    tracing::warn!(%error, "the conversation with the engine ended");
                }
                let _ = tokio::time::timeout(LAST_BREATH, self.child.wait()).await;
                false
            }
            _ = self.child.wait() => false,
            () = asked_to_kill(&mut self.killed) => true,
        };
        let _ = self.child.start_kill();
        let status = self.child.wait().await;
        // The pipes may still hold the last words.
        tokio::time::sleep(Duration::from_millis(20)).await;
        let how = describe(&status, asked);
        printed.ended(&how);
        Exit {
            how,
            killed: asked || status.as_ref().is_ok_and(was_killed),
            clean: status.is_ok_and(|status| status.success()),
            tail: printed.tail.lines(),
        }
    }
}

/// Waits for the order to kill; an engine whose handle is gone is to be killed, too.
async fn asked_to_kill(killed: &mut watch::Receiver<bool>) {
    let _ = killed.wait_for(|&killed| killed).await;
}

/// SIGKILL and SIGTERM come from outside; other signals and exit codes are the engine's own faults.
fn was_killed(status: &ExitStatus) -> bool {
    matches!(status.signal(), Some(9 | 15))
}

fn describe(status: &std::io::Result<ExitStatus>, asked: bool) -> String {
    match status {
        Ok(_) if asked => "was killed by its worker".into(),
        Ok(status) => match (status.signal(), status.code()) {
            (Some(9), _) => {
                "was killed (SIGKILL; the host's out-of-memory killer does this, too)".into()
            }
            (Some(signal), _) => format!("was ended by signal {signal}"),
            (None, Some(code)) => format!("exited with code {code}"),
            (None, None) => "ended".into(),
        },
        Err(error) => format!("cannot be waited for: {error}"),
    }
}
