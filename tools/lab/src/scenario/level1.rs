// SPDX-License-Identifier: GPL-2.0
//! The scenarios where there is no usable KVM: one emulated machine per
//! driver set, both at once, their reports merged into one.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::thread;

use serde::{Deserialize, Serialize};

use crate::level1::Launch;
use crate::run::Files;

use super::tap::Tap;
use super::{choose, compare, forget_texts, list, Drivers, Measurements, Result, TestOptions};

/// Where level 1 keeps logs, and the way by which those of failed boots leave it.
const OUTPUT: &str = "/tmp/output";
const ARTIFACTS: &str = "/lab/out/artifacts";

/// Where it finds what guests are made of.
const KERNEL: &str = "/lab/kernel";
const IMAGE: &str = "/lab/image";
const MODULES: &str = "/lab/modules";
const SELFTESTS: &str = "/lab/selftests";
/// Memory in MiB beyond the guest's: its own kernel, initramfs, logs and peers.
const OVERHEAD: u32 = 700;

/// A log that leaves level 1: one a line.
#[derive(Serialize, Deserialize)]
struct Artifact {
    folder: String,
    name: String,
    text: String,
}

/// Writes the logs in `folder` to the way out.
pub fn export(way: &mut File, folder: &Path) -> Result<()> {
    use std::io::Write;
    let name = |path: &Path| {
        path.file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    };
    for entry in fs::read_dir(folder)?.flatten() {
        if !entry.file_type()?.is_file() {
            continue;
        }
        let artifact = Artifact {
            folder: name(folder),
            name: name(&entry.path()),
            text: String::from_utf8_lossy(&fs::read(entry.path())?).into_owned(),
        };
        let mut line = serde_json::to_vec(&artifact)?;
        line.push(b'\n');
        way.write_all(&line)?;
    }
    Ok(())
}

/// Puts exported logs into the output folder.
fn import(way: &Path, output: &Path) -> Result<()> {
    for line in BufReader::new(File::open(way)?).lines() {
        let Ok(artifact) = serde_json::from_str::<Artifact>(&line?) else {
            continue;
        };
        // Names came from a machine of ours, yet they must stay inside.
        let plain = |name: &str| !name.is_empty() && !name.starts_with('.') && !name.contains('/');
        if plain(&artifact.folder) && plain(&artifact.name) {
            let folder = output.join(artifact.folder);
            fs::create_dir_all(&folder)?;
            fs::write(folder.join(artifact.name), artifact.text)?;
        }
    }
    Ok(())
}

/// What the machines report together.
struct Merged {
    tap: Tap,
    output: String,
    measurements: Measurements,
}

impl Merged {
    /// Takes a line of a machine's report. `pending` is a failed check whose explanation follows.
    fn line(&mut self, line: &str, pending: &mut Option<(String, String)>) {
        if let Some(text) = line.strip_prefix("#     ") {
            if let Some((_, why)) = pending {
                why.push_str(text);
                why.push('\n');
                return;
            }
        }
        self.flush(pending);
        let name = |rest: &str| {
            rest.split_once(" - ")
                .map_or(rest, |(_, name)| name)
                .to_owned()
        };
        if let Some(rest) = line.strip_prefix("not ok ") {
            *pending = Some((name(rest), String::new()));
        } else if let Some(rest) = line.strip_prefix("ok ") {
            self.tap.check(&name(rest), Ok(()));
        } else if let Some(text) = line.strip_prefix("# ") {
            // The machine's own clock is of no interest.
            if let Some((_, text)) = text.split_once(" s  ") {
                self.measurement(text);
                // Logs come out of the machine at its end.
                self.tap.note(&text.replace(OUTPUT, &self.output));
            }
        } else if !line.starts_with("1..") && !line.contains(" passed, ") {
            self.tap.note(line);
        }
    }

    fn flush(&mut self, pending: &mut Option<(String, String)>) {
        if let Some((name, why)) = pending.take() {
            self.tap.check(&name, Err(why));
        }
    }

    fn measurement(&mut self, text: &str) {
        let parse = || {
            let (set, rest) = text.strip_prefix('[')?.split_once("] measured ")?;
            let (name, value) = rest.split_once(" = ")?;
            Some((
                set == Drivers::Rust.word(),
                name.to_owned(),
                value.parse().ok()?,
            ))
        };
        if let Some((rust, name, value)) = parse() {
            self.measurements.insert((rust, name), value);
        }
    }
}

