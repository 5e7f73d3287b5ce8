//! Raw glue around libtorch: what its safe interface does not offer.

use std::ffi::c_int;
use std::path::Path;

/// Whether an attempt to bring CUDA in succeeded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cuda {
    /// libtorch's CUDA half is in the process.
    Loaded,
    /// There is no CUDA half beside libtorch.
    Absent,
    /// There is one, and it cannot be loaded: the loader's words.
    Broken(String),
}

/// Brings libtorch's CUDA half (`libtorch_cuda.so`) into the process, if it lies in `folder` or on the loader's
/// path. Must come before the first question about CUDA: libtorch remembers the answer.
pub fn load_cuda(folder: Option<&Path>) -> Cuda {
    const NAME: &str = "libtorch_cuda.so";
    let beside = folder
        .map(|folder| folder.join(NAME))
        .filter(|path| path.exists());
    let flags = libloading::os::unix::RTLD_NOW | libloading::os::unix::RTLD_GLOBAL;
    let name = beside.as_deref().unwrap_or(Path::new(NAME));
    // SAFETY: loading runs the library's initialisers, which register kernels with the libtorch that this process
    // is linked against; it is the same build, made to be loaded so, and no other thread runs yet.
    match unsafe { libloading::os::unix::Library::open(Some(name), flags) } {
        Ok(library) => {
            // Its kernels are in use until the process ends.
            std::mem::forget(library);
            Cuda::Loaded
        }
        Err(_) if beside.is_none() => Cuda::Absent,
        Err(error) => Cuda::Broken(error.to_string()),
    }
}

/// Keeps the memory of freed tensors in the process. A step frees and takes the same blocks again; given back to the
/// system in between, every page of them would be faulted in and zeroed anew, a tenth of a step of a small network.
/// The process stays as large as it was at its largest; blocks of more than 32 MiB still go back.
///
/// Linux with glibc is what the engine runs on (deploy/README.md).
pub fn keep_freed_memory() {
    /// Blocks of at least so many bytes are mapped, and unmapped when freed: the largest value there is.
    const MMAP_THRESHOLD: c_int = 32 << 20;
    // SAFETY: glibc's `mallopt` has this signature, takes its own lock, and refuses values that it does not know.
    unsafe {
        mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD);
        mallopt(M_TRIM_THRESHOLD, c_int::MAX);
    }
}

/// Free memory at the end of the heap from which on it is given back, in glibc's malloc.h.
const M_TRIM_THRESHOLD: c_int = -1;
/// Size from which on a block is mapped by itself.
const M_MMAP_THRESHOLD: c_int = -3;

unsafe extern "C" {
    /// mallopt(3): 1 when the value was taken.
    fn mallopt(parameter: c_int, value: c_int) -> c_int;
}
