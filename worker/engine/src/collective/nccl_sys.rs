//! The NCCL functions in use, loaded at run time: the one place that calls foreign code.
//!
//! The library is looked for under the name its packages install (`libnccl.so.2`), which cudarc's own loader
//! never tries; types come from cudarc, so the signatures are NCCL's.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::MaybeUninit;

use cudarc::nccl::sys::{
    cudaStream_t, ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclResult_t, ncclUniqueId,
};
use libloading::Library as File;
use tch::Tensor;

use super::Error;

type GetUniqueId = unsafe extern "C" fn(*mut ncclUniqueId) -> ncclResult_t;
type CommInitRank =
    unsafe extern "C" fn(*mut ncclComm_t, c_int, ncclUniqueId, c_int) -> ncclResult_t;
type CommEnd = unsafe extern "C" fn(ncclComm_t) -> ncclResult_t;
type GetErrorString = unsafe extern "C" fn(ncclResult_t) -> *const c_char;
type AllReduce = unsafe extern "C" fn(
    *const c_void,
    *mut c_void,
    usize,
    ncclDataType_t,
    ncclRedOp_t,
    ncclComm_t,
    cudaStream_t,
) -> ncclResult_t;
type Broadcast = unsafe extern "C" fn(
    *const c_void,
    *mut c_void,
    usize,
    ncclDataType_t,
    c_int,
    ncclComm_t,
    cudaStream_t,
) -> ncclResult_t;

/// An open NCCL library.
pub(super) struct Library {
    get_unique_id: GetUniqueId,
    comm_init_rank: CommInitRank,
    comm_destroy: CommEnd,
    comm_abort: CommEnd,
    get_error_string: GetErrorString,
    all_reduce: AllReduce,
    broadcast: Broadcast,
    /// Keeps the functions in memory.
    _file: File,
}

/// A communicator of an open library. Ends with [`Communicator::destroy`] or [`Communicator::abort`].
pub(super) struct Communicator {
    library: Library,
    handle: ncclComm_t,
}

// SAFETY: an ncclComm_t is a plain handle with no tie to the thread that made it; NCCL lets any thread use it.
unsafe impl Send for Communicator {}

// SAFETY: the only call that is made through a shared reference beside another is `abort`, which NCCL documents
// as the way to end an operation of the same communicator from another thread.
unsafe impl Sync for Communicator {}

impl Library {
    /// Opens the first of `names` that the loader finds.
    pub(super) fn open(names: &[String]) -> Result<Self, Error> {
        let mut tried = Vec::new();
        for name in names {
            // SAFETY: loading NCCL runs its initialisers, which touch nothing of this process but NCCL itself;
            // `names` come from this crate and from the operator of the machine.
            match unsafe { File::new(name) } {
                Ok(file) => match Self::bind(file) {
                    Ok(library) => return Ok(library),
                    Err(error) => tried.push(format!("{name} ({error})")),
                },
                Err(error) => tried.push(format!("{name} ({error})")),
            }
        }
        Err(Error::NcclNotFound {
            tried: tried.join(", "),
        })
    }

    fn bind(file: File) -> Result<Self, libloading::Error> {
        // SAFETY: each symbol is read as a pointer of the type that nccl.h gives the function of that name, and
        // the pointers live no longer than `_file`, which is dropped with them.
        unsafe {
            Ok(Self {
                get_unique_id: *file.get(b"ncclGetUniqueId\0")?,
                comm_init_rank: *file.get(b"ncclCommInitRank\0")?,
                comm_destroy: *file.get(b"ncclCommDestroy\0")?,
                comm_abort: *file.get(b"ncclCommAbort\0")?,
                get_error_string: *file.get(b"ncclGetErrorString\0")?,
                all_reduce: *file.get(b"ncclAllReduce\0")?,
                broadcast: *file.get(b"ncclBroadcast\0")?,
                _file: file,
            })
        }
    }

