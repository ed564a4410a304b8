//! Tables, quantiles, and what the machine was busy with.

use std::time::Duration;

/// What ran where, and how busy it is.
pub(crate) fn machine() {
    let kernel =
        nix::sys::utsname::uname().map(|name| name.release().to_string_lossy().into_owned()).unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    println!("{cores} cores, kernel {kernel}, load {}", load());
}

/// Load averages over 1, 5 and 15 minutes.
pub(crate) fn load() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').take(3).collect::<Vec<_>>().join(" ")
}

/// Prints the heading of a table.
pub(crate) fn heading(title: &str) {
    println!("\n## {title} (load {})\n", load());
}

/// Prints one line: what, and its figures.
pub(crate) fn line(what: &str, figures: &[(&str, String)]) {
    let figures: Vec<_> = figures.iter().map(|(name, value)| format!("{name} {value}")).collect();
    println!("{what:<58} {}", figures.join("   "));
}

/// The value that `share` of the samples do not exceed.
pub(crate) fn quantile<T: PartialOrd + Copy>(samples: &[T], share: f64) -> T {
    let mut sorted = samples.to_vec();
    sorted.sort_by(|a, b| a.partial_cmp(b).expect("no sample is NaN"));
    let rank = (sorted.len() as f64 * share).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1]
}

/// The median.
pub(crate) fn median<T: PartialOrd + Copy>(samples: &[T]) -> T {
    quantile(samples, 0.5)
}

pub(crate) fn ms(time: Duration) -> String {
    format!("{:.2} ms", time.as_secs_f64() * 1e3)
}

pub(crate) fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// Median, and the smallest and largest.
pub(crate) fn spread(samples: &[Duration]) -> String {
    format!("{} ({} to {})", ms(median(samples)), ms(quantile(samples, 0.0)), ms(quantile(samples, 1.0)))
}
