use kinesin_abi::{
    Be16, FLOW_HANDED_ON, FLOW_REDIRECT, FLOW_REPLY, TCP_SEEN_ACK, TCP_SEEN_FIN, TCP_SEEN_FIN_REPLY, TCP_SEEN_REPLY,
    TCP_SEEN_RST,
};

use super::*;

const NOW: u64 = 1_000_000 * SECOND;

fn entry(protocol: u8, flags: u8, tcp: u8, silent: u64) -> (FlowKey, FlowValue) {
    let key = FlowKey { proto: protocol, sport: Be16::new(1), dport: Be16::new(2), ..FlowKey::default() };
    (key, FlowValue { flags, tcp, last_seen: NOW - silent * SECOND, ..FlowValue::default() })
}

#[test]
fn each_state_has_its_timeout() {
    const ESTABLISHED: u8 = TCP_SEEN_REPLY | TCP_SEEN_ACK;
    let given =
        Timeouts { service_tcp: 300, service_any: 40, regular_tcp: 200, regular_any: 30, syn: 20, fin: 5, grace: 100 };
    // Protocol, flags, what was seen, limit.
    let cases = [
        (proto::UDP, 0, 0, 40),
        (proto::UDP, FLOW_REPLY, TCP_SEEN_REPLY, 40),
        (proto::UDP, FLOW_REDIRECT, 0, 30),
        (proto::TCP, 0, 0, 20),
        (proto::TCP, 0, TCP_SEEN_REPLY, 20),
        (proto::TCP, 0, ESTABLISHED, 300),
        (proto::TCP, FLOW_REDIRECT, ESTABLISHED, 200),
        (proto::TCP, 0, ESTABLISHED | TCP_SEEN_FIN, 300),
        (proto::TCP, 0, ESTABLISHED | TCP_SEEN_FIN_REPLY, 300),
        (proto::TCP, 0, ESTABLISHED | TCP_SEEN_FIN | TCP_SEEN_FIN_REPLY, 5),
        (proto::TCP, 0, TCP_SEEN_RST, 5),
        // Handed on: the client's half is all that is seen. It may close it and go on receiving.
        (proto::TCP, FLOW_HANDED_ON, ESTABLISHED, 300),
        (proto::TCP, FLOW_HANDED_ON, ESTABLISHED | TCP_SEEN_FIN, 100),
        (proto::TCP, FLOW_HANDED_ON, TCP_SEEN_FIN, 20),
        (proto::TCP, FLOW_HANDED_ON, ESTABLISHED | TCP_SEEN_RST, 5),
    ];
    for (protocol, flags, tcp, limit) in cases {
        let at = |silent| {
            let (key, value) = entry(protocol, flags, tcp, silent);
            look(&given, &key, &value, NOW)
        };
        assert_ne!(at(limit), Look::Silent, "{protocol} {flags} {tcp}");
        assert_eq!(at(limit + 1), Look::Silent, "{protocol} {flags} {tcp}");
    }
}

#[test]
fn only_established_connections_have_a_grace_period() {
    let timeouts = Timeouts::DEFAULT;
    let at = |tcp, silent| {
        let (key, value) = entry(proto::TCP, 0, tcp, silent);
        look(&timeouts, &key, &value, NOW)
    };
    assert_eq!(at(TCP_SEEN_REPLY | TCP_SEEN_ACK, 60), Look::Keep);
    assert_eq!(at(TCP_SEEN_REPLY | TCP_SEEN_ACK, 61), Look::SilentIfLeaving);
    assert_eq!(at(TCP_SEEN_REPLY, 60), Look::Keep);
    assert_eq!(at(TCP_SEEN_REPLY, 61), Look::Silent);
    for state in [BackendState::Free, BackendState::Terminating, BackendState::TerminatingNotServing] {
        assert!(is_leaving(state as u8), "{state:?}");
    }
    // A probe that fails for a moment is no reason to forget connections.
    for state in [BackendState::Active, BackendState::Maintenance] {
        assert!(!is_leaving(state as u8), "{state:?}");
    }
}

