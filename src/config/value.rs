//! Types of keys: how a value is read from text into its place in a [`Config`], and written back.
//!
//! Reading what was written back gives the same value; a test proves it for every key.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;

use super::model::{Choice, Config, ListenAddr, LogLevel, MaglevSeed, PortRange, Ratio};

/// A place in a [`Config`].
pub(super) type At<T> = fn(&mut Config) -> &mut T;

/// The type of a key and where its value goes.
pub(super) enum Kind {
    /// Go's `ParseBool` spellings.
    Bool(At<bool>),
    /// A bool that may be left to another key, or to the agent (empty).
    OptionalBool(At<Option<bool>>),
    /// A whole number within bounds, both inclusive.
    Int { min: u32, max: u32, at: At<u32> },
    /// One of a few numbers.
    OneOf { options: &'static [u32], at: At<u32> },
    /// A decimal number above 0.
    Rate(At<f32>),
    /// A decimal number from 0 to 1.
    Ratio(At<Ratio>),
    /// Go's duration syntax; not negative.
    Duration(At<Duration>),
    /// One of a few words.
    Choice(At<dyn Choice>),
    /// A log level or nothing.
    Level(At<Option<LogLevel>>),
    /// Any text.
    Text(At<String>),
    /// A path; empty only where `optional`.
    Path { optional: bool, at: At<PathBuf> },
    /// Words separated by spaces or commas.
    Words(At<Vec<String>>),
    /// `http://` and `https://` addresses.
    Urls(At<Vec<String>>),
    /// Networks in CIDR notation; a single address stands for itself.
    Cidrs(At<Vec<IpNet>>),
    /// `host:port`, `:port`, or empty for off.
    Listen(At<Option<ListenAddr>>),
    /// `first,last`
    Ports(At<PortRange>),
    /// Base64 of 12 bytes.
    Seed(At<MaglevSeed>),
}

/// The highest port of `node-port-range`: source NAT takes its ports from above it and wants at least 1,024.
const NODE_PORT_LAST: u16 = u16::MAX - 1024;

impl Kind {
    /// What may be written, for messages and documentation.
    pub(super) fn allowed(&self) -> String {
        match self {
            Self::Bool(_) => "true or false".into(),
            Self::OptionalBool(_) => "true, false or empty".into(),
            Self::Int { min, max, .. } => format!("a whole number from {min} to {max}"),
            Self::OneOf { options, .. } => {
                format!("one of {}", options.iter().map(u32::to_string).collect::<Vec<_>>().join(", "))
            }
            Self::Rate(_) => "a number above 0".into(),
            Self::Ratio(_) => "a number from 0 to 1".into(),
            Self::Duration(_) => "a duration such as 500ms, 15s or 1m30s".into(),
            Self::Choice(at) => format!("one of {}", at(&mut Config::default()).options().join(", ")),
            Self::Level(_) => format!("one of {}, or empty", LogLevel::Info.options().join(", ")),
            Self::Text(_) => "text".into(),
            Self::Path { optional: true, .. } => "an absolute path, or empty".into(),
            Self::Path { optional: false, .. } => "an absolute path".into(),
            Self::Words(_) => "a list separated by spaces or commas".into(),
            Self::Urls(_) => "a list of http:// or https:// addresses separated by spaces or commas".into(),
            Self::Cidrs(_) => "a list of networks such as 192.168.0.0/16, separated by spaces or commas".into(),
            Self::Listen(_) => "an address and port such as 0.0.0.0:10256 or :9962, or empty for off".into(),
            Self::Ports(_) => format!("two ports such as 30000,32767, the last one at most {NODE_PORT_LAST}"),
            Self::Seed(_) => "12 bytes in base64 (16 characters)".into(),
        }
    }

