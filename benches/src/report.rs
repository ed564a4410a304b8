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

/// Between which samples the median of all that could have been taken is, with a certainty of 95 % at least: those of the
/// ranks below and above which a fair coin falls as seldom. No distribution is assumed.
pub(crate) fn interval<T: PartialOrd + Copy>(samples: &[T]) -> (T, T) {
    let len = samples.len();
    // Of so many throws, the chance of exactly `heads`, and of fewer than the next.
    let (mut chance, mut fewer, mut heads) = (0.5_f64.powi(len as i32), 0.0, 0);
    while fewer + chance <= 0.025 {
        fewer += chance;
        chance *= (len - heads) as f64 / (heads + 1) as f64;
        heads += 1;
    }
    // Half a rank less, so that rounding makes no other rank of it.
    let share = (heads.max(1) as f64 - 0.5) / len as f64;
    (quantile(samples, share), quantile(samples, 1.0 - share))
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Against tables of the sign test.
    #[test]
    fn the_interval_of_a_median_has_the_ranks_of_the_sign_test() {
        for (len, low) in [(1, 1), (5, 1), (6, 1), (9, 2), (15, 4), (31, 10), (45, 16)] {
            let samples: Vec<usize> = (1..=len).rev().collect();
            assert_eq!(interval(&samples), (low, len + 1 - low), "of {len}");
        }
    }
}
