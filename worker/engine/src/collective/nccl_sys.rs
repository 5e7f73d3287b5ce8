//! The NCCL functions in use, loaded at run time: the one place that calls foreign code.
//!
//! Types come from cudarc, so the signatures are NCCL's, but the library is looked for under the name that its packages
//! install (`libnccl.so.2`), which cudarc's own loader never tries, and results are read as plain numbers: newer libraries
//! know more of them than any list, and a number that an `enum` lacks must never become one.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

use cudarc::nccl::sys::{
    cudaStream_t, ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclResult_t, ncclUniqueId,
};
use libloading::Library as File;
use tch::{Kind, Tensor};

use super::{Error, NcclFault};

const SUCCESS: c_int = ncclResult_t::ncclSuccess as c_int;
/// A peer or the way to it is gone.
const REMOTE_ERROR: c_int = ncclResult_t::ncclRemoteError as c_int;
/// No fault: ask again.
const IN_PROGRESS: c_int = ncclResult_t::ncclInProgress as c_int;
const SUM: c_int = ncclRedOp_t::ncclSum as c_int;
/// `NCCL_API_MAGIC`, which begins a configuration.
const MAGIC: c_uint = 0xcafe_beef;
/// `NCCL_VERSION(2, 14, 0)`: the version of [`Config`].
const VERSION: c_uint = 21_400;
/// `CUDA_ERROR_NOT_READY`.
const NOT_READY: c_int = 600;

/// The legacy default stream, on which libtorch computes.
const DEFAULT_STREAM: cudaStream_t = std::ptr::null_mut();

/// `ncclConfig_t` as it began in NCCL 2.14. The size in front tells newer libraries to take their defaults for the rest.
#[repr(C)]
struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
}

type GetUniqueId = unsafe extern "C" fn(*mut ncclUniqueId) -> c_int;
type CommInit =
    unsafe extern "C" fn(*mut ncclComm_t, c_int, ncclUniqueId, c_int, *mut Config) -> c_int;
type CommCall = unsafe extern "C" fn(ncclComm_t) -> c_int;
type GetAsyncError = unsafe extern "C" fn(ncclComm_t, *mut c_int) -> c_int;
type GetErrorString = unsafe extern "C" fn(c_int) -> *const c_char;
type GetLastError = unsafe extern "C" fn(ncclComm_t) -> *const c_char;
type GroupCall = unsafe extern "C" fn() -> c_int;
/// From, to, count, type, operation.
type Reduce = unsafe extern "C" fn(
    *const c_void,
    *mut c_void,
    usize,
    c_int,
    c_int,
    ncclComm_t,
    cudaStream_t,
) -> c_int;
/// From, to, count, type, root.
type Broadcast = Reduce;
/// From, to, count, type, operation, root.
type ReduceTo = unsafe extern "C" fn(
    *const c_void,
    *mut c_void,
    usize,
    c_int,
    c_int,
    c_int,
    ncclComm_t,
    cudaStream_t,
) -> c_int;
/// From, to, count, type.
type AllGather = unsafe extern "C" fn(
    *const c_void,
    *mut c_void,
    usize,
    c_int,
    ncclComm_t,
    cudaStream_t,
) -> c_int;
/// From or to, count, type, peer.
type PointToPoint =
    unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, ncclComm_t, cudaStream_t) -> c_int;
type StreamQuery = unsafe extern "C" fn(cudaStream_t) -> c_int;

/// An open NCCL library. It stays in the process: rank 0's threads outlive the call that started them.
#[derive(Clone, Copy)]
pub(super) struct Library {
    get_unique_id: GetUniqueId,
    comm_init: CommInit,
    comm_finalize: CommCall,
    comm_destroy: CommCall,
    comm_abort: CommCall,
    get_async_error: GetAsyncError,
    get_error_string: GetErrorString,
    get_last_error: Option<GetLastError>,
    group_start: GroupCall,
    group_end: GroupCall,
    all_reduce: Reduce,
    broadcast: Broadcast,
    reduce: ReduceTo,
    reduce_scatter: Reduce,
    all_gather: AllGather,
    send: PointToPoint,
    receive: PointToPoint,
    works_on_host_memory: bool,
}

/// A communicator of an open library. Ends with [`Communicator::destroy`] or [`Communicator::abort`].
pub(super) struct Communicator {
    library: Library,
    handle: ncclComm_t,
}

// SAFETY: an ncclComm_t is a plain handle with no tie to the thread that made it; NCCL lets any thread use it, one at
// a time, which the lock of its owner (`nccl.rs`) sees to.
unsafe impl Send for Communicator {}

