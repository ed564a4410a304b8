//! The object, other than it was compiled: with Maglev tables of another size, and for kernels without one of its helpers.
//!
//! The size of a Maglev table is part of a type, which the object's BTF describes (`Documentation/bpf/btf.rst` of the
//! kernel); everything else of a map's size can be asked for when it is made. A helper that is missing could be chosen by a
//! constant that the verifier knows, but that costs it a fifth more of IPv6 programs on Linux 6.1.
//!
//! Deliberately absent: moving bytes. Numbers are written over.

use std::borrow::Cow;

use kinesin_abi::{MAGLEV_TABLE_SIZE, maglev_words};

const MAGIC: u16 = 0xeb9f;
const ARRAY: u32 = 3;
const STRUCTURE: u32 = 4;

/// `SHF_EXECINSTR`
const EXECUTABLE: usize = 4;
/// Bytes of an instruction, and how the call of a helper begins, whose number is its last four.
const INSTRUCTION: usize = 8;
const CALL: [u8; 4] = [0x85, 0, 0, 0];
/// `bpf_ktime_get_ns`, `bpf_ktime_get_coarse_ns`
const CLOCK: u32 = 5;
const COARSE_CLOCK: u32 = 160;

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

/// The object for a kernel that has no clock of the last tick (before 5.11): its programs read the counter instead.
///
/// # Errors
/// The object is cut short.
pub(super) fn with_exact_clock(object: &[u8]) -> Result<Vec<u8>, String> {
    let mut object = object.to_vec();
    for (at, length) in code(&object).ok_or("the object's sections are cut short")? {
        let code = object.get_mut(at..at + length).ok_or("the object's programs are cut short")?;
        // The second half of a wide instruction has no code, so it is no call.
        for instruction in code.as_chunks_mut::<INSTRUCTION>().0.iter_mut().filter(|i| i.starts_with(&CALL)) {
            if instruction[4..] == COARSE_CLOCK.to_le_bytes() {
                instruction[4..].copy_from_slice(&CLOCK.to_le_bytes());
            }
        }
    }
    Ok(object)
}

/// Where a section of a 64-bit ELF file begins.
fn section(file: &[u8], name: &str) -> Option<usize> {
    let names = sections(file)?.nth(number(file, 0x3e, 2)?)??.at;
    let is_it = |section: &Section| {
        let found = file.get(names + section.name..)?.get(..=name.len())?;
        Some(found.starts_with(name.as_bytes()) && found.ends_with(&[0]))
    };
    sections(file)?.flatten().find(|section| is_it(section) == Some(true)).map(|section| section.at)
}

/// Where the sections of instructions are, and how many bytes they have.
fn code(file: &[u8]) -> Option<Vec<(usize, usize)>> {
    let sections: Option<Vec<Section>> = sections(file)?.collect();
    Some(sections?.iter().filter(|section| section.flags & EXECUTABLE != 0).map(|s| (s.at, s.length)).collect())
}

/// A section: where its name is among the names, its flags, its place in the file and its bytes.
struct Section {
    name: usize,
    flags: usize,
    at: usize,
    length: usize,
}

/// The section headers of a 64-bit ELF file, none for one that is cut short.
fn sections(file: &[u8]) -> Option<impl Iterator<Item = Option<Section>>> {
    let (headers, length, count) = (number(file, 0x28, 8)?, number(file, 0x3a, 2)?, number(file, 0x3c, 2)?);
    Some((0..count).map(move |section| {
        let header = headers + section * length;
        let [flags, at, length] = [8, 0x18, 0x20].map(|field| number(file, header + field, 8));
        Some(Section { name: number(file, header, 4)?, flags: flags?, at: at?, length: length? })
    }))
}

fn number(file: &[u8], at: usize, bytes: usize) -> Option<usize> {
    let raw = file.get(at..at + bytes)?;
    Some(raw.iter().rev().fold(0usize, |number, byte| number << 8 | usize::from(*byte)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::OBJECT;

    fn calls(object: &[u8], helper: u32) -> usize {
        let of = |(at, length): (usize, usize)| {
            let (instructions, _) = object[at..at + length].as_chunks::<INSTRUCTION>();
            instructions.iter().filter(|i| i.starts_with(&CALL) && i[4..] == helper.to_le_bytes()).count()
        };
        code(object).expect("a whole object").into_iter().map(of).sum()
    }

    #[test]
    fn every_program_reads_the_other_clock() {
        let coarse = calls(OBJECT, COARSE_CLOCK);
        assert!(coarse > 0 && calls(OBJECT, CLOCK) == 0, "{coarse}");
        let exact = with_exact_clock(OBJECT).expect("a whole object");
        assert_eq!((calls(&exact, COARSE_CLOCK), calls(&exact, CLOCK)), (0, coarse));
        assert!(with_exact_clock(&OBJECT[..OBJECT.len() / 2]).is_err());
    }
}
