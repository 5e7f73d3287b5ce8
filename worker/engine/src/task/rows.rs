//! Stored rows as a trainer wants them: read ahead, verified, on the student's device.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use distillery_common::latents::Dataset;
use distillery_common::latents::loader::{Batch, Loader, Spec};
use distillery_common::telemetry::Stopwatch;
use tch::{Device, Tensor};
use tokio::runtime::Handle;

use super::host;
use crate::diffusion::denoiser::Conditioning;
use crate::distill::Rows;
use crate::train::Source;

/// Text states kept on the device. Beyond it all are dropped and read again when they are next needed.
const MAX_TEXTS: usize = 2048;

/// Rows of a sealed dataset in the order of a stage.
pub struct StoredRows {
    dataset: Arc<Dataset>,
    io: Handle,
    loader: Loader,
    global_batch: u64,
    current: Option<Batch>,
    texts: BTreeMap<[u8; 16], Conditioning>,
    /// `[1, 6]`, for networks that are told sizes.
    time_ids: Option<Tensor>,
    device: Device,
    /// Time spent waiting for rows since it was last asked for.
    waited: Duration,
}

impl StoredRows {
    /// Starts to read what `spec` names. `time_ids` `[1, 6]` belongs to every row.
    pub fn start(
        io: &Handle,
        dataset: Arc<Dataset>,
        spec: Spec,
        time_ids: Option<Tensor>,
        device: Device,
    ) -> Self {
        let _entered = io.enter();
        let global_batch = spec.order.global_batch;
        Self {
            loader: Loader::start(Arc::clone(&dataset), spec),
            dataset,
            io: io.clone(),
            global_batch,
            current: None,
            texts: BTreeMap::new(),
            time_ids,
            device,
            waited: Duration::ZERO,
        }
    }

    /// Time spent waiting for rows since the last call.
    pub fn take_waited(&mut self) -> Duration {
        std::mem::take(&mut self.waited)
    }

    fn load_step(&mut self, step: u64) -> anyhow::Result<()> {
        if self
            .current
            .as_ref()
            .is_some_and(|batch| batch.step == step)
        {
            return Ok(());
        }
        let watch = Stopwatch::start();
        // The old buffers go back before new ones are asked for.
        self.current = None;
        let batch = self.loader.next_blocking()?;
        self.waited += watch.elapsed();
        let batch = batch.ok_or_else(|| anyhow::anyhow!("rows end before step {step}"))?;
        anyhow::ensure!(
            batch.step == step,
            "rows of step {} came for step {step}",
            batch.step
        );
        self.current = Some(batch);
        Ok(())
    }

    fn read_texts(&mut self, ids: &[[u8; 16]]) -> anyhow::Result<()> {
        if self.texts.len() + ids.len() > MAX_TEXTS {
            self.texts.clear();
        }
        let schema = &self.dataset.manifest().schema;
        let shape = |value: &distillery_common::latents::schema::Value| -> Vec<i64> {
            std::iter::once(1)
                .chain(value.shape.iter().map(|&n| n as i64))
                .collect()
        };
        for id in ids {
            if self.texts.contains_key(id) {
                continue;
            }
            let text = self.io.block_on(self.dataset.embedding(id))?;
            let pooled = text.pooled.as_ref().zip(schema.pooled.as_ref());
            let conditioning = Conditioning {
                context: host::from_f16(&text.ctx, &shape(&schema.ctx), self.device),
                pooled: pooled
                    .map(|(bytes, value)| host::from_f16(bytes, &shape(value), self.device)),
                time_ids: self.time_ids.as_ref().map(Tensor::shallow_clone),
            };
            self.texts.insert(*id, conditioning);
        }
        Ok(())
    }
}

impl Source for StoredRows {
    fn rows(&mut self, positions: Range<u64>) -> anyhow::Result<Rows> {
        self.load_step(positions.start / self.global_batch)?;
        let batch = self
            .current
            .as_ref()
            .expect("the step has just been loaded");
        let within = (positions.start - batch.first_position) as usize
            ..(positions.end - batch.first_position) as usize;
        let staging = batch.rows();
        let latent = &self.dataset.manifest().schema.latent;
        let wide = latent.bytes();
        let bytes = within.start * wide..within.end * wide;
        let shape: Vec<i64> = std::iter::once(within.len() as i64)
            .chain(latent.shape.iter().map(|&n| n as i64))
            .collect();
        let times: Vec<i64> = staging.timestep[within.clone()]
            .iter()
            .map(|&t| i64::from(t))
            .collect();
        let numbers = batch.indices[within.clone()].to_vec();
        let ids = staging.cond_id[within].to_vec();
        let z = host::from_f16(&staging.latent[bytes.clone()], &shape, self.device);
        let eps_w = host::from_f16(&staging.eps_w[bytes], &shape, self.device);
        self.read_texts(&ids)?;
        let texts: Vec<&Conditioning> = ids.iter().map(|id| &self.texts[id]).collect();
        Ok(Rows {
            numbers,
            z,
            eps_w,
            t: Tensor::from_slice(&times).to_device(self.device),
            conditioning: Conditioning::stack(&texts),
        })
    }
}