    /// What the ranks of a new communicator must all be told.
    pub(super) fn unique_id(&self) -> Result<[u8; 128], Error> {
        let mut id = MaybeUninit::<ncclUniqueId>::uninit();
        // SAFETY: NCCL writes one ncclUniqueId to the pointer.
        self.check("ncclGetUniqueId", unsafe {
            (self.get_unique_id)(id.as_mut_ptr())
        })?;
        // SAFETY: the call above succeeded, so the id is written.
        let id = unsafe { id.assume_init() };
        Ok(id.internal.map(|byte| byte as u8))
    }

    /// Joins the communicator of `id`; returns once every rank has. The current device of this thread is used.
    pub(super) fn join(self, id: [u8; 128], rank: u32, world: u32) -> Result<Communicator, Error> {
        let id = ncclUniqueId {
            internal: id.map(|byte| byte as c_char),
        };
        let mut handle: ncclComm_t = std::ptr::null_mut();
        // SAFETY: NCCL writes one handle to the pointer; the id is passed by value.
        let result =
            unsafe { (self.comm_init_rank)(&mut handle, world as c_int, id, rank as c_int) };
        self.check("ncclCommInitRank", result)?;
        Ok(Communicator {
            library: self,
            handle,
        })
    }

    fn check(&self, call: &'static str, result: ncclResult_t) -> Result<(), Error> {
        if result == ncclResult_t::ncclSuccess {
            return Ok(());
        }
        // SAFETY: ncclGetErrorString takes any result and returns a static, zero-terminated string.
        let message = unsafe { CStr::from_ptr((self.get_error_string)(result)) };
        Err(Error::Nccl {
            call,
            message: message.to_string_lossy().into_owned(),
        })
    }
}

impl Communicator {
    /// Queues the sum of `flat` over the ranks, in place, on the legacy default stream, where libtorch computes.
    ///
    /// The caller owes a contiguous f32 tensor on this thread's CUDA device, and waits before freeing it as for
    /// any work of that stream.
    pub(super) fn all_reduce_sum(&self, flat: &mut Tensor) -> Result<(), Error> {
        let data = flat.data_ptr();
        // SAFETY: `data` points to `numel` f32 on the device (asserted by the caller), reducing in place is
        // allowed, and the null stream is ordered after the work that made them.
        let result = unsafe {
            (self.library.all_reduce)(
                data,
                data,
                flat.numel(),
                ncclDataType_t::ncclFloat32,
                ncclRedOp_t::ncclSum,
                self.handle,
                std::ptr::null_mut(),
            )
        };
        self.library.check("ncclAllReduce", result)
    }

    /// Queues the copy of rank `root`'s `flat` to all, as [`Self::all_reduce_sum`].
    pub(super) fn broadcast(&self, flat: &mut Tensor, root: u32) -> Result<(), Error> {
        let data = flat.data_ptr();
        // SAFETY: as in `all_reduce_sum`.
        let result = unsafe {
            (self.library.broadcast)(
                data,
                data,
                flat.numel(),
                ncclDataType_t::ncclFloat32,
                root as c_int,
                self.handle,
                std::ptr::null_mut(),
            )
        };
        self.library.check("ncclBroadcast", result)
    }

    /// Ends an idle communicator. The caller calls this or [`Self::abort`] once, and nothing after.
    pub(super) fn destroy(&self) -> Result<(), Error> {
        // SAFETY: the handle came from ncclCommInitRank and is ended once, as the caller owes.
        let result = unsafe { (self.library.comm_destroy)(self.handle) };
        self.library.check("ncclCommDestroy", result)
    }

    /// Ends a communicator whatever it is doing, from any thread. Called once, and nothing after.
    pub(super) fn abort(&self) -> Result<(), Error> {
        // SAFETY: the handle came from ncclCommInitRank and is ended once, as the caller owes; NCCL lets another
        // thread do so while an operation is under way.
        let result = unsafe { (self.library.comm_abort)(self.handle) };
        self.library.check("ncclCommAbort", result)
    }
}
