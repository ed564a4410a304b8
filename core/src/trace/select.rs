//! Source ranges, affinity and the choice of a backend, as `lookup.rs` and `affinity.rs` of the programs make it.

use std::net::IpAddr;

use kinesin_abi::{
    AffinityKey, Backend, BackendId, Be16, FrontendValue, SEARCHED_MEMBERS, SELECTION_TRIES, SOURCE_RANGE_BITS,
    SOURCE_RANGE_DENY, SOURCE_RANGE_IPV6, SetRef, SourceRange, SourceRangeKey, affinity_binds, frontend_flags,
    maglev_hash, maglev_index,
};

use super::{Bond, Member, Method, Step, Tracer, Verdict, View, Way, text};

/// A backend, and how probable it is that it is chosen.
pub(super) type Candidate = (f64, BackendId, Backend);

/// A backend for people.
pub(super) fn member(id: BackendId, backend: &Backend) -> Member {
    Member {
        id,
        address: std::net::SocketAddr::new(backend.addr.into(), backend.port.get()),
        state: text::state(backend.state).into(),
        local: backend.is_local(),
    }
}

/// What becomes of a packet with each of the candidates, and with nobody, should no slot lead to a backend.
pub(super) fn ways<E>(
    candidates: Vec<Candidate>,
    nobody: Verdict,
    with: impl FnMut(Candidate) -> Result<Way, E>,
) -> Result<Vec<Way>, E> {
    let left = 1.0 - candidates.iter().map(|(chance, ..)| chance).sum::<f64>();
    let mut ways = candidates.into_iter().map(with).collect::<Result<Vec<_>, _>>()?;
    if left > 1e-9 {
        ways.push(Way { chance: left, backend: None, steps: Vec::new(), verdict: nobody });
    }
    Ok(ways)
}

