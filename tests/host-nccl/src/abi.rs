//! The C functions, as nccl.h declares them.
//!
//! What is sent is read before a function returns; what is received is written by the communicator's thread while the
//! operation is in progress, as NCCL may.

use std::cell::RefCell;
use std::ffi::{c_char, c_int, c_uint, c_void};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use crate::communicator::{Communicator, Deliver, IN_PROGRESS};
use crate::hub::{self, INVALID_ARGUMENT, SUCCESS};
use crate::message::{Operation, Request};
use crate::values;

/// `ncclSystemError`.
const SYSTEM_ERROR: c_int = 2;
/// `NCCL_API_MAGIC`.
const MAGIC: c_uint = 0xcafe_beef;

/// `ncclUniqueId`: the name of the hub, then zeros.
#[repr(C)]
pub(crate) struct UniqueId {
    internal: [u8; 128],
}

/// The beginning of `ncclConfig_t`.
#[repr(C)]
pub(crate) struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
}

/// Memory of the caller.
struct Place {
    at: *mut u8,
    len: usize,
}

// SAFETY: the caller leaves the memory to the operation until it is no longer in progress, on whatever thread.
unsafe impl Send for Place {}

impl Place {
    fn fill(&self, bytes: &[u8]) {
        let len = self.len.min(bytes.len());
        // SAFETY: the caller owes `self.len` bytes at the place, and `len` is no more; messages are memory of our own.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.at, len) };
    }
}

/// Sends and receives of a group that is not ended.
#[derive(Default)]
struct Group {
    depth: u32,
    of: Option<*const Communicator>,
    sends: Vec<(u32, Vec<u8>)>,
    receives: Vec<(u32, Place)>,
}

thread_local! {
    static GROUP: RefCell<Group> = RefCell::default();
}

/// The engine asks for this symbol: buffers lie in host memory.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn distilleryWorksOnHostMemory() -> c_int {
    1
}

/// Makes an id, and starts its hub.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ncclGetUniqueId(id: *mut UniqueId) -> c_int {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = format!("distillery-host-nccl-{}-{number}", std::process::id());
    let listener =
        SocketAddr::from_abstract_name(&name).and_then(|at| UnixListener::bind_addr(&at));
    let Ok(listener) = listener else {
        return SYSTEM_ERROR;
    };
    thread::spawn(move || hub::serve(&listener));
    let mut internal = [0; 128];
    internal[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: the caller owes room for an id.
    unsafe { id.write(UniqueId { internal }) };
    SUCCESS
}

/// Begins to join; the communicator is in progress until all ranks have.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ncclCommInitRankConfig(
    comm: *mut *mut Communicator,
    world: c_int,
    id: UniqueId,
    rank: c_int,
    config: *mut Config,
) -> c_int {
    // SAFETY: the caller owes a configuration, or null for one that blocks.
    let config = unsafe { config.as_ref() };
    let asked = config.is_some_and(|config| {
        config.size >= size_of::<Config>() && config.magic == MAGIC && config.version >= 21_400
    });
    let (Ok(rank), Ok(world)) = (u32::try_from(rank), u32::try_from(world)) else {
        return INVALID_ARGUMENT;
    };
    // What blocks is not offered: nobody here could end it.
    if !asked || config.is_none_or(|config| config.blocking != 0) || rank >= world {
        return INVALID_ARGUMENT;
    }
    let name = id
        .internal
        .split(|&byte| byte == 0)
        .next()
        .unwrap_or_default();
    let hub = String::from_utf8_lossy(name).into_owned();
    let communicator = Box::new(Communicator::join(hub, rank, world));
    // SAFETY: the caller owes room for a handle.
    unsafe { comm.write(Box::into_raw(communicator)) };
    IN_PROGRESS
}

/// What the last operation came to.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ncclCommGetAsyncError(
    comm: *mut Communicator,
    state: *mut c_int,
) -> c_int {
    // SAFETY: the caller owes a live handle and room for a result.
    unsafe { state.write((*comm).state()) };
    SUCCESS
}

