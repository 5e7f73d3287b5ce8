//! Pictures: from decoded tensors to bytes, grids and PNG files.

use tch::{Kind, Tensor};

/// An 8-bit RGB picture, rows from the top.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    /// Pixels across.
    pub width: usize,
    /// Pixels down.
    pub height: usize,
    /// `height * width * 3` bytes, row-major RGB.
    pub rgb: Vec<u8>,
}

/// Space between the cells of a grid, in pixels.
const GAP: usize = 2;

impl Picture {
    /// The pictures of decoded images `[B, 3, H, W]` in [-1, 1]: `round((x + 1) * 127.5)`, clamped.
    pub fn from_decoded(images: &Tensor) -> Vec<Self> {
        let (_, channels, height, width) = images.size4().expect("images are [B, 3, H, W]");
        assert_eq!(channels, 3, "pictures are RGB");
        let bytes = ((images.to_kind(Kind::Float) + 1.0) * 127.5)
            .round()
            .clamp(0.0, 255.0)
            .to_kind(Kind::Uint8)
            .permute([0, 2, 3, 1])
            .contiguous();
        let bytes: Vec<u8> = Vec::try_from(bytes.reshape([-1])).expect("bytes on any device");
        let (height, width) = (height as usize, width as usize);
        bytes
            .chunks_exact(height * width * 3)
            .map(|rgb| Self {
                width,
                height,
                rgb: rgb.to_vec(),
            })
            .collect()
    }

    /// Lays out `rows` of equally large pictures, with a white gap, each pixel enlarged `scale` times.
    pub fn grid(rows: &[Vec<Self>], scale: usize) -> Self {
        let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
        let cell = rows
            .iter()
            .flatten()
            .next()
            .map_or((1, 1), |p| (p.width, p.height));
        let pitch = (cell.0 * scale + GAP, cell.1 * scale + GAP);
        let (width, height) = (columns * pitch.0 + GAP, rows.len() * pitch.1 + GAP);
        let mut grid = Self {
            width,
            height,
            rgb: vec![255; width * height * 3],
        };
        for (r, row) in rows.iter().enumerate() {
            for (c, picture) in row.iter().enumerate() {
                assert_eq!(
                    (picture.width, picture.height),
                    cell,
                    "cells of a grid are alike"
                );
                grid.paint(picture, scale, GAP + c * pitch.0, GAP + r * pitch.1);
            }
        }
        grid
    }

    fn paint(&mut self, picture: &Self, scale: usize, left: usize, top: usize) {
        for y in 0..picture.height * scale {
            for x in 0..picture.width * scale {
                let from = ((y / scale) * picture.width + x / scale) * 3;
                let to = ((top + y) * self.width + left + x) * 3;
                self.rgb[to..to + 3].copy_from_slice(&picture.rgb[from..from + 3]);
            }
        }
    }

    /// The picture as a PNG file.
    pub fn to_png(&self) -> Result<Vec<u8>, png::EncodingError> {
        let mut file = Vec::new();
        let mut encoder = png::Encoder::new(&mut file, self.width as u32, self.height as u32);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        encoder.write_header()?.write_image_data(&self.rgb)?;
        Ok(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decoded_values_become_bytes_by_rounding() {
        let image = Tensor::from_slice(&[-1.0f32, 0.0, 1.0, -2.0, 2.0, 0.5]).reshape([1, 3, 1, 2]);
        let picture = &Picture::from_decoded(&image)[0];
        // Channel planes (-1, 0), (1, -2), (2, 0.5) interleave to two pixels; 127.5 rounds to even.
        assert_eq!(picture.rgb, [0, 255, 255, 128, 0, 191]);
    }

    #[test]
    fn a_grid_places_each_cell() {
        let cell = |v| Picture {
            width: 1,
            height: 1,
            rgb: vec![v; 3],
        };
        let grid = Picture::grid(&[vec![cell(1), cell(2)], vec![cell(3)]], 2);
        assert_eq!(
            (grid.width, grid.height),
            (2 * (2 + GAP) + GAP, 2 * (2 + GAP) + GAP)
        );
        let at = |x: usize, y: usize| grid.rgb[(y * grid.width + x) * 3];
        assert_eq!(
            (at(GAP, GAP), at(2 * GAP + 2, GAP), at(GAP, 2 * GAP + 2)),
            (1, 2, 3)
        );
        assert_eq!((at(0, 0), at(2 * GAP + 2, 2 * GAP + 2)), (255, 255));
    }

    #[test]
    fn a_png_reads_back_equal() {
        let picture = Picture {
            width: 2,
            height: 1,
            rgb: vec![1, 2, 3, 4, 5, 6],
        };
        let file = picture.to_png().expect("encodes");
        let mut reader = png::Decoder::new(std::io::Cursor::new(file))
            .read_info()
            .expect("header");
        let mut rgb = vec![0; reader.output_buffer_size().expect("small")];
        reader.next_frame(&mut rgb).expect("pixels");
        assert_eq!(rgb, picture.rgb);
    }
}
