// SPDX-License-Identifier: GPL-2.0
//! What becomes of the figures: a table, JSON, a plot.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use plotters::prelude::*;
use serde::{Deserialize, Serialize};

use super::super::{Drivers, Result};

/// Which of two values is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    /// The smaller one.
    Less,
    /// The larger one.
    More,
}

/// One value of a figure.
#[derive(Debug, Clone)]
pub struct Value {
    /// The figure.
    pub name: String,
    /// What the number counts.
    pub unit: String,
    /// Which is better.
    pub better: Better,
    /// The number.
    pub value: f64,
}

/// All figures of a run.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Results {
    figures: Vec<Figure>,
}

/// A figure, with one value for each round of a driver set.
#[derive(Debug, Serialize, Deserialize)]
struct Figure {
    name: String,
    unit: String,
    better: Better,
    c: Vec<f64>,
    rust: Vec<f64>,
}

impl Results {
    /// Takes a value.
    pub fn add(&mut self, drivers: Drivers, value: Value) {
        let index = self
            .figures
            .iter()
            .position(|figure| figure.name == value.name)
            .unwrap_or_else(|| {
                self.figures.push(Figure {
                    name: value.name,
                    unit: value.unit,
                    better: value.better,
                    c: Vec::new(),
                    rust: Vec::new(),
                });
                self.figures.len() - 1
            });
        let figure = &mut self.figures[index];
        match drivers {
            Drivers::C => figure.c.push(value.value),
            Drivers::Rust => figure.rust.push(value.value),
        }
    }
}

/// What is left of a figure's values for one driver set.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct Summary {
    median: f64,
    least: f64,
    most: f64,
}

impl Summary {
    fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let len = sorted.len();
        let median = |index: usize| sorted.get(index).copied();
        Some(Self {
            median: (median(len.checked_sub(1)? / 2)? + median(len / 2)?) / 2.0,
            least: *sorted.first()?,
            most: *sorted.last()?,
        })
    }
}

/// What a figure says.
#[derive(Debug, Serialize)]
struct Line<'a> {
    name: &'a str,
    unit: &'a str,
    better: Better,
    c: Option<Summary>,
    rust: Option<Summary>,
    /// Median of Rust by median of C.
    ratio: Option<f64>,
    /// "better", "worse", or "same" where the spreads of the two overlap.
    verdict: Option<&'static str>,
    rounds_c: &'a [f64],
    rounds_rust: &'a [f64],
}

impl<'a> Line<'a> {
    fn of(figure: &'a Figure) -> Self {
        let (c, rust) = (Summary::of(&figure.c), Summary::of(&figure.rust));
        let both = c.zip(rust);
        // Of a difference, or of nothing, no ratio can be had.
        let ratio = both
            .filter(|(c, rust)| c.median > 0.0 && rust.median >= 0.0)
            .map(|(c, rust)| rust.median / c.median);
        let verdict = both.map(|(c, rust)| {
            let less = if rust.most < c.least {
                true
            } else if rust.least > c.most {
                false
            } else {
                return "same";
            };
            if less == (figure.better == Better::Less) {
                "better"
            } else {
                "worse"
            }
        });
        Self {
            name: &figure.name,
            unit: &figure.unit,
            better: figure.better,
            c,
            rust,
            ratio,
            verdict,
            rounds_c: &figure.c,
            rounds_rust: &figure.rust,
        }
    }
}

/// A number with as many digits as are of use.
fn digits(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        large if large >= 1000.0 => format!("{value:.0}"),
        middle if middle >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.3}"),
    }
}

