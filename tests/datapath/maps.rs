//! The maps through the store: batches, limits, pins, migration.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::Arc;

use aya::maps::{Array as AyaArray, HashMap as AyaHash, MapData};
use kinesin::datapath::{
    Datapath, LoadError, LoadOptions, MapSizes, MapStore, MemoryMaps, TABLES, detach_all, maps_dir,
};
use kinesin_abi::{Backend, FrontendKind, L2Key, MAGLEV_TABLE_SIZE, frontend_flags, proto};
use kinesin_core::plan::{Actual, Op};

use crate::rig::*;

fn loaded(root: &BpfRoot) -> Datapath {
    Datapath::load(&options(root.path())).expect("the maps are made")
}

/// In an order that does not depend on the store.
fn sorted(mut actual: Actual) -> Actual {
    actual.frontends.sort();
    actual.maglev.sort_by_key(|(base, _)| *base);
    actual
}

trait SortFrontends {
    fn sort(&mut self);
}
impl SortFrontends for Vec<(kinesin_abi::FrontendKey, kinesin_abi::FrontendValue)> {
    fn sort(&mut self) {
        self.sort_by_key(|(key, _)| *key);
    }
}

fn many(count: u32) -> Vec<Op> {
    let addr = |n: u32| Ipv4Addr::from(0x0a60_0000 + n);
    let mut ops: Vec<Op> = (1..count).map(|n| Op::Backend(n, backend(addr(n), 80, proto::TCP, false))).collect();
    ops.extend((0..count).map(|n| Op::Slot(n, n)));
    let flags = frontend_flags::ROUTABLE;
    ops.extend(
        (0..count).map(|n| {
            Op::PutFrontend(frontend(addr(n), 80, proto::TCP), value(FrontendKind::LoadBalancer, flags, n, 1))
        }),
    );
    ops
}

#[test]
fn what_is_written_is_read_back_by_kernel_and_memory_alike() {
    isolated(|| {
        let root = BpfRoot::new();
        let datapath = loaded(&root);
        let memory = MemoryMaps::new(small());
        let mut plans = vec![many(1000), services()];
        plans.push(vec![
            Op::DeleteFrontend(frontend(VIP, TO_LOCAL, proto::TCP)),
            Op::DeleteFrontend(frontend(VIP, 12_345, proto::TCP)),
            Op::DeleteFrontend(frontend(VIP, TO_REMOTE, proto::UDP)),
            Op::DeleteMaglev(LOCAL_ID),
            Op::DeleteMaglev(4711),
            Op::Backend(5, Backend::default()),
            Op::Slot(7, 0),
        ]);
        for plan in plans {
            datapath.maps().apply(&plan).unwrap();
            memory.apply(&plan).unwrap();
            let (kernel, memory) = (sorted(datapath.maps().read().unwrap()), sorted(memory.read().unwrap()));
            // Not `assert_eq`: thousands of lines help nobody.
            assert!(kernel.frontends == memory.frontends && kernel.slots == memory.slots);
            assert!(kernel.backends == memory.backends && kernel.maglev == memory.maglev);
        }
    });
}

#[test]
fn a_full_table_says_which_step_which_table_and_which_key_to_raise() {
    isolated(|| {
        let root = BpfRoot::new();
        let sizes = MapSizes { frontends: 100, backends: 100, ..small() };
        let datapath = Datapath::load(&LoadOptions { max_entries: sizes, ..options(root.path()) }).unwrap();
        let memory = MemoryMaps::new(sizes);
        let frontends: Vec<Op> = many(130).into_iter().filter(|op| matches!(op, Op::PutFrontend(..))).collect();
        let backends: Vec<Op> = many(130).into_iter().filter(|op| matches!(op, Op::Backend(..))).collect();
        for (store, exact) in [(datapath.maps(), false), (Arc::new(memory) as Arc<dyn MapStore>, true)] {
            let error = store.apply(&frontends).unwrap_err();
            // The kernel may spread a little reserve over its CPUs, so that slightly more or fewer fit.
            assert!(if exact { error.index == 100 } else { error.index.abs_diff(100) < 30 }, "{error}");
            let text = error.to_string();
            assert!(text.contains("frontends") && text.contains("bpf-lb-map-max"), "{text}");
            assert_eq!(store.read().unwrap().frontends.len(), error.index, "the steps before are in the map");
            let error = store.apply(&backends).unwrap_err();
            assert_eq!(error.index, 99, "{error}");
            assert!(error.to_string().contains("backend 100"), "{error}");
        }
    });
}

