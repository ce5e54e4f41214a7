//! Every bound of the schemas, found in them and exceeded: size, range, enumeration.

use plat_e2e::light::ControlPlane;
use serde_json::{Value, json};

use crate::Really::DryRun;
use crate::{cluster_cidr, crds, ensure, node_network, patch, pod_cidr, routing_policy};

/// One value that a schema must refuse.
#[derive(Debug)]
struct Excess {
    kind: String,
    /// JSON pointer of the field.
    pointer: String,
    value: Value,
}

/// Walks a schema; collects values that exceed its bounds, and fields that have none.
fn walk(kind: &str, pointer: &str, schema: &Value, excesses: &mut Vec<Excess>, unbounded: &mut Vec<String>) {
    let mut exceed =
        |value: Value| excesses.push(Excess { kind: kind.to_owned(), pointer: pointer.to_owned(), value });
    let number = |key: &str| schema[key].as_f64().map(|n| n as i64);
    match schema["type"].as_str().unwrap_or_default() {
        "string" => {
            if let Some(max) = number("maxLength") {
                exceed(json!("1".repeat(max as usize + 1)));
            } else if schema.get("enum").is_some() {
                exceed(json!("Nonsense"));
            } else if schema["format"] == "date-time" {
                exceed(json!("yesterday"));
            } else {
                unbounded.push(pointer.to_owned());
            }
            if number("minLength").is_some_and(|min| min > 0) {
                exceed(json!(""));
            }
        }
        "integer" => {
            exceed(json!("one"));
            if let Some(max) = number("maximum") {
                exceed(json!(max + 1));
            }
            if let Some(min) = number("minimum") {
                exceed(json!(min - 1));
            }
            if schema["format"] == "int32" {
                exceed(json!(1_i64 << 40));
            }
        }
        "boolean" => exceed(json!("yes")),
        "array" => {
            match number("maxItems") {
                Some(max) => exceed(json!(vec![item(&schema["items"]); max as usize + 1])),
                None => unbounded.push(pointer.to_owned()),
            }
            walk(kind, &format!("{pointer}/0"), &schema["items"], excesses, unbounded);
        }
        "object" => {
            if let Some(values) = schema.get("additionalProperties") {
                match number("maxProperties") {
                    Some(max) => exceed((0..=max).map(|n| (format!("k{n}"), json!("v"))).collect()),
                    None => unbounded.push(pointer.to_owned()),
                }
                walk(kind, &format!("{pointer}/key"), values, excesses, unbounded);
            }
            for (name, property) in schema["properties"].as_object().into_iter().flatten() {
                walk(kind, &format!("{pointer}/{name}"), property, excesses, unbounded);
            }
        }
        other => panic!("{pointer} has type '{other}'"),
    }
}

/// A harmless item of a list.
fn item(schema: &Value) -> Value {
    match schema["type"].as_str() {
        Some("object") => json!({}),
        _ => json!("10.244.0.0/24"),
    }
}

/// A merge patch that puts `value` at `pointer`.
fn patch_at(pointer: &str, value: Value) -> Value {
    pointer.rsplit('/').filter(|part| !part.is_empty()).fold(value, |inner, part| match part {
        "0" => json!([inner]),
        _ => json!({ part: inner }),
    })
}

fn spec_and_status(crd: &Value) -> impl Iterator<Item = (String, Value)> {
    let schema = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"];
    let part = |name: &'static str| Some((format!("/{name}"), schema.get(name)?.clone()));
    [part("spec"), part("status")].into_iter().flatten()
}

fn excesses() -> (Vec<Excess>, Vec<String>) {
    let (mut excesses, mut unbounded) = (vec![], vec![]);
    for crd in crds() {
        let kind = crd["spec"]["names"]["kind"].as_str().unwrap();
        for (pointer, schema) in spec_and_status(&crd) {
            walk(kind, &pointer, &schema, &mut excesses, &mut unbounded);
        }
    }
    (excesses, unbounded)
}

#[test]
fn every_string_and_list_is_bounded() {
    assert_eq!(excesses().1, Vec::<String>::new());
}

#[test]
fn every_bound_is_enforced_and_the_refusal_names_the_field() {
    let plane = ControlPlane::shared();
    let objects = [
        cluster_cidr("bounded", json!({"cidr": "10.244.0.0/16"})),
        pod_cidr("10-244-8-0-24", json!({"cidr": "10.244.8.0/24", "clusterCIDR": "c", "nodeName": "n1"})),
        routing_policy("bounded", json!({})),
        node_network("bounded"),
    ];
    objects.iter().for_each(|object| drop(ensure(plane, object)));
    let (excesses, _) = excesses();
    assert!(excesses.len() > 100, "only {} bounds were found: does the walk still work?", excesses.len());
    for excess in excesses {
        let object = objects.iter().find(|o| o["kind"] == *excess.kind).unwrap();
        let change = patch_at(&excess.pointer, excess.value.clone());
        let Err(error) = patch(plane, object, change, DryRun) else {
            panic!("accepted: {excess:?}");
        };
        // `spec.masquerade.exclude[0]`, as the API server writes it; for integers that are too large it
        // names the part (`status`) and the rest of the path apart.
        let field = excess.pointer[1..].replace("/0", "[0]").replace("/key", "").replace('/', ".");
        let (part, rest) = field.split_once('.').unwrap_or((&field, ""));
        assert!(error.contains(part) && error.contains(rest), "{field} is not named: {error}");
    }
}

#[test]
fn every_field_is_described() {
    fn look(pointer: &str, schema: &Value, silent: &mut Vec<String>) {
        for (name, property) in schema["properties"].as_object().into_iter().flatten() {
            let pointer = format!("{pointer}.{name}");
            if property["description"].as_str().unwrap_or_default().len() < 10 {
                silent.push(pointer.clone());
            }
            look(&pointer, property, silent);
            look(&pointer, &property["items"], silent);
        }
    }
    let mut silent = vec![];
    for crd in crds() {
        let version = &crd["spec"]["versions"][0];
        let kind = crd["spec"]["names"]["kind"].as_str().unwrap();
        look(kind, &version["schema"]["openAPIV3Schema"], &mut silent);
        for column in version["additionalPrinterColumns"].as_array().unwrap() {
            if column["name"] != "Age" && column["description"].as_str().unwrap_or_default().is_empty() {
                silent.push(format!("{kind} column {}", column["name"]));
            }
        }
    }
    assert_eq!(silent, Vec::<String>::new());
}
