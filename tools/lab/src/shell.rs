// SPDX-License-Identifier: GPL-2.0
//! `hvlab lab`: a login shell on a guest's console, with the control client beside it.

use std::env;
use std::fs;
use std::io::{self, IsTerminal};
use std::path::{self, PathBuf};
use std::process::{self, Command};

use clap::{Args, Parser};

use crate::run::{self, Files};
use crate::signals;
use crate::terminal;

/// What the second half of the screen says.
const HELP: &str = "\
The guest boots on the left; this shell controls its host. Try:
    hvlab ctl status
    hvlab ctl service --duration 5       the host takes the VF away for 5 s
    hvlab ctl vf-link down               and up again
    hvlab ctl counters net0
    hvlab ctl log --follow               Ctrl-C ends it
    hvlab ctl peer ping -c 3 10.0.0.2    from the other end of the wire
    hvlab ctl --help
and in the guest:
    dmesg | grep hv_
    ethtool -S eth0 | grep vf_
    ping 10.0.0.1
    poweroff";

/// What the line at the bottom says.
const KEYS: &str =
    " F12, or Ctrl-B and an arrow: other side | in the guest, poweroff or Ctrl-]: end of the lab ";

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
    /// This is the console beside which the other half of the screen is
    #[arg(long, hide = true)]
    beside: bool,
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
        ];
        argv.extend(self.more.iter().map(Into::into));
        let mut args = Run::try_parse_from(argv)
            .map_err(|error| error.to_string())?
            .args;
        args.files = files.clone();
        args.append = format!("lab.shell lab.address {}", args.append);
        if let Some((rows, columns)) = terminal::size() {
            args.append += &format!(" lab.size={rows}x{columns}");
        }
        Ok(args)
    }

    /// Shows console and control client side by side until their end. `false` where that cannot be done.
    pub fn side_by_side(&self) -> Result<bool, String> {
        if self.beside {
            return Ok(false);
        }
        let program = env::current_exe().map_err(|error| error.to_string())?;
        let socket = path::absolute(&self.control).map_err(|error| error.to_string())?;
        let elsewhere = format!(
            "hvlab: in another terminal: {} ctl --socket {} --help",
            program.display(),
            socket.display()
        );
        if self.plain || !io::stdin().is_terminal() || !io::stdout().is_terminal() {
            println!("{elsewhere}");
            return Ok(false);
        }
        let mut arguments: Vec<_> = env::args().skip(1).collect();
        arguments.insert(1, "--beside".to_owned());
        let console = quoted([program.display().to_string()].into_iter().chain(arguments));
        let folder = program.parent().map(|path| path.display().to_string());
        let beside = format!(
            "export HVLAB_SOCKET={} PATH={}:$PATH PS1='host:\\w# '; echo {}; exec bash --norc",
            quote(&socket.display().to_string()),
            quote(&folder.unwrap_or_default()),
            quote(HELP)
        );
        // The console's words stay readable after its end.
        let console = format!(
            "{console}; echo 'The guest has ended; Enter closes.'; read -r _; tmux kill-session"
        );
        // A server of its own: one that runs already knows nothing of the build root. It leaves its socket behind.
        let server = env::temp_dir().join(format!("hvlab-tmux-{}", process::id()));
        let _on_signal = signals::clean_up_by({
            let server = server.clone();
            move || drop(fs::remove_file(server))
        });
        let status = Command::new("tmux")
            .env_remove("TMUX")
            .arg("-S")
            .arg(&server)
            .args(["-f", "/dev/null"])
            .args(["new-session", &console])
            .args([";", "split-window", "-h", &beside])
            .args([";", "select-pane", "-L"])
            .args([";", "bind-key", "-n", "F12", "select-pane", "-t", ":.+"])
            .args([";", "set-option", "status-left", KEYS])
            .args([";", "set-option", "status-left-length", "120"])
            .args([";", "set-option", "status-right", ""])
            .args([";", "set-option", "window-status-format", ""])
            .args([";", "set-option", "window-status-current-format", ""])
            // Nothing goes on when the terminal is closed.
            .args([";", "set-option", "destroy-unattached", "on"])
            .status();
        let _ = fs::remove_file(&server);
        if let Err(error) = status {
            println!("hvlab: no tmux here ({error}), so only the console");
            println!("{elsewhere}");
            return Ok(false);
        }
        Ok(true)
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
