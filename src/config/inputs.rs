//! Where settings are written: a directory with one file per key, the environment, flags. This is the only part of the
//! configuration that reads anything; it hands over text.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::{keys, known};

/// Everything that a configuration is made from. Loading it again reads the directory again.
#[derive(Clone, Debug, Default)]
pub struct Inputs {
    /// `--config-dir`: one file per key, as a ConfigMap is mounted.
    pub config_dir: Option<PathBuf>,
    /// The process's environment.
    pub env: BTreeMap<String, String>,
    /// Flags, key and value, in the order given; the last of a key counts.
    pub flags: Vec<(String, String)>,
    /// The host's name, used where `K8S_NODE_NAME` is not set.
    pub hostname: String,
}

impl Inputs {
    /// With the environment and the name of this process's host.
    pub fn from_process(config_dir: Option<PathBuf>, flags: Vec<(String, String)>) -> Self {
        // Variables that are not UTF-8 can be none of ours.
        let env = std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)));
        let hostname = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let mut inputs = Self { config_dir, env: env.collect(), flags, hostname };
        if inputs.config_dir.is_none() {
            let dir = PREFIXES.iter().find_map(|prefix| inputs.env.get(&format!("{prefix}CONFIG_DIR")));
            inputs.config_dir = dir.filter(|dir| !dir.is_empty()).map(PathBuf::from);
        }
        inputs
    }
}

/// Prefixes of environment variables, the preferred one first.
const PREFIXES: [&str; 2] = ["KINESIN_", "CILIUM_"];

/// Longest value worth reading, bytes; ConfigMaps end at 1 MiB.
const VALUE_MAX: u64 = 1 << 20;

/// A value as text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Raw {
    pub(super) value: String,
    /// File, environment variable or flag.
    pub(super) source: String,
}

/// What was written, after precedence.
#[derive(Debug, Default)]
pub(super) struct Written {
    /// By canonical name; also keys without effect and unknown ones.
    pub(super) keys: BTreeMap<String, Raw>,
    /// What could not be read.
    pub(super) warnings: Vec<String>,
}

/// Reads all inputs: config dir < environment < flags.
///
/// # Errors
/// When the config dir cannot be read; the message names it. The rest is in `Written` nevertheless.
pub(super) fn read(inputs: &Inputs) -> (Written, Option<String>) {
    let mut written = Written::default();
    let mut failure = None;
    if let Some(dir) = &inputs.config_dir {
        match read_dir(dir, &mut written.warnings) {
            Ok(files) => add(&mut written, files),
            Err(error) => failure = Some(format!("config-dir {} cannot be read: {error}", dir.display())),
        }
    }
    let env = read_env(&inputs.env);
    add(&mut written, env);
    let flags = inputs
        .flags
        .iter()
        .map(|(key, value)| (key.clone(), Raw { value: value.trim().to_string(), source: format!("flag --{key}") }));
    // Unlike files, a flag given twice is on purpose: the last one counts.
    let flags: BTreeMap<_, _> = flags.collect();
    add(&mut written, flags.into_iter().collect());
    (written, failure)
}

/// Adds a layer over what is there. Within the layer a key's own name wins over its alias.
fn add(written: &mut Written, layer: Vec<(String, Raw)>) {
    let names: Vec<String> = layer.iter().map(|(name, _)| name.clone()).collect();
    for (name, raw) in layer {
        let key = match keys::find(&name) {
            Some(key) if key.name != name => {
                if names.iter().any(|other| other == key.name) {
                    written.warnings.push(format!("{name} ({}) is ignored: {} is set too", raw.source, key.name));
                    continue;
                }
                written.warnings.push(format!("{name} ({}) is an old name: write {}", raw.source, key.name));
                key.name.to_string()
            }
            _ => name,
        };
        written.keys.insert(key, raw);
    }
}

