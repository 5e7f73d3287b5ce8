//! Raw glue around libtorch: what its safe interface does not offer.

use std::ffi::c_int;
use std::path::Path;

use tch::{Device, Kind, Tensor};

// Bytes of tensors go over the wire as they lie in memory.
#[cfg(not(target_endian = "little"))]
compile_error!("the engine exchanges f32 in the memory's own order, which must be little endian");

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

/// The values of `tensor` where they lie: contiguous f32 in the memory of the host, `[numel]`.
///
/// # Panics
///
/// When `tensor` is of another kind, lies on a device, or is not contiguous.
pub fn f32_mut(tensor: &mut Tensor) -> &mut [f32] {
    assert_eq!(tensor.kind(), Kind::Float, "f32 is read where it lies");
    assert_eq!(tensor.device(), Device::Cpu, "host memory is read");
    assert!(tensor.is_contiguous(), "contiguous memory is read");
    let len = tensor.numel();
    if len == 0 {
        return &mut [];
    }
    // SAFETY: the tensor holds `len` f32 from this address on and keeps them while it is borrowed. Other handles of the
    // same memory exist at most on this thread (a `Tensor` that is shared between threads is read only), and none is
    // used while the caller holds the slice, which the callers in `collective` and `train` keep to themselves.
    unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<f32>(), len) }
}

/// The values of `tensor` where they lie, to be read; see [`f32_mut`].
///
/// # Panics
///
/// As there.
pub fn f32_ref(tensor: &Tensor) -> &[f32] {
    // The address is all that is taken from the handle, which is not written to.
    let mut handle = tensor.shallow_clone();
    let values: *const [f32] = f32_mut(&mut handle);
    // SAFETY: the memory is that of `tensor`, which keeps it while it is borrowed; as in `f32_mut` nobody writes to it
    // meanwhile.
    unsafe { &*values }
}

/// The bytes of `values`, as they lie.
pub fn bytes_of(values: &[f32]) -> &[u8] {
    // SAFETY: the bytes are those of the slice, for as long as it is borrowed; every byte is initialised.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values)) }
}

/// The bytes of `values`, as they lie, to be written to.
pub fn bytes_of_mut(values: &mut [f32]) -> &mut [u8] {
    // SAFETY: as in `bytes_of`; the borrow is exclusive, and any four bytes are an f32.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast::<u8>(), size_of_val(values)) }
}