#[test]
fn settings_that_nobody_wrote_mean_the_defaults_and_the_future_is_not_silent() {
    let blank = Timeouts::default();
    for silent in [0, 10, 11, 60, 61, 8000, 8001] {
        for (protocol, tcp) in
            [(proto::UDP, 0), (proto::TCP, 0), (proto::TCP, TCP_SEEN_RST), (proto::TCP, TCP_SEEN_ACK)]
        {
            let (key, value) = entry(protocol, 0, tcp, silent);
            let default = look(&Timeouts::DEFAULT, &key, &value, NOW);
            assert_eq!(look(&blank, &key, &value, NOW), default);
        }
    }
    let (key, value) = entry(proto::UDP, 0, 0, 0);
    assert_eq!(look(&blank, &key, &value, 0), Look::Keep);
}

#[test]
fn passes_become_rarer_while_they_find_little_and_more_frequent_while_they_find_much() {
    let none = Intervals::default();
    let mut pace = Pace::default();
    assert_eq!(pace.interval(&none), Duration::from_secs(300));
    pace.passed(96, 4);
    assert_eq!(pace.interval(&none), Duration::from_secs(450));
    pace.passed(90, 10);
    assert_eq!(pace.interval(&none), Duration::from_secs(450));
    pace.passed(60, 40);
    assert_eq!(pace.interval(&none), Duration::from_secs(270));
    for _ in 0..40 {
        pace.passed(1000, 0);
    }
    assert_eq!(pace.interval(&none), Pace::MAX);
    let max = Intervals { max: Duration::from_secs(60), ..none };
    assert_eq!(pace.interval(&max), Duration::from_secs(60));
    for _ in 0..40 {
        pace.passed(0, 1000);
    }
    assert_eq!(pace.interval(&none), Pace::MIN);
    let fixed = Intervals { fixed: Duration::from_secs(77), max: Duration::from_secs(20) };
    assert_eq!(pace.interval(&fixed), Duration::from_secs(77));
    // An empty table is no reason to look often.
    pace.passed(0, 0);
    assert_eq!(pace.interval(&none), Duration::from_secs(15));
}

#[test]
fn tables_that_may_have_filled_up_are_looked_at_early_but_not_all_the_time() {
    let counts = |created, settled, unsettled| {
        let mut counts = Counts::default();
        counts.0[FlowCount::Created as usize] = created;
        counts.0[FlowCount::Settled as usize] = settled;
        counts.0[FlowCount::Unsettled as usize] = unsettled;
        counts
    };
    let last = counts(1000, 500, 7);
    let urgent = |seconds, now| Pace::is_urgent(Duration::from_secs(seconds), &last, &now, (400, 100));
    assert!(!urgent(3600, last));
    assert!(!urgent(3600, counts(1099, 599, 7)));
    assert!(urgent(10, counts(1100, 500, 7)));
    assert!(urgent(10, counts(1000, 600, 7)));
    assert!(urgent(10, counts(1000, 500, 8)));
    assert!(!urgent(9, counts(9999, 9999, 9999)));
    // Connections that begin and never go on: a quarter of what is theirs, half, and all of it again once it is written off.
    let opening = |opened: u64, written_off| {
        let mut counts = last;
        counts.0[FlowCount::Opened as usize] = 500 + opened;
        counts.0[FlowCount::WrittenOff as usize] = written_off;
        counts
    };
    assert_eq!(opening(12, 0).opening(), 12);
    assert!(!urgent(10, opening(12, 0)) && urgent(10, opening(25, 0)) && !urgent(9, opening(50, 0)));
    assert!(!urgent(10, opening(25, 20)));
    assert_eq!(opening(3, 5).opening(), 0);
}

#[test]
fn what_was_added_and_is_neither_removed_nor_there_was_forgotten() {
    let counts = Counts([1000, 100, 200, 0, 0, 0, 0]);
    assert_eq!(counts.forgotten(700, 800), 0);
    assert_eq!(counts.forgotten(600, 800), 0, "within what reading in the middle of traffic may be wrong by");
    assert_eq!(counts.forgotten(500, 800), 200);
    assert_eq!(counts.forgotten(5000, 800), 0);
}