    /// Short name of the type, as a flag's placeholder.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Bool(_) | Self::OptionalBool(_) => "BOOL",
            Self::Int { .. } | Self::OneOf { .. } => "NUMBER",
            Self::Rate(_) | Self::Ratio(_) => "DECIMAL",
            Self::Duration(_) => "DURATION",
            Self::Choice(_) | Self::Level(_) => "WORD",
            Self::Text(_) => "TEXT",
            Self::Path { .. } => "PATH",
            Self::Words(_) => "LIST",
            Self::Urls(_) => "URLS",
            Self::Cidrs(_) => "CIDRS",
            Self::Listen(_) => "ADDRESS",
            Self::Ports(_) => "PORTS",
            Self::Seed(_) => "BASE64",
        }
    }

    /// The spellings of a closed type, in order.
    pub(super) fn options(&self) -> Option<Vec<String>> {
        match self {
            Self::Bool(_) => Some(vec!["true".into(), "false".into()]),
            Self::Choice(at) => Some(at(&mut Config::default()).options().iter().map(ToString::to_string).collect()),
            Self::OneOf { options, .. } => Some(options.iter().map(u32::to_string).collect()),
            _ => None,
        }
    }

    /// Whether an empty value is a value. Where it is not, an empty value means that the key is not set, as charts
    /// write it.
    pub(super) fn takes_empty(&self) -> bool {
        match self {
            Self::Bool(_) | Self::Int { .. } | Self::OneOf { .. } | Self::Rate(_) | Self::Duration(_) => false,
            Self::Ratio(_) | Self::Choice(_) | Self::Ports(_) | Self::Seed(_) | Self::Path { optional: false, .. } => {
                false
            }
            Self::OptionalBool(_) | Self::Level(_) | Self::Text(_) | Self::Path { .. } | Self::Words(_) => true,
            Self::Urls(_) | Self::Cidrs(_) | Self::Listen(_) => true,
        }
    }

    /// Reads `text` into its place; false, and nothing changed, when it is not what [`Kind::allowed`] says.
    pub(super) fn set(&self, text: &str, config: &mut Config) -> bool {
        fn put<T>(value: Option<T>, at: At<T>, config: &mut Config) -> bool {
            value.map(|value| *at(config) = value).is_some()
        }
        match self {
            Self::Bool(at) => put(parse_bool(text), *at, config),
            Self::OptionalBool(at) => {
                put(if text.is_empty() { Some(None) } else { parse_bool(text).map(Some) }, *at, config)
            }
            Self::Int { min, max, at } => put(text.parse().ok().filter(|n| (min..=max).contains(&n)), *at, config),
            Self::OneOf { options, at } => put(text.parse().ok().filter(|n| options.contains(n)), *at, config),
            Self::Rate(at) => put(text.parse().ok().filter(|n: &f32| n.is_finite() && *n > 0.0), *at, config),
            Self::Ratio(at) => put(ratio(text), *at, config),
            Self::Duration(at) => put(parse_duration(text), *at, config),
            Self::Choice(at) => at(config).choose(text),
            Self::Level(at) => {
                let mut level = LogLevel::Info;
                let read = if text.is_empty() { Some(None) } else { level.choose(text).then_some(Some(level)) };
                put(read, *at, config)
            }
            Self::Text(at) => put(Some(text.to_string()), *at, config),
            Self::Path { optional, at } => {
                let good = text.starts_with('/') || (*optional && text.is_empty());
                put(good.then(|| PathBuf::from(text)), *at, config)
            }
            Self::Words(at) => put(Some(words(text).map(String::from).collect()), *at, config),
            Self::Urls(at) => put(words(text).map(url).collect(), *at, config),
            Self::Cidrs(at) => put(words(text).map(cidr).collect(), *at, config),
            Self::Listen(at) => put(if text.is_empty() { Some(None) } else { listen(text).map(Some) }, *at, config),
            Self::Ports(at) => put(ports(text), *at, config),
            Self::Seed(at) => put(seed(text), *at, config),
        }
    }

    /// The value as text that [`Kind::set`] reads. (`config` is only read; places are reached mutably.)
    pub(super) fn show(&self, config: &mut Config) -> String {
        match self {
            Self::Bool(at) => at(config).to_string(),
            Self::OptionalBool(at) => at(config).map(|b| b.to_string()).unwrap_or_default(),
            Self::Int { at, .. } | Self::OneOf { at, .. } => at(config).to_string(),
            Self::Rate(at) => at(config).to_string(),
            Self::Ratio(at) => (f64::from(at(config).0) / 1e6).to_string(),
            Self::Duration(at) => format_duration(*at(config)),
            Self::Choice(at) => at(config).spelling().into(),
            Self::Level(at) => at(config).map(|l| l.to_string()).unwrap_or_default(),
            Self::Text(at) => at(config).clone(),
            Self::Path { at, .. } => at(config).display().to_string(),
            Self::Words(at) | Self::Urls(at) => at(config).join(" "),
            Self::Cidrs(at) => at(config).iter().map(IpNet::to_string).collect::<Vec<_>>().join(" "),
            Self::Listen(at) => at(config).map(|l| l.to_string()).unwrap_or_default(),
            Self::Ports(at) => {
                let range = at(config);
                format!("{},{}", range.first, range.last)
            }
            Self::Seed(at) => at(config).text.clone(),
        }
    }
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| c == ',' || c.is_whitespace()).filter(|word| !word.is_empty())
}

