//! Commands that an engine answers: this program links no libtorch, so it starts one, asks, and shows the answer.

use std::io::{BufRead as _, BufReader, IsTerminal as _, Read as _, Write as _};
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};

use anyhow::{Context as _, bail, ensure};
use distillery_common::once::{Host, Line, MAX_ANSWER_BYTES, MAX_REQUEST_BYTES, Request};
use serde_json::Value;

use super::run::program;
use crate::console;

/// Who computes.
#[derive(Debug, clap::Args)]
pub(super) struct Engine {
    /// The engine; found beside this program when not given.
    #[arg(long, env = "DISTILLERY_ENGINE", value_name = "PATH")]
    engine: Option<PathBuf>,
    /// Where to compute: cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// CPU threads; libtorch's own choice when not given.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    threads: Option<u32>,
}

/// Number formats of weights.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub(super) enum Dtype {
    F32,
    F16,
    Bf16,
}

impl Dtype {
    pub(super) fn name(self) -> String {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
        .to_owned()
    }
}

impl Engine {
    /// Where it computes.
    pub(super) fn host(&self) -> Host {
        Host {
            device: self.device.clone(),
            threads: self.threads,
        }
    }

    /// Asks, shows how far it is, and gives the result.
    pub(super) fn ask(self, request: &Request) -> anyhow::Result<Value> {
        let text = serde_json::to_vec(request).context("the request is no JSON")?;
        ensure!(
            text.len() as u64 <= MAX_REQUEST_BYTES,
            "the request has {} bytes, more than {MAX_REQUEST_BYTES}; ask for fewer prompts at a time",
            text.len()
        );
        let path = program(self.engine, "engine", "--engine or DISTILLERY_ENGINE")?;
        let mut command = Command::new(&path);
        command.arg("once");
        if std::env::var_os("RUST_LOG").is_none() {
            command.env("RUST_LOG", "warn");
        }
        let mut engine = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("{} cannot be started", path.display()))?;
        let mut input = engine.stdin.take().expect("it was asked for");
        // An engine that ends early says why itself; its closed pipe is no news.
        let _ = input.write_all(&text);
        drop(input);
        let answer = listen(&mut engine);
        let status = engine.wait().context("the engine cannot be waited for")?;
        match answer? {
            Some(result) => Ok(result),
            None => bail!(
                "the engine {} ended without an answer: {status}",
                path.display()
            ),
        }
    }
}

/// Reads lines until the engine closes its output; an error of the engine is ours.
fn listen(engine: &mut Child) -> anyhow::Result<Option<Value>> {
    let output = engine.stdout.take().expect("it was asked for");
    let shows = std::io::stderr().is_terminal();
    let mut result = None;
    for line in BufReader::new(output.take(MAX_ANSWER_BYTES)).lines() {
        let line = line.context("the engine's answer cannot be read")?;
        match serde_json::from_str(&line) {
            Ok(Line::Progress { done, total }) if shows => {
                console::draw(format_args!("\r{done} of {total}\x1b[K"));
            }
            Ok(Line::Progress { .. } | Line::Written(_)) => {}
            Ok(Line::Result(value)) => result = Some(value),
            Ok(Line::Error(message)) => {
                clear(shows);
                bail!("{message}");
            }
            Err(error) => bail!("the engine said {line:?}, which is no answer: {error}"),
        }
    }
    clear(shows);
    Ok(result)
}

fn clear(shows: bool) {
    if shows {
        console::draw("\r\x1b[K");
    }
}

/// Shows a result: the whole of it as JSON, or in one sentence.
pub(super) fn show(result: &Value, json: bool, sentence: &str) -> anyhow::Result<ExitCode> {
    if json {
        console::result(result)?;
    } else {
        console::result(sentence)?;
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    /// Asks a script that stands in for the engine.
    fn ask(script: &str) -> anyhow::Result<Value> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("engine");
        testing::program(&path, &format!("#!/bin/sh\n{script}\n"));
        let engine = Engine {
            engine: Some(path),
            device: "cpu".into(),
            threads: Some(1),
        };
        let request = Request::Export(distillery_common::once::Export {
            run: "runs/one".into(),
            stage: None,
            formats: vec!["diffusers".into()],
            dtype: "f16".into(),
            out: "there".into(),
            host: engine.host(),
        });
        engine.ask(&request)
    }

    #[test]
    fn the_engine_is_asked_on_its_input_and_answers_on_its_output() {
        let result = ask(
            "read request; case \"$1$request\" in once*'\"run\":\"runs/one\"'*) ;; *) exit 3;; esac\n\
             echo '{\"progress\":{\"done\":1,\"total\":2}}'; echo '{\"result\":{\"files\":7}}'",
        );
        assert_eq!(result.expect("an answer")["files"], 7);
    }

    #[test]
    fn what_goes_wrong_in_the_engine_is_told() {
        let told = ask("cat >/dev/null; echo '{\"error\":\"there is no run at x\"}'; exit 1");
        assert_eq!(
            told.expect_err("an error").to_string(),
            "there is no run at x"
        );
        let silent = ask("cat >/dev/null; exit 9")
            .expect_err("no answer")
            .to_string();
        assert!(
            silent.contains("without an answer") && silent.contains('9'),
            "{silent}"
        );
        let noise = ask("cat >/dev/null; echo hello")
            .expect_err("no answer")
            .to_string();
        assert!(noise.contains("hello"), "{noise}");
    }
}