/// Runs the chosen scenarios in level 1; true when every check passed.
pub fn run(options: &TestOptions) -> Result<bool> {
    let chosen = choose(&options.scenarios)?;
    if options.list {
        list();
        return Ok(true);
    }
    options.check_files()?;
    fs::create_dir_all(&options.output)?;
    forget_texts(options);
    let sets = options.drivers.sets();
    let merged = Mutex::new(Merged {
        tap: Tap::new(Box::new(std::io::stdout())),
        output: options.output.display().to_string(),
        measurements: Measurements::new(),
    });
    let lock = || merged.lock().unwrap_or_else(PoisonError::into_inner);
    lock()
        .tap
        .note(&format!("emulating {} machine(s) with KVM", sets.len()));
    thread::scope(|scope| {
        for &drivers in sets {
            let lock = &lock;
            scope.spawn(move || {
                let result = machine(options, drivers, |line, pending| lock().line(line, pending));
                let result = result.map_err(|error| error.to_string());
                // Checks that failed have been reported; anything else has not.
                if result != Ok(1) {
                    let name = format!("[{drivers}] the emulated machine runs to its end");
                    let result = result.and_then(|code| match code {
                        0 => Ok(()),
                        _ => Err(format!("its exit status is {code}")),
                    });
                    lock().tap.check(&name, result);
                }
            });
        }
    });
    let mut merged = merged.into_inner().unwrap_or_else(PoisonError::into_inner);
    let Merged {
        tap, measurements, ..
    } = &mut merged;
    compare(tap, options, measurements, &chosen);
    Ok(merged.tap.finish())
}

/// How to run this program in an emulated machine that has what guests are made of.
pub fn launch(files: &Files, args: Vec<String>, own_modules: bool) -> Launch {
    let mut env = vec![
        ("HVLAB_KERNEL".to_owned(), KERNEL.to_owned()),
        ("HVLAB_IMAGE".to_owned(), IMAGE.to_owned()),
    ];
    let mut folders = Vec::new();
    if let (Some(modules), true) = (&files.modules, own_modules) {
        folders.push((modules.clone(), MODULES.to_owned()));
        env.push(("HVLAB_MODULES".to_owned(), MODULES.to_owned()));
    }
    Launch {
        args,
        env,
        kernel: files.kernel.clone(),
        image: files.image.clone(),
        disks: vec![
            (files.kernel.clone(), KERNEL.to_owned()),
            (files.image.clone(), IMAGE.to_owned()),
        ],
        files: folders,
        outputs: Vec::new(),
        sockets: Vec::new(),
        stdin: false,
        // With more, level 1's kernel has crashed while patching its own code under emulation.
        cpus: 1,
        memory: super::guest::MEMORY + OVERHEAD,
        qemu: files.qemu.clone(),
        plugin: None,
    }
}

/// Runs the scenarios with one driver set in a machine; its exit status.
fn machine(
    options: &TestOptions,
    drivers: Drivers,
    mut report: impl FnMut(&str, &mut Option<(String, String)>) + Send,
) -> Result<i32> {
    let way = options.output.join(format!(".{drivers}.artifacts"));
    File::create(&way)?;
    let mut args = vec![
        "test".to_owned(),
        format!("--drivers={drivers}"),
        format!("--output={OUTPUT}"),
        format!("--artifacts={ARTIFACTS}"),
    ];
    args.extend(options.keep.then(|| "--keep".to_owned()));
    for part in &options.selftest {
        args.push(format!("--selftest={part}"));
    }
    args.extend(options.scenarios.iter().cloned());
    let mut launch = launch(&options.files, args, drivers == Drivers::Rust);
    launch.outputs = vec![(way.clone(), ARTIFACTS.to_owned())];
    if let Some(archive) = &options.selftests {
        launch.disks.push((archive.clone(), SELFTESTS.to_owned()));
        let name = "HVLAB_SELFTESTS".to_owned();
        launch.env.push((name, SELFTESTS.to_owned()));
    }
    let (reader, writer) = nix::unistd::pipe()?;
    let reader = File::from(reader);
    let code = thread::scope(|scope| -> Result<i32> {
        let lines = scope.spawn(move || {
            let mut pending = None;
            for line in BufReader::new(reader).lines() {
                let Ok(line) = line else { break };
                report(&line, &mut pending);
            }
            report("# end", &mut pending);
        });
        let code = launch.run(File::from(writer));
        // Its end of the pipe is closed now.
        drop(lines.join());
        Ok(code?)
    })?;
    import(&way, &options.output)?;
    fs::remove_file(&way)?;
    Ok(code)
}
