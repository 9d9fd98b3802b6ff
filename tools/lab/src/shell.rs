// SPDX-License-Identifier: GPL-2.0
//! `hvlab lab`: a login shell on a guest's console, with the control client beside it.

use std::env;
use std::io::{self, IsTerminal};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use clap::{Args, Parser};

use crate::run::{self, Files};

/// What the second half of the screen says.
const HELP: &str = "\
The guest boots on the left; this shell controls its host. Try:
    hvlab ctl status
    hvlab ctl service --duration 5      (and look at the guest's log)
    hvlab ctl vf-link down
    hvlab ctl log --follow
    hvlab ctl quit                      (ends the guest)
In the namespace of its peer: ip netns exec hvlab0 ping 10.0.0.2";

/// Arguments of `hvlab lab`.
#[derive(Debug, Clone, Args)]
pub struct Options {
    #[command(flatten)]
    files: Files,
    /// Run the kernel's own drivers instead of ours
    #[arg(long)]
    stock: bool,
    /// Listen for `hvlab ctl` on this Unix socket
    #[arg(long, default_value = "hvlab.sock", value_name = "SOCKET")]
    control: PathBuf,
    /// Only the console, even where tmux could show both
    #[arg(long)]
    plain: bool,
    /// More arguments for `hvlab run`
    #[arg(last = true)]
    more: Vec<String>,
}

/// The arguments of `run` as a command of their own.
#[derive(Parser)]
struct Run {
    #[command(flatten)]
    args: run::Args,
}

impl Options {
    /// The guest that the options describe.
    pub fn guest(&self) -> Result<run::Args, String> {
        let files = &self.files;
        let mut argv = vec![
            "hvlab lab".into(),
            "--kernel".into(),
            files.kernel.clone().into_os_string(),
            "--image".into(),
            files.image.clone().into_os_string(),
            "--drivers".into(),
            if self.stock { "c" } else { "rust" }.into(),
            "--control".into(),
            self.control.clone().into_os_string(),
            "--append=lab.shell lab.address".into(),
        ];
        argv.extend(self.more.iter().map(Into::into));
        let mut args = Run::try_parse_from(argv)
            .map_err(|error| error.to_string())?
            .args;
        args.files = files.clone();
        Ok(args)
    }

    /// Shows console and control client side by side, where that can be done; otherwise returns.
    pub fn side_by_side(&self) -> Result<(), String> {
        if self.plain || env::var_os("TMUX").is_some() || !io::stdout().is_terminal() {
            println!(
                "In another terminal: hvlab ctl --socket {} --help",
                self.control.display()
            );
            return Ok(());
        }
        let program = env::current_exe().map_err(|error| error.to_string())?;
        let mut arguments: Vec<_> = env::args().skip(1).collect();
        arguments.insert(1, "--plain".to_owned());
        let console = quoted([program.display().to_string()].into_iter().chain(arguments));
        let folder = program.parent().map(|path| path.display().to_string());
        let beside = format!(
            "export HVLAB_SOCKET={} PATH={}:$PATH; echo {}; exec bash --norc",
            quote(&self.control.display().to_string()),
            quote(&folder.unwrap_or_default()),
            quote(HELP)
        );
        // The console's words stay readable after its end.
        let console = format!(
            "{console}; echo 'The guest has ended; Enter closes.'; read -r _; tmux kill-session"
        );
        let error = Command::new("tmux")
            .args([
                "new-session",
                &console,
                ";",
                "split-window",
                "-h",
                &beside,
                ";",
            ])
            .args(["select-pane", "-L"])
            .exec();
        println!("hvlab: no tmux here ({error}), so only the console.");
        println!(
            "In another terminal: hvlab ctl --socket {} --help",
            self.control.display()
        );
        Ok(())
    }
}

fn quoted(words: impl Iterator<Item = String>) -> String {
    words.map(|word| quote(&word)).collect::<Vec<_>>().join(" ")
}

/// A word as the shell takes it.
fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_the_shell() {
        assert_eq!(quote("a b"), "'a b'");
        assert_eq!(quote("it's"), r"'it'\''s'");
    }
}
