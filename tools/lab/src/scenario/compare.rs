// SPDX-License-Identifier: GPL-2.0
//! Texts that must be the same with both driver sets, but for differences that are wanted.
//!
//! A scenario writes texts in sections (see [`section`]). When both sets have run, each section of
//! the stock drivers is compared line by line with the one of ours.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use regex::Regex;

use super::tap::Tap;
use super::{Drivers, Result};

/// What begins a section.
const MARK: &str = "== ";

/// A difference that is to stay.
pub struct Kept {
    /// Pattern of `text/section` where it is.
    pub place: &'static str,
    /// Patterns of the lines that only the stock drivers have.
    pub stock: &'static [&'static str],
    /// Patterns of the lines that only ours have.
    pub ours: &'static [&'static str],
    /// Why ours is better.
    pub why: &'static str,
}

/// The name of the folder for a scenario's texts.
pub fn folder(drivers: Drivers, scenario: &str) -> String {
    format!("{drivers}-{scenario}")
}

/// Adds a section to a text.
pub fn section<'a>(text: &mut String, name: &str, lines: impl IntoIterator<Item = &'a str>) {
    // Writing to a string does not fail.
    let _ = writeln!(text, "{MARK}{name}");
    for line in lines {
        let _ = writeln!(text, "{}", line.trim_end());
    }
}

/// A difference: whether ours has the line, and the line.
type Difference = (bool, String);

/// Compares what both sets have written in `output` for a scenario.
pub fn texts(tap: &mut Tap, output: &Path, scenario: &str, kept: &[Kept]) {
    let mut used = vec![0; kept.len()];
    match differences(output, scenario) {
        Ok(texts) => {
            for (name, sections) in texts {
                let mut why = String::new();
                for (section, lines) in sections {
                    let place = format!("{name}/{section}");
                    let mut heading = true;
                    for (ours, line) in lines {
                        if let Some(at) = kept.iter().position(|kept| kept.has(&place, ours, &line))
                        {
                            used[at] += 1;
                            continue;
                        }
                        if std::mem::take(&mut heading) {
                            let _ = writeln!(why, "{place}");
                        }
                        let _ = writeln!(why, "  {} {line}", if ours { "ours " } else { "stock" });
                    }
                }
                tap.check(
                    &format!("{scenario}: {name} is the same with both driver sets"),
                    if why.is_empty() { Ok(()) } else { Err(why) },
                );
            }
            for (kept, lines) in kept.iter().zip(used) {
                tap.note(&format!(
                    "{scenario}: kept difference in {} ({lines} lines): {}",
                    kept.place, kept.why
                ));
                if lines == 0 {
                    tap.check(
                        &format!("{scenario}: the kept difference in {} exists", kept.place),
                        Err(format!("take it out of the list: {}", kept.why)),
                    );
                }
            }
        }
        Err(error) => {
            tap.check(
                &format!("{scenario}: there is something to compare"),
                Err(error.to_string()),
            );
        }
    }
}

impl Kept {
    fn has(&self, place: &str, ours: bool, line: &str) -> bool {
        let whole = |pattern: &str, text: &str| {
            // One that is no pattern matches nothing, and is then found to be unused.
            Regex::new(&format!("^(?:{pattern})$")).is_ok_and(|regex| regex.is_match(text))
        };
        let lines = if ours { self.ours } else { self.stock };
        whole(self.place, place) && lines.iter().any(|pattern| whole(pattern, line))
    }
}

type Sections = Vec<(String, Vec<String>)>;

/// Sections with their differences.
type DifferentSections = Vec<(String, Vec<Difference>)>;

/// The differences by text and section.
fn differences(output: &Path, scenario: &str) -> Result<BTreeMap<String, DifferentSections>> {
    let stock = read(&output.join(folder(Drivers::C, scenario)))?;
    let mut ours = read(&output.join(folder(Drivers::Rust, scenario)))?;
    let mut result = BTreeMap::new();
    for (name, sections) in stock {
        let other = ours.remove(&name).unwrap_or_default();
        result.insert(name, by_section(&sections, &other));
    }
    for (name, sections) in ours {
        result.insert(name, by_section(&Vec::new(), &sections));
    }
    Ok(result)
}