/// The spellings of Go's `strconv.ParseBool`.
fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

/// Go's duration syntax (`time.ParseDuration`): numbers with a unit, `1h2m3.5s`; a bare `0` needs none. Negative
/// durations have no use here and are refused.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    if rest == "0" {
        return Some(Duration::ZERO);
    }
    if rest.is_empty() {
        return None;
    }
    let mut nanos: u128 = 0;
    while !rest.is_empty() {
        let split = rest.find(|c: char| !(c.is_ascii_digit() || c == '.'))?;
        let (number, tail) = rest.split_at(split);
        let end = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(end);
        let scale: u128 = match unit {
            "ns" => 1,
            "us" | "µs" | "μs" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            _ => return None,
        };
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') || fraction.len() > 18 {
            return None;
        }
        let whole: u128 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
        nanos = nanos.checked_add(whole.checked_mul(scale)?)?;
        if !fraction.is_empty() {
            nanos = nanos.checked_add(fraction.parse::<u128>().ok()? * scale / 10u128.pow(fraction.len() as u32))?;
        }
        rest = tail;
    }
    // Go's durations end at 2^63 ns, some 292 years.
    (nanos <= i64::MAX as u128).then(|| Duration::from_nanos(nanos as u64))
}

/// The shortest text that [`parse_duration`] reads as `duration`: `1m30s`, `500ms`.
pub fn format_duration(duration: Duration) -> String {
    let mut rest = duration.as_nanos();
    if rest == 0 {
        return "0s".into();
    }
    let mut out = String::new();
    let units = [
        ("h", 3_600_000_000_000),
        ("m", 60_000_000_000),
        ("s", 1_000_000_000),
        ("ms", 1_000_000),
        ("us", 1_000),
        ("ns", 1),
    ];
    for (unit, scale) in units {
        if rest >= scale {
            // Writing to a String cannot fail.
            let _ = write!(out, "{}{unit}", rest / scale);
            rest %= scale;
        }
    }
    out
}

fn url(text: &str) -> Option<String> {
    let uri: http::Uri = text.parse().ok()?;
    (matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some_and(|h| !h.is_empty()))
        .then(|| text.to_string())
}

fn cidr(text: &str) -> Option<IpNet> {
    // Host bits say nothing here; two spellings of one network are one value.
    text.parse::<IpNet>().map(|net| net.trunc()).ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))
}

fn listen(text: &str) -> Option<ListenAddr> {
    if let Some(port) = text.strip_prefix(':') {
        return Some(ListenAddr { ip: None, port: port.parse().ok()? });
    }
    if let Some(port) = text.strip_prefix("localhost:") {
        return Some(ListenAddr { ip: Some(Ipv4Addr::LOCALHOST.into()), port: port.parse().ok()? });
    }
    let addr: SocketAddr = text.parse().ok()?;
    Some(ListenAddr { ip: Some(addr.ip()), port: addr.port() })
}

fn ratio(text: &str) -> Option<Ratio> {
    let share: f64 = text.parse().ok()?;
    (0.0..=1.0).contains(&share).then(|| Ratio((share * 1e6).round() as u32))
}

fn ports(text: &str) -> Option<PortRange> {
    let (first, last) = text.split_once([',', '-'])?;
    let range = PortRange { first: first.trim().parse().ok()?, last: last.trim().parse().ok()? };
    (range.first > 0 && range.first <= range.last && range.last <= NODE_PORT_LAST).then_some(range)
}

fn seed(text: &str) -> Option<MaglevSeed> {
    let digits: Vec<u32> = text
        .bytes()
        .map(|b| match b {
            b'A'..=b'Z' => Some(b - b'A'),
            b'a'..=b'z' => Some(b - b'a' + 26),
            b'0'..=b'9' => Some(b - b'0' + 52),
            b'+' => Some(62),
            b'/' => Some(63),
            _ => None,
        })
        .map(|digit| digit.map(u32::from))
        .collect::<Option<_>>()?;
    if digits.len() != 16 {
        return None;
    }
    let mut bytes = [0; 12];
    for (group, out) in digits.chunks(4).zip(bytes.chunks_mut(3)) {
        let word = group.iter().fold(0, |word, digit| word << 6 | digit);
        out.copy_from_slice(&word.to_be_bytes()[1..]);
    }
    Some(MaglevSeed { bytes, text: text.into() })
}