#[test]
fn a_maglev_table_of_the_wrong_length_is_refused() {
    isolated(|| {
        let root = BpfRoot::new();
        let store = loaded(&root).maps();
        let error = store.apply(&[Op::PutMaglev(1, Arc::from([1, 2, 3]))]).unwrap_err();
        assert!(error.to_string().contains("entries, not 3"), "{error}");
        // Right for other programs; also where there is one already.
        let put = |size: u32| store.apply(&[Op::PutMaglev(1, (0..size).collect())]);
        put(251).unwrap_err();
        put(MAGLEV_TABLE_SIZE).unwrap();
        put(251).unwrap_err();
        assert_eq!(store.read().unwrap().maglev[0].1.len(), MAGLEV_TABLE_SIZE as usize);
    });
}

#[test]
fn an_l2_entry_keeps_its_counter() {
    isolated(|| {
        let root = BpfRoot::new();
        let maps = loaded(&root).kernel_maps();
        let key = L2Key { addr: VIP.into(), ifindex: 2 };
        maps.put_l2(key).unwrap();
        maps.raw_put("l2", crate::flows::bytes(&key), &7u64.to_ne_bytes()).unwrap();
        maps.put_l2(key).unwrap();
        assert_eq!(maps.read_l2().unwrap()[0].1.responses_sent, 7);
        maps.delete_l2(&key).unwrap();
        maps.delete_l2(&key).unwrap();
        assert_eq!(maps.read_l2().unwrap(), []);
    });
}

#[test]
fn every_table_is_dumped_for_people() {
    isolated(|| {
        let mut rig = Rig::new();
        rig.maps.put_l2(L2Key { addr: VIP.into(), ifindex: 2 }).unwrap();
        rig.ingress(&crate::packets::tcp((CLIENT, 61_500), (VIP, TO_REMOTE), 2));
        rig.ingress(&crate::packets::udp((CLIENT, 61_500), (VIP, TO_REMOTE), b"?"));
        let find = |table: &str, part: &str| {
            let dump = rig.maps.dump_raw(table).unwrap();
            let lines: Vec<String> = dump.into_iter().map(|(key, value)| format!("{key} = {value}")).collect();
            assert!(lines.iter().any(|line| line.contains(part)), "{table}: no {part:?} in {lines:#?}");
        };
        find("frontends", "10.0.0.100:80/TCP = LoadBalancer routable service=1 affinity=0s external=1+1 internal=1+1");
        find("frontends", "10.0.0.100:0/ANY = ClusterIP routable,wildcard");
        find("slots", "12 = 12");
        find("backends", "1 = 10.42.1.5:8080/TCP active local");
        find("maglev", "1 = 16381 entries, backends [1, 2]");
        let becomes = "192.168.1.50:61500 -> 10.0.0.100:81 = 192.168.1.10:61500 -> 10.42.2.5:8080";
        find("flows", &format!("TCP {becomes} backend=2 redirect,lan"));
        find("transient", &format!("UDP {becomes} backend=12 redirect,lan"));
        find("l2", "10.0.0.100 dev 2 = responses-sent=0");
        find("devices", "02:00:00:00:00:10 192.168.1.10");
        find("settings", "reject-no-backend,answer-ping,fragments,fragments6 snat=61000-65000");
        find("drops", "ingress 0 Forwarded = 2 packets");
        find("counts", "0 flows created = 2");
        find("counts", "5 flows opened = 2");
        let unknown = rig.maps.dump_raw("nonsense").unwrap_err().to_string();
        assert!(unknown.contains("nonsense") && unknown.contains("frontends"), "{unknown}");
        let usage = rig.maps.usage();
        assert_eq!(usage.len(), TABLES.len());
        assert!(usage.iter().all(|table| table.bytes > 0 && table.max_entries > 0), "{usage:?}");
        assert_eq!(usage.iter().find(|table| table.name == "backends").unwrap().entries, Some(6));
    });
}