/// Begins to take leave.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ncclCommFinalize(comm: *mut Communicator) -> c_int {
    // SAFETY: the caller owes a live handle.
    unsafe { &*comm }.begin(Request::Leave, Box::new(|_| ()))
}

/// Ends a communicator.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ncclCommDestroy(comm: *mut Communicator) -> c_int {
    // SAFETY: the caller owes a live handle from the start of a communicator, and gives it up.
    unsafe { Box::from_raw(comm) }.end();
    SUCCESS
}

/// Ends a communicator, whatever it is doing.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ncclCommAbort(comm: *mut Communicator) -> c_int {
    // SAFETY: as in `ncclCommDestroy`.
    unsafe { ncclCommDestroy(comm) }
}

/// A result in words.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn ncclGetErrorString(result: c_int) -> *const c_char {
    let text = match result {
        SUCCESS => c"no error",
        SYSTEM_ERROR => c"unhandled system error",
        INVALID_ARGUMENT => c"invalid argument",
        hub::REMOTE_ERROR => c"remote process exited or there was a network error",
        IN_PROGRESS => c"operation in progress",
        _ => c"unknown result code",
    };
    text.as_ptr()
}

/// Begins a group of this thread.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn ncclGroupStart() -> c_int {
    GROUP.with_borrow_mut(|group| group.depth += 1);
    SUCCESS
}

/// Begins what the group collected.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ncclGroupEnd() -> c_int {
    let group = GROUP.with_borrow_mut(|group| {
        group.depth = group.depth.saturating_sub(1);
        if group.depth == 0 {
            std::mem::take(group)
        } else {
            Group::default()
        }
    });
    let Some(comm) = group.of else {
        return SUCCESS;
    };
    let (receives, places): (Vec<_>, Vec<_>) = group
        .receives
        .into_iter()
        .map(|(peer, place)| ((peer, place.len as u64), place))
        .unzip();
    let deliver: Deliver = Box::new(move |payloads| {
        for (place, payload) in places.iter().zip(payloads) {
            place.fill(payload);
        }
    });
    let sends = group.sends;
    // SAFETY: the caller owes that the communicator of a group lives at its end.
    unsafe { &*comm }.begin(Request::Group { sends, receives }, deliver)
}

/// Sends to a peer, as a part of a group.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ncclSend(
    from: *const c_void,
    count: usize,
    kind: c_int,
    peer: c_int,
    comm: *mut Communicator,
    _stream: *mut c_void,
) -> c_int {
    // SAFETY: the caller owes `count` values of `kind`.
    let payload = unsafe { read(from, count, kind) };
    in_group(comm, payload, |group, payload| {
        group.sends.push((peer as u32, payload))
    })
}

/// Receives from a peer, as a part of a group.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ncclRecv(
    to: *mut c_void,
    count: usize,
    kind: c_int,
    peer: c_int,
    comm: *mut Communicator,
    _stream: *mut c_void,
) -> c_int {
    let place = values::size(kind).map(|size| Place {
        at: to.cast(),
        len: count * size,
    });
    in_group(comm, place, |group, place| {
        group.receives.push((peer as u32, place))
    })
}

/// Sums over all ranks.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ncclAllReduce(
    from: *const c_void,
    to: *mut c_void,
    count: usize,
    kind: c_int,
    operation: c_int,
    comm: *mut Communicator,
    _stream: *mut c_void,
) -> c_int {
    let sum = only_sums(operation, Operation::AllReduce);
    // SAFETY: the caller owes `count` values on either side, and a live handle.
    unsafe { begin(sum, (from, count), (to, count), kind, 0, comm) }
}

/// Hands one rank's values to all.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ncclBroadcast(
    from: *const c_void,
    to: *mut c_void,
    count: usize,
    kind: c_int,
    root: c_int,
    comm: *mut Communicator,
    _stream: *mut c_void,
) -> c_int {
    let operation = Some(Operation::Broadcast);
    // SAFETY: as in `ncclAllReduce`.
    unsafe { begin(operation, (from, count), (to, count), kind, root, comm) }
}

