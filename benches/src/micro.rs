//! What the parts of a change cost inside the process: compiling, planning, writing; and what is kept for it.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kinesin::datapath::MapStore;
use kinesin::table::Table;
use kinesin_core::objects::{EndpointSlice, Object, Service};
use kinesin_core::plan::{Limits, Op, Planner};
use kinesin_core::services::{Compiled, NodeContext, ServiceKey, SliceIndex, compile};

use crate::report::{heading, line, median, ms, spread};
use crate::{count, objects, rig};

const ROUNDS: usize = 2_000;

pub(crate) fn run() -> anyhow::Result<()> {
    heading("In the process: one changed EndpointSlice");
    for endpoints in [10, 50] {
        parse_one(endpoints);
        compile_one(endpoints);
    }
    for services in [1_000, 5_000] {
        plan_one(services, 10);
    }
    heading("In the process: first load");
    first_load(1_000, 10);
    first_load(5_000, 10);
    heading("In the process: bytes kept");
    bytes_kept()
}

fn node() -> NodeContext {
    NodeContext { name: "node-1".into(), ..NodeContext::default() }
}

/// Runs `work` often; medians of time and allocations.
fn measure<T>(what: &str, mut work: impl FnMut(usize) -> T, extra: &[(&str, String)]) {
    let (mut times, mut allocations) = (Vec::with_capacity(ROUNDS), Vec::with_capacity(ROUNDS));
    for round in 0..ROUNDS {
        let (allocated, begun) = (count::allocations(), Instant::now());
        let result = black_box(work(round));
        times.push(begun.elapsed());
        allocations.push(count::allocations() - allocated);
        drop(result);
    }
    let time = format!("{:.1} µs", median(&times).as_secs_f64() * 1e6);
    let mut figures = vec![("time", time), ("allocations", median(&allocations).to_string())];
    figures.extend_from_slice(extra);
    line(what, &figures);
}

fn parse_one(endpoints: usize) {
    let text = objects::slice(7, endpoints).to_string();
    let extra = [("bytes of JSON", text.len().to_string())];
    measure(
        &format!("read a slice of {endpoints} endpoints"),
        |_| serde_json::from_str::<EndpointSlice>(black_box(&text)),
        &extra,
    );
}

fn compile_one(endpoints: usize) {
    let (service, slice) = objects::parsed(7, endpoints);
    let node = node();
    measure(
        &format!("compile a service of {endpoints} endpoints"),
        |_| compile(black_box(&service), std::iter::once(black_box(&slice)), &node),
        &[],
    );
}

fn compiled(number: usize, endpoints: usize, node: &NodeContext) -> (ServiceKey, Compiled) {
    let (service, slice) = objects::parsed(number, endpoints);
    (service.key(), compile(&service, std::iter::once(&slice), node))
}

fn limits() -> Limits {
    Limits { slots: 262_144, ..Limits::default() }
}

/// One endpoint of one service is replaced by another, again and again.
fn plan_one(services: usize, endpoints: usize) {
    let node = node();
    let mut planner = Planner::new(limits());
    for number in 0..services {
        let (key, compiled) = compiled(number, endpoints, &node);
        planner.update(&key, &compiled).expect("it fits");
    }
    // One endpoint less, or all of them; and the same number with one of them another.
    let versions: Vec<_> = [endpoints, endpoints - 1].map(|n| compiled(7, n, &node)).into();
    let replaced: Vec<_> = [0, 1]
        .map(|version| {
            let (service, mut slice) = objects::parsed(7, endpoints);
            let extra = serde_json::from_value(objects::one_endpoint(7, endpoints + version)).expect("an endpoint");
            slice.endpoints.pop();
            slice.endpoints.push(extra);
            (service.key(), compile(&service, std::iter::once(&slice), &node))
        })
        .into();
    for (what, versions) in [("one endpoint more or less", versions), ("one endpoint replaced", replaced)] {
        let mut ops = 0;
        let apply = |planner: &mut Planner, round: usize| {
            let (key, compiled) = &versions[round % 2];
            planner.update(key, compiled).expect("it fits")
        };
        for round in 0..4 {
            ops = apply(&mut planner, round).len();
        }
        let extra = [("map writes", ops.to_string())];
        measure(&format!("plan {what}, of {services} × {endpoints}"), |round| apply(&mut planner, round), &extra);
    }
}

