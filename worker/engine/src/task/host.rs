//! Tensors to bytes in host memory, and back.

use tch::{Device, Kind, Tensor};

/// The elements of `tensor` in row order as little-endian f16.
pub fn f16_bytes(tensor: &Tensor) -> Vec<u8> {
    let tensor = tensor.to_kind(Kind::Half).detach();
    let tensor = tensor.to_device(Device::Cpu).contiguous();
    let elements = tensor.numel();
    let mut bytes = vec![0; elements * 2];
    tensor.copy_data_u8(&mut bytes, elements);
    bytes
}

/// A tensor `shape` of little-endian f16 `bytes`, as f32 on `device`.
pub fn from_f16(bytes: &[u8], shape: &[i64], device: Device) -> Tensor {
    Tensor::from_data_size(bytes, shape, Kind::Half)
        .to_device(device)
        .to_kind(Kind::Float)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_floats_go_out_and_come_back() {
        let tensor = Tensor::from_slice(&[1.0f32, -2.5, 0.125, 65504.0]).view([2, 2]);
        let bytes = f16_bytes(&tensor.transpose(0, 1));
        assert_eq!(bytes.len(), 8);
        let back = from_f16(&bytes, &[2, 2], Device::Cpu);
        assert_eq!(
            Vec::<f32>::try_from(back.view([-1])).expect("f32"),
            [1.0, 0.125, -2.5, 65504.0]
        );
    }
}