#[test]
fn every_table_can_be_tampered_with() {
    isolated(|| {
        let rig = Rig::new();
        for table in TABLES {
            let entries = rig.maps.raw_entries(table).unwrap();
            let (key, value) = match entries.first() {
                Some(entry) => entry.clone(),
                None => {
                    let sizes = match table {
                        "flows" | "transient" => (40, 56),
                        "fragments" => (40, 16),
                        "sockets" => (32, 24),
                        "affinity" => (24, 16),
                        "l2" => (20, 8),
                        "peers" => (8, 36),
                        other => panic!("{other} is empty"),
                    };
                    (vec![1; sizes.0], vec![2; sizes.1])
                }
            };
            rig.maps.raw_put(table, &key, &value).unwrap();
            assert!(rig.maps.raw_entries(table).unwrap().contains(&(key.clone(), value)), "{table}");
            assert!(rig.maps.raw_delete(table, &key).unwrap(), "{table}");
            assert!(rig.maps.raw_put(table, &[1], &[1]).is_err(), "{table} takes elements of its size only");
        }
    });
}

#[test]
fn a_root_that_is_no_bpf_filesystem_is_refused_with_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let error = Datapath::load(&options(dir.path())).err().expect("nothing can be pinned there");
    assert!(matches!(error, LoadError::NotBpffs(_)));
    assert!(error.to_string().contains("mount -t bpf bpf "), "{error}");
}

#[test]
fn everything_in_the_maps_survives_the_agent() {
    isolated(|| {
        let root = BpfRoot::new();
        let first = loaded(&root);
        first.maps().apply(&services()).unwrap();
        let before = sorted(first.maps().read().unwrap());
        assert!(!before.maglev.is_empty());
        drop(first);
        let second = loaded(&root);
        assert!(sorted(second.maps().read().unwrap()) == before);
        assert_eq!(second.migrations(), []);
        // Tables that outlived the agent can be replaced, and new ones added.
        let table: Arc<[u32]> = vec![9; MAGLEV_TABLE_SIZE as usize].into();
        second.maps().apply(&[Op::PutMaglev(LOCAL_ID, table.clone()), Op::PutMaglev(77, table)]).unwrap();
        assert_eq!(second.maps().read().unwrap().maglev.len(), before.maglev.len() + 1);
        detach_all(root.path()).unwrap();
        detach_all(root.path()).unwrap();
        assert!(!maps_dir(root.path()).exists());
    });
}

#[test]
fn another_size_keeps_every_entry() {
    isolated(|| {
        let root = BpfRoot::new();
        let first = loaded(&root);
        first.maps().apply(&services()).unwrap();
        first.maps().put_l2(L2Key { addr: VIP.into(), ifindex: 2 }).unwrap();
        let before = sorted(first.maps().read().unwrap());
        drop(first);
        let bigger = MapSizes {
            frontends: 2048,
            slots: 8192,
            backends: 2048,
            maglev: 128,
            flows: 8192,
            fragments: 128,
            transient: 8192,
            sockets: 2048,
            affinity: 2048,
            ranges: 2048,
            l2: 128,
            devices: 32,
            peers: 32,
        };
        let mut second = Datapath::load(&LoadOptions { max_entries: bigger, ..options(root.path()) }).unwrap();
        let moved = second.take_moving().expect("tables of connections are moved").finish();
        let all = second.migrations().iter().chain(&moved);
        let names: BTreeSet<&str> = all.map(|migration| migration.map.as_str()).collect();
        assert_eq!(names.len(), 13, "{names:?}");
        assert!(second.migrations().iter().all(|migration| migration.lost == 0), "{:?}", second.migrations());
        assert!(second.migrations()[0].difference.contains("max_entries"), "{:?}", second.migrations());
        assert!(sorted(second.maps().read().unwrap()) == before);
        assert_eq!(second.maps().read_l2().unwrap().len(), 1);
        // The next start finds them as they should be.
        drop(second);
        let mut third = Datapath::load(&LoadOptions { max_entries: bigger, ..options(root.path()) }).unwrap();
        assert_eq!(third.migrations(), []);
        assert!(third.take_moving().is_some_and(|moving| moving.is_empty()));
        assert!(sorted(third.maps().read().unwrap()) == before);
    });
}

