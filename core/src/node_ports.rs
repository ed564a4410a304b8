//! NodePorts and the ports that the kernel gives to the node's own connections: where both come from one range, a connection
//! may have a port that a Service is given later, and its answers would go to the Service.
//!
//! Deliberately absent: taking a range back. A port that was reserved in vain harms nobody, and whether it was us or the
//! node's owner who had it reserved cannot be told later.

use std::ops::RangeInclusive;

/// How the kernel's reserved ports (`net.ipv4.ip_local_reserved_ports`) stand to a range of NodePorts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reservation {
    /// No port of the range is given to connections.
    Apart,
    /// These are: to be reserved, the sysctl needs this value.
    Missing {
        /// What to write: all that was reserved before, and the range.
        value: String,
    },
}

/// Compares the range with `net.ipv4.ip_local_port_range` (`32768\t60999`) and what is reserved of it (`8080,9148-9200`,
/// or nothing).
///
/// # Errors
/// A text that is none of these, in words.
pub fn reservation(range: RangeInclusive<u16>, ephemeral: &str, reserved: &str) -> Result<Reservation, String> {
    let unclear = |name: &str, text: &str| format!("net.ipv4.{name} is not understood: {text:?}");
    let mut bounds = ephemeral.split_whitespace().map(str::parse::<u16>);
    let (Some(Ok(low)), Some(Ok(high)), None) = (bounds.next(), bounds.next(), bounds.next()) else {
        return Err(unclear("ip_local_port_range", ephemeral));
    };
    let mut kept = Vec::new();
    for item in reserved.split(',').map(str::trim).filter(|item| !item.is_empty()) {
        let (first, last) = item.split_once('-').unwrap_or((item, item));
        let (Ok(first), Ok(last)) = (first.parse::<u16>(), last.parse::<u16>()) else {
            return Err(unclear("ip_local_reserved_ports", reserved));
        };
        kept.push(first..=last);
    }
    let given = (*range.start()).max(low)..=(*range.end()).min(high);
    let mut given = given.into_iter();
    if given.all(|port| kept.iter().any(|kept| kept.contains(&port))) {
        return Ok(Reservation::Apart);
    }
    let own = format!("{}-{}", range.start(), range.end());
    let reserved = reserved.trim();
    let value = if reserved.is_empty() { own } else { format!("{reserved},{own}") };
    Ok(Reservation::Missing { value })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(ephemeral: &str, reserved: &str) -> Option<String> {
        match reservation(30000..=32767, ephemeral, reserved).expect("understood") {
            Reservation::Apart => None,
            Reservation::Missing { value } => Some(value),
        }
    }

    #[test]
    fn the_usual_ranges_do_not_meet() {
        assert_eq!(value("32768\t60999", ""), None);
        assert_eq!(value("1024\t29999", "8080"), None);
    }

    #[test]
    fn where_they_meet_the_range_joins_what_is_reserved() {
        assert_eq!(value("10240\t65535", "").as_deref(), Some("30000-32767"));
        assert_eq!(value("32767\t60999", "8080,9148-9200").as_deref(), Some("8080,9148-9200,30000-32767"));
        assert_eq!(value("1024\t30000", "30001-40000").as_deref(), Some("30001-40000,30000-32767"));
    }

    #[test]
    fn what_is_reserved_already_is_left_alone() {
        assert_eq!(value("10240\t65535", "30000-32767"), None);
        assert_eq!(value("10240\t65535", "30000-31000,31001,31002-40000"), None);
        assert_eq!(value("32760\t60999", "32760-32767"), None);
    }

    #[test]
    fn what_is_no_list_of_ports_is_an_error_and_nothing_is_written() {
        for (ephemeral, reserved) in [("", ""), ("1 2 3", ""), ("a b", ""), ("1024 65535", "x"), ("1024 65535", "1-")] {
            let error = reservation(30000..=32767, ephemeral, reserved).expect_err("not understood");
            assert!(error.contains("net.ipv4.ip_local_"), "{error}");
        }
    }
}