fn first_load(services: usize, endpoints: usize) {
    let node = node();
    let all: Vec<_> = (0..services).map(|number| objects::parsed(number, endpoints)).collect();
    let (mut compiling, mut planning, mut ordering) = (Vec::new(), Vec::new(), Vec::new());
    let mut ops: Vec<Op> = Vec::new();
    for _ in 0..11 {
        let begun = Instant::now();
        let compiled: Vec<_> = all
            .iter()
            .map(|(service, slice)| (service.key(), compile(service, std::iter::once(slice), &node)))
            .collect();
        compiling.push(begun.elapsed());
        let begun = Instant::now();
        let mut planner = Planner::new(limits());
        let plans = compiled.iter().map(|(key, compiled)| planner.update(key, compiled).expect("it fits")).collect();
        planning.push(begun.elapsed());
        let begun = Instant::now();
        ops = planner.in_phases(plans);
        ordering.push(begun.elapsed());
    }
    let name = format!("{services} × {endpoints}");
    line(&format!("compile {name}"), &[("time", spread(&compiling))]);
    line(&format!("plan {name}"), &[("time", spread(&planning)), ("map writes", ops.len().to_string())]);
    line(&format!("put {name} in a safe order"), &[("time", spread(&ordering))]);
    let (send, times) = std::sync::mpsc::sync_channel(1);
    let one = one_change(&ops);
    rig::isolated(move || send.send(write(&ops, &one)).expect("the receiver waits"));
    let (batches, single) = times.recv().expect("it was sent");
    line(&format!("write {name} into the maps, in batches"), &[("time", spread(&batches))]);
    line("write one replaced endpoint into the maps", &[("time", format!("{:.1} µs", single.as_secs_f64() * 1e6))]);
}

/// What [`plan_one`] writes for a replaced endpoint: a backend, its slot, and the old backend's end.
fn one_change(ops: &[Op]) -> Vec<Op> {
    let slot = ops.iter().find(|op| matches!(op, Op::Slot(..))).expect("a plan has slots").clone();
    let backends = ops.iter().filter(|op| matches!(op, Op::Backend(..)));
    backends
        .take(1)
        .cloned()
        .chain([slot])
        .chain(ops.iter().filter(|op| matches!(op, Op::Backend(..))).skip(1).take(1).cloned())
        .collect()
}

/// First load into fresh maps five times, and one change many times.
fn write(ops: &[Op], one: &[Op]) -> (Vec<Duration>, Duration) {
    let mut batches = Vec::new();
    let mut single = Vec::new();
    for _ in 0..5 {
        let root = rig::BpfRoot::new();
        let options = kinesin::datapath::LoadOptions::new(root.path());
        let datapath = kinesin::datapath::Datapath::load(&options).expect("the maps are made");
        let maps: Arc<dyn MapStore> = datapath.maps();
        let begun = Instant::now();
        maps.apply(ops).expect("they fit");
        batches.push(begun.elapsed());
        for _ in 0..ROUNDS {
            let begun = Instant::now();
            maps.apply(one).expect("they fit");
            single.push(begun.elapsed());
        }
    }
    (batches, median(&single))
}

/// Live bytes after each stage, for services of 10 and of 50 endpoints; the difference is what an endpoint takes.
fn bytes_kept() -> anyhow::Result<()> {
    const SERVICES: usize = 1_000;
    let node = node();
    let stages = |endpoints: usize| {
        let mut bytes = Vec::new();
        let mut before = count::live();
        let mut step = |what: &'static str| {
            let now = count::live();
            bytes.push((what, now - std::mem::replace(&mut before, now)));
        };
        let services: Table<ServiceKey, Service> = Table::default();
        let slices: Table<ServiceKey, EndpointSlice> = Table::default();
        for number in 0..SERVICES {
            let (service, _) = objects::parsed(number, endpoints);
            services.put(service.key(), service);
        }
        step("services");
        for number in 0..SERVICES {
            let (_, slice) = objects::parsed(number, endpoints);
            slices.put(slice.key(), slice);
        }
        step("slices");
        let mut index = SliceIndex::default();
        for (_, slice) in slices.rows() {
            index.upsert(slice);
        }
        step("index of slices");
        let table: Table<ServiceKey, Compiled> = Table::default();
        for (key, service) in services.rows() {
            table.put(key.clone(), compile(&service, index.slices(&key), &node));
        }
        step("compiled");
        let mut planner = Planner::new(limits());
        for (key, compiled) in table.rows() {
            planner.update(&key, &compiled).expect("it fits");
        }
        step("planner");
        black_box((&services, &slices, &index, &table, &planner));
        bytes
    };
    let (few, many) = (stages(10), stages(50));
    let mut totals = (0, 0);
    for ((what, ten), (_, fifty)) in few.into_iter().zip(many) {
        let endpoint = (fifty - ten) as f64 / 40.0 / SERVICES as f64;
        let service = ten as f64 / SERVICES as f64;
        totals = (totals.0 + ten, totals.1 + fifty);
        line(
            what,
            &[("per service × 10", format!("{service:.0} B")), ("of it per endpoint", format!("{endpoint:.0} B"))],
        );
    }
    let mib = |bytes: i64| crate::report::mib(bytes.unsigned_abs());
    line("all, 1,000 services", &[("× 10", mib(totals.0)), ("× 50", mib(totals.1))]);
    let _ = ms;
    Ok(())
}
