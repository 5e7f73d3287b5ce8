//! Raw glue around libtorch: what its safe interface does not offer.

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
