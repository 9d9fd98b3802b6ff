// SPDX-License-Identifier: GPL-2.0
//! Counts of the guest's instructions, from the plugin of the QEMU that emulates level 1.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use serde::Deserialize;

use super::super::guest::Guest;
use super::super::Result;

/// The counts are on their way when the guest has passed its mark.
const ARRIVAL: Duration = Duration::from_secs(30);

/// What was executed between two marks.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Count {
    /// Instructions of the guest.
    pub total: u64,
    /// Of those, the ones in user mode.
    pub user: u64,
    /// Entries into the guest, so exits from it.
    pub entries: u64,
    /// Kernel blocks: address, instructions executed.
    blocks: Vec<(u64, u64)>,
}

/// Where the counts come from.
pub struct Counter {
    reports: mpsc::Receiver<Count>,
}

impl Counter {
    /// Reads what the plugin writes.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|error| format!("{}: {error}", path.display()))?;
        let (sender, reports) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(file).lines() {
                let count = line.ok().and_then(|line| serde_json::from_str(&line).ok());
                if count
                    .map(|count| sender.send(count))
                    .is_none_or(|sent| sent.is_err())
                {
                    break;
                }
            }
        });
        Ok(Self { reports })
    }

    /// The count between the last two marks.
    pub fn take(&self) -> Result<Count> {
        let mut count = self
            .reports
            .recv_timeout(ARRIVAL)
            .map_err(|_| "QEMU's plugin has counted nothing between the marks")?;
        // Counts of earlier marks that nobody has asked for.
        while let Ok(newer) = self.reports.try_recv() {
            count = newer;
        }
        Ok(count)
    }
}

/// A function, or a module as a whole.
#[derive(Debug, Clone)]
pub struct Symbol {
    address: u64,
    name: String,
    module: Option<String>,
}

/// Code of the guest in the order of its addresses.
pub struct Symbols(Vec<Symbol>);

/// Instructions by function and module.
#[derive(Debug, Default)]
pub struct Profile {
    /// Function with its module, and instructions; the largest first.
    pub functions: Vec<(String, u64)>,
    modules: HashMap<String, u64>,
}

impl Profile {
    /// Instructions in a module.
    pub fn module(&self, name: &str) -> u64 {
        self.modules.get(name).copied().unwrap_or(0)
    }

    /// Instructions in a function of the kernel itself.
    pub fn function(&self, name: &str) -> u64 {
        self.functions
            .iter()
            .find(|(function, _)| function == name)
            .map_or(0, |&(_, instructions)| instructions)
    }
}

/// A line of kallsyms, if it is code.
fn symbol(line: &str) -> Option<Symbol> {
    let mut words = line.split_whitespace();
    let address = u64::from_str_radix(words.next()?, 16).ok()?;
    if !matches!(words.next()?, "t" | "T" | "w" | "W") {
        return None;
    }
    let name = words.next()?.to_owned();
    let module = words
        .next()
        .map(|word| word.trim_matches(['[', ']']).to_owned());
    Some(Symbol {
        address,
        name,
        module,
    })
}

/// A line of the list of modules.
fn module(line: &str) -> Option<Symbol> {
    let mut words = line.split_whitespace();
    let name = words.next()?.to_owned();
    let address = words.find_map(|word| word.strip_prefix("0x"))?;
    Some(Symbol {
        address: u64::from_str_radix(address, 16).ok()?,
        name: "(all)".to_owned(),
        module: Some(name),
    })
}

/// The functions of the guest's kernel.
///
/// The list is long and the guest's serial line is slow. But this machine runs the same kernel, only at another
/// address.
pub fn kernel(guest: &Guest) -> Result<Vec<Symbol>> {
    let text = fs::read_to_string("/proc/kallsyms")?;
    let mut symbols: Vec<_> = text
        .lines()
        .filter_map(symbol)
        .filter(|symbol| symbol.module.is_none())
        .collect();
    let here = symbols
        .iter()
        .find(|symbol| symbol.name == "_text")
        .ok_or("no _text in /proc/kallsyms")?
        .address;
    let there = guest.sh("grep -m 1 ' _text$' /proc/kallsyms")?;
    let there = symbol(&there).ok_or("no _text in the guest's /proc/kallsyms")?;
    for symbol in &mut symbols {
        symbol.address = symbol
            .address
            .wrapping_sub(here)
            .wrapping_add(there.address);
    }
    Ok(symbols)
}

/// The modules in the guest, as a whole or with all their functions.
pub fn modules(guest: &Guest, functions: bool) -> Result<Vec<Symbol>> {
    if functions {
        let text = guest.sh("grep -E '^[^ ]* [tTwW] .*\\[' /proc/kallsyms")?;
        Ok(text.lines().filter_map(symbol).collect())
    } else {
        let text = guest.sh("cat /proc/modules")?;
        Ok(text.lines().filter_map(module).collect())
    }
}

impl Symbols {
    /// Those of the kernel and of its modules.
    pub fn new(kernel: &[Symbol], modules: Vec<Symbol>) -> Self {
        let mut symbols = kernel.to_vec();
        symbols.extend(modules);
        // Of several names for one address the last one is taken.
        symbols.sort_by_key(|symbol| symbol.address);
        Self(symbols)
    }

    /// Sums the blocks of a count up.
    pub fn profile(&self, count: &Count) -> Profile {
        let mut functions: HashMap<Option<usize>, u64> = HashMap::new();
        for &(address, instructions) in &count.blocks {
            let after = self.0.partition_point(|symbol| symbol.address <= address);
            *functions.entry(after.checked_sub(1)).or_default() += instructions;
        }
        let mut profile = Profile::default();
        for (index, instructions) in functions {
            let name = match index.map(|index| &self.0[index]) {
                Some(Symbol {
                    name,
                    module: Some(module),
                    ..
                }) => {
                    *profile.modules.entry(module.clone()).or_default() += instructions;
                    format!("{:#} [{module}]", rustc_demangle::demangle(name))
                }
                Some(symbol) => symbol.name.clone(),
                None => "(unknown)".to_owned(),
            };
            profile.functions.push((name, instructions));
        }
        profile
            .functions
            .push(("(user mode)".to_owned(), count.user));
        profile
            .functions
            .sort_by_key(|&(_, instructions)| std::cmp::Reverse(instructions));
        profile
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_belong_to_the_function_before_them() {
        let kernel = ["1000 T _text", "1100 t memcpy", "1200 D data"];
        let kernel: Vec<_> = kernel.iter().filter_map(|line| symbol(line)).collect();
        let modules =
            "hv_netvsc 131072 0 - Live 0x9000 (OE)\npktgen 73728 0 - Live 0x0000000000008000";
        let modules = modules.lines().filter_map(module).collect();
        let count = serde_json::from_str(
            r#"{"total":46,"user":3,"entries":1,
                "blocks":[[4096,1],[4351,2],[4352,4],[4600,5],[32768,6],[36864,10],[36900,15]]}"#,
        )
        .expect("a count");
        let profile = Symbols::new(&kernel, modules).profile(&count);
        assert_eq!(profile.function("_text"), 3);
        assert_eq!(profile.function("memcpy"), 9);
        assert_eq!(profile.module("pktgen"), 6);
        assert_eq!(profile.module("hv_netvsc"), 25);
        assert_eq!(profile.functions[0], ("(all) [hv_netvsc]".to_owned(), 25));
        assert_eq!(profile.function("(user mode)"), 3);
    }
}
