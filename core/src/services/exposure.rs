//! Annotations that say on which nodes, and by which kind of address, a Service is served.

use kinesin_abi::FrontendKind;
use smol_str::SmolStr;

use super::NodeContext;
use super::problems::Problems;
use crate::objects::Service;
use crate::selector::{LabelSelector, Requirement};

/// The only kind of frontend to serve; external IPs are served in any case.
const TYPE: &str = "service.cilium.io/type";
/// The value that this node's label of the same name must have.
const NODE: &str = "service.cilium.io/node";
/// A label selector, as `kubectl -l` takes it, that this node's labels must match; wins over [`NODE`].
const NODE_SELECTOR: &str = "service.cilium.io/node-selector";

/// Whether this node serves the Service. A selector that cannot be read selects no node, because whoever wrote one meant
/// to leave some out.
pub(super) fn on_this_node(service: &Service, node: &NodeContext, problems: &mut Problems) -> bool {
    let annotations = &service.metadata.annotations;
    if let Some(text) = annotations.get(NODE_SELECTOR) {
        return match parse(text) {
            Ok(selector) => selector.matches_labels(&node.labels),
            Err(reason) => {
                problems.note(format!(
                    "metadata.annotations[{NODE_SELECTOR}]: \"{text}\" {reason}, so no node serves the Service; write it like `zone=a,tier in (edge,core)`"
                ));
                false
            }
        };
    }
    annotations.get(NODE).is_none_or(|value| node.labels.get(NODE) == Some(value))
}

/// The only kind of frontend to serve besides external IPs, if the Service says so.
pub(super) fn only_kind(service: &Service, problems: &mut Problems) -> Option<FrontendKind> {
    match service.metadata.annotations.get(TYPE)?.as_str() {
        "ClusterIP" => Some(FrontendKind::ClusterIp),
        "NodePort" => Some(FrontendKind::NodePort),
        "LoadBalancer" => Some(FrontendKind::LoadBalancer),
        other => {
            problems.note(format!(
                "metadata.annotations[{TYPE}]: \"{other}\" is unknown and ignored; use ClusterIP, NodePort or LoadBalancer"
            ));
            None
        }
    }
}

/// Reads a selector as `kubectl -l` takes it: `a=b`, `a==b`, `a!=b`, `a in (b,c)`, `a notin (b,c)`, `a`, `!a`, separated
/// by commas. An empty one selects everything.
fn parse(text: &str) -> Result<LabelSelector, &'static str> {
    let mut selector = LabelSelector::default();
    let mut rest = text.trim();
    while !rest.is_empty() {
        let open = rest.find('(').filter(|open| rest.find(',').is_none_or(|comma| *open < comma));
        let end = match open {
            Some(open) => open + rest[open..].find(')').ok_or("has a list without an end")? + 1,
            None => rest.find(',').unwrap_or(rest.len()),
        };
        selector.match_expressions.push(requirement(rest[..end].trim())?);
        rest = rest[end..].trim_start();
        if let Some(more) = rest.strip_prefix(',') {
            rest = more.trim_start();
            if rest.is_empty() {
                return Err("ends with a comma");
            }
        } else if !rest.is_empty() {
            return Err("has something behind a list");
        }
    }
    selector.validate().map_err(|_| "has an empty list")?;
    Ok(selector)
}

fn requirement(text: &str) -> Result<Requirement, &'static str> {
    let (key, operator, values) = if let Some((head, list)) = text.split_once('(') {
        let mut words = head.split_whitespace();
        let (key, operator) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let operator = match (operator, words.next()) {
            ("in", None) => "In",
            ("notin", None) => "NotIn",
            _ => return Err("has a list without `in` or `notin`"),
        };
        (key, operator, list.trim_end_matches(')').split(',').map(|value| SmolStr::from(value.trim())).collect())
    } else if let Some((key, value)) = text.split_once("!=") {
        (key, "NotIn", vec![SmolStr::from(value.trim())])
    } else if let Some((key, value)) = text.split_once('=') {
        (key, "In", vec![SmolStr::from(value.strip_prefix('=').unwrap_or(value).trim())])
    } else if let Some(key) = text.strip_prefix('!') {
        (key, "DoesNotExist", Vec::new())
    } else {
        (text, "Exists", Vec::new())
    };
    let key = key.trim();
    if key.is_empty() || key.contains(|c: char| c.is_whitespace() || "()=!,".contains(c)) {
        return Err("has a requirement without a label's name");
    }
    Ok(Requirement { key: key.into(), operator: operator.into(), values })
}
