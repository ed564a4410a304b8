//! Somebody else writes into the maps (R03).

use kinesin::datapath::{KernelMaps, MapStore};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use super::rig::{Lease, RATE, Rig, VERIFIED, difference, eventually_or, picture};

const ROUNDS: usize = 4;

fn bytes(rng: &mut StdRng, length: usize) -> Vec<u8> {
    (0..length).map(|_| rng.random()).collect()
}

/// Deletes, overwrites and adds entries of one table at random.
fn tamper(maps: &KernelMaps, table: &'static str, rng: &mut StdRng) {
    let entries = maps.raw_entries(table).unwrap();
    let entries: Vec<_> =
        entries.into_iter().filter(|(_, value)| value.iter().any(|byte| *byte != 0) || table == "l2").collect();
    let size = maps.usage().into_iter().find(|usage| usage.name == table).unwrap().max_entries;
    let (key_size, value_size) = match table {
        "frontends" => (20, 28),
        "slots" => (4, 4),
        "backends" => (4, 24),
        "maglev" => (4, 65_536),
        "l2" => (20, 8),
        "devices" => (4, 28),
        "settings" => (4, size_of::<kinesin_abi::Settings>()),
        other => panic!("{other} is not tampered with"),
    };
    let is_array = matches!(table, "slots" | "backends" | "settings");
    let any_key = |rng: &mut StdRng| match is_array {
        true => rng.random_range(0..size).to_ne_bytes().to_vec(),
        false => bytes(rng, key_size),
    };
    let victims = entries.choose_multiple(rng, entries.len().div_ceil(3));
    for (key, _) in victims.cloned().collect::<Vec<_>>() {
        assert!(maps.raw_delete(table, &key).unwrap(), "{table} {key:?}");
        if !is_array {
            assert!(!maps.raw_delete(table, &key).unwrap(), "a missing key is no error: {table} {key:?}");
        }
    }
    if let Some((key, _)) = entries.choose(rng) {
        maps.raw_put(table, key, &bytes(rng, value_size)).unwrap();
    }
    for _ in 0..3 {
        let (key, value) = (any_key(rng), bytes(rng, value_size));
        maps.raw_put(table, &key, &value).unwrap();
    }
}

/// Entries that nobody reads back: they must only do no harm.
fn litter(maps: &KernelMaps, table: &str, rng: &mut StdRng) {
    let sizes = maps.raw_entries(table).unwrap().first().map(|(key, value)| (key.len(), value.len()));
    let Some((key, value)) = sizes else { return };
    for _ in 0..100 {
        maps.raw_put(table, &bytes(rng, key), &bytes(rng, value)).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn maps_that_somebody_changes_at_random_come_back_to_what_they_were() {
    let rig = Rig::start("tamper", Lease::Patient, &[("bpf-lb-algorithm", "maglev")]).await;
    let owner = rig.owner(&[]).await;
    let load = rig.load().await;
    let (maps, before) = (rig.maps(owner), rig.picture(owner));
    assert!(VERIFIED.iter().all(|table| !before[table].is_empty()), "there is something in every map");
    let seed = std::env::var("KINESIN_CHAOS_SEED").ok().and_then(|text| text.parse().ok());
    let seed: u64 = seed.unwrap_or_else(|| rand::rng().random());
    eprintln!("KINESIN_CHAOS_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    for round in 1..=ROUNDS {
        let repairs = rig.metric(owner, "kinesin_map_repairs_total").await;
        for table in VERIFIED {
            tamper(&maps, table, &mut rng);
        }
        for table in ["flows", "transient", "sockets", "affinity"] {
            litter(&maps, table, &mut rng);
        }
        eventually_or(&format!("round {round}: the maps are as before"), async || {
            let changes = difference(&before, &picture(&maps));
            if changes.is_empty() { Ok(()) } else { Err(format!("{changes:#?}")) }
        })
        .await;
        let repaired = rig.metric(owner, "kinesin_map_repairs_total").await;
        assert!(repaired > repairs, "round {round}: repairs are counted: {repaired}");
    }
    // One table at a time, each in both ways: every one of them has somebody who looks after it.
    for table in VERIFIED {
        for key in before[table].keys() {
            maps.raw_delete(table, key).unwrap();
        }
        eventually_or(&format!("{table} is as before"), async || {
            let changes = difference(&before, &picture(&maps));
            if changes.is_empty() { Ok(()) } else { Err(format!("{changes:#?}")) }
        })
        .await;
    }
    // What was under way while the maps were wrong has ended after one request's time.
    load.more(2 * u64::from(RATE)).await;
    let calm = load.totals();
    load.more(2 * u64::from(RATE)).await;
    assert_eq!(load.totals().failed, calm.failed, "traffic is as before");
    let log = std::fs::read_to_string(rig.lab.node(owner).log("agent")).unwrap();
    assert!(log.contains("maps differed from the plan: repaired"), "the log says so");
    assert!(log.contains("settings or devices differed: repaired"), "the log says so");
    assert!(log.contains("l2 map differed: repaired"), "the log says so");
    let totals = load.handle.stop().await.unwrap();
    eprintln!("while maps were tampered with: {totals:?}");
    assert_eq!(totals.held.broken, 0, "established connections outlive it: {totals:?}");
}
