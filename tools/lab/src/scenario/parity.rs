// SPDX-License-Identifier: GPL-2.0
//! Holds the tables in Documentation/parity.rst and parity-pci.rst to the checks that there are.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use regex::Regex;

use super::SCENARIOS;

/// The tables: file, letter of the rows, and how many there are.
const TABLES: [(&str, char, usize); 2] = [("parity.rst", 'A', 47), ("parity-pci.rst", 'B', 23)];

fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The source of a scenario, which may have a folder with more of it.
fn source(scenario: &str) -> String {
    let folder = top().join(format!(
        "tools/lab/src/scenario/{}",
        scenario.replace('-', "_")
    ));
    let mut files = vec![folder.with_extension("rs")];
    if let Ok(more) = fs::read_dir(folder) {
        files.extend(more.map(|file| file.unwrap().path()));
    }
    let read = |file: &PathBuf| {
        fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
    };
    files.iter().map(read).collect()
}

/// What the string literals of a scenario match: a placeholder is anything.
fn titles(scenario: &str) -> Vec<Regex> {
    let source = source(scenario);
    let literal = Regex::new(r#""((?:[^"\\]|\\.|\\\n)*)""#).unwrap();
    let continued = Regex::new(r"\\\n[ \t]*").unwrap();
    let placeholder = Regex::new(r"\\\{[^{}]*\\\}").unwrap();
    literal
        .captures_iter(&source)
        .map(|found| {
            let text = continued.replace_all(&found[1], "");
            let pattern = regex::escape(&text.replace("\\\"", "\""));
            let pattern = placeholder.replace_all(&pattern, ".+");
            Regex::new(&format!("^{pattern}$")).unwrap()
        })
        // A literal of nothing but placeholders proves nothing.
        .filter(|title| title.as_str().replace(".+", "").len() > 8)
        .collect()
}

#[test]
fn every_check_of_the_parity_tables_exists() {
    for (file, letter, rows) in TABLES {
        every_check_exists(file, letter, rows);
    }
}

fn every_check_exists(file: &str, letter: char, count: usize) {
    let table = fs::read_to_string(top().join("Documentation").join(file)).unwrap();
    let known: BTreeSet<_> = SCENARIOS.iter().map(|scenario| scenario.name).collect();
    let check = Regex::new(r"``([a-z0-9-]+)``: \*([^*]+)\*").unwrap();
    let number = Regex::new(&format!("^{letter}[0-9]+$")).unwrap();
    let mut sources = BTreeMap::new();
    let mut rows = Vec::new();
    for row in table.split("\n   * - ").skip(1) {
        let (name, rest) = row.split_once('\n').unwrap();
        let text = rest.split_whitespace().collect::<Vec<_>>().join(" ");
        let mut checks = 0;
        for found in check.captures_iter(&text) {
            let (scenario, title) = (&found[1], &found[2]);
            assert!(known.contains(scenario), "{name}: no scenario {scenario}");
            let titles = sources
                .entry(scenario.to_owned())
                .or_insert_with(|| titles(scenario));
            assert!(
                titles.iter().any(|known| known.is_match(title)),
                "{name}: no check '{title}' in the scenario {scenario}"
            );
            checks += 1;
        }
        if number.is_match(name) {
            rows.push(name.to_owned());
            assert!(
                checks > 0 || text.contains("not shown"),
                "{name}: neither a check nor a reason why it is not shown"
            );
        }
    }
    let wanted: Vec<_> = (1..=count).map(|row| format!("{letter}{row}")).collect();
    assert_eq!(rows, wanted);
}
