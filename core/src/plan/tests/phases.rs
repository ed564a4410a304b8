//! Plans of several services in one batch.

use kinesin_abi::{Addr, Backend, Be16, FrontendKey, FrontendValue, SLOT_EMPTY, frontend_flags, proto};

use crate::plan::Op;
use crate::plan::phases::in_phases;

fn front(port: u16) -> Op {
    let addr = Addr::from(std::net::Ipv4Addr::new(10, 0, 0, 1));
    Op::PutFrontend(FrontendKey { addr, port: Be16::new(port), proto: proto::TCP, pad: 0 }, FrontendValue::default())
}

#[test]
fn plans_merge_by_phase_unless_they_write_the_same_key() {
    let backend = Backend { state: 1, ..Backend::default() };
    let a = vec![Op::Backend(1, backend), Op::Slot(0, 1), front(80)];
    let b = vec![Op::Backend(2, backend), Op::Slot(1, 2), front(81), Op::Slot(5, SLOT_EMPTY)];
    let order = [&a[0], &b[0], &a[1], &b[1], &a[2], &b[2], &b[3]].map(Clone::clone);
    assert_eq!(in_phases(vec![a.clone(), b.clone()], 0), order);
    let again = vec![Op::Backend(3, backend), Op::Slot(5, 3)];
    assert_eq!(in_phases(vec![a, b, again.clone()], 0), [&order[..], &again[..]].concat());
}

#[test]
fn a_plan_that_writes_a_key_twice_stays_as_it_is() {
    let backend = Backend { state: 1, ..Backend::default() };
    let twice = vec![Op::Slot(3, SLOT_EMPTY), Op::Backend(1, backend), Op::Slot(3, 1)];
    assert_eq!(in_phases(vec![vec![front(80)], twice.clone()], 0), [&[front(80)], &twice[..]].concat());
}

#[test]
fn r40_a_wildcard_that_passes_from_one_service_to_another_is_never_away() {
    let Op::PutFrontend(mut key, mut value) = front(0) else { unreachable!("made as such") };
    (key.proto, value.flags) = (0, frontend_flags::WILDCARD);
    let (put, delete) = (Op::PutFrontend(key, value), Op::DeleteFrontend(key));
    let Op::PutFrontend(gone, _) = front(80) else { unreachable!("made as such") };
    let plans = vec![vec![Op::DeleteFrontend(gone), delete.clone()], vec![front(81), put.clone()]];
    assert_eq!(in_phases(plans.clone(), 2), [Op::DeleteFrontend(gone), front(81), put.clone()]);
    // Where the map might not hold both at once it goes, and comes back.
    assert!(in_phases(plans, 1).contains(&delete));
    // What is given up for good goes, and what a frontend leads to is never kept.
    let plans = vec![vec![delete.clone()], vec![put.clone()], vec![delete.clone()]];
    assert_eq!(in_phases(plans, 9), [put, delete]);
    let again = vec![vec![Op::DeleteFrontend(gone)], vec![front(80)]];
    assert_eq!(in_phases(again.clone(), 9), again.concat());
}
