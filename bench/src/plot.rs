//! The ratios as bars, on a scale where twice as good and half as good are equally far from even.

use std::fmt::Write;

use crate::report::{Figure, Report};

const ROW: usize = 22;
const LEFT: f64 = 430.0;
const WIDTH: f64 = 460.0;
/// The scale goes from a thirty-second to as many times.
const OCTAVES: f64 = 5.0;

/// An SVG document.
pub fn svg(report: &Report) -> String {
    let height = ROW * (report.figures.len() + 3);
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"1000\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"10\" y=\"{ROW}\" font-size=\"14\">How many times better Terrace is</text>\n"
    );
    let bottom = height - ROW;
    for octave in -5..=5 {
        let x = place(2f64.powi(octave));
        let label = if octave < 0 {
            format!("1/{}", 1 << -octave)
        } else {
            format!("{}", 1 << octave)
        };
        let colour = if octave == 0 { "black" } else { "#ddd" };
        let _ = writeln!(
            text,
            "<line x1=\"{x:.0}\" x2=\"{x:.0}\" y1=\"{}\" y2=\"{bottom}\" stroke=\"{colour}\"/>\
             <text x=\"{x:.0}\" y=\"{}\" text-anchor=\"middle\">{label}</text>",
            ROW + 8,
            bottom + 15
        );
    }
    for (i, figure) in report.figures.iter().enumerate() {
        bar(&mut text, figure, ROW * (i + 2));
    }
    text + "</svg>\n"
}

fn bar(text: &mut String, figure: &Figure, y: usize) {
    let ratio = figure.ratio();
    let even = place(1.0);
    let end = if ratio.is_finite() {
        place(ratio)
    } else {
        even
    };
    let colour = if ratio < 1.0 { "#c33" } else { "#38a" };
    let label = format!(
        "{}, {}, against {}",
        figure.workload, figure.what, figure.against
    );
    let _ = writeln!(
        text,
        "<text x=\"{:.0}\" y=\"{}\" text-anchor=\"end\">{}</text>\
         <rect x=\"{:.1}\" y=\"{}\" width=\"{:.1}\" height=\"{}\" fill=\"{colour}\"/>\
         <text x=\"{:.0}\" y=\"{}\">{ratio:.2}</text>",
        LEFT - 12.0,
        y + 12,
        escape(&label),
        even.min(end),
        y,
        (end - even).abs(),
        ROW - 6,
        LEFT + WIDTH + 30.0,
        y + 12
    );
}

/// Where a ratio is on the scale.
fn place(ratio: f64) -> f64 {
    let octaves = ratio.log2().clamp(-OCTAVES, OCTAVES);
    LEFT + WIDTH / 2.0 + octaves / OCTAVES * WIDTH / 2.0
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}
