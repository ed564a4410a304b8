use serde_json::json;

use super::*;

fn selector(value: serde_json::Value) -> LabelSelector {
    serde_json::from_value(value).unwrap()
}

fn labels(pairs: &[(&str, &str)]) -> StringMap {
    pairs.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect()
}

fn expression(operator: &str, values: &[&str]) -> LabelSelector {
    selector(json!({"matchExpressions": [{"key": "k", "operator": operator, "values": values}]}))
}

#[test]
fn each_operator_does_what_kubernetes_says() {
    let is_a = labels(&[("k", "a")]);
    let is_b = labels(&[("k", "b"), ("other", "a")]);
    let empty = labels(&[("k", "")]);
    let none = labels(&[("other", "a")]);
    for (operator, values, expected) in [
        ("In", vec!["a", "c"], [true, false, false, false]),
        ("In", vec![""], [false, false, true, false]),
        // An absent label is not in any set: NotIn holds.
        ("NotIn", vec!["a", "c"], [false, true, true, true]),
        ("NotIn", vec![""], [true, true, false, true]),
        ("Exists", vec![], [true, true, true, false]),
        ("DoesNotExist", vec![], [false, false, false, true]),
    ] {
        let selector = expression(operator, &values);
        assert_eq!(selector.validate(), Ok(()));
        let got = [&is_a, &is_b, &empty, &none].map(|labels| selector.matches_labels(labels));
        assert_eq!(got, expected, "{operator} {values:?}");
    }
}

#[test]
fn every_requirement_must_hold() {
    let selector = selector(json!({
        "matchLabels": {"color": "blue", "tier": "web"},
        "matchExpressions": [{"key": "env", "operator": "NotIn", "values": ["test"]}],
    }));
    for (pairs, expected) in [
        (vec![("color", "blue"), ("tier", "web")], true),
        (vec![("color", "blue"), ("tier", "web"), ("env", "prod"), ("more", "x")], true),
        (vec![("color", "blue"), ("tier", "web"), ("env", "test")], false),
        (vec![("color", "blue")], false),
        (vec![("color", "red"), ("tier", "web")], false),
    ] {
        assert_eq!(selector.matches_labels(&labels(&pairs)), expected, "{pairs:?}");
    }
}

#[test]
fn an_empty_selector_selects_everything() {
    for value in [json!({}), json!({"matchLabels": null, "matchExpressions": null}), json!({"matchLabels": {}})] {
        let selector = selector(value);
        assert_eq!(selector.validate(), Ok(()));
        assert!(selector.matches_labels(&StringMap::new()) && selector.matches_service(&Meta::default()));
    }
}

#[test]
fn invalid_requirements_select_nothing_and_say_what_to_change() {
    for (operator, values, text) in [
        ("in", vec!["a"], "matchExpressions[0]: \"in\" is not an operator; use In, NotIn, Exists or DoesNotExist"),
        ("", vec![], "matchExpressions[0]: \"\" is not an operator; use In, NotIn, Exists or DoesNotExist"),
        ("Gt", vec!["1"], "matchExpressions[0]: \"Gt\" is not an operator; use In, NotIn, Exists or DoesNotExist"),
        ("In", vec![], "matchExpressions[0]: In needs at least one value"),
        ("NotIn", vec![], "matchExpressions[0]: NotIn needs at least one value"),
        ("Exists", vec!["a"], "matchExpressions[0]: Exists takes no values"),
        ("DoesNotExist", vec!["a"], "matchExpressions[0]: DoesNotExist takes no values"),
    ] {
        let selector = expression(operator, &values);
        assert_eq!(selector.validate().unwrap_err().to_string(), text);
    }
    for operator in ["in", "", "Gt"] {
        let selector = expression(operator, &["a"]);
        assert!(!selector.matches_labels(&labels(&[("k", "a")])) && !selector.matches_labels(&StringMap::new()));
    }
    let second = selector(json!({"matchExpressions": [
        {"key": "a", "operator": "Exists"}, {"key": "b", "operator": "In"}
    ]}));
    assert!(second.validate().unwrap_err().to_string().starts_with("matchExpressions[1]:"), "the position is named");
}

#[test]
fn services_are_seen_with_their_namespace_and_name() {
    let meta = Meta {
        name: "web".into(),
        namespace: "shop".into(),
        // Labels of these names do not hide the truth.
        labels: labels(&[("color", "blue"), (SERVICE_NAME_LABEL, "other"), (SERVICE_NAMESPACE_LABEL, "other")]),
        ..Meta::default()
    };
    for (key, value, expected) in [
        (SERVICE_NAMESPACE_LABEL, "shop", true),
        (SERVICE_NAMESPACE_LABEL, "other", false),
        (SERVICE_NAME_LABEL, "web", true),
        (SERVICE_NAME_LABEL, "other", false),
        ("color", "blue", true),
        ("color", "red", false),
    ] {
        let by_label = selector(json!({"matchLabels": {key: value}}));
        assert_eq!(by_label.matches_service(&meta), expected, "{key}={value}");
        let by_set = selector(json!({"matchExpressions": [{"key": key, "operator": "In", "values": [value]}]}));
        assert_eq!(by_set.matches_service(&meta), expected, "{key} in {value}");
    }
    let exists = selector(json!({"matchExpressions": [{"key": SERVICE_NAME_LABEL, "operator": "Exists"}]}));
    assert!(exists.matches_service(&meta) && !exists.matches_labels(&StringMap::new()));
}
