// SPDX-License-Identifier: GPL-2.0
//! Holds the table in Documentation/parity.rst to the checks that there are.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use regex::Regex;

use super::SCENARIOS;

/// Rows of the table, A1 and following.
const ROWS: usize = 47;

fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// What the string literals of a scenario match: a placeholder is anything.
fn titles(scenario: &str) -> Vec<Regex> {
    let file = format!("tools/lab/src/scenario/{}.rs", scenario.replace('-', "_"));
    let source = fs::read_to_string(top().join(&file)).expect(&file);
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
fn every_check_of_the_parity_table_exists() {
    let table = fs::read_to_string(top().join("Documentation/parity.rst")).unwrap();
    let known: BTreeSet<_> = SCENARIOS.iter().map(|scenario| scenario.name).collect();
    let check = Regex::new(r"``([a-z0-9-]+)``: \*([^*]+)\*").unwrap();
    let number = Regex::new(r"^A[0-9]+$").unwrap();
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
    let wanted: Vec<_> = (1..=ROWS).map(|row| format!("A{row}")).collect();
    assert_eq!(rows, wanted);
}
