//! The device of this engine.

use std::path::PathBuf;

use tch::{Cuda, Device};

use crate::raw_tensor::{self, load_cuda};

/// A device that cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not a device's name.
    #[error("{0:?} is no device; name one as cpu, cuda or cuda:1")]
    Unknown(String),
    /// No CUDA here.
    #[error("device {device} is asked for, but {reason}")]
    NoCuda {
        /// What was asked for.
        device: String,
        /// Why it cannot be had.
        reason: String,
    },
}

/// Opens the device called `name` (`cpu`, `cuda`, `cuda:N`). CUDA is loaded only when it is asked for.
pub fn open(name: &str) -> Result<Device, Error> {
    let index = match name {
        "cpu" => return Ok(Device::Cpu),
        "cuda" => 0,
        other => other
            .strip_prefix("cuda:")
            .and_then(|n| n.parse::<usize>().ok())
            .ok_or_else(|| Error::Unknown(name.to_owned()))?,
    };
    let refuse = |reason: String| Error::NoCuda {
        device: name.to_owned(),
        reason,
    };
    match load_cuda(libtorch_folder().as_deref()) {
        raw_tensor::Cuda::Loaded => {}
        raw_tensor::Cuda::Absent => {
            return Err(refuse(
                "this libtorch has no CUDA half (libtorch_cuda.so); point LIBTORCH at a CUDA build and \
                 build the engine again (deploy/README.md)"
                    .to_owned(),
            ));
        }
        raw_tensor::Cuda::Broken(error) => {
            return Err(refuse(format!(
                "libtorch's CUDA half cannot be loaded: {error}"
            )));
        }
    }
    let devices = Cuda::device_count();
    if !Cuda::is_available() || devices <= index as i64 {
        return Err(refuse(format!("the driver shows {devices} CUDA devices")));
    }
    Ok(Device::Cuda(index))
}

/// How many CUDA devices this engine could open.
pub fn cuda_devices() -> i64 {
    match load_cuda(libtorch_folder().as_deref()) {
        raw_tensor::Cuda::Loaded if Cuda::is_available() => Cuda::device_count(),
        raw_tensor::Cuda::Loaded | raw_tensor::Cuda::Absent | raw_tensor::Cuda::Broken(_) => 0,
    }
}

/// The device as the worker is told: `cpu`, or `cuda:` with the ordinal.
pub fn name(device: Device) -> String {
    match device {
        Device::Cuda(index) => format!("cuda:{index}"),
        Device::Cpu | Device::Mps | Device::Vulkan => "cpu".to_owned(),
    }
}

/// The hardware's name, where the system tells it.
pub fn hardware(device: Device) -> String {
    match device {
        Device::Cpu | Device::Mps | Device::Vulkan => {
            let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
            let model = text
                .lines()
                .find_map(|line| line.strip_prefix("model name"));
            let model = model
                .and_then(|rest| rest.split_once(':'))
                .map(|(_, name)| name.trim());
            model.unwrap_or("unknown CPU").to_owned()
        }
        Device::Cuda(index) => format!("CUDA device {index}"),
    }
}

/// The instruction set that workers pin CPU engines to, so that hosts agree on every bit: AVX2 where there is
/// AVX2 with FMA, else what every x86-64 has. Hosts with more compute as if they had not.
pub fn cpu_capability() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
        return "avx2";
    }
    "default"
}

/// Where libtorch was linked from, or what the environment says now.
fn libtorch_folder() -> Option<PathBuf> {
    let named = std::env::var_os("LIBTORCH").map(|root| PathBuf::from(root).join("lib"));
    named.or_else(|| Some(PathBuf::from(env!("DISTILLERY_LIBTORCH_LIB"))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_by_name() {
        assert_eq!(open("cpu"), Ok(Device::Cpu));
        assert_eq!(open("gpu"), Err(Error::Unknown("gpu".into())));
        assert_eq!(open("cuda:x"), Err(Error::Unknown("cuda:x".into())));
        assert_eq!(name(Device::Cuda(3)), "cuda:3");
    }
}
