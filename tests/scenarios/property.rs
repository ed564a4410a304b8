//! Properties outside of libtest: how many cases, from which seed, and how to repeat a failure.

use std::fmt::Debug;

use anyhow::{Context, Result, anyhow};
use proptest::strategy::Strategy;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};

/// Checks `holds` for values of `strategy`: `cases` of them unless `<name>_CASES` says how many, from a new seed unless
/// `<name>_SEED` gives one. An error has the least value found that fails, and the seed.
pub fn check<S>(
    name: &str,
    cases: u32,
    strategy: &S,
    holds: impl Fn(S::Value) -> Result<(), TestCaseError>,
) -> Result<()>
where
    S: Strategy,
    S::Value: Debug,
{
    let number = |what: &str| -> Result<Option<u64>> {
        let variable = format!("{name}_{what}");
        let text = std::env::var(&variable).ok();
        text.map(|text| text.parse().with_context(|| format!("{variable}={text}"))).transpose()
    };
    let cases = number("CASES")?.map_or(cases, |cases| cases as u32);
    let seed = number("SEED")?.unwrap_or_else(rand::random);
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 2_000, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    runner
        .run(strategy, holds)
        .map_err(|error| anyhow!("{name}_SEED={seed} {name}_CASES={cases} repeats this: {error}"))
}
