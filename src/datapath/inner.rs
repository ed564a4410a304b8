//! The maps inside a map of maps: each Maglev table is an array of one element.
//!
//! Deliberately absent: names that mean something. The kernel only compares shapes.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Mutex;

use super::sys;
use crate::sync::lock;

/// Numbers of the types in [`types`].
const KEY: u32 = 1;
const VALUE: u32 = 3;

/// A new array of one element of so many bytes.
///
/// It carries types, as the maps do that the programs' object describes: until Linux 6.2 the kernel puts a map into
/// another only if both have types, or neither has (`bpf_map_meta_equal` compares what it looked for in them). Where it
/// takes no types, the outer map has none either.
pub(crate) fn create(name: &str, value: u32) -> io::Result<OwnedFd> {
    static TYPES: Mutex<BTreeMap<u32, Option<OwnedFd>>> = Mutex::new(BTreeMap::new());
    let mut known = lock(&TYPES);
    let types = known.entry(value).or_insert_with(|| sys::load_types(&types(value)).ok());
    sys::create_array(name, value, types.as_ref().map(|types| (types.as_fd(), [KEY, VALUE])))
}

/// BTF (`Documentation/bpf/btf.rst` of the kernel) of a 32-bit integer, and of a structure with an array of them.
fn types(value: u32) -> Vec<u8> {
    const MAGIC_VERSION: u32 = 0x0001_eb9f;
    const HEADER: u32 = 24;
    const INTEGER: u32 = 1 << 24;
    const ARRAY: u32 = 3 << 24;
    const STRUCTURE: u32 = 4 << 24;
    let strings = *b"\0v\0\0";
    let types = [
        // Its name, its size, and that it has 32 bits.
        [1, INTEGER, 4, 32].as_slice(),
        // Of what, indexed by what, and how many.
        &[0, ARRAY, 0, KEY, KEY, value / 4],
        // One member: its name, its type, its place.
        &[0, STRUCTURE | 1, value, 1, 2, 0],
    ]
    .concat();
    let length = (types.len() * 4) as u32;
    let header = [MAGIC_VERSION, HEADER, 0, length, length, strings.len() as u32];
    header.iter().chain(&types).flat_map(|word| word.to_ne_bytes()).chain(strings).collect()
}
