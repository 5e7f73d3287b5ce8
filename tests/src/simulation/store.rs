//! The store of a simulated fleet: objects in memory, behind a network and with a temper.
//!
//! Every process has a door of its own. A request that was sent is carried out even if its sender dies meanwhile, and a
//! reply may come after its sender has given up: the fates that real requests have.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::stream::BoxStream;
use futures::{FutureExt as _, StreamExt as _};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    ObjectStoreExt as _, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use tokio::sync::oneshot;
use tokio::time::sleep;

use distillery_common::storage::Store;

use super::history::{Client, Strike, Trouble};
use super::world::{Host, Pid, World, moment};

/// How long a client waits for an answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// The door of one process.
pub(super) struct Door {
    world: Arc<World>,
    objects: Arc<InMemory>,
    pid: Pid,
    host: Host,
    stream: u64,
}

/// The store as `pid` sees it.
pub(super) fn open(world: &Arc<World>, objects: &Arc<InMemory>, pid: Pid, host: Host) -> Store {
    let door = Door {
        world: Arc::clone(world),
        objects: Arc::clone(objects),
        pid,
        host,
        stream: world.new_stream(),
    };
    Store::over(Arc::new(door), "memory://simulation")
}

fn failed(why: &'static str) -> object_store::Error {
    object_store::Error::Generic {
        store: "Simulation",
        source: why.into(),
    }
}

/// What a request meets besides distance.
#[derive(Debug, Clone, Copy, Default)]
struct Fate {
    strike: Option<Strike>,
    slow: Duration,
    conflict: bool,
}

/// What a request wants.
#[derive(Debug, Clone)]
enum Request {
    Put(Path, PutPayload, PutOptions),
    Get(Path, GetOptions),
    Delete(Path),
    List(Option<Path>),
}

enum Reply {
    Put(PutResult),
    Get(GetResult),
    Deleted,
    Listed(Vec<ObjectMeta>),
}

impl Request {
    fn name(&self) -> (&'static str, &str) {
        match self {
            Self::Put(path, ..) => ("put", path.as_ref()),
            Self::Get(path, _) => ("get", path.as_ref()),
            Self::Delete(path) => ("delete", path.as_ref()),
            Self::List(Some(path)) => ("list", path.as_ref()),
            Self::List(None) => ("list", ""),
        }
    }

    fn creates(&self) -> bool {
        matches!(self, Self::Put(_, _, options) if options.mode == PutMode::Create)
    }

    fn writes(&self) -> bool {
        matches!(self, Self::Put(..) | Self::Delete(_))
    }
}

impl Door {
    async fn ask(&self, request: Request) -> Result<Reply> {
        self.world.gate(self.pid).await;
        if let Request::Put(path, _, _) = &request {
            super::objects::about_to_write(&self.world, self.pid, path.as_ref());
        }
        let fate = self.fate(&request);
        let (answer, answered) = oneshot::channel();
        let (world, objects) = (Arc::clone(&self.world), Arc::clone(&self.objects));
        let (pid, host, stream) = (self.pid, self.host, self.stream);
        tokio::spawn(async move {
            let reply = carry(&world, &objects, (pid, host, stream), request, fate).await;
            let _ = answer.send(reply);
        });
        let reply = tokio::time::timeout(PATIENCE + fate.slow, answered).await;
        self.world.gate(self.pid).await;
        match reply {
            Ok(Ok(reply)) => reply,
            Ok(Err(_)) | Err(_) => Err(failed("no answer in time")),
        }
    }

    fn fate(&self, request: &Request) -> Fate {
        let mut fate = Fate {
            strike: self.world.next_operation(),
            ..Fate::default()
        };
        let now = moment();
        let mut state = self.world.state();
        let spells = state.spells.clone();
        for spell in spells.iter().filter(|spell| now < spell.until) {
            let concerned = match spell.client {
                Client::Everybody => true,
                Client::Coordinators => matches!(self.host, Host::Coordinator(_)),
                Client::Worker(worker) => self.host == Host::Worker(worker),
            };
            if !concerned || state.chance.below(self.stream, spell.one_in) != 0 {
                continue;
            }
            state.account.strikes += 1;
            match spell.trouble {
                Trouble::ErrorBefore => fate.strike = Some(Strike::Before),
                Trouble::ErrorAfter => fate.strike = Some(Strike::After),
                Trouble::LostReply => fate.strike = Some(Strike::LostReply),
                Trouble::Conflict => fate.conflict = request.creates(),
                Trouble::Slow => {
                    let ms = state.chance.below(self.stream, 15_000);
                    fate.slow = Duration::from_millis(ms);
                }
                Trouble::Full if request.writes() => fate.strike = Some(Strike::Before),
                Trouble::Full => {}
            }
        }
        fate
    }
}

