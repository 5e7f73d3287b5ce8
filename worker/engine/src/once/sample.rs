//! Pictures from a teacher, an export or a checkpoint.

use std::path::Path;
use std::rc::Rc;

use distillery_common::once::{Line, Model, Sample};
use distillery_common::recipe::Sampler;
use distillery_common::task::FailureClass;
use distillery_common::teacher::Folder;
use serde_json::{Value, json};
use tch::{Device, Kind};

use super::{Run, open_host, parse_dtype};
use crate::evaluation::picture::Picture;
use crate::models::Unet;
use crate::task::export::put_file;
use crate::task::finished_student::Found;
use crate::task::samples::{self, LCM_ORIGINAL_STEPS, Way, name_of, pictures, times_of};
use crate::task::studio::{Studio, lcm_original_steps};
use crate::task::{Fault, OrFault as _};
use crate::workbench::{TeacherModel, kind_of};

/// Most pictures of one request.
const MAX_PICTURES: usize = 10_000;
/// Most pixels of a grid.
const MAX_GRID_PIXELS: i64 = 1 << 28;
/// The class of scheduler that students are exported with.
const STUDENT_SCHEDULER: &str = "LCMScheduler";

/// Draws what is wanted, a picture at a time.
pub(super) fn draw(wanted: &Sample, say: &mut dyn FnMut(Line)) -> Result<Value, Fault> {
    let pictures_wanted = wanted.prompts.len() * wanted.seeds.len() * wanted.steps.len();
    if pictures_wanted == 0 || pictures_wanted > MAX_PICTURES {
        return Err(Fault::config(format!(
            "{} prompts, {} seeds and {} step counts make {pictures_wanted} pictures; 1 to {MAX_PICTURES} \
             are drawn at a time",
            wanted.prompts.len(),
            wanted.seeds.len(),
            wanted.steps.len()
        )));
    }
    let source = Source::open(wanted)?;
    let ways: Vec<Way> = wanted
        .steps
        .iter()
        .map(|&steps| Way {
            sampler: source.sampler,
            steps,
        })
        .collect();
    // Every list of times is known before anything is drawn.
    for &way in &ways {
        times_of(way, source.lcm_original_steps)?;
    }
    let side = source.teacher.parts.image_side();
    let pixels = pictures_wanted as i64 * side * side;
    if wanted.grid.is_some() && pixels > MAX_GRID_PIXELS {
        return Err(Fault::config(format!(
            "a grid of {pictures_wanted} pictures is too large; ask for fewer"
        )));
    }
    let (cells, files) = source.draw_all(wanted, &ways, say)?;
    if let Some(path) = &wanted.grid {
        put_file(path, &png(&Picture::grid(&cells, 1))?)?;
        say(Line::Written(path.clone()));
    }
    Ok(json!({
        "pictures": pictures_wanted,
        "files": files,
        "sampler": name_of(source.sampler),
        "guidance": source.guidance,
        "step": source.step,
    }))
}

/// What pictures are drawn from, and how.
struct Source {
    teacher: Rc<TeacherModel>,
    /// None: the folder's own denoiser.
    student: Option<Unet>,
    sampler: Sampler,
    guidance: f64,
    lcm_original_steps: u32,
    device: Device,
    /// Of the checkpoint.
    step: Option<u64>,
}

impl Source {
    fn open(wanted: &Sample) -> Result<Self, Fault> {
        let device = open_host(&wanted.host)?;
        let kind = kind_of(parse_dtype(&wanted.dtype)?);
        let asked = match wanted.sampler.as_deref() {
            Some(name) => Some(samples::parse(name).ok_or_else(|| {
                Fault::config(format!(
                    "the sampler {name:?} is none of ddim, tlcm9, lcm, segments"
                ))
            })?),
            None => None,
        };
        match &wanted.model {
            Model::Folder(path) => Self::of_folder(path, wanted, asked, kind, device),
            Model::Checkpoint { run, stage, step } => {
                let run = Run::open(run)?;
                Self::of_checkpoint(&run, stage.as_deref(), *step, wanted, asked, device)
            }
        }
    }