impl Library {
    /// Opens the first of `names` that the loader finds.
    pub(super) fn open(names: &[String]) -> Result<Self, Error> {
        let mut tried = Vec::new();
        for name in names {
            // SAFETY: loading NCCL runs its initialisers, which touch nothing of this process but NCCL itself;
            // `names` come from this crate and from the operator of the machine.
            let opened = unsafe { File::new(name) };
            match opened.and_then(|file| Self::bind(&file).map(|library| (library, file))) {
                Ok((library, file)) => {
                    // Its functions are in use until the process ends.
                    std::mem::forget(file);
                    return Ok(library);
                }
                Err(error) => tried.push(format!("{name} ({})", words(&error))),
            }
        }
        Err(Error::NcclNotFound {
            tried: tried.join(", "),
        })
    }

    fn bind(file: &File) -> Result<Self, libloading::Error> {
        // SAFETY: each symbol is read as a pointer of the type that nccl.h gives the function of that name, and the
        // caller keeps the file open for as long as the process lives.
        unsafe {
            Ok(Self {
                get_unique_id: *file.get(b"ncclGetUniqueId\0")?,
                comm_init: *file.get(b"ncclCommInitRankConfig\0")?,
                comm_finalize: *file.get(b"ncclCommFinalize\0")?,
                comm_destroy: *file.get(b"ncclCommDestroy\0")?,
                comm_abort: *file.get(b"ncclCommAbort\0")?,
                get_async_error: *file.get(b"ncclCommGetAsyncError\0")?,
                get_error_string: *file.get(b"ncclGetErrorString\0")?,
                get_last_error: file.get(b"ncclGetLastError\0").ok().map(|call| *call),
                group_start: *file.get(b"ncclGroupStart\0")?,
                group_end: *file.get(b"ncclGroupEnd\0")?,
                all_reduce: *file.get(b"ncclAllReduce\0")?,
                broadcast: *file.get(b"ncclBroadcast\0")?,
                reduce: *file.get(b"ncclReduce\0")?,
                reduce_scatter: *file.get(b"ncclReduceScatter\0")?,
                all_gather: *file.get(b"ncclAllGather\0")?,
                send: *file.get(b"ncclSend\0")?,
                receive: *file.get(b"ncclRecv\0")?,
                works_on_host_memory: file
                    .get::<GroupCall>(b"distilleryWorksOnHostMemory\0")
                    .is_ok(),
            })
        }
    }

    /// Whether the library says, by a symbol that NCCL does not have, that its buffers lie in the memory of the host
    /// and that an operation is done when it is no longer in progress.
    pub(super) fn works_on_host_memory(&self) -> bool {
        self.works_on_host_memory
    }

    /// What the ranks of a new communicator must all be told.
    pub(super) fn unique_id(&self) -> Result<[u8; 128], Error> {
        let mut id = ncclUniqueId { internal: [0; 128] };
        // SAFETY: NCCL writes one ncclUniqueId to the pointer.
        let result = unsafe { (self.get_unique_id)(&raw mut id) };
        self.check("ncclGetUniqueId", result, None)?;
        Ok(id.internal.map(|byte| byte as u8))
    }

    /// Begins to join the communicator of `id` with the current device of this thread, without waiting for the others:
    /// [`Communicator::is_settled`] says when they are there.
    pub(super) fn join(&self, id: [u8; 128], rank: u32, world: u32) -> Result<Communicator, Error> {
        let id = ncclUniqueId {
            internal: id.map(|byte| byte as c_char),
        };
        let mut config = Config {
            size: size_of::<Config>(),
            magic: MAGIC,
            version: VERSION,
            blocking: 0,
        };
        let mut handle: ncclComm_t = std::ptr::null_mut();
        // SAFETY: NCCL writes one handle to the pointer and reads as much of the configuration as its size says, both
        // before it returns; the id is passed by value.
        let result = unsafe {
            (self.comm_init)(
                &raw mut handle,
                world as c_int,
                id,
                rank as c_int,
                &raw mut config,
            )
        };
        self.check("ncclCommInitRankConfig", result, None)?;
        Ok(Communicator {
            library: *self,
            handle,
        })
    }

