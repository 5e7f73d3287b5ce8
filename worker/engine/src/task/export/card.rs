//! The card of an exported student: how to sample it, and where it comes from.

use distillery_common::recipe::{Method, StudentKind};

use super::Finished;
use super::pipeline::{natural_steps, shown_times};

/// The card, as Markdown.
pub(super) fn text(student: &Finished<'_>, is_xl: bool) -> String {
    let Finished {
        recipe,
        record,
        stage,
        ..
    } = student;
    let class = if is_xl {
        "StableDiffusionXLPipeline"
    } else {
        "StableDiffusionPipeline"
    };
    let original = student.original_steps();
    let steps = natural_steps(stage);
    let method = match stage.method {
        Method::Mlcm => "multistep latent consistency distillation (arXiv 2406.05768)",
        Method::Lcm => "latent consistency distillation (arXiv 2310.04378)",
        Method::Mcd => "multistep consistency distillation (arXiv 2403.06807)",
    };
    let trained = match &stage.student.kind {
        StudentKind::Full => "every weight of the denoiser".to_owned(),
        StudentKind::Lora { lora_rank, .. } => {
            format!("adapters of rank {lora_rank}, merged into the weights here")
        }
    };
    let times: String = [1, 2, 4, 8]
        .iter()
        .filter(|&&n| n <= original)
        .map(|&n| format!("| {n} | {} |\n", shown_times(n, original)))
        .collect();
    format!(
        "# {name}, stage {stage_name}\n\n\
         A few-step student of a latent diffusion teacher, made by Distillery. It is sampled without guidance:\n\
         the teacher's guidance scale ({guidance}) is part of its weights.\n\n\
         ```python\n\
         import torch\n\
         from diffusers import {class}\n\n\
         # One dtype for all parts: transformers would otherwise keep the text encoder in that of its file.\n\
         pipeline = {class}.from_pretrained(\"path/to/this/folder\", torch_dtype=torch.float32)\n\
         picture = pipeline(\"a prompt\", num_inference_steps={steps}, guidance_scale=1.0).images[0]\n\
         ```\n\n\
         The scheduler configuration (`LCMScheduler`, `original_inference_steps` {original}) gives these times:\n\n\
         | steps | times |\n|---|---|\n{times}\n\
         - method: {method}, {segments} segments, {train_steps} optimizer steps\n\
         - trained: {trained}\n\
         - run: {run}\n\
         - recipe: SHA-256 {recipe_digest}\n\
         - teacher files: SHA-256 {teacher_digest}\n\n\
         The licence of the teacher's weights holds for this folder too.\n",
        name = recipe.name,
        stage_name = stage.name,
        guidance = recipe.teacher.guidance,
        segments = stage.segments,
        train_steps = stage.steps,
        run = record.run_id,
        recipe_digest = record.recipe_digest,
        teacher_digest = student.teacher_digest(),
    )
}
