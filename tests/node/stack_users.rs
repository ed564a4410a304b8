//! Who is found in a namespace's stack, and at its devices, as nft, iptables, ip and tc have put it there.

use std::process::Command;
use std::time::{Duration, Instant};

use crate::bpf::{self, Foreign};
use kinesin::datapath::programs_at;
use kinesin::net::netfilter::{RuleChanges, StackUsers};
use kinesin::net::{Netns, qdiscs};

use super::LIMIT;

fn netns(name: &str) -> Netns {
    Netns::create(&format!("kinesin-test-{name}-{}", std::process::id())).unwrap()
}

/// Runs a command, of words, in the namespace.
fn run(netns: &Netns, command: &str) {
    let words: Vec<&str> = command.split_whitespace().collect();
    let output = netns.run(|| Command::new(words[0]).args(&words[1..]).output()).unwrap();
    let output = output.unwrap_or_else(|error| panic!("{command}: {error}"));
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Who needs the stack, for somebody who looks for the first time.
fn user(netns: &Netns) -> Option<String> {
    netns.run(|| StackUsers::default().look().needs_stack()).unwrap()
}

#[test]
fn chains_of_nftables_that_forwarded_packets_pass_are_found_and_no_others() {
    let netns = netns("nft");
    assert_eq!(user(&netns), None, "an empty namespace");
    let nft = |command: &str| run(&netns, &format!("nft {command}"));
    nft("add table inet t");
    nft("add chain inet t in { type filter hook input priority 0; policy drop; }");
    nft("add rule inet t in counter accept");
    assert_eq!(user(&netns), None, "what is for the host itself");
    nft("add chain inet t f { type filter hook forward priority 0; }");
    nft("add chain inet t other");
    nft("add rule inet t other drop");
    assert_eq!(user(&netns), None, "no rules in it");
    nft("add rule inet t f counter");
    assert_eq!(user(&netns).as_deref(), Some("nftables: inet t f (hook forward)"));
    nft("flush chain inet t f");
    assert_eq!(user(&netns), None, "no rules any more");
    nft("chain inet t f { policy drop; }");
    assert_eq!(user(&netns).as_deref(), Some("nftables: inet t f (hook forward)"));
    nft("flush ruleset");
    assert_eq!(user(&netns), None);

    let chains = [
        ("inet", "nat hook postrouting priority 100;", "masquerade", "postrouting"),
        ("ip", "nat hook prerouting priority -100;", "counter", "prerouting"),
        ("ip6", "filter hook forward priority 0;", "counter", "forward"),
        ("netdev", "filter hook ingress device lo priority 0;", "counter", "ingress"),
    ];
    for (family, base, rule, hook) in chains {
        nft(&format!("add table {family} t"));
        nft(&format!("add chain {family} t c {{ type {base} }}"));
        nft(&format!("add rule {family} t c {rule}"));
        assert_eq!(user(&netns), Some(format!("nftables: {family} t c (hook {hook})")));
        nft("flush ruleset");
        assert_eq!(user(&netns), None);
    }
    for (family, hook) in [("bridge", "forward"), ("arp", "input")] {
        nft(&format!("add table {family} t"));
        nft(&format!("add chain {family} t c {{ type filter hook {hook} priority 0; policy drop; }}"));
        nft(&format!("add rule {family} t c counter"));
        assert_eq!(user(&netns), None, "{family}");
    }
}

#[test]
fn tables_of_iptables_are_found() {
    let netns = netns("iptables");
    run(&netns, "ip6tables-legacy -t nat -L -n");
    assert_eq!(user(&netns).as_deref(), Some("ip6tables: table nat"));
    run(&netns, "iptables-legacy -t filter -L -n");
    assert_eq!(user(&netns).as_deref(), Some("iptables: table filter"));
    let netns = self::netns("iptables-nft");
    run(&netns, "iptables-nft -A FORWARD -j ACCEPT");
    assert_eq!(user(&netns).as_deref(), Some("nftables: ip filter FORWARD (hook forward)"));
}

#[test]
fn ipsec_policies_are_found() {
    let netns = netns("xfrm");
    run(&netns, "ip xfrm policy add src 192.0.2.0/24 dst 198.51.100.0/24 dir fwd action allow");
    assert_eq!(user(&netns).as_deref(), Some("IPsec policies"));
    run(&netns, "ip xfrm policy flush");
    assert_eq!(user(&netns), None);
}

#[test]
fn the_last_of_thousands_of_chains_is_found_too() {
    let netns = netns("chains");
    let mut rules = "add table ip t\n".to_owned();
    for number in 0..5000 {
        rules += &format!("add chain ip t c{number}\n");
    }
    rules += "add chain ip t last { type filter hook forward priority 0; policy drop; }\n";
    let file = std::env::temp_dir().join(netns.name());
    std::fs::write(&file, rules).unwrap();
    run(&netns, &format!("nft -f {}", file.display()));
    std::fs::remove_file(file).unwrap();
    assert_eq!(user(&netns).as_deref(), Some("nftables: ip t last (hook forward)"));
}

#[tokio::test]
async fn a_change_of_rules_is_told_once_and_at_once() {
    let netns = netns("rules");
    let mut changes = netns.run(RuleChanges::open).unwrap().unwrap();
    for command in ["nft add table inet t", "nft delete table inet t"] {
        run(&netns, command);
        tokio::time::timeout(LIMIT, changes.next()).await.expect("told").unwrap();
    }
    let more = tokio::time::timeout(Duration::from_millis(50), changes.next()).await;
    assert!(more.is_err(), "nothing has changed: {more:?}");
}

#[test]
fn filters_and_programs_at_devices_are_found() {
    let netns = netns("filters");
    run(&netns, "ip link add d1 type veth peer name d2");
    run(&netns, "ip link add d3 type veth peer name d4");
    run(&netns, "tc qdisc add dev d2 clsact");
    run(&netns, "tc qdisc add dev d3 ingress");
    run(&netns, "tc qdisc add dev d4 root pfifo");
    netns
        .run(|| {
            let index = |name: &str| nix::net::if_::if_nametoindex(name).unwrap();
            let found: Vec<u32> = qdiscs::with_filters().unwrap().into_iter().collect();
            assert_eq!(found, [index("d2"), index("d3")]);
            assert!(programs_at(index("d1")).unwrap().is_none_or(|ids| ids.is_empty()));
            assert!(programs_at(9999).unwrap().is_none_or(|ids| ids.is_empty()), "one that has gone");
            if bpf::has_tcx() {
                let program = Foreign::load(bpf::SCHED_CLS, 0, bpf::NEXT);
                for hook in [bpf::TCX_INGRESS, bpf::TCX_EGRESS] {
                    program.attach(index("d1"), hook, 0).unwrap();
                    assert_eq!(programs_at(index("d1")).unwrap().unwrap(), [program.id]);
                    program.detach(index("d1"), hook);
                }
            }
        })
        .unwrap();
}

/// What the agent does every second costs next to nothing: told, and held against a bound that only a mistake exceeds.
#[test]
fn a_look_takes_microseconds() {
    const LOOKS: u32 = 200;
    let netns = netns("cost");
    let each = netns
        .run(|| {
            let mut users = StackUsers::default();
            users.look();
            let begun = Instant::now();
            for _ in 0..LOOKS {
                assert_eq!(users.look().needs_stack(), None);
                qdiscs::with_filters().unwrap();
            }
            begun.elapsed() / LOOKS
        })
        .unwrap();
    println!("a look without devices: {each:?}");
    assert!(each < Duration::from_millis(20), "{each:?}");
}
