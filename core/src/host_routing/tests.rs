use super::*;

fn chain(family: u8, hook: u32) -> Chain {
    Chain { family: Family::from_number(family), table: "t".into(), name: "c".into(), hook, rules: 1, drops: false }
}

/// Why packets go by the stack.
fn why(seen: Seen) -> Option<String> {
    let routing = decide(None, &seen);
    assert_eq!(routing.straight, routing.why.is_none(), "{routing:?}");
    assert!(!routing.said);
    routing.why
}

fn with(chain: Chain) -> Seen {
    Seen { chains: vec![chain], ..Seen::default() }
}

#[test]
fn with_nobody_in_the_stack_packets_go_straight() {
    assert_eq!(why(Seen::default()), None);
}

#[test]
fn what_the_configuration_says_is_not_weighed() {
    let mut seen = with(chain(2, 2));
    seen.devices = vec![Through { ifindex: 7, to: LeadsTo::Pod, filters: true, programs: Vec::new() }];
    for (legacy, straight) in [(true, false), (false, true)] {
        let said = HostRouting { straight, said: true, ..HostRouting::default() };
        assert_eq!(decide(Some(legacy), &seen), said);
    }
}

#[test]
fn chains_that_forwarded_packets_pass_are_named_with_their_hook() {
    let texts = [
        (2, 0, "nftables: ip t c (hook prerouting)"),
        (10, 2, "nftables: ip6 t c (hook forward)"),
        (1, 4, "nftables: inet t c (hook postrouting)"),
        (1, 5, "nftables: inet t c (hook ingress)"),
        (5, 0, "nftables: netdev t c (hook ingress)"),
        (5, 1, "nftables: netdev t c (hook egress)"),
    ];
    for (family, hook, text) in texts {
        assert_eq!(why(with(chain(family, hook))).as_deref(), Some(text));
        let empty = Chain { rules: 0, ..chain(family, hook) };
        assert_eq!(why(with(empty.clone())), None, "{text}, without rules");
        assert_eq!(why(with(Chain { drops: true, ..empty })).as_deref(), Some(text), "and a policy of drop");
    }
    // A hook that is not known yet is on the way, as far as one can tell.
    assert_eq!(why(with(chain(1, 9))).as_deref(), Some("nftables: inet t c (hook unknown)"));
}

#[test]
fn chains_of_the_host_itself_and_of_bridges_do_not_matter() {
    for (family, hooks) in [(2, [1, 3]), (10, [1, 3]), (1, [1, 3]), (7, [0, 2]), (3, [0, 1])] {
        for hook in hooks {
            assert_eq!(why(with(Chain { drops: true, ..chain(family, hook) })), None, "family {family}, hook {hook}");
        }
    }
}

#[test]
fn the_first_chain_that_matters_is_named() {
    let chains = vec![chain(1, 1), Chain { name: "second".into(), ..chain(1, 2) }, chain(1, 4)];
    let found = why(Seen { chains, policies: true, ..Seen::default() });
    assert_eq!(found.as_deref(), Some("nftables: inet t second (hook forward)"));
}

#[test]
fn legacy_tables_ipsec_and_what_cannot_be_told_go_by_the_stack() {
    let table = |v6, name: &str| LegacyTable { v6, name: name.into() };
    let mut seen = Seen { unclear: vec!["nftables cannot be read: no".into()], ..Seen::default() };
    assert_eq!(why(seen.clone()).as_deref(), Some("nftables cannot be read: no"));
    seen.policies = true;
    assert_eq!(why(seen.clone()).as_deref(), Some("IPsec policies"));
    seen.legacy = vec![table(true, "nat"), table(false, "filter")];
    assert_eq!(why(seen.clone()).as_deref(), Some("ip6tables: table nat"));
    seen.legacy.remove(0);
    assert_eq!(why(seen).as_deref(), Some("iptables: table filter"));
}

#[test]
fn devices_with_programs_of_others_are_passed_by_the_stack_and_the_rest_is_not() {
    const OURS: u32 = 70;
    const ALSO_OURS: u32 = 71;
    const SOMEBODYS: u32 = 9;
    let device = |ifindex, to, filters, programs: &[u32]| Through { ifindex, to, filters, programs: programs.to_vec() };
    let devices = vec![
        device(1, LeadsTo::Pod, false, &[]),
        device(2, LeadsTo::Pod, true, &[]),
        device(3, LeadsTo::Pod, false, &[OURS, ALSO_OURS]),
        device(4, LeadsTo::Pod, false, &[OURS, SOMEBODYS]),
        device(5, LeadsTo::Pod, true, &[OURS]),
        device(6, LeadsTo::Lan, true, &[OURS, ALSO_OURS]),
        device(7, LeadsTo::Lan, false, &[OURS, SOMEBODYS]),
    ];
    let routing = decide(None, &Seen { devices, ours: BTreeSet::from([OURS, ALSO_OURS]), ..Seen::default() });
    // One that nobody has looked at yet is not gone through either.
    let straight: Vec<u32> = (1..=8).filter(|ifindex| routing.goes_straight(*ifindex)).collect();
    assert_eq!(straight, [1, 3, 6]);
    assert!(!HostRouting::default().goes_straight(1));
    assert!(decide(Some(false), &Seen::default()).goes_straight(8));
}