impl<V: View> Tracer<'_, V> {
    /// Whether the service serves the client; says why.
    pub(super) fn serves_client(&mut self, frontend: &FrontendValue) -> Result<bool, V::Error> {
        let Some(client) = self.packet.src else { return Ok(true) };
        let deny = frontend.flags & frontend_flags::SOURCE_RANGES_DENY != 0;
        let mut list = if deny { SOURCE_RANGE_DENY } else { 0 };
        if client.is_ipv6() {
            list |= SOURCE_RANGE_IPV6;
        }
        let asked = SourceRange { service: frontend.service, list, addr: client.into() };
        let ranges = self.view.source_ranges(frontend.service)?;
        let found = ranges.into_iter().filter(|range| contains(range, asked)).max_by_key(|range| range.prefix_len);
        let served = found.is_some() != deny;
        let matched = found.map(|range| {
            let before = SOURCE_RANGE_BITS + if client.is_ipv4() { 96 } else { 0 };
            format!("{}/{}", IpAddr::from(range.range.addr), range.prefix_len.saturating_sub(before))
        });
        self.say(Step::SourceRanges { client, list: if deny { "deny" } else { "allow" }.into(), matched, served });
        Ok(served)
    }

    /// Who may be chosen for a packet from outside; nobody where no slot leads to a backend.
    pub(super) fn choose(&mut self, frontend: &FrontendValue) -> Result<Vec<Candidate>, V::Error> {
        let set = frontend.external;
        if frontend.flags & frontend_flags::AFFINITY != 0 {
            let key = AffinityKey { client: self.packet.src(), service: frontend.service, flags: 0 };
            let client = self.packet.src.map_or_else(String::new, |src| src.to_string());
            if let Some(bound) = self.recall(frontend, set, Some(key), client)? {
                return Ok(vec![bound]);
            }
        }
        self.select(frontend, set)
    }

    /// The backend that a client is bound to. Without a key nobody knows which entry is the client's.
    pub(super) fn recall(
        &mut self,
        frontend: &FrontendValue,
        set: SetRef,
        key: Option<AffinityKey>,
        client: String,
    ) -> Result<Option<Candidate>, V::Error> {
        let (bond, bound) = match key {
            Some(key) => self.bond(frontend, set, &key)?,
            None => (Bond::Unknown, None),
        };
        self.say(Step::Affinity { client, timeout_seconds: frontend.affinity, bond });
        if bound.is_some() {
            self.say(Step::Selection { method: Method::Affinity, of: set.count });
        }
        Ok(bound)
    }

    fn bond(
        &self,
        frontend: &FrontendValue,
        set: SetRef,
        key: &AffinityKey,
    ) -> Result<(Bond, Option<Candidate>), V::Error> {
        let Some(entry) = self.view.affinity(key)? else { return Ok((Bond::None, None)) };
        let void = |why: &str| (Bond::Void { backend: entry.backend, why: why.into() }, None);
        let now = self.view.now();
        if !affinity_binds(entry.last_used, now, frontend.affinity) {
            return Ok(void("it is older than the timeout"));
        }
        let members = self.view.slots(set)?;
        let there = members.get(entry.position as usize) == Some(&entry.backend)
            || members.iter().take(SEARCHED_MEMBERS as usize).any(|id| *id == entry.backend);
        if !there {
            return Ok(void("that backend takes no new connections of this service any more"));
        }
        let Some(backend) = self.view.backend(entry.backend)? else { return Ok(void("that backend is gone")) };
        let idle_seconds = now.saturating_sub(entry.last_used) / 1_000_000_000;
        Ok((Bond::Binds { backend: entry.backend, idle_seconds }, Some((1.0, entry.backend, backend))))
    }

    /// By Maglev where the service says so and its table is there, else at random.
    fn select(&mut self, frontend: &FrontendValue, set: SetRef) -> Result<Vec<Candidate>, V::Error> {
        if frontend.flags & frontend_flags::MAGLEV == 0 || set.count == 0 {
            return self.random(set);
        }
        let seed = self.view.settings()?.maglev_seed;
        let packet = self.packet;
        let sport = if frontend.flags & frontend_flags::AFFINITY != 0 { 0 } else { packet.sport };
        let (sport, dport) = (Be16::new(sport), Be16::new(packet.dport));
        let hash = maglev_hash(&packet.src(), sport, dport, packet.proto, seed);
        let missing = |why: String| Step::Selection { method: Method::MaglevMissing { why }, of: set.count };
        let Some(table) = self.view.maglev(set.base)? else {
            self.say(missing("there is no table yet".into()));
            return self.spread(set);
        };
        let size = table.len() as u32;
        let index = maglev_index(hash, size);
        let id = table.get(index as usize).copied().unwrap_or_default();
        match self.view.backend(id)? {
            Some(backend) => {
                let method = Method::Maglev { index, size, seed };
                self.say(Step::Selection { method, of: set.count });
                Ok(vec![(1.0, id, backend)])
            }
            None => {
                self.say(missing(format!("slot {index} of the table holds {id}, which is no backend")));
                self.spread(set)
            }
        }
    }

    /// At random; says so.
    pub(super) fn random(&mut self, set: SetRef) -> Result<Vec<Candidate>, V::Error> {
        self.say(Step::Selection { method: Method::Random, of: set.count });
        self.spread(set)
    }

    /// Each member by its probability. A position that leads nowhere is tried again from the start of the set.
    fn spread(&self, set: SetRef) -> Result<Vec<Candidate>, V::Error> {
        let ids = self.view.slots(set)?;
        let mut members = Vec::with_capacity(ids.len());
        for id in ids {
            members.push(self.view.backend(id)?.map(|backend| (id, backend)));
        }
        let each = 1.0 / f64::from(set.count.max(1));
        let retry =
            (0..SELECTION_TRIES as usize - 1).find(|position| members.get(*position).is_some_and(Option::is_some));
        let mut found: Vec<Candidate> = Vec::new();
        for position in 0..members.len() {
            let lands = if members[position].is_some() { Some(position) } else { retry };
            let Some((id, backend)) = lands.and_then(|at| members[at]) else { continue };
            match found.iter_mut().find(|(_, known, _)| *known == id) {
                Some((chance, ..)) => *chance += each,
                None => found.push((each, id, backend)),
            }
        }
        Ok(found)
    }
}

/// Whether a prefix of the trie contains what is asked.
fn contains(range: &SourceRangeKey, asked: SourceRange) -> bool {
    SourceRangeKey { prefix_len: range.prefix_len, range: asked }.masked() == range.masked()
}