fn table(lines: &[Line<'_>]) -> String {
    let mut text = String::new();
    let cell = |summary: &Option<Summary>| {
        summary.map_or("-".to_owned(), |summary| {
            let [median, least, most] = [summary.median, summary.least, summary.most].map(digits);
            format!("{median} ({least}..{most})")
        })
    };
    // Writing to a string cannot fail.
    let _ = writeln!(
        text,
        "{:28} {:12} {:>26} {:>26} {:>7}",
        "median (spread)", "unit", "C", "Rust", "Rust/C"
    );
    for line in lines {
        let ratio = line
            .ratio
            .map_or("-".to_owned(), |ratio| format!("{ratio:.3}"));
        let _ = writeln!(
            text,
            "{:28} {:12} {:>26} {:>26} {ratio:>7} {}",
            line.name,
            line.unit,
            cell(&line.c),
            cell(&line.rust),
            line.verdict.unwrap_or_default()
        );
    }
    text
}

/// How a ratio is shown: beyond this it is cut off.
const WIDEST: f64 = 2.0;

/// One bar for each ratio, with the spread of Rust's values.
fn plot(lines: &[Line<'_>], path: &Path) -> Result<()> {
    const ROW: i32 = 22;
    const LEFT: i32 = 230;
    const TOP: i32 = 50;
    const UNIT: f64 = 300.0;
    let shown: Vec<_> = lines
        .iter()
        .filter_map(|line| Some((line, line.c?, line.rust?, line.ratio?)))
        .collect();
    let size = (
        (LEFT + (UNIT * WIDEST) as i32 + 80) as u32,
        (TOP + ROW * shown.len() as i32 + 20) as u32,
    );
    let area = SVGBackend::new(path, size).into_drawing_area();
    let error = |error: DrawingAreaErrorKind<std::io::Error>| error.to_string();
    area.fill(&WHITE).map_err(error)?;
    let font = |size: i32| ("sans-serif", size).into_font().color(&BLACK);
    let title = "Rust by C: bars are medians, lines Rust's least and largest";
    area.draw_text(title, &font(16), (10, 12)).map_err(error)?;
    let at = |ratio: f64| LEFT + (ratio.clamp(0.0, WIDEST) * UNIT) as i32;
    let bottom = TOP + ROW * shown.len() as i32;
    for tick in 0..=4 {
        let ratio = f64::from(tick) / 2.0;
        let style = if tick == 2 {
            BLACK.mix(0.8)
        } else {
            BLACK.mix(0.2)
        };
        area.draw(&PathElement::new(
            [(at(ratio), TOP - 4), (at(ratio), bottom)],
            style,
        ))
        .map_err(error)?;
        area.draw_text(&format!("{ratio:.1}"), &font(12), (at(ratio) - 8, TOP - 18))
            .map_err(error)?;
    }
    for (index, (line, c, rust, ratio)) in shown.iter().enumerate() {
        let y = TOP + ROW * index as i32 + 4;
        let color = match line.verdict {
            Some("better") => RGBColor(60, 150, 80),
            Some("worse") => RGBColor(200, 80, 60),
            _ => RGBColor(140, 140, 140),
        };
        area.draw_text(line.name, &font(13), (10, y + 1))
            .map_err(error)?;
        area.draw(&Rectangle::new(
            [(at(0.0), y), (at(*ratio), y + ROW - 8)],
            color.mix(0.7).filled(),
        ))
        .map_err(error)?;
        let middle = y + (ROW - 8) / 2;
        let [least, most] = [rust.least, rust.most].map(|value| at(value / c.median));
        area.draw(&PathElement::new([(least, middle), (most, middle)], BLACK))
            .map_err(error)?;
        let right = at(*ratio).max(most) + 6;
        area.draw_text(&format!("{ratio:.3}"), &font(12), (right, y + 1))
            .map_err(error)?;
    }
    area.present().map_err(error)?;
    Ok(())
}

/// Prints the table, and writes everything into the output folder.
pub fn finish(results: &Results, output: &Path) -> Result<()> {
    let lines: Vec<_> = results.figures.iter().map(Line::of).collect();
    let text = table(&lines);
    print!("\n{text}");
    fs::write(output.join("report.txt"), text)?;
    fs::write(
        output.join("results.json"),
        serde_json::to_vec_pretty(&lines)?,
    )?;
    plot(&lines, &output.join("plot.svg"))?;
    println!(
        "\nreport.txt, results.json and plot.svg are in {}",
        output.display()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(better: Better, c: &[f64], rust: &[f64]) -> Figure {
        Figure {
            name: "figure".to_owned(),
            unit: "unit".to_owned(),
            better,
            c: c.to_vec(),
            rust: rust.to_vec(),
        }
    }

    #[test]
    fn medians_and_spreads() {
        let summary = Summary::of(&[5.0, 1.0, 3.0, 4.0]);
        let expected = Summary {
            median: 3.5,
            least: 1.0,
            most: 5.0,
        };
        assert_eq!(summary, Some(expected));
        assert_eq!(Summary::of(&[7.0]).map(|one| one.median), Some(7.0));
        assert_eq!(Summary::of(&[]), None);
    }

    #[test]
    fn spreads_decide() {
        let verdict = |better, c: &[f64], rust: &[f64]| Line::of(&figure(better, c, rust)).verdict;
        assert_eq!(
            verdict(Better::Less, &[10.0, 12.0], &[8.0, 9.0]),
            Some("better")
        );
        assert_eq!(
            verdict(Better::More, &[10.0, 12.0], &[8.0, 9.0]),
            Some("worse")
        );
        assert_eq!(
            verdict(Better::Less, &[10.0, 12.0], &[11.0, 19.0]),
            Some("same")
        );
        assert_eq!(verdict(Better::Less, &[10.0], &[]), None);
        let line = figure(Better::Less, &[10.0, 12.0], &[8.0, 9.0]);
        assert_eq!(Line::of(&line).ratio, Some(8.5 / 11.0));
        assert_eq!(Line::of(&figure(Better::Less, &[0.0], &[2.0])).ratio, None);
    }

    #[test]
    fn everything_is_written() {
        let folder = std::env::temp_dir().join(format!("hvlab-report-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a temporary folder");
        let results = Results {
            figures: vec![
                figure(Better::Less, &[10.0, 12.0], &[8.0, 9.0]),
                figure(Better::More, &[0.0], &[]),
            ],
        };
        finish(&results, &folder).expect("a report");
        let read = |name: &str| fs::read_to_string(folder.join(name)).expect("a file");
        let (text, json, plot) = (read("report.txt"), read("results.json"), read("plot.svg"));
        fs::remove_dir_all(&folder).expect("its removal");
        assert!(text.contains("0.773 better"), "{text}");
        assert!(json.contains("\"ratio\": 0.77"), "{json}");
        assert!(
            plot.contains("0.773") && plot.trim_end().ends_with("</svg>"),
            "{plot}"
        );
    }
}
