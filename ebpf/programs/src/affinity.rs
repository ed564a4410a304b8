//! Session affinity: a client of a service comes back to the backend that it was given before.
//!
//! An entry binds while it is younger than the service's timeout and its backend is a member of the set that the client
//! would choose from: being a member means both to take new connections and to belong to this service still, whoever
//! else uses the backend. The entry notes where in the set the backend was, and the planner keeps members where they
//! are, so that asking costs one array lookup; only after the set has changed around it is the set searched, once per
//! client.

use kinesin_abi::{
    AffinityKey, AffinityValue, Backend, BackendId, FrontendValue, SEARCHED_MEMBERS, SetRef, affinity_binds,
};

use crate::{
    lookup::{self, Chosen},
    maps::{AFFINITY, SLOTS},
};

/// The backend that the client is bound to, if any; renews the bond.
#[inline(always)]
pub fn recall(frontend: &FrontendValue, set: SetRef, key: &AffinityKey) -> Option<(BackendId, &'static Backend)> {
    let entry = AFFINITY.get_ptr_mut(key)?;
    // SAFETY: points into the map; other CPUs write only time and position meanwhile, which are advisory.
    let entry = unsafe { &mut *entry };
    let now = lookup::now();
    if !affinity_binds(entry.last_used, now, frontend.affinity) {
        return None;
    }
    let id = entry.backend;
    if !holds(set, entry.position, id) && search(set.base, set.count, id, &mut entry.position) == 0 {
        return None;
    }
    let backend = lookup::backend(id)?;
    entry.last_used = now;
    Some((id, backend))
}

/// Binds the client to a backend.
#[inline(always)]
pub fn remember(key: &AffinityKey, chosen: &Chosen) {
    let value = AffinityValue { last_used: lookup::now(), backend: chosen.id, position: chosen.position };
    // Best effort: the map forgets the oldest.
    let _ = AFFINITY.insert(key, &value, 0);
}

/// Whether this member of the set is this backend.
#[inline(always)]
fn holds(set: SetRef, position: u32, id: BackendId) -> bool {
    position < set.count && SLOTS.get(set.base.wrapping_add(position)) == Some(&id)
}

/// Finds the position of a backend in a set; 1 where there is one.
///
/// Written for the verifier, which would otherwise follow each step to the end of the program anew: a function of its
/// own, whose outcome is one of two numbers, with the position in memory that it does not look into.
#[inline(never)]
pub fn search(base: u32, count: u32, id: BackendId, found: &mut u32) -> u32 {
    for position in 0..SEARCHED_MEMBERS {
        let Some(&member) = SLOTS.get(base.wrapping_add(position)) else { return 0 };
        if member == id {
            // Behind the set lies another one.
            if position >= count {
                return 0;
            }
            *found = position;
            return 1;
        }
    }
    0
}