/// Brings a request to the store, carries it out, and brings the reply back.
async fn carry(
    world: &Arc<World>,
    objects: &InMemory,
    (pid, host, stream): (Pid, Host, u64),
    request: Request,
    fate: Fate,
) -> Result<Reply> {
    // Most of a slow request's time passes on its way there: it takes effect long after it was sent.
    sleep(fate.slow).await;
    world.travel(stream, host, Host::Store).await;
    if fate.strike == Some(Strike::Before) {
        world.travel(stream, Host::Store, host).await;
        return Err(failed("503: an injected fault"));
    }
    if fate.conflict {
        return Err(object_store::Error::Precondition {
            path: request.name().1.to_owned(),
            source: "412: an injected conflict".into(),
        });
    }
    let mut reply = execute(world, objects, pid, host, request.clone());
    match fate.strike {
        Some(Strike::After) => reply = Err(failed("500: an injected fault")),
        Some(Strike::LostReply) if request.writes() => {
            world.travel(stream, host, Host::Store).await;
            reply = execute(world, objects, pid, host, request);
        }
        Some(Strike::Killed) => world.kill(pid_of_worker(world, pid), false),
        Some(Strike::LostReply | Strike::Before) | None => {}
    }
    world.travel(stream, Host::Store, host).await;
    reply
}

/// An engine dies with its worker, so the worker is who is killed.
fn pid_of_worker(world: &World, pid: Pid) -> Pid {
    world.parent(pid).unwrap_or(pid)
}

fn execute(
    world: &World,
    objects: &InMemory,
    pid: Pid,
    host: Host,
    request: Request,
) -> Result<Reply> {
    let ready = "memory answers at once";
    let (verb, key) = request.name();
    let (key, written) = (key.to_owned(), request.writes());
    let before = written.then(|| look(objects, &key)).flatten();
    let reply = match request.clone() {
        Request::Put(path, payload, options) => objects
            .put_opts(&path, payload, options)
            .now_or_never()
            .expect(ready)
            .map(Reply::Put),
        Request::Get(path, options) => objects
            .get_opts(&path, options)
            .now_or_never()
            .expect(ready)
            .map(Reply::Get),
        Request::Delete(path) => {
            let deleted = objects.delete(&path).now_or_never().expect(ready);
            deleted.map(|()| Reply::Deleted)
        }
        Request::List(prefix) => {
            let listed = objects.list(prefix.as_ref()).collect::<Vec<_>>();
            let listed = listed.now_or_never().expect(ready);
            let listed: Result<Vec<_>> = listed.into_iter().collect();
            listed.map(Reply::Listed)
        }
    };
    let done = reply.is_ok();
    world.happened(format_args!("{host:?} {verb} {key} {done}"));
    if done && written {
        let after = look(objects, &key);
        let creates = request.creates();
        super::objects::changed(world, objects, pid, &key, creates, before, after);
    }
    reply
}

/// An object, past every door.
pub(super) fn look(objects: &InMemory, key: &str) -> Option<bytes::Bytes> {
    let found = objects.get(&Path::from(key)).now_or_never()?.ok()?;
    found.bytes().now_or_never()?.ok()
}

impl fmt::Debug for Door {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Door({:?})", self.host)
    }
}

impl fmt::Display for Door {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Door({:?})", self.host)
    }
}

fn unsupported(operation: &'static str) -> object_store::Error {
    object_store::Error::NotImplemented {
        operation: operation.into(),
        implementer: "Simulation".into(),
    }
}

#[async_trait]
impl ObjectStore for Door {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        opts: PutOptions,
    ) -> Result<PutResult> {
        match self
            .ask(Request::Put(location.clone(), payload, opts))
            .await?
        {
            Reply::Put(done) => Ok(done),
            _ => unreachable!("a put is answered by a put"),
        }
    }

    async fn put_multipart_opts(
        &self,
        _: &Path,
        _: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        Err(unsupported("multipart uploads: all objects here are small"))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        match self.ask(Request::Get(location.clone(), options)).await? {
            Reply::Get(done) => Ok(done),
            _ => unreachable!("a get is answered by a get"),
        }
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        let door = Self {
            world: Arc::clone(&self.world),
            objects: Arc::clone(&self.objects),
            pid: self.pid,
            host: self.host,
            stream: self.stream,
        };
        let door = Arc::new(door);
        locations
            .then(move |location| {
                let door = Arc::clone(&door);
                async move {
                    let location = location?;
                    door.ask(Request::Delete(location.clone())).await?;
                    Ok(location)
                }
            })
            .boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let door = Self {
            world: Arc::clone(&self.world),
            objects: Arc::clone(&self.objects),
            pid: self.pid,
            host: self.host,
            stream: self.stream,
        };
        let prefix = prefix.cloned();
        futures::stream::once(async move { door.ask(Request::List(prefix)).await })
            .flat_map(|reply| {
                let entries = match reply {
                    Ok(Reply::Listed(entries)) => entries.into_iter().map(Ok).collect(),
                    Ok(_) => unreachable!("a list is answered by a list"),
                    Err(error) => vec![Err(error)],
                };
                futures::stream::iter(entries)
            })
            .boxed()
    }

    async fn list_with_delimiter(&self, _: Option<&Path>) -> Result<ListResult> {
        Err(unsupported("listing one level"))
    }

    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> Result<()> {
        Err(unsupported("copying"))
    }
}