    fn check(
        &self,
        call: &'static str,
        result: c_int,
        of: Option<ncclComm_t>,
    ) -> Result<(), Error> {
        if result == SUCCESS || result == IN_PROGRESS {
            return Ok(());
        }
        // SAFETY: ncclGetErrorString takes any result and returns a static, zero-terminated string.
        let general = unsafe { CStr::from_ptr((self.get_error_string)(result)) };
        let mut message = general.to_string_lossy().into_owned();
        if let (Some(last), Some(handle)) = (self.get_last_error, of) {
            // SAFETY: the handle is alive, and ncclGetLastError returns a zero-terminated string or null.
            let last = unsafe {
                let last = last(handle);
                (!last.is_null()).then(|| CStr::from_ptr(last).to_string_lossy().into_owned())
            };
            let last = last.unwrap_or_default();
            if !last.trim().is_empty() {
                message = format!("{message}: {}", last.trim());
            }
        }
        Err(Error::Nccl {
            call,
            fault: match result {
                REMOTE_ERROR => NcclFault::PeerLost,
                _ => NcclFault::Refused,
            },
            message,
        })
    }
}

/// The loader's own words, which name the file or the symbol.
fn words(error: &libloading::Error) -> String {
    let cause = std::error::Error::source(error);
    cause.map_or_else(|| error.to_string(), ToString::to_string)
}

/// Operations are queued on the legacy default stream, where libtorch computes, or begun on the host; none waits.
/// Buffers are contiguous, lie where the communicator works, and live until [`Communicator::is_settled`], and on a
/// device the stream, say that the operation is done or the communicator is ended: the caller sees to it.
impl Communicator {
    /// Whether nothing is in progress on the host's side; an error is that of any call before.
    pub(super) fn is_settled(&self) -> Result<bool, Error> {
        let mut state = IN_PROGRESS;
        // SAFETY: the handle is alive, and NCCL writes one result to the pointer.
        let result = unsafe { (self.library.get_async_error)(self.handle, &raw mut state) };
        self.check("ncclCommGetAsyncError", result)?;
        self.check("asynchronous operation", state)?;
        Ok(state == SUCCESS)
    }

    /// Sums `flat` over the ranks, in place.
    pub(super) fn all_reduce_sum(&self, flat: &mut Tensor) -> Result<(), Error> {
        let (data, len, kind) = memory(flat);
        // SAFETY: `data` points to `len` values of `kind` as the caller owes; reducing in place is allowed.
        let result = unsafe {
            let call = self.library.all_reduce;
            call(data, data, len, kind, SUM, self.handle, DEFAULT_STREAM)
        };
        self.check("ncclAllReduce", result)
    }

    /// Copies rank `root`'s `flat` to all.
    pub(super) fn broadcast(&self, flat: &mut Tensor, root: u32) -> Result<(), Error> {
        let (data, len, kind) = memory(flat);
        // SAFETY: as in `all_reduce_sum`.
        let result = unsafe {
            let call = self.library.broadcast;
            call(
                data,
                data,
                len,
                kind,
                root as c_int,
                self.handle,
                DEFAULT_STREAM,
            )
        };
        self.check("ncclBroadcast", result)
    }

    /// Sums `flat` over the ranks, in place, on rank `root` alone.
    pub(super) fn reduce_sum(&self, flat: &mut Tensor, root: u32) -> Result<(), Error> {
        let (data, len, kind) = memory(flat);
        let (root, handle) = (root as c_int, self.handle);
        // SAFETY: as in `all_reduce_sum`.
        let result = unsafe {
            let call = self.library.reduce;
            call(data, data, len, kind, SUM, root, handle, DEFAULT_STREAM)
        };
        self.check("ncclReduce", result)
    }

    /// Sums `all`, which is as long as all ranks' `own` together, and leaves this rank's part in `own`, which may be
    /// that part of `all`.
    pub(super) fn reduce_scatter_sum(&self, all: &Tensor, own: &mut Tensor) -> Result<(), Error> {
        let (from, _, _) = memory(all);
        let (to, len, kind) = memory(own);
        // SAFETY: as in `all_reduce_sum`, with one part for each rank at `from`.
        let result = unsafe {
            let call = self.library.reduce_scatter;
            call(from, to, len, kind, SUM, self.handle, DEFAULT_STREAM)
        };
        self.check("ncclReduceScatter", result)
    }

    /// Fills `all` with every rank's `own`, which may be this rank's part of it.
    pub(super) fn all_gather(&self, own: &Tensor, all: &mut Tensor) -> Result<(), Error> {
        let (from, len, kind) = memory(own);
        let (to, _, _) = memory(all);
        // SAFETY: as in `all_reduce_sum`, with room for one part of each rank at `to`.
        let result = unsafe {
            let call = self.library.all_gather;
            call(from, to, len, kind, self.handle, DEFAULT_STREAM)
        };
        self.check("ncclAllGather", result)
    }

