//! The object with Maglev tables of another size than it was compiled with: their size is part of a type, which the
//! object's BTF describes (`Documentation/bpf/btf.rst` of the kernel). Everything else of a map's size can be asked for
//! when it is made.
//!
//! Deliberately absent: moving bytes. Two numbers are written over.

use std::borrow::Cow;

use kinesin_abi::{MAGLEV_TABLE_SIZE, maglev_words};

const MAGIC: u16 = 0xeb9f;
const ARRAY: u32 = 3;
const STRUCTURE: u32 = 4;

/// The object for tables of `size` entries; as it is for the size that it was compiled with.
///
/// # Errors
/// The object does not describe exactly one such table.
pub(super) fn with_maglev_size(object: &[u8], size: u32) -> Result<Cow<'_, [u8]>, String> {
    if size == MAGLEV_TABLE_SIZE {
        return Ok(Cow::Borrowed(object));
    }
    let (from, to) = (maglev_words(MAGLEV_TABLE_SIZE), maglev_words(size));
    let mut object = object.to_vec();
    let types = types(&object).ok_or("the object's BTF is cut short")?;
    for (kind, old, new) in [(ARRAY, from, to), (STRUCTURE, from * 4, to * 4)] {
        let found: Vec<_> = types.iter().filter(|t| t.kind == kind && t.number == old).map(|t| t.at).collect();
        let [at] = found[..] else {
            return Err(format!("the object has {} types of a Maglev table, not one", found.len()));
        };
        object[at..at + 4].copy_from_slice(&new.to_le_bytes());
    }
    Ok(Cow::Owned(object))
}

/// A type: its kind, and of an array the number of elements, of a structure its size; and where that is written.
struct Type {
    kind: u32,
    number: u32,
    at: usize,
}

/// The types of a little-endian object's BTF.
fn types(object: &[u8]) -> Option<Vec<Type>> {
    let word = |at: usize| Some(u32::from_le_bytes(*object.get(at..)?.first_chunk()?));
    let start = section(object, ".BTF")?;
    let header = word(start)?;
    if header as u16 != MAGIC {
        return None;
    }
    // Behind the header, as long as that says; where the types begin, and how many bytes they are.
    let mut at = start + word(start + 4)? as usize + word(start + 8)? as usize;
    let end = at + word(start + 12)? as usize;
    let mut all = Vec::new();
    while at < end {
        let info = word(at + 4)?;
        let (kind, members) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
        // What follows the twelve bytes that every type has.
        let more = match kind {
            // Integers, variables, tags of declarations.
            1 | 14 | 17 => 4,
            ARRAY => 12,
            // Structures, unions, sections of data, 64-bit enumerations.
            STRUCTURE | 5 | 15 | 19 => 12 * members,
            // Enumerations, prototypes.
            6 | 13 => 8 * members,
            _ => 0,
        };
        let at_number = if kind == ARRAY { at + 20 } else { at + 8 };
        all.push(Type { kind, number: word(at_number)?, at: at_number });
        at += 12 + more;
    }
    Some(all)
}

/// Where a section of a 64-bit ELF file begins.
fn section(file: &[u8], name: &str) -> Option<usize> {
    let number = |at: usize, bytes: usize| {
        let raw = file.get(at..at + bytes)?;
        Some(raw.iter().rev().fold(0usize, |number, byte| number << 8 | usize::from(*byte)))
    };
    let (headers, length, count, names) = (number(0x28, 8)?, number(0x3a, 2)?, number(0x3c, 2)?, number(0x3e, 2)?);
    let offset = |section: usize| number(headers + section * length + 0x18, 8);
    let names = offset(names)?;
    let is_it = |section: &usize| {
        let at = number(headers + section * length, 4).map(|at| names + at);
        at.and_then(|at| file.get(at..at + name.len() + 1))
            .is_some_and(|found| found.starts_with(name.as_bytes()) && found.ends_with(&[0]))
    };
    offset((0..count).find(is_it)?)
}
