//! The store in memory, and batches on real maps (which need root). Everything that needs programs or namespaces is in
//! `tests/datapath.rs`, with the proof that memory and kernel answer alike.

use std::collections::BTreeMap;
use std::os::fd::AsFd;

use aya::maps::MapData;
use aya_obj::generated::bpf_map_type::{self, BPF_MAP_TYPE_ARRAY, BPF_MAP_TYPE_HASH};
use kinesin_abi::{
    Addr, Be16, DeviceValue, FLOW_REPLY, FlowKey, FlowValue, FrontendKey, L2Key, Settings, TCP_SEEN_ACK,
    TCP_SEEN_REPLY, TCP_SEEN_RST, Timeouts, proto,
};
use kinesin_core::plan::Op;

use super::batch::Table;
use super::*;

/// A map of `u32` to `u64`.
fn table(kind: bpf_map_type, entries: u32) -> Table {
    let shape = aya_obj::Map::new_from_params(kind as u32, 4, 8, entries, 0);
    let map = MapData::create(shape, "test", None).expect("root may create maps");
    let fd = map.fd().as_fd().try_clone_to_owned().expect("a file descriptor");
    Table::new(fd, 1).expect("it is a map")
}

fn hash_table(entries: u32) -> Table {
    table(BPF_MAP_TYPE_HASH, entries)
}

fn elements(range: std::ops::Range<u32>) -> (Vec<u8>, Vec<u8>) {
    let keys = range.clone().flat_map(u32::to_ne_bytes).collect();
    let values = range.flat_map(|n| (u64::from(n) * 3).to_ne_bytes()).collect();
    (keys, values)
}

fn collect(scan: impl FnOnce(&mut dyn FnMut(&[u8], &[u8])) -> io::Result<()>) -> BTreeMap<u32, u64> {
    let mut all = BTreeMap::new();
    let mut seen = 0;
    scan(&mut |key, value| {
        seen += 1;
        all.extend(from_bytes::<u32>(key).zip(from_bytes::<u64>(value)));
    })
    .expect("readable");
    assert_eq!(seen, all.len(), "nothing is seen twice");
    all
}

#[test]
fn batches_read_what_batches_wrote_and_so_do_single_steps() {
    let table = hash_table(20_000);
    let (keys, values) = elements(0..10_000);
    table.put_all(&keys, &values).expect("they fit");
    let batched = collect(|each| table.scan(each));
    assert_eq!(batched, (0..10_000).map(|n| (n, u64::from(n) * 3)).collect());
    assert_eq!(batched, collect(|each| table.scan_slowly(each)));
    assert_eq!(table.get(&7u32.to_ne_bytes()).expect("readable"), Some(21u64.to_ne_bytes().to_vec()));
    assert_eq!(table.get(&70_000u32.to_ne_bytes()).expect("readable"), None);
}

#[test]
fn deleting_what_is_not_there_is_no_error_wherever_it_stands_in_the_batch() {
    // R03: the responder map lost entries, and the reconciler looped on deleting them.
    let table = hash_table(20_000);
    let (keys, values) = elements(0..10_000);
    table.put_all(&keys, &values).expect("they fit");
    let odd: Vec<u8> = (0..5_000u32).flat_map(|n| (n * 2 + 1).to_ne_bytes()).collect();
    assert_eq!(table.remove_all(&odd).expect("deleted"), 5_000);
    // Now every second one is missing, and the last thousand as well.
    assert_eq!(table.remove_all(&elements(0..11_000).0).expect("deleted"), 5_000);
    assert_eq!(table.remove_all(&elements(0..11_000).0).expect("deleted"), 0);
    assert_eq!(table.remove_all(&[]).expect("nothing to do"), 0);
    assert!(collect(|each| table.scan(each)).is_empty());
}

#[test]
fn a_batch_that_stops_says_how_far_it_came() {
    let table = table(BPF_MAP_TYPE_ARRAY, 6_000);
    let (keys, values) = elements(0..10_000);
    let stopped = table.put_all(&keys, &values).expect_err("the array is shorter");
    assert_eq!((stopped.done, stopped.error.raw_os_error()), (6_000, Some(libc::E2BIG)));
    assert_eq!(collect(|each| table.scan(each)).len(), 6_000);
}

#[test]
fn elements_of_another_size_are_refused_before_the_kernel_copies_them() {
    let table = hash_table(16);
    for (key, value) in [(&[0; 3][..], &[0; 8][..]), (&[0; 4], &[0; 7]), (&[0; 5], &[0; 8])] {
        assert_eq!(table.put(key, value).expect_err("refused").raw_os_error(), Some(libc::EINVAL));
    }
    assert_eq!(table.get(&[0; 8]).expect_err("refused").raw_os_error(), Some(libc::EINVAL));
}

#[test]
fn what_is_no_map_is_not_read_as_one() {
    let file = std::fs::File::open("/proc/self/status").expect("there is a /proc");
    assert!(Table::new(file.into(), 1).is_err());
}

#[test]
fn the_store_in_memory_keeps_settings_devices_and_addresses() {
    let maps = MemoryMaps::default();
    assert_eq!(maps.settings().expect("settings"), Settings::default());
    let settings = Settings { alive_at: 1, snat_min: 2, ..Settings::default() };
    maps.write_settings(&settings).expect("written");
    assert_eq!(maps.settings().expect("settings"), settings);
    let device = DeviceValue { mac: [1, 2, 3, 4, 5, 6], ..DeviceValue::default() };
    maps.put_device(7, &device).expect("written");
    assert_eq!(maps.read_devices().expect("devices"), [(7, device)]);
    maps.delete_device(7).expect("deleted");
    maps.delete_device(7).expect("missing is no error");
    assert_eq!(maps.read_devices().expect("devices"), []);
    let key = L2Key { addr: std::net::Ipv4Addr::new(10, 0, 0, 1).into(), ifindex: 2 };
    maps.put_l2(key).expect("written");
    maps.raw_put("l2", bytes_of(&key), &5u64.to_ne_bytes()).expect("written");
    maps.put_l2(key).expect("kept");
    assert_eq!(maps.read_l2().expect("addresses")[0].1.responses_sent, 5);
    assert!(maps.drops().expect("counters").is_empty());
    assert_eq!(maps.usage().len(), TABLES.len());
}

