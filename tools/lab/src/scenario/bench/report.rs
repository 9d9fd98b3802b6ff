// SPDX-License-Identifier: GPL-2.0
//! What becomes of the figures.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::super::{Drivers, Result};

/// All figures of a run.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Results {
    figures: Vec<Figure>,
}

/// A figure, once for each round and driver set.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Figure {
    name: String,
    c: Vec<f64>,
    rust: Vec<f64>,
}

impl Results {
    /// Takes a value.
    pub fn add(&mut self, drivers: Drivers, name: String, value: f64) {
        let index = self
            .figures
            .iter()
            .position(|figure| figure.name == name)
            .unwrap_or_else(|| {
                self.figures.push(Figure {
                    name,
                    ..Figure::default()
                });
                self.figures.len() - 1
            });
        let figure = &mut self.figures[index];
        match drivers {
            Drivers::C => figure.c.push(value),
            Drivers::Rust => figure.rust.push(value),
        }
    }
}

/// Median, least and largest.
fn summary(values: &[f64]) -> (f64, f64, f64) {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => (f64::NAN, f64::NAN, f64::NAN),
        len => (
            (sorted[(len - 1) / 2] + sorted[len / 2]) / 2.0,
            sorted[0],
            sorted[len - 1],
        ),
    }
}

/// Prints the table, and writes everything into the output folder.
pub fn finish(results: &Results, output: &Path) -> Result<()> {
    println!(
        "{:32} {:>30} {:>30} {:>7}",
        "measure", "C: median (least-largest)", "Rust: median (least-largest)", "ratio"
    );
    for figure in &results.figures {
        let (c, c_least, c_most) = summary(&figure.c);
        let (rust, rust_least, rust_most) = summary(&figure.rust);
        let cell = |median, least, most| format!("{median:.1} ({least:.1}-{most:.1})");
        println!(
            "{:32} {:>30} {:>30} {:7.3}",
            figure.name,
            cell(c, c_least, c_most),
            cell(rust, rust_least, rust_most),
            rust / c
        );
    }
    let path = output.join("results.json");
    fs::write(&path, serde_json::to_vec_pretty(results)?)?;
    println!("results are in {}", path.display());
    Ok(())
}
