//! The plot: a panel of bars for each of four figures.

use std::path::Path;

use plotters::prelude::*;

use crate::{BoxError, Results, peer::PEERS};

/// A title, a scenario, and the columns of its figures that are added up.
type Panel = (&'static str, &'static str, &'static [usize]);

const PANELS: [Panel; 4] = [
    ("Refresh under load: requests that fail or wait, of 5,000", "refresh under load", &[1, 2]),
    ("Revocation: requests that fail or get the 401, of 1,000 (most of 5 runs)", "revocation", &[1, 2]),
    ("Token endpoint hangs: requests that fail or wait, of 700", "token endpoint hangs", &[0, 1]),
    ("401 indefinitely: POSTs per minute", "401 indefinitely", &[0]),
];

/// Where the first bar of a panel begins, and how far the next ones are below it.
const TOP: i32 = 42;
const ROW: i32 = 27;

const OWN: RGBColor = RGBColor(0, 114, 178);
const OTHER: RGBColor = RGBColor(170, 170, 170);

pub fn draw(path: &Path, results: &Results) -> Result<(), BoxError> {
    let height = TOP + ROW * PEERS.len() as i32 + 8;
    let root = SVGBackend::new(path, (1000, 2 * height as u32)).into_drawing_area();
    root.fill(&WHITE)?;
    for (area, (title, scenario, columns)) in root.split_evenly((2, 2)).iter().zip(PANELS) {
        area.draw(&Text::new(title, (16, 14), ("sans-serif", 16)))?;
        // The most, if there is a range. `None` for a peer without the function.
        let parse = |cell: &str| cell.rsplit(' ').next()?.parse::<u64>().ok();
        let values: Vec<Option<u64>> = PEERS
            .iter()
            .map(|info| columns.iter().map(|at| parse(&results[&(scenario, info.name)][*at])).sum())
            .collect();
        let most = values.iter().flatten().copied().max().unwrap_or(1).max(1);
        for (row, (info, value)) in (0..).zip(PEERS.iter().zip(values)) {
            let (top, left) = (TOP + row * ROW, 140);
            area.draw(&Text::new(info.name, (16, top + 3), ("sans-serif", 14)))?;
            let width = (value.unwrap_or(0) * 270 / most) as i32;
            let style = if row == 0 { OWN } else { OTHER }.filled();
            area.draw(&Rectangle::new([(left, top), (left + width.max(1), top + 18)], style))?;
            let label = value.map_or("no such function".into(), |value| value.to_string());
            area.draw(&Text::new(label, (left + width + 8, top + 3), ("sans-serif", 14)))?;
        }
    }
    root.present()?;
    Ok(())
}