#[test]
fn the_store_in_memory_is_full_where_the_kernel_would_be() {
    let sizes = MapSizes { frontends: 2, backends: 3, ..MapSizes::default() };
    let maps = MemoryMaps::new(sizes);
    let put = |port| {
        let key = FrontendKey { port: Be16::new(port), ..FrontendKey::default() };
        Op::PutFrontend(key, kinesin_abi::FrontendValue::default())
    };
    let error = maps.apply(&[put(1), put(2), put(1), put(3)]).expect_err("two fit");
    assert_eq!(error.index, 3);
    assert!(error.to_string().contains("raise bpf-lb-map-max"), "{error}");
    let backend = kinesin_abi::Backend { state: 1, ..Default::default() };
    assert_eq!(maps.apply(&[Op::Backend(2, backend), Op::Backend(3, backend)]).expect_err("ids 0 to 2").index, 1);
    assert_eq!(maps.read().expect("actual").backends, [(2, backend)]);
}

const SECOND: u64 = 1_000_000_000;
const NOW: u64 = 100_000 * SECOND;

/// Both entries of a connection: from a client to a service, from its backend back, each silent for so many seconds.
fn connect(maps: &MemoryMaps, table: &str, client: u8, tcp: Option<u8>, silent: (u64, u64)) {
    let end = |last: u8, port| (Addr::from(std::net::Ipv4Addr::new(10, 0, 0, last)), Be16::new(port));
    let (client, service, pod) = (end(client, 1000), end(2, 80), end(3, 8080));
    let protocol = if tcp.is_some() { proto::TCP } else { proto::UDP };
    let key = |from: (Addr, Be16), to: (Addr, Be16)| FlowKey {
        src: from.0,
        dst: to.0,
        sport: from.1,
        dport: to.1,
        proto: protocol,
        pad: [0; 3],
    };
    let value = |from: (Addr, Be16), to: (Addr, Be16), flags, silent| FlowValue {
        src: from.0,
        dst: to.0,
        sport: from.1,
        dport: to.1,
        flags,
        tcp: tcp.unwrap_or_default(),
        backend: 1,
        last_seen: NOW - silent * SECOND,
        ..FlowValue::default()
    };
    let forward = (key(client, service), value(client, pod, 0, silent.0));
    let reply = (key(pod, client), value(service, client, FLOW_REPLY, silent.1));
    for (key, value) in [forward, reply] {
        maps.raw_put(table, bytes_of(&key), bytes_of(&value)).expect("written");
    }
}

#[test]
fn connections_are_collected_when_both_directions_are_silent() {
    const ESTABLISHED: Option<u8> = Some(TCP_SEEN_REPLY | TCP_SEEN_ACK);
    let maps = MemoryMaps::default();
    let pod = kinesin_abi::Backend {
        addr: std::net::Ipv4Addr::new(10, 0, 0, 3).into(),
        port: Be16::new(8080),
        proto: proto::TCP,
        state: 1,
        flags: 0,
    };
    maps.apply(&[Op::Backend(1, pod)]).expect("written");
    connect(&maps, "flows", 10, ESTABLISHED, (8001, 7000));
    connect(&maps, "flows", 11, ESTABLISHED, (9000, 8001));
    connect(&maps, "flows", 12, ESTABLISHED, (61, 61));
    connect(&maps, "transient", 13, None, (0, 3600));
    connect(&maps, "transient", 14, None, (61, 61));
    connect(&maps, "transient", 15, Some(0), (59, 59));
    connect(&maps, "transient", 16, Some(TCP_SEEN_RST), (11, 11));
    // What the last of the first table left behind when it moved, and one that is gone from there.
    connect(&maps, "transient", 12, Some(TCP_SEEN_REPLY), (100, 100));
    connect(&maps, "transient", 11, Some(TCP_SEEN_REPLY), (10, 10));
    let collect = || maps.collect_flows(&Timeouts::DEFAULT, NOW).expect("collected");
    let found = collect();
    assert_eq!((found.settled.alive, found.settled.expired, found.copies), ([4, 0], [2, 0], 2));
    assert_eq!((found.transient.alive, found.transient.expired), ([2, 2], [4, 2]));
    assert_eq!(collect().settled.removed() + collect().transient.removed(), 0, "nothing twice");
    // The backend leaves: what has been silent for longer than the grace period goes.
    maps.apply(&[Op::Backend(1, kinesin_abi::Backend { state: 2, ..pod })]).expect("written");
    assert_eq!(collect().settled.expired, [4, 0]);
}

#[test]
fn unknown_tables_are_named_with_those_that_exist() {
    let error = MemoryMaps::default().dump_raw("flow").expect_err("there is none").to_string();
    assert!(error.contains("\"flow\"") && error.contains("flows, transient, "), "{error}");
}

#[test]
fn the_loaded_programs_may_move_between_threads() {
    fn assert_send<T: Send + 'static>() {}
    assert_send::<Datapath>();
    assert_send::<std::sync::Arc<dyn MapStore>>();
}