/// Reads one file per key. Kubernetes swaps the whole directory behind the link `..data`: the files are read through
/// one resolution of it, so that all of them are of one generation.
fn read_dir(dir: &Path, warnings: &mut Vec<String>) -> io::Result<Vec<(String, Raw)>> {
    for _ in 0..100 {
        match read_once(dir, warnings) {
            // The generation was removed while we read it: there is a newer one.
            Err(error) if error.kind() == io::ErrorKind::NotFound && dir.exists() => warnings.clear(),
            other => return other,
        }
    }
    read_once(dir, warnings)
}

fn read_once(dir: &Path, warnings: &mut Vec<String>) -> io::Result<Vec<(String, Raw)>> {
    let data = generation(dir)?;
    let mut files = Vec::new();
    for entry in fs::read_dir(&data)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        // Dot files are Kubernetes' own (`..data`) or an editor's.
        if name.starts_with('.') || name.ends_with('~') {
            continue;
        }
        let meta = fs::metadata(entry.path())?;
        if !meta.is_file() {
            continue;
        }
        let source = dir.join(&name).display().to_string();
        if meta.len() > VALUE_MAX {
            warnings.push(format!("{source} is ignored: larger than {VALUE_MAX} bytes"));
            continue;
        }
        match String::from_utf8(fs::read(entry.path())?) {
            Ok(text) => files.push((name, Raw { value: text.trim().to_string(), source })),
            Err(_) => warnings.push(format!("{source} is ignored: not UTF-8 text")),
        }
    }
    // A generation that is being removed lists fewer and fewer files without any error.
    if generation(dir)? != data {
        return Err(io::ErrorKind::NotFound.into());
    }
    files.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(files)
}

/// Where the files of the present generation are: behind `..data`, or the directory itself where there is no such link.
fn generation(dir: &Path) -> io::Result<PathBuf> {
    match fs::read_link(dir.join("..data")) {
        Ok(_) => fs::canonicalize(dir.join("..data")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(dir.to_path_buf()),
        Err(error) => Err(error),
    }
}

/// Reads the variables that name a key. Kubernetes adds variables for Services (`KINESIN_SERVICE_HOST`), so one that
/// names no key counts as a mistake only with our own prefix and when it almost names one.
fn read_env(env: &BTreeMap<String, String>) -> Vec<(String, Raw)> {
    let mut found = BTreeMap::new();
    for prefix in PREFIXES.iter().rev() {
        for (variable, value) in env {
            let Some(rest) = variable.strip_prefix(prefix) else { continue };
            let name = rest.to_lowercase().replace('_', "-");
            let known = keys::find(&name).is_some() || known::is_without_effect(&name);
            let typo = || prefix == &PREFIXES[0] && nearest(&name).is_some_and(|(_, distance)| distance <= 2);
            if known || typo() {
                let raw = Raw { value: value.trim().to_string(), source: format!("environment variable {variable}") };
                found.insert(name, raw);
            }
        }
    }
    found.into_iter().collect()
}

/// The known key nearest to `name` and how many edits it is away; `None` when nothing is near.
pub(super) fn nearest(name: &str) -> Option<(&'static str, usize)> {
    let limit = (name.len() / 4).clamp(2, 6);
    let names = keys::all().map(|key| key.name).chain(known::WITHOUT_EFFECT.iter().copied());
    // Keys with an effect come first, and `min_by_key` keeps the first of equals.
    names.map(|known| (known, distance(name, known))).min_by_key(|(_, d)| *d).filter(|(_, d)| *d <= limit)
}

/// Edits (insert, delete, replace, swap neighbours) that turn `a` into `b`.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows: [Vec<usize>; 3] = [vec![0; b.len() + 1], vec![0; b.len() + 1], (0..=b.len()).collect()];
    for i in 1..=a.len() {
        rows.rotate_left(1);
        rows[2][0] = i;
        for j in 1..=b.len() {
            let replaced = rows[1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = replaced.min(rows[1][j] + 1).min(rows[2][j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[0][j - 2] + 1);
            }
            rows[2][j] = best;
        }
    }
    rows[2][b.len()]
}