    fn of_folder(
        path: &Path,
        wanted: &Sample,
        asked: Option<Sampler>,
        kind: Kind,
        device: Device,
    ) -> Result<Self, Fault> {
        let folder = Folder::open(path, None).or_fault(FailureClass::Config)?;
        let is_student = folder.schedule.class == STUDENT_SCHEDULER;
        let guidance = match wanted.guidance {
            Some(guidance) => guidance,
            None if is_student => 1.0,
            None => {
                return Err(Fault::config(format!(
                    "{} is a teacher, which is sampled with guidance: say with how much by --guidance (1 for none)",
                    path.display()
                )));
            }
        };
        let original = u32::try_from(folder.schedule.original_inference_steps).ok();
        Ok(Self {
            teacher: Rc::new(TeacherModel::load(&folder, kind, device)?),
            student: None,
            sampler: asked.unwrap_or(if is_student {
                Sampler::Lcm
            } else {
                Sampler::Ddim
            }),
            guidance,
            lcm_original_steps: original.unwrap_or(LCM_ORIGINAL_STEPS),
            device,
            step: None,
        })
    }

    fn of_checkpoint(
        run: &Run,
        stage: Option<&str>,
        step: Option<u64>,
        wanted: &Sample,
        asked: Option<Sampler>,
        device: Device,
    ) -> Result<Self, Fault> {
        let stage = run.stage(stage)?;
        let found = match step {
            Some(step) => Found::at(&run.io, &run.store, &stage.name, step)?,
            None => Found::newest(&run.io, &run.store, &stage.name)?,
        };
        let dtype = parse_dtype(&wanted.dtype)?;
        let teacher = run.teacher(kind_of(dtype), device)?;
        let student = found.load(&run.io, &teacher, stage, dtype, run.recipe.seed, device)?;
        Ok(Self {
            teacher: Rc::new(teacher),
            student: Some(student.unet),
            sampler: asked.unwrap_or(run.recipe.preview.sampler),
            guidance: wanted.guidance.unwrap_or(1.0),
            lcm_original_steps: lcm_original_steps(&run.recipe),
            device,
            step: Some(found.manifest().step),
        })
    }

    /// Draws every picture; gives the rows of the grid, where one is wanted, and the files.
    fn draw_all(
        &self,
        wanted: &Sample,
        ways: &[Way],
        say: &mut dyn FnMut(Line),
    ) -> Result<(Vec<Vec<Picture>>, Vec<Value>), Fault> {
        let teacher = Rc::clone(&self.teacher);
        let unet = self.student.as_ref().unwrap_or(&self.teacher.parts.unet);
        let mut studio = Studio::over(
            teacher,
            self.guidance,
            self.lcm_original_steps,
            0,
            self.device,
        );
        let total = (wanted.prompts.len() * wanted.seeds.len() * ways.len()) as u64;
        let (mut cells, mut files, mut done) = (Vec::new(), Vec::new(), 0);
        for (at, prompt) in wanted.prompts.iter().enumerate() {
            for &seed in &wanted.seeds {
                let mut row = Vec::new();
                for &way in ways {
                    let latents = studio.draw_one(unet, self.guidance, way, prompt, seed)?;
                    let mut drawn = pictures(&self.teacher, &latents);
                    if let Some(out) = &wanted.out {
                        let path = out.join(format!("{at:04}-seed{seed}-steps{}.png", way.steps));
                        for picture in &drawn {
                            put_file(&path, &png(picture)?)?;
                        }
                        files.push(json!({
                            "file": path, "prompt": prompt, "seed": seed, "steps": way.steps,
                        }));
                        say(Line::Written(path));
                    }
                    done += 1;
                    say(Line::Progress { done, total });
                    row.append(&mut drawn);
                }
                if wanted.grid.is_some() {
                    cells.push(row);
                }
            }
        }
        Ok((cells, files))
    }
}

fn png(picture: &Picture) -> Result<Vec<u8>, Fault> {
    picture.to_png().or_fault(FailureClass::Unknown)
}
