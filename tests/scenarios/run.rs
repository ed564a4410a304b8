//! Runs one case over one source.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::agent::Agent;
use crate::case::{self, Case, REWRITE};
use crate::feed::{Feed, SourceKind};
use crate::shared::RUNTIME;

/// How long a picture may take to become the expected one: only statuses come after the fence.
const SETTLES: Duration = Duration::from_secs(20);

pub fn case(path: &Path, kind: SourceKind) -> Result<()> {
    let case = case::read(path)?;
    if case.only.as_ref().is_some_and(|only| *only != kind.to_string()) {
        return Ok(());
    }
    // From one source alone: the other one must then agree with what that has written.
    let rewrite = std::env::var_os(REWRITE).is_some() && (kind == SourceKind::Manifests || case.only.is_some());
    let seen = RUNTIME.block_on(async { tokio::spawn(steps(case, kind, rewrite)).await })??;
    if rewrite {
        let text = std::fs::read_to_string(path)?;
        let new = case::rewritten(&text, &seen);
        if new != text {
            std::fs::write(path, new)?;
        }
    }
    Ok(())
}

/// Gives what was seen after each step.
async fn steps(case: Case, kind: SourceKind, rewrite: bool) -> Result<Vec<String>> {
    let mut feed = Feed::new(kind).await?;
    let mut agent = Agent::start(feed.source.clone()).await?;
    let mut seen = Vec::new();
    let mut outcome = Ok(());
    for (number, step) in (1..).zip(&case.steps) {
        let done = async {
            if let Some(devices) = &step.devices {
                agent.set_devices(devices)?;
            }
            if let Some(config) = &step.config {
                agent.set_config(config).await?;
            }
            agent.write(&mut feed, &step.apply, &step.delete).await?;
            compare(&agent, &step.expect, rewrite).await
        };
        match done.await.with_context(|| format!("step {number}")) {
            Ok(text) => seen.push(text),
            Err(error) => {
                outcome = Err(error);
                break;
            }
        }
    }
    // Also after a failure: the objects would be in the next one's way.
    let rest = feed.objects();
    let emptied = agent.write(&mut feed, &[], &rest).await.context("deleting everything");
    if outcome.is_ok() {
        emptied?;
        let left = agent.picture()?;
        let left: Vec<&str> = left.lines().filter(|line| !line.contains("configuration: ")).collect();
        ensure!(left == ["nothing"] || left == ["problems:"], "left when all objects are gone:\n{}", left.join("\n"));
        let failures = agent.failures();
        ensure!(failures.is_empty(), "actors failed: {failures:#?}");
    }
    agent.stop().await?;
    outcome.map(|()| seen)
}

/// Waits until the agent shows what is expected; when told to rewrite, gives what it shows.
async fn compare(agent: &Agent, expected: &str, rewrite: bool) -> Result<String> {
    let deadline = tokio::time::Instant::now() + SETTLES;
    if rewrite {
        return settled(agent).await;
    }
    loop {
        let picture = agent.picture();
        match picture {
            Ok(picture) if picture == expected => return Ok(picture),
            other if tokio::time::Instant::now() >= deadline => bail!("{}", difference(expected, &other?)),
            _ => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}

/// What the agent shows once it shows the same for a while: for writing expectations, which people then read.
async fn settled(agent: &Agent) -> Result<String> {
    let (mut last, mut same) = (String::new(), 0);
    while same < 30 {
        tokio::time::sleep(Duration::from_millis(10)).await;
        // The two kinds of maps differ for the moment between two writes.
        let now = agent.picture().unwrap_or_default();
        same = if now == last { same + 1 } else { 0 };
        last = now;
    }
    ensure!(!last.is_empty(), "{:#}", agent.picture().unwrap_err());
    Ok(last)
}

/// Both texts by line, marked as diff marks them.
fn difference(expected: &str, seen: &str) -> String {
    let (old, new): (Vec<&str>, Vec<&str>) = (expected.lines().collect(), seen.lines().collect());
    let gone = old.iter().filter(|line| !new.contains(line)).map(|line| format!("- {line}\n"));
    let come = new.iter().filter(|line| !old.contains(line)).map(|line| format!("+ {line}\n"));
    let lines: String = gone.chain(come).collect();
    format!("expected (-) is not what is seen (+):\n{lines}\nseen in full:\n{seen}")
}