fn by_section(stock: &Sections, ours: &Sections) -> Vec<(String, Vec<Difference>)> {
    let find = |sections: &Sections, name: &str| {
        let found = sections.iter().find(|(section, _)| section == name);
        found.map(|(_, lines)| lines.clone())
    };
    let missing = || vec!["(no such section)".to_owned()];
    let mut result = Vec::new();
    for (name, lines) in stock {
        let other = find(ours, name).unwrap_or_else(missing);
        result.push((name.clone(), line_by_line(lines, &other)));
    }
    for (name, lines) in ours {
        if find(stock, name).is_none() {
            result.push((name.clone(), line_by_line(&missing(), lines)));
        }
    }
    result
}

/// All texts of a folder, in sections.
fn read(folder: &Path) -> Result<BTreeMap<String, Sections>> {
    let mut texts = BTreeMap::new();
    let entries = fs::read_dir(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    for entry in entries {
        let entry = entry?;
        let mut sections = Sections::new();
        for line in fs::read_to_string(entry.path())?.lines() {
            match (line.strip_prefix(MARK), sections.last_mut()) {
                (Some(name), _) => sections.push((name.to_owned(), Vec::new())),
                (None, Some((_, lines))) => lines.push(line.to_owned()),
                (None, None) => return Err(format!("{:?}: no section", entry.path()).into()),
            }
        }
        let name = entry.file_name().to_string_lossy().into_owned();
        texts.insert(name, sections);
    }
    if texts.is_empty() {
        return Err(format!("{} is empty", folder.display()).into());
    }
    Ok(texts)
}

/// The lines that are not in the longest common subsequence, in order.
fn line_by_line(stock: &[String], ours: &[String]) -> Vec<Difference> {
    // Length of that of the rests from i and j on.
    let mut common = vec![vec![0u32; ours.len() + 1]; stock.len() + 1];
    for i in (0..stock.len()).rev() {
        for j in (0..ours.len()).rev() {
            common[i][j] = if stock[i] == ours[j] {
                common[i + 1][j + 1] + 1
            } else {
                common[i + 1][j].max(common[i][j + 1])
            };
        }
    }
    let (mut i, mut j) = (0, 0);
    let mut result = Vec::new();
    while i < stock.len() || j < ours.len() {
        if i < stock.len() && j < ours.len() && stock[i] == ours[j] {
            (i, j) = (i + 1, j + 1);
        } else if j == ours.len() || i < stock.len() && common[i + 1][j] >= common[i][j + 1] {
            result.push((false, stock[i].clone()));
            i += 1;
        } else {
            result.push((true, ours[j].clone()));
            j += 1;
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn lines_that_differ_are_found() {
        assert!(line_by_line(&lines("a b c"), &lines("a b c")).is_empty());
        let found = line_by_line(&lines("a b c d"), &lines("a x c e d"));
        let found: Vec<_> = found.iter().map(|(o, line)| (*o, line.as_str())).collect();
        assert_eq!(found, [(false, "b"), (true, "x"), (true, "e")]);
        assert_eq!(line_by_line(&lines("a a"), &lines("a")).len(), 1);
        assert_eq!(line_by_line(&[], &lines("a")), [(true, "a".to_owned())]);
    }

    #[test]
    fn sections_are_matched_by_name() {
        let sections = |names: &[&str]| -> Sections {
            names
                .iter()
                .map(|name| (name.to_string(), lines("x")))
                .collect()
        };
        let result = by_section(&sections(&["a", "b"]), &sections(&["b", "c"]));
        let found: Vec<_> = result
            .iter()
            .map(|(name, lines)| (name.as_str(), lines.len()))
            .collect();
        assert_eq!(found, [("a", 2), ("b", 0), ("c", 2)]);
    }

    #[test]
    fn kept_differences_match_whole_lines() {
        let kept = Kept {
            place: "t/.*",
            stock: &["a.c"],
            ours: &[],
            why: "",
        };
        assert!(kept.has("t/s", false, "abc"));
        assert!(!kept.has("t/s", true, "abc"));
        assert!(!kept.has("t/s", false, "abcd"));
        assert!(!kept.has("u/s", false, "abc"));
    }
}