    /// Sends `values` to rank `peer`, which receives as many.
    pub(super) fn send(&self, values: &Tensor, peer: u32) -> Result<(), Error> {
        let (data, len, kind) = memory(values);
        // SAFETY: as in `all_reduce_sum`; NCCL only reads.
        let result = unsafe {
            let call = self.library.send;
            call(data, len, kind, peer as c_int, self.handle, DEFAULT_STREAM)
        };
        self.check("ncclSend", result)
    }

    /// Receives `values` from rank `peer`.
    pub(super) fn receive(&self, values: &mut Tensor, peer: u32) -> Result<(), Error> {
        let (data, len, kind) = memory(values);
        // SAFETY: as in `all_reduce_sum`.
        let result = unsafe {
            let call = self.library.receive;
            call(data, len, kind, peer as c_int, self.handle, DEFAULT_STREAM)
        };
        self.check("ncclRecv", result)
    }

    /// Runs the operations of `body` as one: sends and receives that wait for each other must be.
    pub(super) fn grouped(&self, body: impl FnOnce() -> Result<(), Error>) -> Result<(), Error> {
        // SAFETY: a group belongs to this thread, and is ended below whatever `body` does.
        let result = unsafe { (self.library.group_start)() };
        self.check("ncclGroupStart", result)?;
        let done = body();
        // SAFETY: as above.
        let result = unsafe { (self.library.group_end)() };
        done.and(self.check("ncclGroupEnd", result))
    }

    /// Begins to end a communicator in peace: once it is settled, [`Self::destroy`] does not wait.
    pub(super) fn finalize(&self) -> Result<(), Error> {
        // SAFETY: the handle is alive.
        let result = unsafe { (self.library.comm_finalize)(self.handle) };
        self.check("ncclCommFinalize", result)
    }

    /// Ends a finalized communicator.
    pub(super) fn destroy(self) -> Result<(), Error> {
        // SAFETY: the handle is alive, and `self` goes with it.
        let result = unsafe { (self.library.comm_destroy)(self.handle) };
        self.library.check("ncclCommDestroy", result, None)
    }

    /// Ends a communicator whatever it is doing.
    pub(super) fn abort(self) -> Result<(), Error> {
        // SAFETY: the handle is alive, and `self` goes with it; operations on a device may be under way.
        let result = unsafe { (self.library.comm_abort)(self.handle) };
        self.library.check("ncclCommAbort", result, None)
    }

    fn check(&self, call: &'static str, result: c_int) -> Result<(), Error> {
        self.library.check(call, result, Some(self.handle))
    }
}

/// Where a tensor's values lie, how many there are, and what NCCL calls their type.
fn memory(tensor: &Tensor) -> (*mut c_void, usize, c_int) {
    assert!(tensor.is_contiguous(), "NCCL takes contiguous buffers");
    let kind = match tensor.kind() {
        Kind::Uint8 => ncclDataType_t::ncclUint8,
        Kind::Half => ncclDataType_t::ncclFloat16,
        Kind::Float => ncclDataType_t::ncclFloat32,
        Kind::BFloat16 => ncclDataType_t::ncclBfloat16,
        other => panic!("a group does not exchange {other:?}"),
    };
    (tensor.data_ptr(), tensor.numel(), kind as c_int)
}

/// The CUDA driver, asked whether the stream has done its work.
#[derive(Clone, Copy)]
pub(super) struct Driver {
    stream_query: StreamQuery,
}

impl Driver {
    /// Opens the driver, which is in the process already where a CUDA device is.
    pub(super) fn open() -> Result<Self, Error> {
        const NAME: &str = "libcuda.so.1";
        let missing = |error: libloading::Error| Error::Setup {
            reason: format!("the CUDA driver {NAME} cannot be opened: {}", words(&error)),
        };
        // SAFETY: the driver is loaded already, so no initialisers run.
        let file = unsafe { File::new(NAME) }.map_err(missing)?;
        // SAFETY: cuda.h gives cuStreamQuery this type, and the file stays open.
        let stream_query = unsafe {
            *file
                .get::<StreamQuery>(b"cuStreamQuery\0")
                .map_err(missing)?
        };
        std::mem::forget(file);
        Ok(Self { stream_query })
    }

    /// Whether everything on the legacy default stream of this thread's device is done.
    pub(super) fn is_idle(self) -> Result<bool, Error> {
        // SAFETY: the null stream always exists; libtorch has made its context current on this thread.
        match unsafe { (self.stream_query)(DEFAULT_STREAM) } {
            SUCCESS => Ok(true),
            NOT_READY => Ok(false),
            other => Err(Error::Nccl {
                call: "cuStreamQuery",
                fault: NcclFault::Refused,
                message: format!("CUDA error {other}"),
            }),
        }
    }
}