#[test]
fn a_smaller_size_keeps_what_fits_and_says_what_is_lost() {
    isolated(|| {
        let root = BpfRoot::new();
        let first = loaded(&root);
        first.maps().apply(&many(1000)).unwrap();
        drop(first);
        let sizes = MapSizes { backends: 500, ..small() };
        let second = Datapath::load(&LoadOptions { max_entries: sizes, ..options(root.path()) }).unwrap();
        let [migration] = second.migrations() else { panic!("{:?}", second.migrations()) };
        assert_eq!((migration.kept, migration.lost), (499, 500));
        assert_eq!(second.maps().read().unwrap().backends.len(), 499);
        drop(second);
        // Of an array, elements that nobody has written are none that could be lost.
        let sizes = MapSizes { backends: 600, slots: 64, ..small() };
        let third = Datapath::load(&LoadOptions { max_entries: sizes, ..options(root.path()) }).unwrap();
        let slots = third.migrations().iter().find(|migration| migration.map == "SLOTS").expect("it is smaller");
        assert!(slots.lost > 0, "{slots:?}");
        drop(third);
        let sizes = MapSizes { backends: 550, slots: 64, ..small() };
        let fourth = Datapath::load(&LoadOptions { max_entries: sizes, ..options(root.path()) }).unwrap();
        let [backends] = fourth.migrations() else { panic!("{:?}", fourth.migrations()) };
        assert_eq!((backends.kept, backends.lost), (499, 0));
    });
}

#[test]
fn settings_of_an_earlier_layout_keep_what_both_know() {
    isolated(|| {
        let root = BpfRoot::new();
        drop(loaded(&root));
        std::fs::remove_file(pin(&root, "SETTINGS")).unwrap();
        // As it was before the timeouts came.
        let mut earlier: AyaArray<MapData, [u64; 4]> = AyaArray::create(1, 0).unwrap();
        earlier.set(0, &[1, 2, 3 | 4 << 32 | 5 << 48, 6], 0).unwrap();
        earlier.pin(pin(&root, "SETTINGS")).unwrap();
        let datapath = loaded(&root);
        let settings = datapath.maps().settings().unwrap();
        assert_eq!((settings.alive_at, settings.alive_for, settings.flags), (1, 2, 3));
        assert_eq!((settings.snat_min, settings.snat_max, settings.maglev_seed), (4, 5, 6));
        assert_eq!(settings.timeouts, kinesin_abi::Timeouts::default());
    });
}

#[test]
fn a_pinned_map_of_another_layout_is_replaced_and_reported() {
    isolated(|| {
        let root = BpfRoot::new();
        std::fs::create_dir_all(maps_dir(root.path())).unwrap();
        let foreign: AyaHash<MapData, u64, [u64; 8]> = AyaHash::create(16, 0).unwrap();
        foreign.pin(pin(&root, "FRONTENDS")).unwrap();
        let datapath = loaded(&root);
        let [migration] = datapath.migrations() else { panic!("{:?}", datapath.migrations()) };
        assert_eq!((migration.map.as_str(), migration.kept, migration.lost), ("FRONTENDS", 0, 0));
        assert!(migration.difference.contains("value size 64, now 28"), "{}", migration.difference);
        datapath.maps().apply(&services()).unwrap();
        drop(datapath);
        assert_eq!(loaded(&root).migrations(), []);
    });
}

#[test]
fn what_is_pinned_but_no_map_is_replaced_too() {
    isolated(|| {
        let root = BpfRoot::new();
        let mut datapath = loaded(&root);
        let path = pin(&root, "SOCKETS");
        std::fs::remove_file(&path).unwrap();
        datapath.ebpf_mut().program_mut("cil_from_netdev").unwrap().pin(&path).unwrap();
        drop(datapath);
        let datapath = loaded(&root);
        assert_eq!(datapath.migrations()[0].difference, "not a map");
    });
}