/// Sums over all ranks, for the root: to the others nothing comes.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ncclReduce(
    from: *const c_void,
    to: *mut c_void,
    count: usize,
    kind: c_int,
    operation: c_int,
    root: c_int,
    comm: *mut Communicator,
    _stream: *mut c_void,
) -> c_int {
    let sum = only_sums(operation, Operation::Reduce);
    // SAFETY: as in `ncclAllReduce`.
    unsafe { begin(sum, (from, count), (to, count), kind, root, comm) }
}

/// Sums over all ranks, and leaves a part with each.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ncclReduceScatter(
    from: *const c_void,
    to: *mut c_void,
    count: usize,
    kind: c_int,
    operation: c_int,
    comm: *mut Communicator,
    _stream: *mut c_void,
) -> c_int {
    let sum = only_sums(operation, Operation::ReduceScatter);
    // SAFETY: the caller owes `count` values for each rank at `from`, `count` at `to`, and a live handle.
    unsafe {
        begin(
            sum,
            (from, count * (*comm).world()),
            (to, count),
            kind,
            0,
            comm,
        )
    }
}

/// Hands every rank's values to all.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ncclAllGather(
    from: *const c_void,
    to: *mut c_void,
    count: usize,
    kind: c_int,
    comm: *mut Communicator,
    _stream: *mut c_void,
) -> c_int {
    let operation = Some(Operation::AllGather);
    // SAFETY: the caller owes `count` values at `from`, as many for each rank at `to`, and a live handle.
    unsafe {
        begin(
            operation,
            (from, count),
            (to, count * (*comm).world()),
            kind,
            0,
            comm,
        )
    }
}

/// `ncclSum` is 0, and the only one in use.
fn only_sums(operation: c_int, sum: Operation) -> Option<Operation> {
    (operation == 0).then_some(sum)
}

/// Begins a collective; pointers come with the number of values that the caller owes there.
unsafe fn begin(
    operation: Option<Operation>,
    from: (*const c_void, usize),
    to: (*mut c_void, usize),
    kind: c_int,
    root: c_int,
    comm: *mut Communicator,
) -> c_int {
    // SAFETY: the caller passes on what it is owed.
    let payload = unsafe { read(from.0, from.1, kind) };
    let (Some(operation), Some(size), Some(payload)) = (operation, values::size(kind), payload)
    else {
        return INVALID_ARGUMENT;
    };
    let place = Place {
        at: to.0.cast(),
        len: to.1 * size,
    };
    let request = Request::Collective {
        operation,
        kind,
        root: root as u32,
        payload,
    };
    let deliver: Deliver = Box::new(move |payloads| {
        if let [payload] = payloads {
            place.fill(payload);
        }
    });
    // SAFETY: as above.
    unsafe { &*comm }.begin(request, deliver)
}

/// The bytes of `count` values of `kind`, if it is known.
unsafe fn read(from: *const c_void, count: usize, kind: c_int) -> Option<Vec<u8>> {
    let len = count * values::size(kind)?;
    // SAFETY: the caller owes as many values, and does not write to them meanwhile.
    let bytes = unsafe { std::slice::from_raw_parts(from.cast::<u8>(), len) };
    Some(bytes.to_vec())
}

/// Adds to the group of this thread; what stands alone is a group of one.
fn in_group<T>(comm: *mut Communicator, part: Option<T>, add: impl FnOnce(&mut Group, T)) -> c_int {
    let Some(part) = part else {
        return INVALID_ARGUMENT;
    };
    let alone = GROUP.with_borrow_mut(|group| {
        group.of = Some(comm);
        add(group, part);
        group.depth == 0
    });
    if alone {
        // SAFETY: the caller of the send or receive owes a live handle.
        return unsafe { ncclGroupEnd() };
    }
    SUCCESS
}
